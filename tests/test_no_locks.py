"""A filesystem without locks: Lustre without flock, NFS without its lock daemon, some of CIFS and FUSE."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from conftest import Filled

from hydrafs import temporary, working
from hydrafs.errors import HydraError, NoLocks
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile, fsync_folder

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP]


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(fd: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_temporary_file_does_without(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, number)
    with TemporaryFile(tmp_path) as file:
        file.file.write(b"whole")
        assert temporary.remove_leftovers(tmp_path) == 0  # nobody can tell whether somebody writes to it
        file.commit(tmp_path / "there")
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, errno.ENOMEM])
def test_a_lock_that_fails_leaves_nothing_behind(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, number)
    before = open_files()
    with pytest.raises(HydraError) as caught:
        TemporaryFile(tmp_path)
    assert caught.value.errno == number
    assert os.listdir(tmp_path) == []
    assert open_files() == before


@pytest.mark.parametrize("number", NO_LOCKS)
def test_there_is_no_worker(number: int, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(filled.root, create=True)
    without_locks(monkeypatch, number)
    before = open_files()
    with pytest.raises(NoLocks, match="no locks"), working.alone(store):
        pytest.fail("two could be at it")
    assert open_files() == before
    store.close()


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "x"), OSError(errno.EIO, "x"), KeyError("x")])
def test_what_a_worker_raises_comes_out_once(error: Exception, filled: Filled) -> None:
    store = Store(filled.root, create=True)
    with pytest.raises(type(error)), working.alone(store) as alone:
        assert alone
        raise error
    with working.alone(store) as alone, working.alone(store) as second:
        assert (alone, second) == (True, False)
    store.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_passed_over(
    number: int, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert filled.dehydrate().original_removed
    assert not [name for name in os.listdir(filled.root / ".hydrafs") if name.startswith("journal")]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_folder_whose_sync_fails_is_not(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync_folder(tmp_path)
