"""What a store keeps besides the models that it lists: for whom, and what it costs; and which parents nothing keeps.

Rule: it only looks. What it cannot look at it says.
"""

from __future__ import annotations

import contextlib
import os
import stat as stat_module
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydrafs import trash
from hydrafs.cache import ChunkCache
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError
from hydrafs.held import takes_no_space
from hydrafs.keeping import is_parent, place_of
from hydrafs.needs import Census, Need, kept_diffs, record_of
from hydrafs.opening import Opener
from hydrafs.store import PRIVATE, Store, trailer_of
from hydrafs.walk import Report, list_folder, walk

__all__ = ["Kept", "aside_files", "kept", "unhashed_files", "unheld"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that takes space and is in no listing. ``sha256`` is empty where only its place is known.

    ``folder``: ``retired``, ``held`` or ``trash``, below ``.hydrafs``; ``name``: what it was listed as, as far as those
    know who need it; ``dependents``: the listed models that need it, through any chain; ``is_needed``: also where none
    of those is listed.
    """

    path: Path
    folder: str
    sha256: bytes
    name: str
    nbytes: int
    dependents: tuple[str, ...]
    is_needed: bool


def kept(store: Store, census: Census, trouble: Report | None = None) -> list[Kept]:
    """Every file under ``.hydrafs`` that holds a model and has no listed name, each once.

    Args:
        census: who needs whom in the store.
        trouble: is told what could not be looked at.
    """
    links: dict[tuple[int, int], list[tuple[Path, os.stat_result]]] = {}
    for folder in (store.retired, store.held):
        for entry in list_folder(folder, report=trouble).files:
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                if stat_module.S_ISREG(stat.st_mode) and not entry.name.startswith("."):
                    links.setdefault((stat.st_dev, stat.st_ino), []).append((Path(entry.path), stat))
    in_trash = {}
    for trashed in trash.listing(store):
        with contextlib.suppress(OSError):
            stat = os.lstat(trashed.path)
            links.setdefault((stat.st_dev, stat.st_ino), []).append((trashed.path, stat))
            in_trash[trashed.path] = trashed.name
    through = _through(store)
    found = []
    for names in links.values():
        path, stat = names[0]
        if path.parent == store.held and takes_no_space(store, path, _sha256_of(path)):
            continue
        if stat.st_nlink <= len(names):  # else it is listed, or somebody else's as well
            found.append(_kept(path, stat, census, through, in_trash.get(path, "")))
    return found


def _through(store: Store) -> dict[bytes, set[bytes]]:
    """The models that are kept as diffs, by the SHA-256 of what they need."""
    found: dict[bytes, set[bytes]] = {}
    for path in kept_diffs(store):
        with contextlib.suppress(OSError, HydraError):
            record = record_of(store, path)
            for parent in record.parents:
                found.setdefault(parent[0], set()).add(record.sha256)
    return found


def _kept(path: Path, stat: os.stat_result, census: Census, through: dict[bytes, set[bytes]], name: str) -> Kept:
    sha256 = _sha256_of(path)
    need = census.needs.get(sha256)
    if need and not name:
        name = Path(need.parent.name).name
    dependents: dict[str, None] = {}
    pending, seen = [sha256], {sha256}
    while pending:
        current = pending.pop()
        if current in census.needs:
            dependents.update(dict.fromkeys(census.needs[current].dependents))
        more = through.get(current, set()) - seen
        seen |= more
        pending += more
    return Kept(path, path.parent.name, sha256, name, stat.st_size, tuple(sorted(dependents)), need is not None)


def _sha256_of(path: Path) -> bytes:
    digest = path.name.removesuffix(SUFFIX)
    if len(digest) == 64 and set(digest) <= set(string.hexdigits):
        return bytes.fromhex(digest)
    return b""


def unhashed_files(store: Store) -> list[Path]:
    """What was retired while nobody knew its SHA-256."""
    entries = list_folder(store.retired).files
    return [Path(e.path) for e in entries if not e.name.startswith(".") and not _sha256_of(Path(e.path))]


def aside_files(store: Store) -> Iterator[Path]:
    """What killed commands left beside models, out of sight: it may be the only copy of what somebody wrote."""

    def leave_out(entry: os.DirEntry[str]) -> bool:
        return entry.name == PRIVATE or (entry.is_symlink() and store.is_off_limits(entry.path))

    for folder in walk(store.root, leave_out=leave_out):
        for entry in folder.files:
            if entry.name.startswith(f"{PRIVATE}-aside-"):
                yield Path(entry.path)


def unheld(store: Store, census: Census) -> list[Need]:
    """The parents that nothing but their names keeps, or could: they are missing, or on another filesystem, or of
    somebody whose files may not be linked."""
    found = []
    with contextlib.closing(Opener(store, ChunkCache(0))) as opener:
        for sha256, need in census.needs.items():
            if not _is_held(store, sha256, need):
                path = opener.find(need.parent)
                if path is None or not _can_be_held(store, path):
                    found.append(need)
    return found


def _is_held(store: Store, sha256: bytes, need: Need) -> bool:
    for folder in (store.held, store.retired):
        with contextlib.suppress(OSError, HydraError):
            if is_parent(store, place_of(folder, sha256, is_diff=False), need.parent):
                return True
        with contextlib.suppress(OSError, HydraError):
            if trailer_of(place_of(folder, sha256, is_diff=True)).sha256 == sha256:
                return True
    return False


def _can_be_held(store: Store, path: Path) -> bool:
    try:
        stat, root = os.stat(path), os.stat(store.root)
    except OSError:
        return False
    # Somebody else's file may be linked only by who may read and write it (fs.protected_hardlinks, proc(5)).
    mine = os.geteuid() in (0, stat.st_uid) or os.access(path, os.R_OK | os.W_OK)
    return stat.st_dev == root.st_dev and mine
