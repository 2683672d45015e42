"""Runs changes of a store again and again, with another call failing each time, and looks at what is left.

``failing.py [--scratch FOLDER] [--sample N] [--seed N] [--jobs N] [SCENARIO...]`` runs all scenarios, or those named,
with every error of every call, or ``N`` of them chosen by the seed, and prints for each: calls, injections, losses,
leaks. Exit code 1 where anything was lost, altered, listed twice, left open, or raised what nobody expects.

Each injection is a process of its own, forked from one that has done the change before.
"""

from __future__ import annotations

import watched

watched.watch()  # before pathlib is imported

import argparse  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sqlite3  # noqa: E402
import stat as stat_module  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402

import scenarios  # noqa: E402
from scenarios import MANY, OPTIONS, Contents, contents, files  # noqa: E402
from small import save_model  # noqa: E402
from watched import LATE, State, errors_of  # noqa: E402

from hydrafs import tending, trash  # noqa: E402
from hydrafs.cache import ChunkCache  # noqa: E402
from hydrafs.dehydrate import dehydrate  # noqa: E402
from hydrafs.errors import HydraError  # noqa: E402
from hydrafs.opening import Opener  # noqa: E402
from hydrafs.store import Store  # noqa: E402

HANG_SECONDS = 60
FAULTS_ONLY = [
    "read", "read through a mount", "mount", "list", "remove a folder", "rename over through a mount", "undelete",
    "undelete a base", "empty the trash", "delete through a mount",
]  # fmt: skip
"""Changes that a kill need not be tried with, since they change nothing, or are made of others."""
KILLED = [
    "dehydrate", "dehydrate elsewhere", "file over diff", "diff over base", "write into a diff",
    "write into a diff that is a parent", "overwrite a diff", "rehydrate in place", "rehome", "overwrite a base",
    "rename with a pin",
]  # fmt: skip
"""Changes that are killed, so that a start has something to end."""
AT_START = "start after a kill: "
EMPTY = hashlib.sha256(b"").hexdigest()


class Bytes(Exception):
    """A read gave other bytes than the model's."""


# What the calls of a scenario are


def make_template(root: Path) -> None:
    """base; tuned0, 1, 2 against it; child against tuned0; fresh and another base, plain."""
    root.mkdir(parents=True)
    save_model(root / "base.safetensors", 0, 0.0)
    with contextlib.closing(Store(root, create=True)) as store:
        for number in range(3):
            _stored(store, f"tuned{number}", 1 + number, "base")
        _stored(store, "child", 1, "tuned0", delta=2.1e-4)
    save_model(root / "fresh.safetensors", 9)
    save_model(root / "other-base.safetensors", 10, 1e-4)


def _stored(store: Store, name: str, seed: int, base: str, delta: float = 2e-4) -> None:
    path = store.root / f"{name}.safetensors"
    save_model(path, seed, delta)
    options = scenarios.replace(OPTIONS, bases=(store.root / f"{base}.safetensors",))
    assert dehydrate(store, path, options).original_removed, name


