"""``python -m hydrafs``: the command line, and what it says where the Python that runs it lacks what it needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_OLDEST = (3, 10)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command (default: what the process was called with); its exit code. See ``hydrafs.cli.main``."""
    if sys.version_info < _OLDEST:
        return _lacks("this Python is too old", "3.{}.{}, expected 3.10 or newer".format(*sys.version_info[1:3]))
    try:
        # Here and not above: who starts mount.py from a clone may have none of the packages that it needs.
        from hydrafs.cli import main  # noqa: PLC0415

        return main(arguments)
    except ModuleNotFoundError as error:
        return _lacks("a Python package is missing", error.name or str(error))


def _lacks(what: str, detail: str) -> int:
    remedy = "install hydrafs for it (pip install . in its folder), or use .venv/bin/python, which make mount sets up"
    print(f"hydrafs: {what}, {sys.executable}: {detail}; {remedy}", file=sys.stderr)  # noqa: T201
    return 3


if __name__ == "__main__":
    sys.exit(run())
