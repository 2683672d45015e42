"""A daemon that is stopped, frozen or hangs: every command about its mount answers, and the mount can be taken down.

Rule: nothing here may touch the mount itself while its daemon is stopped: the test would hang as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Filled, ModelMaker
from mounts import daemons_of, eventually, hydrafs, is_mounted

from hydrafs import submounts
from hydrafs.child import ask_filesystems
from hydrafs.dehydrate import dehydrate
from hydrafs.errors import MountFailed
from hydrafs.mountpoints import mount_above, our_mounts, resolve, unmount
from hydrafs.needs import census
from hydrafs.service import control
from hydrafs.service.control import ask, daemon_of, socket_name
from hydrafs.store import Store
from hydrafs.walk import Trouble, walk

ENOUGH_SECONDS = 30.0
"""What a command may take here: five seconds on a machine that has nothing else to do, of which three are waiting."""


class Hung:
    """A mount whose daemon is stopped."""

    def __init__(self, filled: Filled, point: Path) -> None:
        self.filled, self.point = filled, point
        filled.dehydrate()
        ran = hydrafs("mount", filled.root, *([point] if point != filled.root else []), "--dehydrate", "off")
        assert ran.returncode == 0, ran.stderr
        (self.pid,) = daemons_of(point) if point != filled.root else [int(hydrafs_json("status", point)["pid"])]
        self.mount = next(mount for mount in our_mounts() if mount.mountpoint == point)
        os.kill(self.pid, signal.SIGSTOP)
        assert eventually(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        if Path(f"/proc/{self.pid}").exists():
            os.kill(self.pid, signal.SIGCONT)
        if is_mounted(self.point):
            unmount(self.point, lazy=True)
        if eventually(lambda: not Path(f"/proc/{self.pid}").exists()):
            return
        os.kill(self.pid, signal.SIGKILL)


def hydrafs_json(*arguments: str | os.PathLike[str]) -> dict[str, object]:
    ran = hydrafs(*arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, object] = json.loads(ran.stdout)
    return answer


@pytest.fixture(params=["elsewhere", "over the store"])
def hung(request: pytest.FixtureRequest, filled: Filled, tmp_path: Path) -> Iterator[Hung]:
    point = tmp_path / "mount"
    point.mkdir()
    made = Hung(filled, point if request.param == "elsewhere" else filled.root)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def hung_elsewhere(filled: Filled, tmp_path: Path) -> Iterator[Hung]:
    point = tmp_path / "mount"
    point.mkdir()
    made = Hung(filled, point)
    try:
        yield made
    finally:
        made.end()


def within(*arguments: str | os.PathLike[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "hydrafs", *map(os.fspath, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
    ) as process:  # fmt: skip
        try:
            out, said = process.communicate(timeout=ENOUGH_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"hydrafs {' '.join(map(str, arguments))} has not answered in {time.monotonic() - began:.0f} s")
    return subprocess.CompletedProcess(arguments, process.returncode, out, said)


@pytest.mark.fuse
def test_every_command_answers(hung: Hung, tmp_path: Path) -> None:
    point, model = hung.point, hung.point / "tuned.safetensors"
    source = tmp_path / "source.safetensors"
    source.write_bytes(hung.filled.data)
    (tmp_path / "link").symlink_to(point)
    (tmp_path / "models").symlink_to(tmp_path / "link")
    commands: list[tuple[str | Path, ...]] = [
        ("status", point), ("status", tmp_path / "models"), ("top", point), ("info", model),
        ("info", tmp_path / "models" / "tuned.safetensors"), ("ls", point), ("control", point, "drop"),
        ("control", point, "prefetch", model), ("warm", model), ("warm", "--lately", point), ("verify", model),
        ("rehydrate", model, "--output", tmp_path / "out"), ("rm", model), ("mount", point, tmp_path / "other"),
        # what a command is to write, or looks at beside its model
        ("merge", source, source, "--alpha", "0.5", "--output", point / "new.safetensors"),
        ("merge", source, source, "--alpha", "0.5", "--virtual", tmp_path / "models" / "new.safetensors"),
        ("merge", source, source, "--add-difference", model, "--alpha", "0.5", "--output", tmp_path / "new"),
        ("unmerge", source, source, "--alpha", "0.5", "--output", point / "new.safetensors"),
        ("convert", source, "--output", point / "new.safetensors"), ("rehydrate", source, "--onto", model),
        ("report", tmp_path / "other", "--output", point / "page.html"), ("dehydrate", source, "--base", model),
        ("dehydrate", source, "--store", point),
        ("hashes", tmp_path / "other", "--webui", point), ("import", source, "--base", source, "--name", model),
        ("export", source, "--seed", "--base", source, "--output", point / "new"), ("undelete", point),
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    ours = f"process {hung.pid} is stopped"
    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(lambda command: within(*command), commands))
    for command, done in zip(commands, answers, strict=True):
        text = done.stdout + done.stderr
        assert done.returncode != 0, (command, text)
        assert len(done.stderr.splitlines()) <= 1, (command, text)
        assert ours in text, (command, text)
        assert f"kill -CONT {hung.pid}" in text, (command, text)
        assert f"umount --lazy {point}" in text, (command, text)
    others = [("doctor", point), ("status",), ("top",)]  # there may be other mounts beside it
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda command: within(*command), others))
    for command, done in zip(others, answers, strict=True):
        assert ours in done.stdout + done.stderr, (command, done.stdout, done.stderr)
    hung.go_on()
    assert eventually(lambda: hydrafs("status", point).returncode == 0)
    assert model.read_bytes() == hung.filled.data


@pytest.mark.fuse
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("as_user", [True, False])
def test_it_is_taken_down(hung_elsewhere: Hung, lazy: bool, as_user: bool) -> None:
    point = hung_elsewhere.point
    if as_user and not lazy:
        pytest.skip("fusermount3 takes down what its user has mounted")
    done = within("umount", *(["--lazy"] if lazy else []), point)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(point)
    hung_elsewhere.go_on()
    assert eventually(lambda: not Path(f"/proc/{hung_elsewhere.pid}").exists())


@pytest.mark.fuse
def test_somebody_waits_for_it(hung_elsewhere: Hung) -> None:
    """A program that is in the midst of a read, and one that has a file open: only --lazy can take it down."""
    point = hung_elsewhere.point
    hung_elsewhere.go_on()
    # In a process of its own: a descriptor that this one held would be closed by each of its children, and they wait.
    code = (
        "import os, sys; fd = os.open(sys.argv[1], 0); print(flush=True); input(); print(len(os.pread(fd, 1 << 24, 0)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, point / "tuned.safetensors"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "\n"
        os.kill(hung_elsewhere.pid, signal.SIGSTOP)
        with subprocess.Popen(["cat", point / "base.safetensors"], stdout=subprocess.DEVNULL) as reader:
            done = within("umount", point)
            assert done.returncode == MountFailed.exit_code
            assert "add --lazy" in done.stderr
            assert within("umount", "--lazy", point).returncode == 0
            assert not is_mounted(point)
            hung_elsewhere.go_on()
            reader.wait(30)
        assert holder.communicate("go on\n", timeout=30)[0] == f"{len(hung_elsewhere.filled.data)}\n"


@pytest.mark.fuse
def test_one_that_hangs_does_not_hide_the_others(hung_elsewhere: Hung, tmp_path: Path, filled: Filled) -> None:
    other = tmp_path / "another"
    other.mkdir()
    assert hydrafs("mount", filled.root, other, "--dehydrate", "off").returncode == 0
    try:
        done = within("status")
        assert done.returncode == 0
        assert f"{other}: {filled.root}, served by" in done.stdout
        assert f"{hung_elsewhere.point}: the daemon does not answer" in done.stdout
        assert within("info", other / "tuned.safetensors").returncode == 0
    finally:
        unmount(other, lazy=True)


@pytest.mark.fuse
def test_stale_ones_are_told_from_those_that_hang(hung_elsewhere: Hung) -> None:
    assert within("umount", "--stale", hung_elsewhere.point).returncode == 0
    assert is_mounted(hung_elsewhere.point)
    os.kill(hung_elsewhere.pid, signal.SIGKILL)
    assert eventually(lambda: ask_filesystems([hung_elsewhere.point], 5.0) != [None])
    assert within("umount", "--stale", hung_elsewhere.point).returncode == 0
    assert not is_mounted(hung_elsewhere.point)


def test_a_path_is_followed_without_asking_what_hangs(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder/sub")
    (tmp_path / "absolute").symlink_to(folder)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "link/..", "absolute/sub/../x", "folder/./sub//", "nothing/at/all", "link/x/../.."):
        assert resolve(tmp_path / name) == Path(os.path.realpath(tmp_path / name))
    assert resolve(tmp_path / "loop") == tmp_path / "loop"
    assert mount_above(tmp_path / "link") is None


@pytest.mark.parametrize("says", ["nothing", "a part", "no JSON", "hangs up", "a byte now and then"])
def test_a_socket_that_gives_no_answer(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.3)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.fspath(tmp_path / socket_name(tmp_path)))
    listening.listen(1)
    ended = threading.Event()

    def serve() -> None:
        client, _ = listening.accept()
        with client:
            if says == "a part":
                client.sendall(b'{"ok":')
            elif says == "no JSON":
                client.sendall(b"what?\n")
            while says == "a byte now and then" and not ended.wait(0.05):
                client.sendall(b" ")
            if says in ("nothing", "a part"):
                ended.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(MountFailed, match=f"the daemon does not answer, {tmp_path}: process {os.getpid()} .*--lazy"):
        ask([tmp_path], tmp_path, "status")
    ended.set()
    thread.join(30)
    assert daemon_of([tmp_path], tmp_path) in (os.getpid(), 0)
    listening.close()


@pytest.fixture(params=["in it", "deep in it", "behind a link", "behind a link to what is in it"])
def around(request: pytest.FixtureRequest, filled: Filled, models: ModelMaker, tmp_path: Path) -> Iterator[Path]:
    """A store with a dehydrated model, in which a mount of another store hangs."""
    root = tmp_path / "around"
    place = root / ("a/b" if request.param == "deep in it" else "")
    place.mkdir(parents=True)
    base = models.save(root / "base.safetensors", models.base("bf16"))
    tuned = models.save(root / "tuned.safetensors", models.tuned("bf16"))
    with contextlib.closing(Store(root, create=True)) as store:
        dehydrate(store, tuned, filled.options)
    point = place / "m" if request.param.endswith("in it") and "link" not in request.param else tmp_path / "outside"
    point.mkdir()
    if request.param == "behind a link":
        (root / "link").symlink_to("../outside")
    if request.param == "behind a link to what is in it":
        (root / "0way").symlink_to(tmp_path)
        (root / "tuned2.safetensors").symlink_to("0way/outside/tuned.safetensors")
    assert base.exists()
    made = Hung(filled, point)
    try:
        yield root
    finally:
        made.end()


@pytest.mark.fuse
def test_a_folder_that_a_mount_of_another_store_stands_in(around: Path, tmp_path: Path) -> None:
    """It is no part of the folder, and no doubt either: it shows what is stored elsewhere."""
    mentioned = models_of(around)
    (around / ".hydrafs" / "retired").mkdir(exist_ok=True)
    commands: list[tuple[str | Path, ...]] = [
        ("ls", around), ("verify", around), ("gc", "--dry-run", around), ("bases", around), ("doctor", around),
        ("report", around, "--output", tmp_path / "page.html"), ("hashes", around), ("undelete", around),
        ("info", around / "tuned.safetensors"), ("rehydrate", around / "tuned.safetensors", "--output", tmp_path / "o"),
    ]  # fmt: skip
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda command: within(*command), commands))
    for command, done in zip(commands, answers, strict=True):
        if command[0] != "doctor":  # it tells of a mount that hangs
            assert (done.returncode, done.stderr) == (0, ""), (command, done.stdout, done.stderr)
    assert mentioned <= set(answers[0].stdout.split())
    with contextlib.closing(Store(around)) as store:
        assert census(store).is_complete


def models_of(root: Path) -> set[str]:
    assert (root / "tuned.safetensors.hydra").exists()
    return {"base.safetensors", "tuned.safetensors"}


@pytest.mark.fuse
def test_a_worker_of_a_folder_that_a_mount_of_another_store_stands_in(around: Path) -> None:
    code = (
        "import faulthandler, sys; from pathlib import Path; from hydrafs.looking import watched\n"
        "from hydrafs.policy import Policy; from hydrafs.store import Store; from hydrafs.worker import Worker\n"
        "faulthandler.dump_traceback_later(20)\n"
        "store = Store(sys.argv[1], create=True)\n"
        "with watched(Path(sys.argv[1]), lambda: None): Worker(store, Policy.of(store)).step()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, around], stderr=subprocess.PIPE, text=True) as worker:
        try:
            said = worker.communicate(timeout=ENOUGH_SECONDS)[1]
        except subprocess.TimeoutExpired:
            worker.kill()
            pytest.fail(f"the worker hangs: {worker.communicate()[1]}")
    assert worker.returncode == 0, said


@pytest.mark.fuse
def test_another_filesystem_that_does_not_answer(around: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not hydrafs' may hold models of the store: while it does not answer, nobody knows what is needed."""
    monkeypatch.setattr(submounts, "OURS", "fuse.another")
    troubles: list[Trouble] = []
    listed = {entry.name for folder in walk(around, report=troubles.append) for entry in folder.files}
    assert {"base.safetensors", "tuned.safetensors.hydra"} <= listed
    assert len(troubles) == 1
    assert "does not answer" in troubles[0].reason
    with contextlib.closing(Store(around)) as store:
        assert not census(store).is_complete


@pytest.mark.fuse
def test_a_store_that_is_covered_by_its_own_mount_is_doubt(filled: Filled) -> None:
    made = Hung(filled, filled.root)
    try:
        troubles: list[Trouble] = []
        assert not [e for f in walk(filled.root.parent, report=troubles.append) for e in f.files]
        assert [t.path for t in troubles] == [filled.root]
        below = f"/proc/{made.pid}/fd"
        descriptor = next(f"{below}/{n}" for n in os.listdir(below) if _is_folder_of(f"{below}/{n}", filled.root))
        code = (
            "import sys; from hydrafs.covered import cover; from hydrafs.walk import walk\n"
            "cover(*sys.argv[1:]); troubles = []\n"
            "print(*sorted(e.name for f in walk(sys.argv[1], report=troubles.append) for e in f.files))\n"
            "assert not troubles, troubles\n"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, descriptor, filled.root],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert {"base.safetensors", "tuned.safetensors.hydra"} <= set(ran.stdout.split())
    finally:
        made.end()


def _is_folder_of(descriptor: str, root: Path) -> bool:
    return os.readlink(descriptor) == os.fspath(root)
