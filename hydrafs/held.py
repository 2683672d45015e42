"""Links by which hydrafs keeps a file: ``.hydrafs/held``, for parents in use, and ``.hydrafs/retired``.

Rule 1: a place promises nothing of what is in it: who opens a parent proves it, wherever it stands.
Rule 2: where the filesystem shares content between files (btrfs, XFS), what is held is a clone of the parent, made
        while nobody could write to it: what is written in place to the parent later does not reach it. Elsewhere it is
        a link.
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
from hydrafs.errors import HydraError
from hydrafs.filecopy import copy_attributes, reflink
from hydrafs.identity import FileIdentity, probe
from hydrafs.layout import FileSource
from hydrafs.leases import QuietFile
from hydrafs.manifest import Parent
from hydrafs.needs import Census
from hydrafs.store import Store
from hydrafs.temporary import TEMPORARY, TemporaryFile
from hydrafs.walk import list_folder

__all__ = [
    "UNHASHED",
    "carried",
    "hold",
    "is_clone",
    "is_parent",
    "is_proven",
    "let_go",
    "link_over",
    "links_of",
    "place_of",
    "takes_no_space",
    "unhashed",
]

_CLONE_OF = "user.hydrafs.clone-of"

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
    """Give the parent at ``path`` a clone or a second link under ``Store.held``, so that it outlives its name.

    Returns:
        Whether it is there; not where the filesystem is another one, or has no links, or forbids it.
    """
    is_diff = path.name.endswith(SUFFIX)
    target = place_of(store.held, sha256, is_diff=is_diff)
    source = real_path(path)
    try:
        store.held.mkdir(parents=True, exist_ok=True)
        ours = _is_in(source, store.held) or _is_in(source, store.retired)
        if not is_diff and not ours and is_proven(store, path, sha256) and _clone_over(store, source, target, sha256):
            return True
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


def _is_in(path: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path.parent), os.stat(folder))
    return False


def _clone_over(store: Store, source: Path, target: Path, sha256: bytes) -> bool:
    """``target`` is a clone of ``source``; not where the filesystem has none, or somebody can write to ``source``."""
    if is_clone(target, os.stat(source)) and is_proven(store, target, sha256):
        return True
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(contextlib.closing(QuietFile(source)))
            if not _can_clone(file.fd, target.parent):
                return False
            temporary = stack.enter_context(TemporaryFile(target.parent))
            fd = temporary.file.fileno()
            if not reflink(file.fd, fd):
                return False
            copy_attributes(fd, source, file.stat)
            os.utime(fd, ns=(file.stat.st_atime_ns, file.stat.st_mtime_ns))
            os.setxattr(fd, _CLONE_OF, _number_of(file.stat))
            temporary.flush_to_disk()
            file.quiet.check(look=True)
            if not is_proven(store, source, sha256) or FileIdentity.of(os.fstat(file.fd)) != FileIdentity.of(file.stat):
                return False
            temporary.commit(target, replace=True)
            store.catalog.remember_sha256(target, FileIdentity.of(os.stat(target)), sha256)
    except (OSError, HydraError) as error:
        log.debug("%s is not cloned: %s", source, error)
        return False
    return True


def _can_clone(fd: int, folder: Path) -> bool:
    """Whether a file can be cloned into a folder; tried with one that never gets a name, so that none is left."""
    nameless = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        return reflink(fd, nameless)
    finally:
        os.close(nameless)


def is_clone(path: Path, stat: os.stat_result) -> bool:
    """Whether the held file at ``path`` was made as a clone of the file that ``stat`` is of: it takes no space beside
    that."""
    with contextlib.suppress(OSError):
        return os.getxattr(path, _CLONE_OF) == _number_of(stat)
    return False


def takes_no_space(store: Store, path: Path, sha256: bytes) -> bool:
    """Whether a held file is a clone of one that stands elsewhere, listed or retired, as it was when it was cloned."""
    for place in (place_of(store.retired, sha256, is_diff=False), *store.paths_of(sha256)):
        with contextlib.suppress(OSError):
            if is_clone(path, os.lstat(place)):
                return True
    return False


def _number_of(stat: os.stat_result) -> bytes:
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode()


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
