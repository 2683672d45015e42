"""Originals that had left their names for a diff when a process was killed, and that no journal tells of any more.

A store that was copied to another disk has other inode numbers, so its journal does not know its own files; and the
journal may not have been copied. What stands aside may be the only copy of what somebody wrote.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from hydrafs import keeping
from hydrafs.errors import Changing, HydraError
from hydrafs.identity import is_unchanged, sha256
from hydrafs.leases import QuietFile
from hydrafs.needs import diffs, record_of
from hydrafs.replacing import left_names
from hydrafs.restore import prove
from hydrafs.retained import aside_files
from hydrafs.store import Store
from hydrafs.temporary import fsync_folder

__all__ = ["settle"]

log = logging.getLogger(__name__)


def settle(store: Store, still: Callable[[], None] = lambda: None) -> list[Path]:
    """Remove what stands aside where a listed diff stands for it, and give it its name back where no file has that.

    Args:
        still: is asked all along whether to go on; what it raises is raised here.

    Returns:
        What still stands aside: its name is not known, or is another file's. It is logged.

    Raises:
        HydraError: the store cannot be locked.
    """
    left = []
    for path in list(aside_files(store)):
        still()
        try:
            if not _settled(store, path, still):
                left.append(path)
        except FileNotFoundError:
            continue  # somebody was at it, and is through
        except OSError as error:
            log.debug("%s stands aside: %s", path, error)
            left.append(path)
    for path in left:
        log.warning(
            "%s is an original that stands aside since a kill, and no diff stands for it; give it a name of your own",
            path,
        )
    return left


def _settled(store: Store, path: Path, still: Callable[[], None]) -> bool:
    with contextlib.closing(QuietFile(path)) as source:
        digest = sha256(source, lambda nbytes: still())
        try:
            source.quiet.check("an original", look=True, doubt=True)
        except Changing as error:  # who has had it open all the time writes on: later, then
            log.debug("%s stands aside: %s", path, error)
            return True
        return _settled_as(store, path, source, digest)


def _settled_as(store: Store, path: Path, source: QuietFile, digest: bytes) -> bool:
    stat = source.stat
    known = left_names(store).get(path.name)
    for _, diff in diffs(store):
        with contextlib.suppress(OSError, HydraError):
            if record_of(store, diff).sha256 == digest:
                before = os.lstat(diff)
                prove(store, diff)
                with store.lock():
                    if is_unchanged(before, os.lstat(diff)) and is_unchanged(stat, os.lstat(path)):
                        source.quiet.check("an original", look=True, doubt=True)
                        keeping.remember_locked(store, path, digest)
                        keeping.drop(store, path, is_diff=False)
                        fsync_folder(path.parent)
                        return True
    with store.lock():
        # In the journal's folder, or where the file stands now, if its folder was moved.
        name = known and (known if known.parent == path.parent else path.parent / known.name)
        if not name or not is_unchanged(stat, os.lstat(path)) or any(keeping.standing(name)):
            return False
        os.rename(path, name)
        fsync_folder(name.parent)
        log.warning("%s has its name again: it stood aside since a kill, and no diff stands for it", name)
    return True
