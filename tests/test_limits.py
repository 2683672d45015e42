"""What the operating system lets a process have: raised where it may be, and told as what it is where it is not."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled
from mounts import hydrafs

from hydrafs.callbacks import errno_of
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import (
    Changing,
    Denied,
    HydraError,
    NoLocks,
    NoSpace,
    OutOfMemory,
    TooManyFiles,
    UsageError,
    from_oserror,
)
from hydrafs.limits import raise_open_files
from hydrafs.mountoptions import parse_options
from hydrafs.mountpoints import our_mounts, unmount
from hydrafs.policy import Policy
from hydrafs.sizes import parse_nbytes
from hydrafs.store import Store
from hydrafs.vfs import StoreTree


def test_a_process_gets_what_it_may_have() -> None:
    code = (
        "import resource as r; from hydrafs.limits import raise_open_files\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 400)); print(raise_open_files(), r.getrlimit(r.RLIMIT_NOFILE))\n"
        "print(raise_open_files())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "400 (400, 400)\n400\n"


@pytest.fixture
def few(request: pytest.FixtureRequest) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.fuse
def test_more_models_than_a_shell_allows_are_open_at_once(filled: Filled, tmp_path: Path, few: None) -> None:
    filled.dehydrate()
    for number in range(120):
        os.link(filled.base, filled.root / f"{number}.safetensors")
    point = tmp_path / "mount"
    point.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))  # as a shell with ulimit -Sn 100
    ran = hydrafs("mount", filled.root, point, "--dehydrate", "off")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ran.returncode == 0, ran.stderr
    try:
        opened = [os.open(point / f"{number}.safetensors", os.O_RDONLY) for number in range(120)]
        assert (point / "tuned.safetensors").read_bytes() == filled.data
        for fd in opened:
            os.close(fd)
    finally:
        unmount(point, lazy=True)
    assert not any(mount.mountpoint == point for mount in our_mounts())


@pytest.mark.logs("cannot open /tuned.safetensors: .*Too many open files")
def test_too_many_open_files_are_told_as_such(filled: Filled, few: None) -> None:
    filled.dehydrate()
    tree = StoreTree(filled.root, 1 << 20)
    tree.start()
    taken = []
    try:
        tree.open("/tuned.safetensors", os.O_RDONLY).close()
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for free in range(3):  # none at all; one, for the diff; its base is missed
            with pytest.raises((TooManyFiles, OSError)) as caught:
                for name in ["/tuned.safetensors", "/base.safetensors"]:
                    tree.open(name, os.O_RDONLY)
            if free < 2:
                assert errno_of(caught.value) == errno.EMFILE
            os.close(taken.pop())
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        tree.stop()


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, NoSpace, "free some space"),
        (errno.EDQUOT, NoSpace, "quota"),
        (errno.EFBIG, NoSpace, "no file that large"),
        (errno.EACCES, Denied, "permissions"),
        (errno.EPERM, Denied, "permissions"),
        (errno.EROFS, Denied, "read-only"),
        (errno.EMFILE, TooManyFiles, "LimitNOFILE"),
        (errno.ENFILE, TooManyFiles, "fs.file-max"),
        (errno.ENOMEM, OutOfMemory, "--cache-size"),
        (errno.EBUSY, Changing, "try again"),
        (errno.ENOLCK, NoLocks, "no locks"),
        (errno.ESTALE, HydraError, "mount the share again"),
        (errno.ETIMEDOUT, HydraError, "server"),
        (errno.EHOSTDOWN, HydraError, "server"),
        (errno.ELOOP, HydraError, "circle"),
        (errno.ENAMETOOLONG, HydraError, "shorter"),
        (errno.EINTR, HydraError, "try again"),
        (errno.ENODEV, HydraError, "disk is gone"),
        (errno.EIO, HydraError, "check the disk"),
    ],
)
def test_an_error_of_the_system_keeps_its_number(number: int, kind: type[HydraError], remedy: str) -> None:
    error = from_oserror(OSError(number, os.strerror(number)), "cannot open", "/x")
    assert type(error) is kind
    assert error.errno == errno_of(error) == number
    assert remedy in error.remedy
    assert os.strerror(number) in str(error)
    assert (number == errno.EIO) == ("check the disk" in str(error))


def test_a_dead_mount_below_does_not_make_ours_look_dead() -> None:
    for number in (errno.ENOTCONN, errno.ECONNABORTED):
        assert errno_of(OSError(number, os.strerror(number))) == errno.EIO
        assert errno_of(from_oserror(OSError(number, os.strerror(number)), "x")) == errno.EIO


SIZES = {"1.5G": 3 << 29, "512m": 512 << 20, "4GiB": 4 << 30, "7": 7, "2kB": 2048, ".5M": 1 << 19, "1 T": 1 << 40}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_the_same_everywhere(text: str, filled: Filled) -> None:
    assert parse_nbytes(text) == SIZES[text]
    assert parse_options(f"cache_size={text}").cache_nbytes == SIZES[text]
    (filled.root / ".hydrafs").mkdir()
    (filled.root / ".hydrafs" / "config.toml").write_text(f'[worker]\nmin_size = "{text}"\n')
    store = Store(filled.root)
    assert Policy.of(store).min_nbytes == SIZES[text]
    store.close()


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "1..5G", "1e3", "4X", "nan", "inf", "9" * 15 + "T", "٣G"])
def test_what_is_no_size_is_none_anywhere(text: str, filled: Filled) -> None:
    with pytest.raises(UsageError):
        parse_nbytes(text)
    with pytest.raises(UsageError):
        parse_options(f"cache_size={text}")
    (filled.root / ".hydrafs").mkdir()
    (filled.root / ".hydrafs" / "config.toml").write_text(f'[worker]\nmin_size = "{text}"\n')
    store = Store(filled.root)
    with pytest.raises(UsageError):
        Policy.of(store)
    store.close()


def test_raising_is_no_lowering() -> None:
    assert raise_open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_dehydrating_with_few_files_says_so(filled: Filled, few: None) -> None:
    store = Store(filled.root, create=True)
    taken = []
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        with pytest.raises(OSError, match="Too many"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(TooManyFiles):
            dehydrate(store, filled.tuned, Options(bases=(filled.base,)))
    finally:
        for fd in taken:
            os.close(fd)
        store.close()
    assert filled.tuned.read_bytes() == filled.data
