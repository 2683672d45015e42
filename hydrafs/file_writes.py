"""The contents of files of a mount: opening them for writing, and what becomes of models that are written to.

Rule 1: opening is not writing. Until the first write, truncation or allocation a dehydrated model stays a diff, and a
        plain file that others need is not copied.
Rule 2: locks are per path: who writes to one file never waits for another model to become whole.
Rule 3: a program that reads a file of the store past the mount does not empty, delete or replace it through the mount
        (``hydrafs.callers``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hydrafs import callers, tending, trash
from hydrafs.copy_up import lock_shared, make_whole, open_to_write, reopen
from hydrafs.departing import Departed, is_hidden_name
from hydrafs.errors import AlreadyThere, HydraError, OntoItself
from hydrafs.filecopy import copy_into
from hydrafs.handles import OpenFile, PlainFile
from hydrafs.identity import sha256
from hydrafs.keeping import Aside, lstat
from hydrafs.layout import FileSource
from hydrafs.path_locks import PathLocks, Turns, with_room
from hydrafs.rehydrate import Rehydrated
from hydrafs.replacing import take_name
from hydrafs.restore import carry_over
from hydrafs.store import looks_like_model, trailer_of
from hydrafs.temporary import TemporaryFile
from hydrafs.vfs import Place, StoreTree

__all__ = ["UTIME_NOW", "UTIME_OMIT", "FileWrites", "Owner", "is_at", "place_of_file"]

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_KEPT_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC
"""Of an open(2): the kernel does the rest, or has done it."""
_LOCK_SECONDS = 2.0
_RENAMED_LOOKS = 20
_ROOM_NBYTES = 1 << 20
_NO_ROOM_SECONDS = 5.0
_WAITING = 48
"""How many callbacks may wait for the store's lock or for a model to become whole."""
_NOTABLE_NBYTES = 64 << 10
"""Of smaller files that are not called like models, nobody is asked who reads them."""

Owner = tuple[int, int]


