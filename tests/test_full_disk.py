"""Reading needs no room: a store whose disk is full, has no inodes left, or is read-only, is read all the same."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled, ModelMaker
from mounts import daemons_of, eventually, hydrafs, is_mounted

from hydrafs import store_lock, working
from hydrafs.activity import Activity
from hydrafs.errors import HydraError, NoLocks, NoSpace, StoreLocked
from hydrafs.mountpoints import unmount
from hydrafs.store import Store
from hydrafs.store_lock import holder_of
from hydrafs.writing import WritableTree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts filesystems")


def fill(folder: Path) -> None:
    """Until not a block is left."""
    for nbytes in (64 << 10, 4096, 1):
        with contextlib.suppress(OSError), (folder / f"fill-{nbytes}").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * nbytes)


def use_all_inodes(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (folder / f"empty-{number}").touch()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,nr_inodes=60", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def filled_in(folder: Path, models: ModelMaker) -> Filled:
    base = models.save(folder / "base.safetensors", models.base("fp16"))
    tuned = models.save(folder / "tuned.safetensors", models.tuned("fp16"))
    return Filled(folder, base, tuned, tuned.read_bytes())


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mount"
    folder.mkdir()
    yield folder
    if is_mounted(folder):
        unmount(folder, lazy=True)


@pytest.mark.fuse
@pytest.mark.parametrize("what", ["blocks", "inodes", "both"])
@pytest.mark.parametrize("when", ["before", "meanwhile", "a store of an old version", "no store yet"])
def test_models_are_read_and_removed(disk: Path, models: ModelMaker, point: Path, what: str, when: str) -> None:
    filled = filled_in(disk, models)
    if when == "no store yet":
        filled.diff.write_bytes(b"")
        filled.diff.unlink()
    else:
        filled.dehydrate()
    if when == "a store of an old version":
        for name in ("store.json", "lock", "activity", "catalog.sqlite"):
            (disk / ".hydrafs" / name).unlink(missing_ok=True)

    def use_up() -> None:
        if what in ("blocks", "both"):
            fill(disk)
        if what in ("inodes", "both"):
            use_all_inodes(disk)

    if when != "meanwhile":
        use_up()
    ran = hydrafs("mount", disk, point, XDG_STATE_HOME=os.fspath(point.parent / "state"))
    assert ran.returncode == 0, ran.stderr
    if when == "meanwhile":
        use_up()
    (pid,) = daemons_of(point)
    for _ in range(3):
        assert (point / "tuned.safetensors").read_bytes() == filled.data
        assert "base.safetensors" in os.listdir(point)
    assert hydrafs("status", point).returncode == 0
    spare = next(name for name in os.listdir(point) if name.startswith(("fill", "empty")))
    (point / spare).unlink()
    assert spare not in os.listdir(disk)
    assert daemons_of(point) == [pid]
    if what == "blocks":
        (point / "fill-65536").unlink()
        (point / "again.safetensors").write_bytes(filled.data)
        assert (point / "again.safetensors").read_bytes() == filled.data
    unmount(point)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.fuse
def test_a_disk_that_is_read_only(disk: Path, models: ModelMaker, point: Path) -> None:
    filled = filled_in(disk, models)
    filled.dehydrate()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ran = hydrafs("mount", disk, point)
    assert ran.returncode == 0, ran.stderr
    assert (point / "tuned.safetensors").read_bytes() == filled.data
    with pytest.raises(OSError) as caught:
        (point / "new").touch()
    assert caught.value.errno == errno.EROFS


@pytest.mark.fuse
def test_a_disk_that_becomes_read_only(disk: Path, models: ModelMaker, point: Path) -> None:
    """As ext4 does it when it finds itself damaged; a limit on file sizes stands in, since open files forbid it."""
    filled = filled_in(disk, models)
    filled.dehydrate()
    ran = hydrafs("mount", disk, point, "--dehydrate", "off")
    assert ran.returncode == 0, ran.stderr
    (pid,) = daemons_of(point)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert (point / "tuned.safetensors").read_bytes() == filled.data
    assert daemons_of(point) == [pid]


class TestActivity:
    def test_a_hole_that_gets_no_block(self, disk: Path) -> None:
        with (disk / "activity").open("wb") as file:
            file.truncate(8)  # as older versions made it
        fill(disk)
        mine = Activity(disk / "activity")
        mine.touch()
        mine.close()

    def test_a_file_that_gets_shorter(self, tmp_path: Path) -> None:
        mine = Activity(tmp_path / "activity")
        mine.touch()
        os.truncate(tmp_path / "activity", 0)
        assert mine.quiet_seconds() == float("inf")
        assert eventually(lambda: (mine.touch(), mine.quiet_seconds() < 5)[1])
        mine.close()

    def test_too_many_open_files_end_no_clock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine, dup = Activity(tmp_path / "activity"), os.dup

        def fail(fd: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr("hydrafs.activity.os.dup", fail)
        mine.touch()
        assert mine.quiet_seconds() == float("inf")
        monkeypatch.setattr("hydrafs.activity.os.dup", dup)
        assert eventually(lambda: (mine.touch(), mine.quiet_seconds() < 5)[1])
        mine.close()

    def test_a_disk_that_does_not_answer_keeps_no_read_waiting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = Activity(tmp_path / "activity")
        hang, reached = threading.Event(), threading.Event()

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            reached.set()
            hang.wait(30)
            return len(data)

        monkeypatch.setattr(os, "pwrite", pwrite)
        thread = threading.Thread(target=lambda: [mine.touch() for _ in range(1000)], daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert reached.is_set()
        mine.close()
        hang.set()

    def test_nothing_is_mapped(self, filled: Filled) -> None:
        filled.dehydrate()
        tree = WritableTree(filled.root, 1 << 20)
        tree.start()
        opened = tree.open("/tuned.safetensors", os.O_RDONLY)
        opened.pread_into(0, memoryview(bytearray(100)))
        assert str(filled.root) not in Path("/proc/self/maps").read_text()
        opened.close()
        tree.stop()


class TestTheLock:
    def test_without_room_for_its_file_there_is_one_lock_all_the_same(self, disk: Path) -> None:
        store, other = Store(disk, create=True), Store(disk, create=True)
        use_all_inodes(disk)
        with store.lock():
            assert not (disk / ".hydrafs" / "lock").exists()
            with pytest.raises(StoreLocked), other.lock(0.1):
                pytest.fail("two have it")
            (disk / "empty-0").unlink()
            with pytest.raises(StoreLocked), other.lock(0.1):
                pytest.fail("there is room by now, and two have it")
        with other.lock(0.1):
            assert (disk / ".hydrafs" / "lock").exists()
            with pytest.raises(StoreLocked), store.lock(0.1):
                pytest.fail("two have it")
        store.close()
        other.close()

    def test_who_has_it_is_told(self, filled: Filled) -> None:
        store = Store(filled.root, create=True)
        code = (
            "import sys, time; from hydrafs.store import Store\n"
            "with Store(sys.argv[1]).lock(): print('has it', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code, filled.root], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"has it\n"
            try:
                who = f"process {process.pid} .*time.sleep.* for over 0.2"
                with pytest.raises(StoreLocked, match=who) as caught, store.lock(0.2):
                    pytest.fail("two have it")
                assert caught.value.errno == errno.EBUSY
                process.send_signal(signal.SIGSTOP)
                with pytest.raises(StoreLocked, match=f"process {process.pid} .*which is stopped"), store.lock(0.2):
                    pytest.fail("two have it")
                # Who is known to sit on it is not waited for again.
                began = time.monotonic()
                with pytest.raises(StoreLocked), store.lock(20):
                    pytest.fail("two have it")
                assert time.monotonic() - began < 15
            finally:
                process.kill()
        with store.lock(5), pytest.raises(StoreLocked), Store(filled.root).lock(0.05):
            pytest.fail("two have it")
        store.close()

    def test_threads_that_wait_are_bounded_and_none_waits_in_vain(self, filled: Filled) -> None:
        store = Store(filled.root, create=True)
        done: list[str] = []

        def work(seconds: float) -> None:
            try:
                with store.lock(seconds):
                    done.append("done")
            except StoreLocked:
                done.append("refused")

        with store.lock():  # short work of one after the other: all get their turn
            threads = [threading.Thread(target=work, args=(10.0,)) for _ in range(3 * store_lock.MAX_WAITING)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(30)
        assert done == ["done"] * len(threads)
        done.clear()
        with store.lock():  # nothing goes on: those that are too many do not wait
            threads = [threading.Thread(target=work, args=(60.0,)) for _ in range(3 * store_lock.MAX_WAITING)]
            for thread in threads:
                thread.start()
            assert eventually(lambda: len(done) == 2 * store_lock.MAX_WAITING)
            assert set(done) == {"refused"}
        for thread in threads:
            thread.join(30)
        assert done.count("done") == store_lock.MAX_WAITING
        store.close()

    @pytest.mark.fuse
    def test_waiting_writers_keep_no_reader_waiting(self, filled: Filled, point: Path) -> None:
        filled.dehydrate()
        names = [f"{number}/a.safetensors" for number in range(64)]  # the kernel lets one at a time change a folder
        for name in names:
            (filled.root / name).parent.mkdir()
            os.link(filled.base, filled.root / name)
        ran = hydrafs("mount", filled.root, point, "--dehydrate", "off")
        assert ran.returncode == 0, ran.stderr
        other = Store(filled.root)
        with other.lock():
            writers = [subprocess.Popen(["rm", "-f", point / name], stderr=subprocess.DEVNULL) for name in names]
            for _ in range(10):
                assert (point / "tuned.safetensors").read_bytes() == filled.data
                assert "base.safetensors" in os.listdir(point)
            with pytest.raises(subprocess.TimeoutExpired):  # the reads were done while somebody waited
                writers[0].wait(0.01)
            for writer in writers:
                assert writer.wait(30) == 1
        other.close()
        (point / names[0]).unlink()

    def test_nobody_is_told_where_nobody_can_tell(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        inode = os.fstat(fd).st_ino
        lines = f"1: POSIX  ADVISORY  WRITE 1 00:01:{inode} 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 1 00:01:{inode} 0 EOF\n"
        for line in ("", "x", lines, f"3: FLOCK  ADVISORY  WRITE -1 00:01:{inode} 0 EOF"):
            assert holder_of(fd, lambda line=line: line) == (0, "")  # type: ignore[misc]
        assert holder_of(fd, lambda: f"1: FLOCK  ADVISORY  WRITE 1 00:01:{inode} 0 EOF")[0] == 1
        os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_cannot_be_told_leaves_nothing_behind(
    number: int, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(filled.root, create=True)

    def write_bytes(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(number, os.strerror(number))

    before = sorted(os.listdir(store.private))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    working.tell(store, working.Work("idle"))
    assert sorted(os.listdir(store.private)) == before
    store.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_a_mount_without_locks_serves_models(
    number: int, filled: Filled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled.dehydrate()

    def refuse(fd: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    tree = WritableTree(filled.root, 1 << 20)
    tree.start()
    opened = tree.open("/tuned.safetensors", os.O_RDONLY)
    got = bytearray(len(filled.data))
    assert opened.pread_into(0, memoryview(got)) == len(got)
    assert got == filled.data
    opened.close()
    with pytest.raises(NoLocks, match="no locks; mount it with flock, or use --read-only") as caught:
        tree.unlink("/base.safetensors")
    assert caught.value.errno == errno.ENOLCK
    tree.stop()
    assert "models can be read" in caplog.text
    assert filled.base.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_dehydrating_without_locks_is_refused_before_anything_is_written(
    number: int, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = sorted(os.listdir(filled.root))
    with pytest.raises(HydraError, match="no locks"):
        filled.dehydrate()
    assert filled.tuned.read_bytes() == filled.data
    assert sorted(set(os.listdir(filled.root)) - {".hydrafs"}) == before
    assert not [name for name in os.listdir(filled.root / ".hydrafs") if "tmp" in name or "journal" in name]


def test_no_space_is_told_as_such(disk: Path) -> None:
    store = Store(disk, create=True)
    fill(disk)
    with pytest.raises(NoSpace):
        store.pin(["x" * 100_000])
    store.close()
