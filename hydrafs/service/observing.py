"""A tree whose opens and reads are counted: what status and metrics tell.

Rule: counting never fails a request and never waits: a lock is held for an addition, and for nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from hydrafs.attributes import Attributes
from hydrafs.covered import shown

_ERRORS_KEPT = 20


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted since the daemon started; ``reads_in_flight`` and ``open_files`` are of this moment."""

    opens: int
    open_files: int
    reads: int
    read_nbytes: int
    read_seconds: float
    reads_in_flight: int
    failed_reads: int
    failed_opens: int


class Counters:
    """Counts what a tree is asked. Thread safety: any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opens = self._open_files = self._reads = self._read_nbytes = 0
        self._in_flight = self._failed_reads = self._failed_opens = 0
        self._read_seconds = 0.0
        self._opened: dict[str, float] = {}

    def opened(self, path: str) -> None:
        """A file was opened."""
        with self._lock:
            self._opens += 1
            self._open_files += 1
            self._opened.pop(path, None)
            self._opened[path] = time.time()
            while len(self._opened) > 1000:
                del self._opened[next(iter(self._opened))]

    def recall(self, opened: dict[str, float]) -> None:
        """What was opened before this daemon started, by path in the mount: the time."""
        with self._lock:
            self._opened = dict(sorted(opened.items(), key=lambda item: item[1])) | self._opened

    def closed(self) -> None:
        """A file was closed."""
        with self._lock:
            self._open_files -= 1

    def open_failed(self) -> None:
        """An open was refused."""
        with self._lock:
            self._failed_opens += 1

    def read_begins(self) -> None:
        """A read is being answered."""
        with self._lock:
            self._in_flight += 1

    def read_ends(self, nbytes: int | None, seconds: float) -> None:
        """It was answered with ``nbytes``, or failed."""
        with self._lock:
            self._in_flight -= 1
            if nbytes is None:
                self._failed_reads += 1
            else:
                self._reads += 1
                self._read_nbytes += nbytes
                self._read_seconds += seconds

    def counted(self) -> Counted:
        """All counts at one moment."""
        with self._lock:
            return Counted(
                self._opens,
                self._open_files,
                self._reads,
                self._read_nbytes,
                self._read_seconds,
                self._in_flight,
                self._failed_reads,
                self._failed_opens,
            )

    def lately_opened(self) -> list[tuple[str, float]]:
        """Paths in the mount with the time of their last open, the latest first; at most 1,000."""
        with self._lock:
            return list(reversed(self._opened.items()))


class _ObservedHandle:
    """An open file that counts its reads; all else is the file's own."""

    def __init__(self, handle: Any, counters: Counters) -> None:
        self._handle = handle
        self._counters = counters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    @property
    def keep_cache(self) -> bool:
        """As the file has it."""
        return bool(self._handle.keep_cache)

    def attributes(self) -> Attributes:
        """As the file has it."""
        attributes: Attributes = self._handle.attributes()
        return attributes

    def pread_into(self, offset: int, out: memoryview) -> int:
        """As the file has it, counted."""
        self._counters.read_begins()
        start = time.perf_counter()
        nbytes: int | None = None
        try:
            nbytes = self._handle.pread_into(offset, out)
            return nbytes
        finally:
            self._counters.read_ends(nbytes, time.perf_counter() - start)

    def close(self) -> None:
        """As the file has it, counted."""
        self._counters.closed()
        self._handle.close()


class Observed:
    """A tree (``hydrafs.fuse.Tree``) that counts what it is asked; all else is the inner tree's own.

    Thread safety: as the inner tree.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.counters = Counters()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tree, name)

    def open(self, path: str, flags: int) -> _ObservedHandle:
        """As the tree has it, counted."""
        return self._counted(path, lambda: self.tree.open(path, flags))

    def create(self, path: str, *arguments: Any) -> _ObservedHandle:
        """As the tree has it, counted."""
        return self._counted(path, lambda: self.tree.create(path, *arguments))

    def _counted(self, path: str, opening: Any) -> _ObservedHandle:
        try:
            handle = opening()
        except BaseException:
            self.counters.open_failed()
            raise
        self.counters.opened(path)
        return _ObservedHandle(handle, self.counters)


class LastErrors(logging.Handler):
    """Keeps the last warnings and errors for ``hydrafs status``. Thread safety: as any log handler."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[tuple[float, str]] = deque(maxlen=_ERRORS_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's line."""
        self._lines.append((record.created, f"{record.levelname.lower()}: {shown(record.getMessage())}"))

    def lines(self) -> list[tuple[float, str]]:
        """Time and text of each, the latest last."""
        return list(self._lines)
