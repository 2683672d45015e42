"""The tree that a mount shows, as plain Python with no FUSE in it.

Goal: a store as it was before anything was dehydrated: each ``NAME.hydra`` is ``NAME``, all else passes through.
Rule 1: ``stat``, listings and attributes decode nothing.
Rule 2: an open is served or refused; what is wrong with a diff or its parents is found there, and logged with the
        remedy.
Rule 3: two contents under one name never share the kernel's pages, nor the size that it believes
        (``hydrafs.coherence``): a name that is open keeps its content until it is closed.
Rule 4: a folder's mtime changes when the names listed in it change, and at no other time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import xxhash
from cachetools import LRUCache

from hydrafs.attributes import Attributes, Entry
from hydrafs.cache import CacheStatistics, ChunkCache
from hydrafs.coherence import Claim, Names, Version
from hydrafs.diff import SUFFIX, DiffFile, Trailer, read_trailer
from hydrafs.digests import PARTIAL_NBYTES, PARTIAL_OFFSET
from hydrafs.errors import HydraError, log_once
from hydrafs.hashing import KnownHashes, kept_block
from hydrafs.identity import FileIdentity
from hydrafs.layout import FileSource
from hydrafs.opening import Opener
from hydrafs.readahead import DecodePool, Reader
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import Store, is_private, listed_name

log = logging.getLogger(__name__)

XATTR_HASH = "user.hash."
XATTR_PREFIX = "user.hydrafs."
XATTR_PATH = XATTR_PREFIX + "path"
"""Where a file or folder of the mount stands in the store. Answered, and not listed: a copy must not carry it along."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SETTLED_NS = 100_000_000
"""A folder changed less than this ago may change again within the same tick of its mtime."""
_TRAILERS = 200_000


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path of the mount stands in the store: ``real`` is the file or folder, ``is_diff`` says what it is."""

    real: str
    is_diff: bool
    stat: os.stat_result


class OpenFile:
    """An open file of the mount: a plain file, or a diff read as its model. Thread safety: any number of readers."""

    def __init__(
        self,
        tree: StoreTree,
        path: str,
        place: _Place,
        source: FileSource | Rehydrated,
        attributes: Attributes,
        identify: Callable[[], Hashable],
    ) -> None:
        self.path = path
        self._names = tree.names
        self._source = source
        self._store = tree.store
        self._attributes = attributes
        self._reader = Reader(source, tree.pool) if isinstance(source, Rehydrated) else None
        self._claim: Claim = tree.names.claim(path, _version(place, attributes.size), identify, self.attributes)
        self.keep_cache = self._claim.keep_cache

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; less than asked only at the end of the file."""
        self._names.used(self._claim)
        if self._reader is None:
            assert isinstance(self._source, FileSource)
            try:
                return os.preadv(self._source.fd, [out], offset)
            except OSError as error:
                log_once(log, error, "cannot read %s: %s", self._source.path, error)
                raise
        try:
            if offset >= PARTIAL_OFFSET and offset + out.nbytes <= PARTIAL_OFFSET + PARTIAL_NBYTES:
                assert isinstance(self._source, Rehydrated)
                block = kept_block(self._store, self._source.manifest)
                if block is not None:
                    piece = block[offset - PARTIAL_OFFSET :][: out.nbytes]
                    out[: len(piece)] = piece
                    return len(piece)
            return self._reader.pread_into(offset, out)
        except HydraError as error:
            log_once(log, error, "cannot read %s: %s", self.path, error)
            raise

    def attributes(self) -> Attributes:
        """What ``fstat`` says: of a plain file as it is now, of a model as it was opened."""
        if isinstance(self._source, FileSource):
            return _plain_attributes(os.fstat(self._source.fd))
        return self._attributes

    def close(self) -> None:
        """Let go of the file."""
        self._names.release(self._claim)
        self._source.close()


