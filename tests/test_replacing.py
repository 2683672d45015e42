"""A plain file in the place of a diff, and a diff in that of its original, when the process is killed in between."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from test_keeping import read_model

from hydrafs import journal, tending
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import AlreadyThere, Changing, HydraError
from hydrafs.restore import rehydrate
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile

SECONDS = 60.0

_WORKER = """
import contextlib, os, signal, sys
from pathlib import Path
from typing import Any
from hydrafs import replacing
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile
from hydrafs.worker import Worker

owner, name = (replacing.Original, "go") if sys.argv[2] == "before" else (replacing, "_is_unchanged")
call = getattr(owner, name)

def stop(*args):
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return call(*args)

setattr(owner, name, stop)
with contextlib.closing(Store(Path(sys.argv[1]))) as store:
    Worker(store, Policy(settle_seconds=0, min_nbytes=1)).step()
"""


class Scene:
    """A store with a pinned base and a fine-tune in it, both plain."""

    def __init__(self, root: Path, models: ModelMaker) -> None:
        self.root = root
        self.base = models.save(root / "base.safetensors", models.base("fp16"))
        self.tuned = models.save(root / "tuned.safetensors", models.tuned("fp16"))
        self.data = self.tuned.read_bytes()
        self.diff = root / "tuned.safetensors.hydra"
        self.store = Store(root, create=True)
        self.store.pin(["base.safetensors"])

    def names(self) -> list[str]:
        """Every file of the store; hydrafs' own folder left out."""
        return sorted(p.name for p in self.root.iterdir() if p.name != ".hydrafs")

    def journals(self) -> list[Path]:
        return list(self.store.private.glob("journal-*"))

    @contextlib.contextmanager
    def stopped_worker(self, where: str) -> Iterator[subprocess.Popen[str]]:
        """A worker that has committed the diff and stands still before or after the original has left its name."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _WORKER, os.fspath(self.root), where]
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "stopped\n"
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
            yield worker
        finally:
            worker.kill()
            worker.communicate(timeout=SECONDS)

    def original(self) -> Path:
        """Where the file is that the worker was to remove."""
        return next(self.root.glob(".hydrafs-aside-*"), self.tuned)


@pytest.fixture
def scene(models: ModelMaker, store: Path) -> Iterator[Scene]:
    found = Scene(store, models)
    yield found
    found.store.close()


class Writer:
    """Opens a file for writing on a thread of its own, and waits for it as any program does that meets a lease."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self._thread = threading.Thread(target=self._open, args=(path,))
        self._thread.start()

    def _open(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY)

    @property
    def waits(self) -> bool:
        self._thread.join(0.3)
        return self._thread.is_alive()

    def write(self, data: bytes) -> None:
        self._thread.join(SECONDS)
        os.pwrite(self.fd, data, 9)

    def close(self) -> None:
        os.close(self.fd)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("still_open", [True, False])
def test_a_worker_is_killed_while_a_writer_waits_for_its_lease(scene: Scene, where: str, still_open: bool) -> None:
    """The writer's open(2) goes on at that instant, on the file that the worker was about to remove."""
    with scene.stopped_worker(where) as worker:
        assert (scene.original() == scene.tuned) == (where == "before")
        writer = Writer(scene.original())
        assert writer.waits
        worker.send_signal(signal.SIGKILL)
        worker.wait(SECONDS)
    expected = scene.data[:9] + b"newer" + scene.data[14:]
    if not still_open:
        writer.write(b"newer")
        writer.close()
    tending.start(scene.store)
    if still_open:  # the start comes before the writer has written anything
        writer.write(b"newer")
        writer.close()
    assert scene.names() == ["base.safetensors", "tuned.safetensors"]
    assert scene.tuned.read_bytes() == expected
    assert not scene.journals()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_worker_is_killed_and_nobody_writes(scene: Scene, where: str) -> None:
    with scene.stopped_worker(where):
        assert scene.diff.exists()
    assert read_model(scene.store, scene.tuned) == scene.data
    tending.start(scene.store)
    # An original that never left its name keeps it; one that did was proved, and goes.
    assert scene.names() == ["base.safetensors", scene.tuned.name if where == "before" else scene.diff.name]
    assert read_model(scene.store, scene.tuned) == scene.data
    assert not scene.journals()


def test_a_newer_file_has_the_name(scene: Scene) -> None:
    """Neither the killed worker's diff nor the original that it put aside takes the name from it."""
    with scene.stopped_worker("after"):
        pass
    scene.tuned.write_bytes(b"newer")
    tending.start(scene.store)
    assert scene.tuned.read_bytes() == b"newer"
    assert not list(scene.root.glob(".hydrafs-*-*"))


def test_a_worker_is_killed_while_it_brings_a_model_back(scene: Scene) -> None:
    with scene.stopped_worker("after"):
        pass
    os.link(scene.original(), scene.tuned)
    tending.start(scene.store)
    assert scene.names() == ["base.safetensors", "tuned.safetensors"]
    assert scene.tuned.read_bytes() == scene.data
    assert scene.tuned.stat().st_nlink == 1


def test_the_last_copy_of_a_model_comes_back(scene: Scene) -> None:
    with scene.stopped_worker("after"):
        pass
    scene.diff.unlink()
    tending.start(scene.store)
    # Without its diff nobody can tell whether it was removed or lost: the original is the last copy.
    assert scene.names() == ["base.safetensors", "tuned.safetensors"]
    assert scene.tuned.read_bytes() == scene.data


