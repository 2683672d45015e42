"""Real mounts of real stores, by the real command line, through both bindings."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from mounts import BELIEVED_SECONDS, Library, Mount, Original, eventually, hydrafs, is_mounted, put, sha256_of

import hydrafs as package
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile
from hydrafs.mountpoints import all_mounts, unmount
from hydrafs.opening import HASHED_AT_OPEN_NBYTES
from hydrafs.store import Store

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Mounted = Callable[..., Mount]
Copied = Callable[..., Library]
ROOT = Path(package.__file__).parent.parent


def errno_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


# What is read


def test_every_model_has_the_sha256_of_its_original(live: Mount) -> None:
    for name, original in live.library.originals.items():
        assert sha256_of(live.path / name) == original.sha256, name


def test_a_listing_is_the_store_before_it_was_dehydrated(live: Mount) -> None:
    listed = {
        os.path.relpath(os.path.join(folder, name), live.path)
        for folder, _, files in os.walk(live.path)
        for name in files
    }
    assert listed == {*live.library.originals, "link.safetensors"}
    followed = [name for _, _, files in os.walk(live.path, followlinks=True) for name in files]
    assert followed.count("brain.json") == 2
    assert os.readlink(live.path / "more") == "loras"
    assert (live.path / "link.safetensors").read_bytes() == live.library.originals["tuned.safetensors"].data


def test_stat_is_the_originals(live: Mount) -> None:
    for name, original in live.library.originals.items():
        with (live.path / name).open("rb") as file:
            for found in (os.stat(live.path / name), os.fstat(file.fileno())):
                facts = (found.st_size, found.st_mode, found.st_mtime_ns)
                assert facts == (len(original.data), original.mode, original.mtime_ns), name


def test_reads_of_any_offset_and_length(live: Mount) -> None:
    generator = random.Random(5)
    for name in ("wide.safetensors", "tuned.ckpt", "legacy.pt", "base.safetensors"):
        data = live.library.originals[name].data
        with (live.path / name).open("rb", buffering=0) as file:
            for _ in range(150):
                offset = generator.randrange(len(data) + 100)
                nbytes = generator.randrange(1 << generator.randrange(1, 23))
                assert os.pread(file.fileno(), nbytes, offset) == data[offset : offset + nbytes], (name, offset, nbytes)


def test_no_read_is_short_but_at_the_end(live: Mount) -> None:
    data = live.library.originals["wide.safetensors"].data
    with (live.path / "wide.safetensors").open("rb", buffering=0) as file:
        for nbytes in (1, 4095, 128 << 10, (1 << 20) + 1, (3 << 20) + 7, 16 << 20):
            for offset in (0, 1, 4096, (1 << 20) - 1, len(data) - nbytes):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                out = bytearray(nbytes)
                assert os.preadv(file.fileno(), [out], offset) == nbytes
                assert out == data[offset : offset + nbytes]
        assert os.preadv(file.fileno(), [bytearray(100)], len(data) - 40) == 40
        assert os.preadv(file.fileno(), [bytearray(100)], len(data)) == 0
        assert os.preadv(file.fileno(), [bytearray(100)], len(data) + 5000) == 0


def test_reads_past_the_kernels_cache(live: Mount) -> None:
    data = live.library.originals["wide.safetensors"].data
    descriptor = os.open(live.path / "wide.safetensors", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4 << 20) as aligned:
            assert os.preadv(descriptor, [aligned], 2 << 20) == 4 << 20
            assert aligned[:] == data[2 << 20 : 6 << 20]
            end = len(data) // 4096 * 4096
            assert os.preadv(descriptor, [aligned], end) == len(data) - end
    finally:
        os.close(descriptor)


def test_mapped_shared_and_private(live: Mount) -> None:
    for name in ("wide.safetensors", "tuned.safetensors"):
        data = live.library.originals[name].data
        with (live.path / name).open("rb") as file:
            with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as shared:
                assert shared[:] == data
            with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
                # As torch maps a model: what is written stays in this process.
                private[4096:4100] = b"MINE"
                assert private[:] == data[:4096] + b"MINE" + data[4100:]
        assert sha256_of(live.path / name) == live.library.originals[name].sha256


def test_mapped_reads_that_jump(live: Mount) -> None:
    data = live.library.originals["wide.safetensors"].data
    generator = random.Random(6)
    with (
        (live.path / "wide.safetensors").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(400):
            place = generator.randrange(len(data) - 16)
            assert mapped[place : place + 16] == data[place : place + 16]


def test_eight_threads_that_drop_what_they_read(live: Mount) -> None:
    data = live.library.originals["wide.safetensors"].data
    step = 2 << 20
    with (live.path / "wide.safetensors").open("rb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            parts = list(pool.map(lambda offset: os.pread(file.fileno(), step, offset), range(0, len(data), step)))
            assert b"".join(parts) == data
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_all_models_at_once(live: Mount) -> None:
    names = list(live.library.originals) * 3
    with ThreadPoolExecutor(12) as pool:
        for name, found in zip(names, pool.map(lambda name: sha256_of(live.path / name), names), strict=True):
            assert found == live.library.originals[name].sha256, name


def test_a_model_has_no_holes(live: Mount) -> None:
    with (live.path / "half.safetensors").open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size


WRITES: dict[str, Callable[[Path], object]] = {
    "create": lambda point: (point / "made").touch(),
    "write": lambda point: os.open(point / "tuned.safetensors", os.O_RDWR),
    "write plain": lambda point: os.open(point / "base.safetensors", os.O_WRONLY),
    "append": lambda point: os.open(point / "empty.txt", os.O_WRONLY | os.O_APPEND),
    "truncate": lambda point: os.truncate(point / "tuned.safetensors", 1),
    "open truncating": lambda point: os.open(point / "tuned.safetensors", os.O_RDWR | os.O_TRUNC),
    "mkdir": lambda point: os.mkdir(point / "made"),
    "rmdir": lambda point: os.rmdir(point / "nothing in it"),
    "unlink": lambda point: os.unlink(point / "tuned.safetensors"),
    "rename": lambda point: os.rename(point / "tuned.safetensors", point / "made"),
    "link": lambda point: os.link(point / "tuned.safetensors", point / "made"),
    "symlink": lambda point: os.symlink("tuned.safetensors", point / "made"),
    "chmod": lambda point: os.chmod(point / "tuned.safetensors", 0o600),
    "chown": lambda point: os.chown(point / "tuned.safetensors", 1, 1),
    "utime": lambda point: os.utime(point / "tuned.safetensors", (1, 1)),
    "setxattr": lambda point: os.setxattr(point / "tuned.safetensors", "user.x", b"v"),
    "removexattr": lambda point: os.removexattr(point / "tuned.safetensors", "user.hash.sha256"),
}


def test_every_write_is_refused_where_it_is_to_be_read_only(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "tuned.safetensors")
    (store.root / "empty.txt").touch()
    (store.root / "nothing in it").mkdir()
    live = mounted(store, "--read-only")
    assert {"ro", "nosuid", "nodev"} <= {o for m in all_mounts() if m.mountpoint == live.path for o in m.options}
    before = sorted(os.walk(live.root))
    assert {name: errno_of(write, live.path) for name, write in WRITES.items()} == dict.fromkeys(WRITES, errno.EROFS)
    assert sorted(os.walk(live.root)) == before


def test_xattrs(live: Mount) -> None:
    path, original = live.path / "tuned.ckpt", live.library.originals["tuned.ckpt"]
    assert os.getxattr(path, "user.hash.sha256").decode() == original.sha256
    assert os.getxattr(path, "user.hydrafs.state") == b"dehydrated"
    assert os.getxattr(path, "user.hydrafs.path") == os.fsencode(live.root / "tuned.ckpt.hydra")
    assert os.getxattr(path, "user.hydrafs.parents").decode().endswith(" base.safetensors")
    assert {"user.hash.sha256", "user.hydrafs.stored_size", "user.hydrafs.ratio"} < set(os.listxattr(path))
    assert "user.hydrafs.path" not in os.listxattr(path)
    for name in ("user.absent", "security.capability", "system.posix_acl_access"):
        assert errno_of(os.getxattr, path, name) == errno.ENODATA


def test_what_the_kernels_table_says(live: Mount) -> None:
    (found,) = [mount for mount in all_mounts() if mount.mountpoint == live.path]
    assert found.fstype == "fuse.hydrafs"
    # A source that looks like a device has ComfyUI take the mount for a fast disk.
    assert found.source == "hydrafs:store"
    assert {"rw", "nosuid", "nodev"} <= set(found.options)


def test_the_daemon_needs_no_torch(live: Mount) -> None:
    for name in live.library.originals:
        sha256_of(live.path / name)
    loaded = Path(f"/proc/{live.pid}/maps").read_text()
    assert "numpy" in loaded
    assert "torch" not in loaded


def test_the_daemon_leaves_no_file_open(live: Mount) -> None:
    for name in live.library.originals:
        sha256_of(live.path / name)

    def still_open() -> list[str]:
        links = []
        for fd in Path(f"/proc/{live.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(fd))
        return [link for link in links if link.startswith(f"{live.root}/") and "/.hydrafs/" not in link]

    assert eventually(lambda: not still_open()), still_open()


# A store that changes


@pytest.fixture
def replaceable(copied: Copied, models: ModelMaker, tmp_path: Path) -> tuple[Library, Path, Original]:
    """A store with ``half.safetensors``, and a diff of another model of the same size and mtime."""
    library = copied("base.safetensors", "half.safetensors")
    before = library.originals["half.safetensors"]
    halfway = {
        k: ((a + b) / 2).to(a.dtype) for (k, a), b in zip(models.base().items(), models.tuned().values(), strict=True)
    }
    path = models.save(tmp_path / "aside" / "half.safetensors", ModelMaker.cast(halfway, "fp16"))
    path.chmod(before.mode & 0o777)
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns))
    other = Original(path.read_bytes(), before.mode, before.mtime_ns)
    assert len(other.data) == len(before.data)
    assert other.data != before.data
    with contextlib.closing(Store(library.root, create=True)) as store:
        outcome = dehydrate(store, path, Options(jobs=2, bases=(library.root / "base.safetensors",)))
    assert outcome.diff
    return library, outcome.diff, other


def test_a_model_replaced_by_one_of_the_same_size_and_mtime(
    replaceable: tuple[Library, Path, Original], mounted: Mounted
) -> None:
    library, other_diff, other = replaceable
    live = mounted(library)
    path, diff = live.path / "half.safetensors", library.diff("half.safetensors")
    first = diff.with_name(".hydrafs-first")
    os.link(diff, first)
    stamp = diff.stat().st_mtime_ns
    for wanted, source in ((library.originals["half.safetensors"], first), (other, other_diff)) * 3:
        put(source, diff, mtime_ns=stamp)
        with path.open("rb") as file:
            assert file.read() == wanted.data
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == wanted.data
        assert path.stat().st_mtime_ns == wanted.mtime_ns


def test_a_model_replaced_by_one_of_another_size(copied: Copied, mounted: Mounted) -> None:
    library = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(library)
    path, diff = live.path / "half.safetensors", library.diff("half.safetensors")
    kept = {name: diff.with_name(f".hydrafs-{name}") for name in ("half.safetensors", "tuned.safetensors")}
    for name, target in kept.items():
        os.link(library.diff(name), target)
    # At once, while the kernel still believes the old size: a longer file must not be cut, nor a shorter one filled up.
    for name in [*kept, *kept, *kept]:
        put(kept[name], diff)
        assert path.read_bytes() == library.originals[name].data
        assert path.stat().st_size == len(library.originals[name].data)
    plain = library.root / "plain.bin"
    for content in (b"short", b"longer than that", b"x"):
        plain.with_name(".hydrafs-plain").write_bytes(content)
        plain.with_name(".hydrafs-plain").rename(plain)
        assert (live.path / "plain.bin").read_bytes() == content


def test_a_close_on_its_way_keeps_nobody_from_the_next_content(copied: Copied, mounted: Mounted) -> None:
    library = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(library)
    diff = library.diff("half.safetensors")
    kept = diff.with_name(".hydrafs-kept")
    os.link(diff, kept)
    for number in range(60):
        put(library.diff("tuned.safetensors") if number % 2 else kept, diff)
        with (live.path / "half.safetensors").open("rb") as file:
            file.read(10)


def test_a_model_replaced_while_it_is_open(replaceable: tuple[Library, Path, Original], mounted: Mounted) -> None:
    library, other_diff, other = replaceable
    live = mounted(library)
    path, before = live.path / "half.safetensors", library.originals["half.safetensors"]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:100] == before.data[:100]
        put(other_diff, library.diff("half.safetensors"))
        assert errno_of(path.open, "rb") == errno.EBUSY
        live.logged("ERROR", "half.safetensors", "still open")
        assert os.pread(file.fileno(), len(before.data), 0) == mapped[:] == before.data
    assert path.read_bytes() == other.data


def test_models_come_and_go_without_a_remount(copied: Copied, mounted: Mounted, library: Library) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)
    original = library.originals["tuned.safetensors"]
    added, renamed = live.path / "tuned.safetensors", live.path / "renamed.safetensors"
    assert not added.exists()
    put(library.diff("tuned.safetensors"), store.diff("tuned.safetensors"))
    # At once, though somebody asked for the name when it was not there.
    assert sha256_of(added) == original.sha256
    assert "tuned.safetensors" in os.listdir(live.path)
    store.diff("tuned.safetensors").rename(store.diff("renamed.safetensors"))
    assert sorted(os.listdir(live.path)) == ["base.safetensors", "half.safetensors", "renamed.safetensors"]
    assert sha256_of(renamed) == original.sha256
    assert errno_of(added.open, "rb") == errno.ENOENT
    time.sleep(BELIEVED_SECONDS)
    assert not added.exists()
    store.diff("renamed.safetensors").unlink()
    assert sorted(os.listdir(live.path)) == ["base.safetensors", "half.safetensors"]
    assert errno_of(renamed.open, "rb") == errno.ENOENT
    time.sleep(BELIEVED_SECONDS)
    assert not renamed.exists()


def test_dehydrating_in_a_mounted_store(copied: Copied, mounted: Mounted, models: ModelMaker) -> None:
    store = copied("base.safetensors")
    path = models.save(store.root / "new.safetensors", models.tuned("fp16"))
    past = time.time_ns() - 5_000_000_000
    os.utime(store.root, ns=(past, past))
    os.utime(path, ns=(past, past + 123))
    data, before = path.read_bytes(), path.stat()
    live = mounted(store)
    folder = live.path.stat().st_mtime_ns
    with (live.path / "new.safetensors").open("rb") as file:
        assert file.read(100) == data[:100]
        done = hydrafs("dehydrate", live.path / "new.safetensors")
        assert done.returncode == 0, done.stderr
        assert not path.exists()
        assert file.read() == data[100:]
        assert sha256_of(live.path / "new.safetensors") == sha256_of(live.path / "new.safetensors")
    time.sleep(BELIEVED_SECONDS)
    after = (live.path / "new.safetensors").stat()
    facts = (after.st_size, after.st_mode, after.st_mtime_ns)
    assert facts == (before.st_size, before.st_mode, before.st_mtime_ns)
    assert (live.path / "new.safetensors").read_bytes() == data
    assert os.getxattr(live.path / "new.safetensors", "user.hydrafs.state") == b"dehydrated"
    assert live.path.stat().st_mtime_ns == folder, "the names are what they were"
    (store.root / "one more").touch()
    time.sleep(BELIEVED_SECONDS)
    assert live.path.stat().st_mtime_ns != folder


def test_a_remount_changes_nothing(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.ckpt")
    seen = []
    for _ in range(2):
        live = mounted(store)
        walked = [live.path, *sorted(live.path.iterdir())]
        stats = [path.stat() for path in walked]
        seen.append([(s.st_ino, s.st_size, s.st_mode, s.st_mtime_ns, s.st_uid, s.st_gid) for s in stats])
        live.down()
        assert list(live.path.iterdir()) == []
    assert seen[0] == seen[1]


# What cannot be served


def test_a_missing_parent_is_named_at_open(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    base, original = store.root / "base.safetensors", store.originals["half.safetensors"]
    base.rename(store.root.parent / "elsewhere")
    live = mounted(store)
    path = live.path / "half.safetensors"
    assert errno_of(path.open, "rb") == errno.EIO
    assert os.listdir(live.path) == ["half.safetensors"]
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(original.data), original.mtime_ns)
    assert os.getxattr(path, "user.hash.sha256").decode() == original.sha256
    digest = store.originals["base.safetensors"].sha256
    live.logged(
        "ERROR", "/half.safetensors", str(store.diff("half.safetensors")), "base.safetensors", digest, "put it back"
    )
    assert len(live.log()) == 1, "one line for one failure"
    (store.root.parent / "elsewhere").rename(base)

    def opens() -> bool:
        with contextlib.suppress(OSError):
            return path.read_bytes() == original.data
        return False

    assert eventually(opens), "it can be read once the parent is back"


def test_a_changed_parent_is_named_at_open(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    base = store.root / "base.safetensors"
    live = mounted(store)
    path = live.path / "half.safetensors"
    assert sha256_of(path) == store.originals["half.safetensors"].sha256
    before = base.stat()
    with base.open("r+b") as file:
        file.seek(700_001)
        byte = file.read(1)[0]
        file.seek(700_001)
        file.write(bytes([byte ^ 1]))
    os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert errno_of(path.open, "rb") == errno.EIO
    assert path.exists()
    digest = store.originals["base.safetensors"].sha256
    live.logged("ERROR", "/half.safetensors", "base.safetensors has changed|has changed", digest, "put the original")


def flip(diff: Path) -> None:
    """One bit of the largest stored chunk."""
    with DiffFile(diff) as opened:
        chunk = max(range(len(opened.chunk_nbytes)), key=lambda c: opened.chunk_nbytes[c])
        place = opened.chunk_offset[chunk] + opened.chunk_nbytes[chunk] // 3
    content = bytearray(diff.read_bytes())
    content[place] ^= 0x10
    diff.write_bytes(content)


def test_a_flipped_bit_fails_a_read_and_never_gives_other_bytes(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    flip(store.diff("half.safetensors"))
    live = mounted(store)
    data = store.originals["half.safetensors"].data
    failed = 0
    with (live.path / "half.safetensors").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, len(data), 4096):
            try:
                assert os.pread(file.fileno(), 4096, offset) == data[offset : offset + 4096]
            except OSError as error:
                assert error.errno == errno.EIO
                failed += 1
    assert failed
    live.logged("ERROR", "/half.safetensors", "chunk")
    # Through a mapping the same read ends the process: there is no other way to tell it.
    script = "import mmap, sys; f = open(sys.argv[1], 'rb'); sum(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])"
    done = subprocess.run([sys.executable, "-c", script, live.path / "half.safetensors"], check=False)
    assert done.returncode == -signal.SIGBUS
    assert sha256_of(live.path / "tuned.safetensors") == store.originals["tuned.safetensors"].sha256


@pytest.fixture
def large_parent(models: ModelMaker, tmp_path: Path) -> Library:
    """A store whose base is too large to be hashed at an open, and of which nothing is known but its files."""
    root = tmp_path / "large"
    root.mkdir()
    padding = torch.zeros(HASHED_AT_OPEN_NBYTES, dtype=torch.uint8)
    models.save(root / "base.safetensors", {**models.base("fp16"), "padding": padding})
    path = models.save(root / "tuned.safetensors", models.tuned("fp16"))
    original = Original(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    with contextlib.closing(Store(root, create=True)) as store:
        assert dehydrate(store, path, Options(jobs=2, bases=(root / "base.safetensors",))).original_removed
    shutil.rmtree(root / ".hydrafs")
    return Library(root, {"tuned.safetensors": original})


def test_a_large_parent_is_proved_in_the_background(large_parent: Library, mounted: Mounted) -> None:
    live = mounted(large_parent)
    original = large_parent.originals["tuned.safetensors"]
    base = live.path / "base.safetensors"
    assert errno_of(os.getxattr, base, "user.hash.sha256") == errno.ENODATA
    assert sha256_of(live.path / "tuned.safetensors") == original.sha256, "checksums guard it meanwhile"
    assert eventually(lambda: "user.hash.sha256" in os.listxattr(base))
    assert os.getxattr(base, "user.hash.sha256").decode() == sha256_of(large_parent.root / "base.safetensors")
    assert sha256_of(live.path / "tuned.safetensors") == original.sha256


def test_a_large_parent_that_changed_is_found_out_in_the_background(large_parent: Library, mounted: Mounted) -> None:
    with (large_parent.root / "base.safetensors").open("r+b") as file:
        # Between the blocks that are looked at before an open: only the SHA-256 and the checksums can tell.
        file.seek(-(100 << 10), os.SEEK_END)
        before = file.read(64)
        file.seek(-(100 << 10), os.SEEK_END)
        file.write(bytes(b ^ 1 for b in before))
    live = mounted(large_parent)
    path, data = live.path / "tuned.safetensors", large_parent.originals["tuned.safetensors"].data
    with contextlib.suppress(OSError):
        assert path.read_bytes() == data
    live.logged("ERROR", "the parent base.safetensors", "has changed", "restore it")
    assert eventually(lambda: _refused(path)), "refused at open from then on"
    live.logged("ERROR", "/tuned.safetensors", "has changed")
    live.may_log("an open file")


def _refused(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError as error:
        return error.errno == errno.EIO
    return False


# The way up and down


def test_others_are_let_in_only_by_the_modes(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors", "half.safetensors"), "-o", "allow_other")
    (found,) = [mount for mount in all_mounts() if mount.mountpoint == live.path]
    assert {"allow_other", "default_permissions", "nosuid", "nodev"} <= set(found.options)


def test_the_command_returns_when_the_mount_answers(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)  # asks nothing itself
    assert os.listdir(live.path)
    assert live.path.stat().st_dev != live.path.parent.stat().st_dev
    assert os.readlink(f"/proc/{live.pid}/cwd") == "/"
    assert os.getsid(live.pid) != os.getsid(0)


def test_a_dead_mount_is_an_error_and_not_an_empty_folder(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)
    live.kill()
    assert errno_of(os.listdir, live.path) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert is_mounted(live.path)
    live.up(warning="the daemon of this mount is dead, unmounting")
    assert sha256_of(live.path / "half.safetensors") == store.originals["half.safetensors"].sha256
    assert [mount.mountpoint for mount in all_mounts()].count(live.path) == 1
    live.kill()
    live.down_dead()
    assert os.listdir(live.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_daemon_unmounts(copied: Copied, mounted: Mounted, number: int) -> None:
    live = mounted(copied("base.safetensors", "half.safetensors"))
    descriptor = os.open(live.path / "half.safetensors", os.O_RDONLY)
    try:
        assert os.pread(descriptor, 8, 0)
        os.kill(live.pid, number)
        live.end()
    finally:
        with contextlib.suppress(OSError):  # nobody is there any more who could be told
            os.close(descriptor)
    assert not is_mounted(live.path)
    assert os.listdir(live.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_foreground_ends_cleanly(copied: Copied, binding: str, tmp_path: Path, number: int) -> None:
    store, point = copied("base.safetensors", "half.safetensors"), tmp_path / "point"
    point.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-m", "hydrafs", "mount", store.root, point, "--foreground"],
        env={**os.environ, "HYDRAFS_FUSE": binding},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert eventually(lambda: is_mounted(point))
        assert sha256_of(point / "half.safetensors") == store.originals["half.safetensors"].sha256
        child.send_signal(number)
        output, lines = child.communicate(timeout=30)
        assert (child.returncode, output) == (0, "")
        assert [": INFO: " in line for line in lines.splitlines()] == [True, True], "mounted, unmounted"
        assert not is_mounted(point)
    finally:
        child.kill()
        child.wait()
        while is_mounted(point):
            unmount(point, lazy=True)


def test_umount_says_what_keeps_it(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors", "half.safetensors"))
    with (live.path / "half.safetensors").open("rb") as file:
        done = hydrafs("umount", live.path)
        assert done.returncode == 11
        assert "--lazy" in done.stderr
        assert hydrafs("umount", "--lazy", live.path).returncode == 0
        assert not is_mounted(live.path)
        assert len(file.read()) == len(live.library.originals["half.safetensors"].data), (
            "what is open is read to its end"
        )
    live.end()
    done = hydrafs("umount", live.path)
    assert done.returncode == 3
    assert one_line(done.stderr)


def one_line(text: str) -> bool:
    return text.startswith("hydrafs: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture
def refuses(binding: str, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that mounts, wants one line and an exit code, and gives the line; nothing may be mounted then."""

    def refuse(code: int, *arguments: str | os.PathLike[str], **environment: str) -> str:
        done = hydrafs("mount", *arguments, **{"HYDRAFS_FUSE": binding, **environment})
        assert (done.returncode, done.stdout) == (code, ""), done
        assert one_line(done.stderr), done.stderr
        return done.stderr

    yield refuse
    assert not [mount for mount in all_mounts() if mount.mountpoint.is_relative_to(tmp_path)]


