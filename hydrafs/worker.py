"""Dehydration in the background: what lands in a store and rests there becomes a diff, and nobody notices.

Goal: disk use falls by itself, at the cost of no reader and of no writer.
Rule 1: a model is taken when it has been closed and quiet for a while; who opens it for writing gets it at once, and
        the work on it is thrown away.
Rule 2: one model at a time, at the lowest priority, and not while somebody reads from the mount.
Rule 3: what the user has made whole stays whole: a pinned model, a file beside its own diff; and what is copied up
        again and again is left alone longer each time.
Rule 4: a model that resembles no other stays whole: it may be what others will be made from, and is read for each.
Rule 5: there is one worker per store, whoever starts more.
Rule 6: whatever one file raises is that file's: it is told, remembered, and ends nobody else's turn. Nothing is
        dehydrated that is suspect (``hydrafs.suspect``), or where somebody would see it go (``hydrafs.views``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
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
from hydrafs.child import yield_to_others
from hydrafs.covered import is_covered
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.errors import Changing, StoreGone
from hydrafs.layout import plain_text
from hydrafs.leases import Lease
from hydrafs.limits import raise_open_files
from hydrafs.logs import Style, log_to
from hydrafs.looking import watched
from hydrafs.needs import needs
from hydrafs.policy import Policy
from hydrafs.root_identity import read_mark
from hydrafs.store import PRIVATE, Store
from hydrafs.survey import PlainModel, Survey, survey
from hydrafs.tried import Tried
from hydrafs.turns import Seen, is_another, not_bases_of, passes, some, tending_state, told_of, wanted
from hydrafs.views import uncovered_views
from hydrafs.working import Work

__all__ = ["Worker", "run", "run_order"]

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5
"""How long nobody may have read before the work goes on."""
_POLL_SECONDS = 60.0
_WATCHED_POLL_SECONDS = 3600.0
"""How often to look without having been told of a change; inotify sees nothing of what another machine does."""
_LOCK_SECONDS = 20.0
_GONE_SECONDS = 5.0
"""How often to look whether the store's disk is there again."""
_TELL_SECONDS = 1.0
_MAX_BACKOFF = 10
_REFUSALS = 3
"""How often in a row a file may be in use before that is told."""
_PUT_OFF_SECONDS, _PUT_OFF_SECONDS_MAX = 60.0, 3600.0
_VIEWS_SECONDS = 10.0
_MAX_LOGGED = 10_000
_PRIVATE = frozenset({working.PAUSED, "config.toml"})
"""Of hydrafs' own files: what the worker is told by."""


