"""What must not be lost: removing and overwriting models that others need, or may need.

Goal: whatever happens to the name of a parent, the diffs that need it go on being served.
Plan: a parent in use has a second hard link, ``.hydrafs/held/SHA256``; a model that is removed or replaced while others
need it moves to ``.hydrafs/retired/SHA256``, where it is in no listing (``.hydra`` behind it where it is a diff).
Rule 1: a parent goes nowhere before it has its place among the retired; each step is one rename(2) or link(2).
Rule 2: doubt keeps: while a folder cannot be listed or a diff not be read, what might be a parent is needed. Where its
        SHA-256 is not known it is retired as ``unhashed-...``, and openers go by its size and a probe.
Rule 3: who changes names holds the store's lock; a lock of a dead process is none. Nothing is copied under it: what can
        be neither linked nor renamed is copied before, and the change is begun anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat as stat_module
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, Protected
from hydrafs.filecopy import copy_attributes, copy_into
from hydrafs.held import (
    UNHASHED,
    carried,
    hold,
    is_parent,
    is_proven,
    let_go,
    link_over,
    links_of,
    place_of,
    unhashed,
)
from hydrafs.identity import FileIdentity, is_unchanged, sha256
from hydrafs.keptlinks import KeptLinks
from hydrafs.layout import FileSource
from hydrafs.leases import QuietFile
from hydrafs.needs import Census, census
from hydrafs.store import Store, looks_like_model, trailer_of
from hydrafs.temporary import TemporaryFile, fsync_folder
from hydrafs.walk import Trouble

__all__ = [
    "Aside", "KeptLinks", "NeedsCopy", "Removal", "before_overwrite", "carried", "copy_among_retired", "diff_of",
    "drop", "hold", "is_parent", "is_proven", "is_regular", "keep", "keep_to_overwrite", "let_go", "links_of", "lstat",
    "needed_as", "place_of",
    "remember", "remember_locked", "remove_diff", "remove_model", "standing", "unhashed", "with_copies",
]  # fmt: skip

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_TRIES = 16
_SIDECAR_SECONDS = 1.0
"""How old the sizes of the parents may be when a file that is not called like a model is looked at."""
_REMEMBER_SECONDS = 2.0
"""A fact that is remembered without the lock may be forgotten sooner. A mount that ends does not wait for it."""
_TOLD_TROUBLES = 3


class Aside(Protocol):
    """Where what is removed can be had back from for a while: ``hydrafs.trash.put``."""

    def __call__(self, store: Store, path: Path, *, stays: bool) -> bool:
        """Put the file at ``path`` there, or with ``stays`` a link to it; whether that could be done. With ``stays``
        false and ``True`` returned the file has left its name. The store's lock is held."""


def remember(store: Store, path: Path, before: os.stat_result, sha256: bytes) -> bool:
    """Keep the SHA-256 that was taken of the file at ``path`` from when it was as ``before``; whether it still is.

    Raises:
        OSError: there is no such file any more.
    """
    with contextlib.ExitStack() as stack:
        # Whoever links holds the lock. A link in between would leave the fact with an identity that is no more.
        with contextlib.suppress(HydraError):  # a store that cannot be written to: nobody links there either
            stack.enter_context(store.rest(_REMEMBER_SECONDS))
        now = os.stat(path)
        if not is_unchanged(before, now):
            return False
        store.catalog.remember_sha256(path, FileIdentity.of(now), sha256)
    return True


def remember_locked(store: Store, path: Path, digest: bytes) -> None:
    """``remember`` for who holds the store's lock and has seen that the file is what was hashed."""
    store.catalog.remember_sha256(path, FileIdentity.of(os.stat(path)), digest)


# Who is needed

