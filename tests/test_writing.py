"""Writing through a mount: each operation does what the store's own filesystem does, dehydrated models included."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mounts import Library, Mount, eventually, sha256_of
from safetensors.torch import load_file, save_file

from hydrafs import departing, vfs
from hydrafs.coherence import Claim, Names
from hydrafs.departing import Departed
from hydrafs.errors import StoreLocked
from hydrafs.writing import WritableTree

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]

libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE = 1, 2


def errno_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def stored(root: Path) -> list[str]:
    """Every name of the store, hydrafs' own folder left out."""
    found = (p.relative_to(root) for p in root.rglob("*"))
    return sorted(str(p) for p in found if p.parts[0] != ".hydrafs")


def listed(point: Path) -> list[str]:
    return sorted(str(p.relative_to(point)) for p in point.rglob("*"))


# The same calls on the mount and on the filesystem

NAMES = ("a", "b", "model.safetensors", "other.safetensors", "d", "d/a", "d/model.safetensors", "e")
names = st.sampled_from(NAMES)
blobs = st.binary(max_size=5000)
offsets = st.integers(0, 9000)


class Twins(RuleBasedStateMachine):
    """Every call is made twice, on a mount and on a plain folder that holds the same; results and errnos must agree."""

    mount: Mount
    models: dict[str, Path]
    """Names of models, and a diff of each that is put in the store while the plain folder gets the full file."""
    reference: Path
    exchanges = True

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[int, int]] = []
        self.linked = False

    @initialize(dehydrated=st.sets(st.sampled_from(("model.safetensors", "other.safetensors"))))
    def begin(self, dehydrated: set[str]) -> None:
        for folder in (self.reference, self.mount.path):
            for path in folder.iterdir():
                if path.name not in (".hydrafs", "base.safetensors"):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        assert stored(self.mount.root) == ["base.safetensors"]
        for name in dehydrated:
            diff = self.models[name]
            shutil.copy2(diff, self.mount.root / (name + ".hydra"))
            shutil.copy2(self.models["full " + name], self.reference / name)

    def teardown(self) -> None:
        for pair in self.open:
            for fd in pair:
                os.close(fd)

    def both(self, call: Callable[[Path], object]) -> object:
        results = []
        for root in (self.mount.path, self.reference):
            try:
                results.append(call(root))
            except OSError as error:
                results.append(f"OSError {errno.errorcode.get(error.errno or 0)}")
        assert results[0] == results[1], f"the mount: {results[0]!r:.200}, the filesystem: {results[1]!r:.200}"
        return results[0]

    def both_open(self, name: str, flags: int) -> None:
        fds: list[int] = []
        result = self.both(lambda root: fds.append(os.open(root / name, flags, 0o640)))
        if result is None:
            self.open.append((fds[0], fds[1]))
            if len(self.open) > 6:
                for fd in self.open.pop(0):
                    os.close(fd)

    @rule(name=names, data=blobs)
    def write_file(self, name: str, data: bytes) -> None:
        self.both(lambda root: (root / name).write_bytes(data))

    @rule(name=names, data=blobs, offset=offsets)
    def write_into(self, name: str, data: bytes, offset: int) -> None:
        def call(root: Path) -> int:
            fd = os.open(root / name, os.O_RDWR)
            try:
                return os.pwrite(fd, data, offset)
            finally:
                os.close(fd)

        self.both(call)

    @rule(name=names, data=blobs)
    def append(self, name: str, data: bytes) -> None:
        def call(root: Path) -> int:
            with (root / name).open("ab") as file:
                return file.write(data)

        self.both(call)

    @rule(name=names)
    def read(self, name: str) -> None:
        self.both(lambda root: hashlib.sha256((root / name).read_bytes()).hexdigest())

    @rule(name=names, size=st.integers(0, 20_000))
    def truncate(self, name: str, size: int) -> None:
        self.both(lambda root: os.truncate(root / name, size))

    @rule(name=names, flags=st.sampled_from((os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC)))
    def open_it(self, name: str, flags: int) -> None:
        if not (self.reference / name).is_dir():  # libfuse knows an open folder by its name alone (docs/SEMANTICS.md)
            self.both_open(name, flags)

    @rule(name=names, exclusive=st.booleans())
    def create(self, name: str, exclusive: bool) -> None:
        self.both_open(name, os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0))

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 5), data=blobs, offset=offsets)
    def use_open(self, number: int, data: bytes, offset: int) -> None:
        pair = self.open[number % len(self.open)]
        fds = dict(zip((self.mount.path, self.reference), pair, strict=True))
        self.both(lambda root: os.pwrite(fds[root], data, offset))
        self.both(lambda root: hashlib.sha256(os.pread(fds[root], 1 << 20, 0)).hexdigest())
        self.both(lambda root: (os.fstat(fds[root]).st_size, stat.S_IMODE(os.fstat(fds[root]).st_mode)))

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 5), size=st.integers(0, 12_000), mode=st.sampled_from((0o600, 0o644, 0o444)))
    def change_open(self, number: int, size: int, mode: int) -> None:
        pair = self.open[number % len(self.open)]
        fds = dict(zip((self.mount.path, self.reference), pair, strict=True))
        self.both(lambda root: os.ftruncate(fds[root], size))
        self.both(lambda root: os.fchmod(fds[root], mode))
        self.both(lambda root: os.fsync(fds[root]))
        self.both(lambda root: os.fstat(fds[root]).st_size)

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 5))
    def close(self, number: int) -> None:
        for fd in self.open.pop(number % len(self.open)):
            os.close(fd)

    @rule(name=names)
    def unlink(self, name: str) -> None:
        self.both(lambda root: os.unlink(root / name))

    @rule(name=names, kind=st.sampled_from(("mkdir", "rmdir")))
    def folders(self, name: str, kind: str) -> None:
        self.both(lambda root: getattr(os, kind)(root / name))

    @rule(make=st.booleans())
    def pipe(self, make: bool) -> None:
        # Of a name that nothing else opens: who opens a pipe waits for its other end.
        self.both(lambda root: (os.mkfifo if make else os.unlink)(root / "pipe"))

    @rule(old=names, new=names, flags=st.sampled_from((0, 0, 0, NOREPLACE)))
    def rename(self, old: str, new: str, flags: int) -> None:
        if flags and not self.exchanges:
            flags = 0
        self.both(lambda root: renameat2(root / old, root / new, flags))

    @rule(old=names, new=names)
    def exchange(self, old: str, new: str) -> None:
        if self.exchanges:
            self.both(lambda root: renameat2(root / old, root / new, EXCHANGE))

    @rule(to=names, name=names)
    def symlink(self, to: str, name: str) -> None:
        self.both(lambda root: os.symlink(to, root / name))
        self.both(lambda root: os.readlink(root / name))

    @precondition(lambda self: not self.open)
    @rule(old=st.sampled_from(("a", "b", "d")), new=st.sampled_from(("e", "d/a")))
    def link(self, old: str, new: str) -> None:
        # Two names of one file are two files to the kernel's caches (docs/SEMANTICS.md): one is left at a time.
        def call(root: Path) -> None:
            if (root / old).is_symlink():
                raise OSError(errno.ELOOP, "left out")
            os.link(root / old, root / new)
            nlink = os.stat(root / new).st_nlink
            os.unlink(root / old)
            dehydrated = (self.mount.root / f"{new}.hydra").exists()
            assert nlink >= 2 or (dehydrated and nlink == 1)

        self.both(call)

    @rule(name=names, mode=st.sampled_from((0o600, 0o644, 0o755, 0o400)))
    def chmod(self, name: str, mode: int) -> None:
        self.both(lambda root: os.chmod(root / name, mode))

    @rule(name=names, mtime_ns=st.integers(0, 2_000_000_000_999_999_999), atime_ns=st.integers(0, 2 * 10**18))
    def utime(self, name: str, mtime_ns: int, atime_ns: int) -> None:
        self.both(lambda root: os.utime(root / name, ns=(atime_ns, mtime_ns), follow_symlinks=False))
        self.both(lambda root: os.lstat(root / name).st_mtime_ns)

    @rule(name=names, value=st.binary(max_size=40))
    def xattr(self, name: str, value: bytes) -> None:
        self.both(lambda root: os.setxattr(root / name, "user.test", value))
        self.both(lambda root: os.getxattr(root / name, "user.test"))
        self.both(lambda root: os.removexattr(root / name, "user.test"))
        self.both(lambda root: os.getxattr(root / name, "user.test"))

    @rule()
    def look(self) -> None:
        def call(root: Path) -> list[object]:
            found: list[object] = []
            for folder, folders, files in os.walk(root):
                folders.sort()
                for name in sorted([*folders, *files]):
                    path = Path(folder, name)
                    if name == "base.safetensors" or ".hydrafs" in path.parts:
                        continue
                    s = os.lstat(path)
                    size = s.st_size if not stat.S_ISDIR(s.st_mode) else 0
                    found.append((str(path.relative_to(root)), s.st_mode, size))
            return sorted(map(str, found))

        self.both(call)


