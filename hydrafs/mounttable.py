"""The kernel's table of mounts (``/proc/self/mountinfo``, see proc(5)): what is mounted where, asked of nobody else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MountInfo", "all_mounts", "fuse_mountpoints"]


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of ``/proc/self/mountinfo``. ``device`` is ``MAJOR:MINOR``; ``parent_id``: the mount that it is mounted
    on."""

    mount_id: int
    device: str
    mountpoint: Path
    fstype: str
    source: str
    options: tuple[str, ...]
    parent_id: int = 0


def _unescape(field: str) -> str:
    """Space, tab, newline and backslash are written as three octal digits (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def all_mounts() -> list[MountInfo]:
    """Every mount of this namespace, in the order of the kernel: of two on one place the last is on top."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, (fstype, source, super_options) = left.split(" "), right.split(" ")[:3]
            options = dict.fromkeys([*fields[5].split(","), *super_options.split(",")])
            mountpoint = Path(_unescape(fields[4]))
            found.append(
                MountInfo(
                    int(fields[0]), fields[2], mountpoint, fstype, _unescape(source), tuple(options), int(fields[1])
                )
            )
    return found


def fuse_mountpoints() -> frozenset[str]:
    """Where a program answers for a filesystem: hydrafs' own mounts, and other ones of FUSE but for disks (fuseblk)."""
    try:
        return frozenset(str(m.mountpoint) for m in all_mounts() if m.fstype == "fuse" or m.fstype.startswith("fuse."))
    except OSError:
        return frozenset()
