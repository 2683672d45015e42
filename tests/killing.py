"""Runs one change of a store again and again, killed at a further file operation each time, and looks at what is left.

Started by ``test_crash.py`` as ``killing.py TEMPLATE SCRATCH SCENARIO MODE FIRST STEP LIMIT``; prints how many kills
there were. A process without torch, so that a fork is cheap.
"""

from __future__ import annotations

import os
import signal
import sys


class State:
    """Which operation is next, and at which of them the process dies."""

    done = 0
    armed = False
    count = 0
    mode = ""


def step(call, watched=lambda *args: True):  # type: ignore[no-untyped-def]
    def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
        if not State.armed or not watched(*args):
            return call(*args, **kwargs)
        State.done += 1
        number = State.done
        if number == State.count and State.mode == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:
            if number == State.count and State.mode == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


# Before pathlib is imported: that of Python 3.10 keeps these functions.
for name in ("fsync", "link", "rename", "replace", "unlink", "fchmod", "fchown", "utime", "mkdir", "rmdir", "setxattr",
             "copy_file_range", "pwrite", "ftruncate", "chmod"):  # fmt: skip
    setattr(os, name, step(getattr(os, name)))
os.open = step(os.open, lambda path, flags, *rest: flags & os.O_CREAT)  # type: ignore[assignment]

import contextlib  # noqa: E402
import hashlib  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

from hydrafs import arithmetic, containers, keeping, renaming, tending  # noqa: E402
from hydrafs.cache import ChunkCache  # noqa: E402
from hydrafs.computing import make_virtual  # noqa: E402
from hydrafs.dehydrate import Options, dehydrate  # noqa: E402
from hydrafs.opening import Opener  # noqa: E402
from hydrafs.policy import Policy  # noqa: E402
from hydrafs.recipes import Model  # noqa: E402
from hydrafs.restore import rehydrate, uncompress  # noqa: E402
from hydrafs.store import Store  # noqa: E402
from hydrafs.worker import Worker  # noqa: E402
from hydrafs.writing import RENAME_EXCHANGE, WritableTree  # noqa: E402

OPTIONS = Options(jobs=1, chunk_nbytes=256 << 10)
Contents = dict[str, str]


def contents(store: Store) -> Contents:
    """What each listed name reads as."""
    found = {}
    with contextlib.closing(Opener(store, ChunkCache(1 << 20))) as opener:
        for model in store.models():
            with contextlib.closing(opener.open(model)) as source:
                found[model.name] = hashlib.sha256(source.pread(0, source.size)).hexdigest()
    return found


NAMES = ("base", "other-base", "tuned0", "tuned1", "tuned2", "child", "fresh")
REMOVED = {
    "collect": ["child", "tuned0", "tuned1", "tuned2", "base"],
    "collect a retired diff and what it needs": ["tuned0", "base", "child", "tuned1", "tuned2"],
    "collect with dependents of a retired diff": ["tuned0"],
    "rehome": ["base", "child", "tuned1", "tuned2"],
    "rehome two": ["base", "child", "tuned2"],
    "rehome a diff that is a parent": ["base", "tuned1", "tuned2"],
    "remove the last": ["base", "child", "tuned0", "tuned1"],
    "remove the last dependent of a retired diff": ["tuned0"],
    "replace the last": ["base", "child", "tuned0", "tuned1"],
}
"""What has been removed before the change that is killed."""


def prepare(store: Store, scenario: str) -> None:
    """What has been done before the change that is killed."""
    path = {n: store.root / f"{n}.safetensors" for n in NAMES}
    folder = store.root / "folder"
    for name in REMOVED.get(scenario, ()):
        keeping.remove_model(store, path[name])
    if scenario == "rename a folder that holds parents":
        folder.mkdir()
        store.pin(["base.safetensors"])
        for name in ("base", "tuned0", "tuned1"):
            renaming.rename_model(store, path[name], folder / path[name].name)
    elif scenario in ("dehydrate elsewhere", "move a diff into a folder", "move a base into a folder"):
        folder.mkdir()
    elif scenario == "dehydrate again":
        rehydrate(store, store.locate(path["tuned1"]))
    elif scenario == "rename with a pin":
        store.pin(["base.safetensors"])
    elif scenario == "a worker's step":
        os.unlink(path["other-base"])
    elif scenario == "hold the parents":
        shutil.rmtree(store.held)
    elif scenario in ("diff over a diff behind its file", "remove a file and the diff behind it"):
        rehydrate(store, store.locate(path["tuned0"]))


