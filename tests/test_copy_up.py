"""Opening is not writing: what a model becomes, and when, as programs open it for writing through a real mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mounts import Library, Mount, eventually, sha256_of

from hydrafs import copy_up, file_writes
from hydrafs.errors import HydraError
from hydrafs.path_locks import PathLocks, Turns
from hydrafs.writing import WritableTree

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]
NAME = "half.safetensors"


def state_of(path: Path) -> str:
    return os.getxattr(path, "user.hydrafs.state").decode()


def errno_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


@pytest.fixture
def tree(copied: Copied) -> Iterator[WritableTree]:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    tree = WritableTree(store.root, 8 << 20)
    tree.start()
    try:
        yield tree
    finally:
        tree.stop()


def touch(path: Path) -> None:
    subprocess.run(["touch", path], check=True)


def touch_a_date(path: Path) -> None:
    subprocess.run(["touch", "-m", "-d", "@1234567890.5", path], check=True)


def open_and_close(path: Path) -> None:
    path.open("r+b").close()


def open_to_append(path: Path) -> None:
    path.open("ab").close()


def open_and_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.read()


def map_without_a_store(path: Path) -> None:
    mapped: Any = np.memmap(path, dtype=np.uint8, mode="r+")
    assert int(mapped[-1]) >= 0
    del mapped


def open_as_smbd(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.utime(fd, ns=(10**9, 2 * 10**9 + 5))
        os.fchmod(fd, 0o640)
        os.lseek(fd, 0, os.SEEK_END)
        os.fsync(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def truncate_to_its_size(path: Path) -> None:
    os.truncate(path, path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size)


OPENED = [
    touch, touch_a_date, open_and_close, open_to_append, open_and_read, map_without_a_store, open_as_smbd,
    truncate_to_its_size,
]  # fmt: skip


@pytest.mark.parametrize("use", OPENED)
def test_who_writes_nothing_leaves_the_diff(copied: Copied, mounted: Mounted, use: Callable[[Path], None]) -> None:
    store = copied("base.safetensors", NAME)
    live = mounted(store)
    path, original = live.path / NAME, store.originals[NAME]
    before, base_before = os.stat(store.diff(NAME)), os.stat(store.root / "base.safetensors")
    use(path)
    use(live.path / "base.safetensors")
    assert os.path.samestat(os.stat(store.diff(NAME)), before)
    assert os.path.samestat(os.stat(store.root / "base.safetensors"), base_before)
    assert sorted(os.listdir(store.root)) == [".hydrafs", "base.safetensors", NAME + ".hydra"]
    assert not (store.root / ".hydrafs" / "retired").exists()
    assert state_of(path) == "dehydrated"
    assert sha256_of(path) == original.sha256
    found = os.stat(path)
    if use is touch:
        assert abs(found.st_mtime - time.time()) < 60
    elif use is touch_a_date:
        assert found.st_mtime_ns == 1234567890_500_000_000
    elif use is open_as_smbd:
        assert (found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (2 * 10**9 + 5, 0o640)
    elif use is not truncate_to_its_size:
        assert found.st_mtime_ns == original.mtime_ns


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)


def append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        assert file.write(b"more") == 4


def append_from_a_shell(path: Path) -> None:
    subprocess.run(["sh", "-c", 'printf more >> "$1"', "sh", path], check=True)


def write_in_the_middle(path: Path) -> None:
    write_at(path, 1000, b"changed")


def write_only(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, b"changed", 1000) == 7
    os.close(fd)


def map_and_store(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[1000:1007] = b"changed"


def make_shorter(path: Path) -> None:
    os.truncate(path, 5000)


def make_shorter_by_handle(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5000)


def make_longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 100)


def empty_by_handle(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(0)


def empty_by_name(path: Path) -> None:
    os.truncate(path, 0)


def write_anew(path: Path) -> None:
    path.write_bytes(b"new")


def dd_into(path: Path) -> None:
    subprocess.run(
        ["dd", f"of={path}", "bs=1", "seek=1000", "conv=notrunc", "status=none"], input=b"changed", check=True
    )


WRITTEN: dict[Callable[[Path], None], Callable[[bytes], bytes]] = {
    append: lambda data: data + b"more",
    append_from_a_shell: lambda data: data + b"more",
    write_in_the_middle: lambda data: data[:1000] + b"changed" + data[1007:],
    write_only: lambda data: data[:1000] + b"changed" + data[1007:],
    map_and_store: lambda data: data[:1000] + b"changed" + data[1007:],
    make_shorter: lambda data: data[:5000],
    make_shorter_by_handle: lambda data: data[:5000],
    make_longer: lambda data: data + bytes(100),
    empty_by_handle: lambda data: b"",
    empty_by_name: lambda data: b"",
    write_anew: lambda data: b"new",
    dd_into: lambda data: data[:1000] + b"changed" + data[1007:],
}


@pytest.mark.parametrize("name", [NAME, "base.safetensors"])
@pytest.mark.parametrize("write", WRITTEN)
def test_the_first_write_succeeds_at_once(
    copied: Copied, mounted: Mounted, write: Callable[[Path], None], name: str
) -> None:
    """Of a diff, and of the base that two others need: both are written to, and those others are what they were."""
    store = copied("base.safetensors", NAME, "tuned.safetensors")
    live = mounted(store)
    path, data = live.path / name, store.originals[name].data
    mode = store.originals[name].mode
    with path.open("rb", buffering=0) as reader, path.open("r+b", buffering=0) as other:
        assert reader.read(100) == data[:100]
        write(path)
        wanted = WRITTEN[write](data)
        # Whoever has it open goes on with the same file.
        assert os.pread(reader.fileno(), len(data) + 1000, 0) == wanted
        assert os.fstat(reader.fileno()).st_size == len(wanted)
        if wanted:
            assert os.pwrite(other.fileno(), b"X", 0) == 1
            wanted = b"X" + wanted[1:]
    assert path.read_bytes() == wanted
    assert state_of(path) == "plain"
    assert (store.root / name).read_bytes() == wanted
    assert stat.S_IMODE((store.root / name).stat().st_mode) == stat.S_IMODE(mode)
    assert not store.diff(name).exists()
    assert not [n for n in os.listdir(store.root) if n.startswith(".hydrafs-")]
    for each in {NAME, "tuned.safetensors"} - {name}:
        assert sha256_of(live.path / each) == store.originals[each].sha256
    append(path)
    assert path.read_bytes() == wanted + b"more"


def test_a_handle_that_was_renamed_or_deleted_before_it_is_written_to(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", NAME, "tuned.safetensors")
    live = mounted(store)
    data = store.originals[NAME].data
    with (live.path / NAME).open("r+b", buffering=0) as file:
        os.rename(live.path / NAME, live.path / "other.safetensors")
        assert os.pwrite(file.fileno(), b"X", 0) == 1
    assert (live.path / "other.safetensors").read_bytes() == b"X" + data[1:]
    assert not os.path.lexists(live.path / NAME)
    data = store.originals["tuned.safetensors"].data
    for name in ("tuned.safetensors", "base.safetensors"):
        data = store.originals[name].data
        with (live.path / name).open("r+b", buffering=0) as file, (live.path / name).open("rb") as reader:
            os.unlink(live.path / name)
            assert os.pwrite(file.fileno(), b"X", 0) == 1
            os.ftruncate(file.fileno(), 5000)
            assert reader.read() == (b"X" + data[1:])[:5000]
            assert (os.fstat(file.fileno()).st_nlink, os.fstat(file.fileno()).st_size) == (0, 5000)
        assert eventually(lambda name=name: not (store.root / name).exists() and not store.diff(name).exists())  # type: ignore[misc]
    assert os.listdir(live.path) == ["other.safetensors"]
    assert [n for n in os.listdir(store.root) if n != ".hydrafs"] == ["other.safetensors"]


def test_no_room_for_the_whole_model(tree: WritableTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails with ENOSPC, the diff stays and serves, also through the handle that wanted to write."""
    real = copy_up.os.statvfs  # type: ignore[attr-defined]

    def full(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 0
        return os.statvfs_result(found)

    def no_room(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("/half.safetensors", "/base.safetensors"):
        size = tree.getattr(name).size
        file = tree.open(name, os.O_RDWR)
        with monkeypatch.context() as patched:
            patched.setattr(copy_up.os, "statvfs", full)  # type: ignore[attr-defined]
            patched.setattr(copy_up, "copy_into", no_room)
            with pytest.raises((HydraError, OSError)) as caught:
                file.pwrite(0, memoryview(b"x"))
            assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
        got = bytearray(size)
        assert file.pread_into(0, memoryview(got)) == size
        assert file.pwrite(0, memoryview(b"x")) == 1
        file.close()


def test_two_that_write_make_it_whole_once(tree: WritableTree, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = file_writes.make_whole

    def slow(model: Any, temporary: Any) -> None:
        made.append(model.diff.path)
        time.sleep(0.2)
        real(model, temporary)

    monkeypatch.setattr(file_writes, "make_whole", slow)
    files = [tree.open("/half.safetensors", os.O_RDWR) for _ in range(4)]
    threads = [
        threading.Thread(target=file.pwrite, args=(number, memoryview(b"x"))) for number, file in enumerate(files)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    got = bytearray(4)
    files[0].pread_into(0, memoryview(got))
    assert got == b"xxxx"
    for file in files:
        file.close()


def test_who_writes_to_one_model_does_not_wait_for_another(tree: WritableTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is made whole, another is written to, a third is deleted, and the store's lock is free."""
    begun, go_on = threading.Event(), threading.Event()
    real = file_writes.make_whole

    def slow(model: Any, temporary: Any) -> None:
        if model.diff.path.endswith("half.safetensors.hydra"):
            begun.set()
            assert go_on.wait(30)
        real(model, temporary)

    monkeypatch.setattr(file_writes, "make_whole", slow)
    file = tree.open("/half.safetensors", os.O_RDWR)
    thread = threading.Thread(target=file.pwrite, args=(0, memoryview(b"x")))
    thread.start()
    try:
        assert begun.wait(30)
        other = tree.open("/tuned.safetensors", os.O_RDWR)
        assert other.pwrite(0, memoryview(b"x")) == 1
        other.close()
        with tree.store.lock(0.0):
            pass
        tree.unlink("/tuned.safetensors")
        got = bytearray(10)
        assert file.pread_into(0, memoryview(got)) == 10  # who reads what is being made whole reads on
    finally:
        go_on.set()
        thread.join()
    assert file.is_writable
    file.close()


def test_a_model_that_is_deleted_behind_the_mount_while_it_is_made_whole(
    tree: WritableTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name does not come back."""
    real = file_writes.make_whole

    def and_deleted(model: Any, temporary: Any) -> None:
        real(model, temporary)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tree.store.root / "half.safetensors.hydra")

    monkeypatch.setattr(file_writes, "make_whole", and_deleted)
    file = tree.open("/half.safetensors", os.O_RDWR)
    assert file.pwrite(0, memoryview(b"x")) == 1
    assert not os.path.lexists(tree.store.root / "half.safetensors")
    file.close()


def test_a_model_that_was_stored_anew_while_it_was_open(tree: WritableTree, library: Library) -> None:
    """Another diff file of the same model has the name: it is written to, and nothing else."""
    diff = tree.store.root / "half.safetensors.hydra"
    file = tree.open("/half.safetensors", os.O_RDWR)
    data = diff.read_bytes()
    diff.with_name("aside").write_bytes(data)
    os.rename(diff.with_name("aside"), diff)
    assert file.pwrite(0, memoryview(b"x")) == 1
    file.close()
    whole = (tree.store.root / "half.safetensors").read_bytes()
    assert whole == b"x" + library.originals["half.safetensors"].data[1:]
    # Another model altogether: what is written goes with who has the old one open.
    other = tree.store.root / "tuned.safetensors.hydra"
    file = tree.open("/tuned.safetensors", os.O_RDWR)
    other.unlink()
    (tree.store.root / "tuned.safetensors").write_bytes(b"another model")
    assert file.pwrite(0, memoryview(b"x")) == 1
    file.close()
    assert (tree.store.root / "tuned.safetensors").read_bytes() == b"another model"


def test_a_file_that_is_opened_for_writing_is_left_alone_by_who_dehydrates(tree: WritableTree) -> None:
    file = tree.open("/base.safetensors", os.O_RDWR)
    fd = os.open(tree.store.root / "base.safetensors", os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.close()
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_modes_are_asked_when_it_is_opened(copied: Copied) -> None:
    store = copied("base.safetensors", NAME)
    (store.root / NAME).with_name(NAME + ".hydra").chmod(0o444)
    (store.root / "base.safetensors").chmod(0o444)
    os.chmod(store.root, 0o777)
    for path in store.root.parents:
        if path.name:
            os.chmod(path, path.stat().st_mode | 0o055)
    code = f"""
import errno, os
from hydrafs.writing import WritableTree
os.setegid(12345); os.seteuid(12345)
tree = WritableTree({str(store.root)!r}, 1 << 20)
tree.start()
for name in ("/{NAME}", "/base.safetensors"):
    for flags in (os.O_RDWR, os.O_WRONLY):
        try:
            tree.open(name, flags)
        except OSError as error:
            assert error.errno == errno.EACCES, error
        else:
            raise SystemExit("opened " + name)
tree.stop()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestWaiting:
    def test_a_lock_for_each_path(self) -> None:
        locks, entered = PathLocks(), threading.Event()

        def enter() -> None:
            with locks.of("/a"):
                entered.set()

        with locks.of("/a", "/b"):
            with locks.of("/a"):
                pass
            thread = threading.Thread(target=enter)
            thread.start()
            with locks.of("/c"):
                assert not entered.wait(0.05)
        thread.join()
        assert entered.is_set()
        assert not locks._locks

    def test_no_more_than_so_many_wait(self) -> None:
        turns = Turns(2)
        with turns.one(), turns.one():  # one thread takes one turn
            results: list[object] = []

            def take() -> None:
                try:
                    with turns.one():
                        results.append("taken")
                        assert release.wait(30)
                except OSError as error:
                    results.append(error.errno)

            release = threading.Event()
            first = threading.Thread(target=take)
            first.start()
            assert eventually(lambda: results == ["taken"])
            second = threading.Thread(target=take)
            second.start()
            second.join()
            assert results == ["taken", errno.EBUSY]
            release.set()
            first.join()
        with turns.one():
            pass
