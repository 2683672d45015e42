"""A store whose disk goes away, or is another one: errors, and never an empty folder that takes writes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled, ModelMaker
from mounts import BELIEVED_SECONDS, eventually, hydrafs

from hydrafs import root_identity
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import HydraError, StoreGone
from hydrafs.mountpoints import our_mounts, unmount
from hydrafs.root_identity import MARK, make_mark, read_mark
from hydrafs.store import Store
from hydrafs.vfs import StoreTree
from hydrafs.worker import run
from hydrafs.writing import WritableTree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts filesystems")


class Disk:
    """A filesystem of its own at a folder: ``out`` takes it away, ``back`` brings the same one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder.parent / "kept disk"
        folder.mkdir()
        self.kept.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", self.kept], check=True)
        self.back()

    def back(self) -> None:
        subprocess.run(["mount", "--bind", self.kept, self.folder], check=True)

    def out(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)

    def another(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", self.folder], check=True)

    def end(self) -> None:
        for folder in (self.folder, self.folder, self.kept):
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def on_disk(disk: Disk, models: ModelMaker) -> Filled:
    base = models.save(disk.folder / "base.safetensors", models.base("fp16"))
    tuned = models.save(disk.folder / "tuned.safetensors", models.tuned("fp16"))
    made = Filled(disk.folder, base, tuned, tuned.read_bytes())
    made.dehydrate()
    return made


def number_of(call: object, *arguments: object) -> int | None:
    try:
        call(*arguments)  # type: ignore[operator]
    except OSError as error:
        return error.errno
    except HydraError as error:
        return error.errno
    return None


def all_calls(point: Path) -> dict[str, int | None]:
    return {
        "list": number_of(os.listdir, point),
        "look up": number_of(os.stat, point / "base.safetensors"),
        "open": number_of(os.open, point / "tuned.safetensors", os.O_RDONLY),
        "create": number_of(os.open, point / "new.txt", os.O_WRONLY | os.O_CREAT, 0o644),
        "make a folder": number_of(os.mkdir, point / "folder"),
        "link": number_of(os.symlink, "x", point / "link"),
        "delete": number_of(os.unlink, point / "base.safetensors"),
        "rename": number_of(os.rename, point / "base.safetensors", point / "moved.safetensors"),
        "space": number_of(os.statvfs, point),
    }


@pytest.mark.fuse
@pytest.mark.parametrize("instead", ["nothing", "another disk", "another store"])
def test_a_mount_whose_disk_is_gone_answers_with_errors(
    on_disk: Filled, disk: Disk, tmp_path: Path, instead: str
) -> None:
    point = tmp_path / "mount"
    point.mkdir()
    ran = hydrafs("mount", on_disk.root, point, "--dehydrate", "off")
    assert ran.returncode == 0, ran.stderr
    try:
        assert (point / "tuned.safetensors").read_bytes() == on_disk.data
        kept_open = (point / "tuned.safetensors").open("rb")
        disk.out()
        if instead != "nothing":
            disk.another()
        if instead == "another store":
            Store(disk.folder, create=True).close()
            shutil.copy(disk.kept / "base.safetensors", disk.folder)
        before = sorted(os.listdir(disk.folder))
        time.sleep(BELIEVED_SECONDS)
        found = all_calls(point)
        assert found == dict.fromkeys(found, errno.EIO)
        assert sorted(os.listdir(disk.folder)) == before
        if instead != "another store":
            assert before == []
        kept_open.seek(0)
        assert kept_open.read() == on_disk.data  # as the kernel has it: an open file stays open
        kept_open.close()
        said = hydrafs("status", point)
        assert said.returncode == 0
        assert "is not there" in said.stdout
        assert said.stdout.count("every access is answered with an error") == 1
        if instead != "nothing":
            subprocess.run(["umount", "-l", disk.folder], check=True)
        disk.back()
        time.sleep(BELIEVED_SECONDS)
        assert (point / "tuned.safetensors").read_bytes() == on_disk.data
        (point / "new.txt").write_text("it takes writes again")
        assert (disk.kept / "new.txt").exists()
        assert "store     " not in hydrafs("status", point).stdout
    finally:
        unmount(point, lazy=True)
    assert not any(mount.mountpoint == point for mount in our_mounts())


@pytest.mark.logs("the store .* is not there")
def test_the_same_mark_on_another_device_is_the_store(on_disk: Filled, disk: Disk, tmp_path: Path) -> None:
    """A stick that is plugged in again has another device; a share that is mounted again, too."""
    tree = WritableTree(on_disk.root, 1 << 20)
    tree.start()
    try:
        disk.out()
        disk.another()
        with pytest.raises(StoreGone):
            tree.readdir("/")
        subprocess.run(["cp", "-a", f"{disk.kept}/.", f"{disk.folder}/"], check=True)
        assert {entry.name for entry in tree.readdir("/")} == {"base.safetensors", "tuned.safetensors"}
        tree.open("/tuned.safetensors", os.O_RDONLY).close()
        tree.unlink("/tuned.safetensors")
        assert not (disk.folder / "tuned.safetensors.hydra").exists()
        assert (disk.kept / "tuned.safetensors.hydra").exists()
    finally:
        tree.stop()


@pytest.mark.parametrize("how", ["replaced", "removed", "a file", "a link"])
@pytest.mark.logs("the store .* is not there")
def test_a_folder_that_is_another_now(filled: Filled, how: str) -> None:
    filled.dehydrate()
    tree = WritableTree(filled.root, 1 << 20)
    tree.start()
    try:
        away = filled.root.with_name("away")
        filled.root.rename(away)
        if how == "replaced":
            filled.root.mkdir()
        elif how == "a file":
            filled.root.touch()
        elif how == "a link":
            (filled.root.with_name("elsewhere")).mkdir()
            filled.root.symlink_to("elsewhere")
        for call in (
            lambda: tree.readdir("/"),
            lambda: tree.getattr("/base.safetensors"),
            lambda: tree.create("/x", os.O_WRONLY, 0o644),
            lambda: tree.statfs("/"),
            lambda: tree.unlink("/base.safetensors"),
        ):
            assert number_of(call) == errno.EIO
        with pytest.raises(StoreGone), tree.store.lock():
            pytest.fail("it is another store's")
        if how == "replaced":
            assert os.listdir(filled.root) == []
        if filled.root.is_symlink() or filled.root.is_file():
            filled.root.unlink()
        elif how == "replaced":
            filled.root.rmdir()
        away.rename(filled.root)
        assert len(tree.readdir("/")) == 2
    finally:
        tree.stop()


@pytest.mark.parametrize("writes", [True, False])
def test_a_store_gets_its_mark_when_it_is_acted_on(filled: Filled, writes: bool) -> None:
    if writes:
        Store(filled.root, create=True).close()
        mark = read_mark(filled.root / ".hydrafs")
        assert len(mark) == 32
        Store(filled.root, create=True).close()
        assert read_mark(filled.root / ".hydrafs") == mark
        assert json.loads((filled.root / ".hydrafs" / MARK).read_bytes())["id"] == mark
    else:
        Store(filled.root).close()
        assert not (filled.root / ".hydrafs").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 7}', b"\xff" * 10000, b"[" * 4000])
