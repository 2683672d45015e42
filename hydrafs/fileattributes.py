"""What a file is besides its bytes (owner, mode, extended attributes, access lists), and what another can carry of it.

Rule 1: owner first, then attributes, then the mode: a change of owner takes set-user-ID bits away, an access list
        changes the mode, and the mode is what both are read with.
Rule 2: what cannot be carried is said, and never silently left out. What the kernel gives each file by itself (labels,
        checksums of attributes) is not the file's own, and hydrafs' own names are not either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from dataclasses import dataclass

__all__ = ["Lost", "carry", "never_carried"]

_ACCESS_LIST = "system.posix_acl_access"
_NOT_ITS_OWN = (
    "security.selinux", "security.SMACK64", "security.apparmor", "security.evm", "trusted.overlay.", "trusted.SGI_",
    "user.hydrafs.", "user.hash.",
)  # fmt: skip
_OF_ITS_BYTES = frozenset({"security.capability", "security.ima"})
"""What belongs to the very bytes of a file, as a program or a signed file: no other file may have it."""
_CANNOT = frozenset({
    errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW,
    errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE, errno.ENODATA,
})  # fmt: skip
"""What says that this file, or whoever asks, cannot have it (EINVAL: an owner that is none in a user namespace; ENOSPC:
attributes have little room). All else is a disk that fails."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What could not be carried; empty where everything could. ``owner``: what stood in the way of the owner."""

    owner: str = ""
    attributes: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words."""
        owner = (f"its owner cannot be kept: {self.owner}",) if self.owner else ()
        return (*owner, *(f"its attribute {name} cannot be kept" for name in self.attributes))


def carry(source: int, target: int, mode: int | None = None) -> Lost:
    """Give the open file ``target`` the owner and the extended attributes, access list included, of ``source``.

    Args:
        mode: what its mode is to be then. Without the owner it loses set-user-ID and set-group-ID: the right to act as
            one user is not handed on as the right to act as another.

    Raises:
        OSError: the disk failed.
    """
    owner = _owner(os.fstat(source), target)
    attributes = _attributes(source, target)
    if mode is not None:
        wanted = stat_module.S_IMODE(mode)
        os.fchmod(target, wanted & ~(stat_module.S_ISUID | stat_module.S_ISGID) if owner else wanted)
    return Lost(owner, attributes)


def never_carried(source: int) -> tuple[str, ...]:
    """The attributes of the open file ``source`` that belong to its very bytes: no other file may have them."""
    return tuple(name for name in _names(source) if name in _OF_ITS_BYTES)


def _owner(wanted: os.stat_result, target: int) -> str:
    now = os.fstat(target)
    if (now.st_uid, now.st_gid) == (wanted.st_uid, wanted.st_gid):
        return ""
    try:
        os.fchown(target, wanted.st_uid, wanted.st_gid)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        with contextlib.suppress(OSError):  # a user may give a file to a group that the user is in
            os.fchown(target, -1, wanted.st_gid)
        return f"{wanted.st_uid}:{wanted.st_gid}, {error.strerror}"
    return ""


def _names(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return []


def _attributes(source: int, target: int) -> tuple[str, ...]:
    names = _names(source)
    if _ACCESS_LIST not in names and _ACCESS_LIST in _names(target):  # its folder's, by default
        with contextlib.suppress(OSError):
            os.removexattr(target, _ACCESS_LIST)
    return tuple(name for name in names if not name.startswith(_NOT_ITS_OWN) and not _attribute(source, target, name))


def _attribute(source: int, target: int, name: str) -> bool:
    if name in _OF_ITS_BYTES:
        return False
    try:
        value = os.getxattr(source, name)
        os.setxattr(target, name, value)
        return os.getxattr(target, name) == value
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
