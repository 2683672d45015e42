"""A file of the store becomes one that may be written to: a diff is made whole, a file that others need is kept first.

Rule 1: what others need is not written to. It goes among the retired as the file that it is, and the name goes on with
        a copy: whoever reads the old one, hydrafs too, has it open or under a lease and notices nothing. (The other way
        round, a copy among the retired and the old file under the name, the kernel would see one file all along. But
        each open parent, each hold and what is proven of them would be of a file that is written to from then on.)
Rule 2: nothing large is copied while the store's lock is held. What was copied counts only if the file is still the
        same and unchanged when the lock is had again.
Rule 3: whether a file is needed is asked, and the file opened for writing, under one hold of the store's lock: who
        makes a file a parent holds it too, and has a lease on the file, which that open breaks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat as stat_module
import time
from pathlib import Path

from hydrafs.diff import read_trailer
from hydrafs.errors import Changing, NoSpace, VerifyFailed, from_oserror
from hydrafs.filecopy import copy_attributes, copy_into
from hydrafs.identity import is_unchanged
from hydrafs.keeping import Aside, keep_to_overwrite, lstat, with_copies
from hydrafs.rehydrate import Rehydrated
from hydrafs.restore import carry_over, read_all
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile, fsync_folder

__all__ = ["lock_shared", "make_whole", "open_to_write", "reopen"]

_LEASE_SECONDS = 50.0
"""The kernel takes a lease away after 45 seconds (``/proc/sys/fs/lease-break-time``)."""
_MAX_COPIES = 3
_LEASED = -1


def reopen(fd: int, flags: int) -> int:
    """Another descriptor of the file that ``fd`` is open on, opened with ``flags``."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except PermissionError:
        # Its mode was changed since it was opened. Who has a file open for writing goes on writing.
        return os.dup(fd)


def lock_shared(fd: int) -> None:
    """Who dehydrates a file holds the exclusive lock while the original goes, and leaves one alone that has this."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def make_whole(model: Rehydrated, temporary: TemporaryFile) -> None:
    """Write the model of an open diff into ``temporary``, with the owner, mode, times and attributes that it has now.

    Raises:
        NoSpace: there is no room for it.
        HydraError: it cannot be read, or does not have its SHA-256; ``temporary`` is of no use.
    """
    where = model.diff.path
    try:
        _check_room(temporary.path.parent, model.size, where)
        found = read_all(model, temporary.file.write)
        temporary.file.flush()
        if found != model.manifest.sha256:
            raise VerifyFailed(
                "a diff does not give its model back",
                where=where,
                detail=f"SHA-256 {found.hex()}, expected {model.manifest.sha256.hex()}",
                remedy="restore its parents or the diff; check the memory and the disk of this machine",
            )
        fd = temporary.file.fileno()
        carry_over(model.diff.fd, fd)
        trailer = read_trailer(model.diff.fd, where)
        os.fchmod(fd, trailer.mode & 0o7777)
        os.utime(fd, ns=(os.fstat(model.diff.fd).st_atime_ns, trailer.mtime_ns))
    except OSError as error:
        raise from_oserror(error, "cannot write the model", where) from error


def _check_room(folder: Path, nbytes: int, where: object) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < nbytes:
        raise NoSpace(
            "not enough space to write into a model",
            where=str(where),
            detail=f"{free / 1e6:.0f} MB free in {folder}, {nbytes / 1e6:.0f} MB needed",
            remedy="free some space; the model stays as it is",
        )


def open_to_write(
    store: Store,
    path: Path,
    flags: int,
    found: os.stat_result,
    *,
    truncate: bool = False,
    aside: Aside | None = None,
) -> int | None:
    """A descriptor to write to, opened with ``flags``, of the plain file at ``path``; with ``truncate`` it is empty.
    What others need is kept first, and the name has another file then (rule 1).

    Args:
        aside: where what is truncated can be had back from for a while (``hydrafs.trash.put``).

    Returns:
        ``None`` where the file that was ``found`` there is not there any more.

    Raises:
        Changing: it is replaced, or written to by somebody else, again and again.
        OSError: as open(2), or the old content cannot be kept, so it must not be written to.
        HydraError: the store's lock cannot be had.
    """
    deadline = time.monotonic() + _LEASE_SECONDS
    for _ in range(_MAX_COPIES):
        while (outcome := with_copies(store, lambda: _try(store, path, flags, found, truncate, aside))) == _LEASED:
            # A lease is being broken: whoever has it gives it back in an instant.
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
            time.sleep(0.005)
        if not isinstance(outcome, os.stat_result):
            return outcome
        fd = _renew(store, path, outcome, flags, truncate=truncate)
        if fd is not None:
            return fd
    raise Changing("a model is replaced or written to all the time", where=path)


def _try(
    store: Store, path: Path, flags: int, found: os.stat_result, truncate: bool, aside: Aside | None
) -> int | os.stat_result | None:
    """A descriptor, with the lock held: ``_LEASED`` where a lease is in the way; what the file is that is kept, and
    whose name a new one is to take; ``None`` where it is gone."""
    now = lstat(path)
    if now is None or not os.path.samestat(now, found):
        return None
    if not stat_module.S_ISREG(now.st_mode):
        return os.open(path, flags | os.O_CLOEXEC)
    kept = keep_to_overwrite(store, path, aside if truncate and now.st_size else None)
    if kept is not None:
        return kept
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:
        return _LEASED
    if truncate and now.st_size:
        os.ftruncate(fd, 0)
    return fd


def _renew(store: Store, path: Path, kept: os.stat_result, flags: int, *, truncate: bool) -> int | None:
    """A descriptor of a copy of the file ``kept``, which has its name now; ``None`` where that was changed since."""
    with TemporaryFile(path.parent) as copy:
        if truncate:
            copy_attributes(copy.file.fileno(), path, kept)
        elif not is_unchanged(kept, copy_into(copy, path)):
            return None
        with store.lock():
            now = lstat(path)
            if now is None or not is_unchanged(kept, now):
                return None
            fd = reopen(copy.file.fileno(), flags)
            try:
                os.replace(copy.path, path)
                fsync_folder(path.parent)
            except BaseException:
                os.close(fd)
                raise
            return fd