def test_a_bad_mountpoint_is_refused(copied: Copied, refuses: Callable[..., str], tmp_path: Path) -> None:
    store = copied("base.safetensors", "half.safetensors").root
    point = tmp_path / "point"
    assert "mkdir -p" in refuses(3, store, point)
    point.mkdir()
    (point / "file").touch()
    assert "not empty" in refuses(11, store, point)
    assert "no directory" in refuses(3, store, point / "file")
    assert "in use" in refuses(11, store, "/proc")
    (store / "inside").mkdir()
    assert "inside the store" in refuses(2, store, store / "inside")
    assert "hide" in refuses(2, store, tmp_path)
    (tmp_path / "link").symlink_to(store / "inside")
    assert "inside the store" in refuses(2, store, tmp_path / "link")
    assert os.listdir(store / "inside") == []


def test_a_base_folder_under_the_mountpoint_is_refused(
    copied: Copied, refuses: Callable[..., str], tmp_path: Path
) -> None:
    store = copied("base.safetensors", "half.safetensors").root
    bases = tmp_path / "point" / "bases"
    bases.mkdir(parents=True)
    with contextlib.closing(Store(store, create=True)) as opened:
        opened.add_base_folder(bases)
    line = refuses(2, store, tmp_path / "point", "-o", "nonempty")
    assert str(bases) in line
    assert "hide" in line
    assert str(bases) in refuses(2, store, bases)


