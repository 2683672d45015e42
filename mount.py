#!/usr/bin/env python3
"""``python mount.py STORE [MOUNTPOINT]``: the same as ``hydrafs mount``."""

import sys

from hydrafs.__main__ import run

if __name__ == "__main__":
    sys.exit(run(["mount", *sys.argv[1:]]))
