"""The callbacks of a mount that can be written to; ``hydrafs.fuse`` has the others, and the rules."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any, Protocol

from hydrafs.callbacks import decode, memory
from hydrafs.libfuse import Binding

__all__ = ["READ_ONLY", "WritableHandle", "WritableTree", "WritingCallbacks"]

READ_ONLY = (
    "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "chmod", "chown", "truncate", "ftruncate",
    "write", "setxattr", "removexattr", "create", "utimens", "fallocate",
)  # fmt: skip
"""What is refused where nothing can be written."""
_PYBUF_READ = 0x100
_UNCHANGED = 0xFFFFFFFF
_NOW = (1 << 30) - 1

Owner = tuple[int, int]


class WritableHandle(Protocol):
    """An open file that can be written to, besides what ``hydrafs.fuse.Handle`` says."""

    keep_cache: bool

    def pwrite(self, offset: int, data: memoryview) -> int:
        """Write ``data`` at ``offset``; how much was written, less only where the next write would fail."""
        ...

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        ...

    def allocate(self, mode: int, offset: int, nbytes: int) -> None:
        """fallocate(2)."""
        ...

    def sync(self, *, data_only: bool) -> None:
        """fsync(2), fdatasync(2)."""
        ...

    def flush(self) -> None:
        """A descriptor was closed."""
        ...


class WritableTree(Protocol):
    """A tree that can be written to, besides what ``hydrafs.fuse.Tree`` says. Each method does what the system call of
    its name does; ``owner`` is who asked, as user and group."""

    def create(self, path: str, flags: int, mode: int, owner: Owner | None) -> Any:
        """open(2) with O_CREAT; a handle, as from ``open``."""
        ...

    def mknod(self, path: str, mode: int, owner: Owner | None) -> None:
        """mknod(2)."""
        ...

    def mkdir(self, path: str, mode: int, owner: Owner | None) -> None:
        """mkdir(2)."""
        ...

    def symlink(self, target: str, path: str, owner: Owner | None) -> None:
        """symlink(2)."""
        ...

    def link(self, old: str, new: str) -> None:
        """link(2)."""
        ...

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        ...

    def rmdir(self, path: str) -> None:
        """rmdir(2)."""
        ...

    def rename(self, old: str, new: str, flags: int) -> None:
        """renameat2(2)."""
        ...

    def truncate(self, path: str, size: int) -> None:
        """truncate(2)."""
        ...

    def chmod(self, path: str, mode: int) -> None:
        """chmod(2)."""
        ...

    def chown(self, path: str, uid: int, gid: int) -> None:
        """lchown(2); -1 leaves one as it is."""
        ...

    def utimens(self, path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """utimensat(2)."""
        ...

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        """lsetxattr(2)."""
        ...

    def removexattr(self, path: str, name: str) -> None:
        """lremovexattr(2)."""
        ...

    def sync_folder(self, path: str) -> None:
        """fsync(2) of a folder."""
        ...


class _Files(Protocol):
    """What the adapter knows of open files."""

    def give(self, handle: Any, opened: Any) -> int: ...

    def handle(self, info: Any) -> Any: ...

    def directory(self, info: Any) -> str: ...


class WritingCallbacks:
    """The callbacks. ``path`` is None where libfuse knows an open file only. Thread safety: all of it."""

    def __init__(self, tree: WritableTree, binding: Binding, files: _Files) -> None:
        self._tree = tree
        self._files = files
        self._major = binding.major
        self._context = binding.module._libfuse.fuse_get_context
        called_by = getattr(tree, "called_by", None)
        if called_by is not None:
            called_by(lambda: int(self._context().contents.pid))

    def table(self) -> dict[str, Callable[..., int]]:
        """The callbacks by the names that ``fuse_operations`` has for them."""
        return {
            "mknod": self._mknod, "mkdir": self._mkdir, "unlink": self._unlink, "rmdir": self._rmdir,
            "symlink": self._symlink, "rename": self._rename, "link": self._link, "chmod": self._chmod,
            "chown": self._chown, "truncate": self._truncate, "ftruncate": self._truncate, "write": self._write,
            "setxattr": self._setxattr, "removexattr": self._removexattr, "create": self._create,
            "utimens": self._utimens, "fallocate": self._fallocate, "fsync": self._fsync, "flush": self._flush,
            "fsyncdir": self._fsyncdir,
        }  # fmt: skip

    def _owner(self) -> Owner:
        context = self._context().contents
        return context.uid, context.gid

    def _mknod(self, path: bytes, mode: int, device: int) -> int:
        self._tree.mknod(decode(path), mode, self._owner())
        return 0

    def _mkdir(self, path: bytes, mode: int) -> int:
        self._tree.mkdir(decode(path), mode, self._owner())
        return 0

    def _unlink(self, path: bytes) -> int:
        self._tree.unlink(decode(path))
        return 0

    def _rmdir(self, path: bytes) -> int:
        self._tree.rmdir(decode(path))
        return 0

    def _symlink(self, target: bytes, path: bytes) -> int:
        self._tree.symlink(decode(target), decode(path), self._owner())
        return 0

    def _rename(self, old: bytes, new: bytes, flags: int = 0) -> int:
        self._tree.rename(decode(old), decode(new), flags)
        return 0

    def _link(self, old: bytes, new: bytes) -> int:
        self._tree.link(decode(old), decode(new))
        return 0

    def _chmod(self, path: bytes | None, mode: int, info: Any = None) -> int:
        self._tree.chmod(self._name(path, info), mode)
        return 0

    def _chown(self, path: bytes | None, uid: int, gid: int, info: Any = None) -> int:
        uid, gid = (-1 if number == _UNCHANGED else number for number in (uid, gid))
        self._tree.chown(self._name(path, info), uid, gid)
        return 0

    def _utimens(self, path: bytes | None, times: Any, info: Any = None) -> int:
        if times:
            pair = times.contents
            atime = pair.actime.tv_sec, pair.actime.tv_nsec
            mtime = pair.modtime.tv_sec, pair.modtime.tv_nsec
        else:
            atime = mtime = (0, _NOW)
        self._tree.utimens(self._name(path, info), atime, mtime)
        return 0

    def _name(self, path: bytes | None, info: Any) -> str:
        if path is not None:
            return decode(path)
        found: str = self._files.handle(info).path
        return found

    def _truncate(self, path: bytes | None, size: int, info: Any = None) -> int:
        if info:
            self._files.handle(info).truncate(size)
        else:
            assert path is not None
            self._tree.truncate(decode(path), size)
        return 0

    def _create(self, path: bytes, mode: int, info: Any) -> int:
        opened = info.contents
        return self._files.give(self._tree.create(decode(path), opened.flags, mode, self._owner()), opened)

    def _write(self, path: bytes | None, data: Any, nbytes: int, offset: int, info: Any) -> int:
        handle = self._files.handle(info)
        view: memoryview = memory(ctypes.addressof(data.contents), nbytes, _PYBUF_READ)
        written: int = handle.pwrite(offset, view)
        view.release()
        return written

    def _fallocate(self, path: bytes | None, mode: int, offset: int, nbytes: int, info: Any) -> int:
        self._files.handle(info).allocate(mode, offset, nbytes)
        return 0

    def _fsync(self, path: bytes | None, data_only: int, info: Any) -> int:
        self._files.handle(info).sync(data_only=bool(data_only))
        return 0

    def _flush(self, path: bytes | None, info: Any) -> int:
        self._files.handle(info).flush()
        return 0

    def _fsyncdir(self, path: bytes | None, data_only: int, info: Any) -> int:
        self._tree.sync_folder(self._files.directory(info))
        return 0

    def _setxattr(self, path: bytes, name: bytes, value: Any, nbytes: int, flags: int) -> int:
        # Labels, access lists and capabilities are not kept: the mount is nosuid, and modes say who may what.
        if name.startswith((b"system.", b"security.")):
            return -errno.ENOTSUP
        self._tree.setxattr(decode(path), decode(name), ctypes.string_at(value, nbytes) if nbytes else b"", flags)
        return 0

    def _removexattr(self, path: bytes, name: bytes) -> int:
        if name.startswith((b"system.", b"security.")):
            return -errno.ENODATA
        self._tree.removexattr(decode(path), decode(name))
        return 0
