"""An SQLite cache of what the files of a store are.

Rule 1: everything in it can be found again by reading the files; it may be deleted at any time.
Rule 2: a fact is kept with the identity of the file that it was read from, and is gone when that differs.
Rule 3: trouble with the database never fails an operation: the fact is unknown, and is read again.
Rule 4: who only looks writes nothing: what is learnt is kept in memory, and is written once the store is acted on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec

from hydrafs.covered import named, reached
from hydrafs.digests import checked
from hydrafs.identity import FileIdentity

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, device INTEGER,
    sha256 BLOB, tensors BLOB
) WITHOUT ROWID;
CREATE INDEX files_by_sha256 ON files (sha256);
CREATE TABLE directories (path BLOB PRIMARY KEY, members INTEGER, mtime_ns INTEGER) WITHOUT ROWID;
"""
_DIFFS_TABLE = """
CREATE TABLE diffs (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, device INTEGER,
    record BLOB
) WITHOUT ROWID;
"""
_SCHEMA += _DIFFS_TABLE
_FROM_1 = f"BEGIN EXCLUSIVE;{_DIFFS_TABLE}PRAGMA user_version = 2;COMMIT;"
_LATER = """
CREATE TABLE IF NOT EXISTS hashes (
    sha256 BLOB, name TEXT, value BLOB, PRIMARY KEY (sha256, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (sha256 BLOB PRIMARY KEY, data BLOB);
CREATE INDEX IF NOT EXISTS files_by_inode ON files (inode);
"""
"""Tables that a catalog of the same version may not have yet: it is not thrown away for them."""


_LEARNT = "learnt_"
"""How the tables of what was learnt are called where the file is only looked at."""


class TensorFacts(msgspec.Struct, array_like=True, frozen=True):
    """A tensor of a model: where it is, and a sample of its values (``hydrafs.fingerprint``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    aliases: tuple[str, ...]
    fingerprint: bytes


class ModelFacts(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a model without its values."""

    container: str
    tensors: tuple[TensorFacts, ...]


class DiffRecord(msgspec.Struct, array_like=True, frozen=True):
    """Which model a diff stands for, and which it needs: (SHA-256, size, name, probe) each."""

    sha256: bytes
    parents: tuple[tuple[bytes, int, str, int], ...]


def signed64(number: int) -> int:
    """The last 64 bits of a number, with a sign: what databases and JSON take."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _tables() -> list[tuple[str, tuple[str, ...], tuple[str, ...], str]]:
    """The tables of a catalog: name, columns, primary key, and how it is made."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.executescript(_SCHEMA + _LATER)
        tables = []
        for name, made in database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = database.execute(f"PRAGMA table_info({name})").fetchall()
            key = tuple(c[1] for c in columns if c[5])
            tables.append((name, tuple(c[1] for c in columns), key, made))
        return tables


def _views(database: sqlite3.Connection) -> str:
    """The statements that put in front of each table one of what is learnt, and a view of both in its place."""
    there = {row[0] for row in database.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall()}
    script = []
    for name, columns, key, made in _tables():
        learnt, names = _LEARNT + name, ", ".join(columns)
        script.append(made.replace(f"CREATE TABLE {name} ", f"CREATE TEMP TABLE {learnt} ", 1))
        view = f"SELECT {names} FROM temp.{learnt}"
        if name in there:
            same = " AND ".join(f"l.{column} = m.{column}" for column in key)
            view += f" UNION ALL SELECT {names} FROM main.{name} m WHERE NOT EXISTS"
            view += f" (SELECT 1 FROM temp.{learnt} l WHERE {same})"
        new = ", ".join(f"NEW.{column}" for column in columns)
        put = f"INSERT OR REPLACE INTO {learnt} VALUES ({new})"
        gone = " AND ".join(f"{column} = OLD.{column}" for column in key)
        script += [
            f"CREATE TEMP VIEW {name} AS {view}",
            f"CREATE TEMP TRIGGER insert_{name} INSTEAD OF INSERT ON {name} BEGIN {put}; END",
            f"CREATE TEMP TRIGGER update_{name} INSTEAD OF UPDATE ON {name} BEGIN {put}; END",
            f"CREATE TEMP TRIGGER delete_{name} INSTEAD OF DELETE ON {name}"
            f" BEGIN DELETE FROM {learnt} WHERE {gone}; END",
        ]
    return ";\n".join(script) + ";"


