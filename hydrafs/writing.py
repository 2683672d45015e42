"""The tree of a mount that can be written to: what passes through to the store, and what becomes of models.

Goal: a local filesystem, of which some files happen to be dehydrated.
Rule 1: a dehydrated model is renamed and deleted as its diff. Written to, it becomes a plain file first.
Rule 2: a plain file wins over its diff, so one rename(2) takes a model from the one to the other; the diff goes after.
        Whatever is killed when, one of them has the name.
Rule 3: nothing is done to a file that others need before ``hydrafs.keeping`` has been asked.
Rule 4: names that hydrafs keeps for itself are not made: EPERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import stat
import time
from pathlib import Path

from hydrafs.departing import is_hidden_name
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, Protected
from hydrafs.file_writes import UTIME_NOW, UTIME_OMIT, FileWrites, Owner, place_of_file
from hydrafs.handles import OpenFile
from hydrafs.keeping import remove_model, standing
from hydrafs.renaming import rename_model
from hydrafs.replacing import recover
from hydrafs.restore import change_attributes
from hydrafs.store import is_private
from hydrafs.temporary import TEMPORARY, fsync_folder
from hydrafs.vfs import XATTR_HASH, XATTR_PREFIX, Place

log = logging.getLogger("hydrafs.vfs")

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100

_libc = ctypes.CDLL(None, use_errno=True)
_Times = ctypes.c_long * 4


class WritableTree(FileWrites):
    """A store as a tree that can be written to (``hydrafs.fuse.WritableTree``).

    Thread safety: all but ``start`` and ``stop``; changes of one folder are made one at a time, as the kernel has it.
    """

    # Names

    def find(self, path: str) -> Place:
        """See ``StoreTree.find``; a name that libfuse made up is the open file that it stands for."""
        self.departed.settle(path)
        if is_hidden_name(path):
            while (file := self.departed.file(path)) is not None:
                try:
                    return place_of_file(file)
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    self.departed.closed(file)  # meanwhile; another one may still be open
            if self.departed.was(path):
                # Looked up before it was replaced, and not yet opened: at this the kernel looks up the name again.
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return super().find(path)

    def _new(self, path: str) -> str:
        """Where a name is to be made in the store.

        Raises:
            OSError: EPERM for a name of hydrafs' own, ENOENT in a folder of its own.
        """
        self.departed.settle(path)
        folder, _, name = path.rpartition("/")
        if any(is_private(part) for part in folder.split("/")):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if is_private(name) or (name.endswith(SUFFIX) and name != SUFFIX):
            raise OSError(errno.EPERM, "a name that hydrafs keeps for itself", path)
        return self.real(path)

    def _free(self, path: str) -> str:
        """``_new`` for a name that must not be there yet, dehydrated or not."""
        real = self._new(path)
        with contextlib.suppress(FileNotFoundError):
            self.find(path)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return real

    def _made(self, real: str, mode: int, owner: Owner | None) -> None:
        """Give what was made the mode that was asked for, whatever our umask, and the owner who asked."""
        found = os.lstat(real)
        if owner is not None and os.geteuid() == 0 and owner != (0, 0):
            inherited = os.stat(os.path.dirname(real)).st_mode & stat.S_ISGID
            os.lchown(real, owner[0], -1 if inherited else owner[1])
        wanted = mode & 0o7777 | (found.st_mode & stat.S_ISGID)
        if not stat.S_ISLNK(found.st_mode) and stat.S_IMODE(found.st_mode) != wanted:
            os.chmod(real, wanted)

    def mkdir(self, path: str, mode: int, owner: Owner | None = None) -> None:
        """mkdir(2)."""
        real = self._free(path)
        with self.folder_times.changing(real):
            os.mkdir(real, mode & 0o7777)
            self._made(real, mode, owner)
        self.names.forget(path)

    def mknod(self, path: str, mode: int, owner: Owner | None = None) -> None:
        """mknod(2), of files, pipes and sockets; the mount is nodev."""
        real = self._free(path)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)
        with self.folder_times.changing(real):
            os.mknod(real, mode)
            self._made(real, mode, owner)
        self.names.forget(path)

    def symlink(self, target: str, path: str, owner: Owner | None = None) -> None:
        """symlink(2)."""
        real = self._free(path)
        with self.folder_times.changing(real):
            os.symlink(target, real)
            self._made(real, 0o777, owner)
        self.names.forget(path)

    def link(self, old: str, new: str) -> None:
        """link(2); of a dehydrated model, its diff gets the second name."""
        place, real = self.find(old), self._free(new)
        if place.departed is not None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        with self.folder_times.changing(real):
            os.link(place.real, real + SUFFIX if place.is_diff else real, follow_symlinks=False)
        self.names.forget(new)

    def unlink(self, path: str) -> None:
        """unlink(2); a model that others need is kept for them, out of sight."""
        if is_hidden_name(path) and not os.path.lexists(self.real(path)):
            return  # the file was closed: with it goes what the name stood for
        with self.turns.one(), self.paths.of(path):
            place = self.find(path)
            self.refuse_onto_itself(path, place, "deleted", folders=True)
            self._delete(place)
        self.names.forget(path)

    def _delete(self, place: Place) -> None:
        with self.folder_times.changing(place.listed):
            if place.is_diff or stat.S_ISREG(place.stat.st_mode):
                remove_model(self.store, Path(place.listed), aside=self.aside)
            else:
                os.unlink(place.real)

    def _delete_hidden(self, place: Place) -> None:
        # A moment later than asked for. A file that somebody has put there meanwhile is not meant.
        plain, diff = standing(Path(place.listed))
        if plain is not None and (place.is_diff or not os.path.samestat(plain, place.stat)):
            return
        if plain is not None or diff is not None:
            self._delete(place)

    def rmdir(self, path: str) -> None:
        """rmdir(2); temporary files in the folder are no obstacle, and who writes them fails."""
        real = self.find(path).real
        with self.turns.one(), self.folder_times.changing(real):
            self._rmdir(real)
        self.names.forget(path)

    def _rmdir(self, real: str) -> None:
        try:
            os.rmdir(real)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or self.members(real):
                raise
            recover(self.store)
            _end_jobs_in(real)
            os.rmdir(real)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        """renameat2(2)."""
        if is_hidden_name(new) and not os.path.lexists(self.real(new)):
            with self.turns.one(), self.paths.of(old):
                self._hide(old, new)
            return
        end = self.departed.take_over(new)
        try:
            with self.turns.one(), self.paths.of(old, new):
                self._rename(old, new, flags)
        finally:
            if end is not None:
                end()
            self.departed.replaced(new)

    def _hide(self, path: str, hidden: str) -> None:
        place = self.find(path)
        # The deletion comes later, when nobody is left to be told that it failed.
        if place.is_diff and self.store.protect:
            raise Protected("a dehydrated model may not be removed", where=path)
        if not os.access(os.path.dirname(place.real), os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        self.refuse_onto_itself(path, place, "deleted", folders=True)
        files = [claim.holder for claim in self.names.claims(path)]
        self.names.move(path, hidden)
        kept = None
        with contextlib.suppress(OSError, HydraError):  # then the kernel looks again, and most often in time
            kept = self.open_place(hidden, place_of_file(files[0]) if files else place)
        self.departed.hide(path, hidden, files, lambda: self._delete_hidden(place), kept)

    def _rename(self, old: str, new: str, flags: int) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), old)
        if flags & RENAME_EXCHANGE:
            self._exchange(old, new)
            return
        real, place = self._new(new), self.find(old)
        if place.departed is not None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        folder = stat.S_ISDIR(place.stat.st_mode)
        if not folder and not flags & RENAME_NOREPLACE:
            with contextlib.suppress(FileNotFoundError):
                self.refuse_onto_itself(new, self.find(new), "replaced")
        shown = self.directory_mtime(place) if folder else 0
        with self.folder_times.changing(place.listed, real):
            rename_model(
                self.store, Path(place.listed), Path(real), replace=not flags & RENAME_NOREPLACE, aside=self.aside
            )
        self.names.move(old, new, folder=folder)
        if folder:
            self.folder_times.moved(place.listed, real, shown)
            _end_jobs_in(real)

    def _exchange(self, one: str, other: str) -> None:
        for path in (one, other):
            self._new(path)
            place = self.find(path)
            if place.is_diff:  # two names change at once only as two files of one kind
                self.make_plain(path)
        first, second = self.find(one).real, self.find(other).real
        code = _libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
        if code != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), one)
        self.names.exchange(one, other)
        for real in (first, second):
            self.folder_times.moved(real, real, None)
            self.folder_times.touched(os.path.dirname(real))

    def sync_folder(self, path: str) -> None:
        """fsync(2) of a folder."""
        fsync_folder(Path(self.find(path).real))

    # Contents

    def create(self, path: str, flags: int, mode: int, owner: Owner | None = None) -> OpenFile:
        """open(2) with O_CREAT."""
        real = self._new(path)
        try:
            self.find(path)
        except FileNotFoundError:
            pass
        else:
            return self.open(path, flags)
        try:
            with self.folder_times.changing(real):
                return self.create_at(real, path, flags, mode, lambda: self._made(real, mode, owner))
        except FileExistsError:
            return self.open(path, flags)

    # Attributes

    def chmod(self, path: str, mode: int) -> None:
        """chmod(2)."""
        place = self.find(path)
        recorded = self._of_model(place)
        if recorded is None:
            os.chmod(place.real, mode & 0o7777)
            return
        wanted = stat.S_IFREG | (mode & 0o7777)
        if wanted != recorded[0]:
            self._record(place, wanted, recorded[1])
        # Whom the model is hidden from, the diff is hidden from.
        os.chmod(place.real, mode & 0o666)

    def _record(self, place: Place, mode: int, mtime_ns: int) -> None:
        change_attributes(Path(place.real), mode=mode, mtime_ns=mtime_ns)
        self.forget_trailer(place.real)

    def chown(self, path: str, uid: int, gid: int) -> None:
        """lchown(2)."""
        place = self.find(path)
        os.chown(place.real, uid, gid, follow_symlinks=place.departed is not None)

    def utimens(self, path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """utimensat(2): seconds and nanoseconds each, or UTIME_NOW or UTIME_OMIT for the nanoseconds."""
        place = self.find(path)
        recorded = self._of_model(place)
        own = mtime
        if recorded is not None:
            own = (0, UTIME_OMIT)
            if mtime[1] != UTIME_OMIT:
                now = time.clock_gettime_ns(getattr(time, "CLOCK_REALTIME_COARSE", 5))
                wanted = now if mtime[1] == UTIME_NOW else mtime[0] * 1_000_000_000 + mtime[1]
                if wanted != recorded[1]:
                    self._record(place, recorded[0], wanted)
        flags = 0 if place.departed is not None else _AT_SYMLINK_NOFOLLOW
        if _libc.utimensat(_AT_FDCWD, os.fsencode(place.real), _Times(*atime, *own), flags) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        if stat.S_ISDIR(place.stat.st_mode):
            self.folder_times.touched(place.real)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        """lsetxattr(2); ENOTSUP for what hydrafs says itself, which copies of attributes pass over."""
        place = self.find(path)
        self._check_xattr(path, name)
        os.setxattr(place.real, name, value, flags, follow_symlinks=place.departed is not None)

    def removexattr(self, path: str, name: str) -> None:
        """lremovexattr(2)."""
        place = self.find(path)
        self._check_xattr(path, name)
        os.removexattr(place.real, name, follow_symlinks=place.departed is not None)

    def _check_xattr(self, path: str, name: str) -> None:
        if name.startswith((XATTR_HASH, XATTR_PREFIX, "system.", "security.")):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)


def _end_jobs_in(real: str) -> None:
    """Remove the temporary files in a folder that goes or is called otherwise now, also of who is writing them: they
    cannot get the name that they were for, and nobody would ever find them."""
    for folder, _, names in os.walk(real):
        for name in names:
            if name.startswith(TEMPORARY):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
