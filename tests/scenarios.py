"""Changes of a store that are killed, or that fail, at each of their calls; and what must be left then.

``prepare(store, scenario)`` does what comes before, ``change(store, scenario)`` is the change itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from watched import State

from hydrafs import arithmetic, containers, keeping, renaming, tending
from hydrafs.cache import ChunkCache
from hydrafs.computing import make_virtual
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.opening import Opener
from hydrafs.policy import Policy
from hydrafs.recipes import Model
from hydrafs.restore import rehydrate, uncompress
from hydrafs.store import Store
from hydrafs.worker import Worker
from hydrafs.writing import RENAME_EXCHANGE, WritableTree

SCENARIOS = [
    "dehydrate", "remove a base", "remove a diff that is a parent", "remove the last", "file over base",
    "file over diff", "diff over base", "diff over diff", "overwrite a base", "truncate a base", "collect", "rehome",
    "rehydrate in place",
]  # fmt: skip
MORE = [
    "dehydrate and keep", "dehydrate again", "dehydrate elsewhere", "dehydrate a base", "a worker's step",
    "remove a file and the diff behind it", "remove the last dependent of a retired diff", "replace the last",
    "remove all", "base over diff", "diff over file", "diff over a diff behind its file", "rename with a pin",
    "rename a folder that holds parents", "move a diff into a folder", "move a base into a folder",
    "exchange two diffs", "exchange a diff and a base", "save over a model", "link a diff", "attributes",
    "write into a diff", "write into a diff that is a parent", "write into a base", "overwrite a diff",
    "overwrite a diff that is a parent", "cut a diff", "cut a base to nothing", "rehydrate beside", "uncompress",
    "uncompress a parent", "merge", "hold the parents", "collect a retired diff and what it needs",
    "collect with dependents of a retired diff", "rehome two", "rehome a diff that is a parent",
]  # fmt: skip
"""Changes, the most telling first."""

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
    "collect": ["base", "child", "tuned0", "tuned1", "tuned2"],
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
    armed, State.armed = State.armed, False
    tree = WritableTree(store.root)
    tree.start()
    State.armed = armed
    try:
        yield tree
    finally:
        State.armed = False
        tree.stop()


def write(tree: WritableTree, name: str, flags: int, data: bytes) -> None:
    with contextlib.closing(tree.open(f"/{name}.safetensors", flags)) as file:
        file.pwrite(0, memoryview(data))


def merge(store: Store, a: Path, b: Path, target: Path) -> None:
    with contextlib.ExitStack() as stack:
        opener = stack.enter_context(contextlib.closing(Opener(store, ChunkCache(1 << 20))))
        entries = [store.locate(path) for path in (a, b)]
        models = []
        for entry in entries:
            source = stack.enter_context(contextlib.closing(opener.open(entry)))
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
        assert tending.rehome(store, OPTIONS) or State.count
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
        with contextlib.closing(tree.create("/tuned0.safetensors.tmp", os.O_RDWR, 0o600)) as file:
            file.pwrite(0, memoryview(b"new"))
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
