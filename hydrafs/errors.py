"""What can go wrong, told so that a person knows what to do next.

One class per decision a user can take. Each carries the exit code of the command line and the errno that the mount
answers with; both are looked up here and nowhere else. A message reads ``WHAT, WHERE: got/expected; what to do next``.
"""

from __future__ import annotations

import errno
import logging
import os

from hydrafs.covered import shown


class HydraError(Exception):
    """The root of every error that hydrafs raises on purpose.

    Args:
        what: what went wrong, a few words.
        where: the file, tensor or chunk it went wrong in.
        detail: what was found and what was expected.
        remedy: what the user should do next.
    """

    exit_code: int = 1
    errno: int = errno.EIO
    """Of the class; ``from_oserror`` gives one error the errno that the operating system said."""
    default_remedy: str = ""

    def __init__(self, what: str, *, where: object = "", detail: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = printable(os.fspath(where) if isinstance(where, os.PathLike) else str(where))
        self.detail = detail
        self.remedy = remedy or self.default_remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f", {self.where}"
        if self.detail:
            text += f": {self.detail}"
        if self.remedy:
            text += f"; {self.remedy}"
        return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """``text`` on one line, with bytes that no terminal shows written as escapes."""
    text = shown(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class VerifyFailed(HydraError):
    """Bytes were decoded and are not the ones that were stored."""

    exit_code = 1


class UsageError(HydraError):
    """The command was given something that cannot be meant."""

    exit_code = 2
    errno = errno.EINVAL


class NotFound(HydraError):
    """No model, diff, store or base of that name."""

    exit_code = 3
    errno = errno.ENOENT


class BadModel(HydraError):
    """A model file breaks the rules of its own container."""

    exit_code = 4


class CorruptDiff(HydraError):
    """A diff is damaged: truncated, altered, or not a diff."""

    exit_code = 5
    default_remedy = "restore the file from a backup; hydrafs verify lists what is damaged"


class CorruptChunk(CorruptDiff):
    """One chunk does not decode to the bytes that its checksum was taken of."""


class UnsupportedDiff(HydraError):
    """A diff needs a newer hydrafs: its version or a feature that it requires is unknown here."""

    exit_code = 6
    default_remedy = "update hydrafs"


class ParentUnavailable(HydraError):
    """A parent that a diff needs is missing, or is not the file that it was."""

    exit_code = 7


class ParentMissing(ParentUnavailable):
    """No file with the parent's SHA-256 is in the store or its base folders."""


class ParentChanged(ParentUnavailable):
    """A file stands under the parent's name, and its content is another."""


class ParentLoop(ParentUnavailable):
    """A diff needs itself, or its chain of parents is deeper than the limit."""


class NoSpace(HydraError):
    """The disk cannot take what is to be written."""

    exit_code = 8
    errno = errno.ENOSPC
    default_remedy = "free some space, or name another place with --store or --output"


class Denied(HydraError):
    """The operating system forbids it."""

    exit_code = 9
    errno = errno.EACCES


class Protected(Denied):
    """The store's policy forbids it: dehydrated models may not be removed or renamed."""

    errno = errno.EPERM
    default_remedy = "mount without --protect, or set protect = false in .hydrafs/config.toml"


class NoLocks(Denied):
    """The filesystem has no locks, and what was asked for needs the store's."""

    errno = errno.ENOLCK
    default_remedy = "this filesystem has no locks; mount it with flock, or use --read-only"


class AlreadyThere(HydraError):
    """What was to be written exists already, or someone else is writing it."""

    exit_code = 10
    errno = errno.EEXIST


class OutOfMemory(HydraError):
    """There is no memory left for it."""

    exit_code = 8
    errno = errno.ENOMEM
    default_remedy = "use fewer --jobs or a smaller --cache-size, or end something else"


class TooManyFiles(HydraError):
    """This process, or the whole machine, may open no more files."""

    errno = errno.EMFILE
    default_remedy = "close some, or allow more: ulimit -Hn for a shell, LimitNOFILE= for a service"


class StoreGone(HydraError):
    """Another folder stands where the store was: its disk is gone, or not there yet."""

    exit_code = 3
    errno = errno.EIO
    default_remedy = "bring the store's disk back; what is open, and all else, goes on then"


class MountFailed(HydraError):
    """The mount could not be set up or taken down."""

    exit_code = 11


class Changing(HydraError):
    """A file changed while it was being read."""

    exit_code = 12
    errno = errno.EBUSY
    default_remedy = "try again when nothing writes to it"


class OntoItself(Changing):
    """A program is about to empty, delete or replace the very file that it reads by another path."""


class StoreLocked(Changing):
    """Another process holds the store's lock, and for longer than the caller may wait."""

    default_remedy = "see which hydrafs command is running, or stopped, and let it end"


def log_once(logger: logging.Logger, error: BaseException, line: str, *arguments: object) -> None:
    """Log ``line`` at ERROR unless a room nearer to the cause has logged ``error`` already: one failure, one line."""
    if not getattr(error, "hydrafs_logged", False):
        error.hydrafs_logged = True  # type: ignore[attr-defined]  # an OSError takes it as well as one of ours
        logger.error(line, *arguments)


_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL})


