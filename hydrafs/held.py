"""Links by which hydrafs keeps a file: ``.hydrafs/held``, for parents in use, and ``.hydrafs/retired``.

Rule: a place promises nothing of what is in it: who opens a parent proves it, wherever it stands.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX
from hydrafs.identity import FileIdentity, probe
from hydrafs.layout import FileSource
from hydrafs.manifest import Parent
from hydrafs.needs import Census
from hydrafs.store import Store
from hydrafs.temporary import TEMPORARY
from hydrafs.walk import list_folder

__all__ = [
    "UNHASHED",
    "carried",
    "hold",
    "is_parent",
    "is_proven",
    "let_go",
    "link_over",
    "links_of",
    "place_of",
    "unhashed",
]

log = logging.getLogger(__name__)

UNHASHED = "unhashed-"
"""How the names of retired files begin whose SHA-256 is not known yet."""


def place_of(folder: Path, sha256: bytes, *, is_diff: bool) -> Path:
    """Where a model of this SHA-256 is kept in ``folder``, which is ``Store.held`` or ``Store.retired``."""
    return folder / (sha256.hex() + (SUFFIX if is_diff else ""))


def is_proven(store: Store, path: Path, sha256: bytes) -> bool:
    """Whether the file at ``path`` is known to have this SHA-256, without reading it."""
    try:
        return store.catalog.sha256(path, FileIdentity.of(os.stat(path))) == sha256
    except OSError:
        return False


def is_parent(store: Store, path: Path, parent: Parent) -> bool:
    """Whether the plain file at ``path`` is that parent, as far as the catalog, or its size and a probe, can tell.

    Raises:
        HydraError, OSError: it cannot be read.
    """
    stat = os.stat(path)
    if stat.st_size != parent.size:
        return False
    known = store.catalog.sha256(path, FileIdentity.of(stat))
    if known is not None:
        return known == parent.sha256
    with FileSource(path) as source:
        return probe(source) == parent.probe


def hold(store: Store, path: Path, sha256: bytes) -> bool:
    """Give the parent at ``path`` a second link under ``Store.held``, so that it outlives its name.

    Returns:
        Whether a link is there; not where the filesystem is another one, or has no links, or forbids it.
    """
    is_diff = path.name.endswith(SUFFIX)
    target = place_of(store.held, sha256, is_diff=is_diff)
    source = real_path(path)
    try:
        store.held.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            if os.path.samestat(os.stat(source), os.lstat(target)):
                return True
            if not is_diff and is_proven(store, target, sha256) and not is_proven(store, path, sha256):
                return True
        with carried(store, path, source, target):
            link_over(source, target)
    except OSError as error:
        log.debug("%s is not held: %s", path, error)
        return False
    return True


def link_over(source: Path, target: Path) -> None:
    """``target`` is a link to ``source``, whatever it was."""
    try:
        os.link(source, target)
    except FileExistsError:
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        os.link(source, temporary)
        try:
            os.replace(temporary, target)
        finally:
            # rename(2) leaves both names where they are links to one file.
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def carried(store: Store, path: Path, *to: Path) -> Iterator[None]:
    """What is known of the file at ``path`` is known of it under ``path`` and ``to`` afterwards.

    A link or a rename changes the ctime of a file, and with it its identity, and nothing of what is in it.
    """
    before = FileIdentity.of(os.stat(path))
    yield
    for place in dict.fromkeys((path, *to)):
        with contextlib.suppress(OSError):
            after = FileIdentity.of(os.stat(place))
            same = (before.inode, before.device, before.size, before.mtime_ns)
            if same == (after.inode, after.device, after.size, after.mtime_ns):
                store.catalog.carry(path, before, place, after)


def let_go(store: Store, stat: os.stat_result, found: Census) -> None:
    """Remove the links to a file that is held or retired and that nobody needs, so that its space is freed; none while
    somebody may need it."""
    if stat.st_nlink < 2 or not found.is_complete:
        return
    for path in links_of(store, stat):
        digest = path.name.removesuffix(SUFFIX)
        if not any(sha256.hex() == digest for sha256 in found.needs):
            with contextlib.suppress(OSError):
                os.unlink(path)


def links_of(store: Store, stat: os.stat_result) -> list[Path]:
    """Where a file is held or retired."""
    if stat.st_nlink < 2:
        return []
    found = []
    for folder in (store.held, store.retired):
        for entry in list_folder(folder).files:
            with contextlib.suppress(OSError):
                if entry.inode() == stat.st_ino and os.path.samestat(entry.stat(follow_symlinks=False), stat):
                    found.append(Path(entry.path))
    return found


def unhashed(store: Store) -> list[Path]:
    """The retired files whose SHA-256 is not known yet: any parent may be among them."""
    return [Path(entry.path) for entry in list_folder(store.retired).files if entry.name.startswith(UNHASHED)]
