"""What a daemon says of itself: one set of facts for ``status``, ``top`` and the metrics."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import msgspec

from hydrafs.covered import named
from hydrafs.errors import HydraError
from hydrafs.service.observing import LastErrors, Observed
from hydrafs.store import trailer_of
from hydrafs.version import __version__
from hydrafs.working import Work, told

_COUNT_AGAIN_SECONDS = 60.0
_COUNT_ANYWAY_SECONDS = 3600.0
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

    @property
    def hit_rate(self) -> float:
        """The share of chunks that were there, or in the making, when they were asked for; 1 where none was."""
        asked = self.cache_hits + self.cache_misses + self.cache_waits
        return 1 - self.cache_misses / asked if asked else 1.0

    @property
    def line(self) -> str:
        """One line for a supervisor."""
        return (
            f"{self.models.models} models, {_size(self.models.saved)} saved; cache "
            f"{_size(self.cache_nbytes)} of {_size(self.cache_budget_nbytes)}; {self.open_files} open"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.1f} GB"


class Reporter:
    """Gathers the status of a daemon. Thread safety: any number of threads.

    Counting the store's models reads each diff's trailer, so it is done at most once a minute, by whoever asks, where
    a folder has changed since (each hour in any case: a plain file may have grown in place), and never while a request
    of the mount waits for it.
    """

    def __init__(self, tree: Observed, mountpoint: Path, errors: LastErrors) -> None:
        self._tree = tree
        self._mountpoint = mountpoint
        self._errors = errors
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._models = Models()
        self._checked_at = 0.0
        self._folders: dict[Path, int] = {}

    def _is_unchanged(self) -> bool:
        """Whether all folders are as they were when they were counted: names come and go with their mtimes."""
        counted_at = int(self._models.counted_at * 1e9)
        try:
            # A folder that had just changed may have changed again within one tick of the filesystem's clock.
            return bool(self._folders) and all(
                os.stat(folder).st_mtime_ns == mtime_ns and counted_at - mtime_ns > _SETTLED_NS
                for folder, mtime_ns in self._folders.items()
            )
        except OSError:
            return False

    def models(self) -> Models:
        """What the store holds, at most a minute old."""
        with self._lock:
            now = time.time()
            if now - self._checked_at < _COUNT_AGAIN_SECONDS:
                return self._models
            self._checked_at = now
            if now - self._models.counted_at < _COUNT_ANYWAY_SECONDS and self._is_unchanged():
                return self._models
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
            self._models = Models(count, dehydrated, listed, stored, saved, now)
            return self._models

    def status(self) -> Status:
        """The status now."""
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
            models=self.models(),
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
            worker=told(self._tree.store),
        )


def _rss_nbytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