def has_no_locks(error: OSError) -> bool:
    """Whether what flock(2) said of a descriptor that is open means that the filesystem has no locks: Lustre without
    ``-o flock`` (ENOSYS), NFS without its lock daemon (ENOLCK) or of another mode (EBADF), others (EOPNOTSUPP)."""
    return error.errno in _NO_LOCKS


_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def is_shortage(error: HydraError) -> bool:
    """Whether this process had not what it takes to look (descriptors, memory): it says nothing of the file."""
    return error.errno in _SHORTAGES


_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
_SERVER = "see whether the server that this filesystem is on answers, and try again"
_OF_ERRNO: dict[int, tuple[type[HydraError], str]] = {
    errno.ENOSPC: (NoSpace, ""),
    errno.EDQUOT: (NoSpace, "the quota is used up: free some space, or ask for more"),
    errno.EFBIG: (NoSpace, "this filesystem, or the limit of this process, takes no file that large"),
    errno.EACCES: (Denied, "check the permissions of the file and its folder"),
    errno.EPERM: (Denied, "check the permissions of the file and its folder, and its attributes (lsattr)"),
    errno.EROFS: (Denied, "the filesystem is read-only: mount it for writing, or see the system log for why it is"),
    errno.ENOENT: (NotFound, "check the path"),
    errno.ENOTDIR: (NotFound, "check the path"),
    errno.EEXIST: (AlreadyThere, ""),
    errno.EBUSY: (Changing, "something uses it: try again when that is done"),
    errno.ETXTBSY: (Changing, "it is open for writing, or runs: try again when that is done"),
    errno.ENOLCK: (NoLocks, ""),
    errno.EMFILE: (TooManyFiles, ""),
    errno.ENFILE: (
        TooManyFiles,
        "the whole machine has too many files open: close some, or raise fs.file-max (sysctl)",
    ),
    errno.ENOMEM: (OutOfMemory, ""),
    errno.ESTALE: (
        HydraError,
        "the file, or the share it is on, is another by now: look again, or mount the share again",
    ),
    errno.ETIMEDOUT: (HydraError, _SERVER),
    errno.EHOSTDOWN: (HydraError, _SERVER),
    errno.EHOSTUNREACH: (HydraError, _SERVER),
    errno.ENETUNREACH: (HydraError, _SERVER),
    errno.EREMOTEIO: (HydraError, _SERVER),
    errno.ELOOP: (HydraError, "its links lead in a circle: mend or remove them"),
    errno.ENAMETOOLONG: (HydraError, "the name is too long for this filesystem: give it a shorter one"),
    errno.EINTR: (HydraError, "it was interrupted: try again"),
    errno.EAGAIN: (HydraError, "it cannot be done at this moment: try again"),
    errno.EXDEV: (HydraError, "both names must be on one filesystem"),
    errno.EMLINK: (HydraError, "the file, or the folder, has as many links as this filesystem allows"),
    errno.ENOTEMPTY: (HydraError, "the folder is not empty"),
    errno.EISDIR: (HydraError, "it is a folder: name a file"),
    errno.EINVAL: (HydraError, "this filesystem does not do that, or not with this name"),
    errno.ENOTSUP: (HydraError, "this filesystem cannot do that"),
    errno.ENODEV: (HydraError, "the disk is gone: see the system log"),
    errno.ENXIO: (HydraError, "the disk is gone: see the system log"),
}
"""The class, and what to do, for each errno that says more than "it does not work"."""


def from_oserror(error: OSError, what: str, where: object = "") -> HydraError:
    """The error of ours that an ``OSError`` amounts to. Its ``errno`` is what the operating system said: a program
    behind the mount can tell a full disk from too many open files. (A dead mount is EIO to it: ENOTCONN is what the
    kernel says where our own daemon is dead.)"""
    reason = error.strerror or error.__class__.__name__
    where = where or error.filename or ""
    if error.errno in _DEAD:
        remedy = "hydrafs umount takes down what is left of it; then mount again"
        return MountFailed("the daemon of this mount is dead", where=where, detail=reason, remedy=remedy)
    kind, remedy = _OF_ERRNO.get(error.errno or 0, (HydraError, "check the disk and the system log"))
    made = kind(what, where=where, detail=reason, remedy=remedy)
    if error.errno in _OF_ERRNO:
        made.errno = error.errno or errno.EIO
    return made