def twins(
    library: Library, mount: Mount, reference: Path, kept: Path, examples: int, steps: int, *, exchanges: bool
) -> None:
    kept.mkdir()
    models = {}
    for name, original in (("model.safetensors", "half.safetensors"), ("other.safetensors", "tuned.safetensors")):
        models[name] = kept / f"{name}.hydra"
        shutil.copy2(library.diff(original), models[name])
        full = kept / name
        full.write_bytes(library.originals[original].data)
        full.chmod(stat.S_IMODE(library.originals[original].mode))
        os.utime(full, ns=(0, library.originals[original].mtime_ns))
        models["full " + name] = full
    machine = type("Run", (Twins,), {"mount": mount, "models": models, "reference": reference, "exchanges": exchanges})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_call_does_what_the_filesystem_does(
    library: Library, copied: Copied, mounted: Mounted, tmp_path: Path, binding: str
) -> None:
    live = mounted(copied("base.safetensors"))
    reference = tmp_path / "reference"
    reference.mkdir()
    twins(library, live, reference, tmp_path / "kept", 40, 40, exchanges=binding == "mfusepy")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_call_does_what_the_filesystem_does_at_length(
    library: Library, copied: Copied, mounted: Mounted, tmp_path: Path, binding: str
) -> None:
    live = mounted(copied("base.safetensors"))
    reference = tmp_path / "reference"
    reference.mkdir()
    twins(library, live, reference, tmp_path / "kept", 1000, 60, exchanges=binding == "mfusepy")


