"""Whether somebody has a file open for writing, and to be told when somebody opens it for that.

A read lease (fcntl(2), ``F_SETLEASE``) is refused by the kernel while a file is open for writing, through a mapping
too. While it is held, who opens the file for writing waits until it is given back: so it is watched, and given back at
once. Where the filesystem or the permissions know no leases, the open files of the processes that can be seen are
looked through.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from pathlib import Path

from hydrafs.errors import Changing, from_oserror

_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1.0


class Lease:
    """A file that nobody writes to, as long as ``check`` does not raise. Close it, or use it in a ``with`` statement.

    Raises:
        Changing: it is open for writing already.
        NotFound, Denied, HydraError: it cannot be opened.

    Thread safety: any number of threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._looked = 0.0
        self.is_broken = False
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise from_oserror(error, "cannot open the model", path) from error
        try:
            # The default signal ends the process; this one is ignored by default. The thread below asks instead.
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            self.is_kernels = True
        except OSError as error:
            self.is_kernels = False
            if error.errno == errno.EAGAIN or is_open_for_writing(self._fd):
                os.close(self._fd)
                raise Changing("a model is open for writing", where=path) from None
        if self.is_kernels:
            threading.Thread(target=self._watch, name="hydrafs-lease", daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._fd < 0 or self._is_broken():
                    return
            time.sleep(_POLL_SECONDS)

    def _is_broken(self) -> bool:
        if not self.is_broken and self.is_kernels and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            self.is_broken = True
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # who waits in open(2) goes on
        return self.is_broken

    def check(self) -> None:
        """Raise ``Changing`` where somebody has opened the file for writing since."""
        with self._lock:
            if not self.is_kernels and time.monotonic() - self._looked > _LOOK_SECONDS:
                self._looked = time.monotonic()
                self.is_broken = self.is_broken or is_open_for_writing(self._fd)
            if self._is_broken():
                raise Changing("a model is being written to", where=self._path)

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_open_for_writing(fd: int) -> bool:
    """Whether a process that can be looked into has the file of ``fd`` open for writing (``/proc/PID/fd``, proc(5))."""
    wanted = os.fstat(fd)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for name in os.listdir(process / "fd"):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    if os.path.samestat(os.stat(process / "fd" / name), wanted):
                        lines = (process / "fdinfo" / name).read_text().splitlines()
                        flags = int(next(line for line in lines if line.startswith("flags:")).split()[1], 8)
                        if flags & os.O_ACCMODE != os.O_RDONLY:
                            return True
    return False
