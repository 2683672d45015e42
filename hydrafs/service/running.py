"""A served tree with all that a service adds: counting, the control socket, metrics, the supervisor, reloading.

Rule: what cannot be had (a socket, a supervisor) is logged, and the mount serves all the same; what the user asked for
by name (metrics at an address) fails the start.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hydrafs import child
from hydrafs.errors import HydraError, UsageError, from_oserror
from hydrafs.service.control import Server
from hydrafs.service.memory import fitting_cache
from hydrafs.service.metrics import serve_metrics
from hydrafs.service.notify import Notifier
from hydrafs.service.observing import LastErrors, Observed
from hydrafs.service.status import Reporter
from hydrafs.store import PRIVATE
from hydrafs.temporary import TemporaryFile
from hydrafs.working import pause

log = logging.getLogger(__name__)

_NOTE_SECONDS = 60.0
_NOTED = 200
_LEVELS = ("debug", "info", "warning", "error")


def warm(*arguments: str) -> None:
    """Start ``hydrafs warm`` as a process that nothing waits for: the one that serves must not read its own mount."""
    process = child.start(
        "hydrafs.cli:main", ["warm", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/"
    )

    def mind() -> None:
        _, said = process.communicate()
        if process.returncode:
            log.warning("warming ended with code %d: %s", process.returncode, said.decode(errors="replace").strip())

    threading.Thread(target=mind, name="hydrafs-warm", daemon=True).start()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a service is told when it starts.

    ``runtime_folders``: where its control socket may be. ``metrics``: host and port, or none. ``reload_on_hangup``:
    SIGHUP reads the configuration again instead of unmounting, as supervisors expect.
    """

    runtime_folders: Sequence[Path] = ()
    metrics: tuple[str, int] | None = None
    notify_address: str = ""
    watchdog_usec: int = 0
    reload_on_hangup: bool = False
    memory_limit_nbytes: int | None = None
    """What the control group allows: the cache is not made larger than fits."""


