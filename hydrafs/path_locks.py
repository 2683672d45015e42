"""Who waits for what when files of a mount are changed: a lock for each path, a bound on how many wait at all, and a
second try of what found no room."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from hydrafs.errors import HydraError

__all__ = ["PathLocks", "Turns", "with_room"]

_T = TypeVar("_T")


def with_room(make_room: Callable[[int], bool], nbytes: int, call: Callable[[], _T]) -> _T:
    """``call``, and again where it found no room on the disk and ``make_room`` made some, ``nbytes`` if it can."""
    try:
        return call()
    except (OSError, HydraError) as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not make_room(nbytes):
            raise
    return call()


class PathLocks:
    """A lock for each path, for as long as somebody wants it. Thread safety: any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, tuple[threading.RLock, int]] = {}

    @contextlib.contextmanager
    def of(self, *paths: str) -> Iterator[None]:
        """Hold the locks of ``paths``, which this thread may have already; who has others is not waited for."""
        with contextlib.ExitStack() as stack:
            for path in sorted(set(paths)):
                stack.enter_context(self._one(path))
            yield

    @contextlib.contextmanager
    def _one(self, path: str) -> Iterator[None]:
        with self._lock:
            lock, users = self._locks.get(path, (threading.RLock(), 0))
            self._locks[path] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._locks[path]
                if users > 1:
                    self._locks[path] = lock, users - 1
                else:
                    del self._locks[path]


class Turns:
    """A bound on the callbacks that may wait, for the store's lock or for a model to become whole: the others have to
    be left for readers. Thread safety: any number of threads."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._free = limit
        self._mine = threading.local()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Do something that may wait; a thread that does so already needs no second turn.

        Raises:
            OSError: EBUSY, at once, where too many others are waiting.
        """
        if getattr(self._mine, "taken", False):
            yield
            return
        with self._lock:
            if not self._free:
                raise OSError(errno.EBUSY, "too many programs wait for the store's lock")
            self._free -= 1
        self._mine.taken = True
        try:
            yield
        finally:
            self._mine.taken = False
            with self._lock:
                self._free += 1
