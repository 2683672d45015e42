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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from hydrafs.attributes import Attributes, Entry
from hydrafs.callbacks import decode, encode, errno_of, failed, guarded, memory
from hydrafs.fusewriting import READ_ONLY, WritableTree, WritingCallbacks
from hydrafs.libfuse import (
    BINDINGS,
    MAX_BACKGROUND,
    READAHEAD_NBYTES,
    Binding,
    has_coherent_direct_writes,
    load_binding,
)

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


_FILL_DIR_PLUS = 1 << 1  # enum fuse_fill_dir_flags, libfuse 3 fuse.h
_READDIR_PLUS = 1 << 0  # enum fuse_readdir_flags, libfuse 3 fuse.h
_PYBUF_WRITE = 0x200
# libfuse's FUSE_UNKNOWN_INO. Not 0: glibc leaves such a name out of a listing.
_UNKNOWN_INO = 0xFFFFFFFF


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
        self._read_only = getattr(tree, "read_only", True)
        self._direct_writes = binding.major >= 3 and has_coherent_direct_writes(os.uname().release)
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
        if self._read_only:
            callbacks.update(dict.fromkeys(READ_ONLY, _refuse))
        else:
            callbacks.update(WritingCallbacks(cast(WritableTree, self._tree), self._binding, self).table())
        for name, function in callbacks.items():
            if name in types:
                setattr(table, name, types[name](guarded(name, function)))
        table.init = types["init"](self._init)
        table.destroy = types["destroy"](self._destroy)
        # An open file or directory is known by its handle: libfuse need not build, nor lock, its path.
        if "flag_nullpath_ok" in types:
            table.flag_nullpath_ok = table.flag_nopath = table.flag_utime_omit_ok = 1
        return table

    def _init(self, connection: Any, config: Any = None) -> None:
        try:
            if self._binding.major >= 3:
                conn, cfg = connection.contents, config.contents
                conn.max_read = conn.max_write = self._binding.max_read_nbytes
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
            failed("destroy", b"/", error)

    def _getattr(self, path: bytes | None, out: Any, info: Any = None) -> int:
        handle = self._handles.get(info.contents.fh) if info else None
        if handle is not None:
            fill(out.contents, handle.attributes())
        elif path is not None:
            fill(out.contents, self._tree.getattr(decode(path)))
        else:
            return -errno.EBADF
        return 0

    def _readlink(self, path: bytes, out: Any, nbytes: int) -> int:
        target = encode(self._tree.readlink(decode(path)))[: nbytes - 1] + b"\0"
        ctypes.memmove(out, target, len(target))
        return 0

    def _access(self, path: bytes, mode: int) -> int:
        if mode & os.W_OK and self._read_only:
            return -errno.EROFS
        found = self._tree.getattr(decode(path)).mode
        # The kernel asks this only where it leaves permissions to us: nobody but who mounted, and root, gets here.
        if mode & os.W_OK and os.geteuid() != 0 and not found & 0o222:
            return -errno.EACCES
        return -errno.EACCES if mode & os.X_OK and not stat.S_ISDIR(found) and not found & 0o111 else 0

    def _open(self, path: bytes, info: Any) -> int:
        return self.give(self._tree.open(decode(path), info.contents.flags), info.contents)

    def give(self, handle: Handle, opened: Any) -> int:
        """Tell the kernel, through a ``fuse_file_info``, of a file that was opened."""
        number = next(self._numbers)
        self._handles[number] = handle
        try:
            opened.keep_cache = 1 if handle.keep_cache else 0
            opened.fh = number
            if self._direct_writes and opened.flags & os.O_ACCMODE == os.O_WRONLY:
                # The kernel copies nothing into its own pages then, and does not ask for security.capability before
                # each write. It does not take set-user-ID away either: such a file is written to as ever.
                opened.direct_io = 0 if handle.attributes().mode & (stat.S_ISUID | stat.S_ISGID) else 1
        except BaseException:
            self._close(number)
            raise
        return 0

    def handle(self, info: Any) -> Handle:
        """The open file that a ``fuse_file_info`` means.

        Raises:
            OSError: EBADF where there is none.
        """
        handle = self._handles.get(info.contents.fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def _read(self, path: bytes | None, out: Any, nbytes: int, offset: int, info: Any) -> int:
        handle = self._handles.get(info.contents.fh)
        if handle is None:
            return -errno.EBADF
        view: memoryview = memory(ctypes.addressof(out.contents), nbytes, _PYBUF_WRITE)
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
                failed("release", None, error)

    def _opendir(self, path: bytes, info: Any) -> int:
        number = next(self._numbers)
        self._directories[number] = _Directory(decode(path), [])
        info.contents.fh = number
        return 0

    def directory(self, info: Any) -> str:
        """The path of the open folder that a ``fuse_file_info`` means; ``OSError(EBADF)`` where there is none."""
        directory = self._directories.get(info.contents.fh)
        if directory is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return directory.path

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
            plus = 0
            if flags & _READDIR_PLUS and index >= 2:
                # The kernel is about to stat them one by one: this saves it a round trip for each.
                try:
                    fill(result, self._tree.getattr(prefix + entry.name))
                    plus = _FILL_DIR_PLUS
                except Exception:  # it stays listed; who asks for it by name gets the error
                    pass
            if not plus:
                result.st_mode = entry.mode
                result.st_ino = entry.ino or _UNKNOWN_INO
            name = encode(entry.name)
            full = add(out, name, result, index + 1, plus) if with_flags else add(out, name, result, index + 1)
            if full:
                break
        return 0

    def _releasedir(self, path: bytes | None, info: Any) -> int:
        self._directories.pop(info.contents.fh, None)
        return 0

    def _statfs(self, path: bytes, out: Any) -> int:
        found, result = self._tree.statfs(decode(path)), out.contents
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(result, name, getattr(found, name))
        result.f_namemax = found.f_namemax
        return 0

    def _getxattr(self, path: bytes, name: bytes, out: Any, nbytes: int) -> int:
        # ls -l asks two of these of every file: labels and access lists, which no file of a tree has.
        if name.startswith((b"system.", b"security.")):
            return -errno.ENODATA
        return _give(self._tree.getxattr(decode(path), decode(name)), out, nbytes)

    def _listxattr(self, path: bytes, out: Any, nbytes: int) -> int:
        names = self._tree.listxattr(decode(path))
        return _give(b"".join(encode(name) + b"\0" for name in names), out, nbytes)


def _refuse(*arguments: object) -> int:
    return -errno.EROFS


def fill(result: Any, attributes: Attributes) -> None:
    """Write ``attributes`` into a ``struct stat``."""
    result.st_mode = attributes.mode
    result.st_nlink = attributes.nlink
    result.st_uid = attributes.uid
    result.st_gid = attributes.gid
    result.st_size = attributes.size
    result.st_ino = attributes.ino
    result.st_blocks = attributes.blocks
    result.st_rdev = attributes.rdev
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
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*map(encode, arguments), None)
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    )
    main = prototype(("fuse_main_real", binding.module._libfuse))
    code: int = main(len(arguments), argv, ctypes.byref(table), ctypes.sizeof(table), None)
    if adapter.failure is not None:
        raise adapter.failure
    return code