def change(store: Store, scenario: str, expected: Contents) -> None:
    """The change itself; those of ``scenarios.change``, and those that only faults are tried with."""
    if scenario.startswith(AT_START):
        tending.start(store)
    elif scenario == "list":
        for model in store.models():
            store.entry(model.path)
    elif scenario == "read":
        with contextlib.closing(Opener(store, ChunkCache(1 << 20))) as opener:
            for name, sha256 in expected.items():
                with contextlib.suppress(HydraError, OSError), contextlib.closing(opener.open(store.locate(name))) as s:
                    if hashlib.sha256(s.pread(0, s.size)).hexdigest() != sha256:
                        raise Bytes(name)
    elif scenario in ("read through a mount", "mount"):
        tree = scenarios.WritableTree(store.root)
        State.armed = scenario == "mount"
        tree.start()
        State.armed = True
        try:
            for name, sha256 in expected.items():
                with contextlib.suppress(HydraError, OSError):
                    tree.getattr(f"/{name}")
                    with contextlib.closing(tree.open(f"/{name}", os.O_RDONLY)) as file:
                        out = bytearray(file.attributes().size)
                        nbytes = file.pread_into(0, memoryview(out))
                        if nbytes != len(out) or hashlib.sha256(out).hexdigest() != sha256:
                            raise Bytes(name)
            with contextlib.suppress(HydraError, OSError):
                tree.readdir("/")
        finally:
            State.armed = False
            tree.stop()
    elif scenario == "remove a folder":
        with scenarios.mounted(store) as tree:
            for entry in tree.readdir("/folder"):
                tree.unlink(f"/folder/{entry.name}")
            tree.rmdir("/folder")
    elif scenario.startswith("undelete"):
        trash.restore(store, "base.safetensors" if "base" in scenario else "tuned0.safetensors")
    elif scenario == "empty the trash":
        trash.purge(store)
    elif scenario == "delete through a mount":
        with scenarios.mounted(store) as tree:
            tree.unlink("/tuned1.safetensors")
    elif scenario == "rename over through a mount":
        with scenarios.mounted(store) as tree:
            tree.rename("/fresh.safetensors", "/base.safetensors")
    else:
        scenarios.change(store, scenario)


# A process for each call


@dataclass
class Run:
    """What a process did: how it ended, where it was hit, and what it said."""

    code: int
    hit: str
    said: str
    seconds: float