def test_a_mark_that_says_nothing_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MARK).write_bytes(content)
    assert read_mark(tmp_path) == ""
    assert len(make_mark(tmp_path)) == 32


def test_without_room_for_a_mark_the_folder_is_known_all_the_same(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_identity, "make_mark", lambda private: "")
    store = Store(filled.root, create=True)
    store.check_root()
    filled.root.rename(filled.root.with_name("away"))
    filled.root.mkdir()
    logged = store.identity
    with pytest.raises(StoreGone):
        logged.trouble = "another folder stands there"  # as logged before
        store.check_root()
    filled.root.rmdir()
    filled.root.with_name("away").rename(filled.root)
    logged.trouble = ""
    store.check_root()
    store.close()


def test_a_worker_writes_into_no_other_folder(on_disk: Filled, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    given = {"settle_seconds": 0.0, "min_nbytes": 1000}
    thread = threading.Thread(target=run, args=(disk.folder, given), kwargs={"end": ended.wait})
    thread.start()
    try:
        assert eventually((disk.folder / ".hydrafs" / "worker.json").exists)
        disk.out()
        disk.another()
        shutil.copy(disk.kept / "base.safetensors", disk.folder)
        time.sleep(1.0)
        assert os.listdir(disk.folder) == ["base.safetensors"]
    finally:
        ended.set()
        thread.join(30)
    assert not thread.is_alive()
    assert os.listdir(disk.folder) == ["base.safetensors"]


def test_a_command_under_way_writes_into_no_other_folder(
    on_disk: Filled, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk.folder / "again.safetensors").write_bytes(on_disk.data)
    store = Store(disk.folder, create=True)
    went = threading.Event()

    def still() -> None:
        if not went.is_set():
            went.set()
            disk.out()
            disk.another()

    with pytest.raises((HydraError, OSError)):
        dehydrate(store, disk.folder / "again.safetensors", Options(bases=(on_disk.base,), still=still))
    store.close()
    assert went.is_set()
    assert os.listdir(disk.folder) == []
    assert (disk.kept / "again.safetensors").read_bytes() == on_disk.data


def test_a_read_only_tree_too(on_disk: Filled, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    tree = StoreTree(on_disk.root, 1 << 20)
    tree.start()
    disk.out()
    for _ in range(5):
        assert number_of(tree.readdir, "/") == errno.EIO
    tree.stop()
    assert len([record for record in caplog.records if "is not there" in record.getMessage()]) == 1


class TestBeforeItIsThere:
    """A folder that is empty since its disk is not mounted yet: at boot, and by hand."""

    def refused(self, *arguments: str | os.PathLike[str], state: Path) -> str:
        ran = hydrafs(*arguments, XDG_STATE_HOME=os.fspath(state))
        assert ran.returncode == StoreGone.exit_code, (ran.returncode, ran.stderr)
        return ran.stderr

    @pytest.fixture
    def point(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "mount"
        folder.mkdir()
        yield folder
        while any(mount.mountpoint == folder for mount in our_mounts()):
            unmount(folder, lazy=True)

    def test_a_service_refuses_an_empty_folder(self, tmp_path: Path, point: Path) -> None:
        empty = tmp_path / "empty"
        (empty / "lost+found").mkdir(parents=True)
        (empty / "this disk is not mounted").touch()
        for command in (("mount", empty, point, "--existing"), ("watch", empty, "--existing")):
            said = self.refused(*command, state=tmp_path / "state")
            assert "a store is expected here" in said
            assert "mount its disk first" in said
            assert sorted(os.listdir(empty)) == ["lost+found", "this disk is not mounted"]

    @pytest.mark.fuse
    @pytest.mark.parametrize("what", ["a model", "a store", "told so"])
    def test_it_starts_the_first_time(self, filled: Filled, point: Path, tmp_path: Path, what: str) -> None:
        root = filled.root
        if what != "a model":
            root = tmp_path / "other"
            root.mkdir()
        if what == "a store":
            Store(root, create=True).close()
        more = ["--new"] if what == "told so" else []
        ran = hydrafs(
            "mount", root, point, "--existing", "--dehydrate", "off", *more, XDG_STATE_HOME=str(tmp_path / "state")
        )
        assert ran.returncode == 0, ran.stderr

    @pytest.mark.fuse
    def test_by_hand_where_a_store_was(self, on_disk: Filled, disk: Disk, point: Path, tmp_path: Path) -> None:
        state = tmp_path / "state"
        ran = hydrafs("mount", disk.folder, point, "--dehydrate", "off", XDG_STATE_HOME=str(state))
        assert ran.returncode == 0, ran.stderr
        unmount(point, lazy=True)
        disk.out()
        assert "and there was" in self.refused("mount", disk.folder, point, state=state)
        assert os.listdir(disk.folder) == []
        (state / "hydrafs" / "stores.json").write_text("{damaged")
        ran = hydrafs("mount", disk.folder, point, "--dehydrate", "off", "--new", XDG_STATE_HOME=str(state))
        assert ran.returncode == 0, ran.stderr
