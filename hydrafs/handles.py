"""Open files of a mount: plain ones, read and written, and diffs read as their models.

Rule 1: an open file goes on as it was opened, whatever becomes of its name.
Rule 2: opening is not writing. A file that is opened for writing is read as it is until the first write, truncation or
        allocation through the mount. Then it becomes a plain file that may be written to (``on_write``), and everybody
        who has the name open goes on with that file (``become``): it is one file to the kernel, with one set of pages.
Rule 3: a descriptor's number is used only while its file is known to stay open: by its own requests, which the kernel
        has end before it lets go of it, and by all others within ``held``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hydrafs.attributes import Attributes
from hydrafs.coherence import Claim, Version
from hydrafs.copy_up import lock_shared, reopen
from hydrafs.diff import Trailer, read_trailer
from hydrafs.digests import PARTIAL_NBYTES, PARTIAL_OFFSET
from hydrafs.errors import HydraError, log_once
from hydrafs.hashing import kept_block
from hydrafs.identity import FileIdentity
from hydrafs.path_locks import with_room
from hydrafs.readahead import Reader
from hydrafs.rehydrate import Rehydrated

if TYPE_CHECKING:
    from hydrafs.catalog import Catalog
    from hydrafs.coherence import Names
    from hydrafs.readahead import DecodePool

log = logging.getLogger("hydrafs.vfs")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def plain_attributes(s: os.stat_result, mtime_ns: int | None = None) -> Attributes:
    """What a file of the store is as itself; ``mtime_ns`` is shown for its own where it is given."""
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
        s.st_rdev,
    )


def model_attributes(s: os.stat_result, trailer: Trailer) -> Attributes:
    """What a diff is as the model that it stands for."""
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


class PlainFile:
    """A file of the store, opened with ``flags``. Thread safety: all but ``close``."""

    def __init__(self, path: str, fd: int, flags: int) -> None:
        self.path, self.fd, self.flags = path, fd, flags
        try:
            self.stat = os.fstat(fd)
        except BaseException:
            os.close(fd)  # it is this file's from here on
            raise

    @classmethod
    def open(cls, path: str, flags: int) -> PlainFile:
        """Open ``path``; fails as open(2)."""
        return cls(path, os.open(path, flags | os.O_CLOEXEC), flags)

    @property
    def is_writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


class Descriptor:
    """A descriptor of its own, closed when nobody refers to it any more. Thread safety: all of it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class OpenFile:
    """An open file of the mount. Thread safety: any number of readers and writers."""

    def __init__(
        self,
        names: Names,
        catalog: Catalog,
        pool: DecodePool,
        path: str,
        source: PlainFile | Rehydrated,
        *,
        wants: int = os.O_RDONLY,
        on_write: Callable[[OpenFile, int | None], None] | None = None,
        on_close: Callable[[OpenFile], None] | None = None,
        on_read: Callable[[], None] = lambda: None,
        make_room: Callable[[int], bool] = lambda nbytes: False,
    ) -> None:
        """Open ``source`` under the name ``path``.

        Args:
            wants: the flags that it was opened with, as far as they matter to the file of the store.
            on_write: called before the first write, with the size if it is a truncation. When it returns, the file
                ``is_writable``, or has that size already.
            on_close, on_read: called when it was closed, and at each read.
            make_room: called where a write finds no room; whether there may be some now.
        """
        self._names, self._catalog, self._pool = names, catalog, pool
        self._wants = wants
        self._on_write = on_write
        self._on_close = on_close
        self._on_read = on_read
        self._make_room = make_room
        self._users = 0
        self._past: list[PlainFile | Rehydrated] = []
        self._lock = threading.Lock()
        self._closed = False
        self._source = source
        self._reader = Reader(source, pool) if isinstance(source, Rehydrated) else None
        self._claim: Claim = names.claim(
            path, self._version(source), self._identity(source), self.attributes, writes=self.is_writable, holder=self
        )
        self.keep_cache = self._claim.keep_cache

    @property
    def path(self) -> str:
        """The name that the file has, or had when it was deleted."""
        return self._claim.path

    @property
    def source(self) -> PlainFile | Rehydrated:
        """What is read from."""
        return self._source

    @property
    def fd(self) -> int:
        """The descriptor of the file in the store: the plain file, or the diff."""
        source = self._source
        return source.fd if isinstance(source, PlainFile) else source.diff.fd

    @staticmethod
    def _version(source: PlainFile | Rehydrated) -> Version:
        if isinstance(source, PlainFile):
            s = os.fstat(source.fd)
            return Version(s.st_dev, s.st_ino, False, s.st_size)
        s = os.fstat(source.diff.fd)
        return Version(s.st_dev, s.st_ino, True, source.size)

    def _identity(self, source: PlainFile | Rehydrated) -> Callable[[], Hashable]:
        if isinstance(source, Rehydrated):
            digest = source.manifest.sha256
            return lambda: digest
        identity, real, catalog = FileIdentity.of(os.fstat(source.fd)), Path(source.path), self._catalog

        def identify() -> Hashable:
            return catalog.sha256(real, identity) or identity

        return identify

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; less than asked only at the end of the file."""
        self._on_read()
        self._names.used(self._claim)
        with self._lock:
            source, reader = self._source, self._reader
        if reader is None:
            assert isinstance(source, PlainFile)
            try:
                return os.preadv(source.fd, [out], offset)
            except OSError as error:
                log_once(log, error, "cannot read %s: %s", source.path, error)
                raise
        try:
            if offset >= PARTIAL_OFFSET and offset + out.nbytes <= PARTIAL_OFFSET + PARTIAL_NBYTES:
                assert isinstance(source, Rehydrated)
                block = kept_block(self._catalog, source.manifest)
                if block is not None:
                    piece = block[offset - PARTIAL_OFFSET :][: out.nbytes]
                    out[: len(piece)] = piece
                    return len(piece)
            return reader.pread_into(offset, out)
        except HydraError as error:
            log_once(log, error, "cannot read %s: %s", self.path, error)
            raise

    @property
    def real(self) -> str:
        """Where the file stood in the store when it was opened."""
        source = self._source
        return source.path if isinstance(source, PlainFile) else source.diff.path

    @property
    def closed(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closed

    def duplicate(self) -> tuple[Descriptor, bool]:
        """Another descriptor of the file in the store, and whether it is a diff; ``OSError(ESTALE)`` once it is closed.
        By then the number of its own descriptor may be that of any other file."""
        with self._lock:
            if self._closed:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)
            return Descriptor(os.dup(self.fd)), isinstance(self._source, Rehydrated)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Its descriptors stay open in here, whoever closes it; ``OSError(ESTALE)`` where it is closed already."""
        with self._lock:
            if self._closed:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._close_sources()

    @property
    def is_writable(self) -> bool:
        """Whether what it reads is a plain file that it may write to as it stands."""
        source = self._source
        return isinstance(source, PlainFile) and source.is_writable

    def content(self) -> Hashable:
        """What names the bytes that it was opened with, as well as it is known by now."""
        return self._claim.identify()

    def _writable_fd(self, size: int | None = None) -> int | None:
        """A descriptor to write to; ``None`` where it is to be truncated and has that size already."""
        if not self.is_writable:
            if self._on_write is None or self._wants & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
            self._on_write(self, size)
        return self.fd if self.is_writable else None

    def pwrite(self, offset: int, data: memoryview) -> int:
        """Write all of ``data`` at ``offset``; less only where the disk is full, or something fails, midway."""
        fd = self._writable_fd()
        assert fd is not None
        done = with_room(self._make_room, len(data), lambda: os.pwrite(fd, data, offset))
        while done < len(data):
            rest, at = data[done:], offset + done
            try:
                more = with_room(self._make_room, len(rest), lambda: os.pwrite(fd, rest, at))  # noqa: B023
            except OSError:
                break  # what was written is told; who goes on writing gets the error
            if more == 0:
                break
            done += more
        return done

    def truncate(self, size: int) -> None:
        """Make the file ``size`` bytes long."""
        fd = self._writable_fd(size)
        if fd is not None:
            os.ftruncate(fd, size)

    def allocate(self, mode: int, offset: int, nbytes: int) -> None:
        """fallocate(2)."""
        fd = self._writable_fd()
        assert fd is not None

        def allocate() -> None:
            if _libc.fallocate(fd, mode, offset, nbytes) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), self.path)

        with_room(self._make_room, nbytes, allocate)

    def sync(self, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2)."""
        (os.fdatasync if data_only else os.fsync)(self.fd)

    def flush(self) -> None:
        """A descriptor of this open was closed: the kernel's idea of the size is the file's from here on."""
        if self._claim.writes:
            self._names.told(self.path, self._version(self._source))

    def attributes(self) -> Attributes:
        """What ``fstat`` says: of a plain file as it is now, of a model as it was opened, or set since."""
        with self._lock:
            return self._attributes()

    def _attributes(self) -> Attributes:
        source = self._source
        if self._closed:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)
        if isinstance(source, PlainFile):
            return plain_attributes(os.fstat(source.fd))
        then = source.diff.trailer
        with contextlib.suppress(HydraError):
            now = read_trailer(source.diff.fd, source.diff.path)
            if now.sha256 == then.sha256 and (now.mode, now.mtime_ns) != (then.mode, then.mtime_ns):
                return model_attributes(os.fstat(source.diff.fd), now)
        return model_attributes(source.diff.stat, then)

    def become(self, fd: int, real: str) -> None:
        """Go on as the plain file that ``fd`` is open on, which has, or had, the name ``real``: opened for writing
        where this one was. Nothing once it is closed.

        Raises:
            OSError: it cannot be opened, or looked at; then it goes on as it was.
        """
        source = PlainFile(real, reopen(fd, self._wants), self._wants)
        try:
            # All that can fail comes before anything is changed.
            version, identify = self._version(source), self._identity(source)
            with self._lock:
                same = self._closed or os.path.samestat(os.fstat(self.fd), source.stat)
                stays = self._closed or (same and self.is_writable == source.is_writable and self._reader is None)
                if not stays:
                    if source.is_writable:
                        lock_shared(source.fd)
                    self._past.append(self._source)
                    self._source, self._reader = source, None
        except BaseException:
            source.close()
            raise
        if stays:
            source.close()
        else:
            self._names.rebase(self._claim, version, identify, writes=source.is_writable)

    def close(self) -> None:
        """Let go of the file. Also where that fails nothing of it is left: no claim, no descriptor."""
        self._names.release(self._claim)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = not self._users
        try:
            if self._on_close is not None:
                self._on_close(self)
        finally:
            if idle:
                self._close_sources()

    def _close_sources(self) -> None:
        with contextlib.ExitStack() as closing:
            for source in (*self._past, self._source):
                closing.callback(source.close)