@contextlib.contextmanager
def mounted(store: Store) -> Iterator[WritableTree]:
    """The tree that a mount shows; its start is none of what is killed."""
    State.armed = False
    tree = WritableTree(store.root)
    tree.start()
    State.armed = True
    yield tree


def write(tree: WritableTree, name: str, flags: int, data: bytes) -> None:
    file = tree.open(f"/{name}.safetensors", flags)
    file.pwrite(0, memoryview(data))
    file.close()


def merge(store: Store, a: Path, b: Path, target: Path) -> None:
    with contextlib.closing(Opener(store, ChunkCache(1 << 20))) as opener:
        entries = [store.locate(path) for path in (a, b)]
        models = []
        for entry in entries:
            source = opener.open(entry)
            models.append(Model(entry.name, source, containers.parse(source, entry.name)))
        recipe = arithmetic.merge(models[0], models[1], 0.5)
        make_virtual(store, recipe, entries, target, jobs=1, progress=lambda *a: None)


def change(store: Store, scenario: str) -> None:
    """The change itself."""
    path = {n: store.root / f"{n}.safetensors" for n in NAMES}
    folder = store.root / "folder"
    worked: dict[str, Callable[[], object]] = {
        "dehydrate": lambda: dehydrate(store, path["fresh"], OPTIONS),
        "dehydrate and keep": lambda: dehydrate(store, path["fresh"], replace(OPTIONS, keep=True)),
        "dehydrate again": lambda: dehydrate(store, path["tuned1"], OPTIONS),
        "dehydrate elsewhere": lambda: dehydrate(store, path["fresh"], OPTIONS, folder=folder),
        "dehydrate a base": lambda: dehydrate(store, path["base"], replace(OPTIONS, bases=(path["other-base"],))),
        "remove a base": lambda: keeping.remove_model(store, path["base"]),
        "remove a diff that is a parent": lambda: keeping.remove_model(store, path["tuned0"]),
        "remove a file and the diff behind it": lambda: keeping.remove_model(store, path["tuned0"]),
        "remove the last": lambda: keeping.remove_model(store, path["tuned2"]),
        "remove the last dependent of a retired diff": lambda: keeping.remove_model(store, path["child"]),
        "replace the last": lambda: renaming.rename_model(store, path["fresh"], path["tuned2"]),
        "file over base": lambda: renaming.rename_model(store, path["fresh"], path["base"]),
        "file over diff": lambda: renaming.rename_model(store, path["fresh"], path["tuned0"]),
        "base over diff": lambda: renaming.rename_model(store, path["base"], path["tuned1"]),
        "diff over base": lambda: renaming.rename_model(store, path["tuned1"], path["base"]),
        "diff over file": lambda: renaming.rename_model(store, path["tuned0"], path["fresh"]),
        "diff over diff": lambda: renaming.rename_model(store, path["tuned1"], path["tuned0"]),
        "diff over a diff behind its file": lambda: renaming.rename_model(store, path["tuned1"], path["tuned0"]),
        "rename with a pin": lambda: renaming.rename_model(store, path["base"], store.root / "new.safetensors"),
        "rename a folder that holds parents": lambda: renaming.rename_model(store, folder, store.root / "moved"),
        "move a diff into a folder": lambda: renaming.rename_model(store, path["tuned0"], folder / "x.safetensors"),
        "move a base into a folder": lambda: renaming.rename_model(store, path["base"], folder / "x.safetensors"),
        "overwrite a base": lambda: keeping.before_overwrite(store, path["base"]),
        "truncate a base": lambda: keeping.before_overwrite(store, path["base"], truncate=True),
        "rehydrate beside": lambda: rehydrate(store, store.locate(path["tuned0"])),
        "rehydrate in place": lambda: rehydrate(store, store.locate(path["tuned0"]), instead=True),
        "uncompress": lambda: uncompress(store, store.locate(path["tuned1"]), jobs=1),
        "uncompress a parent": lambda: uncompress(store, store.locate(path["tuned0"]), jobs=1),
        "merge": lambda: merge(store, path["base"], path["tuned1"], store.root / "merged.safetensors"),
        "hold the parents": lambda: tending.hold_parents(store),
        "a worker's step": lambda: Worker(store, Policy(settle_seconds=0, min_nbytes=1)).step(),
    }
    if scenario.startswith("collect"):
        tending.collect(store)
    elif scenario.startswith("rehome"):
        assert tending.rehome(store, OPTIONS)
        tending.collect(store)
    elif scenario in worked:
        worked[scenario]()
    else:
        with mounted(store) as tree:
            through_a_mount(tree, scenario)