def test_a_bad_store_or_option_is_refused(copied: Copied, refuses: Callable[..., str], tmp_path: Path) -> None:
    store, point = copied("base.safetensors").root, tmp_path / "point"
    point.mkdir()
    assert "absent" in refuses(3, tmp_path / "absent", point)
    assert "folder" in refuses(2, store / "base.safetensors", point)
    assert "unknown mount option" in refuses(2, store, point, "-o", "no_such_option")
    assert "not a size" in refuses(2, store, point, "--cache-size", "much")
    assert "HYDRAFS_FUSE" in refuses(11, store, point, HYDRAFS_FUSE="macfuse")
    (store / ".hydrafs").mkdir(exist_ok=True)
    (store / ".hydrafs" / "config.toml").write_text("base_folders = [")
    assert "config.toml" in refuses(2, store, point)


def test_a_busy_mountpoint_is_refused(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors", "half.safetensors"))
    done = hydrafs("mount", live.root, live.path, HYDRAFS_FUSE=live.binding)
    assert done.returncode == 11
    assert one_line(done.stderr)
    assert "hydrafs umount" in done.stderr
    assert sha256_of(live.path / "half.safetensors") == live.library.originals["half.safetensors"].sha256
    live.down()


def test_mount_py_is_the_same(copied: Copied, binding: str, tmp_path: Path) -> None:
    store, point = copied("base.safetensors", "half.safetensors"), tmp_path / "point"
    point.mkdir()
    environment = {**os.environ, "HYDRAFS_FUSE": binding}
    command = [sys.executable, ROOT / "mount.py", store.root, point]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert sha256_of(point / "half.safetensors") == store.originals["half.safetensors"].sha256
    finally:
        while is_mounted(point):
            unmount(point, lazy=True)
    done = subprocess.run([*command, "-o", "nonsense"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert one_line(done.stderr)


def test_the_python_interface(copied: Copied, binding: str, tmp_path: Path) -> None:
    store, point = copied("base.safetensors", "half.safetensors"), tmp_path / "point"
    point.mkdir()
    with package.open_store(store.root) as opened:
        for given in (opened, store.root):
            with package.mount(given, point, cache_nbytes=64 << 20, binding=binding) as path:
                assert path == point
                assert sha256_of(path / "half.safetensors") == store.originals["half.safetensors"].sha256
            assert not is_mounted(point)
            assert os.listdir(point) == []


def test_odd_names_of_stores_and_mountpoints(library: Library, mounted: Mounted, tmp_path: Path) -> None:
    root = tmp_path / "a,b =\\c\n\u00fc"
    root.mkdir()
    for name in ("base.safetensors", "half.safetensors.hydra"):
        put(library.root / name, root / name)
    live = mounted(Library(root, {"half.safetensors": library.originals["half.safetensors"]}))
    assert sha256_of(live.path / "half.safetensors") == library.originals["half.safetensors"].sha256
    live.down()


def test_a_small_cache_serves_all_the_same(copied: Copied, mounted: Mounted) -> None:
    store = copied("wide-base.safetensors", "wide.safetensors")
    live = mounted(store, "--cache-size", "1M")
    for _ in range(2):
        assert sha256_of(live.path / "wide.safetensors") == store.originals["wide.safetensors"].sha256
        with (live.path / "wide.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Other surroundings, each in namespaces of its own


def surrounded(
    script: str, *arguments: str | os.PathLike[str], binding: str, user: bool = False, **environment: str
) -> tuple[int, str, str]:
    """Run a shell script where mounts are its own; as root of a user namespace where that is asked for or needed."""
    flags = ["--user", "--map-root-user"] if user or os.geteuid() else []
    done = subprocess.run(
        [
            "unshare",
            *flags,
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            script,
            "sh",
            *map(os.fspath, arguments),
        ],
        env={**os.environ, "HYDRAFS_FUSE": binding, "PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


MOUNT = '"$PYTHON" -m hydrafs mount "$1" "$2"'


def test_no_dev_fuse(copied: Copied, binding: str, tmp_path: Path) -> None:
    store = copied("base.safetensors", "half.safetensors").root
    (tmp_path / "point").mkdir()
    (tmp_path / "dev").mkdir()
    hide = 'for n in null urandom; do touch "$3/$n"; mount --bind /dev/$n "$3/$n"; done; mount --rbind "$3" /dev; '
    code, output, line = surrounded(hide + MOUNT, store, tmp_path / "point", tmp_path / "dev", binding=binding)
    assert (code, output) == (11, ""), line
    assert one_line(line)
    assert "/dev/fuse" in line
    assert "modprobe fuse" in line
    assert "--device /dev/fuse" in line


def test_a_dev_fuse_that_may_not_be_opened(copied: Copied, binding: str, tmp_path: Path) -> None:
    store = copied("base.safetensors", "half.safetensors").root
    (tmp_path / "point").mkdir()
    forbid = "mount --bind /dev/fuse /dev/fuse; mount -o remount,bind,nodev /dev/fuse; "
    code, output, line = surrounded(forbid + MOUNT, store, tmp_path / "point", binding=binding)
    assert (code, output) == (9, ""), line
    assert one_line(line)
    assert "/dev/fuse" in line


def test_a_user_namespace(copied: Copied, binding: str, tmp_path: Path) -> None:
    store, point = copied("base.safetensors", "half.safetensors"), tmp_path / "point"
    point.mkdir()
    script = MOUNT + '; sha256sum < "$2/half.safetensors"; "$PYTHON" -m hydrafs umount "$2"'
    code, output, complaint = surrounded(script, store.root, point, binding=binding, user=True)
    assert (code, complaint) == (0, "")
    assert output.split()[0] == store.originals["half.safetensors"].sha256


def test_a_store_that_cannot_be_written(copied: Copied, binding: str, tmp_path: Path) -> None:
    store, point = copied("base.safetensors", "half.safetensors"), tmp_path / "point"
    point.mkdir()
    script = (
        'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; '
        + MOUNT
        + '; sha256sum < "$2/half.safetensors"; ls -A "$2"; "$PYTHON" -m hydrafs umount "$2"'
    )
    state = tmp_path / "state"
    code, output, complaint = surrounded(script, store.root, point, binding=binding, XDG_STATE_HOME=str(state))
    assert (code, complaint) == (0, "")
    digest, _, first, second = output.split()
    assert digest == store.originals["half.safetensors"].sha256
    assert [first, second] == ["base.safetensors", "half.safetensors"]
    assert not (store.root / ".hydrafs").exists()
    text = (state / "hydrafs" / "mount.log").read_text()
    assert [": INFO: " in line for line in text.splitlines()] == [True, True], "mounted, unmounted"


def test_what_is_refused_is_logged_though_the_store_cannot_be_written(
    copied: Copied, binding: str, tmp_path: Path
) -> None:
    store, point, state = copied("half.safetensors"), tmp_path / "point", tmp_path / "state"
    point.mkdir()
    script = (
        'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; '
        + MOUNT
        + '; ! cat "$2/half.safetensors" > "$3" 2>&1; "$PYTHON" -m hydrafs umount "$2"'
    )
    code, _, complaint = surrounded(
        script, store.root, point, tmp_path / "said", binding=binding, XDG_STATE_HOME=str(state)
    )
    assert (code, complaint) == (0, "")
    (line,) = (x for x in (state / "hydrafs" / "mount.log").read_text().splitlines() if ": INFO: " not in x)
    for part in ("/half.safetensors", "is missing, base.safetensors", "put it back"):
        assert part in line


def test_a_log_that_cannot_be_written_is_named(copied: Copied, binding: str, tmp_path: Path) -> None:
    store = copied("base.safetensors", "half.safetensors")
    (tmp_path / "point").mkdir()
    done = hydrafs(
        "mount", store.root, tmp_path / "point", "--log-file", tmp_path / "none" / "log", HYDRAFS_FUSE=binding
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr)
    assert "cannot write the log" in done.stderr
    assert not is_mounted(tmp_path / "point")


def test_modes_keep_others_out(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(store, "-o", "allow_other,umask=077")
    assert stat.S_IMODE((live.path / "half.safetensors").stat().st_mode) == 0o700
    assert stat.S_IMODE(live.path.stat().st_mode) == 0o700