class Catalog:
    """Facts about files, by absolute path. Thread safety: any number of threads; processes share one file.

    Files in ``root`` are known by their paths in it, so that a store that is moved keeps what is known, and one that is
    copied knows nothing of the other's files.

    Without a path, or where the path cannot be written, the facts live in memory as long as the catalog does. With
    ``read_only`` they do too, in front of those of the file, which is not touched until ``keep_in`` is called.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False, root: Path | None = None) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._learnt = ""
        self._database = None
        if path is not None:
            self._database = self._look(path) if read_only else self._open(path)
        if self._database is None:
            self._database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            self._database.executescript(_SCHEMA)
        if not self._learnt:
            # A catalog that cannot be written has none of them: what is asked of them is unknown.
            with contextlib.suppress(sqlite3.Error):
                self._database.executescript(_LATER)

    def _open(self, path: Path) -> sqlite3.Connection | None:
        for attempt in range(2):
            database = None
            try:
                database = sqlite3.connect(path, timeout=5, check_same_thread=False, isolation_level=None)
                # It is a cache: losing the last facts in a power cut costs a reading, an fsync costs every writer.
                database.execute("PRAGMA synchronous = OFF")
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    database.executescript(f"BEGIN EXCLUSIVE;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
                elif version == 1:
                    database.executescript(_FROM_1)
                elif version != _SCHEMA_VERSION:
                    raise sqlite3.DatabaseError(f"catalog of version {version}")
                database.execute("SELECT path, size, tensors FROM files LIMIT 1").fetchone()
                database.execute("SELECT path, size, record FROM diffs LIMIT 1").fetchone()
                with contextlib.suppress(sqlite3.OperationalError):  # another process is at it
                    self._make_relative(database)
                return database
            except sqlite3.OperationalError as error:
                # Two processes that make it at once: the loser finds the tables there and only has to look again.
                if database is not None:
                    database.close()
                if "already exists" in str(error) and attempt == 0:
                    continue
                log.info("the catalog %s cannot be used (%s): facts are kept in memory", path, error)
                return None
            except sqlite3.DatabaseError as error:
                if database is not None:
                    database.close()
                log.warning("the catalog %s is damaged (%s): it is made anew", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
        return None

    def _look(self, path: Path) -> sqlite3.Connection | None:
        """The catalog at ``path``, not to be changed: a view of each table shows what is learnt and what it has."""
        database = None
        try:
            if not path.is_file():
                return None
            address = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode=ro"
            database = sqlite3.connect(address, uri=True, timeout=5, check_same_thread=False, isolation_level=None)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (1, _SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"catalog of version {version}")
            database.execute("PRAGMA temp_store = MEMORY")
            database.executescript(_views(database))
            database.execute("SELECT path, size, tensors FROM files LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            if database is not None:
                database.close()
            log.info("the catalog %s cannot be read (%s): facts are kept in memory", path, error)
            return None
        self._learnt = _LEARNT
        return database

    def keep_in(self, path: Path | None) -> None:
        """Keep the facts in the file at ``path`` from now on, those too that were learnt so far."""
        kept = self._open(path) if path is not None else None
        if kept is None:
            return
        with self._lock:
            looked, learnt = self._database, self._learnt
            assert looked is not None
            self._database, self._learnt = kept, ""
            with contextlib.suppress(sqlite3.Error):
                kept.executescript(_LATER)
            for table, columns, _, _ in _tables():
                names = ", ".join(columns)
                with contextlib.suppress(sqlite3.Error):
                    rows = looked.execute(f"SELECT {names} FROM {learnt}{table}").fetchall()
                    marks = ", ".join("?" * len(columns))
                    kept.executemany(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})", rows)
            looked.close()

    def _key(self, path: Path) -> bytes:
        """A file of a covered store has the name that it has when nothing covers it; one in the store, that in it."""
        name = named(path)
        home = named(self._root) if self._root is not None else ""
        if home and name.startswith(f"{home.rstrip('/')}/"):
            name = name[len(home.rstrip("/")) + 1 :]
        return os.fsencode(name)

    def _make_relative(self, database: sqlite3.Connection) -> None:
        """A catalog of before knows the files of the store by absolute paths."""
        if self._root is None:
            return
        home = os.fsencode(named(self._root).rstrip("/"))
        between = (home + b"/", home + b"0")  # what follows the slash
        for table in ("files", "diffs", "directories"):
            if database.execute(f"SELECT 1 FROM {table} WHERE path >= ? AND path < ? LIMIT 1", between).fetchone():
                database.execute(
                    f"UPDATE OR REPLACE {table} SET path = substr(path, ?) WHERE path >= ? AND path < ?",
                    (len(home) + 2, *between),
                )

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[sqlite3.Connection]:
        assert self._database is not None
        with self._lock:
            try:
                yield self._database
            except sqlite3.Error as error:
                log.info("the catalog did not answer: %s", error)

    @staticmethod
    def _identity(identity: FileIdentity) -> tuple[int, int, int, int, int]:
        # SQLite's integers are signed, of 64 bits; inodes use all of them, and times may be of any year.
        numbers = identity.size, identity.mtime_ns, identity.ctime_ns, identity.inode, identity.device
        return tuple(map(signed64, numbers))  # type: ignore[return-value]

    _FILE = "size = ? AND mtime_ns = ? AND ctime_ns = ? AND inode = ? AND device = ?"
    _WHERE = f"path = ? AND {_FILE}"

    def sha256(self, path: Path, identity: FileIdentity) -> bytes | None:
        """The SHA-256 of the file, if it is known for this identity, under this path or under another link to it."""
        key = (self._key(path), *self._identity(identity))
        row = None
        with self._cursor() as database:
            row = database.execute(
                f"SELECT sha256 FROM files WHERE {self._WHERE} AND sha256 IS NOT NULL", key
            ).fetchone() or database.execute(
                f"SELECT sha256 FROM files WHERE {self._FILE} AND sha256 IS NOT NULL", key[1:]
            ).fetchone()  # fmt: skip
        return row[0] if row and isinstance(row[0], bytes) and len(row[0]) == 32 else None

    def remember_sha256(self, path: Path, identity: FileIdentity, sha256: bytes) -> None:
        """Keep the SHA-256 that the file of this identity has."""
        self._remember(path, identity, "sha256", sha256)

    def facts(self, path: Path, identity: FileIdentity) -> ModelFacts | None:
        """The tensors of the model, if they are known for this identity."""
        key = (self._key(path), *self._identity(identity))
        row = None
        with self._cursor() as database:
            row = database.execute(f"SELECT tensors FROM files WHERE {self._WHERE}", key).fetchone()
        if not row or not isinstance(row[0], bytes):
            return None
        try:
            return msgspec.msgpack.decode(row[0], type=ModelFacts)
        except msgspec.DecodeError:
            return None

    def remember_facts(self, path: Path, identity: FileIdentity, facts: ModelFacts) -> None:
        """Keep what was read of the model of this identity."""
        self._remember(path, identity, "tensors", msgspec.msgpack.encode(facts))

    def _remember(self, path: Path, identity: FileIdentity, column: str, value: bytes) -> None:
        key = self._key(path)
        parts = self._identity(identity)
        with self._cursor() as database:
            known = database.execute(f"SELECT 1 FROM files WHERE {self._WHERE}", (key, *parts)).fetchone()
            if known:
                database.execute(f"UPDATE files SET {column} = ? WHERE path = ?", (value, key))
            else:
                database.execute(
                    "INSERT OR REPLACE INTO files (path, size, mtime_ns, ctime_ns, inode, device, "
                    f"{column}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (key, *parts, value),
                )

    def carry(self, old: Path, before: FileIdentity, new: Path, after: FileIdentity) -> None:
        """What is known of ``old`` as ``before`` is known of ``new`` as ``after``: one file, linked or renamed."""
        with self._cursor() as database:
            database.execute(
                "INSERT OR REPLACE INTO files (path, size, mtime_ns, ctime_ns, inode, device, sha256, tensors) "
                f"SELECT ?, ?, ?, ?, ?, ?, sha256, tensors FROM files WHERE {self._WHERE}",
                (self._key(new), *self._identity(after), self._key(old), *self._identity(before)),
            )

    def diff(self, path: Path, identity: FileIdentity) -> DiffRecord | None:
        """What the diff at ``path`` stands for and needs, if that is known for this identity."""
        row = None
        with self._cursor() as database:
            row = database.execute(
                f"SELECT record FROM diffs WHERE {self._WHERE}", (self._key(path), *self._identity(identity))
            ).fetchone()
        if not row or not isinstance(row[0], bytes):
            return None
        try:
            return msgspec.msgpack.decode(row[0], type=DiffRecord)
        except msgspec.DecodeError:
            return None

    def diffs_elsewhere(self, device: int) -> list[tuple[Path, int, DiffRecord]]:
        """The diffs that were seen on other devices than ``device``: where, on which, and what they are."""
        rows: list[tuple[bytes, int, bytes]] = []
        with self._cursor() as database:
            rows = database.execute(
                "SELECT path, device, record FROM diffs WHERE device != ?", (signed64(device),)
            ).fetchall()
        found = []
        for key, other, record in rows:
            with contextlib.suppress(msgspec.DecodeError, TypeError):
                found.append((self._place(key), other, msgspec.msgpack.decode(record, type=DiffRecord)))
        return found

    def remember_diff(self, path: Path, identity: FileIdentity, record: DiffRecord) -> None:
        """Keep what the diff of this identity stands for and needs."""
        with self._cursor() as database:
            database.execute(
                "INSERT OR REPLACE INTO diffs VALUES (?, ?, ?, ?, ?, ?, ?)",
                (self._key(path), *self._identity(identity), msgspec.msgpack.encode(record)),
            )

    def hashes(self, sha256: bytes) -> dict[str, bytes]:
        """Other hashes of the content of this SHA-256, by name (``hydrafs.digests``)."""
        rows: list[tuple[str, bytes]] = []
        with self._cursor() as database:
            rows = database.execute("SELECT name, value FROM hashes WHERE sha256 = ?", (sha256,)).fetchall()
        return checked((name, value) for name, value in rows if isinstance(name, str) and isinstance(value, bytes))

    def remember_hashes(self, sha256: bytes, hashes: Iterable[tuple[str, bytes]]) -> None:
        """Keep other hashes of the content of this SHA-256."""
        with self._cursor() as database:
            database.executemany(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", [(sha256, name, value) for name, value in hashes]
            )

    def block(self, sha256: bytes) -> bytes | None:
        """The bytes that ``remember_block`` was given for the content of this SHA-256; to be checked before use."""
        row = None
        with self._cursor() as database:
            row = database.execute("SELECT data FROM blocks WHERE sha256 = ?", (sha256,)).fetchone()
        return row[0] if row and isinstance(row[0], bytes) else None

    def remember_block(self, sha256: bytes, data: bytes) -> None:
        """Keep the bytes of the content of this SHA-256 that its partial hash is taken of (``hydrafs.digests``)."""
        with self._cursor() as database:
            database.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?)", (sha256, data))

    def forget_blocks(self, kept: Iterable[bytes]) -> None:
        """Forget the bytes of all contents but these."""
        with self._cursor() as database:
            known = {row[0] for row in database.execute("SELECT sha256 FROM blocks").fetchall()}
            database.executemany("DELETE FROM blocks WHERE sha256 = ?", [(s,) for s in known.difference(kept)])

    def paths_of(self, sha256: bytes) -> list[Path]:
        """Where files of this SHA-256 were seen; whether they still are is for the caller to check."""
        rows: list[tuple[bytes]] = []
        with self._cursor() as database:
            rows = database.execute("SELECT path FROM files WHERE sha256 = ?", (sha256,)).fetchall()
        return [self._place(row[0]) for row in rows if isinstance(row[0], bytes)]

    def _place(self, key: bytes) -> Path:
        text = os.fsdecode(key)
        return Path(reached(text)) if text.startswith("/") or self._root is None else self._root / text

    def directory(self, path: Path) -> tuple[int, int] | None:
        """The membership digest of a listed folder and the mtime_ns it was shown with."""
        row = None
        with self._cursor() as database:
            row = database.execute(
                "SELECT members, mtime_ns FROM directories WHERE path = ?", (self._key(path),)
            ).fetchone()
        return (row[0], row[1]) if row and isinstance(row[0], int) and isinstance(row[1], int) else None

    def remember_directory(self, path: Path, members: int, mtime_ns: int) -> None:
        """Keep the mtime_ns that a folder is shown with as long as its membership digest (63 bits) is this."""
        with self._cursor() as database:
            database.execute(
                "INSERT OR REPLACE INTO directories VALUES (?, ?, ?)", (self._key(path), members, mtime_ns)
            )

    def close(self) -> None:
        """Close the database. No other call may be running."""
        if self._database is not None:
            self._database.close()
