"""Writing through a mount: each operation does what the store's own filesystem does, dehydrated models included."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mounts import Library, Mount

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

    @rule(name=names, kind=st.sampled_from(("mkdir", "rmdir", "mkfifo")))
    def folders(self, name: str, kind: str) -> None:
        self.both(lambda root: getattr(os, kind)(root / name))

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
            assert nlink >= 2

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
