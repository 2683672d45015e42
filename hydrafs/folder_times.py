"""The mtime that a folder of a mount is shown with: it changes when the names listed in it do, and at no other time.

A model that is dehydrated has another file and the same name: the folder was changed, and what it lists was not.

Rule 1: a folder is known by its inode and its birth, and by the names in it. One that was made anew under the same name
        is another folder, also where its names are the same.
Rule 2: a change through the mount does not cost a listing. The sum of the hashes of what is listed follows each name
        that comes or goes, as long as nobody else has changed the folder since. It is listed once it rests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from hydrafs.attributes import Entry
from hydrafs.catalog import Catalog
from hydrafs.diff import SUFFIX
from hydrafs.store import is_private

__all__ = ["FolderTimes", "birth_ns"]

_SETTLED_NS = 100_000_000
"""A folder changed less than this ago may change again within the same tick of its mtime."""
_MODULUS = 1 << 64
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME = -100, 0x100, 0x800
_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)


def birth_ns(path: str) -> int:
    """When the file or folder at ``path`` was made, in nanoseconds; 0 where its filesystem does not tell."""
    if _statx is None:
        return 0
    result = ctypes.create_string_buffer(256)  # struct statx
    if _statx(_AT_FDCWD, os.fsencode(path), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, result) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", result, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", result, 80)
    return int(seconds * 1_000_000_000 + nanoseconds) if mask & _STATX_BTIME else 0


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))


def _hash_at(listed: str) -> int:
    """The hash of what a folder lists under a name, 0 where it lists nothing."""
    name = listed.rsplit("/", 1)[-1]
    if is_private(name):
        return 0
    for path in (listed, listed + SUFFIX):
        with contextlib.suppress(OSError):
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            if path == listed or kind == stat.S_IFREG:
                return _hash(f"{kind}/{name}")
    return 0


class FolderTimes:
    """The mtimes that folders of a store are shown with. Thread safety: any number of threads.

    Args:
        catalog: keeps them from one mount to the next.
        members: what a folder lists.
    """

    def __init__(self, catalog: Catalog, members: Callable[[str], Iterable[Entry]]) -> None:
        self._catalog, self._members = catalog, members
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, int, int]] = {}
        self._touched: dict[str, int] = {}
        self._sums: dict[str, tuple[int, int, int, bool]] = {}
        """Inode, mtime, the sum, and whether the last change was one through the mount."""

    def moved(self, old: str, new: str, shown: int | None) -> None:
        """The folder ``old`` is ``new`` now, and goes on being shown with the mtime ``shown``, if any."""
        with self._lock:
            for table in (self._known, self._touched, self._sums):
                for key in [key for key in table if key == old or key.startswith((old + "/", new + "/"))]:
                    del table[key]
        if shown is not None:
            recorded = self._catalog.directory(Path(old))
            if recorded is not None:
                self._catalog.remember_directory(Path(new), recorded[0], shown)

    def touched(self, real: str) -> None:
        """The folder ``real`` was changed on purpose: the mtime that it has now is shown, whatever its names are."""
        with contextlib.suppress(OSError):
            real = real.removesuffix("/.")
            mtime_ns = os.stat(real).st_mtime_ns
            with self._lock:
                self._known.pop(real, None)
                self._touched[real] = mtime_ns

    @contextlib.contextmanager
    def changing(self, *listed: str) -> Iterator[None]:
        """In here the names of these paths in the store, diffs by the names that they are listed under, come and go, as
        somebody asked through the mount."""
        paths = set(listed)
        folders = {os.path.dirname(path).removesuffix("/.") for path in paths}
        before = {folder: self._sum_if_unchanged(folder) for folder in folders}
        gone = {path: _hash_at(path) for path in paths}
        yield
        for folder in folders:
            self.touched(folder)
        for folder, known in before.items():
            if known is None:
                continue
            inside = [path for path in paths if os.path.dirname(path).removesuffix("/.") == folder]
            total = known + sum(_hash_at(path) - gone[path] for path in inside)
            with contextlib.suppress(OSError):
                found = os.stat(folder)
                with self._lock:
                    self._sums[folder] = found.st_ino, found.st_mtime_ns, total % _MODULUS, True

    def _sum_if_unchanged(self, folder: str) -> int | None:
        with self._lock:
            known = self._sums.pop(folder, None)
        with contextlib.suppress(OSError):
            found = os.stat(folder)
            if known is not None and known[:2] == (found.st_ino, found.st_mtime_ns):
                return known[2]
        return None

    def shown(self, real: str, found: os.stat_result) -> int:
        """The mtime to show for the folder ``real``, of which lstat(2) says ``found``. Lists it where it changed."""
        real, mtime_ns = real.removesuffix("/."), found.st_mtime_ns
        with self._lock:
            known = self._known.get(real)
        if known is not None and known[:2] == (found.st_ino, mtime_ns):
            return known[2]
        with self._lock:
            summed = self._sums.get(real)
        of_names = None
        # Once it has settled it is listed: within one tick of the clock somebody else may have changed it as well.
        settled = time.time_ns() - mtime_ns > _SETTLED_NS
        if summed is not None and summed[:2] == (found.st_ino, mtime_ns) and summed[3] and not settled:
            total = summed[2]
        else:
            try:
                names = sorted([f"{stat.S_IFMT(e.mode)}/{e.name}" for e in self._members(real)])
            except OSError:
                return mtime_ns
            total = sum(map(_hash, names)) % _MODULUS
            of_names = _hash("\0".join(names)) >> 1
            with self._lock:
                self._sums[real] = found.st_ino, mtime_ns, total, False
        digest = xxhash.xxh3_64_intdigest(struct.pack("=QQQ", total, found.st_ino, birth_ns(real))) >> 1
        recorded = self._catalog.directory(Path(real))
        # Catalogs that older versions wrote know a folder by its names alone.
        same = recorded is not None and recorded[0] in (digest, of_names)
        with self._lock:
            own = self._touched.pop(real, None)
        shown = recorded[1] if recorded is not None and same else mtime_ns
        if own is not None and same:
            shown = own  # names that came and went through the mount
        if recorded != (digest, shown):
            self._catalog.remember_directory(Path(real), digest, shown)
        if settled:
            with self._lock:
                self._known[real] = (found.st_ino, mtime_ns, shown)
        return shown