def through_a_mount(tree: WritableTree, scenario: str) -> None:
    """What a program does to a mount."""
    if scenario == "write into a diff":
        write(tree, "tuned1", os.O_RDWR, b"x")
    elif scenario == "write into a diff that is a parent":
        write(tree, "tuned0", os.O_RDWR, b"x")
    elif scenario == "write into a base":
        write(tree, "base", os.O_RDWR, b"x")
    elif scenario == "overwrite a diff":
        write(tree, "tuned1", os.O_WRONLY | os.O_TRUNC, b"new")
    elif scenario == "overwrite a diff that is a parent":
        write(tree, "tuned0", os.O_WRONLY | os.O_TRUNC, b"new")
    elif scenario == "cut a diff":
        tree.truncate("/tuned1.safetensors", 1000)
    elif scenario == "cut a base to nothing":
        tree.truncate("/base.safetensors", 0)
    elif scenario == "exchange two diffs":
        tree.rename("/tuned0.safetensors", "/tuned1.safetensors", RENAME_EXCHANGE)
    elif scenario == "exchange a diff and a base":
        tree.rename("/tuned1.safetensors", "/base.safetensors", RENAME_EXCHANGE)
    elif scenario == "attributes":
        tree.chmod("/tuned0.safetensors", 0o600)
        tree.utimens("/tuned0.safetensors", (5, 5), (5, 5))
    elif scenario == "link a diff":
        tree.link("/tuned0.safetensors", "/link.safetensors")
    elif scenario == "remove all":
        for name in sorted(entry.name for entry in tree.readdir("/")):
            tree.unlink(f"/{name}")
    elif scenario == "save over a model":
        file = tree.create("/tuned0.safetensors.tmp", os.O_RDWR, 0o600)
        file.pwrite(0, memoryview(b"new"))
        file.close()
        tree.rename("/tuned0.safetensors.tmp", "/tuned0.safetensors")
    else:
        raise ValueError(scenario)


SLACK = 64
"""Bytes: the time that a diff was made at is in it, and compressed."""
MANY = {"a worker's step", "exchange two diffs", "exchange a diff and a base", "remove all", "rehome two"}
"""Changes of several models, each of which may have been made."""

GOING = {"remove a file and the diff behind it", "diff over a diff behind its file"}
"""Changes by which a diff that hides behind a file is to go: it goes first, and nobody sees that."""


def files(store: Store) -> set[str]:
    """Every file of the store, diffs behind a file of their name too; neither hydrafs' own, nor what a program leaves
    that is killed."""
    found = (p.relative_to(store.root) for p in store.root.rglob("*") if not p.is_dir() and p.suffix != ".tmp")
    return {str(p) for p in found if p.parts[0] != ".hydrafs"}


def used_nbytes(store: Store) -> int:
    """What models take, held and retired ones too; a file of several names once."""
    found = {}
    for path in store.root.rglob("*"):
        if path.suffix in (".safetensors", ".hydra") or path.parent in (store.held, store.retired):
            stat = os.lstat(path)
            found[stat.st_ino] = stat.st_size
    return sum(found.values())


def loose_pins(store: Store, before: Contents) -> set[str]:
    """The contents that were pinned and are not now."""
    now = contents(store)
    was = {sha256 for name, sha256 in before.items() if Path(name).name == "base.safetensors"}
    return was - {sha256 for name, sha256 in now.items() if store.is_pinned(store.root / name)}


