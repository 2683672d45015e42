"""The mtime that a folder of a mount is shown with: it changes when the names listed in it do, and at no other time.

A model that is dehydrated has another file and the same name: the folder was changed, and what it lists was not.

Rule: a folder is known by its inode and its birth, and by the names in it. One that was made anew under the same name
      is another folder, also where its names are the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from hydrafs.attributes import Entry
from hydrafs.catalog import Catalog

__all__ = ["FolderTimes", "birth_ns"]

_SETTLED_NS = 100_000_000
"""A folder changed less than this ago may change again within the same tick of its mtime."""
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

    def moved(self, old: str, new: str, shown: int | None) -> None:
        """The folder ``old`` is ``new`` now, and goes on being shown with the mtime ``shown``, if any."""
        with self._lock:
            for table in (self._known, self._touched):
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

    def shown(self, real: str, found: os.stat_result) -> int:
        """The mtime to show for the folder ``real``, of which lstat(2) says ``found``. Lists it where it changed."""
        real, mtime_ns = real.removesuffix("/."), found.st_mtime_ns
        with self._lock:
            known = self._known.get(real)
        if known is not None and known[:2] == (found.st_ino, mtime_ns):
            return known[2]
        try:
            names = sorted([f"{stat.S_IFMT(e.mode)}/{e.name}" for e in self._members(real)])
        except OSError:
            return mtime_ns
        of_names = xxhash.xxh3_64_intdigest("\0".join(names).encode("utf-8", "surrogateescape")) >> 1
        digest = xxhash.xxh3_64_intdigest(struct.pack("=QQQ", of_names, found.st_ino, birth_ns(real))) >> 1
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
        if time.time_ns() - mtime_ns > _SETTLED_NS:
            with self._lock:
                self._known[real] = (found.st_ino, mtime_ns, shown)
        return shown
