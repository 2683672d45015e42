"""Dehydration in the background: what rests becomes a diff, a write in the middle wins, and nobody notices."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker
from test_keeping import read_model

from hydrafs import keeping, leases, worker
from hydrafs.activity import Activity
from hydrafs.errors import Changing, UsageError
from hydrafs.helper import Helper
from hydrafs.leases import Lease, is_open_for_writing
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.tried import Tried
from hydrafs.worker import Worker
from hydrafs.working import Work, pause, told

SECONDS = 60.0


class Scene:
    """A store with a base and a fine-tune in it, both plain, and a worker whose clock is turned by hand."""

    def __init__(self, root: Path, models: ModelMaker, **policy: object) -> None:
        self.root = root
        self.base = models.save(root / "base.safetensors", models.base("fp16"))
        self.tuned = models.save(root / "tuned.safetensors", models.tuned("fp16"))
        self.data = self.tuned.read_bytes()
        self.store = Store(root, create=True)
        self.now = 0.0
        settings = {"settle_seconds": 60.0, "min_nbytes": 1000, **policy}
        self.worker = Worker(self.store, Policy(**settings), clock=lambda: self.now)  # type: ignore[arg-type]
        self.diff = root / "tuned.safetensors.hydra"
        self.store.pin(["base.safetensors"])

    def rest(self, seconds: float = 61.0) -> list[str]:
        """Time goes by; what the worker has made diffs of."""
        done = self.worker.step()
        self.now += seconds
        return [outcome.model.name for outcome in (*done, *self.worker.step())]


@pytest.fixture
def scene(models: ModelMaker, store: Path) -> Iterator[Scene]:
    found = Scene(store, models)
    yield found
    found.store.close()


def eventually(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


class TestWhich:
    def test_what_has_rested(self, scene: Scene) -> None:
        assert scene.rest(59) == []
        assert scene.rest(2) == ["tuned.safetensors"]
        assert not scene.tuned.exists()
        assert read_model(scene.store, scene.tuned) == scene.data
        assert scene.base.exists()

    def test_what_had_rested_before_the_worker_came(self, scene: Scene) -> None:
        os.utime(scene.tuned, ns=(0, 0))
        assert scene.worker.step() == []  # its ctime is of now

    def test_a_write_starts_the_time_anew(self, scene: Scene) -> None:
        scene.worker.step()
        scene.now += 50
        scene.tuned.write_bytes(scene.data)
        scene.worker.step()
        scene.now += 50
        assert scene.worker.step() == []
        scene.now += 11
        assert len(scene.worker.step()) == 1

    def test_pinned_small_excluded_and_hidden_diffs_stay_whole(self, scene: Scene) -> None:
        scene.worker.policy = Policy(min_nbytes=len(scene.data) + 1)
        assert scene.rest() == []
        scene.worker.policy = Policy(min_nbytes=1, exclude=("tuned.*",))
        assert scene.rest() == []
        scene.worker.policy = Policy(min_nbytes=1, include=("sub/*",))
        assert scene.rest() == []
        scene.worker.policy = Policy(min_nbytes=1)
        assert scene.rest() == ["tuned.safetensors"]
        scene.tuned.write_bytes(scene.data)  # as hydrafs rehydrate leaves it
        assert scene.rest(10_000) == []

    def test_a_model_that_resembles_none_is_asked_once(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        scene.tuned.unlink()
        noise = scene.root / "noise.safetensors"
        noise.write_bytes(os.urandom(200_000))
        asked = []
        original = worker.dehydrate
        monkeypatch.setattr(worker, "dehydrate", lambda *a, **k: asked.append(a[1].name) or original(*a, **k))  # type: ignore[func-returns-value]
        for _ in range(4):
            scene.rest()
        assert asked == ["noise.safetensors"]
        (scene.root / "newer.safetensors").write_bytes(os.urandom(200_000))
        scene.rest()
        assert asked.count("noise.safetensors") == 1, "nothing is made from what comes after it"
        (scene.root / "older.safetensors").write_bytes(os.urandom(200_000))
        os.utime(scene.root / "older.safetensors", ns=(0, 0))
        scene.rest()
        assert asked.count("noise.safetensors") == 2, "an older model may be what it was made from"

    def test_what_was_left_whole_is_not_tried_at_the_next_start(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene.tuned.unlink()
        noise = scene.root / "noise.safetensors"
        noise.write_bytes(os.urandom(200_000))
        scene.rest()
        assert len(Tried(scene.store)) == 1
        asked = []
        original = worker.dehydrate
        monkeypatch.setattr(worker, "dehydrate", lambda *a, **k: asked.append(a[1].name) or original(*a, **k))  # type: ignore[func-returns-value]
        again = Worker(scene.store, scene.worker.policy, clock=lambda: scene.now)
        again.step()
        scene.now += 10_000
        again.step()
        assert not asked
        noise.write_bytes(os.urandom(200_001))
        again.step()
        scene.now += 61
        again.step()
        assert asked == ["noise.safetensors"]
        noise.unlink()
        again.step()
        assert len(Tried(scene.store)) == 0
        (scene.store.private / "left-whole.json").write_text("{")
        assert len(Tried(scene.store)) == 0

    def test_what_others_were_made_from_stays_whole(self, scene: Scene) -> None:
        """Without a pin: the base rests long before a fine-tune of it lands."""
        scene.store.pin([], unpin=["base.safetensors"])
        other = scene.root / "other.safetensors"
        other.write_bytes(scene.data[:-4] + b"\0\0\0\0")
        for age, path in enumerate([other, scene.tuned, scene.base], 1):
            os.utime(path, ns=(0, 10**18 - age * 10**9))
        scene.tuned.rename(scene.root / "away")
        assert scene.rest() == ["other.safetensors"]
        (scene.root / "away").rename(scene.tuned)
        assert scene.rest() == ["tuned.safetensors"]
        assert scene.rest(10_000) == []
        assert scene.base.exists()

    def test_a_pin_by_another_process(self, scene: Scene) -> None:
        scene.worker.step()
        with contextlib.closing(Store(scene.root)) as theirs:
            theirs.pin(["tuned.safetensors"])
        assert scene.rest() == []
        with contextlib.closing(Store(scene.root)) as theirs:
            theirs.pin([], unpin=["tuned.safetensors"])
        assert scene.rest() == ["tuned.safetensors"]

    def test_what_is_copied_up_again_is_left_alone_longer(self, scene: Scene) -> None:
        for number in range(3):
            assert scene.rest(60 * 2**number + 1) == ["tuned.safetensors"]
            scene.tuned.write_bytes(scene.data)
            keeping.remove_diff(scene.store, scene.tuned)
        assert scene.rest(60 * 4) == []

    def test_the_configuration(self, scene: Scene) -> None:
        config = scene.store.private / "config.toml"
        config.write_text('[worker]\nsettle = 5\nexclude = ["*.pt"]\ndehydrate = "off"\n')
        policy = Policy.of(scene.store, min_nbytes=7, exclude=None)
        assert policy == Policy(enabled=False, settle_seconds=5.0, min_nbytes=7, exclude=("*.pt",))
        for wrong in ("settle = true", 'dehydrate = "maybe"', "include = 3", 'min_size = "x"'):
            config.write_text(f"[worker]\n{wrong}\n")
            with pytest.raises(UsageError):
                Policy.of(scene.store)


class TestLeases:
    def test_a_file_that_is_open_for_writing(self, scene: Scene) -> None:
        with scene.tuned.open("r+b"):
            with pytest.raises(Changing):
                Lease(scene.tuned)
            assert scene.rest() == []
        assert scene.tuned.exists()
        scene.now += 61
        assert len(scene.worker.step()) == 1

    def test_without_leases(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        original = fcntl.fcntl

        def refused(fd: int, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETLEASE:
                raise OSError(22, "Invalid argument")
            return original(fd, command, argument)

        monkeypatch.setattr(leases.fcntl, "fcntl", refused)
        monkeypatch.setattr(leases, "_LOOK_SECONDS", 0.0)
        with Lease(scene.tuned) as lease:
            assert not lease.is_kernels
            lease.check()
            with scene.tuned.open("rb") as reader:
                assert not is_open_for_writing(reader.fileno())
                lease.check()
            with scene.tuned.open("r+b") as writer:
                assert is_open_for_writing(writer.fileno())
                with pytest.raises(Changing):
                    lease.check()
        with scene.tuned.open("r+b"), pytest.raises(Changing):
            Lease(scene.tuned)

    def test_who_opens_for_writing_waits_for_an_instant(self, scene: Scene) -> None:
        with Lease(scene.tuned) as lease:
            begun = time.monotonic()
            with scene.tuned.open("r+b"):
                assert time.monotonic() - begun < 5
            with pytest.raises(Changing):
                lease.check()


class TestWritesWin:
    @pytest.mark.parametrize("stage", ["hash", "encode", "prove", "last"])
    def test_in_the_middle(self, scene: Scene, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        """Somebody opens the model for writing at each stage."""
        opened: list[object] = []
        original = worker.dehydrate

        def write() -> None:
            if not opened:
                opened.append(scene.tuned)
                # From another process, as a WebUI would: it waits in open(2) until the lease is given back.
                code = "import sys,time; f=open(sys.argv[1],'r+b'); f.seek(-9,2); f.write(b'newer'); f.close()"
                opened.append(subprocess.Popen([sys.executable, "-c", code, scene.tuned]))
                time.sleep(0.7)

        def interrupted(store: Store, path: Path, options: object, progress: object) -> object:
            import hydrafs.dehydrate as room

            if stage == "last":
                remove = room.may_go
                monkeypatch.setattr(room, "may_go", lambda *a: (write(), remove(*a))[1])
                return original(store, path, options)  # type: ignore[arg-type]
            return original(store, path, options, progress=lambda s, n, t: write() if s == stage else None)  # type: ignore[arg-type]

        monkeypatch.setattr(worker, "dehydrate", interrupted)
        assert scene.rest() == []
        assert opened
        opened[1].wait()  # type: ignore[attr-defined]
        changed = scene.data[:-9] + b"newer" + scene.data[-4:]
        assert scene.tuned.read_bytes() == changed
        assert not scene.diff.exists()
        assert not list(scene.root.glob(".hydrafs-tmp-*"))
        monkeypatch.undo()
        assert scene.rest() == ["tuned.safetensors"], "the worker starts over"
        assert read_model(scene.store, scene.tuned) == changed

    def test_a_file_that_is_removed_in_the_middle(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        original = worker.dehydrate

        def interrupted(store: Store, path: Path, options: object, progress: object) -> object:
            def remove(stage: str, nbytes: int, total: int) -> None:
                if stage == "prove":
                    scene.tuned.unlink(missing_ok=True)

            return original(store, path, options, progress=remove)  # type: ignore[arg-type]

        monkeypatch.setattr(worker, "dehydrate", interrupted)
        assert scene.rest() == []
        assert not scene.diff.exists()


class TestReadersGoFirst:
    def test_it_waits_while_somebody_reads(self, scene: Scene) -> None:
        reading = threading.Event()
        reading.set()
        scene.worker.busy = reading.is_set
        scene.worker.step()
        scene.now += 61
        thread = threading.Thread(target=scene.worker.step)
        thread.start()
        time.sleep(0.5)
        assert not scene.diff.exists()
        reading.clear()
        thread.join(SECONDS)
        assert scene.diff.exists()

    def test_activity_is_seen_by_others(self, tmp_path: Path) -> None:
        mine, theirs = Activity(tmp_path / "activity"), Activity(tmp_path / "activity")
        assert mine.quiet_seconds() == float("inf")
        theirs.touch()
        assert mine.quiet_seconds() < 5
        mine.close()
        theirs.close()
        assert Activity(tmp_path / "no" / "such").quiet_seconds() == float("inf")


class TestAsAProcess:
    def test_a_helper_works_and_ends(self, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
        helper = Helper(scene.root, {"settle_seconds": 0.2, "min_nbytes": 1000})
        helper.start()
        try:
            assert eventually(lambda: not scene.tuned.exists())
            (scene.root / "sub").mkdir()
            late = scene.root / "sub" / "late.safetensors"
            late.write_bytes(scene.data)
            assert eventually(lambda: not late.exists())
        finally:
            begun = time.monotonic()
            helper.stop()
        assert time.monotonic() - begun < 10
        for path in (scene.tuned, late):
            assert hashlib.sha256(read_model(scene.store, path)).digest() == hashlib.sha256(scene.data).digest()
        assert scene.base.exists()
        assert capfd.readouterr().err == "", "nothing to warn of"

    def test_it_tells_what_it_does_and_pauses(self, scene: Scene) -> None:
        assert told(scene.store) == Work()
        helper = Helper(scene.root, {"settle_seconds": 0.2, "min_nbytes": 1000})
        helper.start()
        try:
            assert eventually(lambda: not scene.tuned.exists())
            assert eventually(lambda: told(scene.store).state == "idle")
            work = told(scene.store)
            assert helper._process is not None
            assert (work.models, work.pid) == (1, helper._process.pid)
            assert work.saved_nbytes == len(scene.data) - scene.diff.stat().st_size
            pause(scene.store, True)
            assert eventually(lambda: told(scene.store).state == "paused")
            late = scene.root / "late.safetensors"
            late.write_bytes(scene.data)
            time.sleep(1.5)
            assert late.exists()
            assert told(scene.store).state == "paused"
            pause(scene.store, False)
            assert eventually(lambda: not late.exists())
            assert eventually(lambda: told(scene.store).models == 2)
        finally:
            helper.stop()
        assert told(scene.store).state == "none"
        pause(scene.store, True)
        helper.start()
        try:
            assert eventually(lambda: told(scene.store).state == "idle"), "a start goes on"
        finally:
            helper.stop()

    def test_it_sleeps_while_nothing_happens(self, scene: Scene) -> None:
        helper = Helper(scene.root, {"settle_seconds": 0.2, "min_nbytes": 1000})
        helper.start()
        try:
            assert eventually(lambda: told(scene.store).models == 1)
            assert eventually(lambda: told(scene.store).state == "idle")
            assert helper._process is not None
            tasks = Path(f"/proc/{helper._process.pid}/task")

            def wakeups() -> int:
                return sum(
                    int(line.split()[1])
                    for status in tasks.glob("*/status")
                    for line in status.read_text().splitlines()
                    if line.startswith("voluntary_ctxt_switches")
                )

            time.sleep(1.0)
            before = wakeups()
            time.sleep(4.0)
            assert wakeups() - before <= 2
        finally:
            helper.stop()

    def test_it_is_killed_at_any_time(self, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("CRITICAL")  # that it died may be told before it is stopped, or not
        for number in range(6):
            helper = Helper(scene.root, {"settle_seconds": 0.0, "min_nbytes": 1000})
            helper.start()
            time.sleep(0.5 + 0.15 * number)
            assert helper._process is not None
            helper._process.kill()
            helper.stop()
            assert read_model(scene.store, scene.tuned) == scene.data
            assert [m.name for m in scene.store.models()] == ["base.safetensors", "tuned.safetensors"]
            if not scene.tuned.exists():
                scene.tuned.write_bytes(scene.data)
                keeping.remove_diff(scene.store, scene.tuned)

    @pytest.mark.logs("the worker ended with code -9")
    def test_one_that_dies_is_started_again(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hydrafs.helper._RESTART_SECONDS", 0.2)
        scene.tuned.unlink()
        helper = Helper(scene.root, {"settle_seconds": 0.1, "min_nbytes": 1000})
        helper.start()
        try:
            # Before it has said anything it is known to be there, and not as which process.
            assert eventually(lambda: told(scene.store).pid > 1)
            assert helper._process is not None
            first = helper._process.pid
            assert told(scene.store).pid == first
            helper._process.kill()
            assert eventually(lambda: told(scene.store).pid not in (0, first))
            scene.tuned.write_bytes(scene.data)
            assert eventually(lambda: not scene.tuned.exists())
        finally:
            helper.stop()
        assert eventually(lambda: told(scene.store).state == "none")

    def test_the_command_and_a_second_one(self, scene: Scene) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "hydrafs", "watch", scene.root, "--settle", "0.2", "--min-size", "1k"]
        both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            assert eventually(lambda: not scene.tuned.exists())
            # The lock of one that was killed is none.
            lock = os.open(scene.store.private / "worker.lock", os.O_RDWR)
            with contextlib.closing(os.fdopen(lock)), pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            both[0].kill()
            both[0].wait()
            other = scene.root / "other.safetensors"
            other.write_bytes(scene.data)
            assert eventually(lambda: not other.exists())
        finally:
            for process in both:
                process.terminate()
            told = [process.communicate(timeout=SECONDS)[1] for process in both]
        assert both[1].returncode == 0
        assert "Traceback" not in "".join(told)
        assert read_model(scene.store, other) == scene.data

    def test_off_tends_and_dehydrates_nothing(self, scene: Scene) -> None:
        left = scene.root / ".hydrafs-tmp-0"
        left.write_bytes(b"half")
        helper = Helper(scene.root, {"settle_seconds": 0.0, "min_nbytes": 1000, "enabled": False})
        helper.start()
        try:
            assert eventually(lambda: not left.exists())
            assert helper._process is not None
            assert helper._process.wait(SECONDS) == 0, "another worker may have the store"
            assert scene.tuned.exists()
            helper.start_again()
            assert helper._process is not None
            assert helper._process.wait(SECONDS) == 0
        finally:
            helper.stop()


def test_two_that_dehydrate_the_same_model(scene: Scene) -> None:
    """Two commands on one store: one of them wins, and nothing is lost."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(3):
        command = [sys.executable, "-m", "hydrafs", "dehydrate", scene.tuned]
        both = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in "ab"
        ]
        for process in both:
            process.communicate(timeout=SECONDS)
        assert read_model(scene.store, scene.tuned) == scene.data
        assert not list(scene.root.rglob(".hydrafs-tmp-*"))
        scene.tuned.write_bytes(scene.data)
        keeping.remove_diff(scene.store, scene.tuned)
