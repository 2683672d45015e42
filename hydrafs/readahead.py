"""Decoding what will be asked for next, before it is.

Goal: both cores busy on a sequential read; a tensor that is jumped about in is decoded once, whole.
Rule 1: a first touch decodes only what was asked for, so that listings stay cheap.
Rule 2: what waits in a queue is never waited for; only a decode that runs is (``hydrafs.cache``, rule 2).
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from hydrafs.errors import HydraError
from hydrafs.rehydrate import Rehydrated

log = logging.getLogger(__name__)

SLACK_NBYTES = 4 << 20
"""How far from the end of the last request a request may begin and still continue it: the kernel's own read-ahead sends
several requests at once, and they arrive in any order."""


class DecodePool:
    """The threads that decode ahead, shared by all open models. Thread safety: any number of threads.

    Args:
        workers: threads for sequential reads; one more completes tensors.
        window_nbytes: how far ahead of a sequential reader is decoded.
    """

    def __init__(self, workers: int | None = None, window_nbytes: int = 8 << 20) -> None:
        self.workers = workers or max(2, os.cpu_count() or 2)
        self.window_nbytes = window_nbytes
        self._ahead = ThreadPoolExecutor(self.workers, "hydrafs-ahead")
        self._complete = ThreadPoolExecutor(1, "hydrafs-complete")

    def ahead(self, model: Rehydrated, chunk: int) -> None:
        """Decode ``chunk`` into the cache when a thread is free."""
        self._submit(self._ahead, model, [chunk])

    def complete(self, model: Rehydrated, chunks: list[int]) -> None:
        """Decode ``chunks`` one after another, on the thread kept for that."""
        self._submit(self._complete, model, chunks)

    @staticmethod
    def _submit(executor: ThreadPoolExecutor, model: Rehydrated, chunks: list[int]) -> None:
        model.retain()
        try:
            task = executor.submit(_quietly, model, chunks)
        except RuntimeError:  # the pool was closed meanwhile
            model.close()
        else:
            task.add_done_callback(lambda _: model.close())  # called for a task that is cancelled too

    def close(self) -> None:
        """Forget what is queued and wait for what runs."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._complete.shutdown(wait=True, cancel_futures=True)


def _quietly(model: Rehydrated, chunks: list[int]) -> None:
    try:
        for chunk in chunks:
            if not model.is_cached(chunk):
                model.chunk(chunk)
    except (HydraError, OSError) as error:
        # Whoever reads the chunk gets the error; ahead of that it is nobody's.
        log.debug("decoding ahead failed: %s", error)


class Reader:
    """One reader's view of a model: reads, and decodes ahead by how it reads. Thread safety: any number of threads.

    The reader holds no share of the model; each task that it queues does.
    """

    def __init__(self, model: Rehydrated, pool: DecodePool) -> None:
        self._model = model
        self._pool = pool
        self._lock = threading.Lock()
        self._frontier = 0
        self._run_nbytes = 0
        self._queued_to = 0
        self._touched: tuple[int, int] = (0, 0)
        self._completed: set[int] = set()
        # What is decoded ahead must fit the cache with room to spare, or it pushes itself out before it is read.
        self._window = min(pool.window_nbytes, model.cache_budget_nbytes // 4)

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; how many bytes there were. Raises as ``Rehydrated.pread_into``."""
        end = min(offset + out.nbytes, self._model.size)
        if end > offset:
            self._look_ahead(offset, end)
        return self._model.pread_into(offset, out)

    def _look_ahead(self, offset: int, end: int) -> None:
        complete: tuple[int, int] | None = None
        with self._lock:
            if self._frontier - SLACK_NBYTES <= offset <= self._frontier + SLACK_NBYTES and self._frontier:
                self._run_nbytes += end - offset
            elif offset == 0:
                self._run_nbytes = end
                self._queued_to = 0
            else:
                self._run_nbytes = 0
                self._queued_to = 0
                begin, stop = self._touched
                if begin <= offset < stop and begin not in self._completed and stop - begin <= self._window * 8:
                    self._completed.add(begin)
                    complete = (begin, stop)
                self._touched = self._model.tensor_range(offset)
            self._frontier = max(self._frontier, end) if self._run_nbytes else end
            # A listing reads a header and one block; only who goes on past half a MiB is reading the model.
            sequential = self._run_nbytes > 512 << 10
            begin = max(self._queued_to, end)
            stop = self._frontier + self._window if sequential else begin
            if stop > begin:
                self._queued_to = stop
        if complete:
            self._pool.complete(self._model, self._model.chunks_between(*complete))
        wanted = self._model.chunks_between(offset, end)[1:]
        if stop > begin:
            wanted += self._model.chunks_between(begin, stop)
        for chunk in wanted:
            if not self._model.is_cached(chunk):
                self._pool.ahead(self._model, chunk)
