"""The status as Prometheus metrics, over HTTP.

The exposition format and the server are ``prometheus_client``'s; the names follow its conventions (units at the end,
``_total`` for what only grows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hydrafs.errors import MountFailed, UsageError
from hydrafs.service.status import Status

_GAUGES = (
    ("hydrafs_models", "Models listed.", lambda s: s.models.models),
    ("hydrafs_models_dehydrated", "Models stored as diffs.", lambda s: s.models.dehydrated),
    ("hydrafs_listed_bytes", "Size of all models as listed.", lambda s: s.models.listed),
    ("hydrafs_stored_bytes", "What the models take on disk.", lambda s: s.models.stored),
    ("hydrafs_saved_bytes", "What full files would take more.", lambda s: s.models.saved),
    ("hydrafs_cache_bytes", "Decoded chunks kept.", lambda s: s.cache_nbytes),
    ("hydrafs_cache_budget_bytes", "Decoded chunks kept at most.", lambda s: s.cache_budget_nbytes),
    ("hydrafs_open_files", "Files that are open.", lambda s: s.open_files),
    ("hydrafs_reads_in_flight", "Reads that are being answered.", lambda s: s.reads_in_flight),
    ("hydrafs_resident_memory_bytes", "Memory of the daemon.", lambda s: s.rss_nbytes),
    ("hydrafs_worker_busy", "1 while the worker is at a model.", lambda s: s.worker.state in ("working", "waiting")),
    ("hydrafs_worker_paused", "1 while the worker is told to pause.", lambda s: s.worker.state == "paused"),
    ("hydrafs_start_time_seconds", "When the daemon started.", lambda s: s.started_at),
)
_COUNTERS = (
    ("hydrafs_cache_hits", "Chunks that were in the cache.", lambda s: s.cache_hits),
    ("hydrafs_cache_misses", "Chunks that were decoded.", lambda s: s.cache_misses),
    ("hydrafs_cache_waits", "Chunks that another thread was decoding.", lambda s: s.cache_waits),
    ("hydrafs_decoded_bytes", "Bytes decoded.", lambda s: s.decoded_nbytes),
    ("hydrafs_decode_seconds", "Seconds spent decoding, all threads together.", lambda s: s.decode_seconds),
    ("hydrafs_opens", "Opens that were served.", lambda s: s.opens),
    ("hydrafs_failed_opens", "Opens that were refused.", lambda s: s.failed_opens),
    ("hydrafs_reads", "Reads that were answered.", lambda s: s.reads),
    ("hydrafs_failed_reads", "Reads that failed.", lambda s: s.failed_reads),
    ("hydrafs_read_bytes", "Bytes that were read.", lambda s: s.read_nbytes),
    ("hydrafs_read_seconds", "Seconds spent answering reads, all threads together.", lambda s: s.read_seconds),
    ("hydrafs_cpu_seconds", "Processor time of the daemon.", lambda s: s.cpu_seconds),
)  # fmt: skip


class Collector:
    """What ``prometheus_client`` asks at each scrape. Thread safety: as ``status``."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterable[Any]:
        """The metrics of this moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        now = self._status()
        labels, values = ["mountpoint"], [now.mountpoint]
        families: tuple[tuple[Any, Any], ...] = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for kind, rows in families:
            for name, text, value in rows:
                family = kind(name, text, labels=labels)
                family.add_metric(values, float(value(now)))
                yield family


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[V6]:PORT`` or ``:PORT`` (this machine only) as host and port.

    Raises:
        UsageError: it is none of these.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdigit() or int(port) > 65535:
        raise UsageError("not an address", where=text, remedy="write it as 127.0.0.1:9401")
    return host, int(port)


def serve_metrics(address: tuple[str, int], status: Callable[[], Status]) -> Callable[[], None]:
    """Answer scrapes at ``address`` on threads of their own; what stops it.

    Raises:
        MountFailed: the address is in use or not this machine's, or ``prometheus_client`` is missing.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415
    except ImportError:
        raise MountFailed(
            "metrics need prometheus_client", remedy="pip install 'hydrafs[metrics]', or leave --metrics-address out"
        ) from None
    registry = CollectorRegistry()
    registry.register(Collector(status))
    host, port = address
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise MountFailed(
            "metrics cannot be served", where=f"{host}:{port}", detail=error.strerror or "", remedy="name another port"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2.0)

    return stop
