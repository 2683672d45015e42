"""A copy of a file that passes for it: content, mode, owner, times and attributes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat as stat_module
from pathlib import Path

from hydrafs.temporary import TemporaryFile

__all__ = ["copy_attributes", "copy_into", "reflink"]

_FICLONE = 0x40049409
_COPY_NBYTES = 8 << 20


def copy_into(temporary: TemporaryFile, path: Path) -> os.stat_result:
    """Make ``temporary`` a copy of the file at ``path``, on the disk (a reflink where the filesystem can).

    Returns:
        What the file was before it was read: who gives the copy its name compares.

    Raises:
        OSError: it cannot be read, or there is no room.
    """
    fd = temporary.file.fileno()
    with open(path, "rb", buffering=0) as source:
        stat = os.fstat(source.fileno())
        if not reflink(source.fileno(), fd):
            offset = 0
            while count := _copy_some(source.fileno(), fd, offset):
                offset += count
    copy_attributes(fd, path, stat)
    os.utime(fd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    temporary.flush_to_disk()
    return stat


def reflink(source: int, target: int) -> bool:
    """Give the open file ``target`` the content of ``source``, sharing what is on the disk: what is written to one of
    them later is not in the other (ioctl_ficlone(2)). Whether the filesystem can; it copies nothing."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy_some(source: int, to: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, to, _COPY_NBYTES, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.pwrite(to, os.pread(source, _COPY_NBYTES, offset), offset)


def copy_attributes(fd: int, path: Path, stat: os.stat_result) -> None:
    """Give the open file ``fd`` the owner, the mode and the attributes of the file at ``path``, as far as one may."""
    with contextlib.suppress(OSError):  # EPERM, and EINVAL of an owner that is none in this namespace
        os.fchown(fd, stat.st_uid, stat.st_gid)
    os.fchmod(fd, stat_module.S_IMODE(stat.st_mode))
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(path, name))
