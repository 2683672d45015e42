"""Other parents for the dependents of a model that is listed no more.

Rule: a diff is replaced only by one that was proved as any other, from disk.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from hydrafs import keeping
from hydrafs.cache import ChunkCache
from hydrafs.collection import kept_models, sha256_in
from hydrafs.committing import keep_parents
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import HydraError
from hydrafs.keptlinks import KeptLinks
from hydrafs.needs import census, diffs, kept_diffs, record_of
from hydrafs.opening import Opener
from hydrafs.restore import rehydrate
from hydrafs.store import ModelEntry, Store, listed_name, trailer_of
from hydrafs.temporary import TEMPORARY, fsync_folder

__all__ = ["REHOMING", "Rehomed", "rehome", "unchain"]

REHOMING = f"{TEMPORARY}rehoming-"
"""How the folders begin that this works in, under ``.hydrafs``."""


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


@dataclass(frozen=True, slots=True)
class Rehomed:
    """A diff that needs other parents than before. ``after_nbytes``: ``None`` where it was not tried, only asked for;
    of a model that is a plain file again its size."""

    name: str
    before_nbytes: int
    after_nbytes: int | None
    parents: tuple[str, ...]


def rehome(
    store: Store,
    options: Options,
    *,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda name: None,
    wanted: Callable[[bytes], bool] = lambda sha256: True,
) -> list[Rehomed]:
    """Store the dependents of each retired model against others, where that takes less than they and it do now.

    The retired model itself stays until ``collect``. Needs room for one full model at a time, and for the new diffs.

    Args:
        dry_run: change nothing at all: say which would be tried.
        wanted: whether to try a retired model, by its SHA-256.

    Raises:
        HydraError: nothing was replaced that was not proved.
    """
    done: list[Rehomed] = []
    for retired in kept_models(store.retired):
        sha256 = sha256_in(retired.name)
        found = census(store)
        if not found.is_complete:
            return done  # which diffs need it nobody knows
        need = found.needs.get(sha256) if sha256 else None
        if sha256 is None or need is None or not need.dependents or _needed_by_kept(store, sha256, found.needs):
            continue
        if not wanted(sha256):
            continue
        if dry_run:
            done += [
                Rehomed(n, os.stat(p).st_size, None, ())
                for n, p in diffs(store)
                if any(q[0] == sha256 for q in record_of(store, p).parents)
            ]
            continue
        with tempfile.TemporaryDirectory(prefix=REHOMING, dir=store.private) as scratch:
            done += _rehome_from(store, retired, sha256, Path(scratch), options, progress)
    return done


# One whole model instead of a chain

_TOO_MUCH = 0.9
"""From which share of what they would take whole models of a retired ancestry are stored anew."""


def unchain(store: Store, options: Options, *, progress: Callable[[str], None] = lambda name: None) -> list[Rehomed]:
    """Where models that need retired ones take, with these, about as much as they would whole: make the oldest of them
    whole again, and store the others against it, or make them whole as well.

    A training run that keeps its last checkpoints never takes more than these would. Needs room for two full models.

    Raises:
        HydraError: what was not proved stays as it is.
    """
    found = census(store)
    kept = {sha256: nbytes for sha256, nbytes in _alone(store).items() if sha256 in found.needs}
    if not kept or not found.is_complete:
        return []
    family = []
    for path in _descent(store, set(kept)):
        trailer = trailer_of(path)
        family.append((trailer.mtime_ns, os.fspath(path), path, os.stat(path), trailer.size))
    # Ones that a diff in the trash needs, or one that is kept for others itself, go with that.
    stored, full = sum(f[3].st_size for f in family), sum(f[4] for f in family)
    if not family or stored + sum(kept.values()) <= _TOO_MUCH * full:
        return []
    done = []
    root: Path | None = None
    for _, _, path, before, _ in sorted(family, key=lambda f: f[:2]):
        listed = path.with_name(listed_name(path.name))
        name = store.relative(listed)
        if os.path.lexists(listed):
            continue  # hidden by a file of the user's
        progress(name)
        options.still()
        home = _against(store, path, root, before, options) if root is not None else None
        if home is None:
            rehydrate(store, ModelEntry(name, path, True), instead=True)
            home = Rehomed(name, before.st_size, os.stat(listed).st_size, ())
            root = root or listed
        done.append(home)
    return done


def _against(store: Store, path: Path, root: Path, before: os.stat_result, options: Options) -> Rehomed | None:
    """Store the model of the diff at ``path`` against the plain model at ``root``; ``None`` where that does not pay."""
    name = store.relative(path.with_name(listed_name(path.name)))
    with tempfile.TemporaryDirectory(prefix=REHOMING, dir=store.private) as scratch:
        full = rehydrate(store, ModelEntry(name, path, True), Path(scratch) / listed_name(path.name)).path
        chosen = replace(options, bases=(root,), keep=True, all_or_nothing=False)
        outcome = dehydrate(store, full, chosen)
        full.unlink()
        if outcome.diff is None:
            return None
        after = os.stat(outcome.diff).st_size
        with store.lock():
            if _takes_place(store, outcome.diff, path, before):
                return Rehomed(name, before.st_size, after, outcome.parents)
    return Rehomed(name, before.st_size, before.st_size, ())  # somebody replaced it meanwhile


def _takes_place(store: Store, diff: Path, path: Path, before: os.stat_result) -> bool:
    """Give the diff ``diff`` the name of the one at ``path`` if that is still the one it was. The lock is held."""
    now = keeping.lstat(path)
    if now is None or not os.path.samestat(now, before) or not _has_its_parents(store, diff):
        return False
    os.replace(diff, path)
    fsync_folder(path.parent)
    digest = trailer_of(path).sha256
    if keeping.place_of(store.held, digest, is_diff=True).exists():
        keeping.hold(store, path, digest)
    return True


def _has_its_parents(store: Store, diff: Path) -> bool:
    """Whether all that the diff is read from is there and held. Until now no diff that is listed needed it: whoever
    removed or replaced a parent since it was made has let go of it."""
    try:
        with (
            contextlib.closing(Opener(store, ChunkCache(0))) as opener,
            contextlib.closing(opener.open_diff(diff)) as model,
        ):
            return not keep_parents(store, (), (), [model])
    except (OSError, HydraError):
        return False


def _alone(store: Store) -> dict[bytes, int]:
    """The space of what is held or retired and has no other name, by SHA-256."""
    links = KeptLinks(store)
    sizes: dict[bytes, int] = {}
    for folder in (store.retired, store.held):
        for path in kept_models(folder):
            stat, sha256 = keeping.lstat(path), sha256_in(path.name)
            if stat is not None and sha256 is not None and stat.st_nlink <= max(1, links.count(stat)):
                sizes[sha256] = max(stat.st_size, sizes.get(sha256, 0))
    return sizes


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
            chunk_nbytes=options.chunk_nbytes, still=options.still, all_or_nothing=options.all_or_nothing,
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
            if _takes_place(store, diff, path, before[path]):
                done.append(Rehomed(name, before[path].st_size, after, parents))
    return done
