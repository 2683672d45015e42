"""Every call of a process to its filesystem, counted: at one of them it is killed, or the call fails.

To be imported before anything that imports pathlib, which in Python 3.10 keeps the functions that it finds; what is
watched from then on are the calls of Python code (``os``, ``fcntl``, ``mmap``, ``open``, ``sqlite3``), not those of C.

``State.mode``  ``kill`` and ``killed``: SIGKILL before the call, or after it; ``fail``: it raises and is not done;
                ``late``: it is done and raises all the same, as a server's answer that got lost.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import mmap
import os
import signal
import sqlite3
import sys
import threading
from typing import Any

ERRORS = {
    "stat": "EIO EACCES ENOMEM ELOOP ENAMETOOLONG ESTALE EINTR",
    "fstat": "EIO ENOMEM ESTALE EINTR",
    "open": "EIO EACCES EMFILE ENOMEM ELOOP ENAMETOOLONG ESTALE EINTR EAGAIN EPERM EINVAL",
    "create": "EIO EACCES EMFILE ENOMEM ELOOP ENAMETOOLONG ESTALE EINTR ENOSPC EDQUOT EROFS EPERM EINVAL",
    "scandir": "EIO EACCES EMFILE ENOMEM ELOOP ESTALE EINTR",
    "readdir": "EIO ENOMEM ESTALE EINTR",
    "entry": "EIO EACCES ENOMEM ELOOP ESTALE EINTR",
    "read": "EIO ENOMEM ESTALE EINTR EAGAIN EINVAL",
    "write": "EIO ENOSPC EDQUOT EROFS ENOMEM ESTALE EINTR EINVAL",
    "fsync": "EIO ENOSPC EDQUOT EROFS ESTALE EINTR EINVAL",
    "rename": "EIO ENOSPC EDQUOT EROFS EACCES EPERM EXDEV EBUSY ENOMEM ELOOP ENAMETOOLONG ESTALE EINTR EINVAL",
    "link": "EIO ENOSPC EDQUOT EROFS EACCES EPERM EXDEV EMLINK EOPNOTSUPP ENOMEM ELOOP ENAMETOOLONG ESTALE EINTR",
    "unlink": "EIO EROFS EACCES EPERM EBUSY ENOMEM ESTALE EINTR",
    "mkdir": "EIO ENOSPC EDQUOT EROFS EACCES EPERM ENOMEM ENAMETOOLONG ESTALE",
    "truncate": "EIO ENOSPC EDQUOT EROFS EACCES EPERM ESTALE EINTR EINVAL",
    "chmod": "EIO ENOSPC EROFS EACCES EPERM ESTALE EINVAL",
    "utime": "EIO EROFS EACCES EPERM ESTALE EINVAL",
    "setxattr": "EIO ENOSPC EDQUOT EROFS EACCES EPERM EOPNOTSUPP ESTALE",
    "getxattr": "EIO EACCES ENOMEM EOPNOTSUPP ESTALE",
    "flock": "EIO ENOLCK EAGAIN EINTR EINVAL ENOSYS",
    "fcntl": "EIO ENOLCK EAGAIN EACCES EINVAL EINTR",
    "ioctl": "EIO ENOSPC EDQUOT EROFS EXDEV EOPNOTSUPP EINVAL",
    "copy": "EIO ENOSPC EDQUOT EROFS EXDEV EOPNOTSUPP ENOMEM EINTR EINVAL",
    "mmap": "ENOMEM EACCES EAGAIN EINVAL",
    "statvfs": "EIO EACCES ENOMEM ESTALE EINTR",
    "readlink": "EIO EACCES ENOMEM ESTALE",
    "advise": "EIO EINVAL",
    "sqlite": "disk I/O error|database is locked|database or disk is full|attempt to write a readonly database",
}
"""What each kind of call can fail with."""
LATE = {"rename", "link", "unlink", "fsync", "mkdir"}
"""Kinds of call that may be done and be told as failed."""
CHANGES = {"create", "fsync", "link", "rename", "unlink", "mkdir", "chmod", "utime", "setxattr", "copy", "write",
           "truncate"}  # fmt: skip
"""Kinds of call between any two of which a kill leaves another state."""


def errors_of(kind: str) -> list[str]:
    return ERRORS[kind].split("|" if kind == "sqlite" else " ")


class State:
    """Which call is next, and what becomes of which."""

    armed = False
    done = 0
    count = 0
    """The number of the call that something happens to; 0: none."""
    mode = ""
    error = 0
    """Which of the errors of its kind."""
    kinds: frozenset[str] = frozenset(ERRORS)
    seen: list[str] | None = None
    """Gets the kind of each call, where it is a list."""
    hit = ""
    """Which call it was, where in hydrafs, and with which error."""
    told: Any = None
    """A descriptor that ``hit`` is written to as soon as it is known, where there is one."""


_lock = threading.RLock()
_write, _kill = os.write, os.kill


def _where() -> str:
    frame: Any = sys._getframe(3)
    found = []
    while frame is not None and len(found) < 5:
        name = frame.f_code.co_filename
        if "/hydrafs/" in name and not name.endswith("contextlib.py"):
            found.append(f"{name.rpartition('/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def _act(kind: str, about: object, call: Any, args: Any, kwargs: Any) -> Any:
    """Count a call and do it, or what is to be done in its stead."""
    if not State.armed or kind not in State.kinds:
        return call(*args, **kwargs)
    with _lock:
        State.done += 1
        chosen = State.done == State.count
        if State.seen is not None:
            State.seen.append(kind)
    if not chosen:
        return call(*args, **kwargs)
    names = errors_of(kind)
    name = names[State.error % len(names)]
    State.hit = f"{kind}({about!r}) {State.mode} {name if 'kill' not in State.mode else ''} at {_where()}"
    if State.told is not None:
        _write(State.told, State.hit.encode())
    if State.mode == "kill":
        _kill(os.getpid(), signal.SIGKILL)
    if State.mode == "fail":
        raise _error(kind, name, about)
    result = call(*args, **kwargs)
    if State.mode == "killed":
        _kill(os.getpid(), signal.SIGKILL)
    if State.mode == "late":
        raise _error(kind, "EIO", about)
    return result


def _error(kind: str, name: str, about: object) -> Exception:
    if kind == "sqlite":
        return sqlite3.OperationalError(name)
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), about if isinstance(about, str | bytes) else None)


def _about(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _watched(kind: str, call: Any) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not State.armed:
            return call(*args, **kwargs)
        return _act(kind, _about(args[0]) if args else None, call, args, kwargs)

    watched.__name__ = call.__name__
    # What takes descriptors goes on doing so: shutil.rmtree looks.
    for supports in (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks):
        if call in supports:
            supports.add(watched)
    return watched


_KINDS = {
    "stat": "stat", "lstat": "stat", "fstat": "fstat", "listdir": "scandir", "read": "read", "pread": "read",
    "preadv": "read", "readv": "read", "write": "write", "pwrite": "write", "pwritev": "write", "fsync": "fsync",
    "fdatasync": "fsync", "rename": "rename", "replace": "rename", "link": "link", "symlink": "link",
    "unlink": "unlink", "remove": "unlink", "rmdir": "unlink", "mkdir": "mkdir", "mknod": "mkdir",
    "ftruncate": "truncate", "truncate": "truncate", "posix_fallocate": "truncate", "fchmod": "chmod",
    "chmod": "chmod", "fchown": "chmod", "chown": "chmod", "lchown": "chmod", "utime": "utime",
    "setxattr": "setxattr", "removexattr": "setxattr", "getxattr": "getxattr", "listxattr": "getxattr",
    "copy_file_range": "copy", "sendfile": "copy", "statvfs": "statvfs", "fstatvfs": "statvfs",
    "readlink": "readlink", "posix_fadvise": "advise",
}  # fmt: skip


class _Entry:
    """An ``os.DirEntry`` whose questions may fail."""

    def __init__(self, entry: os.DirEntry[Any]) -> None:
        self._entry, self.name, self.path = entry, entry.name, entry.path

    def __fspath__(self) -> Any:
        return self.path

    def inode(self) -> int:
        return self._entry.inode()

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return bool(_act("entry", self.path, self._entry.is_dir, (), {"follow_symlinks": follow_symlinks}))

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return bool(_act("entry", self.path, self._entry.is_file, (), {"follow_symlinks": follow_symlinks}))

    def is_symlink(self) -> bool:
        return bool(_act("entry", self.path, self._entry.is_symlink, (), {}))

    def is_junction(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        return _act("entry", self.path, self._entry.stat, (), {"follow_symlinks": follow_symlinks})

    def __repr__(self) -> str:
        return f"<watched entry {self.name!r}>"


class _Entries:
    """What ``os.scandir`` returns: going on may fail at each entry."""

    def __init__(self, entries: Any, about: object) -> None:
        self._entries, self._about = entries, about

    def __iter__(self) -> _Entries:
        return self

    def __next__(self) -> _Entry:
        return _Entry(_act("readdir", self._about, self._entries.__next__, (), {}))

    def close(self) -> None:
        self._entries.close()

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _File(io.FileIO):
    """A file whose reads and writes may fail, those of the buffers above it too."""

    def readinto(self, buffer: Any) -> Any:
        return _act("read", self.name, super().readinto, (buffer,), {})

    def read(self, size: Any = -1) -> Any:
        return _act("read", self.name, super().read, (size,), {})

    def readall(self) -> Any:
        return _act("read", self.name, super().readall, (), {})

    def write(self, data: Any) -> Any:
        return _act("write", self.name, super().write, (data,), {})

    def truncate(self, size: Any = None) -> Any:
        return _act("truncate", self.name, super().truncate, (size,), {})


_open, _os_open, _scandir, _connect, _mmap = builtins.open, os.open, os.scandir, sqlite3.connect, mmap.mmap


def _open_file(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    if not State.armed:
        return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    plain = mode.replace("b", "").replace("t", "")
    if isinstance(file, int):
        raw = _File(file, plain, closefd, opener)
    else:
        kind = "open" if plain == "r" else "create"
        raw = _act(kind, _about(file), _File, (file, plain, closefd, opener), {})
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    if "+" in plain:
        buffered: Any = io.BufferedRandom(raw, size)
    elif "r" in plain:
        buffered = io.BufferedReader(raw, size)
    else:
        buffered = io.BufferedWriter(raw, size)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _Connection(sqlite3.Connection):
    """A database that may not answer."""

    def execute(self, *args: Any) -> Any:
        return _act("sqlite", str(args[0])[:40], super().execute, args, {})

    def executemany(self, *args: Any) -> Any:
        return _act("sqlite", str(args[0])[:40], super().executemany, args, {})

    def executescript(self, *args: Any) -> Any:
        return _act("sqlite", str(args[0])[:40], super().executescript, args, {})


class _Map(_mmap):  # type: ignore[misc,valid-type]
    """Memory that may not be had."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _act("mmap", args[0] if args else None, super().__new__, (cls, *args), kwargs)


