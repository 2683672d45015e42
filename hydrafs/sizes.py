"""Sizes as people write them: ``4G``, ``1.5GiB``, ``512m``; one reader for options, configuration and commands."""

from __future__ import annotations

import re

from hydrafs.errors import UsageError

__all__ = ["parse_nbytes"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})\s*([kmgt]?)(?:i?b)?", re.ASCII)
_MAX_NBYTES = 1 << 62


def parse_nbytes(text: str) -> int:
    """A size in bytes, at least 1: a number, with a fraction or without, and K, M, G or T (powers of 1024), ``B`` or
    ``iB`` behind it or not.

    Raises:
        UsageError: it is none.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    nbytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 1 <= nbytes <= _MAX_NBYTES:
        raise UsageError("not a size", where=text, remedy="write it as 512M or 4G")
    return nbytes
