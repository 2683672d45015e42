"""What nobody needs any more, of what is held or retired.

Rule: what is removed here is needed by no diff, by a census that listed every folder and read every diff.
"""

from __future__ import annotations

import contextlib
import os
import string
from dataclasses import dataclass
from pathlib import Path

from hydrafs import keeping
from hydrafs.cache import ChunkCache
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, from_oserror
from hydrafs.held import is_clone
from hydrafs.keptlinks import KeptLinks
from hydrafs.needs import Census, Need, census, diffs, record_of
from hydrafs.opening import Opener
from hydrafs.store import Store, trailer_of
from hydrafs.temporary import fsync_folder
from hydrafs.walk import Trouble, list_folder

__all__ = ["Collected", "Removed", "collect", "kept_models", "sha256_in"]


@dataclass(frozen=True, slots=True)
class Removed:
    """A file among the held or the retired that nobody needs. ``freed_nbytes`` is 0 where it has another name."""

    path: Path
    freed_nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What ``collect`` removed, and what stopped it: folders that cannot be listed, and diffs that cannot be read."""

    removed: tuple[Removed, ...]
    troubles: tuple[Trouble, ...] = ()

    @property
    def unreadable(self) -> tuple[Path, ...]:
        """Where what stopped it stands."""
        return tuple(trouble.path for trouble in self.troubles)


def sha256_in(name: str) -> bytes | None:
    """The SHA-256 that the name of a held or retired file tells, if it tells one."""
    digest = name.removesuffix(SUFFIX)
    return bytes.fromhex(digest) if len(digest) == 64 and set(digest) <= set(string.hexdigits) else None


def kept_models(folder: Path) -> list[Path]:
    """What is kept in ``folder``, ``Store.held`` or ``Store.retired``, by SHA-256."""
    return [Path(entry.path) for entry in list_folder(folder).files if sha256_in(entry.name) is not None]


def collect(store: Store, *, dry_run: bool = False) -> Collected:
    """Remove the retired models and the held links that no diff needs, and those that a listed model has taken over.

    Nothing is removed while a folder of the store cannot be listed or a diff not be read: nobody knows what is needed.

    Args:
        dry_run: change nothing at all, and say what would be removed.

    Raises:
        HydraError: the store cannot be locked; a file cannot be removed.
    """
    looked = census(store)
    if not looked.is_complete:
        return Collected((), looked.troubles)
    # Whether another model serves as well takes as long as opening all of them, so it is found out before the lock.
    successors = {}
    for folder in (store.retired, store.held):
        for path in kept_models(folder):
            sha256 = sha256_in(path.name)
            if sha256 is not None and sha256 in looked.needs:
                other = _successor(store, path, sha256)
                if other is not None:
                    successors[path] = (other, os.lstat(other))
    with store.rest() if dry_run else store.lock():
        found = census(store)
        if not found.is_complete:
            return Collected((), found.troubles)
        going = _going(store, found, successors, dry_run=dry_run)
        paths = [path for path, _ in going]
        removed = [Removed(path, _freed(path, paths), reason) for path, reason in going]
        if not dry_run:
            for path in paths:
                try:
                    path.unlink()
                except OSError as error:
                    raise from_oserror(error, "cannot remove what nobody needs", path) from error
            for folder in {path.parent for path in paths}:
                fsync_folder(folder)
    return Collected(tuple(removed))


def _going(
    store: Store, found: Census, successors: dict[Path, tuple[Path, os.stat_result]], *, dry_run: bool
) -> list[tuple[Path, str]]:
    going: list[tuple[Path, str]] = []
    for folder in (store.retired, store.held):
        for path in kept_models(folder):
            sha256 = sha256_in(path.name)
            if sha256 not in found.needs:
                going.append((path, "nobody needs it"))
            elif path in successors and _takes_over(store, path, sha256, *successors[path], dry_run=dry_run):
                going.append((path, f"{store.relative(successors[path][0])} serves as well"))
    going += [(p, "nobody needs it") for p in keeping.unhashed(store) if not _may_be(store, p, found.needs)]
    return going


def _may_be(store: Store, path: Path, needed: dict[bytes, Need]) -> bool:
    """Whether a retired file of unknown SHA-256 may be what somebody needs."""
    try:
        if path.name.endswith(SUFFIX):
            return trailer_of(path).sha256 in needed
        size = os.stat(path).st_size
        return any(n.parent.size == size and keeping.is_parent(store, path, n.parent) for n in needed.values())
    except (OSError, HydraError):
        return True


def _freed(path: Path, going: list[Path]) -> int:
    stat = os.lstat(path)
    if any(is_clone(path, os.lstat(p)) for p in going if p != path):
        return 0  # the other one of the two gives the space back
    links = [p for p in going if os.path.samestat(os.lstat(p), stat)]
    return stat.st_size if len(links) == stat.st_nlink and links[0] == path else 0


def _successor(store: Store, path: Path, sha256: bytes) -> Path | None:
    """The listed model that serves instead of a kept one which takes space of its own, if there is one for sure."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    if path.name.endswith(SUFFIX) or stat.st_nlink > KeptLinks(store).count(stat) > 0:
        return None  # it is listed: that it is kept as well takes no space
    for other in store.paths_of(sha256):
        if keeping.is_proven(store, other, sha256) and not os.path.samestat(os.stat(other), stat):
            return other
    # A parent that was dehydrated itself: its diff serves, if everyone who needs it can be opened without the file.
    kept = [keeping.place_of(folder, sha256, is_diff=False) for folder in (store.held, store.retired)]
    for _, diff in diffs(store):
        with contextlib.suppress(OSError, HydraError):
            if record_of(store, diff).sha256 == sha256 and _all_open(store, frozenset(kept)):
                return diff
    return None


def _takes_over(store: Store, path: Path, sha256: bytes, other: Path, stat: os.stat_result, *, dry_run: bool) -> bool:
    """Hold the model that serves as well as the kept one at ``path``; whether that is to go. The lock is held."""
    try:
        if not os.path.samestat(os.lstat(other), stat):
            return False
        is_diff = other.name.endswith(SUFFIX)
        if not is_diff and not keeping.is_proven(store, other, sha256):
            return False
    except OSError:
        return False
    if not dry_run and not keeping.hold(store, other, sha256):
        return False
    # Where it is a plain file, the held link is its by now; what is left of the old one is among the retired.
    return is_diff or path.parent == store.retired


def _all_open(store: Store, without: frozenset[Path]) -> bool:
    with contextlib.closing(Opener(store, ChunkCache(0), without=without)) as opener:
        for _, path in diffs(store):
            try:
                opener.open_diff(path).close()
            except HydraError:
                return False
    return True
