"""Which folder a store is, whatever stands under its name now: its disk may be unplugged, unmounted, or not there yet.

Rule 1: the folder that was opened is known by device and inode, and held by a descriptor, so that no other folder gets
        these numbers. A folder that comes later is known by its mark: ``.hydrafs/store.json``, a random name that a
        store gets once and keeps wherever it is mounted.
Rule 2: where another folder has the name, or none, everything is an error and nothing is written, until the one with
        the same mark is there again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
from pathlib import Path

from hydrafs.covered import is_covered, named
from hydrafs.errors import HydraError, StoreGone, from_oserror
from hydrafs.temporary import TemporaryFile

__all__ = ["MARK", "RootIdentity", "make_mark", "read_mark"]

log = logging.getLogger(__name__)

MARK = "store.json"
_MAX_NBYTES = 4096


def read_mark(private: Path) -> str:
    """The mark in ``private``, a store's ``.hydrafs``; empty where there is none that can be read."""
    try:
        with (private / MARK).open("rb") as file:
            mark = json.loads(file.read(_MAX_NBYTES))["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return mark if isinstance(mark, str) else ""


def make_mark(private: Path) -> str:
    """The mark in ``private``, which is made where there is none; empty where it cannot be (a full disk, and others):
    the store is known by its device and inode alone then, and gets one the next time."""
    mark = read_mark(private)
    if mark:
        return mark
    with contextlib.suppress(HydraError, OSError), TemporaryFile(private) as temporary:
        temporary.file.write(json.dumps({"id": secrets.token_hex(16)}).encode() + b"\n")
        temporary.commit(private / MARK, replace=os.path.lexists(private / MARK))
    return read_mark(private)


class RootIdentity:
    """Whether the folder under a store's name is the store. Thread safety: any number of threads.

    Args:
        root: the store's folder, absolute; one that a mount covers is reached by a descriptor, and is always itself.
        private: its ``.hydrafs``.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, root: Path, private: Path) -> None:
        self._root = os.fspath(root)
        self._private = private
        self._is_fixed = is_covered(root)
        self._lock = threading.Lock()
        self._folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._known = _numbers(os.fstat(self._folder))
            self.mark = read_mark(private)
        except BaseException:
            os.close(self._folder)
            raise
        """The store's mark, or empty; ``mark_now`` reads it again."""
        self.trouble = ""
        """Why the store is not there; empty where it was at the last look."""

    @property
    def folder(self) -> int:
        """A descriptor (``O_PATH``) of the store's folder, for what must not land in another one."""
        return self._folder

    def mark_now(self) -> None:
        """Give the store its mark where it has none; to be called when it may be written to."""
        if not self.mark:
            self.mark = make_mark(self._private)

    def check(self) -> bool:
        """Make sure that the folder under the name is the store. One stat, where it is.

        Returns:
            Whether it is a folder that was not known before, of the same mark: its disk was away, and came back.

        Raises:
            StoreGone: it is not; logged once.
        """
        if self._is_fixed:
            return False
        try:
            found = os.stat(self._root)
        except OSError as error:
            self._is_gone(error.strerror or type(error).__name__)
        if _numbers(found) == self._known:
            if self.trouble:
                self._is_back()
            return False
        with self._lock:
            mark = read_mark(self._private)
            if self.mark and mark == self.mark:
                return self._takes_over(found)
        self._is_gone("another folder stands there" if not mark else "another store stands there")
        raise AssertionError  # not reached

    def _takes_over(self, found: os.stat_result) -> bool:
        try:
            folder = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, "cannot open the store", self._root) from error
        if _numbers(os.fstat(folder)) != _numbers(found):  # it changed again, under our hands
            os.close(folder)
            raise StoreGone("the store is not there", where=named(self._root), detail="its folder changes")
        os.dup2(folder, self._folder, inheritable=False)
        os.close(folder)
        self._known = _numbers(found)
        self._is_back()
        return True

    def _is_back(self) -> None:
        if self.trouble:
            self.trouble = ""
            log.info("the store %s is back", named(self._root))

    def _is_gone(self, reason: str) -> None:
        if self.trouble != reason:
            first, self.trouble = not self.trouble, reason
            if first:
                log.error(
                    "the store %s is not there: %s; every access is answered with an error until it is back",
                    named(self._root), reason,
                )  # fmt: skip
        error = StoreGone("the store is not there", where=named(self._root), detail=reason)
        error.hydrafs_logged = True  # type: ignore[attr-defined]  # once is enough: see ``errors.log_once``
        raise error

    def close(self) -> None:
        """Let go of the folder: its disk can be unmounted then."""
        with self._lock:
            folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)


def _numbers(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
