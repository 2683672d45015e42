"""How much memory a service may have, and the cache that fits into it.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst: a limit of any group above binds too; the low mark,
``memory.high``, slows a process down long before ``memory.max`` kills it. In the groups of version 1
(Documentation/admin-guide/cgroup-v1/memory.rst) there is one mark, and "no limit" is the largest multiple of a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["fitting_cache", "limit_nbytes"]

DEFAULT_CACHE_NBYTES = 4 << 30
_FLOOR_NBYTES = 16 << 20
# What is not the cache: the interpreter and its libraries (60 MB), open diffs, chunks in the making in each thread.
_SHARE = 0.75
_NO_LIMIT_NBYTES = 1 << 60


def limit_nbytes(process: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory that the control group of ``process``, or one above it, allows, in bytes; None where nothing is said.

    Args:
        process: a folder of proc(5).
        groups: where control groups are mounted: the one hierarchy of version 2, or those of version 1, of which that
            of memory is in ``memory``. A machine may have both.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            found += _limits(groups, name, ("memory.high", "memory.max"))
        elif "memory" in controllers.split(","):
            found += _limits(groups / "memory", name, ("memory.limit_in_bytes",))
    return min(found, default=None)


def _limits(hierarchy: Path, name: str, knobs: tuple[str, ...]) -> Iterator[int]:
    """What the group ``name`` and those above it say. In a container only the container's own may be there, as the
    root of the hierarchy: whatever is not there says nothing."""
    folder = hierarchy / name.lstrip("/")
    while folder.is_relative_to(hierarchy):
        for knob in knobs:
            try:
                text = (folder / knob).read_text().strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < _NO_LIMIT_NBYTES:
                yield int(text)
        folder = folder.parent


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
