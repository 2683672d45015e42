"""Dehydration in the background: what lands in a store and rests there becomes a diff, and nobody notices.

Goal: disk use falls by itself, at the cost of no reader and of no writer.
Rule 1: a model is taken when it has been closed and quiet for a while; who opens it for writing gets it at once, and
        the work on it is thrown away.
Rule 2: one model at a time, at the lowest priority, and not while somebody reads from the mount.
Rule 3: what the user has made whole stays whole: a pinned model, a file beside its own diff; and what is copied up
        again and again is left alone longer each time.
Rule 4: there is one worker per store, whoever starts more.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydrafs import covered, tending
from hydrafs.activity import Activity
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.diff import SUFFIX
from hydrafs.errors import Changing, HydraError
from hydrafs.identity import FileIdentity
from hydrafs.leases import Lease
from hydrafs.needs import needs
from hydrafs.policy import Policy
from hydrafs.store import ModelEntry, Store, is_private

__all__ = ["Worker", "run", "run_order"]

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5
"""How long nobody may have read before the work goes on."""
_POLL_SECONDS = 5.0
_WATCHED_POLL_SECONDS = 60.0
_LOCK_SECONDS = 5.0
_MAX_BACKOFF = 10


@dataclass(slots=True)
class _Seen:
    """A plain model as it was last looked at: since when it is what it is, and against which others it was tried."""

    identity: FileIdentity
    since: float
    tried: object = None


@dataclass(slots=True)
class Worker:
    """Dehydrates what rests in a store. Thread safety: ``stop`` from any thread, all else from one."""

    store: Store
    policy: Policy
    jobs: int = 1
    busy: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, _Seen] = field(default_factory=dict)
    _times: dict[Path, int] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End as soon as possible: what is being done is thrown away."""
        self._stopped.set()

    def run(self) -> None:
        """Work until ``stop``."""
        with self._alone() as alone:
            if not alone:
                return
            self._start()
            for _ in self._occasions():
                if self._stopped.is_set():
                    return
                self.step()

    def _start(self) -> None:
        for tend in (tending.start, tending.hold_parents):
            try:
                tend(self.store)
            except (HydraError, OSError) as error:
                log.error("the store cannot be put in order: %s", error)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Wait until no other worker has the store; false when it is time to stop before that."""
        fd = os.open(self.store.private / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not self._stopped.is_set():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield True
                    return
                self._stopped.wait(_LOCK_SECONDS)
            yield False
        finally:
            os.close(fd)

    def _occasions(self) -> Iterator[None]:
        """When to look: as soon as anything changes, when something has rested long enough, and every now and then."""
        changed = threading.Event()
        changes = _watch(self.store.root, changed, self._stopped)
        yield
        while not self._stopped.is_set():
            limit = _WATCHED_POLL_SECONDS if changes else _POLL_SECONDS
            waiting = [s.since + self._settle(p) for p, s in self._seen.items() if s.tried is None]
            until = min([limit, *(max(0.05, t - self.clock()) for t in waiting)])
            begun = time.monotonic()
            while time.monotonic() - begun < until and not self._stopped.wait(0.1):
                if changed.is_set():
                    break
            changed.clear()
            yield

    def _settle(self, path: Path) -> float:
        return float(self.policy.settle_seconds * 2 ** min(self._times.get(path, 0), _MAX_BACKOFF))

    # Which

    def step(self) -> list[Outcome]:
        """Look at the store, and dehydrate what has rested long enough; what was done."""
        done = []
        models = [m for m in self.store.models() if not m.is_diff]
        for path in self._ready(models):
            if self._stopped.is_set():
                break
            outcome = self._one(path)
            if outcome is not None:
                done.append(outcome)
        return done

    def _ready(self, models: list[ModelEntry]) -> list[Path]:
        now, wall = self.clock(), time.time_ns()
        company = frozenset(m.name for m in models)
        ready: list[tuple[int, Path]] = []
        for model in models:
            path = model.path
            try:
                stat = os.lstat(path)
                if path.is_symlink() or not self.policy.wants(model.name, stat.st_size):
                    continue
                if os.path.lexists(f"{path}{SUFFIX}") or self.store.is_pinned(path):
                    continue
            except OSError:
                continue
            identity = FileIdentity.of(stat)
            seen = self._seen.get(path)
            if seen is None or _is_another(seen.identity, identity):
                # A file that was there before the first look has rested since it was last written to.
                rested = max(0.0, (wall - max(stat.st_mtime_ns, stat.st_ctime_ns)) / 1e9)
                seen = self._seen[path] = _Seen(identity, now - rested if seen is None else now)
            if seen.tried != company and now - seen.since >= self._settle(path):
                ready.append((stat.st_mtime_ns, path))
        for path in [p for p in self._seen if not os.path.lexists(p)]:
            del self._seen[path]
        needed = {need.parent.size for need in needs(self.store).values()} if ready else set()
        # The oldest first: what others were made from. What others need already stays whole, and is asked last.
        ready.sort(key=lambda item: (os.stat(item[1]).st_size in needed, item[0]))
        return [path for _, path in ready]

    # How

    def _one(self, path: Path) -> Outcome | None:
        seen = self._seen[path]
        try:
            with Lease(path) as lease:

                def still() -> None:
                    lease.check()
                    while self.busy() and not self._stopped.is_set():
                        self._stopped.wait(0.05)
                        lease.check()
                    if self._stopped.is_set():
                        raise Changing("the worker ends", where=path)

                still()
                outcome = dehydrate(self.store, path, Options(jobs=self.jobs, still=still, all_or_nothing=True))
        except Changing as error:
            log.info("%s is left for later: %s", path, error)
            seen.since = self.clock()
            return None
        except HydraError as error:
            log.warning("%s is not dehydrated: %s", path, error)
            seen.tried = self._company()
            return None
        if outcome.diff is None:
            seen.tried = self._company()
            log.info("%s stays whole: %s", path, "; ".join(outcome.reasons))
            return None
        self._times[path] = self._times.get(path, 0) + 1
        self._seen.pop(path, None)
        log.info("%s: %d -> %d bytes", path, outcome.size, outcome.stored_nbytes)
        return outcome

    def _company(self) -> object:
        return frozenset(m.name for m in self.store.models() if not m.is_diff)


def _is_another(old: FileIdentity, new: FileIdentity) -> bool:
    """Whether a file was written to or replaced; a link that holds it changes its ctime only."""
    return (old.size, old.mtime_ns, old.inode, old.device) != (new.size, new.mtime_ns, new.inode, new.device)


def _watch(root: Path, changed: threading.Event, stopped: threading.Event) -> bool:
    """Set ``changed`` whenever a file of the store does, through inotify; whether that can be had."""
    try:
        from watchfiles import watch  # noqa: PLC0415 - a worker only; the mount does without
    except ImportError:
        return False

    def follow() -> None:
        try:
            for changes in watch(root, stop_event=stopped, raise_interrupt=False, ignore_permission_denied=True):
                if any(not any(is_private(part) for part in Path(p).relative_to(root).parts) for _, p in changes):
                    changed.set()
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("the store cannot be watched, it is looked at every minute: %s", error)

    threading.Thread(target=follow, name="hydrafs-watch-store", daemon=True).start()
    return True


def yield_to_others() -> None:
    """This process gets the processor and the disk when nobody else wants them."""
    with contextlib.suppress(OSError):
        os.nice(19)
    number = {"x86_64": 251, "aarch64": 30}.get(platform.machine())  # ioprio_set(2); the C library has no name for it
    if number is not None:
        with contextlib.suppress(OSError):
            ctypes.CDLL(None, use_errno=True).syscall(number, 1, 0, 3 << 13)


# As a process of its own


def run_order(order: Mapping[str, Any]) -> None:
    """What the child of a ``Helper`` runs: work on the store that ``order`` names until stdin is closed."""
    root: str = order["root"]
    if order["covered"] >= 0:
        descriptor = f"/proc/{os.getpid()}/fd/{order['covered']}"
        covered.cover(descriptor, root)
        if order["catalogs"]:
            covered.keep_catalogs_in(Path(order["catalogs"]))
        root = descriptor
    logging.basicConfig(
        filename=covered.reached(order["log"]) if order["log"] else os.devnull,
        level=logging.WARNING,
        format="%(asctime)s hydrafs: worker: %(levelname)s: %(message)s",
    )
    off_limits = Path(order["off_limits"]) if order["off_limits"] else None
    run(Path(root), order["given"], end=lambda: sys.stdin.buffer.read(1), off_limits=off_limits)


def run(
    root: Path, given: Mapping[str, Any], *, end: Callable[[], object] | None = None, off_limits: Path | None = None
) -> None:
    """Work on the store at ``root`` in this process, at the lowest priority.

    Args:
        given: fields of ``Policy`` that go before the store's configuration.
        end: called on a thread of its own; when it returns, the work ends.
        off_limits: where the store is mounted: what leads there is no model of the store.
    """
    yield_to_others()
    with contextlib.closing(Store(root, create=True)) as store:
        store.off_limits = off_limits
        activity = Activity(store.private / "activity")
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            policy = Policy.of(store, **fields)
            worker = Worker(store, policy, busy=lambda: activity.quiet_seconds() < _QUIET_SECONDS)
            if not policy.enabled:
                worker.policy = Policy(enabled=False, include=("/",))  # it tends the store, and wants no model
            if end is not None:

                def wait_for_end() -> None:
                    end()
                    worker.stop()

                threading.Thread(target=wait_for_end, name="hydrafs-parent", daemon=True).start()
            worker.run()
        finally:
            activity.close()
