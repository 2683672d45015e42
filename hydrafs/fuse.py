"""The thin adapter between libfuse and a ``Tree``: one errno table, and the one place that knows the binding.

Goal: every callback gives the kernel a definite answer, and a read is written straight into the request's own buffer.
Rule 1: nothing that a tree raises, of whatever kind, leaves a callback: ctypes would hand the kernel garbage instead.
Rule 2: a file descriptor of the mount is one ``Handle``, closed exactly once.
Rule 3: nothing here holds a lock while the tree works: callbacks arrive on libfuse's own threads, many at a time.

The callbacks are ours and not the binding's: both bindings' own wrappers end the mount on an exception that they do not
know, or return garbage, and copy every read twice.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import operator
import os
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

from hydrafs.attributes import Attributes, Entry
from hydrafs.errors import HydraError, log_once
from hydrafs.libfuse import BINDINGS, MAX_BACKGROUND, READAHEAD_NBYTES, Binding, load_binding

__all__ = ["BINDINGS", "Attributes", "Binding", "Entry", "Handle", "Tree", "errno_of", "load_binding", "serve"]

log = logging.getLogger("hydrafs.fuse")


class Handle(Protocol):
    """An open file of a tree. Thread safety: any number of ``pread_into`` and ``attributes`` at a time."""

    keep_cache: bool
    """Whether the pages that the kernel still has under this name are this very content."""

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; the number of bytes written, less than asked only at the end of the file."""
        ...

    def attributes(self) -> Attributes:
        """What fstat(2) says."""
        ...

    def close(self) -> None:
        """Called once, when the last descriptor of this open is gone."""
        ...


class Tree(Protocol):
    """The tree that a mount shows. Paths are absolute inside the mount; names are as ``os.fsdecode`` gives them.

    Every method may raise ``OSError`` with an errno, or ``HydraError``; all else is a bug and answers EIO.
    Thread safety: all methods but ``start`` and ``stop`` are called from many threads at a time.
    """

    def getattr(self, path: str) -> Attributes:
        """What lstat(2) says."""
        ...

    def readdir(self, path: str) -> list[Entry]:
        """The names of a directory, without ``.`` and ``..``."""
        ...

    def readlink(self, path: str) -> str:
        """Where a symlink points."""
        ...

    def open(self, path: str, flags: int) -> Handle:
        """Serve or refuse: nothing that can be known here is left to a read."""
        ...

    def getxattr(self, path: str, name: str) -> bytes:
        """The value; ``OSError(ENODATA)`` where there is none."""
        ...

    def listxattr(self, path: str) -> list[str]:
        """The names that ``getxattr`` answers."""
        ...

    def statfs(self, path: str) -> os.statvfs_result:
        """Size and free space of the disk behind."""
        ...

    def start(self) -> None:
        """Called in the process that serves, once the kernel is connected: start threads here and not before."""
        ...

    def stop(self) -> None:
        """Called when no more request can come."""
        ...


# An OSError with one of these is an answer; any other is worth a line in the log.
_ANSWERS = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENODATA, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL,
        errno.ENOTSUP, errno.ERANGE, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.ESTALE,
    }
)  # fmt: skip


def errno_of(error: BaseException) -> int:
    """The positive errno that ``error`` is told to the kernel as: its own where it has one, otherwise EIO."""
    number = error.errno if isinstance(error, (OSError, HydraError)) else None
    # The kernel takes errnos below 512 from a filesystem; ENOSYS would make it stop asking, for the mount's whole life.
    return number if isinstance(number, int) and 0 < number < 512 and number != errno.ENOSYS else errno.EIO


def _failed(operation: str, path: object, error: BaseException) -> int:
    """Log ``error`` as it deserves, and give the negative errno that the callback returns."""
    number = errno.EIO
    try:
        number = errno_of(error)
        where = _decode(path) if isinstance(path, bytes) else "an open file"
        if isinstance(error, HydraError):
            log_once(log, error, "%s %r: %s", operation, where, error)
        elif isinstance(error, OSError) and error.errno == number:
            if number in _ANSWERS:
                log.debug("%s %r: %s", operation, where, error)
            else:
                log_once(log, error, "%s %r: %s", operation, where, error)
        else:
            log.error("%s %r: unexpected %s", operation, where, type(error).__name__, exc_info=error)
    except BaseException:  # the log itself is broken: an answer still has to be given
        pass
    return -number