class StoreTree:
    """A store as the tree of a mount (``hydrafs.fuse.Tree``). Thread safety: all but ``start`` and ``stop``.

    Args:
        root: the store's folder.
        cache_nbytes: how many bytes of decoded chunks are kept.
        mountpoint: where it is shown, resolved, so that no link of the store leads the daemon back to itself.
    """

    store: Store
    cache: ChunkCache
    pool: DecodePool
    opener: Opener
    hashes: KnownHashes

    def __init__(
        self,
        root: str | os.PathLike[str],
        cache_nbytes: int = 4 << 30,
        mountpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self._root = os.path.realpath(root)
        self._mountpoint = Path(mountpoint) if mountpoint is not None else None
        self._cache_nbytes = cache_nbytes
        self._lock = threading.Lock()
        self.names = Names()
        self._trailers: LRUCache[str, tuple[FileIdentity, Trailer | None]] = LRUCache(_TRAILERS)
        self._directories: dict[str, tuple[int, int]] = {}

    def start(self) -> None:
        """Open the store and start the threads; in the process that serves, after it has forked."""
        writable = os.access(self._root, os.W_OK)
        self.store = Store(self._root, create=writable)
        self.store.off_limits = self._mountpoint
        self.cache = ChunkCache(self._cache_nbytes)
        self.pool = DecodePool()
        self.opener = Opener(self.store, self.cache, background=True)
        self.hashes = KnownHashes(self.store)

    def stop(self) -> None:
        """Stop the threads and close the store."""
        self.opener.close()
        self.pool.close()
        self.store.close()

    def statistics(self) -> CacheStatistics:
        """What the chunk cache did so far."""
        return self.cache.statistics()

    # Names

    def _find(self, path: str) -> _Place:
        if any(is_private(part) for part in path.split("/")):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        real = self._root + path if path != "/" else self._root
        try:
            found = os.lstat(real)
            # A diff is not listed under its own name; a folder may be called anything.
            name = real.rsplit("/", 1)[-1]
            if listed_name(name) == name or not stat.S_ISREG(found.st_mode):
                return _Place(real, False, found)
        except FileNotFoundError:
            pass
        try:
            found = os.lstat(real + SUFFIX)
        except OSError as error:
            # A name that has no room for the ending has no diff either.
            number = errno.ENOENT if error.errno == errno.ENAMETOOLONG else error.errno
            raise OSError(number, os.strerror(number or errno.EIO), path) from None
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return _Place(real + SUFFIX, True, found)

    def _trailer(self, place: _Place) -> Trailer | None:
        identity = FileIdentity.of(place.stat)
        with self._lock:
            known = self._trailers.get(place.real)
        if known and known[0] == identity:
            return known[1]
        trailer: Trailer | None = None
        try:
            fd = os.open(place.real, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            # It can be listed all the same; who opens it is told. A folder of which one file fails looks broken.
            log.warning("listed with its own size: cannot read %s: %s", place.real, error.strerror)
            return None
        try:
            identity = FileIdentity.of(os.fstat(fd))
            trailer = read_trailer(fd, place.real)
        except HydraError as error:
            log.warning("listed with its own size: %s", error)
        finally:
            os.close(fd)
        with self._lock:
            self._trailers[place.real] = (identity, trailer)
        return trailer

    # Metadata

    def getattr(self, path: str) -> Attributes:
        """``lstat``: a diff is the model that it stands for; a name that is open is what it was opened as."""
        place = self._find(path)
        if stat.S_ISDIR(place.stat.st_mode):
            return _plain_attributes(place.stat, self._directory_mtime(place))
        trailer = self._trailer(place) if place.is_diff else None
        attributes = _model_attributes(place.stat, trailer) if trailer else _plain_attributes(place.stat)
        version = _version(place, attributes.size)
        claim = self.names.open_as(path)
        if claim and not claim.version.same_file(version):
            # The name is there, whatever became of the file that it was.
            attributes, version = dataclasses.replace(claim.attributes(), nlink=1), claim.version
        self.names.told(path, version)
        return attributes

    def readdir(self, path: str) -> list[Entry]:
        """The names in a folder, as they are listed."""
        return self._members(self._find(path).real)

    def _members(self, real: str) -> list[Entry]:
        plain: dict[str, Entry] = {}
        diffs: dict[str, Entry] = {}
        with os.scandir(real) as entries:
            for entry in entries:
                if is_private(entry.name):
                    continue
                mode = _type_of(entry)
                name = listed_name(entry.name) if mode == stat.S_IFREG else entry.name
                (plain if name == entry.name else diffs)[name] = Entry(name, mode, entry.inode())
        return list({**diffs, **plain}.values())

    def _directory_mtime(self, place: _Place) -> int:
        mtime_ns = place.stat.st_mtime_ns
        known = self._directories.get(place.real)
        if known and known[0] == mtime_ns:
            return known[1]
        try:
            names = sorted(f"{stat.S_IFMT(e.mode)}/{e.name}" for e in self._members(place.real))
        except OSError:
            return mtime_ns
        digest = xxhash.xxh3_64_intdigest("\0".join(names).encode("utf-8", "surrogateescape")) >> 1
        recorded = self.store.catalog.directory(Path(place.real))
        shown = recorded[1] if recorded and recorded[0] == digest else mtime_ns
        if not recorded or recorded[0] != digest:
            self.store.catalog.remember_directory(Path(place.real), digest, shown)
        if time.time_ns() - mtime_ns > _SETTLED_NS:
            self._directories[place.real] = (mtime_ns, shown)
        return shown

    def readlink(self, path: str) -> str:
        """Where a link points, as it stands in the store."""
        return os.readlink(self._find(path).real)

    def statfs(self, path: str) -> os.statvfs_result:
        """The filesystem that the store is on."""
        return os.statvfs(self._root)

    def _facts(self, place: _Place, *, hashes: bool = True) -> dict[str, str]:
        """The attributes that hydrafs adds to a file; its hashes, for which a manifest is read, if asked for."""
        if not stat.S_ISREG(place.stat.st_mode):
            return {}
        known = self.hashes.of(Path(place.real), place.stat, is_diff=place.is_diff) if hashes else {}
        facts = {XATTR_HASH + hash_name: value.hex() for hash_name, value in known.items()}
        if not place.is_diff:
            return {**facts, XATTR_PREFIX + "state": "plain"}
        trailer = self._trailer(place)
        if trailer is None:
            return {XATTR_PREFIX + "state": "damaged"}
        stored = place.stat.st_size
        return {
            **facts,
            XATTR_PREFIX + "state": "dehydrated",
            XATTR_PREFIX + "stored_size": str(stored),
            XATTR_PREFIX + "ratio": f"{stored / trailer.size:.4f}" if trailer.size else "1.0000",
        }

    def listxattr(self, path: str) -> list[str]:
        """The names of a file's attributes: hydrafs' own and those that the file has in the store."""
        place = self._find(path)
        names = list(self._facts(place))
        if place.is_diff:
            names.append(XATTR_PREFIX + "parents")
        with contextlib.suppress(OSError):
            names += [n for n in os.listxattr(place.real, follow_symlinks=False) if n not in names]
        return names

    def getxattr(self, path: str, name: str) -> bytes:
        """The value of an attribute; ``OSError(ENODATA)`` where there is none."""
        place = self._find(path)
        if name == XATTR_PATH:
            return os.fsencode(place.real)
        if name == XATTR_PREFIX + "parents" and place.is_diff:
            with DiffFile(place.real) as diff:
                return "\n".join(f"{p.sha256.hex()} {p.name}" for p in diff.manifest.parents).encode(
                    "utf-8", "surrogateescape"
                )
        if name.startswith((XATTR_HASH, XATTR_PREFIX)):
            value = self._facts(place, hashes=name.startswith(XATTR_HASH)).get(name)
            if value is not None:
                return value.encode("utf-8", "surrogateescape")
        try:
            return os.getxattr(place.real, name, follow_symlinks=False)
        except OSError as error:
            # A store on a filesystem without attributes has none; that is no reason to fail a copy.
            raise OSError(
                errno.ENODATA if error.errno == errno.ENOTSUP else error.errno, error.strerror, path
            ) from None

    # Reading

    def open(self, path: str, flags: int) -> OpenFile:
        """Open a file for reading.

        Raises:
            OSError: EROFS for writing; EBUSY and ESTALE as ``Names.claim`` has them.
            HydraError: it cannot be served; the log says why and what to do.
        """
        if flags & _WRITING:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        place = self._find(path)
        source: FileSource | Rehydrated
        try:
            source = self.opener.open_diff(Path(place.real)) if place.is_diff else FileSource(place.real)
        except HydraError as error:
            log_once(log, error, "cannot open %s: %s", path, error)
            raise
        try:
            return self._opened(path, place, source)
        except BaseException:
            source.close()
            raise

    def _opened(self, path: str, place: _Place, source: FileSource | Rehydrated) -> OpenFile:
        identify: Callable[[], Hashable]
        if isinstance(source, Rehydrated):
            place = _Place(place.real, True, source.diff.stat)
            attributes = _model_attributes(source.diff.stat, source.diff.trailer)
            digest = source.manifest.sha256
            identify = lambda: digest  # noqa: E731
        else:
            place = _Place(place.real, False, source.stat)
            attributes = _plain_attributes(source.stat)
            identity = FileIdentity.of(source.stat)
            real = Path(place.real)
            identify = lambda: self.store.catalog.sha256(real, identity) or identity  # noqa: E731
        try:
            return OpenFile(self, path, place, source, attributes, identify)
        except OSError as error:
            if error.errno == errno.EBUSY:
                log.error("cannot open %s: another file of this name is still open; close it first", path)
            raise


def _version(place: _Place, size: int) -> Version:
    return Version(place.stat.st_dev, place.stat.st_ino, place.is_diff, size)


def _type_of(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return stat.S_IFREG


def _plain_attributes(s: os.stat_result, mtime_ns: int | None = None) -> Attributes:
    return Attributes(
        s.st_mode,
        s.st_nlink,
        s.st_uid,
        s.st_gid,
        s.st_size,
        s.st_ino,
        s.st_atime_ns,
        s.st_mtime_ns if mtime_ns is None else mtime_ns,
        s.st_ctime_ns,
        s.st_blocks,
    )


def _model_attributes(s: os.stat_result, trailer: Trailer) -> Attributes:
    # The blocks are those of a file without holes: programs take fewer for a sparse file and copy it another way.
    mode = stat.S_IFREG | (trailer.mode & 0o7777)
    return Attributes(
        mode,
        1,
        s.st_uid,
        s.st_gid,
        trailer.size,
        s.st_ino,
        s.st_atime_ns,
        trailer.mtime_ns,
        s.st_ctime_ns,
        -(-trailer.size // 512),
    )
