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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cachetools import LRUCache

from hydrafs import trash
from hydrafs.activity import Activity
from hydrafs.attributes import Attributes, Entry
from hydrafs.cache import CacheStatistics, ChunkCache
from hydrafs.coherence import Names, Version
from hydrafs.covered import cover
from hydrafs.diff import SUFFIX, DiffFile, Trailer, read_trailer
from hydrafs.errors import CorruptDiff, HydraError, NoLocks, NotFound, UnsupportedDiff, log_once
from hydrafs.folder_times import FolderTimes
from hydrafs.handles import Descriptor, OpenFile, PlainFile, model_attributes, plain_attributes
from hydrafs.hashing import KnownHashes
from hydrafs.helper import Helper
from hydrafs.identity import FileIdentity
from hydrafs.keeping import KeptLinks
from hydrafs.opening import Opener
from hydrafs.readahead import DecodePool
from hydrafs.rehydrate import Rehydrated
from hydrafs.replacing import recover
from hydrafs.store import Store, is_private, listed_name

log = logging.getLogger(__name__)

_Used = TypeVar("_Used")

XATTR_HASH = "user.hash."
XATTR_PREFIX = "user.hydrafs."
XATTR_PATH = XATTR_PREFIX + "path"
"""Where a file or folder of the mount stands in the store. Answered, and not listed: a copy must not carry it along."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TRAILERS = 200_000
_LOOKS = 100
_STORE_LOCK_SECONDS = 3.0
"""How long a program waits for a command that has the store's lock and may be stopped; then it gets EBUSY. While it
does, the kernel holds the lock of the folder that it changes, and who looks a name up there waits as well."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path of the mount stands in the store.

    ``real`` is the file or folder, ``is_diff`` says what it is. ``listed`` is ``real`` by the name that is listed, diff
    or not. ``departed`` is the open file that a deleted name stood for: ``real`` leads there by ``descriptor``, the
    place's own, for the file may be closed at any time.
    """

    real: str
    is_diff: bool
    stat: os.stat_result
    listed: str
    departed: OpenFile | None = None
    descriptor: Descriptor | None = None


class StoreTree:
    """A store as the tree of a read-only mount (``hydrafs.fuse.Tree``). Thread safety: all but ``start`` and ``stop``.

    Args:
        root: the store's folder.
        cache_nbytes: how many bytes of decoded chunks are kept.
        mountpoint: where it is shown, resolved, so that no link of the store leads the daemon back to itself. Where it
            is the store, this must be made before the mount is.
        helper: what works on the store in the background for as long as the tree is started.
        protect: whether dehydrated models may not be removed or renamed, whatever the store's configuration says.
    """

    read_only = True
    store: Store
    cache: ChunkCache
    pool: DecodePool
    opener: Opener
    hashes: KnownHashes
    folder_times: FolderTimes

    def __init__(
        self,
        root: str | os.PathLike[str],
        cache_nbytes: int = 4 << 30,
        mountpoint: str | os.PathLike[str] | None = None,
        *,
        helper: Helper | None = None,
        protect: bool = False,
    ) -> None:
        self._helper = helper
        self._protect = protect
        self._root = os.path.realpath(root)
        self._mountpoint = Path(mountpoint) if mountpoint is not None else None
        self._covered = -1
        if self._mountpoint is not None and os.fspath(self._mountpoint) == self._root:
            # Over the store itself: from now on this is the only way to it.
            self._covered = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._cache_nbytes = cache_nbytes
        self._lock = threading.Lock()
        self.names = Names()
        self._trailers: LRUCache[str, tuple[FileIdentity, Trailer | None]] = LRUCache(_TRAILERS)

    def start(self) -> None:
        """Open the store and start the threads; in the process that serves, after it has forked."""
        if self._covered >= 0:
            descriptor = f"/proc/{os.getpid()}/fd/{self._covered}"
            cover(descriptor, self._root)
            self._root = descriptor
        self.store = self._open_store(os.access(self._root, os.W_OK))
        try:
            self._start()
        except BaseException:
            self.store.close()
            raise

    def _start(self) -> None:
        self.store.off_limits = self._mountpoint
        self.store.lock_seconds = _STORE_LOCK_SECONDS
        if os.access(self._root, os.W_OK) and not self.read_only:
            try:
                recover(self.store)
            except NoLocks as error:
                log.warning("models can be read, and what needs a lock is refused: %s", error)
            except (HydraError, OSError) as error:
                log.error("what a killed process began waits for the next start: %s", error)
        self.store.always_protect = self._protect
        self.store.reload()
        self.activity = Activity(self.store.private / "activity")
        self.kept_links = KeptLinks(self.store)
        self.folder_times = FolderTimes(self.store.catalog, self.members)
        self.cache = ChunkCache(self._cache_nbytes)
        self.pool = DecodePool()
        self.opener = Opener(self.store, self.cache, background=True)
        self.hashes = KnownHashes(self.store)
        if self._helper is not None:
            self._helper.start(self._covered, self.store.identity.mark)

    def _open_store(self, writable: bool) -> Store:
        """The store. Reading it needs no room: where its folder cannot be made, it does without."""
        try:
            return Store(self._root, create=writable)
        except NotFound:
            raise
        except HydraError as error:
            opened = Store(self._root, looks=True)
            log.warning("models can be read, and nothing is remembered: %s", error)
            return opened

    def stop(self) -> None:
        """Stop the threads and close the store."""
        if self._helper is not None:
            self._helper.stop()
        self.activity.close()
        self.opener.close()
        self.pool.close()
        self.store.close()
        if self._covered >= 0:
            os.close(self._covered)
            self._covered = -1

    def reload(self) -> None:
        """Read the store's configuration again, and start the worker if that is wanted by now.

        Raises:
            UsageError: it is damaged; what was read before still holds.
        """
        self.store.reload()
        if self._helper is not None:
            self._helper.start_again(self._covered)

    def statistics(self) -> CacheStatistics:
        """What the chunk cache did so far."""
        return self.cache.statistics()

    # Names

    def real(self, path: str) -> str:
        """Where ``path`` stands in the store by the name that is listed.

        Raises:
            StoreGone: another folder stands where the store was.
        """
        self.store.check_root()
        if path != "/":
            return self._root + path
        return self._root + "/." if self._covered >= 0 else self._root  # the folder, not the link that leads there

    def find(self, path: str) -> Place:
        """Where ``path`` stands in the store; ``OSError(ENOENT)`` where it does not."""
        if any(is_private(part) for part in path.split("/")):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        real = self.real(path)
        found = _plain_at(real)
        if found is not None:
            return Place(real, False, found, real)
        try:
            found = os.lstat(real + SUFFIX)
        except OSError as error:
            # A name that has no room for the ending has no diff either.
            number = errno.ENOENT if error.errno == errno.ENAMETOOLONG else error.errno
            # A model that is written to takes the name first, and its diff goes then: maybe between two looks.
            found = _plain_at(real) if number == errno.ENOENT else None
            if found is not None:
                return Place(real, False, found, real)
            raise OSError(number, os.strerror(number or errno.EIO), path) from None
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return Place(real + SUFFIX, True, found, real)

    def settled(self, path: str, use: Callable[[Place], _Used]) -> _Used:
        """``use`` of where ``path`` stands; once more where it stood elsewhere by then, since the model was dehydrated
        or made whole behind us. ``OSError(ENOENT)`` where it is gone."""
        for _ in range(_LOOKS):
            place = self.find(path)
            try:
                return use(place)
            except (OSError, HydraError) as error:
                if error.errno != errno.ENOENT or place.departed is not None or os.path.lexists(place.real):
                    raise
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    def trailer(self, place: Place) -> Trailer | None:
        """The trailer of a diff; ``None`` where it is damaged, or may not be read.

        Raises:
            OSError, HydraError: it cannot be read now. That says nothing of what it is, so nothing of it is kept.
        """
        identity = FileIdentity.of(place.stat)
        with self._lock:
            known = self._trailers.get(place.real)
        if known and known[0] == identity:
            return known[1]
        trailer: Trailer | None = None
        doubts: list[OSError] = []
        try:
            fd = os.open(place.real, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            # It can be listed all the same; who opens it is told. A folder of which one file fails looks broken.
            log.warning("listed with its own size: cannot read %s: %s", place.real, error.strerror)
            return None
        try:
            identity = FileIdentity.of(os.fstat(fd))
            trailer = read_trailer(fd, place.real, doubts.append)
        except (CorruptDiff, UnsupportedDiff) as error:
            log.warning("listed with its own size: %s", error)
        finally:
            os.close(fd)
        if not doubts:
            with self._lock:
                self._trailers[place.real] = (identity, trailer)
        return trailer

    def _trailer_to_list(self, place: Place) -> Trailer | None:
        """``trailer``, for a name that must stay listed on a disk that fails: only then can it be removed."""
        try:
            return self.trailer(place)
        except (HydraError, OSError) as error:
            if error.errno != errno.EIO:
                raise
            log.warning("listed with its own size: %s", error)
            return None

    def forget_trailer(self, real: str) -> None:
        """What the diff at ``real`` says has changed, maybe sooner than its times tell."""
        with self._lock:
            self._trailers.pop(real, None)

    # Metadata

    def getattr(self, path: str) -> Attributes:
        """``lstat``: a diff is the model that it stands for; a name that is open is what it was opened as."""
        return self.settled(path, lambda place: self._getattr(path, place))

    def _getattr(self, path: str, place: Place) -> Attributes:
        while place.departed is not None:
            try:
                found = place.departed.attributes()
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                place = self.find(path)  # closed since it was found; another one may still be open
            else:
                return dataclasses.replace(found, nlink=0) if place.is_diff else found
        if stat.S_ISDIR(place.stat.st_mode):
            return plain_attributes(place.stat, self.directory_mtime(place))
        trailer = self._trailer_to_list(place) if place.is_diff else None
        attributes = model_attributes(place.stat, trailer) if trailer else self._plain(place.stat)
        version = Version(place.stat.st_dev, place.stat.st_ino, place.is_diff, attributes.size)
        claim = self.names.open_as(path)
        # Of a diff that nothing is known of by now, who has it open knows: another size would cut what they read.
        if claim and (not claim.version.same_file(version) or (place.is_diff and trailer is None)):
            try:
                # The name is there, whatever became of the file that it was.
                attributes, version = dataclasses.replace(claim.attributes(), nlink=1), claim.version
            except OSError as error:
                if error.errno != errno.ESTALE:  # closed since it was found
                    raise
        self.names.told(path, version)
        return attributes

    def _plain(self, found: os.stat_result) -> Attributes:
        attributes = plain_attributes(found)
        kept = self.kept_links.count(found)
        return dataclasses.replace(attributes, nlink=found.st_nlink - kept) if kept else attributes

    def readdir(self, path: str) -> list[Entry]:
        """The names in a folder, as they are listed."""
        return self.members(self.find(path).real)

    def members(self, real: str) -> list[Entry]:
        """The names in the folder ``real``, as they are listed."""
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

    def directory_mtime(self, place: Place) -> int:
        """The mtime that a folder is shown with (rule 4)."""
        return self.folder_times.shown(place.real, place.stat)

    def readlink(self, path: str) -> str:
        """Where a link points, as it stands in the store."""
        return os.readlink(self.find(path).real)

    def statfs(self, path: str) -> os.statvfs_result:
        """The filesystem that the store is on. What is in the trash counts as free: it goes where room is needed."""
        self.store.check_root()
        found = os.statvfs(self._root)
        with contextlib.suppress(OSError, HydraError):
            more = trash.nbytes(self.store) // found.f_frsize if found.f_frsize else 0
            if more:
                values = list(found)
                values[3], values[4] = min(found.f_blocks, found.f_bfree + more), found.f_bavail + more
                return os.statvfs_result(values)
        return found

    def _facts(self, place: Place, *, hashes: bool = True) -> dict[str, str]:
        """The attributes that hydrafs adds to a file; its hashes, for which a manifest is read, if asked for."""
        if not stat.S_ISREG(place.stat.st_mode):
            return {}
        known = self.hashes.of(Path(place.real), place.stat, is_diff=place.is_diff) if hashes else {}
        facts = {XATTR_HASH + hash_name: value.hex() for hash_name, value in known.items()}
        if not place.is_diff:
            return {**facts, XATTR_PREFIX + "state": "plain"}
        trailer = self._trailer_to_list(place)
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
        place = self.find(path)
        names = list(self._facts(place))
        if place.is_diff:
            names.append(XATTR_PREFIX + "parents")
        with contextlib.suppress(OSError):
            found = os.listxattr(place.real, follow_symlinks=place.departed is not None)
            # What hydrafs says itself, it says: a copy out of a mount has carried attributes into the store.
            names += [n for n in found if n not in names and not n.startswith((XATTR_HASH, XATTR_PREFIX))]
        return names

    def getxattr(self, path: str, name: str) -> bytes:
        """The value of an attribute; ``OSError(ENODATA)`` where there is none."""
        place = self.find(path)
        if name == XATTR_PATH:
            return os.fsencode(place.real.removesuffix("/."))
        if name == XATTR_PREFIX + "parents" and place.is_diff:
            with DiffFile(place.real) as diff:
                return "\n".join(f"{p.sha256.hex()} {p.name}" for p in diff.manifest.parents).encode(
                    "utf-8", "surrogateescape"
                )
        if name == XATTR_PREFIX + "state" and place.is_diff and self._trailer_to_list(place) is not None:
            with contextlib.suppress(HydraError), DiffFile(place.real) as diff:
                state = self.opener.state_of(diff.manifest.parents)
                if state:
                    return state.encode()
        if name.startswith((XATTR_HASH, XATTR_PREFIX)):
            value = self._facts(place, hashes=name.startswith(XATTR_HASH)).get(name)
            if value is not None:
                return value.encode("utf-8", "surrogateescape")
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)
        try:
            return os.getxattr(place.real, name, follow_symlinks=place.departed is not None)
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
        if flags & WRITING:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return self.settled(path, lambda place: self.open_place(path, place))

    def open_place(self, path: str, place: Place, *, wants: int = os.O_RDONLY) -> OpenFile:
        """Open what was found for reading; see ``open``. With ``wants`` it becomes what that asks for once it is
        written to (``OpenFile``)."""
        source: PlainFile | Rehydrated
        known_as = place.real if place.departed is None else place.departed.real
        fd = os.open(place.real, os.O_RDONLY | os.O_CLOEXEC) if place.departed is not None else None
        try:
            if place.is_diff:
                source = self.opener.open_diff(Path(known_as), fd)
            elif fd is not None:
                source = PlainFile(known_as, fd, os.O_RDONLY)
            else:
                source = PlainFile.open(place.real, os.O_RDONLY)
        except HydraError as error:
            if error.errno == errno.ENOENT and place.departed is None and not os.path.lexists(place.real):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
            log_once(log, error, "cannot open %s: %s", path, error)
            raise
        return self.opened(path, source, wants=wants)

    def opened(self, path: str, source: PlainFile | Rehydrated, *, wants: int = os.O_RDONLY) -> OpenFile:
        """``source`` as an open file of the mount; it is closed where that fails."""
        try:
            return OpenFile(
                self.names,
                self.store.catalog,
                self.pool,
                path,
                source,
                wants=wants,
                on_write=self.to_be_written if wants & os.O_ACCMODE != os.O_RDONLY else None,
                on_close=self.closed,
                on_read=self.activity.touch,
                make_room=self.make_room,
            )
        except BaseException as error:
            with contextlib.suppress(OSError):
                source.close()
            if isinstance(error, OSError) and error.errno == errno.EBUSY:
                log.error("cannot open %s: another file of this name is still open; close it first", path)
            raise

    def make_room(self, nbytes: int) -> bool:
        """A write found no room for ``nbytes``: whether there may be some now."""
        return False

    def to_be_written(self, file: OpenFile, size: int | None) -> None:
        """``file`` is about to be written to, or made ``size`` bytes long; see ``OpenFile``."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), file.path)

    def closed(self, file: OpenFile) -> None:
        """An open file of this tree was closed."""


def _plain_at(real: str) -> os.stat_result | None:
    """What stands at ``real`` under its own name. A diff does not; a folder may be called anything."""
    try:
        found = os.lstat(real)
    except FileNotFoundError:
        return None
    name = real.rsplit("/", 1)[-1]
    return found if listed_name(name) == name or not stat.S_ISREG(found.st_mode) else None


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
