"""When a store was last read from, told by the daemon to whoever works on the store in the background.

Eight bytes in a file: a clock that is the same for every process of the machine. Nothing is taken back by a daemon that
dies.

Rule: a read waits for nothing here, and nothing here fails it. The file is on the store's disk, which may be full, gone
      or slow, so a thread of its own writes to it, ten times a second at most. It is never mapped: a page that the disk
      has no block for, or a file that somebody makes shorter, is SIGBUS to whoever touches it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from pathlib import Path

__all__ = ["Activity"]

_CLOCK = struct.Struct("<q")
_SECONDS = 0.1
"""How often the time of the last read is written, while somebody reads; and how long the first read waits for that."""


class Activity:
    """The time of the last read. Thread safety: any number of threads and processes.

    Without a file that can be written nothing is told, and nothing is heard.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._read = threading.Event()
        self._lock = threading.Lock()
        self._writes: threading.Thread | None = None
        self._told = threading.Event()
        with contextlib.suppress(OSError, ValueError):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if os.fstat(self._fd).st_size != _CLOCK.size:
                    os.pwrite(self._fd, bytes(_CLOCK.size), 0)  # while there is room: the block is there from now on

    def touch(self) -> None:
        """Somebody reads, now. A microsecond; others hear of it a moment later, of the first time at once."""
        if self._read.is_set() or self._fd < 0:
            return
        self._read.set()
        if self._writes is None:
            with self._lock:
                if self._writes is None and self._fd >= 0:
                    # Not sooner: most trees are made before the process forks, and never read from.
                    self._writes = threading.Thread(target=self._write, name="hydrafs-activity", daemon=True)
                    self._writes.start()
            self._told.wait(_SECONDS)

    def _write(self) -> None:
        while True:
            self._read.wait()
            with self._lock:
                if self._fd < 0:
                    return
                fd = -1
                with contextlib.suppress(OSError):  # too many open files
                    fd = os.dup(self._fd)  # a disk that does not answer must not keep ``close`` waiting
            self._read.clear()
            try:
                # A disk that is full, gone or read-only by now: then nothing is told, and nobody is kept from reading.
                with contextlib.suppress(OSError):
                    os.pwrite(fd, _CLOCK.pack(time.monotonic_ns()), 0)
            finally:
                if fd >= 0:
                    os.close(fd)
                self._told.set()
            time.sleep(_SECONDS)

    def quiet_seconds(self) -> float:
        """For how long nobody has read; infinite where that is not known, or was before the machine started."""
        try:
            data = os.pread(self._fd, _CLOCK.size, 0)
        except OSError:
            return float("inf")
        then = _CLOCK.unpack(data)[0] if len(data) == _CLOCK.size else 0
        now = time.monotonic_ns()
        return (now - then) / 1e9 if 0 < then <= now else float("inf")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            fd, self._fd = self._fd, -1
        self._read.set()  # the thread sees it, and ends
        if fd >= 0:
            os.close(fd)
