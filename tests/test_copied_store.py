"""A store that was copied is another store: nothing of the one it came from is linked, believed or changed; and what a
kill left in the midst of a change is known by more than its number, which another file may have by now."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled
from test_keeping import Family, family, sha256_of  # noqa: F401 - a fixture
from test_space import snapshot

from hydrafs import keeping, replacing, tending
from hydrafs.catalog import Catalog
from hydrafs.cli import main
from hydrafs.errors import ParentUnavailable
from hydrafs.identity import FileIdentity
from hydrafs.store import Store

BASE, TUNED = "base.safetensors", "tuned0.safetensors"


def copy_of(root: Path, name: str = "copy") -> Path:
    target = root.with_name(name)
    shutil.copytree(root, target, symlinks=True, copy_function=shutil.copy2)
    return target


@pytest.mark.parametrize("absolute", [False, True], ids=["ours", "of before"])
@pytest.mark.parametrize("command", ["gc", "start"])
def test_nothing_of_the_other_store_is_taken(family: Family, absolute: bool, command: str) -> None:  # noqa: F811
    family.store.close()
    if absolute:
        database = sqlite3.connect(family.store.private / "catalog.sqlite")
        for table in ("files", "diffs", "directories"):
            database.execute(f"UPDATE {table} SET path = CAST(? || '/' || path AS BLOB)", (str(family.root),))
        database.commit()
        database.close()
    copy = copy_of(family.root)
    family.store = Store(family.root)
    (copy / BASE).unlink()
    shutil.rmtree(copy / ".hydrafs" / "held")
    before = snapshot(family.root)
    with contextlib.closing(Store(copy)) as store:
        if command == "gc":
            assert main(["gc", str(copy)]) == 0
        tending.start(store)
        tending.hold_parents(store)
        tending.maintain(store)
        assert not store.held.exists() or not list(store.held.iterdir())
        with pytest.raises(ParentUnavailable):
            Family.read.__get__(_Copy(store, copy))(TUNED)
    inodes = {s.st_ino for p in family.root.rglob("*") if p.is_file() for s in [p.stat()]}
    assert not inodes & {p.stat().st_ino for p in copy.rglob("*") if p.is_file()}
    files = {n: v for n, v in before.items() if not n.startswith(".hydrafs/catalog")}
    assert {n: v for n, v in snapshot(family.root).items() if n in files} == files
    family.check()


class _Copy:
    def __init__(self, store: Store, root: Path) -> None:
        self.store, self.root = store, root

    def path(self, name: str) -> Path:
        return self.root / name


@pytest.mark.parametrize("absolute", [False, True], ids=["ours", "of before"])
def test_a_store_that_is_moved_keeps_what_is_known(family: Family, absolute: bool) -> None:  # noqa: F811
    digest = sha256_of(family.originals[BASE])
    family.store.close()
    path = family.store.private / "catalog.sqlite"
    if absolute:
        database = sqlite3.connect(path)
        for table in ("files", "diffs", "directories"):
            database.execute(f"UPDATE {table} SET path = CAST(? || '/' || path AS BLOB)", (str(family.root),))
        database.commit()
        database.close()
        Store(family.root).close()  # it is opened once before it is moved
    moved = family.root.rename(family.root.with_name("moved"))
    family.store = Store(moved)
    family.root = moved
    assert keeping.is_proven(family.store, moved / BASE, digest)
    assert moved / BASE in family.store.paths_of(digest)
    family.check()


def test_a_catalog_of_paths_elsewhere(tmp_path: Path) -> None:
    identity = FileIdentity(1, 2, 3, 4, 5)
    root = tmp_path / "store"
    for place in ("/", str(root)):
        with contextlib.closing(Catalog(tmp_path / "c.sqlite", root=Path(place))) as catalog:
            catalog.remember_sha256(root / "x", identity, bytes(32))
            catalog.remember_sha256(root.with_name("store2") / "y", identity, bytes(32))
            assert catalog.sha256(root / "x", identity) == bytes(32)
            assert set(catalog.paths_of(bytes(32))) >= {root / "x", root.with_name("store2") / "y"}


@pytest.mark.parametrize("place", [".hydrafs/x.safetensors", "sub/.hydrafs-y/x.safetensors", "../x.safetensors"])
def test_what_is_no_model_of_the_store_serves_nobody(family: Family, place: str) -> None:  # noqa: F811
    path = family.root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    data = family.originals[BASE]
    path.write_bytes(data)
    family.store.catalog.remember_sha256(path, FileIdentity.of(path.stat()), sha256_of(data))
    assert family.store.paths_of(sha256_of(data)) == [family.path(BASE)] or path not in family.store.paths_of(
        sha256_of(data)
    )


# What stands aside


@pytest.fixture
def killed(filled: Filled) -> Iterator[tuple[Filled, Path, Path]]:
    """A store whose worker was killed when the original had left its name and was to be removed: the store, the file
    that stands aside, and the diff."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover - in the child
        real = Path.unlink

        def unlink(self: Path, missing_ok: bool = False) -> None:
            if self.name.startswith(replacing.ASIDE):
                os._exit(0)
            real(self, missing_ok)

        Path.unlink = unlink  # type: ignore[method-assign]
        with contextlib.suppress(BaseException):
            filled.dehydrate()
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    (aside,) = filled.root.glob(f"{replacing.ASIDE}*")
    yield filled, aside, filled.tuned.with_name(filled.tuned.name + ".hydra")


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_a_copy_of_a_store_in_which_something_stands_aside(killed: tuple[Filled, Path, Path], journal: bool) -> None:
    filled, _, _ = killed
    copy = copy_of(filled.root)
    if not journal:
        for path in (copy / ".hydrafs").glob("journal-*"):
            path.unlink()
    with contextlib.closing(Store(copy)) as store:
        tending.start(store)
        tending.collect(store)
        assert not list(copy.glob(f"{replacing.ASIDE}*"))
        assert not (copy / filled.tuned.name).exists()
        tending.start(store)
        assert not list(store.private.glob("journal-*"))
        from test_keeping import read_model

        assert read_model(store, copy / filled.tuned.name) == filled.data