def test_a_diff_that_was_made_on_purpose_stays(scene: Scene) -> None:
    """``dehydrate --keep`` and ``rehydrate`` leave a file and its diff, which no start takes for what a kill left."""
    options = Options(jobs=1, bases=(scene.base,), keep=True)
    dehydrate(scene.store, scene.tuned, options)
    both = [scene.base.name, scene.tuned.name, scene.diff.name]
    tending.start(scene.store)
    assert scene.names() == both
    scene.tuned.unlink()
    rehydrate(scene.store, scene.store.locate(scene.tuned))
    tending.start(scene.store)
    assert scene.names() == both


def test_a_killed_dehydration_gives_back_the_diff_that_was_there(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an equal diff that a user made on purpose; what stays is what was there before."""
    options = Options(jobs=1, bases=(scene.base,), keep=True)
    dehydrate(scene.store, scene.tuned, options)

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> bool:
        assert scene.journals()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("hydrafs.replacing._is_unchanged", killed)
        dehydrate(scene.store, scene.tuned, Options(jobs=1, bases=(scene.base,)))
    tending.start(scene.store)
    assert scene.names() == [scene.base.name, scene.tuned.name, scene.diff.name]


def test_all_or_nothing(scene: Scene) -> None:
    """Where the original cannot go, the worker leaves no diff behind it."""
    with scene.tuned.open("rb") as reader:
        import fcntl

        fcntl.flock(reader, fcntl.LOCK_SH)  # as who writes through a mount, or stores a model against it
        with pytest.raises(Changing):
            dehydrate(scene.store, scene.tuned, Options(jobs=1, bases=(scene.base,), all_or_nothing=True))
        assert scene.names() == ["base.safetensors", "tuned.safetensors"]
        outcome = dehydrate(scene.store, scene.tuned, Options(jobs=1, bases=(scene.base,)))
        assert (outcome.diff, outcome.original_removed) == (scene.diff, False)
    assert not scene.journals()


def test_a_pin_of_another_process_is_seen(scene: Scene, store: Path) -> None:
    with contextlib.closing(Store(store)) as other:
        other.pin(["tuned.safetensors"])
    assert scene.store.is_pinned(scene.tuned)
    assert scene.store.pins_in(scene.root / "tuned.safetensors") == ["tuned.safetensors"]


class TestTheFolderCannotBeSynced:
    """The last call of a dehydration fails, when the original is gone already, or the diff has its name already."""

    @pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EPERM])
    @pytest.mark.parametrize("options", [Options(), Options(all_or_nothing=True)], ids=["by hand", "all or nothing"])
    def test_after_the_original_went(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch, options: Options, number: int
    ) -> None:
        monkeypatch.setattr("hydrafs.replacing.fsync_folder", _fails(number))
        assert dehydrate(scene.store, scene.tuned, options).original_removed
        assert read_model(scene.store, "tuned.safetensors") == scene.data

    @pytest.mark.parametrize("options", [Options(), Options(all_or_nothing=True)], ids=["by hand", "all or nothing"])
    def test_after_the_diff_has_its_name(self, scene: Scene, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
        def fails_in_the_store(folder: Path) -> None:
            if folder == scene.root:
                _fails(errno.EIO)(folder)

        monkeypatch.setattr("hydrafs.temporary.fsync_folder", fails_in_the_store)
        with pytest.raises(HydraError, match="Input/output error"):
            dehydrate(scene.store, scene.tuned, options)
        assert scene.tuned.read_bytes() == scene.data
        assert not scene.diff.exists()

    @pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
    def test_the_original_cannot_be_brought_back(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """Neither its name nor the diff's goes for nothing."""

        def changed(*args: object) -> bool:
            monkeypatch.setattr("hydrafs.replacing.os.link", _fails(number))
            monkeypatch.setattr("hydrafs.replacing.Path.rename", _fails(number))
            return False

        monkeypatch.setattr("hydrafs.replacing._is_unchanged", changed)
        with pytest.raises(HydraError):
            dehydrate(scene.store, scene.tuned, Options(all_or_nothing=True))
        monkeypatch.undo()
        tending.start(scene.store)
        assert read_model(scene.store, "tuned.safetensors") == scene.data


def _fails(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ELOOP, errno.ESTALE, errno.ENOMEM])
def test_what_cannot_be_looked_at_is_not_ended(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that cannot tell where a diff stands leaves the journal to the next one."""
    dehydrate(scene.store, scene.tuned, Options(keep=True))
    marks = {**journal.marks("diff", scene.diff.stat()), **journal.marks("plain", scene.tuned.stat())}
    entry = journal.write(scene.store, "file-over-diff", {"name": scene.tuned}, marks)
    look = os.lstat

    def lstat(path: str | Path) -> os.stat_result:
        if os.fspath(path) == os.fspath(scene.diff):
            _fails(number)()
        return look(path)

    monkeypatch.setattr("hydrafs.journal.os.lstat", lstat)
    tending.start(scene.store)
    assert entry.path.exists()
    monkeypatch.undo()
    tending.start(scene.store)
    assert not entry.path.exists()
    assert scene.names() == ["base.safetensors", "tuned.safetensors"]


def test_a_link_of_which_the_answer_got_lost(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        _fails(errno.EIO)()

    monkeypatch.setattr("hydrafs.temporary.os.link", late)
    with TemporaryFile(scene.root) as temporary:
        temporary.file.write(b"content")
        temporary.commit(scene.root / "new.bin")
        with TemporaryFile(scene.root) as other, pytest.raises(AlreadyThere):
            other.commit(scene.root / "new.bin")
    monkeypatch.undo()
    assert (scene.root / "new.bin").read_bytes() == b"content"
    assert scene.names() == ["base.safetensors", "new.bin", "tuned.safetensors"]