# One operation at a time


def state_of(path: Path) -> str:
    return os.getxattr(path, "user.hydrafs.state").decode()


def test_names_of_hydrafs_own_are_not_made(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)
    before = stored(store.root)
    for name in ("x.hydra", ".hydrafs", ".hydrafs-tmp-1", "half.safetensors.hydra"):
        path = live.path / name
        for make in (
            lambda p: os.open(p, os.O_CREAT | os.O_WRONLY),
            os.mkdir,
            os.mkfifo,
            lambda p: os.symlink("x", p),
            lambda p: os.link(live.path / "base.safetensors", p),
            lambda p: os.rename(live.path / "base.safetensors", p),
        ):
            assert errno_of(make, path) == errno.EPERM, name
        for look in (os.stat, os.unlink, os.rmdir, lambda p: os.open(p, os.O_RDONLY)):
            assert errno_of(look, path) == errno.ENOENT, name
    assert errno_of(os.mkdir, live.path / ".hydrafs" / "x") == errno.ENOENT
    assert stored(store.root) == before


def test_mode_and_mtime_of_a_model_are_changed_beside_its_diff(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)
    path, diff = live.path / "half.safetensors", store.diff("half.safetensors")
    content = diff.read_bytes()
    os.chmod(path, 0o600)
    os.utime(path, ns=(1_500_000_000_000_000_001, 1_700_000_000_123_456_789))
    assert path.stat().st_atime_ns == 1_500_000_000_000_000_001
    for _ in range(2):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o600, 1_700_000_000_123_456_789)
        live.down()
        live.up()
    assert diff.read_bytes() == content
    assert stat.S_IMODE(diff.stat().st_mode) == 0o600, "whom the model is hidden from, the diff is hidden from"
    assert sha256_of(path) == store.originals["half.safetensors"].sha256
    assert not [n for n in os.listxattr(path) if n == "user.hydrafs.attributes"]
    assert errno_of(os.setxattr, path, "user.hydrafs.state", b"x") == errno.ENOTSUP
    os.setxattr(path, "user.note", b"mine")
    assert os.getxattr(path, "user.note") == b"mine"
    with path.open("r+b") as file:
        file.write(b"x")
    assert os.getxattr(path, "user.note") == b"mine"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_writing_into_a_model_makes_it_a_plain_file_first(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(store)
    path, data = live.path / "half.safetensors", store.originals["half.safetensors"].data
    with path.open("rb", buffering=0) as before, path.open("r+b") as file:
        assert before.read(10) == data[:10]
        assert state_of(path) == "dehydrated"
        file.seek(1000)
        file.write(b"changed")
        file.flush()
        assert state_of(path) == "plain"
        # It is one file: whoever has it open sees what is written to it.
        assert before.read() == (data[:1000] + b"changed" + data[1007:])[10:]
    assert (store.root / "half.safetensors").read_bytes() == data[:1000] + b"changed" + data[1007:]
    assert not store.diff("half.safetensors").exists()
    other = live.path / "tuned.safetensors"
    with other.open("rb") as before:
        other.write_bytes(b"new")
        assert before.read() == b"new"
    assert (store.root / "tuned.safetensors").read_bytes() == b"new"
    assert not store.diff("tuned.safetensors").exists()
    assert sorted(os.listdir(live.path)) == ["base.safetensors", "half.safetensors", "tuned.safetensors"]


def test_what_is_open_is_read_on_whatever_becomes_of_its_name(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(store)
    for name in ("half.safetensors", "tuned.safetensors"):
        path, data = live.path / name, store.originals[name].data
        with path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                if name == "half.safetensors":
                    os.unlink(path)
                else:
                    (live.path / "new").write_bytes(b"another model")
                    os.replace(live.path / "new", path)
                    assert path.read_bytes() == b"another model"
                assert mapped[:] == data
            found = os.fstat(file.fileno())
            assert (found.st_size, found.st_nlink) == (len(data), 0)
            assert file.read() == data
            names = os.listdir(live.path) + stored(store.root)
            assert not [n for n in names if "fuse_hidden" in n]
    assert sorted(os.listdir(live.path)) == ["base.safetensors", "tuned.safetensors"]
    assert stored(store.root) == ["base.safetensors", "tuned.safetensors"]


def test_a_name_is_never_without_a_file_while_it_is_replaced(copied: Copied, mounted: Mounted, binding: str) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = mounted(store)
    path, data = live.path / "half.safetensors", store.originals["half.safetensors"].data
    contents = {hashlib.sha256(c).digest() for c in (data, b"one", b"two" * 1000)}
    wrong: list[object] = []
    stop = threading.Event()
    counts = {"read": 0, "looked up too late": 0}

    def look() -> None:
        while not stop.is_set():
            try:
                with path.open("rb") as file:
                    if hashlib.sha256(file.read()).digest() not in contents:
                        wrong.append("another content")
                counts["read"] += 1
            except OSError as error:
                # The kernel looked the name up, it was given to another file, and once more while it looked again.
                if error.errno not in ((errno.ESTALE,) if binding == "mfusepy" else (errno.ESTALE, errno.ENOENT)):
                    wrong.append(error)
                counts["looked up too late"] += 1

    def look_in_the_store() -> None:
        plain, diff = store.root / path.name, store.diff(path.name)
        while not stop.is_set():
            if not (os.path.lexists(plain) or os.path.lexists(diff) or os.path.lexists(plain)):
                wrong.append("nothing has the name")

    threads = [threading.Thread(target=target) for target in (look, look, look_in_the_store)]
    for thread in threads:
        thread.start()
    try:
        for number in range(150):
            (live.path / "new").write_bytes((b"one", b"two" * 1000)[number % 2])
            os.replace(live.path / "new", path)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, (len(wrong), counts, wrong[:3])
    assert counts["looked up too late"] <= counts["read"] // 20 + (10_000 if binding == "fusepy" else 0), counts


@pytest.mark.parametrize("name", ["base.safetensors", "half.safetensors"])
def test_a_file_that_is_let_go_of_while_it_is_opened_again(
    copied: Copied, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The kernel releases a file a moment after close(2) has returned, on another thread than the next open."""
    store = copied("base.safetensors", "half.safetensors")
    tree = WritableTree(store.root, 1 << 20)
    tree.start()
    claims = Names.claims
    try:
        held = tree.open(f"/{name}", os.O_RDONLY)

        def late(names: Names, path: str) -> list[Claim]:
            found = claims(names, path)
            monkeypatch.undo()
            held.close()
            return found

        monkeypatch.setattr(Names, "claims", late)
        opened = tree.open(f"/{name}", os.O_RDWR)
        assert opened.pwrite(0, memoryview(b"x")) == 1
        opened.close()
        assert not [fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == str(store.root / name)]
    finally:
        tree.stop()


def test_who_has_the_lock_of_the_store_and_keeps_it_hangs_no_program(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied("base.safetensors", "half.safetensors")
    monkeypatch.setattr(vfs, "_STORE_LOCK_SECONDS", 0.2)
    tree = WritableTree(store.root, 1 << 20)
    tree.start()
    try:
        with tree.store.lock():
            for call in (tree.unlink, lambda path: tree.rename(path, "/other"), lambda path: tree.truncate(path, 0)):
                for name in ("/half.safetensors", "/base.safetensors"):
                    with pytest.raises(StoreLocked, match="another process is changing the store") as caught:
                        call(name)
                    assert caught.value.errno == errno.EBUSY
            opened = tree.open("/half.safetensors", os.O_RDONLY)
            data = store.originals["half.safetensors"].data
            got = bytearray(len(data))
            assert opened.pread_into(0, memoryview(got)) == len(data)
            assert got == data
            opened.close()
    finally:
        tree.stop()
    assert stored(store.root) == ["base.safetensors", "half.safetensors.hydra"]


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_thread_that_does_not_get_a_processor_replaces_all_the_same(seconds: float) -> None:
    """libfuse hides the old file and renames then; in between the thread may have to wait for longer than any timer."""
    departed, deleted = Departed(), threading.Event()
    departed.hide("/name", "/.fuse_hidden0123456789abcdef", (), deleted.set)
    time.sleep(seconds)
    assert not deleted.is_set(), "nothing has the name"
    end = departed.take_over("/name")
    assert end is not None
    end()
    departed.settle("/name")
    assert not deleted.is_set()


def test_a_hidden_file_is_deleted_once_its_thread_waits_for_a_request(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors", "half.safetensors"))
    for name in ("half.safetensors", "base.safetensors"):
        with (live.path / name).open("rb"):
            (live.path / name).unlink()
            assert not (live.path / name).exists()
            assert name not in stored(live.root)


def test_a_hidden_file_is_deleted_where_its_thread_is_no_more() -> None:
    departed, deleted = Departed(), threading.Event()
    arguments = ("/name", "/.fuse_hidden0123456789abcdef", (), deleted.set)
    thread = threading.Thread(target=departed.hide, args=arguments)
    thread.start()
    thread.join()
    departed.settle("/name")
    assert deleted.is_set()


@pytest.mark.parametrize("name", ["base.safetensors", "half.safetensors"])
def test_who_looked_a_name_up_before_it_was_replaced_opens_what_it_had(
    copied: Copied, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departing, "_OPENABLE_SECONDS", 1.0)
    store = copied("base.safetensors", "half.safetensors")
    hidden, data = "/.fuse_hidden0123456789abcdef", store.originals[name].data
    tree = WritableTree(store.root, 1 << 20)
    tree.start()
    try:
        held = tree.open(f"/{name}", os.O_RDONLY)
        tree.rename(f"/{name}", hidden)  # libfuse, before it renames another file over one that is open
        held.close()
        tree.unlink(hidden)
        with pytest.raises(FileNotFoundError):
            tree.getattr(f"/{name}")
        late = tree.open(hidden, os.O_RDONLY)
        got = bytearray(len(data))
        assert late.pread_into(0, memoryview(got)) == len(got)
        assert got == data
        assert eventually(lambda: tree.departed._files[hidden] == [late])
        assert tree.getattr(hidden).size == len(data), "what is open has a size"
        late.close()
        assert errno_of(tree.getattr, hidden) == errno_of(tree.open, hidden, os.O_RDONLY) == errno.ESTALE
    finally:
        tree.stop()
    assert not [f for f in os.listdir("/proc/self/fd") if name in os.path.realpath(f"/proc/self/fd/{f}")]


def test_a_replacement_that_waits_for_the_disk_is_waited_for(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looked the name up before waits with it, in libfuse, for as long as it takes."""
    store = copied("base.safetensors", "half.safetensors")
    hidden, data = "/.fuse_hidden0123456789abcdef", store.originals["half.safetensors"].data
    monkeypatch.setattr(departing, "_OPENABLE_SECONDS", 1.0)
    tree = WritableTree(store.root, 1 << 20)
    replace = tree._rename

    def slow(*arguments: Any) -> None:
        time.sleep(1.5)
        replace(*arguments)

    monkeypatch.setattr(tree, "_rename", slow)
    tree.start()
    try:
        (store.root / "new").write_bytes(b"new")
        held = tree.open("/half.safetensors", os.O_RDONLY)
        tree.rename("/half.safetensors", hidden)
        held.close()
        tree.rename("/new", "/half.safetensors")
        assert tree.getattr("/half.safetensors").size == 3
        late = tree.open(hidden, os.O_RDONLY)
        got = bytearray(len(data))
        assert late.pread_into(0, memoryview(got)) == len(got)
        assert got == data
        late.close()
        assert eventually(lambda: tree.departed.file(hidden) is None)
        assert errno_of(tree.open, hidden, os.O_RDONLY) == errno.ESTALE
    finally:
        tree.stop()


@pytest.mark.parametrize("name", ["base.safetensors", "half.safetensors"])
def test_a_file_without_a_name_is_no_other_file_once_it_is_closed(copied: Copied, name: str) -> None:
    """The kernel opens what it looked up while the last who had it open lets go of it, on another thread: its
    descriptor has the number of another file then."""
    store = copied("base.safetensors", "half.safetensors")
    hidden, data = "/.fuse_hidden0123456789abcdef", store.originals[name].data
    tree = WritableTree(store.root, 1 << 20)
    tree.start()
    others = []
    try:
        held = tree.open(f"/{name}", os.O_RDONLY)
        tree.rename(f"/{name}", hidden)
        tree.unlink(hidden)
        place = tree.find(hidden)
        held.close()
        assert eventually(lambda: tree.departed.file(hidden) is None), "kept for who looked the name up before"
        assert errno_of(tree.find, hidden) == errno.ESTALE
        others = [os.open(__file__, os.O_RDONLY) for _ in range(30)]
        opened = tree.open_place(hidden, place)
        got = bytearray(len(data) + 1)
        assert opened.pread_into(0, memoryview(got)) == len(data)
        assert got[:-1] == data
        opened.close()
        assert os.path.samestat(os.stat(place.real), place.stat)
        assert errno_of(tree.rename, hidden, "/again") == errno.ESTALE
    finally:
        for fd in others:
            os.close(fd)
        tree.stop()
    del place, held, opened
    assert not [f for f in os.listdir("/proc/self/fd") if name in os.path.realpath(f"/proc/self/fd/{f}")]


def test_a_file_that_was_closed_while_it_lost_its_name_answers_for_none(copied: Copied) -> None:
    store = copied("base.safetensors", "half.safetensors")
    hidden = "/.fuse_hidden0123456789abcdef"
    tree = WritableTree(store.root, 1 << 20)
    tree.start()
    try:
        closed, opened = (tree.open("/half.safetensors", os.O_RDONLY) for _ in range(2))
        closed.close()
        tree.departed.hide("/half.safetensors", hidden, [closed, opened], lambda: None)
        assert tree.departed.file(hidden) is opened
        tree.departed.join(hidden, closed)
        assert tree.getattr(hidden).size == len(store.originals["half.safetensors"].data)
        opened.close()
        assert errno_of(tree.getattr, hidden) == errno_of(tree.open, hidden, os.O_RDONLY) == errno.ESTALE
    finally:
        tree.stop()


def test_a_file_mapped_and_written_to(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors")
    live = mounted(store)
    with (live.path / "mapped").open("w+b") as file:
        file.truncate(1_000_000)
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped[500_000:500_005] = b"hello"
            mapped.flush()
            assert os.pread(file.fileno(), 5, 500_000) == b"hello"
            file.seek(600_000)
            file.write(b"world")
            file.flush()
            assert mapped[600_000:600_005] == b"world"
    data = (store.root / "mapped").read_bytes()
    assert (data[500_000:500_005], data[600_000:600_005], len(data)) == (b"hello", b"world", 1_000_000)


def fsx(path: Path, operations: int, seed: int) -> None:
    """Random reads, writes, truncations and mapped accesses of one file, compared with the same on bytes in memory.

    A third of the writes go through descriptors that can only write, which bypass the kernel's pages of the file.
    """
    chance = random.Random(seed)
    path.touch()
    content = bytearray()
    largest = 300_000
    fd, only_writes = os.open(path, os.O_RDWR), os.open(path, os.O_WRONLY)
    appends = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for number in range(operations):
            action = chance.randrange(100)
            offset, nbytes = chance.randrange(largest), chance.randrange(1, 40_000)
            if action < 30:
                assert os.pread(fd, nbytes, offset) == content[offset : offset + nbytes], number
            elif action < 32:
                block = chance.randbytes(min(nbytes, largest - len(content))) if len(content) < largest else b""
                assert os.write(appends, block) == len(block)
                content += block
            elif action < 60:
                block = chance.randbytes(nbytes)
                assert os.pwrite(fd if action < 50 else only_writes, block, offset) == nbytes
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + nbytes] = block
            elif action < 68:
                os.ftruncate(fd, offset)
                content[offset:] = bytes(max(0, offset - len(content)))
            elif action < 95 and content:
                begin = chance.randrange(len(content))
                end = min(len(content), begin + nbytes)
                with mmap.mmap(fd, len(content)) as mapped:
                    if action < 80:
                        assert mapped[begin:end] == content[begin:end], number
                    else:
                        mapped[begin:end] = content[begin:end] = chance.randbytes(end - begin)
            elif action < 98:
                os.close(fd)
                fd = os.open(path, os.O_RDWR)
            else:
                os.fsync(fd)
            assert os.fstat(fd).st_size == len(content), number
    finally:
        for descriptor in (fd, only_writes, appends):
            os.close(descriptor)
    assert path.read_bytes() == content


def test_random_accesses_of_a_file(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors"))
    fsx(live.path / "random", 2_000, 1)
    assert (live.root / "random").read_bytes() == (live.path / "random").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_random_accesses_of_a_file_at_length(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors"))
    fsx(live.path / "random", 50_000, 2)
    assert (live.root / "random").read_bytes() == (live.path / "random").read_bytes()


def test_what_is_written_is_read_whoever_else_reads(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors"))
    path, nbytes = live.path / "contended", 64 << 10
    path.write_bytes(bytes(nbytes))
    stop = threading.Event()

    def keep_reading() -> None:  # and so compete for the kernel's pages, also through maps
        while not stop.is_set():
            path.read_bytes()
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                bytes(mapped)

    threads = [threading.Thread(target=keep_reading) for _ in range(2)]
    writer, reader = os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(reader, nbytes, prot=mmap.PROT_READ) as mapped:
            for thread in threads:
                thread.start()
            for number in range(1, 400):
                block = bytes([number % 256]) * nbytes
                assert os.pwrite(writer, block, 0) == nbytes
                assert os.pread(reader, nbytes, 0) == block, number
                assert mapped[:] == block, number
                assert path.read_bytes() == block, number
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(writer)
        os.close(reader)


def test_pages_of_a_file_that_is_being_written_are_left_alone(copied: Copied) -> None:
    """The kernel may drop them before the daemon has what is in them."""
    tree = WritableTree(copied("base.safetensors").root, 1 << 20)
    tree.start()
    try:
        writer = tree.open("/base.safetensors", os.O_WRONLY)
        for number in range(3):
            assert writer.pwrite(0, memoryview(bytes([number]))) == 1
            reader = tree.open("/base.safetensors", os.O_RDONLY)
            assert reader.keep_cache
            reader.pread_into(0, memoryview(bytearray(1)))
            reader.close()
        writer.close()
        reader = tree.open("/base.safetensors", os.O_RDONLY)
        assert not reader.keep_cache, "what was written past the mount meanwhile is seen now"
        reader.close()
    finally:
        tree.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_writes_to_a_program_takes_its_rights_away(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors"), "-o", "allow_other")
    path = live.path / "program"
    path.write_bytes(b"program")
    path.chmod(0o4777)
    code = "import os; os.setuid(65534); os.write(os.open('program', os.O_WRONLY), b'other')"
    subprocess.run([sys.executable, "-c", code], cwd=live.path, check=True)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"otheram", 0o777)


# What programs do


def test_what_programs_do_in_a_models_folder(copied: Copied, mounted: Mounted, models: ModelMaker) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors", "tuned.ckpt")
    live = mounted(store)
    point = live.path
    # InvokeAI at its start, unguarded.
    (point / "README.txt").write_text("This folder is managed.")
    # A merge of A1111: reads two models, writes a third in place, and a sidecar.
    a, b = load_file(point / "base.safetensors"), load_file(point / "tuned.safetensors")
    merged = {k: (a[k].float() + b[k].float()) / 2 for k in a}
    save_file(merged, point / "merged.safetensors", metadata={"format": "pt"})
    assert {k: v.tolist() for k, v in load_file(point / "merged.safetensors").items()} == {
        k: v.tolist() for k, v in merged.items()
    }
    # safetensors saves over a model that is dehydrated, and over one that is open.
    assert state_of(point / "tuned.safetensors") == "dehydrated"
    with (point / "tuned.safetensors").open("rb") as file:
        save_file(merged, point / "tuned.safetensors", metadata={"format": "pt"})
        file.read()
    assert sha256_of(point / "tuned.safetensors") == sha256_of(point / "merged.safetensors")
    assert not store.diff("tuned.safetensors").exists()
    # A download.
    data = models.save(store.root.parent / "download.safetensors", models.tuned("bf16")).read_bytes()
    with (point / "download.safetensors.part").open("wb") as file:
        for begin in range(0, len(data), 100_000):
            file.write(data[begin : begin + 100_000])
    os.rename(point / "download.safetensors.part", point / "download.safetensors")
    assert sha256_of(point / "download.safetensors") == hashlib.sha256(data).hexdigest()
    # InvokeAI installs by a move into a folder of its own.
    (point / "sd-1" / "main").mkdir(parents=True)
    shutil.move(point / "half.safetensors", point / "sd-1" / "main" / "half.safetensors")
    assert sha256_of(point / "sd-1" / "main" / "half.safetensors") == store.originals["half.safetensors"].sha256
    assert (store.root / "sd-1" / "main" / "half.safetensors.hydra").exists()
    # A sidecar, as Lora-Manager writes them, twice.
    for text in ("one", "two"):
        (point / "merged.metadata.json.tmp").write_text(text)
        os.replace(point / "merged.metadata.json.tmp", point / "merged.metadata.json")
    assert (point / "merged.metadata.json").read_text() == "two"
    # And a copy with everything that cp can carry.
    subprocess.run(["cp", "-a", point / "tuned.ckpt", point / "copy.ckpt"], check=True, capture_output=True)
    assert sha256_of(point / "copy.ckpt") == store.originals["tuned.ckpt"].sha256
    os.unlink(point / "tuned.ckpt")
    assert listed(point) == sorted(
        [
            "README.txt", "base.safetensors", "copy.ckpt", "download.safetensors", "merged.metadata.json",
            "merged.safetensors", "sd-1", "sd-1/main", "sd-1/main/half.safetensors", "tuned.safetensors",
        ]
    )  # fmt: skip


def test_deleting_a_base_that_others_need(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors", "tuned.ckpt")
    live = mounted(store)
    os.unlink(live.path / "base.safetensors")
    assert sorted(os.listdir(live.path)) == ["half.safetensors", "tuned.ckpt", "tuned.safetensors"]
    for name in ("half.safetensors", "tuned.safetensors", "tuned.ckpt"):
        assert sha256_of(live.path / name) == store.originals[name].sha256
    # A new one of that name is another model, and what others need is not touched by it.
    (live.path / "base.safetensors").write_bytes(b"new")
    assert sha256_of(live.path / "half.safetensors") == store.originals["half.safetensors"].sha256


def test_writing_into_a_base_that_others_need(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(store)
    data = store.originals["base.safetensors"].data
    with (live.path / "base.safetensors").open("rb") as before, (live.path / "base.safetensors").open("r+b") as file:
        file.seek(len(data) - 10)
        file.write(b"0123456789")
        file.flush()
        assert before.read() == data[:-10] + b"0123456789"
    for name in ("half.safetensors", "tuned.safetensors"):
        assert sha256_of(live.path / name) == store.originals[name].sha256
    assert (store.root / "base.safetensors").read_bytes() == data[:-10] + b"0123456789"


# Kills


KILLED = """
import os, sys
path, what, content = sys.argv[1], sys.argv[2], b"new content" * 1000
try:
    print("go", flush=True)
    if what == "replace":
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)
    elif what == "copy up":
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
    elif what == "truncate":
        with open(path, "wb") as file:
            file.write(content)
    elif what == "chmod":
        os.chmod(path, 0o600)
        os.utime(path, ns=(5, 5))
except OSError:
    pass
"""


def killed_in(live: Mount, what: str, rounds: int, store: Library) -> None:
    name = "wide.safetensors"
    data = store.originals[name].data
    new = b"new content" * 1000
    kept = live.root.parent / "kept.hydra"
    shutil.copy2(store.diff(name), kept)
    chance = random.Random(what)
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(live.path / name), what], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.random() ** 2 * (0.3 if what == "copy up" else 0.02))
        os.kill(live.pid, signal.SIGKILL)
        child.communicate()
        live.end()
        live.up(warning="daemon of this mount is dead")
        assert name in os.listdir(live.path)
        assert not [n for n in os.listdir(live.path) if n not in (name, name + ".tmp", "wide-base.safetensors")]
        found = (live.path / name).read_bytes()
        if what == "copy up":
            assert found in (data, b"x" + data[1:])
        elif what == "chmod":
            assert found == data
            assert (live.path / name).stat().st_mtime_ns in (5, store.originals[name].mtime_ns)
        elif what == "replace":
            assert found in (data, new)
        else:
            assert found == data or new.startswith(found)
        for path in (live.path / (name + ".tmp"), live.path / name):
            path.unlink(missing_ok=True)
        assert not os.path.lexists(store.diff(name))
        shutil.copy2(kept, store.diff(name))


@pytest.mark.parametrize("what", ["replace", "copy up", "truncate", "chmod"])
def test_a_killed_daemon_loses_nothing(copied: Copied, mounted: Mounted, what: str) -> None:
    store = copied("wide-base.safetensors", "wide.safetensors")
    killed_in(mounted(store), what, 4, store)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("what", ["replace", "copy up", "truncate", "chmod"])
def test_a_killed_daemon_loses_nothing_in_many_kills(copied: Copied, mounted: Mounted, what: str) -> None:
    store = copied("wide-base.safetensors", "wide.safetensors")
    killed_in(mounted(store), what, 65, store)
