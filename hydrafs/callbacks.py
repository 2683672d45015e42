"""What every callback of libfuse needs: a definite answer to whatever happens, and names as bytes and as text."""

from __future__ import annotations

import ctypes
import errno
import logging
import sys
from collections.abc import Callable
from threading import get_ident
from typing import Any

from hydrafs.errors import HydraError, log_once

__all__ = ["decode", "encode", "errno_of", "failed", "guarded", "memory"]

log = logging.getLogger("hydrafs.fuse")

memory: Any = ctypes.pythonapi.PyMemoryView_FromMemory
memory.restype = ctypes.py_object
memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


# An OSError with one of these is an answer; any other is worth a line in the log.
_ANSWERS = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENODATA, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL,
        errno.ENOTSUP, errno.ERANGE, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.ESTALE, errno.EEXIST,
        errno.ENOTEMPTY, errno.EXDEV, errno.EBADF, errno.EMLINK, errno.EFBIG, errno.ETXTBSY, errno.ENXIO,
    }
)  # fmt: skip


def errno_of(error: BaseException) -> int:
    """The positive errno that ``error`` is told to the kernel as: its own where it has one, otherwise EIO."""
    number = error.errno if isinstance(error, (OSError, HydraError)) else None
    if number in (errno.ENOTCONN, errno.ECONNABORTED):
        return errno.EIO  # of a filesystem below: to who asks our mount, it would mean that we are dead
    # The kernel takes errnos below 512 from a filesystem; ENOSYS would make it stop asking, for the mount's whole life.
    return number if isinstance(number, int) and 0 < number < 512 and number != errno.ENOSYS else errno.EIO


def failed(operation: str, path: object, error: BaseException) -> int:
    """Log ``error`` as it deserves, and give the negative errno that the callback returns."""
    number = errno.EIO
    try:
        number = errno_of(error)
        where = decode(path) if isinstance(path, bytes) else "an open file"
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


def decode(name: bytes) -> str:
    """A name as text, as ``os.fsdecode`` has it."""
    return name.decode(_ENCODING, _ERRORS)


def encode(name: str) -> bytes:
    """The bytes of a name."""
    return name.encode(_ENCODING, _ERRORS)


# Python makes and drops its state of a foreign thread around every callback, which costs more than most callbacks do.
# One reference more keeps it for the thread's life; libfuse is told to keep its threads.
_kept_threads: set[int] = set()


def _keep_thread() -> None:
    ctypes.pythonapi.PyGILState_Ensure()
    _kept_threads.add(get_ident())


def guarded(name: str, function: Callable[..., int]) -> Callable[..., int]:
    """``function``, with everything that it may raise turned into a negative errno."""

    def callback(*arguments: Any) -> int:
        if get_ident() not in _kept_threads:
            _keep_thread()
        try:
            return function(*arguments)
        except BaseException as error:  # rule 1
            return failed(name, arguments[0], error)

    return callback
