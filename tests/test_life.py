"""A store and its mount, lived in: whatever is done to them in whatever order, each model gives its bytes.

A state machine of hypothesis: each rule is something that users, programs, backups or other machines do; after each,
all models that were written and not deleted read as what was written, through the mount and past it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mounts import BELIEVED_SECONDS, WAIT_SECONDS, eventually
from small import model

from hydrafs import keeping, renaming, tending, trash
from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import HydraError
from hydrafs.mountpoints import unmount
from hydrafs.opening import Opener
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.worker import Worker

pytestmark = [pytest.mark.fuse, pytest.mark.logs]

NAMES = ("base", "a", "b", "c", "sub/d", "sub/e")
OPTIONS = Options(jobs=1, chunk_nbytes=16 << 10)
_names = st.sampled_from([f"{name}.safetensors" for name in NAMES])
_seeds = st.integers(0, 1 << 20)
_MAPPING = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
    mapped[int(sys.argv[2])] ^= 255
    mapped.flush()
"""


Value = TypeVar("Value")


def again(call: Callable[[], Value]) -> Value:
    """What ``call`` gives; a file that is another one by now is opened again, as docs/SEMANTICS.md says."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno != errno.ESTALE or time.monotonic() > deadline:
                raise
            time.sleep(BELIEVED_SECONDS)


def _map(path: Path, offset: int) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MAPPING, path, str(offset)], capture_output=True, text=True, check=False
    )
    if "Stale file handle" in done.stderr:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    assert done.returncode == 0, done.stderr


class Life(RuleBasedStateMachine):
    """See the top of this file. ``expected``: what each listed name must read as."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Path(tempfile.mkdtemp(prefix="hydrafs-life-"))
        self.root, self.point = self.work / "store", self.work / "mount"
        self.expected: dict[str, bytes] = {}
        self.backup: dict[str, bytes] | None = None
        self.damaged: dict[str, bytes] = {}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.outside = 0.0

    @initialize(seed=_seeds)
    def begin(self, seed: int) -> None:
        (self.root / "sub").mkdir(parents=True)
        self.point.mkdir()
        for number, name in enumerate(("base", "a", "b", "c")):
            data = model(seed + number, 2e-4 if number else 0.0)
            (self.root / f"{name}.safetensors").write_bytes(data)
            self.expected[f"{name}.safetensors"] = data
        with self.store() as store:
            for name, base in (("a", "base"), ("b", "base"), ("c", "a")):
                options = Options(jobs=1, chunk_nbytes=16 << 10, bases=(self.root / f"{base}.safetensors",))
                assert dehydrate(store, self.root / f"{name}.safetensors", options).original_removed
        self.mount()

    def teardown(self) -> None:
        with contextlib.suppress(Exception):
            unmount(self.point, lazy=True)
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    # What the rules are made of

    @contextlib.contextmanager
    def store(self):  # type: ignore[no-untyped-def]
        """The store as a command has it, past the mount."""
        with contextlib.closing(Store(self.root, create=True)) as store:
            try:
                yield store
            finally:
                self.outside = time.monotonic()

    def mount(self) -> None:
        with open(self.work / "log", "ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "hydrafs", "mount", self.root, self.point, "--foreground", "--dehydrate", "off"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

        def is_up() -> bool:
            with contextlib.suppress(OSError):
                return os.stat(self.point).st_dev != os.stat(self.work).st_dev
            return False

        assert eventually(is_up), (self.work / "log").read_text()

    def unmount(self) -> None:
        assert self.daemon is not None
        unmount(self.point, lazy=True)
        self.daemon.wait(WAIT_SECONDS)

    def at(self, name: str) -> Path:
        return self.point / name

    def pick(self, name: str) -> str | None:
        """A name that is listed and whole; the one that is asked for, if it is."""
        there = sorted(n for n in self.expected if n not in self.damaged)
        return name if name in there else there[len(name) % len(there)] if there else None

    # What programs do to the mount

    @rule(name=_names, seed=_seeds, kind=st.sampled_from(["tuned", "base", "other", "copy"]))
    def save(self, name: str, seed: int, kind: str) -> None:
        if name in self.damaged:
            return
        copied = next(iter(self.expected.values())) if self.expected else b"x" * 2000
        data = {
            "tuned": lambda: model(seed), "base": lambda: model(seed, 0.0), "other": lambda: model(seed, 2e-4, 1),
            "copy": lambda: copied,
        }[kind]()  # fmt: skip
        aside = self.at(name).with_suffix(".part")
        aside.write_bytes(data)
        os.replace(aside, self.at(name))
        self.expected[name] = data

    @rule(name=_names, offset=st.integers(0, 40_000), how=st.sampled_from(["write", "map", "append"]))
    def write(self, name: str, offset: int, how: str) -> None:
        if (name := self.pick(name)) is None or len(self.expected[name]) <= offset:
            return
        data = bytearray(self.expected[name])
        if how == "map":
            data[offset] ^= 255
            again(lambda: _map(self.at(name), offset))
        elif how == "append":
            data += b"more"
            with again(lambda: open(self.at(name), "ab")) as file:
                file.write(b"more")
        else:
            data[offset : offset + 1] = b"!"
            fd = again(lambda: os.open(self.at(name), os.O_RDWR))
            os.pwrite(fd, b"!", offset)
            os.close(fd)
        self.expected[name] = bytes(data)

    @rule(name=_names, nbytes=st.sampled_from([0, 100, 30_000, 60_000]))
    def truncate(self, name: str, nbytes: int) -> None:
        if (name := self.pick(name)) is not None:
            os.truncate(self.at(name), nbytes)
            self.expected[name] = self.expected[name][:nbytes].ljust(nbytes, b"\0")

    @rule(name=_names)
    def touch(self, name: str) -> None:
        if (name := self.pick(name)) is not None:
            with again(lambda: open(self.at(name), "r+b")):
                pass
            os.utime(self.at(name))

    @rule(name=_names, through=st.booleans())
    def remove(self, name: str, through: bool) -> None:
        if (name := self.pick(name)) is None:
            return
        if through:
            os.unlink(self.at(name))
        else:
            with self.store() as store:
                keeping.remove_model(store, self.root / name)
        del self.expected[name]

    @rule(name=_names)
    def undelete(self, name: str) -> None:
        """What was removed through the mount comes back, if nobody has its name."""
        if (name := self.pick(name)) is None or not self.expected[name]:
            return
        os.unlink(self.at(name))
        eventually(lambda: not os.path.lexists(self.root / name) and not os.path.lexists(self.root / f"{name}.hydra"))
        with self.store() as store:
            trash.restore(store, name)

    @rule(old=_names, new=_names, through=st.booleans())
    def rename(self, old: str, new: str, through: bool) -> None:
        if (old := self.pick(old)) is None or new in self.damaged or old == new:
            return
        if through:
            os.rename(self.at(old), self.at(new))
        else:
            with self.store() as store:
                renaming.rename_model(store, self.root / old, self.root / new)
        self.expected[new] = self.expected.pop(old)

    @rule(name=_names, how=st.sampled_from(["cp", "mv", "shutil"]))
    def copy_onto_itself(self, name: str, how: str) -> None:
        """A program that reads a model in the store writes to the same model's name in the mount."""
        if (name := self.pick(name)) is None or not (self.root / name).exists():
            return
        if how == "shutil":
            with contextlib.suppress(OSError):
                shutil.copyfile(self.root / name, self.at(name))
        else:
            subprocess.run([how, self.root / name, self.at(name)], check=False, capture_output=True)
        self.outside = time.monotonic()

    @rule(name=_names)
    def write_while_it_is_open(self, name: str) -> None:
        """Who has a model open goes on reading what it opened, or what is written to it."""
        if (name := self.pick(name)) is None or not self.expected[name]:
            return
        before = self.expected[name]
        with open(self.at(name), "rb", buffering=0) as file:
            self.save(name, 7, "tuned")
            assert file.read() == before

    # What commands and the worker do

    @rule(name=_names, base=st.one_of(st.none(), _names))
    def dehydrate(self, name: str, base: str | None) -> None:
        if (name := self.pick(name)) is None:
            return
        bases = (self.root / base,) if base in self.expected and base != name else ()
        with self.store() as store, contextlib.suppress(HydraError):
            dehydrate(store, self.root / name, Options(jobs=1, chunk_nbytes=16 << 10, bases=bases))

    @rule()
    def step(self) -> None:
        with self.store() as store:
            Worker(store, Policy(settle_seconds=0, min_nbytes=1)).step()

    @rule(rehomes=st.booleans())
    def collect(self, rehomes: bool) -> None:
        with self.store() as store:
            tending.start(store)
            tending.hold_parents(store)
            if rehomes:
                with contextlib.suppress(HydraError):
                    tending.rehome(store, OPTIONS)
            tending.collect(store)

    @rule(one=_names, other=_names, wait=st.sampled_from([0.0, 0.2, 0.4, 0.6]))
    def two_at_once(self, one: str, other: str, wait: float) -> None:
        """A command works on one model while a program deletes another."""
        if (name := self.pick(one)) is None or (gone := self.pick(other)) is None or name == gone:
            return
        # In a process of its own: who has a model of the store open may not delete it through the mount.
        work = subprocess.Popen(
            [sys.executable, "-m", "hydrafs", "dehydrate", "--jobs", "1", self.root / name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            time.sleep(wait)
            os.unlink(self.at(gone))
        finally:
            _, said = work.communicate(timeout=120)
            self.outside = time.monotonic()
        assert "Traceback" not in said, said
        del self.expected[gone]

    # What comes from outside

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        assert self.daemon is not None
        if kill:
            self.daemon.kill()
            self.daemon.wait()
        self.unmount()
        self.mount()

    @rule()
    def back_up(self) -> None:
        shutil.rmtree(self.work / "backup", ignore_errors=True)
        subprocess.run(["cp", "-a", self.root, self.work / "backup"], check=True)
        self.backup = dict(self.expected) if not self.damaged else None

    @precondition(lambda self: self.backup is not None)
    @rule(links=st.booleans())
    def restore_all(self, links: bool) -> None:
        """The whole store comes back from its backup; without the hard links, from one that knows none."""
        assert self.backup is not None
        self.unmount()
        shutil.rmtree(self.root)
        how = ["cp", "-a"] if links else ["cp", "-r", "--preserve=mode,timestamps"]
        subprocess.run([*how, self.work / "backup", self.root], check=True)
        self.expected, self.damaged = dict(self.backup), {}
        self.mount()

    @rule(name=_names, seed=_seeds)
    def replace_behind_the_mount(self, name: str, seed: int) -> None:
        """A program in the store's folder replaces a plain file, whoever needs it."""
        if (name := self.pick(name)) is None or not (self.root / name).exists():
            return
        data = model(seed)
        aside = self.root / f"{name}.part"
        aside.write_bytes(data)
        os.replace(aside, self.root / name)
        self.expected[name] = data
        self.outside = time.monotonic()

    @rule(name=_names, then=st.sampled_from(["", "collect", "work", "rm"]))
    def write_behind_the_mount(self, name: str, then: str) -> None:
        """A program in the store's folder writes into a plain file: who needs it fails, and heals with it."""
        if (name := self.pick(name)) is None or not (self.root / name).exists() or not self.expected[name]:
            return
        data = self.expected[name]
        with open(self.root / name, "r+b") as file:
            file.write(b"\xff\xfe" + data[2:3])
        self.outside = time.monotonic()
        for other, content in self.expected.items():
            if other != name and other not in self.damaged:
                with contextlib.suppress(OSError):
                    assert self.at(other).read_bytes() == content, other
        if then == "collect":
            self.collect(rehomes=False)
        elif then == "work":
            self.step()
        elif then == "rm":
            for other in [n for n in self.expected if n != name and n not in self.damaged][:1]:
                os.unlink(self.at(other))
                del self.expected[other]
        if (self.root / name).exists():
            (self.root / name).open("r+b").write(data[:3])
        elif (self.root / f"{name}.hydra").exists():  # it was dehydrated as it was then
            os.unlink(self.root / f"{name}.hydra")
            (self.root / name).write_bytes(data)
        self.outside = time.monotonic()

    @precondition(lambda self: not self.damaged)
    @rule(name=_names, size=st.sampled_from([0, 100, 3000]))
    def damage(self, name: str, size: int) -> None:
        """A diff that cannot be read, for a while: what it needs must be there when it can be read again."""
        diff = self.root / f"{name}.hydra"
        if name not in self.expected or not diff.exists() or (self.root / name).exists():
            return
        data, stat = diff.read_bytes(), diff.stat()
        # Another file, as by a failed copy: what is held for others is what it was.
        self._put(diff, os.urandom(size))
        os.utime(diff, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        self.damaged[name] = data
        self.outside = time.monotonic()

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        aside = path.with_name(f"{path.name}.part")
        aside.write_bytes(data)
        os.replace(aside, path)

    @precondition(lambda self: self.damaged)
    @rule()
    def mend(self) -> None:
        for name, data in self.damaged.items():
            self._put(self.root / f"{name}.hydra", data)
        self.damaged.clear()
        self.outside = time.monotonic()

    @rule(what=st.sampled_from(["loop", "loops", "dangling", "pipe", "no diff", "long", "clear"]))
    def litter(self, what: str) -> None:
        """What stands about in a folder and cannot be listed, or looked at, or read."""
        sub = self.root / "odd"
        sub.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            if what == "loop":
                (self.root / "0-loop").symlink_to("0-loop")
            elif what == "loops":
                for number in range(20):
                    (self.root / f"0-loop{number}").symlink_to(f"0-loop{number}")
            elif what == "dangling":
                (self.root / "0-nowhere.safetensors").symlink_to("/nowhere/at/all")
            elif what == "pipe":
                os.mkfifo(sub / "pipe.safetensors")
            elif what == "no diff":
                (sub / "junk.safetensors.hydra").write_bytes(b"junk" * 100)
            elif what == "long":
                (sub / ("x" * 255)).touch()
            else:
                shutil.rmtree(sub)
                for path in self.root.glob("0-*"):
                    path.unlink()
        self.outside = time.monotonic()

    # What must hold

    def wrong(self) -> str:
        """What is not as it must be, through the mount; empty where all is well."""
        for name, data in self.expected.items():
            if name in self.damaged:
                continue
            try:
                found = self.at(name).read_bytes()
            except OSError as error:
                return f"{name}: {error}"
            if found != data:
                return f"{name}: {_short(found)} and not {_short(data)}"
        listed = {
            os.path.relpath(os.path.join(folder, n), self.point)
            for folder in (self.point, self.point / "sub")
            for n in os.listdir(folder)
        }
        listed = {n for n in listed if n.endswith(".safetensors") and not n.startswith("0-")}
        if listed != set(self.expected):
            return f"listed: {sorted(listed)}, and not {sorted(self.expected)}"
        return ""

    @invariant()
    def all_is_well(self) -> None:
        if self.daemon is None:
            return
        # What is changed past the mount is believed by the kernel for a second.
        while (said := self.wrong()) and time.monotonic() < self.outside + 5:
            time.sleep(0.1)
        assert not said, said
        with (
            contextlib.closing(Store(self.root)) as store,
            contextlib.closing(Opener(store, ChunkCache(1 << 20))) as opener,
        ):
            for name, data in self.expected.items():
                if name not in self.damaged:
                    with contextlib.closing(opener.open(store.locate(name))) as source:
                        assert source.pread(0, source.size) == data, name


def _short(data: bytes) -> str:
    return f"{len(data)} bytes of {hashlib.sha256(data).hexdigest()[:12]}"


def live(examples: int, steps: int, *, derandomize: bool = True) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            print_blob=True,
            phases=[Phase.generate, *([] if examples < 50 else [Phase.shrink])],
            suppress_health_check=list(HealthCheck),
        ),
    )


Rule = Callable[[Life], None]


def test_for_a_while() -> None:
    live(4, 20)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_for_long() -> None:
    live(int(os.environ.get("LIVES", "300")), 60, derandomize="LIVES_AT_RANDOM" not in os.environ)
