"""How much memory a service may have, and the cache that fits into it.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst: a limit of any group above binds too; the low mark,
``memory.high``, slows a process down long before ``memory.max`` kills it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["fitting_cache", "limit_nbytes"]

DEFAULT_CACHE_NBYTES = 4 << 30
_FLOOR_NBYTES = 16 << 20
# What is not the cache: the interpreter and its libraries (60 MB), open diffs, chunks in the making in each thread.
_SHARE = 0.75


def limit_nbytes(process: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory that the control group of ``process``, or one above it, allows, in bytes; None where nothing is said.

    Args:
        process: a folder of proc(5).
        groups: where the one hierarchy of version 2 is mounted.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return None
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return None
    folder = groups / name.lstrip("/")
    found = []
    while folder.is_relative_to(groups):
        for knob in ("memory.high", "memory.max"):
            try:
                text = (folder / knob).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                found.append(int(text))
        if folder == groups:
            break
        folder = folder.parent
    return min(found, default=None)


def fitting_cache(wanted: int | None, limit: int | None, *, fill: bool = False) -> int:
    """How large the chunk cache may be, in bytes.

    Args:
        wanted: what was asked for; None for the default, 4 GiB.
        limit: what the control group allows; None for no limit.
        fill: with nothing asked for, take all that fits under the limit, also where that is more than the default.

    Returns:
        What was wanted, or three quarters of the limit where that is less.
    """
    if limit is None:
        return wanted or DEFAULT_CACHE_NBYTES
    fits = max(_FLOOR_NBYTES, int(limit * _SHARE))
    if wanted is None and fill:
        return fits
    return min(wanted or DEFAULT_CACHE_NBYTES, fits)