_sizes: dict[Path, tuple[float, set[int]]] = {}
_told: set[tuple[Path, str]] = set()


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Whether others need a file, or may: ``keeps``; and as which SHA-256, where that is known."""

    keeps: bool
    sha256: bytes | None = None
    found: Census | None = None
    doubts: tuple[Trouble, ...] = ()


def needed_as(store: Store, path: Path, *, is_diff: bool) -> bytes | None:
    """The SHA-256 under which other diffs need the file at ``path``; ``None`` where nobody does, or nobody knows.
    Hashes nothing: a file whose SHA-256 is unknown is needed where its size and a probe are those of a parent."""
    verdict = _judged(store, path, is_diff=is_diff)
    return verdict.sha256 if verdict.keeps and not verdict.doubts else None


def _judged(store: Store, path: Path, *, is_diff: bool) -> _Verdict:
    if is_diff:
        found = census(store, without=path)
        try:
            digest = trailer_of(path).sha256
        except HydraError as error:  # nobody knows which model it stands for
            return _Verdict(True, None, found, (Trouble(path, error), *found.troubles))
        if digest in found.needs:
            return _Verdict(True, digest, found)
        return _Verdict(not found.is_complete, digest, found, found.troubles)
    stat = os.stat(path)
    if stat.st_size == 0 or not _may_be_needed(store, path, stat):
        return _Verdict(False)
    found = census(store)
    if found.is_complete:
        _sizes[store.root] = time.monotonic(), {need.parent.size for need in found.needs.values()}
    known = store.catalog.sha256(path, FileIdentity.of(stat))
    if known is not None and known in found.needs:
        return _Verdict(True, known, found)
    doubts = found.troubles
    if known is None:
        alike = [need.parent for need in found.needs.values() if need.parent.size == stat.st_size]
        for parent in alike:
            with contextlib.suppress(OSError):
                if os.path.samestat(stat, os.lstat(place_of(store.held, parent.sha256, is_diff=False))):
                    return _Verdict(True, parent.sha256, found)
        try:
            for parent in alike:
                if is_parent(store, path, parent):
                    return _Verdict(True, parent.sha256, found)
        except (HydraError, OSError) as error:  # it has a parent's size, and nobody knows what is in it
            doubts = (Trouble(path, error), *doubts)
    return _Verdict(bool(doubts) and _might_be_parent(path, stat), known, found, doubts)


def _may_be_needed(store: Store, path: Path, stat: os.stat_result) -> bool:
    # Sidecars come and go by the hundred, and a look at every diff of the store for each would be felt. A parent of
    # another name than a model's is held, and so has a second link.
    if looks_like_model(path.name) or stat.st_nlink > 1:
        return True
    when, sizes = _sizes.get(store.root, (-_SIDECAR_SECONDS, set()))
    return time.monotonic() - when >= _SIDECAR_SECONDS or stat.st_size in sizes


def _might_be_parent(path: Path, stat: os.stat_result) -> bool:
    """Whether a file could be a model, by its name, its links or its first bytes."""
    if looks_like_model(path.name) or stat.st_nlink > 1:
        return True
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(9)
    except OSError:
        return True
    # A zip file, a pickle, or the length of a safetensors header and its first character.
    return head.startswith((b"PK", b"\x80")) or head[8:] == b"{"


def _tell_doubt(store: Store, path: Path, verdict: _Verdict) -> None:
    if not verdict.doubts:
        log.info("%s is needed by others and is kept among the retired", path)
        return
    if any((store.root, str(trouble)) not in _told for trouble in verdict.doubts):
        _told.update((store.root, str(trouble)) for trouble in verdict.doubts)
        more = len(verdict.doubts) - _TOLD_TROUBLES
        log.warning(
            "nobody knows whether others need %s; it is kept in %s, as all models are until this can be read: %s%s",
            path,
            store.retired,
            "; ".join(map(str, verdict.doubts[:_TOLD_TROUBLES])),
            f"; and {more} more" if more > 0 else "",
        )


# Retiring


class NeedsCopy(OSError):
    """A file can be neither linked nor renamed to where it is to be kept: ``with_copies`` copies it there."""

    def __init__(self, error: OSError, path: Path) -> None:
        super().__init__(error.errno, error.strerror, os.fspath(path))
        self.path = path


def with_copies(store: Store, change: Callable[[], _T]) -> _T:
    """Run ``change`` with the store's lock held, again after each file was copied that it needs a copy of.

    Raises:
        OSError, HydraError: as ``change`` does; no room for a copy.
    """
    for number in range(_TRIES):
        try:
            with store.lock():
                return change()
        except NeedsCopy as error:
            if number == _TRIES - 1:
                raise
            copy_among_retired(store, error.path)
    raise AssertionError


def copy_among_retired(store: Store, path: Path) -> None:
    """Keep a copy of the file at ``path`` among the retired, where it is one of its SHA-256. The lock is not held."""
    is_diff = path.name.endswith(SUFFIX)
    _make_retired(store)
    with TemporaryFile(store.retired) as temporary, contextlib.closing(QuietFile(path)) as original:
        begun = original.quiet.begin()
        before = copy_into(temporary, path)
        with FileSource(temporary.path) as source:
            digest = trailer_of(temporary.path).sha256 if is_diff else sha256(source)
        target = place_of(store.retired, digest, is_diff=is_diff)
        lasting = original.quiet.settle(begun)
        with store.lock():
            if not is_unchanged(before, os.stat(path)):
                return
            os.replace(temporary.path, target)
            fsync_folder(store.retired)
            if not is_diff:
                if lasting:
                    store.catalog.remember_sha256(path, FileIdentity.of(before), digest)
                store.catalog.remember_sha256(target, FileIdentity.of(os.stat(target)), digest)


def _make_retired(store: Store) -> None:
    if not store.retired.is_dir():
        store.retired.mkdir(parents=True, exist_ok=True)
        fsync_folder(store.private)


def _retire(store: Store, path: Path, digest: bytes | None, *, is_diff: bool, move: bool) -> None:
    """Keep the file at ``path`` among the retired; with ``move`` it leaves its name, else it has both."""
    _make_retired(store)
    here = os.lstat(path)
    targets = []
    if digest is None:
        there = next((p for p in links_of(store, here) if p.parent == store.retired), None)
        target = there or store.retired / f"{UNHASHED}{secrets.token_hex(8)}{SUFFIX if is_diff else ''}"
    else:
        target = place_of(store.retired, digest, is_diff=is_diff)
        targets = [place_of(store.held, digest, is_diff=is_diff)]
    with carried(store, path, target, *targets):
        if not _is_kept(store, here, target, digest, is_diff=is_diff):
            try:
                if move:
                    os.replace(path, target)
                else:
                    link_over(path, target)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise NeedsCopy(error, path) from error
                raise
        elif move:
            os.unlink(path)
    fsync_folder(store.retired)
    if move:
        fsync_folder(path.parent)


def _is_kept(store: Store, here: os.stat_result, target: Path, digest: bytes | None, *, is_diff: bool) -> bool:
    """Whether that file, or another with what is in it, stands at ``target`` already."""
    there = lstat(target)
    if there is None:
        return False
    if os.path.samestat(there, here):
        return True
    if not is_diff or digest is None:
        return digest is not None and is_proven(store, target, digest)
    if there.st_dev == here.st_dev:
        return False
    try:
        return trailer_of(target).sha256 == digest and there.st_size == here.st_size
    except HydraError:
        return False


# Names


_SHORT_NAME_NBYTES = 100
"""Any filesystem takes names of so many bytes."""
_SHORT_PATH_NBYTES = 4000


def lstat(path: Path) -> os.stat_result | None:
    """lstat(2); ``None`` where nothing stands."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and _has_no_room(path):
            return None
        raise