class FileWrites(StoreTree):
    """The contents part of ``hydrafs.writing.WritableTree``. Thread safety: all but ``start`` and ``stop``."""

    read_only = False
    aside: Aside | None = staticmethod(trash.put)
    """Where what is removed through the mount can be had back from for a while."""

    def start(self) -> None:
        """See ``StoreTree.start``."""
        self.departed = Departed()
        self.turns = Turns(_WAITING)
        self.paths = PathLocks()
        self._making_room = threading.Lock()
        self._no_room_before = 0.0
        super().start()

    def stop(self) -> None:
        """See ``StoreTree.stop``."""
        self.departed.end()
        super().stop()

    def make_room(self, nbytes: int) -> bool:
        """See ``StoreTree.make_room``: what is in the trash goes."""
        with self._making_room:
            if time.monotonic() < self._no_room_before:
                return False
            try:
                with self.turns.one():
                    made = tending.make_room(self.store, max(nbytes, _ROOM_NBYTES)) > 0
            except (OSError, HydraError):
                made = False
            if not made:  # a full disk is written to again and again, and a look at all that is kept takes a while
                self._no_room_before = time.monotonic() + _NO_ROOM_SECONDS
            return made

    def _caller(self) -> int:
        return 0

    def called_by(self, caller: Callable[[], int]) -> None:
        """``caller`` tells, on the thread of a callback, which process is asking; 0 where nobody knows."""
        self._caller = caller  # type: ignore[method-assign]

    def utimens(self, path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """See ``hydrafs.writing.WritableTree``."""
        raise NotImplementedError

    # Opening

    def create_at(self, real: str, path: str, flags: int, mode: int, made: Callable[[], None]) -> OpenFile:
        """open(2) with O_CREAT of a name that is not there; ``made`` is called once the file is."""
        wanted = flags & _KEPT_FLAGS | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = with_room(self.make_room, 0, lambda: os.open(real, wanted, mode & 0o7777))
        try:
            made()
            lock_shared(fd)
        except BaseException:
            os.close(fd)
            raise
        self.names.forget(path)
        return self.opened(path, PlainFile(real, fd, flags & _KEPT_FLAGS), wants=flags & _KEPT_FLAGS)

    def open(self, path: str, flags: int) -> OpenFile:
        """Open a file. What is opened for writing is written to when it is written to, and not before (rule 1).

        Raises:
            OSError: as open(2); EBUSY and ESTALE as ``Names.claim`` has them.
            HydraError: it cannot be served; the log says why and what to do.
        """
        if is_hidden_name(path) and self.departed.was(path) and flags & (os.O_ACCMODE | os.O_TRUNC):
            # The kernel meant the name that the file had: it looks that up again.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        wants = flags & _KEPT_FLAGS
        if flags & os.O_TRUNC:
            if wants & os.O_ACCMODE == os.O_RDONLY:
                wants |= os.O_RDWR  # O_RDONLY | O_TRUNC truncates, on Linux
            return self._open_empty(path, wants)
        if wants & os.O_ACCMODE:
            return self._open_unwritten(path, wants)
        return self.settled(path, lambda place: self._open_to_read(path, place))

    def _open_to_read(self, path: str, place: Place) -> OpenFile:
        opened = self.open_place(path, place)
        if place.departed is not None:
            self.departed.join(path, opened)
        return opened

    def _open_empty(self, path: str, wants: int) -> OpenFile:
        with self.turns.one(), self.paths.of(path):
            self.refuse_onto_itself(path, self.find(path), "emptied", mapped=True)
            real, fd = self._plain_to_write(path, None, empty=True)
        try:
            source = PlainFile(real, reopen(fd, wants), wants)
            lock_shared(source.fd)
        finally:
            os.close(fd)
        return self.opened(path, source, wants=wants)

    def _open_unwritten(self, path: str, wants: int) -> OpenFile:
        for _ in range(100):
            file = self.settled(path, lambda place: self._open_if_there(path, place, wants))
            if file is not None:
                return file
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    def _open_if_there(self, path: str, place: Place, wants: int) -> OpenFile | None:
        if not stat.S_ISREG(place.stat.st_mode):
            return self.opened(path, PlainFile.open(place.real, wants), wants=wants)
        _check_writable(place, self._of_model(place))
        if place.is_diff:
            return self.open_place(path, place, wants=wants)
        # Nobody needs an empty file, and who may only write to a file cannot read it until then.
        flags = os.O_RDONLY if place.stat.st_size and os.access(place.real, os.R_OK) else wants
        source = PlainFile.open(place.real, flags)
        # Who dehydrates a file holds the exclusive lock while the original goes.
        _wait_for_lock(source.fd)
        if is_at(source.fd, place.real):
            return self.opened(path, source, wants=wants)
        source.close()
        return None

    def _of_model(self, place: Place) -> tuple[int, int] | None:
        """Mode and mtime of a dehydrated model; of a damaged diff nothing is recorded but what the file itself has."""
        trailer = self.trailer(place) if place.is_diff else None
        return None if trailer is None else (trailer.mode, trailer.mtime_ns)

    def closed(self, file: OpenFile) -> None:
        """An open file was closed."""
        self.departed.closed(file)

    # Writing

    def to_be_written(self, file: OpenFile, size: int | None) -> None:
        """See ``StoreTree.to_be_written``: everybody who has the file open goes on with a plain one."""
        with self.turns.one():
            while True:
                path = file.path
                with self.paths.of(path):
                    if file.path != path:
                        continue  # it was renamed meanwhile
                    if file.is_writable:
                        return
                    if size is not None and size == file.attributes().size:
                        self.utimens(path, (0, UTIME_OMIT), (0, UTIME_NOW))
                        return
                    if size == 0 and not is_hidden_name(path):
                        self.refuse_onto_itself(path, self.find(path), "emptied", mapped=True)
                    if self._become_plain(path, file, empty=size == 0):
                        return

    def _become_plain(self, path: str, file: OpenFile, *, empty: bool) -> bool:
        """Whether it is done; not where the file got another name meanwhile."""
        if not is_hidden_name(path):
            with contextlib.suppress(FileNotFoundError):
                os.close(self._plain_to_write(path, file, empty=empty)[1])
                return True
            for _ in range(_RENAMED_LOOKS):  # the names of open files follow a moment after those of the store
                if file.path != path:
                    return False
                time.sleep(0.01)
        # The name is another file's by now, or gone: what is written goes with the last who has it open.
        files = self.departed.files(path) if is_hidden_name(path) else []
        fd = self._nameless(file, empty=empty)
        try:
            for other in {*files, file}:
                other.become(fd, other.real)
        finally:
            os.close(fd)
        return True

    def _nameless(self, file: OpenFile, *, empty: bool) -> int:
        source = file.source
        if isinstance(source, PlainFile) and os.fstat(source.fd).st_nlink == 0:
            return reopen(source.fd, os.O_RDWR)
        with TemporaryFile(self.store.private) as temporary:
            if empty:
                pass
            elif isinstance(source, Rehydrated):
                make_whole(source, temporary)
            else:
                copy_into(temporary, Path(f"/proc/self/fd/{source.fd}"))
            return os.dup(temporary.file.fileno())

    def _plain_to_write(self, path: str, file: OpenFile | None, *, empty: bool) -> tuple[str, int]:
        """Where the file stands that has the name, as a plain file that may be written to, and a descriptor of it;
        those who have it open go on with that. The lock of the path is held.

        Raises:
            FileNotFoundError: nothing has the name, or another file than ``file``.
        """
        for _ in range(100):
            place = self.find(path)
            if file is not None and not _is_still(file, place):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if place.is_diff:
                fd = with_room(self.make_room, self._size(place), lambda: self._copy_up(place, empty=empty))  # noqa: B023
            else:
                fd = with_room(self.make_room, place.stat.st_size, lambda: self._take(place, empty=empty))  # noqa: B023
            if fd is not None:
                break
        else:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        try:
            holders = [claim.holder for claim in self.names.claims(path)]
            for holder in {*holders, *([file] if file is not None else [])}:
                holder.become(fd, place.listed)
        except BaseException:
            os.close(fd)
            raise
        return place.listed, fd

    def _take(self, place: Place, *, empty: bool) -> int | None:
        return open_to_write(self.store, Path(place.real), os.O_RDWR, place.stat, truncate=empty, aside=self.aside)

    def _size(self, place: Place) -> int:
        trailer = self.trailer(place) if place.is_diff else None
        return place.stat.st_size if trailer is None else trailer.size

    def _copy_up(self, place: Place, *, empty: bool) -> int | None:
        """Make a dehydrated model a plain file, whole or empty; ``None`` where it is no diff any more."""
        listed = Path(place.listed)
        try:
            with TemporaryFile(listed.parent) as temporary:
                if empty:
                    self._be_like(place, temporary)
                else:
                    with contextlib.closing(self.opener.open_diff(Path(place.real))) as model:
                        make_whole(model, temporary)
                take_name(self.store, temporary, listed, instead_of=place.stat, aside=self.aside if empty else None)
                fd = os.dup(temporary.file.fileno())
                lock_shared(fd)  # instead of the exclusive lock of a file that is not there yet
                return fd
        except AlreadyThere:
            return None
        except (HydraError, OSError):
            now = lstat(Path(place.real))
            if now is None or not os.path.samestat(now, place.stat):
                return None  # it was removed or replaced meanwhile
            raise

    def _be_like(self, place: Place, temporary: TemporaryFile) -> None:
        recorded = self._of_model(place)
        fd = os.open(place.real, os.O_RDONLY | os.O_CLOEXEC)
        try:
            carry_over(fd, temporary.file.fileno())
        finally:
            os.close(fd)
        mode = place.stat.st_mode if recorded is None else recorded[0]
        os.fchmod(temporary.file.fileno(), mode & 0o7777)

    def make_plain(self, path: str) -> None:
        """Make what has the name a plain file, where it is a diff."""
        with self.turns.one(), self.paths.of(path):
            if self.find(path).is_diff:
                os.close(self._plain_to_write(path, None, empty=False)[1])

    def truncate(self, path: str, size: int) -> None:
        """truncate(2)."""
        if is_hidden_name(path):
            for file in self.departed.files(path):
                with contextlib.suppress(OSError), file.held():
                    file.truncate(size)
                    return
        place = self.find(path)
        recorded = self._of_model(place)
        _check_writable(place, recorded)
        if size == self.getattr(path).size:
            self.utimens(path, (0, UTIME_OMIT), (0, UTIME_NOW))
            return
        with self.turns.one(), self.paths.of(path):
            if size == 0:
                self.refuse_onto_itself(path, place, "emptied", mapped=True)
            _, fd = self._plain_to_write(path, None, empty=size == 0)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    # A copy onto itself

    def refuse_onto_itself(
        self, path: str, place: Place, done: str, *, mapped: bool = False, folders: bool = False
    ) -> None:
        """Refuse that a program ``done`` to the file what takes it from under its own reading.

        Raises:
            OntoItself: it reads the very file past the mount.
        """
        found = place.stat
        if place.departed is not None or not stat.S_ISREG(found.st_mode) or not found.st_size:
            return
        name = path.rpartition("/")[2]
        if not (place.is_diff or looks_like_model(name) or found.st_size >= _NOTABLE_NBYTES):
            return
        process = self._caller()
        if process <= 0:
            return
        with contextlib.suppress(OSError):
            way = callers.other_way(process, self._target(name, place), mapped=mapped, folders=folders)
            if way is not None:
                raise OntoItself(
                    f"a model is not {done} by who reads it from the store",
                    where=path,
                    detail=f"{_program(process)} has the same file as {way}",
                    remedy="source and target are one file; name both by the mount",
                )

    def _target(self, name: str, place: Place) -> callers.Target:
        files = {(place.stat.st_dev, place.stat.st_ino)}
        folders = set()
        folder, top = os.path.dirname(place.listed), self._root
        while True:
            with contextlib.suppress(OSError):
                found = os.stat(folder)
                folders.add((found.st_dev, found.st_ino))
            if len(folder) <= len(top):
                break
            folder = os.path.dirname(folder)
        fd = os.open(place.real, os.O_PATH | os.O_CLOEXEC)
        try:
            device = callers.device_of(fd)
        finally:
            os.close(fd)
        mount = callers.device_mounted_at(os.fspath(self._mountpoint)) if self._mountpoint is not None else ""
        return callers.Target(name, frozenset(files), frozenset(folders), device, mount, place.is_diff)


def _program(process: int) -> str:
    with contextlib.suppress(OSError):
        return f"{Path(f'/proc/{process}/comm').read_text().strip()} (process {process})"
    return f"process {process}"


def _check_writable(place: Place, recorded: tuple[int, int] | None) -> None:
    """Whether a file that is not opened for writing yet could be: what open(2) would say, as far as modes tell."""
    if place.departed is not None:
        return
    if os.statvfs(place.real).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), place.listed)
    readable_only = recorded is not None and os.geteuid() != 0 and not recorded[0] & 0o222
    if readable_only or not os.access(place.real, os.W_OK, effective_ids=True):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), place.listed)


