"""Dehydration in the background: what lands in a store and rests there becomes a diff, and nobody notices.

Goal: disk use falls by itself, at the cost of no reader and of no writer.
Rule 1: a model is taken when it has been closed and quiet for a while; who opens it for writing gets it at once, and
        the work on it is thrown away.
Rule 2: one model at a time, at the lowest priority, and not while somebody reads from the mount.
Rule 3: what the user has made whole stays whole: a pinned model, a file beside its own diff; and what is copied up
        again and again is left alone longer each time.
Rule 4: a model that resembles no other stays whole: it may be what others will be made from, and is read for each.
Rule 5: there is one worker per store, whoever starts more.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hydrafs import covered, tending, working
from hydrafs.activity import Activity
from hydrafs.allocator import return_memory, tune_allocator
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.diff import SUFFIX
from hydrafs.errors import Changing, HydraError, printable
from hydrafs.identity import FileIdentity
from hydrafs.layout import plain_text
from hydrafs.leases import Lease
from hydrafs.limits import raise_open_files
from hydrafs.logs import Style, log_to
from hydrafs.looking import watched
from hydrafs.needs import needs
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.tried import Tried
from hydrafs.working import Work

__all__ = ["Worker", "run", "run_order"]

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5
"""How long nobody may have read before the work goes on."""
_POLL_SECONDS = 60.0
_WATCHED_POLL_SECONDS = 3600.0
"""How often to look without having been told of a change; inotify sees nothing of what another machine does."""
_LOCK_SECONDS = 20.0
_TELL_SECONDS = 1.0
_MAX_BACKOFF = 10
_PRIVATE = frozenset({working.PAUSED, "config.toml"})
"""Of hydrafs' own files: what the worker is told by."""


@dataclass(slots=True)
class _Seen:
    """A plain model as it was last looked at, and since when it is what it is."""

    identity: FileIdentity
    since: float


@dataclass(frozen=True, slots=True, order=True)
class _Model:
    """A plain model. ``stays``: it is not to be dehydrated, now or later, as far as is known."""

    mtime_ns: int
    name: str
    path: Path = field(compare=False)
    identity: FileIdentity = field(compare=False)
    stays: bool = field(compare=False)