@dataclass(slots=True)
class Worker:
    """Dehydrates what rests in a store, and keeps the store in order. Thread safety: ``stop`` from any thread, all else
    from one."""

    store: Store
    policy: Policy
    jobs: int = 1
    busy: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    policy_now: Callable[[], Policy] | None = None
    """Asked at every look for the policy, after the store's configuration was read again."""
    _seen: dict[Path, Seen] = field(default_factory=dict)
    _times: dict[Path, int] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Event = field(default_factory=threading.Event)
    _logged: set[tuple[str, str]] = field(default_factory=set)
    _unseen: dict[str, str] = field(default_factory=dict)
    """What could not be looked at, and why, as of the last look."""
    _whole: dict[str, str] = field(default_factory=dict)
    _tended: object = None
    """What the store's folders were like when it was put in order."""
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
            try:
                with working.alone(self.store) as alone:
                    if alone:
                        with contextlib.suppress(OSError):
                            working.pause(self.store, False)
                        self._start()
                        if not self.policy.enabled:
                            return  # another worker, which is to dehydrate, gets the store
                        with watched(self.store.root, self._changed.set, private=_PRIVATE) as tells:
                            self._run(_WATCHED_POLL_SECONDS if tells else _POLL_SECONDS)
            except StoreGone:
                raise
            except Exception as error:  # no locks there, or nothing that can be written
                self._log_once("", f"nothing can be dehydrated: {told_of(error)}", logging.ERROR)
            self._stopped.wait(_LOCK_SECONDS)

    def _run(self, limit: float) -> None:
        while not self._stopped.is_set():
            self.store.check_root()
            self._changed.clear()
            until = 0.0
            if not self._is_paused():
                self._guarded("the store cannot be looked at", self.step)
                until = self._until
            return_memory()
            state = "paused" if self._is_paused() else "idle" if self.policy.enabled else "off"
            now, wall = self.clock(), time.time()
            self._tell(state, model="", stage="", waits_until=wall + until - now if until else 0.0)
            self._changed.wait(min(limit, max(0.05, until - now)) if until else limit)

    def _start(self) -> None:
        for tend in (tending.start, tending.hold_parents):
            self._guarded("the store cannot be put in order", lambda tend=tend: tend(self.store))  # type: ignore[misc]
        if not self.policy.enabled:
            self._tend(None)

    def _guarded(self, what: str, work: Callable[[], object]) -> bool:
        """Do what is no single file's; whether it went well. Nothing that it raises ends the worker."""
        try:
            work()
        except StoreGone:
            raise
        except Exception as error:
            self._log_once("", f"{what}: {told_of(error)}", logging.ERROR)
            log.debug("%s", what, exc_info=True)
            self._tell(self._work.state, last_error=f"{what}: {told_of(error)}")
            return False
        return True

    def _tend(self, state: object) -> None:
        """Let go of what nobody needs any more, where the store has changed since that was done."""
        if state is not None and (state == self._tended or self.busy() or self._stopped.is_set()):
            return

        def still() -> None:
            while self._hindered() and not self._stopped.is_set():
                self._stopped.wait(0.5)
            if self._stopped.is_set():
                raise Changing("the worker ends", where=self.store.root)

        def maintain() -> None:
            with contextlib.suppress(Changing):
                tending.maintain(self.store, still=still, jobs=self.jobs, rehomes=self.policy.enabled)

        if self._guarded("what nobody needs cannot be removed", maintain):
            self._tended = state

    def _is_paused(self) -> bool:
        return working.is_paused(self.store)

    def _tell(self, state: str, **facts: Any) -> None:
        troubles = self._troubles()
        work = msgspec.structs.replace(
            self._work,
            state=state,
            left_whole=len(self._tried) + len(self._whole),
            troubled=len(troubles),
            troubles=some(troubles),
            whole=some(self._whole),
            **facts,
        )
        if work.state != self._work.state or work.model != self._work.model:
            work = msgspec.structs.replace(work, since=time.time())
        if work != self._work:
            self._work = work
            self._told = time.monotonic()
            working.tell(self.store, work)

    def _troubles(self) -> dict[str, str]:
        """Which files are in trouble, and why."""
        refused = {
            self.store.relative(path): f"{seen.why}, {seen.refused} times in a row"
            for path, seen in self._seen.items()
            if seen.refused >= _REFUSALS or seen.seconds
        }
        return {**self._unseen, **self._tried.troubles(), **refused}

    def _log_once(self, name: str, text: str, level: int = logging.WARNING) -> None:
        if (name, text) in self._logged:
            return
        if len(self._logged) >= _MAX_LOGGED:
            self._logged.clear()
        self._logged.add((name, text))
        log.log(level, "%s", f"{self.store.root / name} {text}" if name else text)

    def _settle(self, path: Path) -> float:
        return float(self.policy.settle_seconds * 2 ** min(self._times.get(path, 0), _MAX_BACKOFF))

    # Which

    def _configure(self) -> None:
        """What is pinned and wanted may have been changed by another process."""
        try:
            self.store.reload()
            if self.policy_now is not None:
                self.policy = self.policy_now()
        except Exception as error:
            self._log_once("", f"the configuration stays as it was: {told_of(error)}", logging.ERROR)

    def step(self) -> list[Outcome]:
        """Look at the store, dehydrate what has rested long enough, and let go of what nobody needs; what was done.

        Nothing that a single file or folder raises is raised here.
        """
        done = []
        self._configure()
        seen = self._look()
        now, looked_at, hindered = self.clock(), False, ""
        for model, company in wanted(seen.models, self._tried):
            if self._stopped.is_set() or self._is_paused():
                break
            if now < self._may_be_tried_at(model):
                continue
            if not looked_at:
                hindered = self._seen_elsewhere()
                if hindered:
                    break
            looked_at = True
            outcome = self._one(model, company, not_bases_of(model, seen.models, self._tried))
            if outcome is not None:
                done.append(outcome)
        if looked_at and not self._stopped.is_set():
            seen = self._look()
        if seen.is_complete:
            self._tried.keep({m.name for m in seen.models})
        waiting = [model for model, _ in wanted(seen.models, self._tried) if model.path in self._seen]
        times = [self._may_be_tried_at(model) for model in waiting]
        self._until = max(min(times, default=0.0), self.clock() + _VIEWS_SECONDS if hindered else 0.0)
        self._tell(self._work.state, hindered=hindered)
        if not self._is_paused():
            self._tend(tending_state(self.store, seen))
        return done

    def _look(self) -> Survey:
        """The plain models, the oldest first: a model was made from older ones, and is not taken for what an older one
        was made from."""
        now, wall = self.clock(), time.time_ns()
        unseen: dict[str, str] = {}
        complete = True

        def trouble(name: str, error: Exception) -> None:
            unseen[plain_text(name)] = told_of(error)
            self._log_once(name, f"cannot be looked at: {told_of(error)}")

        try:
            needed = needs(self.store)
            found = survey(self.store, self.policy, needed.__contains__, trouble)
        except Exception as error:
            trouble("", error)
            log.debug("the store cannot be looked at", exc_info=True)
            found, complete = Survey((), {}), False
        self._unseen = unseen
        self._whole = {plain_text(m.name): m.reason for m in found.models if m.reason}
        for model in found.models:
            if model.reason:
                self._log_once(model.name, f"stays whole: {model.reason}", logging.INFO)
            seen = self._seen.get(model.path)
            if seen is None or is_another(seen.identity, model.identity):
                # A file that was there before the first look has rested since it was last written to.
                rested = max(0.0, (wall - max(model.mtime_ns, model.identity.ctime_ns)) / 1e9)
                self._seen[model.path] = Seen(model.identity, now - rested if seen is None else now)
        if complete:
            for path in self._seen.keys() - {model.path for model in found.models}:
                del self._seen[path]
        return dataclasses.replace(found, is_complete=complete and not unseen)

    def _may_be_tried_at(self, model: PlainModel) -> float:
        seen = self._seen[model.path]
        return max(seen.since + self._settle(model.path), seen.until)

    def _seen_elsewhere(self) -> str:
        """Who sees a covered store without the mount that covers it: there the models would go, one by one."""
        if self.policy.other_views != "wait" or not is_covered(self.store.root):
            return ""
        views = uncovered_views(self.store.root)
        if not views:
            return ""
        more = f" (and {len(views) - 1} more)" if len(views) > 1 else ""
        text = f"{views[0]}{more}: nothing is dehydrated until it is started anew, or the configuration says otherwise"
        self._log_once("", f"{text} ([worker] other_views)")
        return text

    # How

    def _one(self, model: PlainModel, company: frozenset[str], not_bases: Sequence[Path]) -> Outcome | None:
        self.store.check_root()
        path, name, seen = model.path, model.name, self._seen[model.path]
        if not self._tried.begin(name, model.identity):
            why = "it cannot be written down that it is tried"
            self._put_off(path, seen, why, name)
            self._tell(self._work.state, last_error=f"{plain_text(name)}: {why}")
            self._tried.end(name)
            return None
        try:
            outcome = self._dehydrate(path, name, not_bases)
        except StoreGone:
            raise
        except Changing as error:
            log.info("%s is left for later: %s", path, error)
            seen.refused, seen.why = seen.refused + 1, told_of(error)
            waits = self._settle(path) * 2 ** min(max(0, seen.refused - _REFUSALS), _MAX_BACKOFF)
            seen.since, seen.until = self.clock(), self.clock() + min(waits, _PUT_OFF_SECONDS_MAX)
            if seen.refused >= _REFUSALS:
                why = f"{plain_text(name)}: {seen.why}, {seen.refused} times in a row"
                self._tell("working", last_error=why)
            outcome = None
        except Exception as error:
            log.debug("%s is not dehydrated", path, exc_info=True)
            if passes(error):
                self._put_off(path, seen, told_of(error), name)
            else:
                self._log_once(name, f"is not dehydrated: {told_of(error)}")
                self._tried.note(name, model.identity, company, told_of(error))
            self._tell("working", last_error=f"{plain_text(name)}: {told_of(error)}")
            outcome = None
        else:
            seen.refused, seen.until, seen.seconds = 0, 0.0, 0.0
            if outcome is not None and outcome.diff is None:
                self._tried.note(name, model.identity, company)
                log.info("%s stays whole: %s", path, "; ".join(outcome.reasons))
                outcome = None
        self._tried.end(name)
        if outcome is None:
            return None
        self._times[path] = self._times.get(path, 0) + 1
        self._seen.pop(path, None)
        saved = outcome.size - outcome.stored_nbytes
        self._tell("working", models=self._work.models + 1, saved_nbytes=self._work.saved_nbytes + saved)
        log.info("%s: %d -> %d bytes", path, outcome.size, outcome.stored_nbytes)
        return outcome

    def _put_off(self, path: Path, seen: Seen, why: str, name: str) -> None:
        """Try again later: what stands in the way is not the model's, and passes."""
        self._log_once(name, f"is left for later: {why}")
        seen.refused, seen.why = seen.refused + 1, why
        seen.seconds = min(2 * seen.seconds or _PUT_OFF_SECONDS, _PUT_OFF_SECONDS_MAX)
        seen.until = self.clock() + seen.seconds

    def _dehydrate(self, path: Path, name: str, not_bases: Sequence[Path]) -> Outcome | None:
        with Lease(path) as lease:

            def still() -> None:
                lease.check()
                while (state := self._hindered()) and not self._stopped.is_set():
                    self._tell(state)
                    self._stopped.wait(0.05 if state == "waiting" else 0.5)
                    lease.check()
                if self._stopped.is_set():
                    raise Changing("the worker ends", where=path)

            def last() -> None:
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
                jobs=self.jobs, still=still, last=last, not_bases=tuple(not_bases), alone=False, all_or_nothing=True
            )  # fmt: skip
            return dehydrate(self.store, path, options, progress=progress)

    def _hindered(self) -> str:
        """What keeps the work from going on now, as a state of ``hydrafs.working``."""
        if self._is_paused():
            return "paused"
        return "waiting" if self.busy() else ""


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
    run(
        Path(root),
        order["given"],
        end=lambda: sys.stdin.buffer.read(1),
        off_limits=off_limits,
        mark=order.get("mark", ""),
    )
    logging.shutdown()
    # Not the interpreter's end: that waits for the lock of stdin, which the thread that reads it has.
    os._exit(0)


