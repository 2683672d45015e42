"""What must not be lost: removing and overwriting models that others need.

Goal: whatever happens to the name of a parent, the diffs that need it go on being served.
Plan: a parent in use has a second hard link, ``.hydrafs/held/SHA256``; a model that is removed or replaced while others
need it moves to ``.hydrafs/retired/SHA256``, where it is in no listing (``.hydra`` behind it where it is a diff).
Rule 1: a parent goes nowhere before it has its place among the retired; each step is one rename(2) or link(2).
Rule 2: who changes names holds the store's lock; a lock of a dead process is none.
Rule 3: a place promises nothing of what is in it: who opens a parent proves it, wherever it stands.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat as stat_module
import time
from collections.abc import Iterator
from pathlib import Path

from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, Protected
from hydrafs.identity import FileIdentity, is_unchanged, probe
from hydrafs.layout import FileSource
from hydrafs.manifest import Parent
from hydrafs.needs import Need, needs
from hydrafs.store import Store, looks_like_model, trailer_of
from hydrafs.temporary import TEMPORARY, TemporaryFile, fsync_folder

__all__ = ["KeptLinks", "before_overwrite", "carried", "diff_of", "drop", "hold", "is_parent", "is_proven",
           "is_regular", "keep", "let_go", "links_of", "lstat", "needed_as", "place_of", "remember", "remove_diff",
           "remove_model", "standing"]  # fmt: skip

log = logging.getLogger(__name__)

_FICLONE = 0x40049409
_COPY_NBYTES = 8 << 20
_SIDECAR_SECONDS = 1.0
"""How old the sizes of the parents may be when a file that is not called like a model is looked at."""
_SETTLED_NS = 100_000_000
_REMEMBER_SECONDS = 2.0
"""A fact that is remembered without the lock may be forgotten sooner. A mount that ends does not wait for it."""


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


# Holding


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
            _link_over(source, target)
    except OSError as error:
        log.debug("%s is not held: %s", path, error)
        return False
    return True


def _link_over(source: Path, target: Path) -> None:
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


def let_go(store: Store, stat: os.stat_result, needed: dict[bytes, Need]) -> None:
    """Remove the links to a file that is held or retired and that nobody needs, so that its space is freed."""
    if stat.st_nlink < 2:
        return
    for folder in (store.held, store.retired):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.inode() != stat.st_ino or not os.path.samestat(entry.stat(follow_symlinks=False), stat):
                    continue
                digest = entry.name.removesuffix(SUFFIX)
                if not any(sha256.hex() == digest for sha256 in needed):
                    os.unlink(entry.path)


def links_of(store: Store, stat: os.stat_result) -> list[Path]:
    """Where a file is held."""
    found = []
    if stat.st_nlink > 1:
        for folder in (store.held, store.retired):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                found += [Path(e.path) for e in entries if e.inode() == stat.st_ino]
    return found


class KeptLinks:
    """How many links of a file are hydrafs' own: a listing counts them not. Thread safety: any number of threads."""

    def __init__(self, store: Store) -> None:
        self._folders = (store.held, store.retired)
        self._known: tuple[tuple[int, ...], dict[tuple[int, int], int]] = ((), {})

    def count(self, stat: os.stat_result) -> int:
        """How many of the links that ``stat`` counts are under ``held`` and ``retired``; no scan while they rest."""
        if stat.st_nlink < 1 or not stat_module.S_ISREG(stat.st_mode):
            return 0
        times = []
        for folder in self._folders:
            try:
                times.append(os.stat(folder).st_mtime_ns)
            except OSError:
                times.append(0)
        key = tuple(times)
        if self._known[0] != key:
            links: dict[tuple[int, int], int] = {}
            for folder in self._folders:
                with contextlib.suppress(OSError), os.scandir(folder) as entries:
                    for entry in entries:
                        found = entry.stat(follow_symlinks=False)
                        links[found.st_dev, found.st_ino] = links.get((found.st_dev, found.st_ino), 0) + 1
            if time.time_ns() - max(key) < _SETTLED_NS:
                return links.get((stat.st_dev, stat.st_ino), 0)
            self._known = (key, links)
        return self._known[1].get((stat.st_dev, stat.st_ino), 0)


# Who is needed

_sizes: dict[Path, tuple[float, set[int]]] = {}


def needed_as(store: Store, path: Path, *, is_diff: bool) -> bytes | None:
    """The SHA-256 under which other diffs need the file at ``path``; ``None`` where nobody does. Hashes nothing: a file
    whose SHA-256 is unknown is needed where its size and a probe are those of a parent."""
    if is_diff:
        try:
            sha256 = trailer_of(path).sha256
        except HydraError:
            return None
        return sha256 if sha256 in needs(store, without=path) else None
    stat = os.stat(path)
    if stat.st_size == 0 or not _may_be_needed(store, path, stat):
        return None
    found = needs(store)
    _sizes[store.root] = time.monotonic(), {need.parent.size for need in found.values()}
    alike = [need.parent for need in found.values() if need.parent.size == stat.st_size]
    if not alike:
        return None
    known = store.catalog.sha256(path, FileIdentity.of(stat))
    if known is not None:
        return known if known in found else None
    for parent in alike:
        with contextlib.suppress(OSError):
            if os.path.samestat(stat, os.lstat(place_of(store.held, parent.sha256, is_diff=False))):
                return parent.sha256
    with contextlib.suppress(HydraError):
        return next((parent.sha256 for parent in alike if is_parent(store, path, parent)), None)
    return None