@dataclass(slots=True)
class Worker:
    """Dehydrates what rests in a store. Thread safety: ``stop`` from any thread, all else from one."""

    store: Store
    policy: Policy
    jobs: int = 1
    busy: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    policy_now: Callable[[], Policy] | None = None
    """Asked at every look for the policy, after the store's configuration was read again."""
    _seen: dict[Path, _Seen] = field(default_factory=dict)
    _times: dict[Path, int] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Event = field(default_factory=threading.Event)
    _tried: Tried = field(init=False)
    _work: Work = field(init=False)
    _told: float = 0.0
    _until: float = 0.0
    """When the next model will have rested long enough, as of the last look; 0 where there is none that could."""

    def __post_init__(self) -> None:
        self._tried = Tried(self.store)
        self._work = Work("none", os.getpid())  # not what is told first, so that the first thing is told

    def stop(self) -> None:
        """End as soon as possible: what is being done is thrown away."""
        self._stopped.set()
        self._changed.set()

    def run(self) -> None:
        """Work until ``stop``; where nothing is to be dehydrated, put the store in order and end."""
        while not self._stopped.is_set():
            with working.alone(self.store) as alone:
                if alone:
                    with contextlib.suppress(OSError):
                        working.pause(self.store, False)
                    self._start()
                    if not self.policy.enabled:
                        return  # another worker, which is to dehydrate, gets the store
                    with watched(self.store.root, self._changed.set, private=_PRIVATE) as tells:
                        self._run(_WATCHED_POLL_SECONDS if tells else _POLL_SECONDS)
            self._stopped.wait(_LOCK_SECONDS)

    def _run(self, limit: float) -> None:
        while not self._stopped.is_set():
            self._changed.clear()
            until = 0.0
            if not self._is_paused():
                self.step()
                until = self._until
            return_memory()
            state = "paused" if self._is_paused() else "idle" if self.policy.enabled else "off"
            now, wall = self.clock(), time.time()
            self._tell(state, model="", stage="", waits_until=wall + until - now if until else 0.0)
            self._changed.wait(min(limit, max(0.05, until - now)) if until else limit)

    def _start(self) -> None:
        for tend in (tending.start, tending.hold_parents):
            try:
                tend(self.store)
            except (HydraError, OSError) as error:
                log.error("the store cannot be put in order: %s", error)

    def _is_paused(self) -> bool:
        return working.is_paused(self.store)

    def _tell(self, state: str, **facts: Any) -> None:
        work = msgspec.structs.replace(self._work, state=state, left_whole=len(self._tried), **facts)
        if work.state != self._work.state or work.model != self._work.model:
            work = msgspec.structs.replace(work, since=time.time())
        if work != self._work:
            self._work = work
            self._told = time.monotonic()
            working.tell(self.store, work)

    def _settle(self, path: Path) -> float:
        return float(self.policy.settle_seconds * 2 ** min(self._times.get(path, 0), _MAX_BACKOFF))

    # Which

    def _configure(self) -> None:
        """What is pinned and wanted may have been changed by another process."""
        try:
            self.store.reload()
            if self.policy_now is not None:
                self.policy = self.policy_now()
        except HydraError as error:
            log.error("the configuration stays as it was: %s", error)

    def step(self) -> list[Outcome]:
        """Look at the store, and dehydrate what has rested long enough; what was done."""
        done = []
        self._configure()
        models = self._plain()
        now, looked_at = self.clock(), False
        for model in self._wanted(models):
            if self._stopped.is_set() or self._is_paused():
                break
            if now - self._seen[model.path].since >= self._settle(model.path):
                looked_at = True
                outcome = self._one(model.path, [m.path for m in self._newer(model, models)])
                if outcome is not None:
                    done.append(outcome)
        if looked_at:
            models = self._plain()
        self._tried.keep({m.name for m in models})
        times = [self._seen[m.path].since + self._settle(m.path) for m in self._wanted(models)]
        self._until = min(times, default=0.0)
        return done

    def _plain(self) -> list[_Model]:
        """The plain models, the oldest first: a model was made from older ones, and is not taken for what an older one
        was made from."""
        now, wall = self.clock(), time.time_ns()
        needed = needs(self.store)
        found = []
        for model in self.store.models():
            path = model.path
            if model.is_diff or path.is_symlink():
                continue
            try:
                stat = os.lstat(path)
            except OSError:
                continue
            identity = FileIdentity.of(stat)
            sha256 = self.store.catalog.sha256(path, identity)
            stays = (
                not self.policy.wants(model.name, stat.st_size)
                or os.path.lexists(f"{path}{SUFFIX}")
                or self.store.is_pinned(path)
                or sha256 in needed
            )
            found.append(_Model(stat.st_mtime_ns, model.name, path, identity, stays))
            seen = self._seen.get(path)
            if seen is None or _is_another(seen.identity, identity):
                # A file that was there before the first look has rested since it was last written to.
                rested = max(0.0, (wall - max(stat.st_mtime_ns, stat.st_ctime_ns)) / 1e9)
                self._seen[path] = _Seen(identity, now - rested if seen is None else now)
        for path in self._seen.keys() - {model.path for model in found}:
            del self._seen[path]
        return sorted(found)

    @staticmethod
    def _newer(model: _Model, models: Sequence[_Model]) -> list[_Model]:
        """What no model that is as old as ``model`` is stored against, because it will be dehydrated itself."""
        return [m for m in models if (m.mtime_ns, m.name) > (model.mtime_ns, model.name) and not m.stays]

    def _wanted(self, models: Sequence[_Model]) -> list[_Model]:
        """Those that are to be dehydrated, and were not tried yet as they are against what is there."""
        whole = {m.name for m in models if m.stays}
        older: set[str] = set()
        found = []
        for model in models:
            if not model.stays and not self._tried.is_settled(model.name, model.identity, older | whole):
                found.append(model)
            older.add(model.name)
        return found

    # How

    def _one(self, path: Path, not_bases: Sequence[Path]) -> Outcome | None:
        seen = self._seen[path]
        name = self.store.relative(path)
        try:
            with Lease(path) as lease:

                def still() -> None:
                    lease.check()
                    while (state := self._hindered()) and not self._stopped.is_set():
                        self._tell(state)
                        self._stopped.wait(0.05 if state == "waiting" else 0.5)
                        lease.check()
                    if self._stopped.is_set():
                        raise Changing("the worker ends", where=path)

                def progress(stage: str, nbytes: int, total: int) -> None:
                    done = nbytes if stage != self._work.stage else self._work.done_nbytes + nbytes
                    work = msgspec.structs.replace(self._work, stage=stage, done_nbytes=done, total_nbytes=total)
                    if time.monotonic() - self._told > _TELL_SECONDS:
                        self._tell("working", stage=stage, done_nbytes=done, total_nbytes=total)
                    else:
                        self._work = work

                self._tell("working", model=plain_text(name), stage="", done_nbytes=0, total_nbytes=0, waits_until=0.0)
                still()
                self._configure()
                if self.store.is_pinned(path):
                    return None
                options = Options(
                    jobs=self.jobs, still=still, not_bases=tuple(not_bases), alone=False, all_or_nothing=True
                )
                outcome = dehydrate(self.store, path, options, progress=progress)
        except Changing as error:
            log.info("%s is left for later: %s", path, error)
            seen.since = self.clock()
            return None
        except HydraError as error:
            log.warning("%s is not dehydrated: %s", path, error)
            self._tell("working", last_error=f"{plain_text(name)}: {covered.shown(printable(str(error)))}")
            self._leave_whole(path, seen)
            return None
        if outcome.diff is None:
            self._leave_whole(path, seen)
            log.info("%s stays whole: %s", path, "; ".join(outcome.reasons))
            return None
        self._times[path] = self._times.get(path, 0) + 1
        self._seen.pop(path, None)
        saved = outcome.size - outcome.stored_nbytes
        self._tell("working", models=self._work.models + 1, saved_nbytes=self._work.saved_nbytes + saved)
        log.info("%s: %d -> %d bytes", path, outcome.size, outcome.stored_nbytes)
        return outcome

    def _hindered(self) -> str:
        """What keeps the work from going on now, as a state of ``hydrafs.working``."""
        if self._is_paused():
            return "paused"
        return "waiting" if self.busy() else ""

    def _leave_whole(self, path: Path, seen: _Seen) -> None:
        company = frozenset(m.name for m in self.store.models() if not m.is_diff)
        self._tried.note(self.store.relative(path), seen.identity, company)


