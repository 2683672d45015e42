"""What was removed through a mount and can be had back for a while.

Plan: ``.hydrafs/trash/TIME-RANDOM.name`` says what a file was called, and beside it the file stands, ``TIME-RANDOM``
with the endings of its name. The record is there first and goes last: a kill in between leaves a record without a file.
Rule 1: what takes the space for something else comes first: the trash is a share of the disk at most, and no more than
        what is free beside it; what is older goes for what is newer, and all of it where a write finds no room.
Rule 2: what goes for good goes as everything does: it is retired where others need it, or may (``hydrafs.keeping``).
Rule 3: a diff in the trash needs its parents as long as it is there (``hydrafs.needs``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import stat as stat_module
import time
from dataclasses import dataclass
from pathlib import Path

from hydrafs.diff import SUFFIX
from hydrafs.errors import AlreadyThere, CorruptDiff, HydraError, NotFound, UsageError, from_oserror
from hydrafs.keeping import carried, diff_of, drop, links_of, standing, with_copies
from hydrafs.store import Store, is_private, listed_name, looks_like_model, trailer_of
from hydrafs.temporary import TemporaryFile, fsync_folder
from hydrafs.walk import list_folder

__all__ = ["Settings", "Trashed", "expire", "listing", "nbytes", "purge", "put", "restore"]

log = logging.getLogger(__name__)

_RECORD = ".name"
_SECONDS = 86400.0
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """How long what was removed is kept, in seconds, and how much of the filesystem it may take, from 0 to 1."""

    seconds: float = _SECONDS
    share: float = _SHARE

    @classmethod
    def of(cls, store: Store) -> Settings:
        """As ``[trash]`` in the store's configuration has it; ``trash = false`` is no trash.

        Raises:
            UsageError: it cannot be read.
        """
        given = store.setting("trash", {})
        if given is False:
            return cls(0.0)
        table = {} if given is True else given
        if not isinstance(table, dict) or not table.keys() <= {"seconds", "share"}:
            raise UsageError(
                "trash is not understood", where=store.private / "config.toml", remedy="write [trash] seconds = 86400"
            )
        values = {}
        for key, largest in (("seconds", float("inf")), ("share", 1.0)):
            value = table.get(key, getattr(cls(), key))
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
                raise UsageError(
                    f"{key} of the trash is out of range",
                    where=store.private / "config.toml",
                    detail=f"{value}, expected 0 to {largest:g}",
                )
            values[key] = float(value)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Trashed:
    """A file in the trash: ``name`` it was listed under, relative to the store; ``removed_at`` in seconds since 1970.

    ``freed_nbytes``: what its going frees, which is nothing where it is kept for others as well.
    """

    path: Path
    name: str
    is_diff: bool
    removed_at: float
    nbytes: int
    freed_nbytes: int


def _id_of(name: str) -> str:
    return name.partition(".")[0]


def _time_of(name: str) -> float:
    try:
        return int(name.partition("-")[0]) / 1e9
    except ValueError:
        return 0.0


def listing(store: Store) -> list[Trashed]:
    """What is in the trash, the oldest first. What cannot be looked at is left out."""
    found = []
    names = {}
    entries = list_folder(store.trash).files
    for entry in entries:
        if entry.name.endswith(_RECORD):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(Path(entry.path).read_bytes())
                names[_id_of(entry.name)] = os.fsdecode(bytes.fromhex(record["name"]))
    for entry in entries:
        if not entry.name.endswith(_RECORD) and not is_private(entry.name):
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                freed = stat.st_size if stat.st_nlink == 1 else 0
                found.append(
                    Trashed(
                        Path(entry.path), names.get(_id_of(entry.name), entry.name), entry.name.endswith(SUFFIX),
                        _time_of(entry.name), stat.st_size, freed,
                    )
                )  # fmt: skip
    return found


def nbytes(store: Store) -> int:
    """How much would be free if the trash were emptied: what ``statfs`` of a mount may count as free."""
    return sum(trashed.freed_nbytes for trashed in listing(store))


def put(store: Store, path: Path, *, stays: bool = False) -> bool:
    """Move the plain model or diff at ``path`` to the trash, or with ``stays`` link it there; the lock is held.

    Returns:
        Whether it is there: not what is no model, nor where there is no room, no link or no trash. With ``stays`` false
        and ``True`` returned it has left its name. Nothing is raised: a removal does not fail for want of a trash.
    """
    try:
        return _put(store, path, stays=stays)
    except (OSError, HydraError) as error:
        log.debug("%s is not put in the trash: %s", path, error)
        return False


def _put(store: Store, path: Path, *, stays: bool) -> bool:
    name = listed_name(path.name)
    is_diff = name != path.name
    stat = os.lstat(path)
    if not stat_module.S_ISREG(stat.st_mode) or not stat.st_size or not (is_diff or looks_like_model(name)):
        return False
    settings = Settings.of(store)
    if not settings.seconds or not _make_room(store, stat.st_size, settings.share):
        return False
    if not store.trash.is_dir():
        store.trash.mkdir(mode=0o700)  # who could not reach a file in its folder cannot reach it here
        fsync_folder(store.private)
    identifier = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    record = store.trash / f"{identifier}{_RECORD}"
    ending = Path(name).suffix if looks_like_model(name) else ""
    target = store.trash / f"{identifier}{ending}{SUFFIX if is_diff else ''}"
    with TemporaryFile(store.trash) as temporary:
        listed = os.fsencode(store.relative(path.with_name(name))).hex()
        temporary.file.write(json.dumps({"name": listed}).encode())
        temporary.commit(record)
    try:
        with carried(store, path, target, *links_of(store, stat)):
            if stays:
                os.link(path, target)
            else:
                os.rename(path, target)
    except OSError:
        with contextlib.suppress(OSError):
            record.unlink()
        raise
    fsync_folder(store.trash)
    if not stays:
        fsync_folder(path.parent)
    return True


def _make_room(store: Store, size: int, share: float) -> bool:
    """Remove what is oldest until ``size`` more bytes may be in the trash; whether they may."""
    disk = os.statvfs(store.private)
    there = listing(store)
    used = sum(trashed.freed_nbytes for trashed in there)
    limit = min(share * disk.f_blocks * disk.f_frsize, (disk.f_bavail * disk.f_frsize + used) / 2)
    if size > limit:
        return False
    for trashed in there:
        if used + size <= limit:
            break
        _remove(store, trashed)
        used -= trashed.freed_nbytes
    return used + size <= limit


def _remove(store: Store, trashed: Trashed) -> None:
    try:
        if trashed.is_diff:
            trailer_of(trashed.path)
    except CorruptDiff:
        trashed.path.unlink(missing_ok=True)  # it was damaged when it came, and nobody brought its backup back
    else:
        drop(store, trashed.path, is_diff=trashed.is_diff)
    with contextlib.suppress(OSError):
        (store.trash / f"{_id_of(trashed.path.name)}{_RECORD}").unlink()


def purge(store: Store, wanted_nbytes: int | None = None) -> int:
    """Remove what is in the trash for good, the oldest first, until so much is free or all of it is gone.

    Returns:
        The bytes that it freed. Parents that only a diff in the trash needed go with ``hydrafs.tending.make_room``.

    Raises:
        HydraError: the store cannot be locked.
    """
    freed = 0
    for trashed in listing(store):
        if wanted_nbytes is not None and freed >= wanted_nbytes:
            break
        freed += _removed(store, trashed)
    return freed


def expire(store: Store) -> int:
    """Remove for good what has been in the trash for longer than it is to be, and what a kill left; bytes freed.

    Raises:
        HydraError: the store cannot be locked, or its configuration cannot be read.
    """
    if not store.trash.is_dir():
        return 0
    seconds, now = Settings.of(store).seconds, time.time()
    freed = sum(_removed(store, t) for t in listing(store) if now - t.removed_at >= seconds)
    with store.lock():
        entries = list_folder(store.trash).files
        kept = {_id_of(entry.name) for entry in entries if not entry.name.endswith(_RECORD)}
        for entry in entries:
            if entry.name.endswith(_RECORD) and _id_of(entry.name) not in kept:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    return freed


def _removed(store: Store, trashed: Trashed) -> int:
    try:
        with_copies(store, lambda: _remove(store, trashed))
    except FileNotFoundError:
        return 0
    except OSError as error:
        log.warning("%s stays in the trash: %s", trashed.path, error)
        return 0
    return trashed.freed_nbytes


def restore(store: Store, name: str, to: Path | None = None) -> Path:
    """Give what was removed last of the listed name ``name`` its name back, or that of the absolute path ``to``.

    Args:
        name: relative to the store, or absolute.

    Returns:
        Its listed name in the store, absolute.

    Raises:
        NotFound: no such file is in the trash.
        AlreadyThere: the name was given to another file.
        HydraError: it cannot be moved back.
    """
    _found(store, name, to)  # who is refused has locked nothing
    with store.lock():
        trashed, target = _found(store, name, to)
        place = diff_of(target) if trashed.is_diff else target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stat = os.lstat(trashed.path)
            with carried(store, trashed.path, place, *links_of(store, stat)):
                os.rename(trashed.path, place)
            fsync_folder(target.parent)
            (store.trash / f"{_id_of(trashed.path.name)}{_RECORD}").unlink(missing_ok=True)
            fsync_folder(store.trash)
        except OSError as error:
            raise from_oserror(error, "cannot give the file its name back", target) from error
    return target


def _found(store: Store, name: str, to: Path | None) -> tuple[Trashed, Path]:
    """What is meant by ``restore``, and the name that it is to have; raises what is wrong with it."""
    wanted = store.relative(Path(os.path.abspath(name))) if os.path.isabs(name) else os.path.normpath(name)
    found = [trashed for trashed in listing(store) if wanted in (trashed.name, trashed.path.name)]
    if not found:
        raise NotFound(
            "no such file is in the trash", where=name, remedy=f"hydrafs undelete {store.root} lists what there is"
        )
    target = to or store.root / found[-1].name
    inside = Path(os.path.normpath(target))
    if not inside.is_relative_to(store.root) or any(is_private(p) for p in inside.relative_to(store.root).parts):
        raise UsageError("a name outside the store", where=target, remedy="name another with --to")
    if any(stat is not None for stat in standing(target)):
        raise AlreadyThere("another file has the name", where=target, remedy="move it away, or name another with --to")
    return found[-1], target
