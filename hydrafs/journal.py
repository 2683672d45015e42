"""What is being done that takes more than one step, written down so that a start can end it.

Rule 1: an entry is written, and removed again, under one hold of the store's lock: one that is there when the lock has
        been got is of a process that was killed.
Rule 2: an entry says which files it is about by their inode numbers, sizes and times: a name may be another file's by
        now, and so may a number. Not by their devices, whose numbers change when a machine starts anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile
from hydrafs.walk import list_folder

__all__ = ["Entry", "entries", "is_about", "marks", "pending", "write"]

log = logging.getLogger(__name__)

_PREFIX = "journal-"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is being done: of which kind, about which places, and numbers that go with it."""

    path: Path
    kind: str
    places: Mapping[str, Path]
    numbers: Mapping[str, int]

    def is_at(self, key: str, path: Path) -> bool:
        """Whether the file that ``marks`` was given as ``key`` stands at ``path``, as it was.

        Raises:
            OSError: nobody can tell now, so the entry must stay.
        """
        try:
            found = marks(key, os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        # An entry of before has the inode number only.
        return key in self.numbers and all(self.numbers.get(k, v) == v for k, v in found.items())

    def end(self) -> None:
        """It was done, or undone. Tried twice: one that is left finds nothing to do at the next start."""
        for _ in range(2):
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def write(store: Store, kind: str, places: Mapping[str, Path], numbers: Mapping[str, int]) -> Entry:
    """Write down what is about to be done; the store's lock is held.

    Raises:
        OSError, HydraError: it cannot be, so it must not be begun.
    """
    path = store.private / f"{_PREFIX}{secrets.token_hex(8)}"
    named = {key: os.fsencode(store.relative(place)).hex() for key, place in places.items()}
    with TemporaryFile(store.private) as temporary:
        temporary.file.write(json.dumps({"kind": kind, "places": named, "numbers": dict(numbers)}).encode())
        temporary.commit(path)
    return Entry(path, kind, places, numbers)


def is_about(store: Store, path: Path) -> bool:
    """Whether something was begun with the file at ``path`` and not ended: by a killed process, or by one that is at
    it. Changes nothing."""
    return any(path in entry.places.values() for entry in entries(store))


def marks(key: str, stat: os.stat_result) -> dict[str, int]:
    """The numbers by which an entry knows a file: those that neither a rename nor a link changes."""
    return {key: stat.st_ino, f"{key}_size": stat.st_size, f"{key}_mtime_ns": stat.st_mtime_ns}


def pending(store: Store) -> Iterator[Entry]:
    """What killed processes did not end; the store's lock is held. One that cannot be read is removed."""
    for path, entry in _read(store):
        if entry is not None:
            yield entry
        else:
            log.warning("a journal that cannot be read is removed: %s", path)
            path.unlink(missing_ok=True)


def entries(store: Store) -> list[Entry]:
    """What is being done, and what killed processes did not end. Changes nothing."""
    return [entry for _, entry in _read(store) if entry is not None]


def _read(store: Store) -> Iterator[tuple[Path, Entry | None]]:
    for name in sorted(n for n in list_folder(store.private).names if n.startswith(_PREFIX)):
        path = store.private / name
        try:
            said = json.loads(path.read_bytes())
            # An absolute path stays what it is: a model may be dehydrated into the store from elsewhere.
            places = {k: store.root / os.fsdecode(bytes.fromhex(v)) for k, v in said["places"].items()}
            numbers = {k: int(v) for k, v in said["numbers"].items()}
            yield path, Entry(path, str(said["kind"]), places, numbers)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            yield path, None
