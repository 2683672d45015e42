"""Whether somebody can write to a file, and to be told when somebody opens it for that.

A read lease (fcntl(2), ``F_SETLEASE``) is refused by the kernel while a file is open for writing, through a mapping
too. While it is held, who opens the file for writing waits until it is given back.
Rule 1: one thread of a process watches all its leases, of which there is one for each file. It waits for the kernel's
        signal, gives back at once, and takes no lock that is held while a file is opened.
Rule 2: a file that was read under a lease was not written to if the lease still stands after the read.
Rule 3: where there are no leases, and where a filesystem refuses one though nobody writes (NFS and SMB without a
        delegation say EAGAIN), the processes are looked through once, and the file's times tell what comes later.
Rule 4: what cannot be told is not quiet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hydrafs.errors import Changing, from_oserror
from hydrafs.filesystem import is_local, is_settled, settles_in, times_tell
from hydrafs.identity import FileIdentity, is_unchanged
from hydrafs.layout import FileSource
from hydrafs.openfiles import Writers, writers

__all__ = ["Lease", "Quiet", "QuietFile", "is_open_for_writing"]

_SIGNAL = signal.SIGURG
"""Ignored where it is not waited for: another would end the process that a mistake sends it to."""
_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_NET_SECONDS = 1.0
"""How often the watcher looks without a signal."""
_POLL_SECONDS = 0.02
"""The same where a thread cannot be told."""
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
_PAST = 4
_SETTLES_SECONDS = 0.05
_COSTS = 50
"""A look through all processes may take one part in so many of the time."""


# One lease for each file, and who watches them


class _Held:
    """A lease of this process, on a description of its own. Only the watcher and its lock change it."""

    __slots__ = ("fd", "is_broken", "key", "shares", "verified")

    def __init__(self, fd: int, key: tuple[int, int]) -> None:
        self.fd, self.key = fd, key
        self.shares = 1
        self.is_broken = False
        self.verified: set[bytes] = set()

    def stands(self) -> bool:
        return not self.is_broken and fcntl.fcntl(self.fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


class _Watcher:
    """The leases of this process. Thread safety: any number of threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: dict[tuple[int, int], _Held] = {}
        self._ready = threading.Event()
        self._started = False
        self._thread_id = 0
        self._seconds = _NET_SECONDS

    def hold(self, fd: int) -> _Held:
        """A share in the lease on the file of ``fd``; ``OSError`` where there is none."""
        stat = os.fstat(fd)
        key = stat.st_dev, stat.st_ino
        with self._changed:
            if (held := self._share(key)) is not None:
                return held
        self._start()
        own = _reopened(fd)
        try:
            with self._changed:
                if (held := self._share(key)) is not None:
                    os.close(own)
                    return held
                fcntl.fcntl(own, fcntl.F_SETSIG, _SIGNAL)
                try:
                    fcntl.fcntl(own, _F_SETOWN_EX, struct.pack("ii", _F_OWNER_TID, self._thread_id))
                except OSError:
                    self._seconds = _POLL_SECONDS
                fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                self._held[key] = held = _Held(own, key)
                self._changed.notify_all()
                return held
        except BaseException:
            os.close(own)
            raise

    def _share(self, key: tuple[int, int]) -> _Held | None:
        held = self._held.get(key)
        if held is None:
            return None
        if not held.stands():
            self._give_back(held)
            return None
        held.shares += 1
        return held

    def release(self, held: _Held) -> None:
        """Give a share back."""
        with self._changed:
            held.shares -= 1
            if held.shares == 0 and held.fd >= 0:
                if not held.is_broken:
                    self._give_back(held)
                fd, held.fd = held.fd, -1  # also where close(2) fails, the number is free, and soon another file's
                os.close(fd)

    def give_back(self, held: _Held) -> None:
        """The lease is broken: who waits in open(2) goes on."""
        with self._changed:
            if not held.is_broken:
                self._give_back(held)

    def _give_back(self, held: _Held) -> None:
        held.is_broken = True
        if self._held.get(held.key) is held:
            del self._held[held.key]
        with contextlib.suppress(OSError):
            # Not by closing alone: a process that is being started may have the description for an instant.
            fcntl.fcntl(held.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _start(self) -> None:
        with self._changed:
            if not self._started:
                try:
                    threading.Thread(target=self._watch, name="leases", daemon=True).start()
                except RuntimeError as error:
                    raise OSError(errno.ENOMEM, str(error)) from error
                self._started = True
        self._ready.wait()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
        self._thread_id = threading.get_native_id()
        self._ready.set()
        while True:
            with self._changed:
                while not self._held:
                    self._changed.wait()
            signal.sigtimedwait({_SIGNAL}, self._seconds)
            with self._changed:
                for held in [h for h in self._held.values() if not h.stands()]:
                    self._give_back(held)

    def left_behind(self) -> None:
        """In a forked child: the leases are the parent's, and so is the thread that watches them."""
        for held in self._held.values():
            held.is_broken = True
            os.close(held.fd)
            held.fd = -1


_watcher = _Watcher()


def _anew() -> None:
    global _watcher
    old, _watcher = _watcher, _Watcher()
    old.left_behind()


os.register_at_fork(after_in_child=_anew)


def _reopened(fd: int) -> int:
    """Another description of the same file: a lease needs one that only reads, and goes when its last user does."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


# A file that nobody writes to

_seen_quiet: dict[FileIdentity, None] = {}
_SEEN = 4096


class Quiet:
    """Whether nobody can write to a file, and nobody has since it was opened. Close it when it is of no use any more.

    Args:
        fd: the file, open for reading for as long as this is used.
        stat: what it was when it was opened.
        look: without the kernel's help, look through all processes though nobody could write to it when this was done
            last: whoever could has left other times since, and whoever can has not.

    Thread safety: any number of threads; ``close`` when no other call runs.
    """

    def __init__(self, fd: int, where: str | os.PathLike[str], stat: os.stat_result, *, look: bool = False) -> None:
        self._fd, self._stat = fd, stat
        self.where = where
        self._again = threading.Lock()
        self._held: _Held | None = None
        self._local = is_local(fd)
        self._tells = times_tell(fd)
        self._settled = is_settled(stat, fd)
        self._past: list[_Held] = []
        self._looked, self._cost = 0.0, 0.0
        self.was_broken = False
        """Whether somebody could write to it at any moment since this was made."""
        self.writers = self._take(look)
        try:
            if self.writers is Writers.NOBODY and not is_unchanged(stat, os.fstat(fd)):
                self.writers = Writers.SOMEBODY
        except BaseException:
            self.close()  # the lease has a descriptor of its own
            raise
        self.was_broken = self.writers is Writers.SOMEBODY

    @property
    def is_kernels(self) -> bool:
        """Whether the kernel tells of writers, and nothing has to be looked for."""
        return self._held is not None

    def _take(self, look: bool = False) -> Writers:
        self._looked = time.monotonic()
        try:
            self._held = _watcher.hold(self._fd)
            return Writers.NOBODY
        except OSError as error:
            if error.errno == errno.EAGAIN and self._local:
                return Writers.SOMEBODY
        if not look and FileIdentity.of(self._stat) in _seen_quiet:
            self._looked = 0.0
            return Writers.NOBODY
        return self._look()

    def _look(self) -> Writers:
        begun = time.monotonic()
        try:
            found = writers(self._fd)
        except OSError:
            found = Writers.UNKNOWN
        self._looked = time.monotonic()
        self._cost = self._looked - begun
        if found is Writers.NOBODY and self._settled and self._tells:
            if len(_seen_quiet) >= _SEEN:
                _seen_quiet.clear()
            _seen_quiet[FileIdentity.of(self._stat)] = None
        return found

    def stands(self) -> bool:
        """Whether it is quiet, and was so all the time since this was made, or since its times were last looked at.

        What was read from the descriptor before is what the file held when it was opened. A microsecond or less, save
        where it was not quiet when it was asked last: then it is tried again, once in a while.
        """
        held = self._held
        if held is not None:
            if held.stands():
                return self._local or self._untouched()
            self.was_broken = True
            _watcher.give_back(held)
        elif self.writers is Writers.NOBODY and self._settled:
            return self._tells and self._untouched()
        return self._tells and self._settled and self._once_more()

    def _untouched(self) -> bool:
        then, now = self._stat, os.fstat(self._fd)
        return (then.st_mtime_ns, then.st_ctime_ns, then.st_size) == (now.st_mtime_ns, now.st_ctime_ns, now.st_size)

    def _once_more(self) -> bool:
        if time.monotonic() - self._looked < _AGAIN_SECONDS * max(1.0, _COSTS * self._cost):
            return False
        if not self._again.acquire(blocking=False):
            return False
        try:
            if not self._untouched():
                self._looked = time.monotonic()
                return False
            if self._held is not None:  # its descriptor stays for a while: another reader may be about to ask it
                self._past.append(self._held)
                self._held = None
                if len(self._past) > _PAST:
                    _watcher.release(self._past.pop(0))
            self.writers = self._take()
            return self.writers is Writers.NOBODY and self._untouched()
        finally:
            self._again.release()

    def check(self, what: str = "a base", *, look: bool = False, renamed: bool = False, doubt: bool = False) -> None:
        """Raise ``Changing`` where somebody could write to it at any moment since this was made.

        Args:
            what: what it is, for the message.
            look: without the kernel's help, look through all processes that can be looked at now; else once in a while.
            renamed: the file has got another name since, which changes its ctime as a write does.
            doubt: that nobody can tell is no error, as long as its times are what they were.
        """
        if not self.was_broken and self._held is None and self.writers is Writers.NOBODY:
            if look or time.monotonic() - self._looked >= _LOOK_SECONDS * max(1.0, _COSTS * self._cost):
                self.was_broken = self._look() is not Writers.NOBODY
            self.was_broken = self.was_broken or self._has_changed(renamed)
        elif self._held is not None and not self._held.stands():
            self.was_broken = True
            _watcher.give_back(self._held)
        elif self._held is None:
            if look and self.writers is Writers.UNKNOWN:
                self.was_broken = self.was_broken or is_open_for_writing(self._fd)
            self.was_broken = self.was_broken or self._has_changed(renamed)
        if self.was_broken:
            raise Changing(f"{what} is being written to", where=self.where)
        if self.writers is Writers.UNKNOWN and not doubt:
            raise Changing(f"nobody can tell whether {what} is being written to", where=self.where,
                           detail=self.writers.value)  # fmt: skip

    def _has_changed(self, renamed: bool) -> bool:
        now = os.fstat(self._fd)
        if renamed:
            return (self._stat.st_mtime_ns, self._stat.st_size) != (now.st_mtime_ns, now.st_size)
        return not is_unchanged(self._stat, now)

    def begin(self) -> object:
        """To be called before the whole file is read: what ``lasted`` takes."""
        if not self.stands():
            return None
        return self._held or self

    def lasted(self, begun: object) -> bool:
        """Whether nobody could write to the file since ``begun``."""
        return begun is not None and self.stands() and begun is (self._held or self)

    def settle(self, begun: object) -> bool:
        """Whether equal times will say from now on that the file is what it was when it ``lasted``. Waits for that if
        it is a matter of milliseconds."""
        left = settles_in(os.fstat(self._fd), self._fd) / 1e9
        if left > _SETTLES_SECONDS:
            return False
        if left > 0:
            time.sleep(left)
        return self.lasted(begun)

    def verified(self, sha256: bytes) -> None:
        """The file was read whole, while it ``lasted``, and has this SHA-256."""
        if self._held is not None:
            self._held.verified.add(sha256)

    def vouches_for(self, sha256: bytes) -> bool:
        """Whether a SHA-256 that was once taken of a file of these times is that of its content now."""
        return self._tells or (self._held is not None and sha256 in self._held.verified)

    def close(self) -> None:
        """Give the lease back."""
        given, self._past, self._held = (*self._past, self._held), [], None
        with contextlib.ExitStack() as closing:  # all of them, also where one fails
            for held in given:
                if held is not None:
                    closing.callback(_watcher.release, held)


class QuietFile(FileSource):
    """A plain file that a diff is read from, and ``quiet``, which says whether somebody can write to it.

    Thread safety: as a ``FileSource``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        try:
            self.quiet = Quiet(self.fd, self.path, self.stat)
        except BaseException:
            super().close()
            raise

    def sha256(self, take: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The SHA-256 of all bytes, which ``take`` reads, and whether it may be remembered: nobody could write to the
        file while it was taken, and whoever does from now on leaves other times."""
        begun = self.quiet.begin()
        digest = take()
        if not self.quiet.lasted(begun):
            return digest, False
        self.quiet.verified(digest)
        return digest, self.quiet.settle(begun)

    def is_proven(self, sha256: bytes) -> bool:
        """Whether what is read from it, and was a moment ago, is of the content of this SHA-256, which was taken of a
        file of these times, or of this one."""
        return self.quiet.stands() and self.quiet.vouches_for(sha256)

    def close(self) -> None:
        """Let go of what is held."""
        try:
            if self.fd >= 0:
                self.quiet.close()
        finally:
            super().close()


class Lease:
    """A file that nobody writes to, as long as ``check`` does not raise. Close it, or use it in a ``with`` statement.

    Raises:
        Changing: it is open for writing already.
        NotFound, Denied, HydraError: it cannot be opened.

    Thread safety: any number of threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise from_oserror(error, "cannot open the model", path) from error
        try:
            self._quiet = Quiet(self._fd, path, os.fstat(self._fd), look=True)
            known = self._quiet.writers
            if known is Writers.SOMEBODY or (known is Writers.UNKNOWN and is_open_for_writing(self._fd)):
                self._quiet.close()
                raise Changing("a model is open for writing", where=path)
        except BaseException:
            os.close(self._fd)
            raise
        self.is_kernels = self._quiet.is_kernels
        self._looked = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether somebody has opened the file for writing since, as far as that was asked."""
        return self._quiet.was_broken

    def check(self) -> None:
        """Raise ``Changing`` where somebody has opened the file for writing since."""
        with self._lock:
            if self._fd < 0:
                return
            if self._quiet.writers is Writers.UNKNOWN:  # what can be seen is looked at all the same
                if time.monotonic() - self._looked > _LOOK_SECONDS:
                    self._looked = time.monotonic()
                    self._quiet.was_broken = is_open_for_writing(self._fd)
                if not self._quiet.was_broken:
                    return
            self._quiet.check("a model")

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            if self._fd >= 0:
                self._quiet.close()
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_open_for_writing(fd: int) -> bool:
    """Whether a process that can be looked into can write to the file of ``fd``."""
    return writers(fd, thorough=True) is Writers.SOMEBODY
