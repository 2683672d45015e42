"""Renaming models.

Rule 1: who changes names holds the store's lock; a lock of a dead process is none.
Rule 2: where two names must change, the order is such that a kill in between shows the old state or the new one, or
        the journal says how to go on, at the next start (``hydrafs.replacing.recover``).
Rule 3: nothing goes that others need (``hydrafs.keeping``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from pathlib import Path

from hydrafs import journal
from hydrafs.errors import Protected
from hydrafs.keeping import (
    carried,
    diff_of,
    drop,
    is_regular,
    keep,
    let_go,
    links_of,
    lstat,
    standing,
)
from hydrafs.needs import needs
from hydrafs.store import Store

__all__ = ["KIND", "end", "rename_model"]

KIND = "renaming"


def rename_model(store: Store, old: Path, new: Path, *, replace: bool = True, protect: bool | None = None) -> None:
    """Rename a listed name over another, as rename(2) does; either may be a plain file, a diff or a folder.

    Args:
        old, new: listed names in the store, absolute.
        replace: whether ``new`` may exist.
        protect: whether to refuse that a dehydrated model is renamed (default: the store's policy).

    Raises:
        OSError: as rename(2).
        Protected: the policy forbids it.
    """
    with store.lock():
        (plain, diff), (target, target_diff) = standing(old), standing(new)
        if plain is None and diff is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(old))
        if not replace and (target is not None or target_diff is not None):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
        if old == new or (plain is not None and target is not None and os.path.samestat(plain, target)):
            return
        if plain is None and (store.protect if protect is None else protect):
            raise Protected("a dehydrated model may not be renamed", where=old)
        moves = store.pins_in(old)
        if moves:
            store.repin([os.fspath(Path(store.relative(new), os.path.relpath(p, store.relative(old)))) for p in moves])
        if plain is None:
            _rename_diff(store, old, new, target, target_diff)
        else:
            _rename_plain(store, old, new, plain, diff, target, target_diff)
        if moves:
            store.repin([], unpin=moves)


def _rename_plain(
    store: Store,
    old: Path,
    new: Path,
    plain: os.stat_result,
    diff: os.stat_result | None,
    target: os.stat_result | None,
    target_diff: os.stat_result | None,
) -> None:
    if stat_module.S_ISDIR(plain.st_mode):
        if target is None and target_diff is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(new))
        os.rename(old, new)
        return
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    needed = False
    if target is not None and is_regular(target):
        needed = keep(store, new, is_diff=False)
    if diff is not None:  # it would be seen under the old name once the file that hides it is gone
        drop(store, diff_of(old), is_diff=True)
    if stat_module.S_ISREG(plain.st_mode):
        with carried(store, old, new, *links_of(store, plain)):
            os.rename(old, new)
    else:
        os.rename(old, new)
    if target is not None and not needed and target.st_nlink > 1:
        let_go(store, target, needs(store))
    if target_diff is not None:
        drop(store, diff_of(new), is_diff=True)


def _rename_diff(
    store: Store, old: Path, new: Path, target: os.stat_result | None, target_diff: os.stat_result | None
) -> None:
    source, destination = diff_of(old), diff_of(new)
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    if target is None:
        if target_diff is not None:
            kept = keep(store, destination, is_diff=True)
        with carried(store, source, destination):
            os.rename(source, destination)
        if target_diff is not None and not kept and target_diff.st_nlink > 1:
            let_go(store, target_diff, needs(store))
        return
    if target_diff is not None:
        drop(store, destination, is_diff=True)
    numbers = {"diff": os.lstat(source).st_ino, "plain": target.st_ino}
    entry = journal.write(store, KIND, {"old": old, "new": new}, numbers)
    try:
        with carried(store, source, destination):
            try:
                os.link(source, destination)
            except OSError:
                os.rename(source, destination)
        _finish(store, old, new)
    except OSError:
        _undo(old, new)
        raise
    finally:
        # After a failure that could not be undone either, the next start tries again.
        if not (lstat(source) and lstat(destination)):
            entry.end()


def _finish(store: Store, old: Path, new: Path) -> None:
    """The diff stands under the new name, behind the file that it replaces: from here on it can only go forward."""
    drop(store, new, is_diff=False)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(diff_of(old))


def _undo(old: Path, new: Path) -> None:
    with contextlib.suppress(OSError):
        if lstat(new) is None:
            return  # the file that was replaced is gone: the new name is the diff's
        if lstat(diff_of(old)) is None:
            os.rename(diff_of(new), diff_of(old))
        else:
            os.unlink(diff_of(new))


def end(store: Store, entry: journal.Entry) -> None:
    """End the renaming of a diff over a plain file that a killed process began; the lock is held."""
    old, new = entry.places["old"], entry.places["new"]
    diff, plain = entry.numbers["diff"], entry.numbers["plain"]
    if not journal.is_file(diff_of(new), diff):
        return
    target = lstat(new)
    if target is not None and target.st_ino != plain:
        _undo(old, new)  # somebody gave the new name to another file since
        return
    if target is not None:
        drop(store, new, is_diff=False)
    if journal.is_file(diff_of(old), diff):
        os.unlink(diff_of(old))
