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


class AlreadyThere(HydraError):
    """What was to be written exists already, or someone else is writing it."""

    exit_code = 10
    errno = errno.EEXIST


class MountFailed(HydraError):
    """The mount could not be set up or taken down."""

    exit_code = 11


class Changing(HydraError):
    """A file changed while it was being read."""

    exit_code = 12
    errno = errno.EBUSY
    default_remedy = "try again when nothing writes to it"


class StoreLocked(Changing):
    """Another process holds the store's lock, and for longer than the caller may wait."""

    default_remedy = "see which hydrafs command is running, or stopped, and let it end"


def log_once(logger: logging.Logger, error: BaseException, line: str, *arguments: object) -> None:
    """Log ``line`` at ERROR unless a room nearer to the cause has logged ``error`` already: one failure, one line."""
    if not getattr(error, "hydrafs_logged", False):
        error.hydrafs_logged = True  # type: ignore[attr-defined]  # an OSError takes it as well as one of ours
        logger.error(line, *arguments)


def from_oserror(error: OSError, what: str, where: object = "") -> HydraError:
    """The error of ours that an ``OSError`` amounts to, by its errno."""
    reason = error.strerror or error.__class__.__name__
    where = where or error.filename or ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(what, where=where, detail=reason)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Denied(what, where=where, detail=reason, remedy="check the permissions of the file and its folder")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(what, where=where, detail=reason, remedy="check the path")
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        remedy = "hydrafs umount takes down what is left of it; then mount again"
        return MountFailed("the daemon of this mount is dead", where=where, detail=reason, remedy=remedy)
    if error.errno == errno.EEXIST:
        return AlreadyThere(what, where=where, detail=reason)
    return HydraError(what, where=where, detail=reason, remedy="check the disk and the system log")
