"""The lock of a store: one thread of one process at a time changes what the store says of itself.

Rule 1: a crash lets go of it: it is flock(2) of ``.hydrafs/lock``. Where that file is missing and cannot be made, since
        the disk is full, it is the store's folder that is locked; and who makes the file holds the folder's lock.
Rule 2: who may not wait for ever (a mount) waits a few seconds for another process, and no time at all for one that is
        known to sit on the lock; threads of one process queue, and no more than ``MAX_WAITING`` of them while nothing
        goes on: the threads of a mount are what its readers need.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hydrafs.covered import named
from hydrafs.errors import NoLocks, StoreLocked, from_oserror, has_no_locks
from hydrafs.root_identity import RootIdentity

__all__ = ["MAX_WAITING", "StoreLock", "holder_of"]

MAX_WAITING = 24
_LOOK_SECONDS = 0.005
_KNOWN_SECONDS = 0.05
"""How long to wait for a process that did not let go of the lock in the full time before."""
_STANDSTILL_SECONDS = 0.5
"""After that long with one owner, threads do not queue without bounds."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreLock:
    """The lock of one store. Thread safety: any number of threads; not to be taken twice by one.

    Args:
        root: the store's folder.
        identity: by whose descriptor the lock file is reached: never in a folder that is not the store.
        name: the lock file, relative to the store's folder.
    """

    def __init__(self, root: Path, identity: RootIdentity, name: str) -> None:
        self._root = root
        self._identity = identity
        self._name = name
        self._turns = threading.Condition()
        self._owner_since: float | None = None
        self._waiting = 0
        self._sits_on_it: int | None = None
        """The process that did not let go of the lock in the full time; 0 where it cannot be told which."""

    @contextlib.contextmanager
    def held(self, seconds: float | None) -> Iterator[None]:
        """Hold the lock.

        Args:
            seconds: how long to wait for one who has it; None for as long as it takes.

        Raises:
            StoreLocked: somebody had it for longer, or so many wait for it that it is better to say so.
            NoLocks: the filesystem has none.
            HydraError: the lock file cannot be made.
        """
        with self._turn(seconds):
            fd = self._locked(seconds)
            try:
                yield
            finally:
                os.close(fd)

    def wait(self, fd: int, seconds: float | None) -> None:
        """Lock the open file ``fd``.

        Raises:
            StoreLocked: another one had it for ``seconds``.
            OSError: as flock(2).
        """
        if seconds is None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            return
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sits_on_it = None
                return
            except BlockingIOError:
                pass
            waited = time.monotonic() - began
            known = self._sits_on_it is not None and waited >= _KNOWN_SECONDS
            if known or waited >= seconds:
                pid, who = holder_of(fd)
                if waited >= seconds or pid == self._sits_on_it:
                    self._sits_on_it = pid
                    raise self._is_locked(seconds, who)
            time.sleep(_LOOK_SECONDS)

    def _is_locked(self, seconds: float, who: str) -> StoreLocked:
        detail = f"{who}, for over {seconds:g} seconds" if who else f"for over {seconds:g} seconds"
        return StoreLocked("another process is changing the store", where=named(self._root), detail=detail)

    # Threads of this process

    @contextlib.contextmanager
    def _turn(self, seconds: float | None) -> Iterator[None]:
        with self._turns:
            arrived, place = time.monotonic(), self._waiting
            self._waiting += 1
            try:
                while self._owner_since is not None:
                    now = time.monotonic()
                    stands_still = now - self._owner_since
                    if seconds is not None:
                        too_many = place >= MAX_WAITING and stands_still > _STANDSTILL_SECONDS
                        if too_many or now - max(self._owner_since, arrived) >= seconds:
                            raise self._is_locked(seconds, "another thread of this mount")
                    self._turns.wait(None if seconds is None else max(_LOOK_SECONDS, min(seconds, 0.1)))
            finally:
                self._waiting -= 1
            self._owner_since = time.monotonic()
        try:
            yield
        finally:
            with self._turns:
                self._owner_since = None
                self._turns.notify()

    # Other processes

    def _locked(self, seconds: float | None) -> int:
        """A descriptor that has the lock."""
        with contextlib.suppress(FileNotFoundError):
            return self._lock_file(os.O_RDWR, seconds)
        try:
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._identity.folder)
        except OSError as error:
            raise from_oserror(error, "cannot lock the store", self._root) from error
        try:
            is_locked = True
            try:
                self._take(folder, seconds)
            except NoLocks:  # of folders, maybe: the file will tell
                is_locked = False
            try:
                return self._lock_file(os.O_RDWR | os.O_CREAT, seconds)
            except OSError as error:
                if not is_locked:
                    raise from_oserror(error, "cannot lock the store", self._root / self._name) from error
                kept, folder = folder, -1  # the folder of the lock file could not be made either
                return kept
        finally:
            if folder >= 0:
                os.close(folder)

    def _lock_file(self, flags: int, seconds: float | None) -> int:
        """The lock file, locked.

        Raises:
            FileNotFoundError: there is none, and it is not to be made.
            OSError: ENOSPC, EDQUOT: it cannot be made.
        """
        try:
            fd = os.open(self._name, flags | os.O_CLOEXEC, 0o644, dir_fd=self._identity.folder)
        except OSError as error:
            if error.errno in (*_FULL, errno.ENOENT):
                raise
            raise from_oserror(error, "cannot lock the store", self._root / self._name) from error
        try:
            self._take(fd, seconds)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _take(self, fd: int, seconds: float | None) -> None:
        try:
            self.wait(fd, seconds)
        except OSError as error:
            if has_no_locks(error):
                raise NoLocks("cannot lock the store", where=named(self._root), detail=error.strerror or "") from error
            raise from_oserror(error, "cannot lock the store", self._root) from error

    def check(self) -> None:
        """Make sure that the filesystem has locks, without waiting for one and without making anything.

        Raises:
            NoLocks: it has none.
        """
        for name, flags in ((self._name, os.O_RDWR), (".", os.O_RDONLY | os.O_DIRECTORY)):
            try:
                fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=self._identity.folder)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            except OSError as error:
                if has_no_locks(error):
                    detail = error.strerror or ""
                    raise NoLocks("cannot lock the store", where=named(self._root), detail=detail) from error
            finally:
                os.close(fd)
            return


def holder_of(fd: int, table: Callable[[], str] = lambda: Path("/proc/locks").read_text()) -> tuple[int, str]:
    """Which process has the lock of the file ``fd``, and what it is, for people; ``(0, "")`` where nobody can tell.

    Source: proc(5), ``/proc/locks``: ``1: FLOCK  ADVISORY  WRITE PID MAJ:MIN:INODE START END``. Of some filesystems
    (btrfs) the device is not the one that stat(2) tells, so the inode decides.
    """
    try:
        inode, lines = os.fstat(fd).st_ino, table().splitlines()
    except OSError:
        return 0, ""
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            with contextlib.suppress(ValueError):
                pid = int(fields[4])
                if pid > 0:
                    return pid, f"process {pid}{_what_it_is(pid)}"
    return 0, ""


def _what_it_is(pid: int) -> str:
    """Its command and, where it is told to do nothing, that it is stopped."""
    text = ""
    with contextlib.suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        text = f" ({os.fsdecode(b' '.join(words))[:200]})"
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        text += ", which is stopped" if state in "Tt" else ""
    return text
