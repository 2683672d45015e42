"""The catalog is a cache: whatever happens to it, nothing fails and nothing is believed that is not so."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Filled

from hydrafs.cache import ChunkCache
from hydrafs.catalog import Catalog, ModelFacts, TensorFacts
from hydrafs.identity import FileIdentity
from hydrafs.opening import Opener
from hydrafs.store import Store

IDENTITY = FileIdentity(10, 20, 30, 40, 50)
FACTS = ModelFacts("opaque", (TensorFacts("w", "F16", (2, 3), 8, 12, ("tied",), b"sample"),))
SHA256 = bytes(range(32))
MODEL = Path("/models/x.ckpt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


def test_facts_are_kept_for_the_file_that_they_were_read_of(path: Path) -> None:
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.remember_sha256(MODEL, IDENTITY, SHA256)
        catalog.remember_facts(MODEL, IDENTITY, FACTS)
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.sha256(MODEL, IDENTITY) == SHA256
        assert catalog.facts(MODEL, IDENTITY) == FACTS
        assert catalog.paths_of(SHA256) == [MODEL]
        assert catalog.sha256(MODEL.with_name("y"), IDENTITY) == SHA256, "a link to it"


@pytest.mark.parametrize("field", ["size", "mtime_ns", "ctime_ns", "inode", "device"])
def test_facts_of_another_file_are_gone(path: Path, field: str) -> None:
    other = replace(IDENTITY, **{field: 7})
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.remember_sha256(MODEL, IDENTITY, SHA256)
        catalog.remember_facts(MODEL, IDENTITY, FACTS)
        assert catalog.sha256(MODEL, other) is None
        assert catalog.facts(MODEL, other) is None
        # What is learnt of the new file drops all that was known of the old one.
        catalog.remember_facts(MODEL, other, FACTS)
        assert catalog.sha256(MODEL, other) is None
        assert catalog.sha256(MODEL, IDENTITY) is None


def test_names_that_are_no_text_and_inodes_of_64_bits(path: Path) -> None:
    odd = Path(os.fsdecode(b"/models/caf\xe9.ckpt"))
    wide = replace(IDENTITY, inode=(1 << 64) - 1)
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.remember_sha256(odd, wide, SHA256)
        assert catalog.sha256(odd, wide) == SHA256
        assert catalog.paths_of(SHA256) == [odd]


def test_a_folders_mtime_is_kept_with_its_members(path: Path) -> None:
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.directory(MODEL) is None
        catalog.remember_directory(MODEL, (1 << 63) - 1, -5)
        catalog.remember_directory(MODEL, 8, 9)
        assert catalog.directory(MODEL) == (8, 9)


def use(catalog: Catalog) -> None:
    """Everything that a catalog can be asked; none of it may fail."""
    catalog.remember_sha256(MODEL, IDENTITY, SHA256)
    catalog.remember_facts(MODEL, IDENTITY, FACTS)
    catalog.remember_directory(MODEL, 1, 2)
    assert catalog.sha256(MODEL, IDENTITY) in (None, SHA256)
    assert catalog.facts(MODEL, IDENTITY) in (None, FACTS)
    assert catalog.paths_of(SHA256) in ([], [MODEL])
    assert catalog.directory(MODEL) in (None, (1, 2))
    catalog.close()


@pytest.mark.logs("damaged")
@pytest.mark.parametrize("content", [b"junk" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_no_database_is_made_anew(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    use(Catalog(path))
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.sha256(MODEL, IDENTITY) == SHA256


@pytest.mark.logs("damaged")
def test_a_database_of_another_version_is_made_anew(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    use(Catalog(path))
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.sha256(MODEL, IDENTITY) == SHA256


def test_a_database_with_other_tables_is_no_harm(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE files (other)")
    use(Catalog(path))


def test_junk_anywhere_in_the_database(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Catalog(path)) as catalog:
        for i in range(200):
            catalog.remember_sha256(MODEL.with_name(f"{i}"), IDENTITY, SHA256)
            catalog.remember_facts(MODEL.with_name(f"{i}"), IDENTITY, FACTS)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        start = rng.randrange(len(whole))
        damaged[start : start + 500] = rng.randbytes(min(500, len(whole) - start))
        path.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
        catalog = Catalog(path)
        for i in range(0, 200, 20):
            # A name or a number that was hit may be found changed, never as what it is not in kind.
            known = catalog.sha256(MODEL.with_name(f"{i}"), IDENTITY)
            assert known is None or len(known) == 32
            facts = catalog.facts(MODEL.with_name(f"{i}"), IDENTITY)
            assert facts is None or isinstance(facts, ModelFacts)
        catalog.remember_sha256(MODEL, IDENTITY, SHA256)
        catalog.paths_of(SHA256)
        catalog.directory(MODEL)
        catalog.close()
        path.unlink(missing_ok=True)


def test_rows_that_hold_something_else(path: Path) -> None:
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.remember_sha256(MODEL, IDENTITY, SHA256)
        catalog.remember_facts(MODEL, IDENTITY, FACTS)
    for value in (b"short", "text", 12, b"", b"\x92\xa6opaque\x91\x01"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("UPDATE files SET sha256 = ?, tensors = ?", (value, value))
            database.execute("INSERT OR REPLACE INTO files (path, sha256) VALUES ('text', ?)", (SHA256,))
            database.execute("INSERT OR REPLACE INTO directories VALUES (?, 'text', 'text')", (os.fsencode(MODEL),))
            database.commit()
        with contextlib.closing(Catalog(path)) as catalog:
            assert catalog.sha256(MODEL, IDENTITY) is None
            assert catalog.facts(MODEL, IDENTITY) is None
            assert catalog.paths_of(SHA256) == []
            assert catalog.directory(MODEL) is None


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    use(Catalog(tmp_path / "no" / "such" / "folder" / "catalog.sqlite"))
    use(Catalog(tmp_path / "file" / "catalog.sqlite"))
    use(Catalog(tmp_path))  # a folder stands there
    use(Catalog(None))


def test_a_database_that_is_deleted_while_it_is_open(path: Path) -> None:
    catalog = Catalog(path)
    catalog.remember_sha256(MODEL, IDENTITY, SHA256)
    path.unlink()
    use(catalog)


def test_a_database_that_someone_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is waited for a while, and then done without."""
    connect = sqlite3.connect

    def impatient(*args: object, **options: object) -> sqlite3.Connection:
        return connect(*args, **{**options, "timeout": 0.01})  # type: ignore[arg-type]

    monkeypatch.setattr(sqlite3, "connect", impatient)
    Catalog(path).close()
    with contextlib.closing(connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        use(Catalog(path))
        other.execute("ROLLBACK")
    use(Catalog(path))


def test_many_threads_share_a_catalog(path: Path) -> None:
    with contextlib.closing(Catalog(path)) as catalog:
        barrier = threading.Barrier(8)

        def one(number: int) -> None:
            barrier.wait(30)
            for i in range(40):
                name = MODEL.with_name(f"{number}-{i}")
                catalog.remember_sha256(name, IDENTITY, SHA256)
                catalog.remember_facts(name, IDENTITY, FACTS)
                assert catalog.sha256(name, IDENTITY) == SHA256
                assert catalog.facts(name, IDENTITY) == FACTS

        with ThreadPoolExecutor(8) as pool:
            for task in [pool.submit(one, n) for n in range(8)]:
                task.result(60)
        assert len(catalog.paths_of(SHA256)) == 320


_PROCESS = """
import logging, sys
from pathlib import Path
from hydrafs.catalog import Catalog
from hydrafs.identity import FileIdentity
logging.basicConfig(level=logging.INFO)
sys.stdin.readline()
catalog = Catalog(Path(sys.argv[1]))
for i in range(100):
    catalog.remember_sha256(Path(f"/m/{sys.argv[2]}-{i}"), FileIdentity(1, 2, 3, 4, 5), bytes(32))
catalog.close()
"""


def test_several_processes_share_a_catalog(path: Path) -> None:
    """All of them make it at once, and then write to it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, path, str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    said = [p.communicate("go\n", timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0] * 4
    assert said == [("", "")] * 4
    with contextlib.closing(Catalog(path)) as catalog:
        assert len(catalog.paths_of(bytes(32))) == 400


# In a store


@pytest.mark.parametrize("how", ["deleted", "damaged", "folder"])
def test_a_store_works_without_what_its_catalog_knew(
    filled: Filled, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled.dehydrate()
    catalog = filled.root / ".hydrafs" / "catalog.sqlite"
    assert catalog.exists()
    if how == "damaged":
        catalog.write_bytes(b"junk" * 3000)
    else:
        catalog.unlink()
    if how == "folder":
        catalog.mkdir()
    with (
        contextlib.closing(Store(filled.root)) as store,
        Opener(store, ChunkCache(1 << 20)).open_diff(filled.diff) as model,
    ):
        assert model.pread(0, model.size) == filled.data


def test_a_sha256_that_the_catalog_knows_spares_the_reading(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.dehydrate()
    monkeypatch.setattr("hydrafs.opening.sha256", lambda *args: pytest.fail("the base was hashed again"))
    monkeypatch.setattr("hydrafs.opening.probe", lambda *args: pytest.fail("the base was probed again"))
    with contextlib.closing(Store(filled.root)) as store:
        Opener(store, ChunkCache(1 << 20)).open_diff(filled.diff).close()


def test_a_store_in_a_folder_that_cannot_be_written(filled: Filled) -> None:
    """As root every folder can be written; what decides is whether there is a ``.hydrafs`` in it."""
    filled.dehydrate()
    elsewhere = filled.root.parent / "read-only"
    elsewhere.mkdir()
    for path in (filled.diff, filled.base):
        path.rename(elsewhere / path.name)
    with (
        contextlib.closing(Store(elsewhere)) as store,
        Opener(store, ChunkCache(1 << 20)).open_diff(elsewhere / filled.diff.name) as model,
    ):
        assert model.pread(0, model.size) == filled.data
    assert sorted(p.name for p in elsewhere.iterdir()) == ["base.safetensors", "tuned.safetensors.hydra"]