def _may_be_needed(store: Store, path: Path, stat: os.stat_result) -> bool:
    # Sidecars come and go by the hundred, and a look at every diff of the store for each would be felt. A parent of
    # another name than a model's is held, and so has a second link.
    if looks_like_model(path.name) or stat.st_nlink > 1:
        return True
    when, sizes = _sizes.get(store.root, (-_SIDECAR_SECONDS, set()))
    return time.monotonic() - when >= _SIDECAR_SECONDS or stat.st_size in sizes


# Retiring


def _retire(store: Store, path: Path, sha256: bytes, *, is_diff: bool, move: bool) -> None:
    """Keep the file at ``path`` among the retired; with ``move`` it leaves its name, else it has both."""
    target = place_of(store.retired, sha256, is_diff=is_diff)
    held = place_of(store.held, sha256, is_diff=is_diff)
    if not store.retired.is_dir():
        store.retired.mkdir(parents=True)
        fsync_folder(store.private)
    there = lstat(target)
    here = os.lstat(path)
    same = there is not None and os.path.samestat(there, here)
    kept = same or (there is not None and not is_diff and is_proven(store, target, sha256))
    with carried(store, path, target, held):
        if not kept:
            try:
                if move:
                    os.replace(path, target)
                else:
                    _link_over(path, target)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                _copy(path, target, here)
                kept = True
        if kept and move:
            os.unlink(path)
    fsync_folder(store.retired)
    if move:
        fsync_folder(path.parent)


def _copy(path: Path, target: Path, stat: os.stat_result) -> None:
    """A copy of the file at ``path`` under ``target``, with its mode, owner, times and attributes, in one step."""
    with TemporaryFile(target.parent) as temporary:
        fd = temporary.file.fileno()
        with open(path, "rb", buffering=0) as source:
            try:
                fcntl.ioctl(fd, _FICLONE, source.fileno())
            except OSError:
                offset = 0
                while count := _copy_some(source.fileno(), fd, offset):
                    offset += count
        _like(fd, path, stat)
        os.utime(fd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        temporary.flush_to_disk()
        os.replace(temporary.path, target)
        fsync_folder(target.parent)


def _copy_some(source: int, to: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, to, _COPY_NBYTES, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.pwrite(to, os.pread(source, _COPY_NBYTES, offset), offset)


def _like(fd: int, path: Path, stat: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):
        os.fchown(fd, stat.st_uid, stat.st_gid)
    os.fchmod(fd, stat_module.S_IMODE(stat.st_mode))
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(path, name))


# Names


def lstat(path: Path) -> os.stat_result | None:
    """lstat(2); ``None`` where nothing stands."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a name that has no room for the ending has no diff
            return None
        raise


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


def drop(store: Store, path: Path, *, is_diff: bool) -> None:
    """Take a file's name away; it is retired where others need it."""
    stat = os.lstat(path)
    if not stat_module.S_ISREG(stat.st_mode):
        os.unlink(path)
        return
    sha256 = needed_as(store, path, is_diff=is_diff)
    if sha256 is not None:
        log.info("%s is needed by others and is kept among the retired", path)
        _retire(store, path, sha256, is_diff=is_diff, move=True)
        return
    os.unlink(path)
    if stat.st_nlink > 1:
        let_go(store, stat, needs(store))


def keep(store: Store, path: Path, *, is_diff: bool) -> bool:
    """Retire the file at ``path`` where others need it, and leave it its name; whether they do."""
    sha256 = needed_as(store, path, is_diff=is_diff)
    if sha256 is not None:
        _retire(store, path, sha256, is_diff=is_diff, move=False)
    return sha256 is not None


def remove_diff(store: Store, path: Path) -> None:
    """Take away the diff that a plain file of the listed name ``path`` hides, if there is one."""
    with store.lock():
        if standing(path)[1] is not None:
            drop(store, diff_of(path), is_diff=True)


def remove_model(store: Store, path: Path, *, protect: bool | None = None) -> None:
    """Take a listed name away, as unlink(2) does: the plain file or the diff, and a diff that hides behind the file.

    Args:
        path: the listed name in the store, absolute.
        protect: whether a dehydrated model is refused (default: the store's policy).

    Raises:
        OSError: as unlink(2).
        Protected: the policy forbids it.
    """
    with store.lock():
        plain, diff = standing(path)
        if plain is None and diff is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        if plain is not None and stat_module.S_ISDIR(plain.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if plain is None and (store.protect if protect is None else protect):
            raise Protected("a dehydrated model may not be removed", where=path)
        if diff is not None:  # the hidden one first: nobody sees it go
            drop(store, diff_of(path), is_diff=True)
        if plain is not None:
            drop(store, path, is_diff=False)


def before_overwrite(store: Store, path: Path, *, truncate: bool = False) -> None:
    """To be called before the file of a listed name is opened for writing, truncated or replaced.

    Where others need a plain file, a new file takes its name, with its content (a reflink where the filesystem can,
    empty with ``truncate``), and the old one stands among the retired, as it was: who has it open goes on reading it. A
    diff that others need is retired, and keeps its name until the caller takes it (``remove_diff``).

    Raises:
        OSError: the old content cannot be kept, so it must not be written to.
    """
    with store.lock():
        plain, diff = standing(path)
        if diff is not None:
            keep(store, diff_of(path), is_diff=True)
        if plain is None or not is_regular(plain):
            return
        needed = keep(store, path, is_diff=False)
        if not needed and plain.st_nlink > 1:
            let_go(store, plain, needs(store))
        if not needed:
            return
        if not truncate:
            _copy(path, path, plain)
            return
        with TemporaryFile(path.parent) as temporary:
            _like(temporary.file.fileno(), path, plain)
            os.replace(temporary.path, path)
