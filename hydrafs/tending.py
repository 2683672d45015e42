"""Keeping a store in order: what a start puts right, what is held, and what is done when nobody waits.

Rule 1: what is removed here is needed by no diff; what cannot be listed or read stops every removal.
Rule 2: what takes long is done without the store's lock, and looked at again with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hydrafs import asides, keeping, replacing, trash
from hydrafs.cache import ChunkCache
from hydrafs.collection import Collected, Removed, collect, kept_models
from hydrafs.dehydrate import Options
from hydrafs.diff import SUFFIX
from hydrafs.errors import Changing, CorruptDiff, HydraError
from hydrafs.identity import is_unchanged, sha256
from hydrafs.leases import QuietFile
from hydrafs.needs import Need, diffs, needs, record_of
from hydrafs.openfiles import Writers
from hydrafs.opening import Opener
from hydrafs.rehome import REHOMING, Rehomed, rehome, unchain
from hydrafs.restore import prove
from hydrafs.store import Store, trailer_of
from hydrafs.temporary import TEMPORARY, fsync_folder, remove_leftovers
from hydrafs.walk import Trouble

__all__ = ["Collected", "Maintained", "Rehomed", "Removed", "collect", "hash_unhashed", "hold_parents",
           "maintain", "make_room", "rehome", "start", "unchain"]  # fmt: skip

log = logging.getLogger(__name__)


def start(store: Store) -> None:
    """What every start does: end what a killed process began, remove the temporary files that it left anywhere, and
    what has been in the trash for long enough.

    What of it fails is logged: a start goes on.
    """
    replacing.recover(store)
    with contextlib.suppress(OSError):
        for folder in store.private.glob(f"{REHOMING}*"):
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
    for listed in store.folders():
        if any(name.startswith(TEMPORARY) for name in listed.names):
            with contextlib.suppress(OSError):
                remove_leftovers(Path(listed.path))
    for tend in (asides.settle, trash.expire):
        try:
            tend(store)
        except (HydraError, OSError) as error:
            log.error("the store %s cannot be put in order: %s", store.root, error)


# Holding


def hold_parents(store: Store) -> list[Need]:
    """Hold every parent in use that has its place and is not held yet: of diffs made elsewhere, or before.

    A held file that was changed behind hydrafs' back is replaced where the right bytes are found again.

    Returns:
        What cannot be held: no such file, or on another filesystem. Only its name keeps it.
    """
    _hold_anew(store)
    unheld = []
    with contextlib.closing(Opener(store, ChunkCache(0))) as opener:
        for digest, need in needs(store).items():
            if any(_is_kept(store, digest, is_diff=is_diff, need=need) for is_diff in (False, True)):
                continue
            path = opener.find(need.parent)
            if path is None or not _hold_found(store, path, digest, need):
                unheld.append(need)
    return unheld


def _hold_found(store: Store, path: Path, digest: bytes, need: Need) -> bool:
    """Hold what was found as a parent without the lock, if it still is."""
    with store.lock():
        try:
            if path.name.endswith(SUFFIX):
                is_it = trailer_of(path).sha256 == digest
            else:
                is_it = keeping.is_parent(store, path, need.parent)
        except (OSError, HydraError):
            return False
        return is_it and keeping.hold(store, path, digest)


def _hold_anew(store: Store) -> None:
    """Let go of a held diff in whose place another of the same model is listed: it takes its space for nothing, and
    goes on needing what that does not. Who replaced it was killed in between."""
    alone = {p.name: p for p in kept_models(store.held) if p.name.endswith(SUFFIX) and os.lstat(p).st_nlink == 1}
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


# When nobody waits

_tried_homes: set[tuple[Path, bytes, frozenset[str]]] = set()


@dataclass(frozen=True, slots=True)
class Maintained:
    """What ``maintain`` did. ``freed_nbytes``: by all of it; ``troubles``: what kept anything from being removed."""

    freed_nbytes: int = 0
    removed: tuple[Removed, ...] = ()
    rehomed: tuple[Rehomed, ...] = ()
    unheld: tuple[Need, ...] = ()
    troubles: tuple[Trouble, ...] = ()


def maintain(
    store: Store, *, still: Callable[[], None] = lambda: None, jobs: int = 1, rehomes: bool = True
) -> Maintained:
    """Give back the space that nobody needs: to be called after removals, and when nothing else is to be done.

    What has been in the trash for long enough goes; parents in use are held; what nobody needs is collected; retired
    files of unknown SHA-256 get it; models whose ancestors are retired are stored anew where that saves space.

    Args:
        still: is asked all along whether to go on: it waits, or raises what ends the work, which is raised here. What
            was done by then stays done.
        rehomes: whether models may be stored anew, which takes as long as dehydrating them.

    Raises:
        HydraError: the store cannot be locked or written to.
    """
    still()
    freed = trash.expire(store)
    asides.settle(store, still)
    still()
    unheld = hold_parents(store)
    still()
    collected = collect(store)
    hash_unhashed(store, still)
    done: list[Rehomed] = []
    if rehomes and not collected.troubles:
        options = Options(jobs=jobs, still=still, all_or_nothing=True)  # nobody asked: no parent that may go by itself
        try:
            done += unchain(store, options)
            done += rehome(store, replace(options, alone=False), wanted=lambda digest: _is_new(store, digest))
        except Changing:
            raise
        except HydraError as error:
            log.info("what depends on retired models stays as it is: %s", error)
    if done:
        for home in done:
            log.info("%s: %d -> %s bytes, needs %s", home.name, home.before_nbytes, home.after_nbytes, home.parents)
        again = collect(store)
        collected = Collected((*collected.removed, *again.removed), again.troubles)
    freed += sum(r.freed_nbytes for r in collected.removed)
    return Maintained(freed, collected.removed, tuple(done), tuple(unheld), collected.troubles)


def _is_new(store: Store, digest: bytes) -> bool:
    """Whether another home has not been looked for yet among the plain models that there are."""
    plain = frozenset(model.name for model in store.models() if not model.is_diff)
    key = (store.root, digest, plain)
    if not plain or key in _tried_homes:
        return False
    _tried_homes.add(key)
    return True


def hash_unhashed(store: Store, still: Callable[[], None] = lambda: None) -> int:
    """Give the retired files of unknown SHA-256 the names that they have by it; how many.

    A diff that is damaged stands for nothing; it is kept as long as what is in the trash, since a backup of it may be
    brought back that needs what it needed.
    """
    count = 0
    for path in keeping.unhashed(store):
        still()
        try:
            is_diff = path.name.endswith(SUFFIX)
            with contextlib.closing(QuietFile(path)) as source:
                stat, begun, lasting = source.stat, source.quiet.begin(), False
                digest = trailer_of(path).sha256 if is_diff else sha256(source, lambda nbytes: still())
                if not is_diff:
                    if not source.quiet.lasted(begun) and source.quiet.writers is not Writers.UNKNOWN:
                        continue  # who had it open when it was retired writes on
                    lasting = source.quiet.settle(begun)
            with store.lock():
                if not is_unchanged(stat, os.lstat(path)):
                    continue
                if lasting:
                    keeping.remember_locked(store, path, digest)
                target = keeping.place_of(store.retired, digest, is_diff=is_diff)
                if keeping.lstat(target) is not None and (is_diff or keeping.is_proven(store, target, digest)):
                    path.unlink()
                else:
                    with keeping.carried(store, path, target):
                        path.rename(target)
                fsync_folder(store.retired)
            count += 1
        except CorruptDiff:
            with contextlib.suppress(OSError, HydraError):
                if time.time() - os.lstat(path).st_ctime >= trash.Settings.of(store).seconds:
                    path.unlink()
        except (OSError, Changing) as error:
            if isinstance(error, Changing):
                raise
            log.debug("%s is not hashed: %s", path, error)
    return count


def make_room(store: Store, wanted_nbytes: int | None = None) -> int:
    """Empty the trash, and let go of what only that needed, because a write found no room.

    Returns:
        The bytes that it freed.

    Raises:
        HydraError: the store cannot be locked.
    """
    freed = trash.purge(store, wanted_nbytes)
    if wanted_nbytes is None or freed < wanted_nbytes:
        freed += sum(removed.freed_nbytes for removed in collect(store).removed)
    return freed
