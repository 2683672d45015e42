"""Keeping a store in order: what a start puts right, what is held, and what nobody needs any more.

Rule 1: what is removed here is needed by no diff that can be read; a diff that cannot be read stops every removal.
Rule 2: a diff is replaced only by one that was proved as any other, from disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import string
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from hydrafs import keeping, replacing
from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, from_oserror
from hydrafs.needs import Need, census, diffs, kept_diffs, needs, record_of
from hydrafs.opening import Opener
from hydrafs.restore import prove, rehydrate
from hydrafs.store import PRIVATE, ModelEntry, Store, trailer_of
from hydrafs.temporary import TEMPORARY, fsync_folder, remove_leftovers
from hydrafs.walk import Trouble

__all__ = ["Collected", "Rehomed", "Removed", "collect", "hold_parents", "rehome", "start"]

_CACHE_NBYTES = 64 << 20
_REHOMING = f"{TEMPORARY}rehoming-"


def start(store: Store) -> None:
    """What every start does: end what a killed process began, and remove the temporary files that it left anywhere."""
    replacing.recover(store)
    for folder in store.private.glob(f"{_REHOMING}*"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
    for listed in store.folders():
        if any(name.startswith(TEMPORARY) for name in listed.names):
            remove_leftovers(Path(listed.path))


# Holding


def hold_parents(store: Store) -> list[Need]:
    """Hold every parent in use that has its place and is not held yet: of diffs made elsewhere, or before.

    A held file that was changed behind hydrafs' back is replaced where the right bytes are found again.

    Returns:
        What cannot be held: no such file, or on another filesystem. Only its name keeps it.
    """
    _hold_anew(store)
    unheld = []
    with store.lock(), contextlib.closing(Opener(store, ChunkCache(0))) as opener:
        for sha256, need in needs(store).items():
            if any(_is_kept(store, sha256, is_diff=is_diff, need=need) for is_diff in (False, True)):
                continue
            path = opener.find(need.parent)
            if path is None or not keeping.hold(store, path, sha256):
                unheld.append(need)
    return unheld


def _hold_anew(store: Store) -> None:
    """Let go of a held diff in whose place another of the same model is listed: it takes its space for nothing, and
    goes on needing what that does not. Who replaced it was killed in between."""
    alone = {p.name: p for p in _kept(store.held) if p.name.endswith(SUFFIX) and os.lstat(p).st_nlink == 1}
    if not alone:
        return
    for _, path in diffs(store):
        with contextlib.suppress(OSError, HydraError):
            before = os.lstat(path)
            sha256 = record_of(store, path).sha256
            if keeping.place_of(store.held, sha256, is_diff=True).name in alone:
                prove(store, path)
                with store.lock():
                    if os.path.samestat(os.lstat(path), before):
                        keeping.hold(store, path, sha256)


def _is_kept(store: Store, sha256: bytes, *, is_diff: bool, need: Need) -> bool:
    for folder in (store.held, store.retired):
        place = keeping.place_of(folder, sha256, is_diff=is_diff)
        try:
            stat = os.stat(place)
            if is_diff:
                if trailer_of(place).sha256 == sha256:
                    return True
            elif stat.st_size == need.parent.size and keeping.is_parent(store, place, need.parent):
                return True
        except (OSError, HydraError):
            continue
    return False


# Collecting


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


def collect(store: Store, *, dry_run: bool = False) -> Collected:
    """Remove the retired models and the held links that no diff needs, and those that a listed model has taken over.

    Nothing is removed while a folder of the store cannot be listed or a diff not be read: nobody knows what is needed.
    """
    with store.lock():
        found = census(store)
        if not found.is_complete:
            return Collected((), found.troubles)
        needed = found.needs
        going: list[tuple[Path, str]] = []
        for folder in (store.retired, store.held):
            for path in _kept(folder):
                sha256 = bytes.fromhex(path.name.removesuffix(SUFFIX))
                if sha256 not in needed:
                    going.append((path, "nobody needs it"))
                else:
                    other = _taken_over(store, path, sha256, needed[sha256])
                    if other is not None:
                        going.append((path, f"{store.relative(other)} serves as well"))
        removed = [Removed(path, _freed(path, [p for p, _ in going]), reason) for path, reason in going]
        if not dry_run:
            for path, _ in going:
                try:
                    path.unlink()
                except OSError as error:
                    raise from_oserror(error, "cannot remove what nobody needs", path) from error
            for folder in {path.parent for path, _ in going}:
                fsync_folder(folder)
    return Collected(tuple(removed))


def _kept(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / n for n in names if len(d := n.removesuffix(SUFFIX)) == 64 and set(d) <= set(string.hexdigits)]


def _freed(path: Path, going: list[Path]) -> int:
    stat = os.lstat(path)
    links = [p for p in going if os.path.samestat(os.lstat(p), stat)]
    return stat.st_size if len(links) == stat.st_nlink and links[0] == path else 0


def _taken_over(store: Store, path: Path, sha256: bytes, need: Need) -> Path | None:
    """The listed model that serves instead of a kept one which takes space of its own, if there is one for sure."""
    stat = os.lstat(path)
    if path.name.endswith(SUFFIX) or stat.st_nlink > keeping.KeptLinks(store).count(stat) > 0:
        return None  # it is listed: that it is kept as well takes no space
    for other in store.catalog.paths_of(sha256):
        if PRIVATE in other.parts or not keeping.is_proven(store, other, sha256):
            continue
        if not os.path.samestat(os.stat(other), stat) and keeping.hold(store, other, sha256):
            # The held link is that of the other file by now; what is left of this one is among the retired.
            return other if path.parent == store.retired else None
    # A parent that was dehydrated itself: its diff serves, if everyone who needs it can be opened without the file.
    kept = [keeping.place_of(folder, sha256, is_diff=False) for folder in (store.held, store.retired)]
    for _, diff in diffs(store):
        with contextlib.suppress(OSError, HydraError):
            if record_of(store, diff).sha256 == sha256 and _all_open(store, frozenset(kept)):
                return diff if keeping.hold(store, diff, sha256) else None
    return None


def _all_open(store: Store, without: frozenset[Path]) -> bool:
    with contextlib.closing(Opener(store, ChunkCache(0), without=without)) as opener:
        for _, path in diffs(store):
            try:
                opener.open_diff(path).close()
            except HydraError:
                return False
    return True


def _descent(store: Store, ancestors: set[bytes]) -> list[Path]:
    """The listed diffs that cannot be read without one of these models, through any chain."""
    known = [(path, record_of(store, path)) for _, path in diffs(store)]
    found: list[Path] = []
    grown = True
    while grown:
        more = [(p, r) for p, r in known if p not in found and any(q[0] in ancestors for q in r.parents)]
        found += [path for path, _ in more]
        ancestors = ancestors | {record.sha256 for _, record in more}
        grown = bool(more)
    return found


# Another home


@dataclass(frozen=True, slots=True)
class Rehomed:
    """A diff that needs other parents than before."""

    name: str
    before_nbytes: int
    after_nbytes: int
    parents: tuple[str, ...]


def rehome(
    store: Store, options: Options, *, dry_run: bool = False, progress: Callable[[str], None] = lambda name: None
) -> list[Rehomed]:
    """Store the dependents of each retired model against others, where that takes less than they and it do now.

    The retired model itself stays until ``collect``. Needs room for one full model at a time, and for the new diffs.

    Raises:
        HydraError: nothing was replaced that was not proved.
    """
    done: list[Rehomed] = []
    for retired in _kept(store.retired):
        sha256 = bytes.fromhex(retired.name.removesuffix(SUFFIX))
        needed = needs(store)
        need = needed.get(sha256)
        if need is None or not need.dependents or _needed_by_kept(store, sha256, needed):
            continue
        with tempfile.TemporaryDirectory(prefix=_REHOMING, dir=store.private) as scratch:
            done += _rehome_from(store, retired, sha256, Path(scratch), options, dry_run, progress)
    return done


def _needed_by_kept(store: Store, sha256: bytes, needed: Collection[bytes]) -> bool:
    """Whether a diff needs that model which is kept for others itself, and not listed: it can have no other home."""
    listed = {stat.st_ino for _, path in diffs(store) if (stat := keeping.lstat(path))}
    for path in kept_diffs(store):
        with contextlib.suppress(OSError, HydraError):
            record = record_of(store, path)
            needs_it = any(parent[0] == sha256 for parent in record.parents)
            if needs_it and record.sha256 in needed and os.lstat(path).st_ino not in listed:
                return True
    return False


def _rehome_from(
    store: Store,
    retired: Path,
    sha256: bytes,
    scratch: Path,
    options: Options,
    dry_run: bool,
    progress: Callable[[str], None],
) -> list[Rehomed]:
    family = [(n, p) for n, p in diffs(store) if any(q[0] == sha256 for q in record_of(store, p).parents)]
    before = {path: os.stat(path) for _, path in family}
    descent = _descent(store, {record_of(store, path).sha256 for path in before})
    made: list[tuple[str, Path, Path, tuple[str, ...]]] = []
    for number, (name, path) in enumerate(family):
        progress(name)
        folder = scratch / str(number)
        folder.mkdir()
        full = rehydrate(store, ModelEntry(name, path, True), folder / Path(name).name).path
        # Neither against each other or what needs them, nor against what is to go: that would need it still.
        chosen = Options(
            not_bases=(*before, *descent, full), keep=True, jobs=options.jobs, codec=options.codec,
            chunk_nbytes=options.chunk_nbytes, still=options.still,
        )  # fmt: skip
        outcome = dehydrate(store, full, chosen)
        full.unlink()
        if outcome.diff is None:
            return []
        made.append((name, path, outcome.diff, outcome.parents))
    now = sum(stat.st_size for stat in before.values()) + os.stat(retired).st_size
    if sum(os.stat(diff).st_size for _, _, diff, _ in made) >= now:
        return []
    done = []
    with store.lock():
        for name, path, diff, parents in made:
            after = os.stat(diff).st_size
            if not os.path.samestat(os.stat(path), before[path]):
                continue  # it was replaced meanwhile
            done.append(Rehomed(name, before[path].st_size, after, parents))
            if not dry_run:
                os.replace(diff, path)
                fsync_folder(path.parent)
                digest = trailer_of(path).sha256
                if keeping.place_of(store.held, digest, is_diff=True).exists():
                    keeping.hold(store, path, digest)
    return done
