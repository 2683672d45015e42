"""Who needs whom: the models that the diffs of a store cannot be read without.

Rule 1: a diff's manifest is read once; what it needs is in the catalog, with the identity of the diff.
Rule 2: every diff counts: listed, hidden by a plain file of its name, in the trash, and kept for others (``held``,
        ``retired``).
Rule 3: a diff that was seen on a disk that is not there now still counts.
Rule 4: what could not be listed or read is told with what was found: nobody knows what that needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydrafs.catalog import DiffRecord, signed64
from hydrafs.diff import SUFFIX, DiffFile
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.manifest import Parent
from hydrafs.store import Store, listed_name
from hydrafs.walk import Report, Trouble, list_folder


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


def diffs(store: Store, *, trouble: Report | None = None) -> Iterator[tuple[str, Path]]:
    """Every diff of the store by its listed name, those hidden by a plain file of that name too. ``trouble`` is told
    what could not be listed or looked at."""
    for folder in store.folders(trouble=trouble):
        for entry in folder.files:
            name = listed_name(entry.name)
            if name != entry.name:
                path = Path(entry.path)
                yield store.relative(path.with_name(name)), path


def kept_diffs(store: Store, *, trouble: Report | None = None) -> Iterator[Path]:
    """The diffs that are kept for others: retired, and held."""
    for folder in (store.retired, store.held):
        for entry in list_folder(folder, report=trouble).files:
            if entry.name.endswith(SUFFIX):
                yield Path(entry.path)


@dataclass(frozen=True, slots=True)
class Census:
    """What the diffs of a store need, by SHA-256, and what kept it from being known in full.

    While there are ``troubles`` anything may be needed: what might be a parent is kept.
    """

    needs: dict[bytes, Need]
    troubles: tuple[Trouble, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every folder was listed and every diff read."""
        return not self.troubles


def census(store: Store, without: Path | None = None) -> Census:
    """What the listed diffs of a store need, and those in the trash, and what that needs in turn where it is kept.

    A diff that is kept for others needs its parents only as long as somebody needs it; one in the trash, while it is
    there. Raises nothing for what cannot be listed or read: it is among the troubles.

    Args:
        without: a diff that does not count, because it is about to go.
    """
    found: dict[bytes, Need] = {}
    troubles: list[Trouble] = []

    def count(record: DiffRecord, name: str) -> None:
        for sha256, size, hint, probe in record.parents:
            need = found.setdefault(sha256, Need(Parent(sha256, size, hint, probe)))
            if name:
                need.dependents.append(name)

    for name, path in diffs(store, trouble=troubles.append):
        if path != without:
            record = _record(store, path, troubles)
            if record is not None:
                count(record, name)
    for name, record in _away(store):
        count(record, name)
    for entry in list_folder(store.trash, report=troubles.append).files:
        if entry.name.endswith(SUFFIX) and Path(entry.path) != without:
            record = _record(store, Path(entry.path), troubles)
            if record is not None:
                count(record, "")
    kept: dict[bytes, DiffRecord] = {}
    for path in kept_diffs(store, trouble=troubles.append):
        record = _record(store, path, troubles)
        if record is not None:
            kept.setdefault(record.sha256, record)
    grown = True
    while grown:
        grown = False
        for sha256 in [s for s in kept if s in found]:
            count(kept.pop(sha256), "")
            grown = True
    return Census(found, tuple(troubles))


def _away(store: Store) -> list[tuple[str, DiffRecord]]:
    """The diffs of a disk that is not there now: of a mount in the store, or behind a link of it. They were seen there,
    and the folder where they were is not on that disk any more, so nobody has deleted them."""
    try:
        device = os.stat(store.root).st_dev
        elsewhere = store.catalog.diffs_elsewhere(device)
    except OSError:
        return []
    found = []
    for path, its_device, record in elsewhere:
        if not path.is_relative_to(store.root):
            continue
        if store.is_off_limits(path):  # whose disk does not answer
            found.append((store.relative(path.with_name(listed_name(path.name))), record))
        elif not os.path.lexists(path):
            now = next((stat for folder in path.parents if (stat := _stat(folder)) is not None), None)
            if now is None or signed64(now.st_dev) != its_device:
                found.append((store.relative(path.with_name(listed_name(path.name))), record))
    return found


def _stat(folder: Path) -> os.stat_result | None:
    try:
        return os.stat(folder)
    except OSError:
        return None


def _record(store: Store, path: Path, troubles: list[Trouble]) -> DiffRecord | None:
    try:
        return record_of(store, path)
    except (OSError, HydraError, MemoryError, ValueError) as error:
        try:
            os.lstat(path)
        except FileNotFoundError:
            return None  # it went meanwhile
        except OSError:
            pass
        troubles.append(Trouble(path, error))
        return None


def needs(store: Store, *, without: Path | None = None) -> dict[bytes, Need]:
    """``census`` for who removes nothing: what is needed, as far as it can be known."""
    return census(store, without).needs
