"""One file's trouble is one file's: whatever it does to the worker, the others are dehydrated, and it is told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from test_keeping import read_model
from test_worker import Scene, eventually

from hydrafs import keeping, leases, survey, worker
from hydrafs.errors import Changing, CorruptDiff, HydraError, NoSpace, ParentLoop, from_oserror
from hydrafs.helper import Helper
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.tried import MAX_DEATHS, Tried
from hydrafs.worker import Worker
from hydrafs.working import pause, told

SECONDS = 60.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
RAISED = [
    MemoryError("planned"), ValueError("planned"), OverflowError("planned"), RecursionError("planned"), KeyError("x"),
    UnicodeEncodeError("utf-8", "\udcff", 0, 1, "planned"), RuntimeError("a bug"), AssertionError("a bug"),
    StopIteration(), ZeroDivisionError(), OSError(errno.EIO, "planned"), PermissionError(errno.EACCES, "planned"),
    OSError(errno.ESTALE, "planned"), OSError(errno.ELOOP, "planned"), OSError(errno.ENAMETOOLONG, "planned"),
    OSError("of no number"), HydraError("planned"), CorruptDiff("planned"), ParentLoop("planned"),
    from_oserror(OSError(errno.EIO, "planned"), "cannot read"),
]  # fmt: skip
PASSING = [
    OSError(errno.ENOSPC, "planned"), OSError(errno.EDQUOT, "planned"), OSError(errno.EMFILE, "planned"),
    NoSpace("planned"), from_oserror(OSError(errno.EDQUOT, "planned"), "cannot write the diff"),
]  # fmt: skip


def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers at other places: a model that resembles the first by nothing."""
    return {name: t.flatten().roll(t.numel() // 3 + 1).reshape(t.shape) for name, t in tensors.items()}


class Many(Scene):
    """A scene with another base and a fine-tune of that, ``zz``, which comes after the first."""

    def __init__(self, root: Path, models: ModelMaker, **policy: object) -> None:
        super().__init__(root, models, **policy)
        self.other = root / "zz.safetensors"
        models.save(root / "base2.safetensors", turned(models.base("fp16")))
        models.save(self.other, turned(models.tuned("fp16")))
        self.store.pin(["base2.safetensors"])
        os.utime(self.base, (1, 1))
        os.utime(root / "base2.safetensors", (2, 2))
        os.utime(self.tuned, (1000, 1000))
        os.utime(self.other, (2000, 2000))

    def troubles(self) -> dict[str, str]:
        return dict(self.worker._work.troubles)


@pytest.fixture
def scene(models: ModelMaker, store: Path) -> Iterator[Many]:
    found = Many(store, models)
    yield found
    found.store.close()


@pytest.fixture
def small(models: ModelMaker, store: Path) -> Iterator[Many]:
    """The same on a filesystem that takes times of any year."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", store], check=True)
    try:
        found = Many(store, models)
        yield found
        found.store.close()
    finally:
        subprocess.run(["umount", "-l", store], check=False)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> list[str]:
    """The dehydration of the model of this name raises; which were tried."""
    asked: list[str] = []
    original = worker.dehydrate

    def planned(store: Store, path: Path, options: object, progress: object = None) -> object:
        asked.append(path.name)
        if path.name == name:
            raise error
        return original(store, path, options, progress=progress)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "dehydrate", planned)
    return asked


class TestWhatIsRaised:
    @pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__ + str(getattr(e, "errno", "")))
    def test_is_one_models(
        self, scene: Many, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        asked = failing(monkeypatch, "tuned.safetensors", error)
        assert scene.rest() == ["zz.safetensors"]
        assert scene.rest(100_000) == []
        assert asked.count("tuned.safetensors") == 1, "remembered as tried"
        assert list(scene.troubles()) == ["tuned.safetensors"]
        assert "tuned.safetensors" in scene.worker._work.last_error
        lines = [r for r in caplog.records if "tuned.safetensors is not dehydrated" in r.getMessage()]
        assert len([r for r in lines if r.levelname == "WARNING"]) == 1, "logged once, with its name"
        again = Worker(scene.store, scene.worker.policy, clock=lambda: scene.now)
        again.step()
        scene.now += 10_000
        again.step()
        assert asked.count("tuned.safetensors") == 1, "by the next start too"
        assert "tuned.safetensors" in dict(again._work.troubles) or Tried(scene.store).troubles()
        monkeypatch.undo()
        scene.tuned.write_bytes(scene.data)
        assert scene.rest() == ["tuned.safetensors"], "it is another file now"
        assert not scene.worker._tried.troubles()

    @pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__ + str(getattr(e, "errno", "")))
    def test_what_passes_is_waited_for(
        self, scene: Many, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        asked = failing(monkeypatch, "tuned.safetensors", error)
        assert scene.rest() == ["zz.safetensors"]
        scene.worker.step()
        assert asked.count("tuned.safetensors") == 1, "not at once"
        for _ in range(4):
            scene.now += 4000
            scene.worker.step()
        assert asked.count("tuned.safetensors") == 5
        assert "times in a row" in scene.troubles()["tuned.safetensors"]
        assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
        monkeypatch.undo()
        scene.now += 4000
        assert [o.model.name for o in scene.worker.step()] == ["tuned.safetensors"]
        scene.worker._tell("idle")
        assert not scene.troubles()

    @pytest.mark.logs("zz.safetensors cannot be looked at")
    @pytest.mark.parametrize("what", ["lstat", "readlink"])
    @pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), ValueError("x"), MemoryError(), RuntimeError("a bug")])
    def test_the_look_at_a_file(
        self, scene: Many, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
    ) -> None:
        if what == "readlink":
            scene.other.unlink()
            scene.other.symlink_to("base.safetensors")
        original = getattr(os, what)

        def planned(path: object, *arguments: object, **options: object) -> object:
            if isinstance(path, str | Path) and os.fspath(path) == os.fspath(scene.other):
                raise error
            return original(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(survey.os, what, planned)
            assert scene.rest() == ["tuned.safetensors"]
            assert "zz.safetensors" in scene.troubles()
        if what == "lstat":
            assert scene.rest() == ["zz.safetensors"]

    @pytest.mark.logs("planned")
    @pytest.mark.parametrize("where", ["needs", "survey", "uncovered_views"])
    def test_a_bug_in_the_look_at_all(self, scene: Many, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        """Nothing is forgotten by it, and the next look may go well."""
        monkeypatch.setattr(worker, "is_covered", lambda path: True)
        scene.worker.policy = Policy(settle_seconds=0, min_nbytes=1000)
        with monkeypatch.context() as patch:

            def planned(*arguments: object) -> object:
                raise RuntimeError("planned")

            patch.setattr(worker, where, planned)
            stop = threading.Timer(1.0, scene.worker.stop)
            stop.start()
            scene.worker._run(0.1)
            stop.join()
        scene.worker._stopped.clear()
        monkeypatch.setattr(worker, "uncovered_views", lambda root: [])
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]

    def test_links_that_loop_and_what_is_no_file(self, scene: Many) -> None:
        (scene.root / "loop").symlink_to("loop")
        (scene.root / "nowhere.safetensors").symlink_to("/no/such/file")
        for number in range(45):
            (scene.root / f"link{number}").symlink_to(f"link{number + 1}")
        os.mkfifo(scene.root / "pipe.safetensors")
        (scene.root / "folder.safetensors").mkdir()
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]

    def test_nothing_can_be_written_down(self, scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
        caught = []
        monkeypatch.setattr(Tried, "_write", lambda self: False)
        monkeypatch.setattr(worker, "dehydrate", lambda *a, **k: caught.append(a))
        monkeypatch.setattr(worker.log, "log", lambda *a: None)
        assert scene.rest() == []
        assert not caught, "what is not written down first could be met first for ever"
        monkeypatch.undo()
        scene.now += 4000
        assert [o.model.name for o in scene.worker.step()] == ["tuned.safetensors", "zz.safetensors"]


class TestNames:
    @pytest.mark.parametrize("length", [250, 252, 255])
    def test_without_room_for_the_ending(self, scene: Many, length: int) -> None:
        ending = ".safetensors"
        long = scene.root / ("n" * (length - len(ending)) + ending)
        scene.tuned.rename(long)
        assert scene.rest() == ["zz.safetensors"]
        assert long.exists()
        assert dict(scene.worker._work.whole) == {long.name: "its name has no room for the ending .hydra"}

    def test_that_are_no_text(self, scene: Many) -> None:
        noise = scene.root / os.fsdecode(b"noise\xff\xfe.ckpt")
        noise.write_bytes(os.urandom(200_000))
        odd = scene.tuned.rename(scene.root / os.fsdecode(b"t\xe4st.safetensors"))
        assert sorted(scene.rest()) == sorted([odd.name, "zz.safetensors"])
        assert read_model(scene.store, odd) == scene.data
        assert len(Tried(scene.store)) == 1
        assert Tried(scene.store).is_settled(noise.name, scene.worker._seen[noise].identity, frozenset())
        assert told(scene.store).models in (0, 2)


class TestTimes:
    @pytest.mark.parametrize("seconds", [0, -1, -(10**10), 1 << 33, 1 << 40, (1 << 62) // 10**9 * 10**9, 253402300800])
    def test_of_any_year(self, small: Many, seconds: int, caplog: pytest.LogCaptureFixture) -> None:
        os.utime(small.tuned, ns=(seconds * 10**9, seconds * 10**9))
        stat = os.stat(small.tuned)
        done = small.rest()
        assert "zz.safetensors" in done
        if "tuned.safetensors" not in done:
            assert os.stat(small.tuned).st_mtime_ns == stat.st_mtime_ns
            assert "tuned.safetensors" in small.troubles()
        os.utime(small.base, ns=(seconds * 10**9, seconds * 10**9))
        (small.root / "later.safetensors").write_bytes(small.data[:-2] + b"xx")
        small.rest()
        assert not [r for r in caplog.records if r.levelname == "ERROR"]


class TestFull:
    @pytest.mark.logs("is left for later")
    def test_a_full_disk_is_waited_out(self, small: Many) -> None:
        fill = small.root / "fill"
        with contextlib.suppress(OSError), fill.open("wb", 0) as file:
            while True:
                file.write(bytes(1 << 16))
        with contextlib.suppress(OSError), (small.root / "fill2").open("wb", 0) as file:
            while True:
                file.write(b"x")
        assert small.rest() == []
        assert set(small.troubles()) == {"tuned.safetensors", "zz.safetensors"}
        fill.unlink()
        (small.root / "fill2").unlink()
        small.now += 4000
        assert [o.model.name for o in small.worker.step()] == ["tuned.safetensors", "zz.safetensors"]
        assert not list(small.store.private.glob(".hydrafs-tmp-*"))

    @pytest.mark.logs("nothing can be dehydrated")
    def test_a_store_that_cannot_be_written(self, small: Many) -> None:
        """Neither its lock, nor what was tried: it looks again, and ends nothing."""
        small.store.close()
        subprocess.run(["mount", "-o", "remount,ro", small.root], check=True)
        try:
            with contextlib.closing(Store(small.root)) as opened:
                made = Worker(opened, Policy(settle_seconds=0, min_nbytes=1))
                stop = threading.Timer(1.0, made.stop)
                stop.start()
                made.run()
                stop.join()
        finally:
            subprocess.run(["mount", "-o", "remount,rw", small.root], check=True)
        with contextlib.closing(Store(small.root)) as opened:
            assert len(Worker(opened, Policy(settle_seconds=0, min_nbytes=1)).step()) == 2


class TestInUse:
    def test_three_times_in_a_row_is_told(self, scene: Many) -> None:
        with scene.tuned.open("r+b"):
            for number in range(4):
                scene.rest(70 * 2**number)
                if number == 0:
                    assert not scene.troubles()
            scene.worker._tell("idle")
            assert "open for writing" in scene.troubles()["tuned.safetensors"]
            assert "times in a row" in scene.troubles()["tuned.safetensors"]
        scene.now += 10_000
        assert [o.model.name for o in scene.worker.step()] == ["tuned.safetensors"]
        scene.worker._tell("idle")
        assert not scene.troubles()

    def test_a_filesystem_that_says_so_of_all(self, scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leases are refused with EAGAIN though nobody writes: as NFS and SMB do. It is dehydrated, or it is told."""
        original = fcntl.fcntl

        def refused(fd: int, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETLEASE and argument == fcntl.F_RDLCK:
                raise OSError(errno.EAGAIN, "planned")
            return original(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refused)
        done = [name for number in range(4) for name in scene.rest(100 * 2**number)]
        scene.worker._tell("idle")
        assert {*done, *scene.troubles()} == {"tuned.safetensors", "zz.safetensors"}

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES, errno.EAGAIN])
    def test_a_filesystem_without_leases(self, scene: Many, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """They are refused, with EAGAIN where other machines write too; the processes tell that nobody writes."""
        original = fcntl.fcntl

        def refused(fd: int, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETLEASE and argument == fcntl.F_RDLCK:
                raise OSError(number, os.strerror(number))
            return original(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refused)
        if number == errno.EAGAIN:
            monkeypatch.setattr(leases, "is_local", lambda fd: False)
        done = [name for _ in range(3) for name in scene.rest(70)]
        assert sorted(done) == ["tuned.safetensors", "zz.safetensors"]

    @pytest.mark.parametrize("hindrance", ["a reader", "a pause"])
    def test_nobody_waits_for_the_lock_while_the_worker_waits(
        self, scene: Many, monkeypatch: pytest.MonkeyPatch, hindrance: str
    ) -> None:
        """A reader begins, or the work is paused, in the instant in which the original goes."""
        import hydrafs.dehydrate as room

        reading, may_go = threading.Event(), room.may_go

        def begin(*arguments: object) -> bool:
            if hindrance == "a reader":
                reading.set()
            else:
                pause(scene.store, True)
            return may_go(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(room, "may_go", begin)
        scene.worker.busy = reading.is_set
        scene.worker.step()
        scene.now += 70
        thread = threading.Thread(target=scene.worker.step)
        thread.start()
        try:
            assert eventually(lambda: not (scene.tuned.exists() and scene.other.exists()))
            with scene.store.lock(SECONDS):
                assert read_model(scene.store, scene.tuned) == scene.data
        finally:
            reading.clear()
            pause(scene.store, False)
            scene.worker.stop()
            thread.join()


class TestFresh:
    def test_a_folder_that_is_no_store_yet(self, scene: Many, tmp_path: Path) -> None:
        """A worker acts on what it is given."""
        root = tmp_path / "fresh"
        root.mkdir()
        for path in (scene.base, scene.tuned):
            os.link(path, root / path.name)
            path.unlink()
        store = Store(root)
        done = Worker(store, Policy(settle_seconds=0, min_nbytes=1)).step()
        assert [o.model.name for o in done] == ["tuned.safetensors"]
        assert store.private.is_dir()


KILLING = """
import os, resource, signal, sys
from hydrafs import worker
original = worker.dehydrate
def dehydrate(store, path, *arguments, **options):
    if path.name == {name!r}:
        {how}
    return original(store, path, *arguments, **options)
worker.dehydrate = dehydrate
"""
DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "aborted": "os.abort()",
    "no such memory": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.SIGSEGV)",
    "ended": "os._exit(3)",
}


class TestDeath:
    def start(self, scene: Many, code: str) -> int:
        """A worker as a process that dies over one model, or has nothing left to do; its exit code."""
        program = (
            f"{code}\nfrom hydrafs.policy import Policy\nfrom hydrafs.store import Store\n"
            "w = worker.Worker(Store(sys.argv[1]), Policy(settle_seconds=0, min_nbytes=1))\nw.step()\n"
        )
        return subprocess.run([sys.executable, "-c", program, scene.root], env=ENVIRONMENT, check=False).returncode

    @pytest.mark.parametrize("how", DEATHS)
    def test_it_is_not_met_first_for_ever(self, scene: Many, how: str) -> None:
        code = KILLING.format(name="tuned.safetensors", how=DEATHS[how])
        codes = [self.start(scene, code) for _ in range(MAX_DEATHS)]
        assert all(codes), codes
        assert not scene.other.exists(), "the others had their turn after the first death"
        assert self.start(scene, code) == 0, "it is left alone"
        assert scene.tuned.read_bytes() == scene.data
        assert Tried(scene.store).troubles() == {"tuned.safetensors": f"the worker died {MAX_DEATHS} times at it"}
        again = Worker(scene.store, Policy(settle_seconds=0, min_nbytes=1))
        assert again.step() == []
        again._tell("idle")
        assert "died" in dict(again._work.troubles)["tuned.safetensors"]
        scene.tuned.write_bytes(scene.data[:-2] + b"xx")
        assert [o.model.name for o in again.step()] == ["tuned.safetensors"], "it is another file now"

    def test_one_that_kills_whoever_looks_at_it_as_a_base(self, scene: Many) -> None:
        """It is blamed on others at first; once its own turn came it is nobody's base, and they get theirs."""
        scene.store.pin([], unpin=["base.safetensors"])
        poison = scene.root / "poison.safetensors"
        poison.write_bytes(scene.base.read_bytes()[:-2] + b"xx")
        os.utime(poison, (500, 500))
        code = """
import os, sys
from hydrafs import worker, bases
original = bases.facts_of_file
def facts(store, path, source=None):
    if path.name == "poison.safetensors":
        os._exit(3)
    return original(store, path, source)
bases.facts_of_file = facts
dehydrate = worker.dehydrate
def planned(store, path, *a, **k):
    if path.name == "poison.safetensors":
        os._exit(3)
    return dehydrate(store, path, *a, **k)
worker.dehydrate = planned
"""
        for _ in range(12):
            if self.start(scene, code) == 0:
                break
        assert not scene.other.exists()
        assert not scene.tuned.exists()
        assert poison.exists()

    def test_a_stop_is_no_death(self, scene: Many) -> None:
        scene.worker.step()
        scene.now += 61
        scene.worker.busy = lambda: True
        thread = threading.Thread(target=scene.worker.step, daemon=True)
        thread.start()
        assert eventually(lambda: told(scene.store) is not None and (scene.store.private / "left-whole.json").exists())
        scene.worker.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
        for path in (scene.tuned, scene.other):
            assert Tried(scene.store).deaths(path.name, scene.worker._seen[path].identity) == 0

    @pytest.mark.logs("the worker ended with code", "the worker cannot be started")
    def test_a_helper_that_cannot_start_it_tries_again(self, scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hydrafs.helper._RESTART_SECONDS", 0.2)
        from hydrafs import child, helper

        original, failures = child.start, [OSError(errno.EAGAIN, "planned"), OSError(errno.ENOMEM, "planned")]

        def planned(*arguments: object, **options: object) -> object:
            if failures:
                raise failures.pop()
            return original(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(helper.child, "start", planned)
        made = Helper(scene.root, {"settle_seconds": 0.0, "min_nbytes": 1000})
        made.start()
        try:
            assert eventually(lambda: told(scene.store).pid > 1)
            os.kill(told(scene.store).pid, signal.SIGKILL)
            assert eventually(lambda: not scene.other.exists())
        finally:
            made.stop()


class TestLeftWhole:
    """What a diff could not be, and what nobody asked for."""

    PLACES = (".Trash-1000/files", ".stversions", ".git/annex/objects/aa/bb", ".snapshots/1/snapshot", "lost+found",
              "@eaDir", "#recycle", ".cache/huggingface/download", "env/lib/python3.11/site-packages/x")  # fmt: skip

    def test_where_people_and_programs_clean_up(self, scene: Many) -> None:
        for place in self.PLACES:
            (scene.root / place).mkdir(parents=True)
            (scene.root / place / "x.safetensors").write_bytes(scene.data)
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]
        assert {name.rpartition("/")[0] for name, _ in scene.worker._work.whole} == set(self.PLACES)
        scene.worker.policy = Policy(min_nbytes=1, settle_seconds=0, include=(".Trash-1000/*", "*.safetensors"))
        assert scene.rest() == ["x.safetensors"]
        assert (scene.root / ".Trash-1000/files/x.safetensors.hydra").exists()

    def test_a_base_there_is_none(self, scene: Many) -> None:
        (scene.root / ".Trash-1000").mkdir()
        hidden = scene.base.rename(scene.root / ".Trash-1000" / "base.safetensors")
        scene.other.unlink()
        assert scene.rest() == []
        assert hidden.exists()
        hidden.rename(scene.base)
        assert scene.rest() == ["tuned.safetensors"], "it may be what it was made from, now that it is out"

    def test_a_download(self, scene: Many) -> None:
        (scene.root / "tuned.safetensors.aria2").write_text("")
        os.truncate(scene.other, len(scene.data) * 6 // 10)
        assert scene.rest() == []
        (scene.root / "tuned.safetensors.aria2").unlink()
        assert scene.rest() == ["tuned.safetensors"]
        assert scene.other.exists()

    def test_a_base_that_is_being_downloaded(self, scene: Many) -> None:
        beside = scene.root / "base.safetensors.part"
        beside.write_text("")
        scene.other.unlink()
        assert scene.rest() == []
        beside.unlink()
        assert scene.rest() == ["tuned.safetensors"], "it is tried again when the base is all there"

    def test_a_base_on_another_filesystem(self, scene: Many) -> None:
        stick = scene.root / "stick"
        stick.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", stick], check=True)
        try:
            base = stick / "base.safetensors"
            base.write_bytes(scene.base.read_bytes())
            os.utime(base, (1, 1))
            scene.base.unlink()
            scene.other.unlink()
            assert scene.rest() == []
        finally:
            subprocess.run(["umount", "-l", stick], check=True)
        assert scene.tuned.read_bytes() == scene.data

    @pytest.mark.parametrize("kind", ["mounted", "bound", "linked to"])
    def test_a_model_on_another_filesystem(self, scene: Many, tmp_path: Path, kind: str) -> None:
        stick = scene.root / "stick"
        disk = tmp_path / "disk"
        disk.mkdir()
        if kind == "linked to":
            stick.symlink_to(disk)
        else:
            stick.mkdir()
        target = disk if kind == "linked to" else stick
        how = ["--bind", disk] if kind == "bound" else ["-t", "tmpfs", "none"]
        subprocess.run(["mount", *how, target], check=True)
        try:
            model = stick / "tuned.safetensors"
            model.write_bytes(scene.data)
            scene.tuned.unlink()
            assert scene.rest() == ["zz.safetensors"]
            assert model.read_bytes() == scene.data
            whole = dict(scene.worker._work.whole)
            assert "another filesystem" in whole["stick/tuned.safetensors"]
            asked = Worker(
                scene.store,
                Policy(settle_seconds=0, min_nbytes=1, include=("stick/*",)),
                clock=lambda: scene.now + 10_000,
            )
            asked.step()
            stored = model.with_name("tuned.safetensors.hydra").exists()
            assert stored == (kind != "linked to"), "asked for by its folder; a link keeps it whole all the same"
        finally:
            subprocess.run(["umount", "-l", target], check=True)

    @pytest.mark.parametrize("kind", ["to it", "to its folder", "over another link", "out and back", "of another name"])
    def test_a_link_by_way_of_outside(self, scene: Many, kind: str, tmp_path: Path) -> None:
        (scene.root / "sub").mkdir()
        model = scene.tuned.rename(scene.root / "sub" / "tuned.safetensors")
        links = {
            "to it": [("alias.safetensors", model)],
            "to its folder": [("zz", scene.root / "sub")],
            "over another link": [("a.safetensors", "b.safetensors"), ("b.safetensors", model)],
            "out and back": [("alias.safetensors", f"../{scene.root.name}/sub/tuned.safetensors")],
            "of another name": [("current", model)],
        }
        for name, target in links[kind]:
            (scene.root / name).symlink_to(target)
        assert scene.rest() == ["zz.safetensors"]
        assert model.exists()
        assert [name for name, why in scene.worker._work.whole if "link" in why] == ["sub/tuned.safetensors"]
        for name, _ in links[kind]:
            (scene.root / name).unlink()
        assert scene.rest() == ["tuned.safetensors"]

    def test_a_link_within_keeps_nothing(self, scene: Many) -> None:
        (scene.root / "sub").mkdir()
        (scene.root / "sub" / "alias.safetensors").symlink_to("../tuned.safetensors")
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]

    def test_links_into_the_mount_over_the_store_itself(self, scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
        (scene.root / "alias.safetensors").symlink_to(scene.tuned)
        scene.store.off_limits = scene.root  # the worker of such a mount reaches the store by another way
        monkeypatch.setattr(scene.store, "is_off_limits", os.path.islink)
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]

    def test_a_hard_link_elsewhere(self, scene: Many, tmp_path: Path) -> None:
        os.link(scene.tuned, tmp_path / "keep.safetensors")
        assert scene.rest() == ["zz.safetensors"]
        assert "hard link elsewhere" in dict(scene.worker._work.whole)["tuned.safetensors"]
        (tmp_path / "keep.safetensors").unlink()
        assert scene.rest() == ["tuned.safetensors"]

    def test_two_names_in_the_store(self, scene: Many) -> None:
        scene.other.unlink()
        os.link(scene.tuned, scene.other)
        assert scene.rest() == []
        assert len(scene.worker._work.whole) == 2
        scene.other.unlink()
        assert scene.rest() == ["tuned.safetensors"]

    def test_a_link_that_hydrafs_made_is_none(self, scene: Many) -> None:
        assert scene.rest() == ["tuned.safetensors", "zz.safetensors"]
        assert scene.base.stat().st_nlink > 1
        scene.store.pin([], unpin=["base.safetensors"])
        scene.rest()
        assert not scene.worker._work.whole


class TestSpace:
    def test_it_comes_back_by_itself(self, scene: Many) -> None:
        assert len(scene.rest()) == 2
        for path in (scene.base, scene.tuned, scene.other):
            keeping.remove_model(scene.store, path)
        scene.worker.step()
        left = [p for folder in (scene.store.held, scene.store.retired) for p in folder.glob("*")]
        assert not left

    def test_not_while_somebody_reads(self, scene: Many) -> None:
        assert len(scene.rest()) == 2
        scene.worker.busy = lambda: True
        for path in (scene.tuned, scene.other):
            keeping.remove_model(scene.store, path)
        scene.worker.step()
        assert list(scene.store.held.iterdir())
        scene.worker.busy = lambda: False
        scene.worker.step()
        assert not list(scene.store.held.iterdir())

    def test_nothing_is_done_where_nothing_changed(self, scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
        scene.rest()
        scene.worker.step()
        calls: list[object] = []
        monkeypatch.setattr(worker.tending, "collect", lambda *a, **k: calls.append(a))
        for _ in range(3):
            scene.worker.step()
        assert not calls


def test_changing_is_no_trouble(scene: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, "tuned.safetensors", Changing("planned"))
    assert scene.rest() == ["zz.safetensors"]
    assert not scene.worker._tried.troubles()
    monkeypatch.undo()
    assert asked
    assert scene.rest() == ["tuned.safetensors"]