def _has_no_room(path: Path) -> bool:
    """Whether a diff cannot stand here, because the name has no room for the ending; of a short one it is doubtful."""
    return path.name.endswith(SUFFIX) and (
        len(os.fsencode(path.name)) > _SHORT_NAME_NBYTES or len(os.fsencode(path)) > _SHORT_PATH_NBYTES
    )


def diff_of(path: Path) -> Path:
    """Where the diff of a listed name stands."""
    return path.with_name(path.name + SUFFIX)


def standing(path: Path) -> tuple[os.stat_result | None, os.stat_result | None]:
    """What stands under a listed name: the file of that name, and its diff."""
    diff = lstat(diff_of(path))
    return lstat(path), diff if diff is not None and stat_module.S_ISREG(diff.st_mode) else None


def is_regular(stat: os.stat_result | None) -> bool:
    """Whether a file stands there, and not a folder, a link or nothing."""
    return stat is not None and stat_module.S_ISREG(stat.st_mode)


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of a file whose name was taken away. ``is_retired``: it is kept, for the listed models ``dependents``
    and those that are kept themselves; ``doubts``: why it is not known whether anybody needs it."""

    is_retired: bool = False
    dependents: tuple[str, ...] = ()
    doubts: tuple[Trouble, ...] = ()


def drop(store: Store, path: Path, *, is_diff: bool, aside: Aside | None = None) -> Removal:
    """Take a file's name away; it is retired where others need it, or may. The store's lock is held.

    Raises:
        NeedsCopy: see ``with_copies``.
        OSError: as unlink(2); it cannot be kept.
    """
    stat = os.lstat(path)
    if not stat_module.S_ISREG(stat.st_mode):
        os.unlink(path)
        return Removal()
    verdict = _judged(store, path, is_diff=is_diff)
    if verdict.keeps:
        if aside is not None:
            aside(store, path, stays=True)
        _tell_doubt(store, path, verdict)
        _retire(store, path, verdict.sha256, is_diff=is_diff, move=True)
        need = verdict.found.needs.get(verdict.sha256) if verdict.found and verdict.sha256 else None
        return Removal(True, tuple(dict.fromkeys(need.dependents)) if need else (), verdict.doubts)
    if aside is None or not aside(store, path, stays=False):
        os.unlink(path)
    if stat.st_nlink > 1:
        let_go(store, stat, verdict.found or census(store))
    return Removal()


def keep(store: Store, path: Path, *, is_diff: bool, aside: Aside | None = None) -> Census | None:
    """Retire the file at ``path`` where others need it, or may, and leave it its name. The store's lock is held.

    Returns:
        ``None`` where it was retired; else the census by which nobody needs it.

    Raises:
        NeedsCopy: see ``with_copies``.
        OSError: it cannot be kept.
    """
    verdict = _judged(store, path, is_diff=is_diff)
    if aside is not None:
        aside(store, path, stays=True)
    if not verdict.keeps:
        return verdict.found or Census({}, ())
    _tell_doubt(store, path, verdict)
    _retire(store, path, verdict.sha256, is_diff=is_diff, move=False)
    return None


def remove_diff(store: Store, path: Path) -> None:
    """Take away the diff that a plain file of the listed name ``path`` hides, if there is one."""

    def change() -> None:
        if standing(path)[1] is not None:
            drop(store, diff_of(path), is_diff=True)

    with_copies(store, change)


def remove_model(store: Store, path: Path, *, protect: bool | None = None, aside: Aside | None = None) -> Removal:
    """Take a listed name away, as unlink(2) does: the plain file or the diff, and a diff that hides behind the file.

    Args:
        path: the listed name in the store, absolute.
        protect: whether a dehydrated model is refused (default: the store's policy).
        aside: where what goes can be had back from for a while: ``hydrafs.trash.put``.

    Returns:
        What became of what was listed.

    Raises:
        OSError: as unlink(2).
        Protected: the policy forbids it.
    """

    def change() -> Removal:
        plain, diff = standing(path)
        if plain is None and diff is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        if plain is not None and stat_module.S_ISDIR(plain.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if plain is None and (store.protect if protect is None else protect):
            raise Protected("a dehydrated model may not be removed", where=path)
        if diff is not None:  # the hidden one first: nobody sees it go
            removal = drop(store, diff_of(path), is_diff=True, aside=aside)
        if plain is not None:
            removal = drop(store, path, is_diff=False, aside=aside)
        return removal

    return with_copies(store, change)


def before_overwrite(store: Store, path: Path, *, truncate: bool = False, aside: Aside | None = None) -> None:
    """To be called before the file of a listed name is opened for writing, truncated or replaced.

    Where others need a plain file, a new file takes its name, with its content (a reflink where the filesystem can,
    empty with ``truncate``), and the old one stands among the retired, as it was: who has it open goes on reading it. A
    diff that others need is retired, and keeps its name until the caller takes it (``remove_diff``). The copy is made
    without the store's lock.

    Args:
        aside: where what is truncated can be had back from for a while: ``hydrafs.trash.put``. A file that it takes
            stands there as it was, and a new one has its name.

    Raises:
        OSError, HydraError: the old content cannot be kept, so it must not be written to.
    """
    for _ in range(_TRIES):
        plain = with_copies(store, lambda: keep_to_overwrite(store, path, aside if truncate else None))
        if plain is None or _renewed(store, path, plain, truncate=truncate):
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))


def keep_to_overwrite(store: Store, path: Path, aside: Aside | None) -> os.stat_result | None:
    """Keep what stands under a listed name, where others need it. The store's lock is held.

    Returns:
        The plain file that was kept, and whose name a new one is to take; ``None`` where it can be written to as it is.
    """
    plain, diff = standing(path)
    if diff is not None:
        keep(store, diff_of(path), is_diff=True)
    if plain is None or not is_regular(plain):
        return None
    # With a second name of the user's the file is what it is: both names show what is written.
    has_one_name = plain.st_nlink - KeptLinks(store).count(plain) == 1
    is_aside = aside is not None and has_one_name and aside(store, path, stays=True)
    found = keep(store, path, is_diff=False)
    now = os.lstat(path)
    if found is None:
        # Where another file is kept, and nobody reads this one as a parent, it can be written to as it is.
        known = store.catalog.sha256(path, FileIdentity.of(now))
        return now if is_aside or known is not None or KeptLinks(store).count(now) else None
    let_go(store, plain, found)
    return os.lstat(path) if is_aside else None


def _renewed(store: Store, path: Path, plain: os.stat_result, *, truncate: bool) -> bool:
    """Give the name of the file ``plain``, which is kept, to a copy of it; ``False`` where it was changed meanwhile."""
    with TemporaryFile(path.parent) as temporary:
        if truncate:
            copy_attributes(temporary.file.fileno(), path, plain)
        elif not is_unchanged(plain, copy_into(temporary, path)):
            return False
        with store.lock():
            now = lstat(path)
            if now is None or not is_unchanged(plain, now):
                return False
            os.replace(temporary.path, path)
            fsync_folder(path.parent)
    return True