def run(
    root: Path,
    given: Mapping[str, Any],
    *,
    end: Callable[[], object] | None = None,
    off_limits: Path | None = None,
    mark: str = "",
) -> None:
    """Work on the store at ``root`` in this process, at the lowest priority. While its disk is not there, wait.

    Args:
        given: fields of ``Policy`` that go before the store's configuration.
        end: called on a thread of its own; when it returns, the work ends.
        off_limits: where the store is mounted: what leads there is no model of the store.
        mark: the store's, where it is known: a folder of another mark is not touched.
    """
    yield_to_others()
    tune_allocator()
    ended = threading.Event()
    at_work: list[Worker] = []
    if end is not None:

        def wait_for_end() -> None:
            end()
            ended.set()
            for worker in at_work:
                worker.stop()

        threading.Thread(target=wait_for_end, name="hydrafs-parent", daemon=True).start()
    known = _Known(mark)
    while not ended.is_set():
        if known.is_at(root):
            try:
                _work_at(root, given, off_limits, at_work, ended, known)
                return
            except StoreGone:  # logged
                pass
        ended.wait(_GONE_SECONDS)


@dataclass(slots=True)
class _Known:
    """Which folder a store is: by its mark, or where it has none by device and inode, once it was opened."""

    mark: str
    numbers: tuple[int, int] | None = None

    def is_at(self, root: Path) -> bool:
        """Whether it is the one at ``root``; any is, while none is known."""
        if self.mark:
            return read_mark(root / PRIVATE) == self.mark
        try:
            stat = os.stat(root)
        except OSError:
            return self.numbers is None  # opening it says why
        return self.numbers in (None, (stat.st_dev, stat.st_ino))


def _work_at(
    root: Path,
    given: Mapping[str, Any],
    off_limits: Path | None,
    at_work: list[Worker],
    ended: threading.Event,
    known: _Known,
) -> None:
    with contextlib.closing(Store(root, create=True)) as store:
        stat = os.fstat(store.identity.folder)
        known.mark, known.numbers = store.identity.mark, (stat.st_dev, stat.st_ino)
        store.off_limits = off_limits
        activity = Activity(store.private / "activity")
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

            def policy() -> Policy:
                found = Policy.of(store, **fields)
                # Without dehydration it tends the store, and wants no model until the configuration is another.
                return found if found.enabled else Policy(enabled=False, include=("/",))

            worker = Worker(store, policy(), busy=lambda: activity.quiet_seconds() < _QUIET_SECONDS, policy_now=policy)
            at_work[:] = [worker]
            if ended.is_set():
                return
            worker.run()
        finally:
            activity.close()