def _is_another(old: FileIdentity, new: FileIdentity) -> bool:
    """Whether a file was written to or replaced; a link that holds it changes its ctime only."""
    return (old.size, old.mtime_ns, old.inode, old.device) != (new.size, new.mtime_ns, new.inode, new.device)


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
    raise_open_files()
    root: str = order["root"]
    if order["covered"] >= 0:
        descriptor = f"/proc/{os.getpid()}/fd/{order['covered']}"
        covered.cover(descriptor, root)
        if order["catalogs"]:
            covered.keep_catalogs_in(Path(order["catalogs"]))
        root = descriptor
    log_to(sys.stderr, Style(**order["style"]), "hydrafs: worker")
    off_limits = Path(order["off_limits"]) if order["off_limits"] else None
    run(Path(root), order["given"], end=lambda: sys.stdin.buffer.read(1), off_limits=off_limits)
    logging.shutdown()
    # Not the interpreter's end: that waits for the lock of stdin, which the thread that reads it has.
    os._exit(0)


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
    tune_allocator()
    with contextlib.closing(Store(root, create=True)) as store:
        store.off_limits = off_limits
        activity = Activity(store.private / "activity")
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

            def policy() -> Policy:
                found = Policy.of(store, **fields)
                # Without dehydration it tends the store, and wants no model until the configuration is another.
                return found if found.enabled else Policy(enabled=False, include=("/",))

            worker = Worker(store, policy(), busy=lambda: activity.quiet_seconds() < _QUIET_SECONDS, policy_now=policy)
            if end is not None:

                def wait_for_end() -> None:
                    end()
                    worker.stop()

                threading.Thread(target=wait_for_end, name="hydrafs-parent", daemon=True).start()
            worker.run()
        finally:
            activity.close()
