"""``python -m hydrafs``: the command line."""

import sys

from hydrafs.cli import main

if __name__ == "__main__":
    sys.exit(main())
