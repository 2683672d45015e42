"""Files that are not there yet: they have a name that nobody lists, until they are whole and on the disk.

Rule: a commit is: temporary file, fsync, rename, fsync of the folder. Only then may an original go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from hydrafs.errors import AlreadyThere, from_oserror, has_no_locks

__all__ = ["TEMPORARY", "TemporaryFile", "fsync_folder", "remove_leftovers"]

TEMPORARY = ".hydrafs-tmp-"
"""How the names of files begin that are not there yet."""
_WRITE_BACK_NBYTES = 32 << 20


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` survive a power cut.

    Some filesystems (shared folders of virtual machines, older CIFS, some of FUSE) know no fsync of a folder and say
    EINVAL or ENOTSUP: the order of what was renamed is all that there is on them. Any other error is one.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


class TemporaryFile:
    """A file that does not exist under its name until ``commit``. Leaving the context without it removes the file.

    It is locked while it is open, so that another process can tell it from one that a crash left behind. On a
    filesystem without locks it is not: nobody can tell then, and ``remove_leftovers`` removes nothing there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_oserror(error, "cannot write in", folder) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not has_no_locks(error):
                    raise from_oserror(error, "cannot lock a file in", folder) from error
            self.file: BinaryIO = os.fdopen(fd, "w+b", buffering=1 << 20)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        self._written_back = 0

    def write_back(self) -> None:
        """Let the kernel begin to write what it holds of the file, once there is enough of it: the less has
        ``flush_to_disk`` to wait for. Promises nothing."""
        end = self.file.tell()
        if end - self._written_back < _WRITE_BACK_NBYTES:
            return
        self.file.flush()
        # On dirty pages this starts writing them and returns; sync_file_range(2) is not within Python's reach.
        with contextlib.suppress(OSError):
            begin, self._written_back = self._written_back, end
            os.posix_fadvise(self.file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def flush_to_disk(self) -> None:
        """What was written is on the disk when this returns."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def seal(self) -> None:
        """Nothing is written to it any more: from here on it is open for reading, as a model is that is dehydrated."""
        self.flush_to_disk()
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.file.close()
        self.file = os.fdopen(fd, "rb")
        with contextlib.suppress(OSError):  # a filesystem without locks, as at the beginning
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def commit(self, target: Path, *, replace: bool = False) -> None:
        """Give the file its name and make that durable.

        Raises:
            AlreadyThere: ``target`` exists and ``replace`` is false.
        """
        try:
            self.flush_to_disk()
            if replace:
                self.path.replace(target)
            else:
                # link(2) fails where rename(2) would silently replace; some filesystems have no links.
                try:
                    os.link(self.path, target)
                except FileExistsError:
                    raise
                except OSError:
                    if not os.path.lexists(target):
                        self.path.rename(target)
                    elif not os.path.samestat(os.lstat(target), os.fstat(self.file.fileno())):
                        raise FileExistsError(17, "File exists", os.fspath(target)) from None
                    # else it was done, and the answer got lost
                else:
                    with contextlib.suppress(OSError):  # it is tried again at the end, and by the next run
                        self.path.unlink()
            fsync_folder(target.parent)
        except FileExistsError:
            raise AlreadyThere("a file of that name exists", where=target, remedy="move it away first") from None
        except OSError as error:
            raise from_oserror(error, "cannot give the file its name", target) from error

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):  # a committed file has no such name any more
            self.path.unlink()


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files in ``folder`` that no living process holds; how many there were."""
    count = 0
    for path in folder.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what may be written to
            except PermissionError:  # it had the mode of its model already
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                count += 1
            finally:
                os.close(fd)
    return count