def main() -> None:
    """See the top of this file."""
    template, scratch, scenario, State.mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    first, stride, limit = (int(a) for a in sys.argv[5:])
    root = scratch / "store"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        # Links between the files stay links.
        subprocess.run(["cp", "-a", template, root], check=True)

    def run(action: Callable[[Store], None]) -> int:
        child = os.fork()
        if not child:
            State.done, code = 0, 99
            try:
                with contextlib.closing(Store(root, create=True)) as store:
                    State.armed = True
                    action(store)
                    State.armed = False
                    code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status)

    fresh()
    with contextlib.closing(Store(root)) as store:
        prepare(store, scenario)
        before, files_before, pinned = contents(store), files(store), bool(store.pinned)
    prepared = scratch / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    root.rename(prepared)
    template = prepared
    fresh()
    with contextlib.closing(Store(root)) as store:
        most = tidy(store)
    fresh()
    State.count = 0
    assert run(lambda store: change(store, scenario)) == 0
    with contextlib.closing(Store(root)) as store:
        after, files_after = contents(store), files(store)
        tending.start(store)
        assert files(store) == files_after, "a start took what was made on purpose"
        most = max(most, tidy(store))
    empty = hashlib.sha256(b"").hexdigest()
    State.count, kills = first, 0
    while kills < limit:
        fresh()
        code = run(lambda store: change(store, scenario))
        if code == 0:
            break  # there are no more operations
        assert code == -signal.SIGKILL, f"{scenario}, operation {State.count}: it failed"
        kills += 1
        where = f"{scenario}, killed {State.mode} operation {State.count}"
        with contextlib.closing(Store(root)) as store:
            now = contents(store)
            assert now in (before, after) or is_between(now, before, after), f"{where}: {now}"
            assert not pinned or not loose_pins(store, before), f"{where}: a pin is lost"
            tending.start(store)
            now = contents(store)
            whole = now in (before, after) or is_whole(now, before, after) or scenario in MANY
            assert whole, f"{where}: after a start {now}\nbefore {before}\nafter {after}"
            if scenario not in MANY:
                allowed = [files_before, files_after]
                if scenario in GOING:
                    allowed.append(
                        {f for f in files_before if f.removesuffix(".hydra") == f or f[:-6] not in files_before}
                    )
                assert files(store) in allowed, f"{where}: {files(store)}"
            left = [p for p in root.rglob(".hydrafs-*") if p != store.private]
            left += list(store.private.glob("journal-*"))
            assert not left, f"{where}: {left} left"
            # What is in order now stays so when it is tended, and when the change is made after all.
            used = tidy(store)
            assert contents(store) == now, f"{where}: collected too much"
            assert scenario in MANY or scenario == "cut a diff" or used <= most + SLACK, (
                f"{where}: {used} bytes, at most {most} before and after"
            )
        if now == before != after:
            keep, State.count = State.count, 0
            assert run(lambda store: change(store, scenario)) == 0, f"{where}: it cannot be made again"
            State.count = keep
            with contextlib.closing(Store(root)) as store:
                assert contents(store) == after, f"{where}: made again"
        State.count += stride
    assert empty not in before.values()
    print(kills)


def tidy(store: Store) -> int:
    """Hold what is to be held, remove what nobody needs; what is used then."""
    tending.hold_parents(store)
    tending.collect(store)
    return used_nbytes(store)


def is_whole(now: Contents, before: Contents, after: Contents) -> bool:
    """A file that is written to by several calls: it may have been made empty, or a plain file, and no more."""
    states = {hashlib.sha256(b"").hexdigest()}
    odd = [n for n in {*before, *after, *now} if now.get(n) not in (before.get(n), after.get(n))]
    return len(odd) == 1 and now.get(odd[0]) in states


def is_between(now: Contents, before: Contents, after: Contents) -> bool:
    """rename(2): for a moment both names may be there. Every content is there, and no name has one of its own."""
    if is_whole(now, before, after):
        return True
    lost = {n: s for n, s in before.items() if n not in now}
    odd = {n: s for n, s in now.items() if s not in (before.get(n), after.get(n))}
    return not odd and all(n not in after for n in lost) and set(after.values()) <= set(now.values())


if __name__ == "__main__":
    main()
