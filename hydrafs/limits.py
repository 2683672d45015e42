"""What the operating system lets a process have, raised to what it may have."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_open_files"]

_ENOUGH = 1 << 20
"""More is never needed, and some C libraries and tools go through all numbers that there could be."""


def raise_open_files() -> int:
    """Let this process, and those that it starts, open as many files as the hard limit says; the limit from then on.

    The soft limit of a shell, 1024, is for programs that use select(2). Each open model takes a descriptor, and one for
    each of its parents.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