@pytest.mark.logs("has its name again")
@pytest.mark.parametrize("change", ["written", "no diff", "damaged diff", "other diff"])
def test_the_only_copy_of_what_somebody_wrote_gets_its_name_back(
    killed: tuple[Filled, Path, Path], change: str
) -> None:  # fmt: skip
    filled, aside, diff = killed
    copy = copy_of(filled.root)
    there, its_diff = copy / aside.name, copy / diff.name
    data = filled.data
    if change == "written":
        data = b"newer" + data
        there.write_bytes(data)
        its_diff.unlink()
    elif change == "no diff":
        its_diff.unlink()
    elif change == "damaged diff":
        its_diff.rename(copy / "else.safetensors.hydra")
        (copy / "else.safetensors.hydra").write_bytes(b"damaged")
    else:
        its_diff.unlink()
        (copy / "else").write_bytes(b"x")
    with contextlib.closing(Store(copy)) as store:
        tending.start(store)
        assert (copy / filled.tuned.name).read_bytes() == data
        assert not there.exists()


def test_what_has_no_name_to_get_is_named(
    killed: tuple[Filled, Path, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    filled, aside, _ = killed
    copy = copy_of(filled.root)
    (copy / aside.name).write_bytes(b"newer")
    with contextlib.closing(Store(copy)) as store:
        tending.start(store)
    assert (copy / aside.name).read_bytes() == b"newer", "the diff has the name, and is another model"
    assert any(aside.name in r.getMessage() for r in caplog.records)
    assert main(["gc", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aside"] == [aside.name]


# A number that is another file's


def test_a_diff_with_the_number_of_the_one_that_was_made(killed: tuple[Filled, Path, Path]) -> None:
    """Another diff was put in its place since, and has its inode number: the original is not removed for it."""
    filled, aside, diff = killed
    (journal,) = (filled.root / ".hydrafs").glob("journal-*")
    shutil.copy2(diff, diff.with_name("other"))
    with open(diff.with_name("other"), "ab") as file:
        file.write(b"longer")
    os.replace(diff.with_name("other"), diff)
    said = json.loads(journal.read_bytes())
    said["numbers"]["diff"] = diff.stat().st_ino
    journal.write_text(json.dumps(said))
    with contextlib.closing(Store(filled.root)) as store:
        tending.start(store)
    assert filled.tuned.read_bytes() == filled.data
    assert diff.exists(), "and that is not removed for what it is not"
    assert not aside.exists()


def test_a_file_with_the_number_of_the_one_that_was_copied_up(family: Family) -> None:  # noqa: F811
    """A diff that a user put back beside a file is not removed, whatever numbers the two have."""
    from hydrafs import journal

    diff = family.path(TUNED + ".hydra")
    plain = family.path(TUNED)
    plain.write_bytes(b"newer")
    with family.store.lock():
        numbers = {**journal.marks("diff", diff.stat()), **journal.marks("plain", plain.stat())}
        numbers["diff_size"] += 1
        journal.write(family.store, "copying-up", {"name": plain, "temporary": plain.with_name("gone")}, numbers)
    tending.start(family.store)
    assert diff.exists()
    # An entry of before knows the numbers only.
    with family.store.lock():
        old = {"diff": diff.stat().st_ino, "plain": plain.stat().st_ino}
        journal.write(family.store, "copying-up", {"name": plain, "temporary": plain.with_name("gone")}, old)
    tending.start(family.store)
    assert not diff.exists()
    assert plain.read_bytes() == b"newer"
