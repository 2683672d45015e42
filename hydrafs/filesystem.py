"""What kind of filesystem a file is on, and what its times tell.

Rule: what is not known to be so is doubted: a filesystem that is not listed is not local.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

__all__ = ["is_local", "is_settled", "is_stacked", "same_mount", "settles_in", "times_tell"]

_libc = ctypes.CDLL(None, use_errno=True)
_EXT, _XFS, _BTRFS, _F2FS, _OVERLAY = 0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x794C7630
_TMPFS, _RAMFS, _HUGETLBFS = 0x01021994, 0x858458F6, 0x958458F6
_LOCAL = frozenset({
    _EXT, _XFS, _BTRFS, _F2FS, _OVERLAY, _TMPFS, _RAMFS, _HUGETLBFS,
    0x2FC12FC1,  # zfs
    0xCA451A4E,  # bcachefs
    0x3153464A,  # jfs
    0x52654973,  # reiserfs
    0x3434,  # nilfs2
    0x4D44,  # vfat
    0x2011BAB0,  # exfat
    0x7366746E,  # ntfs3
    0x5346544E,  # ntfs
    0x482B,  # hfsplus
    0x24051905,  # ubifs
})  # fmt: skip
"""``f_type`` of filesystems that only this machine writes to (statfs(2), linux/magic.h)."""
_FINE_NS, _COARSE_NS = 20_000_000, 2_500_000_000
"""How far apart two writes are at least that surely leave different times. A kernel's tick is at most 10 ms; times
without a fraction may be of a filesystem that keeps no more (FAT: two seconds)."""


def _kind(fd: int) -> int:
    """``f_type`` of the filesystem of an open file; 0 where it is not told."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs begins with f_type, a long; it is 120 bytes and less
    if _libc.fstatfs(fd, buffer) != 0:
        return 0
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def is_local(fd: int) -> bool:
    """Whether only this machine writes to the filesystem of an open file, as far as its kind tells."""
    return _kind(fd) in _LOCAL


def is_stacked(fd: int) -> bool:
    """Whether the kernel may know an open file under other numbers than ``stat`` tells."""
    return _kind(fd) not in _LOCAL - {_OVERLAY, _BTRFS}


def times_tell(fd: int) -> bool:
    """Whether every write to an open file shows in its times, those through a mapping that is made later too.

    Not so in memory: a page that was read through a shared mapping is written there with no notice (mm/mmap.c,
    ``vma_wants_writenotify``), so a file may be another though nothing that ``stat`` tells has changed.
    """
    return _kind(fd) not in (_TMPFS, _RAMFS, _HUGETLBFS)


def settles_in(stat: os.stat_result, fd: int) -> int:
    """In how many nanoseconds a write would leave other times on an open file than ``stat`` has; 0 where now."""
    now = time.time_ns()
    local = is_local(fd)
    left = 0
    for when in (stat.st_mtime_ns, stat.st_ctime_ns):
        apart = _FINE_NS if local and when % 1_000_000_000 else _COARSE_NS
        if abs(now - when) <= apart:  # a time far in the future was set, and no write leaves it
            left = max(left, when + apart - now + 1)
    return left


def is_settled(stat: os.stat_result, fd: int) -> bool:
    """Whether a write to an open file would leave other times than ``stat`` has: from then on equal times say that
    nothing was written."""
    return settles_in(stat, fd) == 0


def same_mount(one: Path, other: Path) -> bool:
    """Whether a file can be linked and renamed from one folder to the other: one filesystem, reached through one mount
    (link(2), EXDEV). False where that cannot be told."""
    try:
        return os.stat(one).st_dev == os.stat(other).st_dev and _mount_of(one) == _mount_of(other)
    except (OSError, StopIteration):
        return False


def _mount_of(folder: Path) -> str:
    fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        return next(line for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
