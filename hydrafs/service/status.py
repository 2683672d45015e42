"""What a daemon says of itself: one set of facts for ``status``, ``top`` and the metrics."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from hydrafs.covered import named
from hydrafs.errors import HydraError, StoreGone
from hydrafs.service.observing import LastErrors, Observed
from hydrafs.store import trailer_of
from hydrafs.version import __version__
from hydrafs.working import Work, told

log = logging.getLogger(__name__)

_COUNT_AGAIN_SECONDS = 60.0
_COUNT_SHARE = 0.02
"""Of the time at most that counting takes: a small store is counted anew each second, a large one each minute."""
_COUNT_ANYWAY_SECONDS = 3600.0
_WAIT_SECONDS = 1.5
"""How long who asks for the status waits for a count, and for the disk; a command gives up after three."""
_SETTLED_NS = 2_000_000_000


class Models(msgspec.Struct, frozen=True):
    """What the store holds. Sizes in bytes; ``saved`` is what the diffs would take more as full files."""

    models: int = 0
    dehydrated: int = 0
    listed: int = 0
    stored: int = 0
    saved: int = 0
    counted_at: float = 0.0


class Status(msgspec.Struct, frozen=True):
    """A daemon at one moment. Bytes, seconds, and counts since it started."""

    version: str
    pid: int
    mountpoint: str
    store: str
    started_at: float
    uptime_seconds: float
    models: Models
    cache_nbytes: int
    cache_budget_nbytes: int
    cache_chunks: int
    cache_hits: int
    cache_misses: int
    cache_waits: int
    decoded_nbytes: int
    decode_seconds: float
    opens: int
    open_files: int
    reads: int
    read_nbytes: int
    read_seconds: float
    reads_in_flight: int
    failed_reads: int
    failed_opens: int
    rss_nbytes: int
    cpu_seconds: float
    errors: tuple[tuple[float, str], ...]
    worker: Work = Work()
    store_trouble: str = ""
    """Why the store is not there; empty where it is."""

    @property
    def hit_rate(self) -> float:
        """The share of chunks that were there, or in the making, when they were asked for; 1 where none was."""
        asked = self.cache_hits + self.cache_misses + self.cache_waits
        return 1 - self.cache_misses / asked if asked else 1.0

    @property
    def line(self) -> str:
        """One line for a supervisor."""
        if self.store_trouble:
            return f"the store is not there: {self.store_trouble}"
        if not self.models.counted_at:
            return f"models are being counted; {self.open_files} open"
        return (
            f"{self.models.models} models, {_size(self.models.saved)} saved; cache "
            f"{_size(self.cache_nbytes)} of {_size(self.cache_budget_nbytes)}; {self.open_files} open"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.1f} GB"


_Value = TypeVar("_Value")


class _Latest(Generic[_Value]):
    """What ``work`` gave last. It runs on a thread of its own, one at a time: who asks waits as long as he may, and a
    disk that does not answer keeps nobody. Thread safety: any number of threads."""

    def __init__(self, work: Callable[[], _Value], value: _Value) -> None:
        self._work = work
        self._value = value
        self._lock = threading.Lock()
        self._done: threading.Event | None = None

    def get(self, seconds: float, *, again: bool = True) -> _Value:
        """The value; a new one (if ``again``) where that is there within ``seconds``."""
        with self._lock:
            done = self._done
            if done is None and again:
                done = self._done = threading.Event()
                threading.Thread(target=self._run, args=(done,), name="hydrafs-status", daemon=True).start()
        if done is not None and seconds > 0:
            done.wait(seconds)
        return self._value

    def _run(self, done: threading.Event) -> None:
        try:
            self._value = self._work()
        except Exception:  # it stays as it was
            log.debug("the status cannot be told", exc_info=True)
        finally:
            with self._lock:
                self._done = None
            done.set()


class Reporter:
    """Gathers the status of a daemon. Thread safety: any number of threads.

    Counting the store's models reads each diff's trailer, so it is done in the background, where a folder has changed
    since or the worker has told of a model (each hour in any case: a plain file may have grown in place), for a small
    share of the time.
    """

    def __init__(self, tree: Observed, mountpoint: Path, errors: LastErrors) -> None:
        self._tree = tree
        self._mountpoint = mountpoint
        self._errors = errors
        self._started_at = time.time()
        self._models = _Latest(self._count, Models())
        self._store = _Latest(self._look, (Work(), ""))
        self._counted = Models()
        self._checked_at = self._took = 0.0
        self._worked = -1
        self._folders: dict[Path, int] = {}

    def _is_unchanged(self) -> bool:
        """Whether all folders are as they were when they were counted: names come and go with their mtimes."""
        counted_at = int(self._counted.counted_at * 1e9)
        try:
            # A folder that had just changed may have changed again within one tick of the filesystem's clock.
            return bool(self._folders) and all(
                os.stat(folder).st_mtime_ns == mtime_ns and counted_at - mtime_ns > _SETTLED_NS
                for folder, mtime_ns in self._folders.items()
            )
        except OSError:
            return False

    def models(self, seconds: float = _WAIT_SECONDS) -> Models:
        """What the store holds, at most a minute old; what was counted before, where counting takes longer than
        ``seconds``."""
        rests = min(_COUNT_AGAIN_SECONDS, max(1.0, self._took / _COUNT_SHARE))
        return self._models.get(seconds, again=time.time() - self._checked_at >= rests)

    def _count(self) -> Models:
        began, now = time.monotonic(), time.time()
        try:
            worked = told(self._tree.store).models
            fresh = now - self._counted.counted_at < _COUNT_ANYWAY_SECONDS and worked == self._worked
            if not fresh or not self._is_unchanged():
                self._worked = worked
                self._counted = self._count_all(now)
            return self._counted
        finally:
            self._took, self._checked_at = time.monotonic() - began, time.time()

    def _count_all(self, now: float) -> Models:
        store = self._tree.store
        folders: dict[Path, int] = {}
        count = dehydrated = listed = stored = saved = 0
        for model in store.models(entered=lambda folder, stat: folders.update({folder: stat.st_mtime_ns})):
            try:
                size = on_disk = os.stat(model.path).st_size
                if model.is_diff:
                    size = trailer_of(model.path).size
                    dehydrated += 1
                    saved += size - on_disk
            except (OSError, HydraError):
                continue
            count += 1
            listed += size
            stored += on_disk
        self._folders = folders
        return Models(count, dehydrated, listed, stored, saved, now)

    def _look(self) -> tuple[Work, str]:
        """What the worker says, and why the store is not there: both are asked of the disk."""
        try:
            self._tree.store.check_root()
        except StoreGone as error:
            return Work(), error.detail
        return told(self._tree.store), ""

    def line(self) -> str:
        """One line for a supervisor, of what is known: it waits for no disk."""
        return self.status(0.0).line

    def status(self, seconds: float = _WAIT_SECONDS) -> Status:
        """The status now. What has to be asked of the disk is as it was before, where that takes longer."""
        worker, trouble = self._store.get(min(seconds, 0.5))
        if trouble:
            seconds = 0.0
        cache = self._tree.cache.statistics()
        counted = self._tree.counters.counted()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Status(
            version=__version__,
            pid=os.getpid(),
            mountpoint=str(self._mountpoint),
            store=named(self._tree.store.root),
            started_at=self._started_at,
            uptime_seconds=time.time() - self._started_at,
            models=self.models(seconds),
            cache_nbytes=cache.nbytes,
            cache_budget_nbytes=cache.budget_nbytes,
            cache_chunks=cache.chunks,
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            cache_waits=cache.waits,
            decoded_nbytes=cache.decoded_nbytes,
            decode_seconds=cache.decode_seconds,
            opens=counted.opens,
            open_files=counted.open_files,
            reads=counted.reads,
            read_nbytes=counted.read_nbytes,
            read_seconds=counted.read_seconds,
            reads_in_flight=counted.reads_in_flight,
            failed_reads=counted.failed_reads,
            failed_opens=counted.failed_opens,
            rss_nbytes=_rss_nbytes(),
            cpu_seconds=used.ru_utime + used.ru_stime,
            errors=tuple(self._errors.lines()),
            worker=worker,
            store_trouble=trouble,
        )


def _rss_nbytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
