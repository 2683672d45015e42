"""What a file was it stays: owner, mode, times, attributes and access lists go over to a diff and come back, or the
model stays whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Filled, ModelMaker
from mounts import Library, Mount, hydrafs

from hydrafs.dehydrate import Outcome
from hydrafs.restore import rehydrate
from hydrafs.store import Store

pytest_plugins = ["mounting_fixtures"]

Mounted = Callable[..., Mount]
ACCESS_LIST = "system.posix_acl_access"
MTIME_NS = 1_234_567_890_123_456_789
CANNOT = (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC)


def access_list(user: int, rights: int, mask: int) -> bytes:
    """rw- for the owner, ``rights`` for a user, r-- for the group, nothing for others (linux/posix_acl_xattr.h)."""
    none = 0xFFFFFFFF
    entries = [(1, 6, none), (2, rights, user), (4, 4, none), (0x10, mask, none), (0x20, 0, none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def adorn(path: Path) -> None:
    """Give a file everything that a file can have."""
    os.chown(path, 1234, 2345)
    os.setxattr(path, "user.comment", b"from the training run\0of May")
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "trusted.note", b"of the administrator")
    path.chmod(0o6754)
    os.setxattr(path, ACCESS_LIST, access_list(4321, 7, 5))
    os.utime(path, ns=(1, MTIME_NS))


def looks(path: Path) -> dict[str, object]:
    s = path.stat()
    names = [name for name in os.listxattr(path) if not name.startswith(("user.hydrafs.", "user.hash."))]
    return {
        "owner": (s.st_uid, s.st_gid),
        "mode": stat.S_IMODE(s.st_mode),
        "mtime": s.st_mtime_ns,
        "attributes": {name: os.getxattr(path, name) for name in names},
        "data": path.read_bytes(),
    }


def unasked(filled: Filled) -> Outcome:
    return filled.dehydrate(replace(filled.options, alone=False, all_or_nothing=True))


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, number: int, only: str = "") -> None:
    """A call that gives a file something says that it cannot."""
    original = getattr(os, call)

    def refused(*arguments: object) -> object:
        if not only or only in arguments:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, call, refused)


@pytest.mark.parametrize("background", [False, True], ids=["by hand", "unasked"])
def test_everything_goes_over_and_comes_back(filled: Filled, background: bool) -> None:
    adorn(filled.tuned)
    before = looks(filled.tuned)
    assert (unasked(filled) if background else filled.dehydrate()).original_removed
    diff = filled.diff.stat()
    assert before["mode"] == 0o6650
    assert (diff.st_uid, diff.st_gid, stat.S_IMODE(diff.st_mode)) == (1234, 2345, 0o640)
    assert os.getxattr(filled.diff, "user.comment") == before["attributes"]["user.comment"]  # type: ignore[index]
    with contextlib.closing(Store(filled.root)) as store:
        rehydrate(store, store.locate("tuned.safetensors"))
    assert looks(filled.tuned) == before


@pytest.mark.fuse
def test_everything_comes_back_with_the_first_write_through_a_mount(
    filled: Filled, mounted: Mounted, tmp_path: Path
) -> None:
    adorn(filled.tuned)
    before = looks(filled.tuned)
    assert filled.dehydrate().original_removed
    live = mounted(Library(filled.root, {}))
    with (live.path / "tuned.safetensors").open("r+b") as file:
        file.write(filled.data[:1])
    os.utime(filled.tuned, ns=(1, MTIME_NS))
    filled.tuned.chmod(0o6650)  # who writes to a program takes its set-user-ID away
    assert looks(filled.tuned) == before


def test_a_file_with_no_access_list_does_not_get_its_folders(filled: Filled) -> None:
    os.setxattr(filled.root, "system.posix_acl_default", access_list(4321, 7, 7))
    filled.tuned.chmod(0o640)
    assert filled.dehydrate().original_removed
    assert ACCESS_LIST not in os.listxattr(filled.diff)
    assert stat.S_IMODE(filled.diff.stat().st_mode) == 0o640


class TestAnOwnerThatCannotBeKept:
    @pytest.mark.parametrize("number", CANNOT, ids=os.strerror)
    def test_unasked_the_model_stays_whole(self, filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        os.chown(filled.tuned, 1234, 2345)
        refuse(monkeypatch, "fchown", number)
        outcome = unasked(filled)
        assert outcome.diff is None
        assert any("owner" in reason for reason in outcome.reasons)
        assert filled.tuned.read_bytes() == filled.data
        assert set(os.listdir(filled.root)) == {"base.safetensors", "tuned.safetensors", ".hydrafs"}

    @pytest.mark.parametrize("number", CANNOT, ids=os.strerror)
    def test_by_hand_a_warning_says_it(self, filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        os.chown(filled.tuned, 1234, 2345)
        filled.tuned.chmod(0o6755)
        refuse(monkeypatch, "fchown", number)
        outcome = filled.dehydrate()
        assert outcome.original_removed
        assert any("owner cannot be kept: 1234:2345" in reason for reason in outcome.reasons)
        with contextlib.closing(Store(filled.root)) as store:
            os.chown(filled.diff, 1234, 2345)
            rehydrate(store, store.locate("tuned.safetensors"))
        assert stat.S_IMODE(filled.tuned.stat().st_mode) == 0o755  # nobody gets the right to act as somebody else

    def test_in_a_user_namespace(self, filled: Filled) -> None:
        os.chown(filled.tuned, -1, 1234)
        command = [
            "unshare",
            "-Ur",
            sys.executable,
            "-m",
            "hydrafs",
            "dehydrate",
            "--json",
            "--base",
            filled.base,
            filled.tuned,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        (facts,) = json.loads(done.stdout)
        assert facts["original_removed"]
        assert any("owner" in reason for reason in facts["reasons"])

    def test_a_disk_that_fails_is_an_error(self, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
        os.chown(filled.tuned, 1234, 2345)
        refuse(monkeypatch, "fchown", errno.EIO)
        with pytest.raises(Exception, match="cannot write the diff"):
            filled.dehydrate()
        assert filled.tuned.read_bytes() == filled.data
        assert not filled.diff.exists()


class TestAttributesThatCannotBeKept:
    @pytest.mark.parametrize("number", CANNOT, ids=os.strerror)
    @pytest.mark.parametrize("name", ["user.comment", ACCESS_LIST])
    def test_the_model_stays_whole(
        self, filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int, name: str
    ) -> None:
        value = access_list(4321, 7, 5) if name == ACCESS_LIST else b"x"
        os.setxattr(filled.tuned, name, value)
        refuse(monkeypatch, "setxattr", number, name)
        for outcome in (unasked(filled), filled.dehydrate()):
            assert outcome.diff is None
            assert any(name in reason for reason in outcome.reasons)
            assert filled.tuned.read_bytes() == filled.data
            assert not filled.diff.exists()
        outcome = filled.dehydrate(replace(filled.options, keep=True))
        assert outcome.diff is not None
        assert any(name in reason for reason in outcome.reasons)

    def test_capabilities(self, filled: Filled) -> None:
        os.setxattr(filled.tuned, "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
        for outcome in (unasked(filled), filled.dehydrate()):
            assert outcome.diff is None
            assert any("security.capability" in reason for reason in outcome.reasons)
        assert filled.tuned.read_bytes() == filled.data

    def test_what_hydrafs_and_the_kernel_say_of_a_file_is_not_its_own(self, filled: Filled) -> None:
        os.setxattr(filled.tuned, "user.hash.sha256", b"00" * 32)
        os.setxattr(filled.tuned, "user.hydrafs.state", b"dehydrated")
        assert unasked(filled).original_removed
        assert not [name for name in os.listxattr(filled.diff) if name.startswith("user.")]


class TestAnotherHardLink:
    @pytest.fixture
    def elsewhere(self, filled: Filled, tmp_path: Path) -> Path:
        os.link(filled.tuned, tmp_path / "blob")
        return tmp_path / "blob"

    def test_unasked_the_model_stays_whole(self, filled: Filled, elsewhere: Path) -> None:
        outcome = unasked(filled)
        assert outcome.diff is None
        assert any("another hard link" in reason for reason in outcome.reasons)
        elsewhere.unlink()
        assert unasked(filled).original_removed

    def test_one_that_is_made_meanwhile(self, filled: Filled, tmp_path: Path) -> None:
        def link(stage: str, nbytes: int, total: int) -> None:
            if stage == "prove" and not (tmp_path / "blob").exists():
                os.link(filled.tuned, tmp_path / "blob")

        from hydrafs.dehydrate import dehydrate
        from hydrafs.errors import Changing

        with contextlib.closing(Store(filled.root, create=True)) as store:
            options = replace(filled.options, alone=False, all_or_nothing=True)
            with pytest.raises(Changing, match="another hard link"):
                dehydrate(store, filled.tuned, options, progress=link)
        assert filled.tuned.read_bytes() == filled.data
        assert not filled.diff.exists()

    def test_by_hand_a_warning_says_what_is_not_freed(self, filled: Filled, elsewhere: Path) -> None:
        outcome = filled.dehydrate()
        assert outcome.original_removed
        assert outcome.freed_nbytes == 0
        assert any("not freed" in reason for reason in outcome.reasons)
        assert elsewhere.read_bytes() == filled.data

    def test_hydrafs_own_links_are_none(self, filled: Filled, models: ModelMaker) -> None:
        assert filled.dehydrate().freed_nbytes == len(filled.data)
        # The base is held by a link of hydrafs'; once its diff is gone nobody needs it, and it may go itself.
        filled.diff.unlink()
        tensors = models.base("fp16")
        tensors["norm.bias"] += 1
        models.save(filled.root / "other.safetensors", tensors)
        assert filled.base.stat().st_nlink == 2
        with contextlib.closing(Store(filled.root)) as store:
            from hydrafs.dehydrate import dehydrate

            options = replace(filled.options, alone=False, all_or_nothing=True)
            assert dehydrate(store, filled.base, options).original_removed


def test_the_command_line_tells_it(filled: Filled, tmp_path: Path) -> None:
    os.link(filled.tuned, tmp_path / "blob")
    done = hydrafs("dehydrate", filled.tuned, "--base", filled.base)
    assert done.returncode == 0
    assert "not freed" in done.stdout + done.stderr