def _is_still(file: OpenFile, place: Place) -> bool:
    """Whether the file at ``place`` is the one that is open, or one with its bytes that took its place behind us: it
    was dehydrated, stored against another base, or made whole."""
    with file.held():
        if os.path.samestat(os.fstat(file.fd), place.stat):
            return True
    source = file.source
    wanted = source.manifest.sha256 if isinstance(source, Rehydrated) else file.content()
    try:
        if place.is_diff:
            from_diff = _sha256_of_diff(place)
            return from_diff == wanted or (
                isinstance(source, PlainFile) and _hash_of(source) == from_diff and from_diff is not None
            )
        if not isinstance(wanted, bytes) or place.stat.st_size != file.attributes().size:
            return False
        with FileSource(Path(place.real)) as plain:
            return sha256(plain) == wanted
    except (OSError, HydraError):
        return False


def _sha256_of_diff(place: Place) -> bytes | None:
    with contextlib.suppress(HydraError):
        return trailer_of(Path(place.real)).sha256
    return None


def _hash_of(source: PlainFile) -> bytes:
    with FileSource(Path(f"/proc/self/fd/{source.fd}")) as whole:
        return sha256(whole)


def _wait_for_lock(fd: int) -> None:
    """Lock an open file as ``lock_shared``, once who removes it is done. Who has it for longer than a removal takes is
    about something else, and some filesystems have no locks."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.002)
        except OSError:
            return


def place_of_file(file: OpenFile) -> Place:
    """Where an open file stands, whatever became of its name; ``OSError(ESTALE)`` once it is closed."""
    descriptor, is_diff = file.duplicate()
    real = f"/proc/self/fd/{descriptor.fd}"
    return Place(real, is_diff, os.fstat(descriptor.fd), real, file, descriptor)


def is_at(fd: int, path: str) -> bool:
    """Whether the file that ``fd`` is open on stands at ``path``."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False
