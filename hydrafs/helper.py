"""The worker of a mount as a process of its own: the one that serves pays for none of what dehydrating needs."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydrafs import child
from hydrafs.covered import catalogs_folder
from hydrafs.logs import Style

__all__ = ["Helper"]

log = logging.getLogger(__name__)

_RESTART_SECONDS = 60.0
_RESTART_SECONDS_MAX = 3600.0


class Helper:
    """A worker in a process of its own, which ends with this one, however that ends.

    One that dies is started again after a minute, and after twice as long each further time: a start puts in order what
    it left. Thread safety: any.

    Args:
        root: the store, by the name that people know.
        given: fields of ``hydrafs.policy.Policy`` that go before the store's configuration.
        style: what it logs, and how: to what stderr is when it starts, or was at ``remember_stderr``.
        off_limits: where the store is mounted: what leads there is no model of the store.
    """

    def __init__(
        self,
        root: Path,
        given: Mapping[str, Any],
        *,
        style: Style | None = None,
        off_limits: Path | None = None,
    ) -> None:
        self._order: dict[str, Any] = {
            "root": os.fspath(root),
            "given": dict(given),
            "style": asdict(style or Style()),
            "off_limits": os.fspath(off_limits) if off_limits else None,
            "mark": "",
        }
        self._stderr: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def remember_stderr(self) -> None:
        """Give it what stderr is now: while a mount is made, stderr is where libfuse is listened to."""
        self._stderr = os.dup(2)

    def start(self, covered: int = -1, mark: str = "") -> None:
        """Start it; returns at once.

        Args:
            covered: a descriptor of the store's folder, where a mount covers that.
            mark: of the store (``hydrafs.root_identity``): it works on no folder that has another, or none.
        """
        self._ended.clear()
        self._order["mark"] = mark or self._order["mark"]
        with self._lock:
            self._try_to_start(covered)
        threading.Thread(target=self._mind, args=(covered,), name="hydrafs-helper", daemon=True).start()

    def _mind(self, covered: int) -> None:
        """Sleep until the process ends; start it anew where it did not mean to, or could not be started."""
        seconds = _RESTART_SECONDS
        while True:
            process, begun = self._process, time.monotonic()
            if process is not None:
                code = process.wait()
                if self._ended.is_set() or code == 0:
                    return
                if time.monotonic() - begun > _RESTART_SECONDS_MAX:
                    seconds = _RESTART_SECONDS  # it was well for long
                log.error("the worker ended with code %d; it is started again in %.0f s", code, seconds)
            if self._ended.wait(seconds):
                return
            seconds = min(2 * seconds, _RESTART_SECONDS_MAX)
            with self._lock:
                if self._ended.is_set():
                    return
                self._try_to_start(covered)

    def _try_to_start(self, covered: int) -> None:
        """Start it; a system that has no room for another process now may have it later."""
        try:
            self._start(covered)
        except OSError as error:
            self._process = None
            log.error("the worker cannot be started, it is tried again: %s", error.strerror)

    def _start(self, covered: int) -> None:
        folder = catalogs_folder()
        order = {
            **self._order,
            "covered": covered,
            "catalogs": os.fspath(folder) if folder else None,
        }
        self._process = child.start(
            "hydrafs.worker:run_order",
            order,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=(covered,) if covered >= 0 else (),
        )

    def start_again(self, covered: int = -1) -> None:
        """Start it if it has ended: one that had nothing to do may have something to do by now."""
        if self._process is not None and self._process.poll() is not None:
            self.stop()
            self.start(covered)

    def stop(self, seconds: float = 10.0) -> None:
        """End it, and wait for that; what it does not end by itself is killed, and loses nothing by it."""
        self._ended.set()
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
