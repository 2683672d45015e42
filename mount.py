#!/usr/bin/env python3
"""``python mount.py STORE [MOUNTPOINT]``: the same as ``hydrafs mount``."""

import sys

from hydrafs.cli import main

if __name__ == "__main__":
    sys.exit(main(["mount", *sys.argv[1:]]))
