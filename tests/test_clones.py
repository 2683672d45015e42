"""What is held where a filesystem shares content between files: a clone, which no write in place reaches.

The ioctl is emulated by a copy, so that these run everywhere; on btrfs and XFS they run with the real one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled
from mounts import hydrafs
from writing_process import HOWS, writing

from hydrafs.cache import ChunkCache
from hydrafs.collection import collect
from hydrafs.needs import census
from hydrafs.opening import Opener
from hydrafs.retained import kept
from hydrafs.store import Store

FICLONE = 0x40049409


@pytest.fixture(autouse=True)
def clones(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: int = 0) -> int:
        if request != FICLONE:
            return original(fd, request, argument)
        try:
            return original(fd, request, argument)
        except OSError:
            size = os.fstat(argument).st_size
            assert os.pwrite(fd, os.pread(argument, size, 0), 0) == size
            return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Store]:
    with contextlib.closing(Store(root)) as store:
        yield store


def read(root: Path) -> bytes:
    with (
        opened(root) as store,
        contextlib.closing(Opener(store, ChunkCache(0))) as opener,
        contextlib.closing(opener.open(store.locate("tuned.safetensors"))) as model,
    ):
        return model.pread(0, model.size)


def held(filled: Filled) -> Path:
    (path,) = (filled.root / ".hydrafs" / "held").iterdir()
    return path


def test_a_base_is_held_by_a_clone(filled: Filled) -> None:
    before = filled.base.stat()
    filled.dehydrate()
    after = held(filled).stat()
    assert filled.base.stat().st_nlink == 1
    assert after.st_ino != before.st_ino
    assert (after.st_size, after.st_mtime_ns, after.st_mode) == (before.st_size, before.st_mtime_ns, before.st_mode)
    assert held(filled).read_bytes() == filled.base.read_bytes()


@pytest.mark.parametrize("how", HOWS)
def test_a_write_in_place_behind_hydrafs_back_loses_nothing(filled: Filled, how: str) -> None:
    filled.dehydrate()
    size = filled.base.stat().st_size
    with writing(filled.base, how) as other:
        for place in range(size // 2, size, 4096):
            other.write(place, 90)
        assert read(filled.root) == filled.data
    assert read(filled.root) == filled.data
    filled.base.unlink()
    assert read(filled.root) == filled.data


def test_what_is_written_to_while_it_is_held_is_held_by_a_link(filled: Filled) -> None:
    """A clone of a file that somebody writes to would be of nobody knows what."""
    filled.dehydrate()
    digest = bytes.fromhex(held(filled).name)
    held(filled).unlink()
    from hydrafs.held import hold

    with writing(filled.base, "descriptor"), opened(filled.root) as store:
        assert hold(store, filled.base, digest)
    assert held(filled).stat().st_ino == filled.base.stat().st_ino


def test_it_is_made_once_and_takes_no_space(filled: Filled) -> None:
    filled.dehydrate()
    first = held(filled).stat().st_ino
    digest = bytes.fromhex(held(filled).name)
    from hydrafs.held import hold

    with opened(filled.root) as store:
        assert hold(store, filled.base, digest)
        assert held(filled).stat().st_ino == first
        assert kept(store, census(store)) == []
        assert collect(store).removed == ()


def test_what_nobody_needs_any_more_goes_and_is_counted_once(filled: Filled) -> None:
    filled.dehydrate()
    size = filled.base.stat().st_size
    for name in ("base.safetensors", "tuned.safetensors"):
        assert hydrafs("rm", filled.root / name).returncode == 0
    removed = json.loads(hydrafs("gc", "--json", filled.root).stdout)
    assert removed["freed"] == size
    assert list((filled.root / ".hydrafs" / "held").iterdir()) == []
    assert list((filled.root / ".hydrafs" / "retired").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL, errno.ENOSPC, errno.EIO])
def test_without_clones_it_is_a_link(filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refused)
    assert filled.dehydrate().original_removed
    assert held(filled).stat().st_ino == filled.base.stat().st_ino
    assert len(os.listdir(filled.root / ".hydrafs" / "held")) == 1
    assert read(filled.root) == filled.data
