"""A byte-budgeted cache of decoded chunks in which each chunk is decoded by one thread at a time.

Rule 1: no lock is held while a chunk is decoded.
Rule 2: whoever finds a chunk in the making waits for it; only a running decode is ever waited for, never a queued one.
Rule 3: the budget bounds what is kept, not what is in use: an evicted chunk lives on for whoever holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

Chunk = npt.NDArray[np.uint8]
Key = tuple[Hashable, int]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since the cache was made, and bytes held now."""

    hits: int
    misses: int
    waits: int
    nbytes: int
    budget_nbytes: int
    chunks: int


class ChunkCache:
    """Decoded chunks by key, the least recently used leaving first.

    Thread safety: any number of threads. A chunk that is larger than the whole budget is handed out and not kept.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._lock = threading.Lock()
        self._kept: LRUCache[Key, Chunk] = LRUCache(max(1, budget_nbytes), getsizeof=lambda chunk: chunk.nbytes)
        self._running: dict[Key, Future[Chunk]] = {}
        self._hits = self._misses = self._waits = 0

    def get(self, key: Key, decode: Callable[[], Chunk]) -> Chunk:
        """The chunk under ``key``, decoded by ``decode`` if it is not there.

        What ``decode`` raises is raised to everyone who waited for it, and nothing is kept.
        """
        with self._lock:
            chunk = self._kept.get(key)
            if chunk is not None:
                self._hits += 1
                return chunk
            future = self._running.get(key)
            if future is None:
                mine = self._running[key] = Future()
                self._misses += 1
            else:
                self._waits += 1
        if future is not None:
            return future.result()
        try:
            chunk = decode()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            mine.set_exception(error)
            raise
        with self._lock:
            if chunk.nbytes <= self._kept.maxsize:
                self._kept[key] = chunk
            del self._running[key]
        mine.set_result(chunk)
        return chunk

    def has(self, key: Key) -> bool:
        """Whether the chunk is there or in the making; does not count as a use."""
        with self._lock:
            return key in self._kept or key in self._running

    def statistics(self) -> CacheStatistics:
        """What the cache did so far."""
        with self._lock:
            kept = self._kept
            return CacheStatistics(
                self._hits, self._misses, self._waits, int(kept.currsize), int(kept.maxsize), len(kept)
            )

    @property
    def budget_nbytes(self) -> int:
        """How many bytes are kept at most."""
        return int(self._kept.maxsize)
