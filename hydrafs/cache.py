"""A byte-budgeted cache of decoded chunks in which each chunk is decoded by one thread at a time.

Rule 1: no lock is held while a chunk is decoded.
Rule 2: whoever finds a chunk in the making waits for it; only a running decode is ever waited for, never a queued one.
Rule 3: the budget bounds what is kept, not what is in use: an evicted chunk lives on for whoever holds it.
"""

from __future__ import annotations

import threading
import time
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
    decoded_nbytes: int
    decode_seconds: float


class ChunkCache:
    """Decoded chunks by key, the least recently used leaving first.

    Thread safety: any number of threads. A chunk that is larger than the whole budget is handed out and not kept.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._lock = threading.Lock()
        self._kept: LRUCache[Key, Chunk] = LRUCache(max(1, budget_nbytes), getsizeof=lambda chunk: chunk.nbytes)
        self._running: dict[Key, Future[Chunk]] = {}
        self._hits = self._misses = self._waits = self._decoded_nbytes = 0
        self._decode_seconds = 0.0

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
        start = time.perf_counter()
        try:
            chunk = decode()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            mine.set_exception(error)
            raise
        with self._lock:
            self._decoded_nbytes += chunk.nbytes
            self._decode_seconds += time.perf_counter() - start
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
                self._hits,
                self._misses,
                self._waits,
                int(kept.currsize),
                int(kept.maxsize),
                len(kept),
                self._decoded_nbytes,
                self._decode_seconds,
            )

    def resize(self, budget_nbytes: int) -> None:
        """Keep at most ``budget_nbytes`` from now on; what is too much leaves, the least recently used first."""
        with self._lock:
            smaller: LRUCache[Key, Chunk] = LRUCache(max(1, budget_nbytes), getsizeof=lambda chunk: chunk.nbytes)
            while self._kept:
                key, chunk = self._kept.popitem()  # the least recently used, so that the order stays
                if chunk.nbytes <= smaller.maxsize:
                    smaller[key] = chunk
            self._kept = smaller

    def drop(self) -> int:
        """Keep nothing of what is there; how many bytes that was."""
        with self._lock:
            nbytes = int(self._kept.currsize)
            self._kept.clear()
            return nbytes

    @property
    def budget_nbytes(self) -> int:
        """How many bytes are kept at most."""
        return int(self._kept.maxsize)
