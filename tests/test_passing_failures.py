"""A call that fails once says nothing of the file: a tree forgets it, and what was being done leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Filled
from mounts import eventually, put

from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError
from hydrafs.handles import OpenFile
from hydrafs.vfs import StoreTree
from hydrafs.writing import WritableTree

pytestmark = pytest.mark.usefixtures("caplog")  # every failure is logged

PATH = "/tuned.safetensors"
ERRNOS = [errno.EIO, errno.ENOLCK, errno.EINTR, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EROFS]


@pytest.fixture
def tree_of(at_end: contextlib.ExitStack) -> Callable[[Path], WritableTree]:
    def make(root: Path) -> WritableTree:
        tree = WritableTree(root, 64 << 20)
        tree.start()
        at_end.callback(tree.stop)
        return tree

    return make


class Failing:
    """Calls of ``os`` that fail on this thread while ``of`` is in force, where they are about a file that ends so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._local = threading.local()
        for name in ("open", "fstat", "pread", "getxattr", "close"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        readlink = os.readlink

        def call(what: Any, *arguments: Any, **more: Any) -> Any:
            wanted = getattr(self._local, "wanted", None)
            if wanted and wanted[0] == name and wanted[3]:
                place = str(what)
                if isinstance(what, int):
                    try:
                        place = readlink(f"/proc/self/fd/{what}")
                    except OSError:
                        place = ""
                if place.endswith(wanted[2]):
                    wanted[3] -= 1
                    if name == "close":
                        really(what)  # as Linux does
                    raise OSError(wanted[1], os.strerror(wanted[1]), place)
            return really(what, *arguments, **more)

        return call

    @contextlib.contextmanager
    def of(self, name: str, number: int, ending: str, times: int = 1_000) -> Iterator[list[Any]]:
        self._local.wanted = wanted = [name, number, ending, times]
        try:
            yield wanted
        finally:
            self._local.wanted = None


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


def whole(tree: StoreTree, path: str) -> bytes:
    """As the kernel opens and reads a file: it looks, opens, and where it is sent back does both once more."""
    for last in (False, True):
        size = tree.getattr(path).size
        try:
            with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
                return read(file, size + 1)
        except OSError as error:
            if error.errno != errno.ESTALE or last:
                raise
    raise AssertionError


def read(file: OpenFile, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    return bytes(out[: file.pread_into(0, memoryview(out))])


def open_files_below(folder: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(place for place in found if place.startswith(f"{folder}/") and "/.hydrafs/" not in place)


@pytest.mark.parametrize("call", ["open", "fstat", "pread", "getxattr"])
def test_a_diff_that_could_not_be_looked_at_once(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing, call: str
) -> None:
    """What was not known for a moment must not be told, nor refused, until the daemon is started again."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    tree.chmod(PATH, 0o640)
    tree.utimens(PATH, (1, 0), (1_700_000_000, 5))
    expected = tree.getattr(PATH)
    for number in ERRNOS:
        os.utime(filled.diff)  # another identity than any that is known
        with failing.of(call, number, SUFFIX) as wanted:
            with contextlib.suppress(OSError, HydraError):
                tree.getattr(PATH)
            assert wanted[3] < 1_000, "it was not asked for"
            with contextlib.suppress(OSError, HydraError):
                tree.getxattr(PATH, "user.hash.sha256")
        assert whole(tree, PATH) == filled.data, os.strerror(number)
        found = tree.getattr(PATH)
        assert (found.size, found.mode, found.mtime_ns) == (expected.size, expected.mode, expected.mtime_ns)
        assert tree.getxattr(PATH, "user.hydrafs.state") == b"dehydrated"
        assert tree.getxattr(PATH, "user.hash.sha256")


@pytest.mark.parametrize("call", ["fstat", "pread"])
def test_a_name_stays_listed_on_a_disk_that_fails(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing, call: str
) -> None:
    """Who cannot look a name up cannot remove it either."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    with failing.of(call, errno.EIO, SUFFIX):
        assert tree.getattr(PATH).size == filled.diff.stat().st_size
        assert tree.getxattr(PATH, "user.hydrafs.state") == b"damaged"


def test_who_has_a_model_open_is_told_no_other_size(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing
) -> None:
    """The kernel would cut what is being read to the size that it is told."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    tree.getattr(PATH)
    with contextlib.closing(tree.open(PATH, os.O_RDONLY)) as file:
        for number in ERRNOS:
            os.utime(filled.diff)
            with failing.of("pread", number, SUFFIX), contextlib.suppress(OSError, HydraError):
                assert tree.getattr(PATH).size == len(filled.data), os.strerror(number)
        assert read(file, len(filled.data)) == filled.data


def test_attributes_of_a_model_that_cannot_be_looked_at_are_not_set(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing
) -> None:
    """Set on the diff alone they would be lost, and told as done."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    for number in ERRNOS:
        os.utime(filled.diff)
        before = filled.diff.stat()
        with failing.of("pread", number, SUFFIX):
            for change in (lambda: tree.chmod(PATH, 0o600), lambda: tree.utimens(PATH, (1, 0), (1, 0))):
                with pytest.raises((OSError, HydraError)) as raised:
                    change()
                assert raised.value.errno in (number, errno.EIO)
        after = filled.diff.stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns), os.strerror(number)
    tree.chmod(PATH, 0o600)
    assert tree.getattr(PATH).mode & 0o777 == 0o600


@pytest.mark.parametrize("ending", [SUFFIX, "base.safetensors"])
def test_a_close_that_fails_leaves_nothing_open(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing, ending: str
) -> None:
    filled.dehydrate()
    tree = tree_of(filled.root)
    assert whole(tree, PATH) == filled.data
    tree.getattr(PATH)
    file = tree.open(PATH, os.O_RDONLY)
    with failing.of("close", errno.EIO, ending), contextlib.suppress(OSError):
        file.close()
    assert not tree.names.claims(PATH)
    assert eventually(lambda: not open_files_below(filled.root)), open_files_below(filled.root)
    file.close()
    assert whole(tree, PATH) == filled.data


@pytest.mark.parametrize("call", ["open", "fstat", "close"])
@pytest.mark.parametrize("after", range(6))
def test_a_write_that_fails_midway_leaves_all_as_it_was(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing, call: str, after: int
) -> None:
    """Everybody who has a model open becomes a reader of the plain file, or stays one of the diff, claim and all."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    whole(tree, PATH)
    tree.getattr(PATH)
    reader, writer = tree.open(PATH, os.O_RDONLY), tree.open(PATH, os.O_RDWR)
    really, count = getattr(os, call), 0

    def fail(what: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal count
        place = str(what)
        if isinstance(what, int):
            with contextlib.suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{what}")
        elif place.startswith("/proc/self/fd/"):
            with contextlib.suppress(OSError):
                place = os.readlink(place)
        if place.startswith(f"{filled.root}/tuned") or "/.hydrafs-" in place:
            count += 1
            if count == after + 1:
                if call == "close":
                    really(what)
                raise OSError(errno.EIO, os.strerror(errno.EIO), place)
        return really(what, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        with contextlib.suppress(OSError, HydraError):
            writer.pwrite(0, memoryview(filled.data[:4]))
    for file in (reader, writer):
        assert read(file, len(filled.data) + 1) == filled.data
        [claim] = [claim for claim in tree.names.claims(PATH) if claim.holder is file]
        found = os.fstat(file.fd)
        assert (claim.version.device, claim.version.inode) == (found.st_dev, found.st_ino)
        assert claim.writes is file.is_writable
        file.close()
    assert not tree.names.claims(PATH)
    assert whole(tree, PATH) == filled.data
    assert eventually(lambda: not open_files_below(filled.root)), open_files_below(filled.root)


def test_a_model_that_is_opened_all_the_time_while_its_file_changes(
    filled: Filled, tree_of: Callable[[Path], WritableTree], failing: Failing
) -> None:
    """Its content stays, and its file is another diff, or plain, again and again: nobody is sent back twice."""
    filled.dehydrate()
    tree = tree_of(filled.root)
    aside = filled.root.parent
    shutil.copyfile(filled.diff, aside / "diff")
    (aside / "plain").write_bytes(filled.data)
    ended, wrong = threading.Event(), list[str]()
    reads = [0] * 4

    def reads_it(number: int) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            call = chance.choice(["open", "fstat", "pread", "getxattr", "close"])
            if chance.random() < 0.2:
                about = chance.choice([SUFFIX, "tuned.safetensors"])
                with failing.of(call, chance.choice(ERRNOS), about, 1), contextlib.suppress(OSError, HydraError):
                    whole(tree, PATH)
                continue
            try:
                if whole(tree, PATH) != filled.data:
                    wrong.append("other bytes")
            except (OSError, HydraError) as error:
                wrong.append(f"{error!r}")
            reads[number] += 1

    threads = [threading.Thread(target=reads_it, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    plain = filled.root / "tuned.safetensors"
    for turn in range(40):
        if turn % 4 == 2:
            put(aside / "plain", plain)
        elif turn % 4 == 3:
            put(aside / "diff", filled.diff)
            plain.unlink()
        else:
            put(aside / "diff", filled.diff)
        before, deadline = list(reads), time.monotonic() + 30
        while any(now == then for now, then in zip(reads, before, strict=True)) and time.monotonic() < deadline:
            time.sleep(0.005)
    ended.set()
    for thread in threads:
        thread.join()
    assert min(reads) > 20
    assert not wrong, f"{len(wrong)} of {sum(reads)}: {sorted(set(wrong))}"
    assert not tree.names.claims(PATH)
