"""When a store was last read from, told by the daemon to whoever works on the store in the background.

Eight bytes in a file that all of them map: a clock that is the same for every process of the machine. Nothing waits,
and a daemon that dies leaves nothing that would have to be taken back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from pathlib import Path

_CLOCK = struct.Struct("<q")


class Activity:
    """The time of the last read. Thread safety: any number of threads and processes.

    Without a file that can be written nothing is told, and nothing is heard.
    """

    def __init__(self, path: Path) -> None:
        self._map: mmap.mmap | None = None
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(fd).st_size != _CLOCK.size:
                    os.ftruncate(fd, _CLOCK.size)
                self._map = mmap.mmap(fd, _CLOCK.size)
            finally:
                os.close(fd)

    def touch(self) -> None:
        """Somebody reads, now. A microsecond."""
        if self._map is not None:
            _CLOCK.pack_into(self._map, 0, time.monotonic_ns())

    def quiet_seconds(self) -> float:
        """For how long nobody has read; infinite where that is not known, or was before the machine started."""
        if self._map is None:
            return float("inf")
        then = _CLOCK.unpack_from(self._map)[0]
        now = time.monotonic_ns()
        return (now - then) / 1e9 if 0 < then <= now else float("inf")

    def close(self) -> None:
        """Let go of the file."""
        if self._map is not None:
            self._map.close()
            self._map = None
