"""What is removed through a mount can be had back, and is in nobody's way: a write that needs the room gets it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Library, Mount, hydrafs

from hydrafs.writing import WritableTree

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]

MIB = 1 << 20


REMOVALS: dict[str, Callable[[Path], object]] = {
    "rm": os.unlink,
    "renamed over": lambda path: (path.with_name("new").write_bytes(b"new"), os.replace(path.with_name("new"), path)),
    "overwritten": lambda path: path.write_bytes(b"new"),
    "cat > it": lambda path: subprocess.run(["sh", "-c", 'echo new > "$0"', path], check=True),
    "truncated": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("how", REMOVALS)
def test_what_was_removed_through_a_mount_is_had_back(copied: Copied, mounted: Mounted, how: str) -> None:
    store = copied("base.safetensors", "half.safetensors")
    (store.root / "plain.safetensors").write_bytes(os.urandom(200_000))
    before = {name: (store.root / name).read_bytes() for name in ("plain.safetensors", "half.safetensors.hydra")}
    live = mounted(store)
    for name in ("plain.safetensors", "half.safetensors"):
        REMOVALS[how](live.path / name)
        if how != "rm":
            os.rename(live.path / name, live.path / f"other-{name}.txt")
        done = hydrafs("undelete", store.root, name)
        assert done.returncode == 0, done.stderr
    assert {name: (store.root / name).read_bytes() for name in before} == before
    assert (live.path / "half.safetensors").read_bytes() == store.originals["half.safetensors"].data


@pytest.fixture
def small_tree(tmp_path: Path) -> Iterator[WritableTree]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", root], check=True)
    try:
        (root / ".hydrafs").mkdir()
        (root / ".hydrafs" / "config.toml").write_text("[trash]\nshare = 1.0\n")
        tree = WritableTree(root, MIB)
        tree.start()
        try:
            yield tree
        finally:
            tree.stop()
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_write_that_finds_no_room_takes_that_of_the_trash(small_tree: WritableTree) -> None:
    tree = small_tree
    root = tree.store.root
    for name in ("a.safetensors", "b.safetensors"):
        (root / name).write_bytes(os.urandom(3 * MIB))
    for name in ("/a.safetensors", "/b.safetensors"):
        tree.unlink(name)
    assert len(list((root / ".hydrafs" / "trash").glob("*.safetensors"))) == 2
    real, shown = os.statvfs(root), tree.statfs("/")
    assert (shown.f_bavail - real.f_bavail) * real.f_frsize >= 6 * MIB
    opened = tree.create("/new.bin", os.O_RDWR, 0o644)
    block = memoryview(bytes(MIB))
    written = 0
    with pytest.raises(OSError) as caught:
        while True:
            written += opened.pwrite(written, block)
    assert caught.value.errno == errno.ENOSPC
    assert written > 19 * MIB  # more than there was beside the trash
    assert not list((root / ".hydrafs" / "trash").glob("*.safetensors"))
    opened.close()


def test_a_full_disk_is_a_full_disk(small_tree: WritableTree) -> None:
    tree = small_tree
    (tree.store.root / "fill").write_bytes(bytes(MIB))
    opened = tree.create("/new.bin", os.O_RDWR, 0o644)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            opened.allocate(0, 0, 64 * MIB)
        assert caught.value.errno == errno.ENOSPC
    opened.close()