def _watched_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
    return _act("create" if flags & os.O_CREAT else "open", _about(path), _os_open, (path, flags, *args), kwargs)


def _watched_scandir(path: Any = ".") -> Any:
    if not State.armed:
        return _scandir(path)
    return _Entries(_act("scandir", _about(path), _scandir, (path,), {}), _about(path))


def _watched_connect(*args: Any, **kwargs: Any) -> Any:
    if args[0] == ":memory:":
        return _connect(*args, **kwargs)
    return _act("sqlite", "connect", _connect, args, {"factory": _Connection, **kwargs})


def watch() -> None:
    """From now on."""
    for name, kind in _KINDS.items():
        setattr(os, name, _watched(kind, getattr(os, name)))
    for name, kind in {"flock": "flock", "lockf": "flock", "fcntl": "fcntl", "ioctl": "ioctl"}.items():
        setattr(fcntl, name, _watched(kind, getattr(fcntl, name)))
    for supports in (os.supports_fd, os.supports_dir_fd):
        supports |= {new for old, new in {_os_open: _watched_open, _scandir: _watched_scandir}.items()
                     if old in supports}  # fmt: skip
    os.open, os.scandir, sqlite3.connect = _watched_open, _watched_scandir, _watched_connect
    builtins.open, io.open, mmap.mmap = _open_file, _open_file, _Map  # type: ignore[misc]
