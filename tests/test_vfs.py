"""The tree that a mount shows, without a mount: names, attributes, opens, and what the kernel may keep."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import shutil
import stat
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from conftest import Filled, ModelMaker
from mounts import Library, eventually, put

from hydrafs import identity, opening
from hydrafs.attributes import Attributes, Entry
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile
from hydrafs.errors import CorruptDiff, HydraError, ParentChanged, ParentMissing
from hydrafs.layout import FileSource
from hydrafs.opening import HASHED_AT_OPEN_NBYTES
from hydrafs.store import Store, leads_into
from hydrafs.vfs import OpenFile, StoreTree

pytest_plugins = ["mounting_fixtures"]

MakeTree = Callable[[Path], StoreTree]


@pytest.fixture
def tree_of(at_end: contextlib.ExitStack) -> MakeTree:
    """A function that gives a started tree of a store."""

    def make(root: Path) -> StoreTree:
        tree = StoreTree(root, 64 << 20)
        tree.start()
        at_end.callback(tree.stop)
        return tree

    return make


@pytest.fixture
def tree(library: Library, tmp_path: Path, tree_of: MakeTree) -> StoreTree:
    """A tree of a copy of the library."""
    shutil.copytree(library.root, tmp_path / "library", symlinks=True, ignore=shutil.ignore_patterns(".hydrafs"))
    return tree_of(tmp_path / "library")


def names(tree: StoreTree, path: str = "/") -> set[str]:
    return {entry.name for entry in tree.readdir(path)}


def read(file: OpenFile, offset: int, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    return bytes(out[: file.pread_into(offset, memoryview(out))])


def whole(tree: StoreTree, path: str) -> bytes:
    """As the kernel opens and reads a file: it looks, opens, and where it is sent back does both once more."""
    for last in (False, True):
        size = tree.getattr(path).size
        try:
            with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
                return read(file, 0, size + 1)
        except OSError as error:
            if error.errno != errno.ESTALE or last:
                raise
    raise AssertionError


def errno_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def lasting(attributes: Attributes) -> Attributes:
    """All but the time of the last access, which reading changes."""
    return dataclasses.replace(attributes, atime_ns=0)


# Names


def test_a_listing_shows_models_where_diffs_stand(tree: StoreTree, library: Library) -> None:
    assert names(tree) == {
        *(name for name in library.originals if "/" not in name),
        *("loras", "more", "link.safetensors", "nothing in it"),
    }
    assert names(tree, "/loras") == {n.removeprefix("loras/") for n in library.originals if n.startswith("loras/")}
    assert names(tree, "/nothing in it") == set()


def test_a_listing_tells_types_and_inodes_as_stat_does(tree: StoreTree) -> None:
    for folder in ("/", "/loras/"):
        for entry in tree.readdir(folder):
            found = tree.getattr(folder + entry.name)
            assert (entry.mode, entry.ino) == (stat.S_IFMT(found.mode), found.ino), entry
    types = {entry.name: entry.mode for entry in tree.readdir("/")}
    assert types["loras"] == stat.S_IFDIR
    assert types["more"] == types["link.safetensors"] == stat.S_IFLNK
    assert types["tuned.ckpt"] == types["base.safetensors"] == stat.S_IFREG


@pytest.mark.logs("listed with its own size", "cannot open .tuned.ckpt")
def test_a_diff_that_may_not_be_read_is_listed(tree: StoreTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of which one file cannot be looked at looks broken to who lists it."""
    really_open = os.open

    def refuse(path: str, *arguments: int, **more: int) -> int:
        if str(path).endswith("tuned.ckpt.hydra"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert stat.S_ISREG(tree.getattr("/tuned.ckpt").mode)
    assert tree.getxattr("/tuned.ckpt", "user.hydrafs.state") == b"damaged"
    with pytest.raises(HydraError, match="Permission denied"):
        tree.open("/tuned.ckpt", os.O_RDONLY)


def test_a_diff_is_not_there_under_its_own_name(tree: StoreTree) -> None:
    for call in (tree.getattr, tree.listxattr, tree.readlink, lambda path: tree.open(path, os.O_RDONLY)):
        assert errno_of(call, "/tuned.safetensors.hydra") == errno.ENOENT


def test_a_plain_file_wins_over_its_diff(filled: Filled, tree_of: MakeTree) -> None:
    filled.dehydrate()
    filled.tuned.write_bytes(b"another file of that name")
    tree = tree_of(filled.root)
    assert sorted(e.name for e in tree.readdir("/")) == ["base.safetensors", "tuned.safetensors"]
    found = {e.name: e.ino for e in tree.readdir("/")}
    assert found["tuned.safetensors"] == filled.tuned.stat().st_ino
    assert tree.getattr("/tuned.safetensors").size == len(b"another file of that name")
    assert whole(tree, "/tuned.safetensors") == b"another file of that name"
    filled.tuned.unlink()
    assert whole(tree, "/tuned.safetensors") == filled.data


def test_private_names_are_nowhere(store: Path, tree_of: MakeTree) -> None:
    (store / "sub" / ".hydrafs").mkdir(parents=True)
    (store / "sub" / ".hydrafs" / "config.toml").touch()
    (store / ".hydrafs-tmp-0123").touch()
    (store / ".hydrafs-anything.hydra").touch()
    (store / ".hidden").touch()
    tree = tree_of(store)
    assert names(tree) == {"sub", ".hidden"}
    assert names(tree, "/sub") == set()
    for path in ("/.hydrafs", "/.hydrafs-tmp-0123", "/.hydrafs-anything", "/sub/.hydrafs/config.toml"):
        assert errno_of(tree.getattr, path) == errno.ENOENT
        assert errno_of(tree.open, path, os.O_RDONLY) == errno.ENOENT


def test_folders_and_links_may_be_called_anything(store: Path, tree_of: MakeTree) -> None:
    (store / "folder.hydra").mkdir()
    (store / "folder.hydra" / "inside").write_bytes(b"x")
    (store / "link.hydra").symlink_to("folder.hydra")
    (store / ".hydra").write_bytes(b"its name is the ending")
    os.mkfifo(store / "pipe")
    tree = tree_of(store)
    assert names(tree) == {"folder.hydra", "link.hydra", ".hydra", "pipe"}
    assert names(tree, "/folder.hydra") == {"inside"}
    assert whole(tree, "/.hydra") == b"its name is the ending"
    assert stat.S_ISFIFO(tree.getattr("/pipe").mode)
    assert errno_of(tree.getattr, "/folder") == errno.ENOENT


def test_links_point_where_they_point_in_the_store(tree: StoreTree) -> None:
    assert tree.readlink("/link.safetensors") == "tuned.safetensors"
    assert tree.readlink("/more") == "loras"
    assert stat.S_ISLNK(tree.getattr("/link.safetensors").mode)
    assert errno_of(tree.readlink, "/tuned.safetensors") == errno.EINVAL


def test_names_that_are_not_there(tree: StoreTree) -> None:
    assert errno_of(tree.getattr, "/absent") == errno.ENOENT
    assert errno_of(tree.readdir, "/absent") == errno.ENOENT
    assert errno_of(tree.readdir, "/tuned.safetensors") in (errno.ENOTDIR, errno.ENOENT)
    assert errno_of(tree.getattr, "/empty.txt/inside") == errno.ENOTDIR
    # With the ending it would be longer than any name may be, and so there is none.
    assert errno_of(tree.getattr, "/" + "n" * 255) == errno.ENOENT
    assert errno_of(tree.getattr, "/" + "n" * 256) == errno.ENAMETOOLONG


def test_names_that_are_no_text(filled: Filled, tree_of: MakeTree) -> None:
    filled.dehydrate()
    name = os.fsdecode(b"\xff\xfe [model], \\x.safetensors")
    filled.diff.rename(filled.root / (name + ".hydra"))
    tree = tree_of(filled.root)
    assert name in names(tree)
    assert whole(tree, "/" + name) == filled.data


@pytest.mark.parametrize(
    ("path", "leads"),
    [
        ("mount", True), ("mount/x", True), ("mount/../other", True), ("other", False), ("mountain", False),
        ("absent", False),
        ("to mount", True), ("to mount/x", True), ("by a detour", True), ("to other", False), ("loop", False),
        ("other/up", True), ("other/../other/./file", False),
    ],
)  # fmt: skip
def test_where_a_path_leads(tmp_path: Path, path: str, leads: bool) -> None:
    for folder in ("mount", "other", "mountain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "to mount").symlink_to(tmp_path / "mount")
    (tmp_path / "by a detour").symlink_to("other/../to mount/x")
    (tmp_path / "other" / "up").symlink_to("../mount")
    (tmp_path / "to other").symlink_to("other")
    (tmp_path / "loop").symlink_to("loop")
    root = tmp_path.resolve()
    assert leads_into(f"{root}/{path}", root / "mount") is leads


# Attributes


def test_stat_is_the_originals(tree: StoreTree, library: Library) -> None:
    for name in library.dehydrated():
        original, found = library.originals[name], tree.getattr("/" + name)
        assert (found.size, found.mode, found.mtime_ns) == (len(original.data), original.mode, original.mtime_ns), name
        assert (found.nlink, found.blocks) == (1, -(-found.size // 512))


def test_stat_of_what_passes_through_is_the_stores(tree: StoreTree, tmp_path: Path) -> None:
    for name in ("base.safetensors", "loras/brain.json", "empty.txt", "link.safetensors"):
        s, found = (tmp_path / "library" / name).lstat(), tree.getattr("/" + name)
        assert found == Attributes(
            s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, s.st_ino, found.atime_ns, s.st_mtime_ns,
            s.st_ctime_ns, s.st_blocks,
        )  # fmt: skip


def test_stat_is_the_same_after_a_restart(tree: StoreTree, tmp_path: Path, library: Library, tree_of: MakeTree) -> None:
    again = tree_of(tmp_path / "library")
    for name in [*library.originals, "", "loras"]:
        assert lasting(again.getattr("/" + name)) == lasting(tree.getattr("/" + name)), name


def test_statfs_is_the_stores_disk(tree: StoreTree, tmp_path: Path) -> None:
    found, wanted = tree.statfs("/tuned.safetensors"), os.statvfs(tmp_path / "library")
    assert (found.f_bsize, found.f_blocks, found.f_namemax) == (wanted.f_bsize, wanted.f_blocks, wanted.f_namemax)


def test_xattrs(tree: StoreTree, library: Library, tmp_path: Path) -> None:
    name = "half.safetensors"
    data = library.originals[name].data
    stored = (tmp_path / "library" / (name + ".hydra")).stat().st_size
    wanted = {
        "user.hash.sha256": library.originals[name].sha256,
        "user.hash.addnet_sha256": hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest(),
        "user.hash.blake3": blake3(data).hexdigest(),
        "user.hash.partial_sha256": hashlib.sha256(data[0x100000:0x110000]).hexdigest(),
        "user.hydrafs.state": "dehydrated",
        "user.hydrafs.stored_size": str(stored),
        "user.hydrafs.ratio": f"{stored / len(library.originals[name].data):.4f}",
        "user.hydrafs.parents": f"{library.originals['base.safetensors'].sha256} base.safetensors",
    }
    assert {n: tree.getxattr("/" + name, n).decode() for n in tree.listxattr("/" + name)} == wanted
    # Where it stands is answered and not listed, or every copy would carry it along.
    assert tree.getxattr("/" + name, "user.hydrafs.path") == os.fsencode(tmp_path / "library" / (name + ".hydra"))
    assert tree.getxattr("/loras", "user.hydrafs.path") == os.fsencode(tmp_path / "library" / "loras")
    assert tree.listxattr("/empty.txt") == ["user.hydrafs.state"]
    assert tree.getxattr("/empty.txt", "user.hydrafs.state") == b"plain"
    assert tree.listxattr("/loras") == []
    for path in ("/loras", "/empty.txt", "/" + name, "/link.safetensors"):
        assert errno_of(tree.getxattr, path, "user.absent") == errno.ENODATA
    assert errno_of(tree.getxattr, "/empty.txt", "user.hash.sha256") == errno.ENODATA
    whole(tree, "/" + name)
    # It was hashed as a parent, and is known from then on.
    assert (
        tree.getxattr("/base.safetensors", "user.hash.sha256").decode() == library.originals["base.safetensors"].sha256
    )


def test_xattrs_of_the_store_pass_through(filled: Filled, tree_of: MakeTree) -> None:
    try:
        os.setxattr(filled.base, "user.note", b"mine")
    except OSError as error:
        assert error.errno == errno.ENOTSUP
        # This disk keeps none; then none are shown, and asking for one fails as it does everywhere.
        assert errno_of(tree_of(filled.root).getxattr, "/base.safetensors", "user.note") == errno.ENODATA
        return
    filled.dehydrate()
    os.setxattr(filled.diff, "user.note", b"theirs")
    tree = tree_of(filled.root)
    assert tree.getxattr("/base.safetensors", "user.note") == b"mine"
    assert tree.getxattr("/tuned.safetensors", "user.note") == b"theirs"
    assert "user.note" in tree.listxattr("/tuned.safetensors")


# Folder times


def settle(folder: Path) -> None:
    """Put a folder's last change into the past, as it is for all but the busiest stores."""
    past = time.time_ns() - 10_000_000_000
    os.utime(folder, ns=(past, past))


def test_a_folders_mtime_follows_its_names_and_nothing_else(filled: Filled, tree_of: MakeTree) -> None:
    settle(filled.root)
    shown = []
    for _ in range(2):  # the second tree is a remount
        tree = tree_of(filled.root)
        shown.append(tree.getattr("/").mtime_ns)
    before = shown[0]
    filled.dehydrate()
    assert filled.root.stat().st_mtime_ns != before
    assert tree.getattr("/").mtime_ns == before, "the names are what they were"
    assert tree_of(filled.root).getattr("/").mtime_ns == before, "also after a remount"
    (filled.root / ".hydrafs-tmp-1").touch()
    put(filled.diff, filled.diff)
    assert tree.getattr("/").mtime_ns == before, "nothing that is listed came or went"
    (filled.root / "new.txt").touch()
    after = tree.getattr("/").mtime_ns
    assert after == filled.root.stat().st_mtime_ns != before
    (filled.root / "new.txt").unlink()
    assert tree.getattr("/").mtime_ns not in (before, after)
    last = tree.getattr("/").mtime_ns
    filled.diff.rename(filled.root / "renamed.safetensors.hydra")
    assert tree.getattr("/").mtime_ns != last


def test_changes_within_one_tick_of_the_clock_are_seen(store: Path, tree_of: MakeTree) -> None:
    tree = tree_of(store)
    seen = set()
    stamp = time.time_ns()
    for number in range(3):
        (store / f"{number}.txt").touch()
        # A coarse clock gives several changes one time; what was listed in between must not be kept for it.
        os.utime(store, ns=(stamp, stamp))
        assert names(tree) == {f"{n}.txt" for n in range(number + 1)}
        seen.add(tree.store.catalog.directory(store) if tree.getattr("/") else None)
    assert len(seen) == 3, "the names were looked at again each time"


# Opening and reading


def test_every_model_is_read_as_it_was(tree: StoreTree, library: Library) -> None:
    for name, original in library.originals.items():
        assert whole(tree, "/" + name) == original.data, name


def test_reads_of_any_range(tree: StoreTree, library: Library) -> None:
    data = library.originals["tuned.ckpt"].data
    generator = torch.Generator().manual_seed(1)
    with contextlib.closing(tree.open("/tuned.ckpt", os.O_RDONLY)) as file:
        for _ in range(300):
            offset = int(torch.randint(0, len(data) + 10, (), generator=generator))
            nbytes = int(
                torch.randint(0, 1 << int(torch.randint(1, 21, (), generator=generator)), (), generator=generator)
            )
            assert read(file, offset, nbytes) == data[offset : offset + nbytes], (offset, nbytes)


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_APPEND]
)
def test_nothing_is_opened_for_writing(tree: StoreTree, flags: int) -> None:
    for path in ("/tuned.safetensors", "/base.safetensors"):
        assert errno_of(tree.open, path, flags) == errno.EROFS


def refusal(tree: StoreTree, path: str, caplog: pytest.LogCaptureFixture) -> tuple[HydraError, str]:
    """What an open is refused with, and the line that it leaves in the log. The name stays listed, as it was."""
    before = tree.getattr(path)
    caplog.clear()
    with pytest.raises(HydraError) as caught:
        tree.open(path, os.O_RDONLY)
    assert caught.value.errno == errno.EIO
    assert path[1:] in names(tree)
    assert lasting(tree.getattr(path)) == lasting(before)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    line = record.getMessage()
    assert "\n" not in line
    assert path in line
    return caught.value, line


def test_a_missing_parent(filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    filled.dehydrate()
    tree = tree_of(filled.root)
    with DiffFile(filled.diff) as diff:
        digest = diff.manifest.parents[0].sha256.hex()
    filled.let_go()
    filled.base.rename(filled.root.parent / "elsewhere")
    error, line = refusal(tree, "/tuned.safetensors", caplog)
    assert isinstance(error, ParentMissing)
    for part in (str(filled.diff), "base.safetensors", digest, "put it back"):
        assert part in line
    (filled.root.parent / "elsewhere").rename(filled.base)
    assert eventually_opens(tree, "/tuned.safetensors") == filled.data


def eventually_opens(tree: StoreTree, path: str) -> bytes:
    """The file, once it can be opened: where a parent may be is looked up anew every few seconds."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return whole(tree, path)
        except HydraError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.parametrize("how", ["one bit", "another size"])
def test_a_changed_parent(filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture, how: str) -> None:
    filled.dehydrate()
    tree = tree_of(filled.root)
    assert whole(tree, "/tuned.safetensors") == filled.data
    content = bytearray(filled.base.read_bytes())
    times = filled.base.stat()
    if how == "one bit":
        content[len(content) // 2 + 1] ^= 1
    else:
        content += b"!"
    filled.base.write_bytes(content)
    os.utime(filled.base, ns=(times.st_atime_ns, times.st_mtime_ns))
    error, line = refusal(tree, "/tuned.safetensors", caplog)
    assert isinstance(error, ParentChanged if how == "one bit" else ParentMissing | ParentChanged)
    assert "base.safetensors" in line
    assert "put" in line


def test_a_damaged_diff_stays_listed(filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    filled.dehydrate()
    filled.diff.write_bytes(filled.diff.read_bytes()[:-10])
    tree = tree_of(filled.root)
    assert tree.getattr("/tuned.safetensors").size == filled.diff.stat().st_size
    assert tree.getxattr("/tuned.safetensors", "user.hydrafs.state") == b"damaged"
    error, line = refusal(tree, "/tuned.safetensors", caplog)
    assert isinstance(error, CorruptDiff)
    assert "backup" in line


def test_a_flipped_bit_fails_the_read_and_is_logged(
    filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    filled.dehydrate()
    with DiffFile(filled.diff) as diff:
        chunk = max(range(len(diff.chunk_nbytes)), key=lambda c: diff.chunk_nbytes[c])
        place = diff.chunk_offset[chunk] + diff.chunk_nbytes[chunk] // 2
    content = bytearray(filled.diff.read_bytes())
    content[place] ^= 4
    filled.diff.write_bytes(content)
    tree = tree_of(filled.root)
    with contextlib.closing(tree.open("/tuned.safetensors", os.O_RDONLY)) as file:
        failed = 0
        for offset in range(0, len(filled.data), 4096):
            try:
                assert read(file, offset, 4096) == filled.data[offset : offset + 4096]
            except CorruptDiff:
                failed += 1
    assert 0 < failed <= 2 * (32 << 10) // 4096, "a chunk fails, and no other"
    assert "/tuned.safetensors" in caplog.text
    assert f"chunk {chunk}" in caplog.text


# What the kernel may keep


def test_pages_are_kept_for_the_same_content_only(filled: Filled, tree_of: MakeTree) -> None:
    filled.dehydrate()
    tree = tree_of(filled.root)

    def opened_and_read() -> bool:
        with contextlib.closing(tree.open("/tuned.safetensors", os.O_RDONLY)) as file:
            read(file, 0, 10)
            return file.keep_cache

    assert not opened_and_read()
    assert opened_and_read()
    put(filled.diff, filled.diff)
    tree.getattr("/tuned.safetensors")
    assert opened_and_read(), "another file with the same content"
    kept = filled.root.parent / "kept"
    shutil.copy(filled.diff, kept)
    filled.diff.unlink()
    filled.tuned.write_bytes(bytes(len(filled.data)))
    tree.getattr("/tuned.safetensors")
    assert not opened_and_read()
    filled.tuned.unlink()
    put(kept, filled.diff)
    tree.getattr("/tuned.safetensors")
    assert not opened_and_read(), "what was read in between is another content"


def test_pages_are_kept_only_once_the_kernel_has_dropped_the_old_ones(filled: Filled, tree_of: MakeTree) -> None:
    filled.dehydrate()
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    # Of opens that are answered at the same time the kernel may take note of the last one first.
    with contextlib.closing(tree.open(path, 0)) as first, contextlib.closing(tree.open(path, 0)) as second:
        assert (first.keep_cache, second.keep_cache) == (False, False)
        read(second, 0, 1)
        with contextlib.closing(tree.open(path, 0)) as third:
            assert third.keep_cache


def test_a_plain_file_that_changed_in_place_keeps_no_pages(filled: Filled, tree_of: MakeTree) -> None:
    tree = tree_of(filled.root)
    for content in (b"one", b"two"):
        with filled.tuned.open("r+b") as file:
            file.write(content)
        tree.getattr("/tuned.safetensors")
        for kept in (False, True):
            with contextlib.closing(tree.open("/tuned.safetensors", os.O_RDONLY)) as opened:
                assert opened.keep_cache is kept
                assert read(opened, 0, 3) == content


def other_diff(models: ModelMaker, filled: Filled, dtype: str) -> tuple[Path, bytes]:
    """Another model's diff, to be put under the name of the first, and its bytes."""
    path = models.save(filled.root / "other.safetensors", models.tuned(dtype))
    data = path.read_bytes()
    with contextlib.closing(Store(filled.root, create=True)) as store:
        outcome = dehydrate(store, path, Options(jobs=2, bases=(filled.base,)), folder=filled.root.parent)
    assert outcome.diff
    return outcome.diff, data


def test_a_name_that_is_open_keeps_its_content(
    models: ModelMaker, filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    filled.dehydrate()
    other, data = other_diff(models, filled, "fp32")
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    before = tree.getattr(path)
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        put(other, filled.diff)
        assert lasting(tree.getattr(path)) == lasting(file.attributes()) == lasting(before)
        assert errno_of(tree.open, path, os.O_RDONLY) == errno.EBUSY
        assert "still open" in caplog.text
        assert read(file, 0, len(filled.data) + 1) == filled.data
    assert tree.getattr(path).size == len(data)
    assert whole(tree, path) == data


def test_a_diff_that_is_written_in_place_is_another_content_too(
    models: ModelMaker, filled: Filled, tree_of: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    filled.dehydrate()
    other, data = other_diff(models, filled, "bf16")
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    tree.getattr(path)
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        shutil.copyfile(other, filled.diff)
        assert errno_of(tree.open, path, os.O_RDONLY) == errno.EBUSY
        for offset in range(0, len(data), 4096):
            with contextlib.suppress(HydraError):
                assert read(file, offset, 4096) == filled.data[offset : offset + 4096]
    assert whole(tree, path) == data


def test_a_close_that_is_on_its_way_is_waited_for(models: ModelMaker, filled: Filled, tree_of: MakeTree) -> None:
    filled.dehydrate()
    other, data = other_diff(models, filled, "bf16")
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    file = tree.open(path, os.O_RDONLY)
    put(other, filled.diff)
    # close(2) returns before the filesystem hears of it.
    late = threading.Timer(0.02, file.close)
    late.start()
    try:
        assert whole(tree, path) == data
    finally:
        late.join()


def test_a_kernel_that_believes_another_size_is_sent_back(
    models: ModelMaker, filled: Filled, tree_of: MakeTree
) -> None:
    filled.dehydrate()
    other, data = other_diff(models, filled, "fp32")
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    assert tree.getattr(path).size == len(filled.data)
    put(other, filled.diff)
    # The kernel would ask for no more bytes than it believes there are, and give a part for the whole.
    assert errno_of(tree.open, path, os.O_RDONLY) == errno.ESTALE
    assert errno_of(tree.open, path, os.O_RDONLY) == errno.ESTALE
    assert tree.getattr(path).size == len(data)
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        assert read(file, 0, len(data)) == data


def test_a_plain_file_that_grows_all_the_time_can_be_opened(store: Path, tree_of: MakeTree) -> None:
    (store / "log.txt").write_bytes(b"1")
    tree = tree_of(store)
    for _ in range(20):
        tree.getattr("/log.txt")
        with (store / "log.txt").open("ab") as file:
            file.write(b"1")
        tree.open("/log.txt", os.O_RDONLY).close()


def test_dehydrating_a_model_that_is_open(filled: Filled, tree_of: MakeTree) -> None:
    tree = tree_of(filled.root)
    path = "/tuned.safetensors"
    before = tree.getattr(path)
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        filled.dehydrate()
        now = tree.getattr(path)
        assert (now.size, now.mode, now.mtime_ns, now.nlink) == (before.size, before.mode, before.mtime_ns, 1)
        assert whole(tree, path) == filled.data, "the same content: nobody has to close anything"
        assert read(file, 0, len(filled.data)) == filled.data
    after = tree.getattr(path)
    assert (after.size, after.mode, after.mtime_ns) == (before.size, before.mode, before.mtime_ns)


# What it costs


def test_metadata_decodes_nothing(tree: StoreTree, library: Library) -> None:
    for entry in tree.readdir("/"):
        path = "/" + entry.name
        tree.getattr(path)
        for name in tree.listxattr(path):
            tree.getxattr(path, name)
    tree.statfs("/")
    for name in library.dehydrated():
        tree.open("/" + name, os.O_RDONLY).close()
    assert tree.statistics().misses == 0


@pytest.mark.parametrize(
    ("name", "offset", "nbytes", "most"),
    [
        ("wide.safetensors", 0, 8, 1),
        ("wide.safetensors", 8, 500, 1),
        ("wide.safetensors", 0x100000, 64 << 10, 2),
        ("tuned.ckpt", -(8 << 10), 8 << 10, 4),
        ("loras/brain, \u00fcml\u00e4ut [1].safetensors", 0x40000, 16 << 10, 3),
    ],
)
def test_a_small_read_decodes_the_chunks_that_hold_it(
    tree: StoreTree, library: Library, name: str, offset: int, nbytes: int, most: int
) -> None:
    data = library.originals[name].data
    offset %= len(data)
    path = "/" + name
    with contextlib.closing(tree.opener.open_diff(library.diff(name))) as model:
        holding = model.chunks_between(offset, offset + nbytes)
        every = model.chunks_between(0, model.size)
    assert len(holding) <= most < len(every)
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        assert read(file, offset, nbytes) == data[offset : offset + nbytes]
    tree.pool.close()
    assert tree.statistics().misses <= len(holding)


def test_a_zips_directory_decodes_only_literals(tree: StoreTree, library: Library) -> None:
    path, data = "/deep.ckpt", library.originals["deep.ckpt"].data
    with contextlib.closing(tree.opener.open_diff(library.diff("deep.ckpt"))) as model:
        every = model.chunks_between(0, model.size)
        literal = [c for c in every if not model.manifest.sections[model.diff.table.chunk_section(c)[0]].dtype]

    class Tail(io.RawIOBase):
        """The model as a file object that reads no more than it is asked for."""

        position = 0

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset + (0, self.position, len(data))[whence]
            return self.position

        def tell(self) -> int:
            return self.position

        def read(self, nbytes: int = -1) -> bytes:
            got = read(file, self.position, len(data) if nbytes < 0 else nbytes)
            self.position += len(got)
            return got

    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        assert len(zipfile.ZipFile(Tail()).namelist()) > 1100
        assert 0 < tree.statistics().misses <= len(literal) < len(every)


def test_stopping_does_not_wait_for_a_large_parent(
    models: ModelMaker, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = torch.zeros(4 * HASHED_AT_OPEN_NBYTES, dtype=torch.uint8)
    base = models.save(store / "base.safetensors", {**models.base("fp16"), "padding": padding})
    path = models.save(store / "tuned.safetensors", models.tuned("fp16"))
    with contextlib.closing(Store(store, create=True)) as opened:
        assert dehydrate(opened, path, Options(jobs=2, bases=(base,))).original_removed
    shutil.rmtree(store / ".hydrafs")
    hashed = []

    def watched(source: FileSource, progress: Callable[[int], None]) -> bytes:
        def report(nbytes: int) -> None:
            hashed.append(nbytes)
            progress(nbytes)

        return identity.sha256(source, report)

    monkeypatch.setattr(opening, "sha256", watched)
    tree = StoreTree(store, 1 << 20)
    tree.start()
    tree.open("/tuned.safetensors", os.O_RDONLY).close()
    assert eventually(lambda: hashed)
    tree.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("hydrafs-")]
    assert 0 < sum(hashed) < base.stat().st_size


def test_a_tree_leaves_no_file_open(library: Library, tmp_path: Path) -> None:
    shutil.copytree(library.root, tmp_path / "library", symlinks=True, ignore=shutil.ignore_patterns(".hydrafs"))
    before = set(os.listdir("/proc/self/fd"))
    tree = StoreTree(tmp_path / "library", 64 << 20)
    tree.start()
    for name in library.originals:
        whole(tree, "/" + name)
        assert tree.getattr("/" + name)
    assert Entry("loras", stat.S_IFDIR, tree.getattr("/loras").ino) in tree.readdir("/")
    tree.stop()
    assert set(os.listdir("/proc/self/fd")) == before
