"""Who needs whom: the models that the diffs of a store cannot be read without.

Rule 1: a diff's manifest is read once; what it needs is in the catalog, with the identity of the diff.
Rule 2: every diff counts: listed, hidden by a plain file of its name, and kept for others (``held``, ``retired``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydrafs.catalog import DiffRecord
from hydrafs.diff import SUFFIX, DiffFile
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.manifest import Parent
from hydrafs.store import Store, is_private, listed_name


@dataclass(slots=True)
class Need:
    """A model that diffs need. ``dependents``: their listed names, those that are kept for others left out."""

    parent: Parent
    dependents: list[str] = field(default_factory=list)


def record_of(store: Store, path: Path) -> DiffRecord:
    """Which model the diff at ``path`` stands for, and which it needs; from the catalog where it is known.

    Raises:
        HydraError, OSError: it cannot be read.
    """
    identity = FileIdentity.of(os.stat(path))
    known = store.catalog.diff(path, identity)
    if known is None:
        with DiffFile(path) as diff:
            manifest = diff.manifest
            parents = tuple((p.sha256, p.size, p.name, p.probe) for p in manifest.parents)
            known = DiffRecord(manifest.sha256, parents)
            store.catalog.remember_diff(path, FileIdentity.of(diff.stat), known)
    return known


def diffs(store: Store) -> Iterator[tuple[str, Path]]:
    """Every diff of the store by its listed name, those hidden by a plain file of that name too."""
    seen: set[tuple[int, int]] = set()
    pending = [os.fspath(store.root)]
    while pending:
        folder = pending.pop()
        with contextlib.suppress(OSError):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_private(entry.name) or (entry.is_symlink() and store.is_off_limits(entry.path)):
                        continue
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif listed_name(entry.name) != entry.name and entry.is_file():
                        path = Path(entry.path)
                        yield store.relative(path.with_name(listed_name(path.name))), path


def kept_diffs(store: Store) -> Iterator[Path]:
    """The diffs that are kept for others: retired, and held."""
    for folder in (store.retired, store.held):
        with contextlib.suppress(OSError):
            yield from sorted(folder.glob(f"*{SUFFIX}"))


def needs(store: Store, *, without: Path | None = None, unreadable: list[Path] | None = None) -> dict[bytes, Need]:
    """What the listed diffs of a store need, and what that needs in turn where it is kept, by SHA-256.

    A diff that is kept needs its parents only as long as somebody needs it.

    Args:
        without: a diff that does not count, because it is about to go.
        unreadable: gets the diffs that cannot be read: nobody knows what they need.
    """
    found: dict[bytes, Need] = {}

    def count(record: DiffRecord, name: str) -> None:
        for sha256, size, hint, probe in record.parents:
            need = found.setdefault(sha256, Need(Parent(sha256, size, hint, probe)))
            if name:
                need.dependents.append(name)

    for name, path in diffs(store):
        if path != without:
            try:
                count(record_of(store, path), name)
            except (OSError, HydraError):
                if unreadable is not None:
                    unreadable.append(path)
    kept: dict[bytes, DiffRecord] = {}
    for path in kept_diffs(store):
        with contextlib.suppress(OSError, HydraError):
            record = record_of(store, path)
            kept.setdefault(record.sha256, record)
    grown = True
    while grown:
        grown = False
        for sha256 in [s for s in kept if s in found]:
            count(kept.pop(sha256), "")
            grown = True
    return found
