"""What is being done that takes more than one step, written down so that a start can end it.

Rule 1: an entry is written, and removed again, under one hold of the store's lock: one that is there when the lock has
        been got is of a process that was killed.
Rule 2: an entry says which files it is about by their inode numbers: a name may be another file's by now. Not by their
        devices, whose numbers change when a machine starts anew.
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

__all__ = ["Entry", "has_pending", "is_file", "pending", "write"]

log = logging.getLogger(__name__)

_PREFIX = "journal-"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is being done: of which kind, about which places, and numbers that go with it."""

    path: Path
    kind: str
    places: Mapping[str, Path]
    numbers: Mapping[str, int]

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


def has_pending(store: Store) -> bool:
    """Whether something was begun and not ended: by a killed process, or by one that is at it."""
    with contextlib.suppress(OSError):
        return any(name.startswith(_PREFIX) for name in os.listdir(store.private))
    return False


def pending(store: Store) -> Iterator[Entry]:
    """What killed processes did not end; the store's lock is held. One that cannot be read is removed."""
    for path in sorted(store.private.glob(f"{_PREFIX}*")):
        try:
            said = json.loads(path.read_bytes())
            # An absolute path stays what it is: a model may be dehydrated into the store from elsewhere.
            places = {k: store.root / os.fsdecode(bytes.fromhex(v)) for k, v in said["places"].items()}
            numbers = {k: int(v) for k, v in said["numbers"].items()}
            entry = Entry(path, str(said["kind"]), places, numbers)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("a journal that cannot be read is removed: %s", path)
            path.unlink(missing_ok=True)
            continue
        yield entry


def is_file(path: Path, inode: int) -> bool:
    """Whether the file of that inode number stands at ``path``."""
    with contextlib.suppress(OSError):
        return os.lstat(path).st_ino == inode
    return False