_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


def _decode(name: bytes) -> str:
    return name.decode(_ENCODING, _ERRORS)


def _encode(name: str) -> bytes:
    return name.encode(_ENCODING, _ERRORS)


_READ_ONLY = (
    "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "chmod", "chown", "truncate", "ftruncate",
    "write", "setxattr", "removexattr", "create", "utimens", "fallocate",
)  # fmt: skip
_FILL_DIR_PLUS = 1 << 1  # enum fuse_fill_dir_flags, libfuse 3 fuse.h
_READDIR_PLUS = 1 << 0  # enum fuse_readdir_flags, libfuse 3 fuse.h
_PYBUF_WRITE = 0x200
# libfuse's FUSE_UNKNOWN_INO. Not 0: glibc leaves such a name out of a listing.
_UNKNOWN_INO = 0xFFFFFFFF

_memory: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype = ctypes.py_object
_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


@dataclass(slots=True)
class _Directory:
    """An open directory: the listing as it was when reading it began, so that an offset keeps its meaning."""

    path: str
    entries: list[Entry]


class _Adapter:
    """The callbacks of one mount. Thread safety: all of it; tables change by single dict operations only."""

    def __init__(self, tree: Tree, binding: Binding, on_init: Callable[[], None]) -> None:
        self._tree = tree
        self._binding = binding
        self._on_init = on_init
        self._stat: Any = binding.module.c_stat
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, _Directory] = {}
        self.failure: BaseException | None = None

    def operations(self) -> Any:
        """The table of callbacks, as libfuse wants it. Whatever is not in it is answered by libfuse or the kernel."""
        table = self._binding.module.fuse_operations()
        types = {field[0]: field[1] for field in table._fields_}
        callbacks: dict[str, Callable[..., Any]] = {
            "getattr": self._getattr, "fgetattr": self._getattr, "readlink": self._readlink, "open": self._open,
            "read": self._read, "release": self._release, "opendir": self._opendir, "readdir": self._readdir,
            "releasedir": self._releasedir, "statfs": self._statfs, "getxattr": self._getxattr,
            "listxattr": self._listxattr, "access": self._access,
        }  # fmt: skip
        callbacks.update(dict.fromkeys(_READ_ONLY, _refuse))
        for name, function in callbacks.items():
            if name in types:
                setattr(table, name, types[name](_guarded(name, function)))
        table.init = types["init"](self._init)
        table.destroy = types["destroy"](self._destroy)
        # An open file or directory is known by its handle: libfuse need not build, nor lock, its path.
        if "flag_nullpath_ok" in types:
            table.flag_nullpath_ok = table.flag_nopath = 1
        return table

    def _init(self, connection: Any, config: Any = None) -> None:
        try:
            if self._binding.major >= 3:
                conn, cfg = connection.contents, config.contents
                conn.max_read = self._binding.max_read_nbytes
                conn.max_readahead = READAHEAD_NBYTES
                conn.max_background = MAX_BACKGROUND
                conn.congestion_threshold = MAX_BACKGROUND * 3 // 4
                cfg.use_ino = cfg.readdir_ino = cfg.nullpath_ok = 1
            self._tree.start()
            self._on_init()
        except BaseException as error:  # told to whoever called serve()
            self.failure = error
            os.kill(os.getpid(), signal.SIGTERM)

    def _destroy(self, private_data: object) -> None:
        # A mount that ends by a signal leaves files open that the kernel will not release any more.
        for number in list(self._handles):
            self._close(number)
        try:
            self._tree.stop()
        except BaseException as error:
            _failed("destroy", b"/", error)

    def _getattr(self, path: bytes | None, out: Any, info: Any = None) -> int:
        handle = self._handles.get(info.contents.fh) if info else None
        if handle is not None:
            _fill(out.contents, handle.attributes())
        elif path is not None:
            _fill(out.contents, self._tree.getattr(path.decode(_ENCODING, _ERRORS)))
        else:
            return -errno.EBADF
        return 0

    def _readlink(self, path: bytes, out: Any, nbytes: int) -> int:
        target = _encode(self._tree.readlink(_decode(path)))[: nbytes - 1] + b"\0"
        ctypes.memmove(out, target, len(target))
        return 0

    def _access(self, path: bytes, mode: int) -> int:
        if mode & os.W_OK:
            return -errno.EROFS
        found = self._tree.getattr(_decode(path)).mode
        return -errno.EACCES if mode & os.X_OK and not stat.S_ISDIR(found) and not found & 0o111 else 0

    def _open(self, path: bytes, info: Any) -> int:
        opened = info.contents
        handle = self._tree.open(_decode(path), opened.flags)
        number = next(self._numbers)
        self._handles[number] = handle
        try:
            opened.keep_cache = 1 if handle.keep_cache else 0
            opened.fh = number
        except BaseException:
            self._close(number)
            raise
        return 0

    def _read(self, path: bytes | None, out: Any, nbytes: int, offset: int, info: Any) -> int:
        handle = self._handles.get(info.contents.fh)
        if handle is None:
            return -errno.EBADF
        view: memoryview = _memory(ctypes.addressof(out.contents), nbytes, _PYBUF_WRITE)
        done = operator.index(handle.pread_into(offset, view))
        # The kernel takes a short answer for the end of the file and fills up with zeros.
        while 0 < done < nbytes:
            more = operator.index(handle.pread_into(offset + done, view[done:]))
            if not 0 <= more <= nbytes - done:
                raise ValueError(f"a read of {nbytes - done} bytes returned {more}")
            if more == 0:
                break
            done += more
        if not 0 <= done <= nbytes:
            raise ValueError(f"a read of {nbytes} bytes returned {done}")
        try:
            view.release()
        except BufferError:
            log.error("%s keeps the buffer of a read, which is freed now", type(handle).__name__)
        return done

    def _release(self, path: bytes | None, info: Any) -> int:
        self._close(info.contents.fh)
        return 0

    def _close(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            try:
                handle.close()
            except BaseException as error:  # nobody is left who could take an error
                _failed("release", None, error)

    def _opendir(self, path: bytes, info: Any) -> int:
        number = next(self._numbers)
        self._directories[number] = _Directory(_decode(path), [])
        info.contents.fh = number
        return 0

    def _readdir(self, path: bytes | None, out: Any, add: Any, offset: int, info: Any, flags: int = 0) -> int:
        directory = self._directories.get(info.contents.fh)
        if directory is None:
            return -errno.EBADF
        if offset == 0:
            # Fresh at rewinddir(3) too, as POSIX has it.
            directory.entries = [
                Entry(".", stat.S_IFDIR, _UNKNOWN_INO),
                Entry("..", stat.S_IFDIR, _UNKNOWN_INO),
                *self._tree.readdir(directory.path),
            ]
        result = self._stat()
        with_flags = self._binding.major >= 3
        prefix = directory.path.rstrip("/") + "/"
        for index in range(offset, len(directory.entries)):
            entry = directory.entries[index]
            fill = 0
            if flags & _READDIR_PLUS and index >= 2:
                # The kernel is about to stat them one by one: this saves it a round trip for each.
                try:
                    _fill(result, self._tree.getattr(prefix + entry.name))
                    fill = _FILL_DIR_PLUS
                except Exception:  # it stays listed; who asks for it by name gets the error
                    pass
            if not fill:
                result.st_mode = entry.mode
                result.st_ino = entry.ino or _UNKNOWN_INO
            name = entry.name.encode(_ENCODING, _ERRORS)
            full = add(out, name, result, index + 1, fill) if with_flags else add(out, name, result, index + 1)
            if full:
                break
        return 0

    def _releasedir(self, path: bytes | None, info: Any) -> int:
        self._directories.pop(info.contents.fh, None)
        return 0

    def _statfs(self, path: bytes, out: Any) -> int:
        found, result = self._tree.statfs(_decode(path)), out.contents
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(result, name, getattr(found, name))
        result.f_namemax = found.f_namemax
        return 0

    def _getxattr(self, path: bytes, name: bytes, out: Any, nbytes: int) -> int:
        # ls -l asks two of these of every file: labels and access lists, which no file of a tree has.
        if name.startswith((b"system.", b"security.")):
            return -errno.ENODATA
        return _give(self._tree.getxattr(_decode(path), _decode(name)), out, nbytes)

    def _listxattr(self, path: bytes, out: Any, nbytes: int) -> int:
        names = self._tree.listxattr(_decode(path))
        return _give(b"".join(_encode(name) + b"\0" for name in names), out, nbytes)


# Python makes and drops its state of a foreign thread around every callback, which costs more than most callbacks do.
# One reference more keeps it for the thread's life; libfuse is told to keep its threads.
_kept_threads: set[int] = set()


def _keep_thread() -> None:
    ctypes.pythonapi.PyGILState_Ensure()
    _kept_threads.add(get_ident())


def _guarded(name: str, function: Callable[..., int]) -> Callable[..., int]:
    """``function``, with everything that it may raise turned into a negative errno."""

    def callback(*arguments: Any) -> int:
        if get_ident() not in _kept_threads:
            _keep_thread()
        try:
            return function(*arguments)
        except BaseException as error:  # rule 1
            return _failed(name, arguments[0], error)

    return callback


def _refuse(*arguments: object) -> int:
    return -errno.EROFS


def _fill(result: Any, attributes: Attributes) -> None:
    """Write ``attributes`` into a ``struct stat``."""
    result.st_mode = attributes.mode
    result.st_nlink = attributes.nlink
    result.st_uid = attributes.uid
    result.st_gid = attributes.gid
    result.st_size = attributes.size
    result.st_ino = attributes.ino
    result.st_blocks = attributes.blocks
    time = result.st_atimespec
    time.tv_sec, time.tv_nsec = divmod(attributes.atime_ns, 1_000_000_000)
    time = result.st_mtimespec
    time.tv_sec, time.tv_nsec = divmod(attributes.mtime_ns, 1_000_000_000)
    time = result.st_ctimespec
    time.tv_sec, time.tv_nsec = divmod(attributes.ctime_ns, 1_000_000_000)


def _give(value: bytes, out: Any, nbytes: int) -> int:
    """Answer a getxattr(2): the length alone when none of it is asked for, never a part of the value."""
    if nbytes == 0:
        return len(value)
    if len(value) > nbytes:
        return -errno.ERANGE
    ctypes.memmove(out, value, len(value))
    return len(value)


def serve(tree: Tree, mountpoint: str, options: Sequence[str], binding: Binding, on_init: Callable[[], None]) -> int:
    """Mount ``tree`` and answer for it until it is unmounted or the process gets SIGTERM, SIGINT or SIGHUP.

    Runs in the main thread, whose handlers for these signals must be the default ones: libfuse replaces no other.

    Args:
        tree: what is shown. ``start`` and ``stop`` are called from here.
        mountpoint: an absolute path.
        options: for ``-o``; those that the binding needs are added.
        binding: from ``load_binding``.
        on_init: called when the kernel is connected and the tree has started, before the first request is answered.

    Returns:
        What ``fuse_main`` says: 0, or the step that failed (libfuse's ``fuse.h`` has the list); 7 and 8 come after the
        mount has been served, also when a signal ended it.

    Raises:
        BaseException: whatever ``tree.start`` or ``on_init`` raised; the mount is gone again.
    """
    adapter = _Adapter(tree, binding, on_init)
    table = adapter.operations()
    arguments = ["hydrafs", "-f", "-o", ",".join([*options, *binding.options()]), mountpoint]
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*map(_encode, arguments), None)
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    )
    main = prototype(("fuse_main_real", binding.module._libfuse))
    code: int = main(len(arguments), argv, ctypes.byref(table), ctypes.sizeof(table), None)
    if adapter.failure is not None:
        raise adapter.failure
    return code