class Copies:
    """The store, always under one path, as it was before the change."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.root, self.template = scratch, scratch / "store", scratch / "template"
        self.told = os.memfd_create("told")
        self.earlier: Contents | None = None
        self.trashed: Contents = {}

    def keep(self, name: str) -> None:
        """From now on ``fresh`` gives what the store is now."""
        template = self.scratch / name
        shutil.rmtree(template, ignore_errors=True)
        copy_tree(self.root, template)
        self.template = template

    def fresh(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        copy_tree(self.template, self.root)
        know_again(self.root)

    def run(self, action: Callable[[Store], None]) -> Run:
        """Do something to the store in a process of its own, armed."""
        os.ftruncate(self.told, 0)
        os.lseek(self.told, 0, os.SEEK_SET)
        begun = time.monotonic()
        child = os.fork()
        if not child:
            signal.alarm(HANG_SECONDS)
            os._exit(self._act(action))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = os.pread(self.told, 1 << 20, 0).decode(errors="replace")
        hit, _, said = said.partition("\n") if "\n" in said else (said, "", "")
        return Run(code, hit, said, time.monotonic() - begun)

    def _act(self, action: Callable[[Store], None]) -> int:
        State.done, State.hit, State.told = 0, "", self.told
        code = 99
        said = ""
        died: list[str] = []
        threading.excepthook = lambda a: died.append(f"{a.exc_type.__name__}: {a.exc_value}")
        try:
            store = Store(self.root, create=True)
            before = open_files()
            State.armed = True
            try:
                action(store)
                code = 0
            except (HydraError, OSError) as error:
                code, said = 1, f"{type(error).__name__}: {error}"
            finally:
                State.armed = False
            store.close()
            gc.collect()
            if more := open_files() - before - {f for f in before if "catalog" in f}:
                code, said = 98, f"left open: {sorted(more)}; {said}"
            if died:
                code, said = 97, f"a thread died: {died[0]}"
        except BaseException:
            said = traceback.format_exc()
        os.write(self.told, f"\n{said}".encode())
        return code


def open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
    return {f for f in found if "/proc/" not in f}


def copy_tree(source: Path, target: Path) -> None:
    """``cp -a`` of a few small files: links between them stay links, and a journal goes on naming them."""
    made: dict[int, str] = {}
    numbers: dict[int, int] = {}
    journals = []
    pending = [(os.fspath(source), os.fspath(target))]
    while pending:
        here, there = pending.pop()
        os.mkdir(there)
        for entry in os.scandir(here):
            stat, to = entry.stat(follow_symlinks=False), os.path.join(there, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append((entry.path, to))
            elif stat.st_ino in made:
                os.link(made[stat.st_ino], to)
            elif entry.is_symlink():
                os.symlink(os.readlink(entry.path), to)
            else:
                shutil.copyfile(entry.path, to)
                shutil.copystat(entry.path, to)
                made[stat.st_ino] = to
                numbers[stat.st_ino] = os.stat(to).st_ino
                if entry.name.startswith("journal-"):
                    journals.append(to)
    for journal in journals:
        said = json.loads(Path(journal).read_bytes())
        said["numbers"] = {key: numbers.get(value, value) for key, value in said["numbers"].items()}
        Path(journal).write_text(json.dumps(said))


def know_again(root: Path) -> None:
    """What the catalog knows of files it knows of their copies: a store is most often one that was not just copied."""
    path = root / ".hydrafs" / "catalog.sqlite"
    for path in (root / ".hydrafs").glob("*.sqlite*"):
        if path.suffix != ".sqlite":
            continue
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        database.execute("BEGIN")
        for table in ("files", "diffs"):
            for name, size, mtime_ns in database.execute(f"SELECT path, size, mtime_ns FROM {table}").fetchall():
                with contextlib.suppress(OSError):
                    stat = os.lstat(name)
                    if (stat.st_size, stat.st_mtime_ns) == (size, mtime_ns):
                        database.execute(
                            f"UPDATE {table} SET ctime_ns = ?, inode = ?, device = ? WHERE path = ?",
                            (stat.st_ctime_ns, stat.st_ino, stat.st_dev, name),
                        )
        database.execute("COMMIT")
        database.close()


# What must be left


def lost(now: Contents, before: Contents, after: Contents) -> list[str]:
    """What is not as it was, nor as it was to be."""
    found = []
    for name, sha256 in before.items():
        if after.get(name) == sha256:
            if now.get(name) != sha256:
                found.append(f"{name} is {'gone' if name not in now else 'another'}")
        elif sha256 in after.values() and sha256 not in now.values():
            found.append(f"what {name} was is gone")
        elif name in now and now[name] not in (sha256, after.get(name)) and now[name] != EMPTY:
            found.append(f"{name} is neither what it was nor what it was to be")
        elif name not in now and name in after and sha256 not in now.values():
            found.append(f"{name} is gone")
    found += [f"{name} was made" for name in now if name not in before and name not in after]
    return found


@dataclass
class Judge:
    """What was before and what is to be; says what is wrong with what is."""

    copies: Copies
    scenario: str
    before: Contents
    after: Contents
    doubles: set[str] = field(default_factory=set)
    earlier: Contents | None = None
    """What was before the kill that a start comes after: it may undo as well as go on."""
    known: dict[bytes, list[str]] = field(default_factory=dict)

    def look(self, code: int) -> list[str]:
        signature = self.signature()
        if signature is not None and (said := self.known.get(signature + bytes([code & 127]))) is not None:
            return said
        said = self._look(code)
        if signature is not None:
            self.known[signature + bytes([code & 127])] = said
        return said

    def _look(self, code: int) -> list[str]:
        with contextlib.closing(Store(self.copies.root)) as store:
            try:
                for when in ("at once", "after a start", "after it was tended"):
                    if when == "after a start":
                        tending.start(store)
                    elif when == "after it was tended":
                        tending.hold_parents(store)
                        tending.collect(store)
                    now = contents(store)
                    found = lost(now, self.before, self.after)
                    if found and self.earlier is not None:
                        found = lost(now, self.earlier, self.after)
                    if found:
                        return [f"{when}: {f}" for f in found]
                    if code == 0 and now != self.after and not self._is_loose():
                        return [f"{when}: it said that it was done, and it was not"]
            except (HydraError, OSError) as error:
                return [f"LOST {when}: {type(error).__name__}: {error}"]
            if self.scenario.startswith("undelete") and (gone := self._gone_from_trash(store)):
                return [gone]
            if doubles := doubles_of(store) - self.doubles:
                return [f"left behind: the diffs of {sorted(doubles)}"]
            root = self.copies.root
            left = [p.name for p in root.rglob(".hydrafs-*")] + [p.name for p in store.private.glob("journal-*")]
            return [f"left behind: {left}"] if left else []

    def _gone_from_trash(self, store: Store) -> str:
        """What was not given its name back must still be there to be given it."""
        for name in ("tuned0.safetensors", "base.safetensors"):
            try:
                if store.entry(store.root / name) is None:
                    trash.restore(store, name)
                if contents(store).get(name) != self.copies.trashed[name]:
                    return f"{name} came out of the trash as another"
            except (HydraError, OSError) as error:
                return f"LOST in the trash: {name}: {type(error).__name__}: {error}"
        return ""

    def _is_loose(self) -> bool:
        """Whether it may well have done a part, and go on with the rest another time."""
        return (
            self.scenario in MANY
            or self.scenario in FAULTS_ONLY
            # What is asked before, and not that itself; and what tells in its outcome that it was not done.
            or self.scenario in ("overwrite a base", "truncate a base", "dehydrate elsewhere")
            or self.scenario.startswith((AT_START, "collect"))
        )

    def signature(self) -> bytes | None:
        """Of all that is in the store, and of what the catalog knows of it; None where there are names made up."""
        state = hashlib.blake2b(digest_size=16)
        links: dict[int, int] = {}
        root = os.fspath(self.copies.root)
        pending = [root]
        while pending:
            folder = pending.pop()
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                if entry.name.startswith((".hydrafs-", "journal-")):
                    return None
                stat = entry.stat(follow_symlinks=False)
                link = links.setdefault(stat.st_ino, len(links))
                state.update(repr((entry.path, stat.st_mode, stat.st_nlink, link)).encode())
                if stat_module.S_ISDIR(stat.st_mode):
                    pending.append(entry.path)
                elif stat_module.S_ISREG(stat.st_mode) and ".sqlite" not in entry.name:
                    with open(entry.path, "rb") as file:
                        state.update(file.read())
                    for name in sorted(os.listxattr(entry.path)):
                        state.update(name.encode() + os.getxattr(entry.path, name))
        for path in Path(root, ".hydrafs").glob("*.sqlite"):
            with contextlib.closing(sqlite3.connect(path)) as database:
                for table, value in (("files", "sha256"), ("diffs", "record")):
                    for name, size, ctime_ns, inode, what in database.execute(
                        f"SELECT path, size, ctime_ns, inode, {value} FROM {table} ORDER BY path"
                    ):
                        with contextlib.suppress(OSError):
                            stat = os.lstat(name)
                            if (size, ctime_ns, inode) == (stat.st_size, stat.st_ctime_ns, stat.st_ino):
                                state.update(repr((name, what)).encode())
        return state.digest()


def doubles_of(store: Store) -> set[str]:
    found = files(store)
    return {name for name in found if f"{name}.hydra" in found}


# The scenarios


@dataclass
class Count:
    """What was tried, and what came of it."""

    calls: int = 0
    injections: int = 0
    failed: int = 0
    lost: int = 0
    """A model is gone, or another, or cannot be read; or it was said that something was done that was not."""
    leaks: int = 0
    """A descriptor was left open."""
    left: int = 0
    """A file was left that a start does not take away."""
    other: int = 0
    """It hung, died, or raised what nobody expects."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Count) -> None:
        for name in ("calls", "injections", "failed", "lost", "leaks", "left", "other", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults

    def row(self, name: str) -> str:
        return (
            f"{name:<52} {self.calls:>7} {self.injections:>10} {self.failed:>8} {self.lost:>6} {self.leaks:>6}"
            f" {self.left:>6} {self.other:>6} {self.seconds:>7.0f}"
        )


HEADER = "{:<52} {:>7} {:>10} {:>8} {:>6} {:>6} {:>6} {:>6} {:>7}".format(
    "scenario", "calls", "injections", "told", "lost", "leaks", "left", "other", "s"
)


def stages(copies: Copies, scenario: str) -> Iterator[str]:
    """Make the store what it is before the change; several times where there are several such stores."""
    copies.template, copies.earlier = copies.scratch / "template", None
    copies.fresh()
    if not scenario.startswith(AT_START):
        with contextlib.closing(Store(copies.root)) as store:
            if scenario == "remove a folder":
                (store.root / "folder").mkdir()
                for name in ("base", "tuned0", "child"):
                    old = store.root / f"{name}.safetensors"
                    scenarios.renaming.rename_model(store, old, store.root / "folder" / old.name)
            if scenario in ("undelete", "undelete a base", "empty the trash"):
                with scenarios.mounted(store) as tree:
                    copies.trashed = contents(store)
                    for name in ("tuned0", "base"):
                        tree.unlink(f"/{name}.safetensors")
            scenarios.prepare(store, scenario)
            contents(store)
        copies.keep("prepared")
        yield scenario
        return
    killed = scenario.removeprefix(AT_START)
    with contextlib.closing(Store(copies.root)) as store:
        scenarios.prepare(store, killed)
        copies.earlier = contents(store)
    copies.keep("prepared")
    prepared = copies.template
    State.mode, State.kinds = "kill", frozenset(watched.CHANGES)
    numbers = []
    for number in range(1, 10_000):
        copies.template = prepared
        copies.fresh()
        State.count = number
        if copies.run(lambda store: scenarios.change(store, killed)).code != -signal.SIGKILL:
            break
        left = list((copies.root / ".hydrafs").glob("journal-*")) or list(copies.root.rglob(".hydrafs-tmp-*"))
        if left:
            copies.keep(f"killed-{number}")
            numbers.append(number)
    if not numbers:
        return
    journals = [n for n in numbers if list((copies.scratch / f"killed-{n}" / ".hydrafs").glob("journal-*"))] or numbers
    chosen = sorted({journals[0], journals[len(journals) // 3], journals[2 * len(journals) // 3], journals[-1]})
    for number in chosen:
        copies.template = copies.scratch / f"killed-{number}"
        yield f"{scenario} at {number}"
    for number in numbers:
        shutil.rmtree(copies.scratch / f"killed-{number}")


def try_all(copies: Copies, scenario: str, sample: int, chance: random.Random) -> Count:
    """Every error of every call of a scenario, or so many of them."""
    total = Count()
    for stage in stages(copies, scenario):
        total.add(_try_stage(copies, stage, scenario, sample, chance))
    return total


def _try_stage(copies: Copies, stage: str, scenario: str, sample: int, chance: random.Random) -> Count:
    count, begun = Count(), time.monotonic()
    State.kinds, State.count, State.mode, State.seen = frozenset(watched.ERRORS), 0, "", None
    copies.fresh()
    with contextlib.closing(Store(copies.root)) as store:
        before, doubles = contents(store), doubles_of(store)
    # Once in this process, so that the others find all that is imported; then once with the calls counted.
    copies.fresh()
    with contextlib.closing(Store(copies.root)) as store:
        change(store, scenario, before)
    copies.fresh()
    calls = copies.scratch / "calls"

    def counted(store: Store) -> None:
        State.seen = []
        change(store, scenario, before)
        State.armed = False
        calls.write_text(" ".join(State.seen))
        State.seen = None

    run = copies.run(counted)
    assert run.code == 0, f"{stage}: without any fault: {run}"
    with contextlib.closing(Store(copies.root)) as store:
        if not scenario.startswith(AT_START):
            tending.start(store)
        after, doubles_after = contents(store), doubles_of(store)
    kinds = calls.read_text().split()
    count.calls = len(kinds)
    every = [
        (number, mode, error)
        for number, kind in enumerate(kinds, 1)
        for mode, error in [
            *(("fail", e) for e in range(len(errors_of(kind)))),
            *([("late", 0)] if kind in LATE else []),
        ]
    ]
    if sample and sample < len(every):
        every = sorted(chance.sample(every, sample))
    judge = Judge(copies, scenario, before, after, doubles | doubles_after, copies.earlier)
    for State.count, State.mode, State.error in every:
        copies.fresh()
        run = copies.run(lambda store: change(store, scenario, before))
        if not run.hit:
            continue  # it had fewer calls this time
        count.injections += 1
        count.failed += run.code == 1
        said: list[str] = []
        if run.code == 98:
            count.leaks += 1
            said.append(run.said)
        elif run.code == -signal.SIGALRM:
            count.other += 1
            said.append("it hangs")
        elif run.code not in (0, 1):
            count.other += 1
            said.append(f"ended with {run.code}: {run.said}")
        if found := judge.look(run.code):
            if not found[0].startswith("left behind"):
                count.lost += 1
                said += found
            elif "the diff is stored, but the original cannot be removed" not in run.said:
                count.left += 1
                said += found
        if said:
            count.faults.append(f"{stage}: call {State.count}, {run.hit}\n    said: {run.said.strip()[-300:]}\n    "
                                + "\n    ".join(said))  # fmt: skip
    State.count, State.mode = 0, ""
    count.seconds = time.monotonic() - begun
    return count


def every_scenario() -> list[str]:
    return [*scenarios.SCENARIOS, *scenarios.MORE, *FAULTS_ONLY, *(AT_START + name for name in KILLED)]


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20, help="how many are printed")
    parser.add_argument("scenarios", nargs="*")
    given = parser.parse_args()
    names = given.scenarios or every_scenario()
    logging.getLogger("hydrafs").addHandler(logging.NullHandler())
    logging.getLogger("hydrafs").propagate = False
    if given.scratch is None and os.access("/dev/shm", os.W_OK):
        given.scratch = "/dev/shm"
    print(HEADER, flush=True)
    begun = time.monotonic()
    shares = [names[i :: given.jobs] for i in range(given.jobs)]
    total = Count()
    with mmap.mmap(-1, 1 << 20) as totals:
        children = [_share(share, given, totals, number) for number, share in enumerate(shares)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for number in range(given.jobs):
            numbers = totals[number * 64 : (number + 1) * 64].rstrip(b"\0").split()
            for name, value in zip(
                ("calls", "injections", "failed", "lost", "leaks", "left", "other"), numbers, strict=False
            ):
                setattr(total, name, getattr(total, name) + int(value))
    total.seconds = time.monotonic() - begun
    print(total.row(f"all {len(names)}, seed {given.seed}"))
    return int(any(ended))


def _share(names: list[str], given: argparse.Namespace, totals: mmap.mmap, number: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        total = Count()
        with tempfile.TemporaryDirectory(prefix="hydrafs-failing-", dir=given.scratch) as scratch:
            copies = Copies(Path(scratch))
            make_template(copies.root)
            copies.keep("template")
            for name in names:
                done = try_all(copies, name, given.sample, random.Random(f"{given.seed} {name}"))
                total.add(done)
                print(done.row(name), flush=True)
                for fault in done.faults[: given.faults]:
                    print(f"  ! {fault}", flush=True)
        numbers = (total.calls, total.injections, total.failed, total.lost, total.leaks, total.left, total.other)
        row = " ".join(map(str, numbers)).encode()
        totals[number * 64 : number * 64 + len(row)] = row
        code = int(bool(total.faults))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