class Served(Observed):
    """The tree that a daemon serves. Thread safety: as ``Observed``."""

    def __init__(self, tree: Any, mountpoint: Path, settings: Settings) -> None:
        super().__init__(tree)
        self._settings = settings
        self._mountpoint = mountpoint
        self._errors = LastErrors()
        self.notifier = Notifier(settings.notify_address, settings.watchdog_usec)
        self._noted_at = time.monotonic()
        self._stops: list[Callable[[], None]] = []
        self.reporter = Reporter(self, mountpoint, self._errors)
        self._hangups = -1
        if settings.reload_on_hangup:
            # Python's own handlers run on the main thread, which sits in libfuse; the byte in the pipe comes at once.
            self._hangups, written = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(self._hangups, True)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            signal.signal(signal.SIGHUP, lambda number, frame: None)

    @property
    def own_signals(self) -> frozenset[int]:
        """Signals that mean something to this tree, and do not unmount it."""
        return frozenset({signal.SIGHUP} if self._hangups >= 0 else ())

    def start(self) -> None:
        """Start the tree, then what watches it; in the process that serves."""
        self.tree.start()
        logging.getLogger("hydrafs").addHandler(self._errors)
        self.counters.recall(self._noted())
        server = Server(self._settings.runtime_folders, self._mountpoint, self._actions())
        server.start()
        self._stops.append(server.close)
        if self._settings.metrics is not None:
            self._stops.append(serve_metrics(self._settings.metrics, self.reporter.status))
        if self._hangups >= 0:
            threading.Thread(target=self._await_hangups, name="hydrafs-reload", daemon=True).start()
        self.notifier.keep_alive(self._status_line, self._is_alive)
        log.info("%s is mounted at %s", self.tree.store.root, self._mountpoint)

    def ready(self) -> None:
        """Tell the supervisor that the mount answers."""
        self.notifier.ready(self._status_line())

    def stop(self) -> None:
        """Stop what watches, then the tree."""
        self.notifier.stopping()
        for stop in reversed(self._stops):
            stop()
        self._note_opened()
        logging.getLogger("hydrafs").removeHandler(self._errors)
        self.tree.stop()

    def open(self, path: str, flags: int) -> Any:
        """As the tree has it, counted; what was opened is noted for after a restart, at most once a minute."""
        handle = super().open(path, flags)
        if time.monotonic() - self._noted_at > _NOTE_SECONDS:
            self._noted_at = time.monotonic()
            threading.Thread(target=self._note_opened, name="hydrafs-note", daemon=True).start()
        return handle

    def _notes(self) -> Path:
        private: Path = self.tree.store.private
        return private / "opened.json"

    def _noted(self) -> dict[str, float]:
        try:
            noted = json.loads(self._notes().read_bytes())
            return {str(path): float(at) for path, at in noted.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            return {}

    def _note_opened(self) -> None:
        opened = dict(self.counters.lately_opened()[:_NOTED])
        try:
            self.tree.store.check_root()
            with TemporaryFile(self._notes().parent) as temporary:
                # Not msgspec: names may hold bytes that are no UTF-8, which only escapes carry.
                temporary.file.write(json.dumps(opened).encode())
                temporary.commit(self._notes(), replace=True)
        except (HydraError, OSError) as error:  # a store that is full, or cannot be written: nothing is noted
            log.debug("what was opened is not noted: %s", error)

    def _status_line(self) -> str:
        return self.reporter.line()

    def _is_alive(self) -> bool:
        """Whether a request would be answered: the tree is asked as the kernel would ask it, for a name that it knows
        without the disk and without waiting for what is being deleted. A disk that is slow, or gone, is no reason to
        start the daemon again."""
        try:
            self.tree.getattr(f"/{PRIVATE}")
        except FileNotFoundError:
            return True
        except Exception:
            log.exception("the mount does not answer")
        return False

    def _await_hangups(self) -> None:
        while received := os.read(self._hangups, 64):
            if signal.SIGHUP in received:
                self.notifier.reloading()
                try:
                    self.reload({})
                except HydraError as error:
                    log.error("the configuration stays as it was: %s", error)
                self.notifier.ready(self._status_line())

    def _actions(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        return {
            "status": lambda request: msgspec.to_builtins(self.reporter.status()),
            "lately-opened": lambda request: self.counters.lately_opened(),
            "cache-size": self._resize,
            "drop": lambda request: {"dropped": self.tree.cache.drop()},
            "log-level": self._log_level,
            "prefetch": self._prefetch,
            "reload": self.reload,
            "pause": lambda request: self._pause(True),
            "resume": lambda request: self._pause(False),
        }

    def _resize(self, request: dict[str, Any]) -> dict[str, int]:
        nbytes = request.get("nbytes")
        if not isinstance(nbytes, int) or nbytes < 1 << 20:
            raise UsageError("not a cache size", where=str(nbytes), remedy="give at least 1M")
        fits = fitting_cache(nbytes, self._settings.memory_limit_nbytes)
        if fits < nbytes:
            raise UsageError(
                "the cache would not fit",
                where=f"{nbytes >> 20} MiB",
                detail=f"this service's memory limit leaves {fits >> 20} MiB",
                remedy="raise MemoryHigh and MemoryMax first",
            )
        self.tree.cache.resize(nbytes)
        return {"budget_nbytes": self.tree.cache.budget_nbytes}

    def _prefetch(self, request: dict[str, Any]) -> dict[str, str]:
        path = "/" + os.path.normpath(f"/{request.get('path', '')}").lstrip("/")
        try:
            attributes = self.tree.getattr(path)
        except OSError as error:
            raise from_oserror(error, "no such model", self._mountpoint / path[1:]) from error
        if not stat.S_ISREG(attributes.mode):
            raise UsageError("not a model", where=self._mountpoint / path[1:], remedy="name a file of the mount")
        warm(os.fspath(self._mountpoint / path[1:]))
        return {"path": path}

    def _pause(self, on: bool) -> dict[str, bool]:
        try:
            pause(self.tree.store, on)
        except OSError as error:
            raise from_oserror(error, "cannot tell the worker", self.tree.store.private) from error
        return {"paused": on}

    def _log_level(self, request: dict[str, Any]) -> dict[str, str]:
        level = str(request.get("level")).lower()
        if level not in _LEVELS:
            raise UsageError("no such log level", where=level, remedy=f"choose one of {', '.join(_LEVELS)}")
        logging.getLogger().setLevel(level.upper())
        return {"level": level}

    def reload(self, request: dict[str, Any]) -> dict[str, list[str]]:
        """Read the store's configuration again."""
        self.tree.reload()
        folders = [str(folder) for folder in self.tree.store.base_folders]
        log.info("the configuration was read again; base folders: %s", ", ".join(folders) or "none")
        return {"base_folders": folders}
