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
    Aside,
    carried,
    diff_of,
    drop,
    is_regular,
    keep,
    let_go,
    links_of,
    lstat,
    standing,
    with_copies,
)
from hydrafs.store import Store

__all__ = ["ENDINGS", "rename_model"]

_DIFF_OVER_FILE, _FILE_OVER_DIFF = "diff-over-file", "file-over-diff"


def rename_model(
    store: Store,
    old: Path,
    new: Path,
    *,
    replace: bool = True,
    protect: bool | None = None,
    aside: Aside | None = None,
) -> None:
    """Rename a listed name over another, as rename(2) does; either may be a plain file, a diff or a folder.

    Args:
        old, new: listed names in the store, absolute.
        replace: whether ``new`` may exist.
        protect: whether to refuse that a dehydrated model is renamed (default: the store's policy).
        aside: where what is replaced can be had back from for a while: ``hydrafs.trash.put``.

    Raises:
        OSError: as rename(2).
        Protected: the policy forbids it.
    """

    def change() -> None:
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
            _rename_diff(store, old, new, target, target_diff, aside)
        else:
            _rename_plain(store, old, new, plain, diff, target, target_diff, aside)
        if moves:
            store.repin([], unpin=moves)

    with_copies(store, change)


def _rename_plain(
    store: Store,
    old: Path,
    new: Path,
    plain: os.stat_result,
    diff: os.stat_result | None,
    target: os.stat_result | None,
    target_diff: os.stat_result | None,
    aside: Aside | None,
) -> None:
    if stat_module.S_ISDIR(plain.st_mode):
        if target is None and target_diff is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(new))
        os.rename(old, new)
        return
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    unneeded = None
    if target is not None and is_regular(target):
        unneeded = keep(store, new, is_diff=False, aside=aside)
    if diff is not None:  # it would be seen under the old name once the file that hides it is gone
        drop(store, diff_of(old), is_diff=True)
    entry = None
    if target_diff is not None:
        numbers = {**journal.marks("diff", target_diff), **journal.marks("plain", plain)}
        entry = journal.write(store, _FILE_OVER_DIFF, {"name": new}, numbers)
    try:
        _move_plain(store, old, new, plain)
        if target is not None and unneeded is not None:
            let_go(store, target, unneeded)
        if target_diff is not None:
            drop(store, diff_of(new), is_diff=True, aside=aside)
    finally:
        # After a failure that leaves the diff behind the file, the next start tries again.
        if entry is not None and not (entry.is_at("plain", new) and lstat(diff_of(new))):
            entry.end()


def _move_plain(store: Store, old: Path, new: Path, plain: os.stat_result) -> None:
    if stat_module.S_ISREG(plain.st_mode):
        with carried(store, old, new, *links_of(store, plain)):
            os.rename(old, new)
    else:
        os.rename(old, new)


def _rename_diff(
    store: Store,
    old: Path,
    new: Path,
    target: os.stat_result | None,
    target_diff: os.stat_result | None,
    aside: Aside | None,
) -> None:
    source, destination = diff_of(old), diff_of(new)
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    if target is None:
        unneeded = None
        if target_diff is not None:
            unneeded = keep(store, destination, is_diff=True, aside=aside)
        with carried(store, source, destination):
            os.rename(source, destination)
        if target_diff is not None and unneeded is not None:
            let_go(store, target_diff, unneeded)
        return
    if target_diff is not None:
        drop(store, destination, is_diff=True, aside=aside)
    numbers = {**journal.marks("diff", os.lstat(source)), **journal.marks("plain", target)}
    entry = journal.write(store, _DIFF_OVER_FILE, {"old": old, "new": new}, numbers)
    try:
        with carried(store, source, destination):
            try:
                os.link(source, destination)
            except OSError:
                os.rename(source, destination)
        _finish(store, old, new, aside)
    except OSError:
        _undo(old, new)
        raise
    finally:
        # After a failure that could not be undone either, the next start tries again.
        if not (lstat(source) and lstat(destination)):
            entry.end()


def _finish(store: Store, old: Path, new: Path, aside: Aside | None) -> None:
    """The diff stands under the new name, behind the file that it replaces: from here on it can only go forward."""
    drop(store, new, is_diff=False, aside=aside)
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


def _end_diff_over_file(store: Store, entry: journal.Entry) -> None:
    old, new = entry.places["old"], entry.places["new"]
    if not entry.is_at("diff", diff_of(new)):
        return
    if lstat(new) is not None:
        if not entry.is_at("plain", new):
            _undo(old, new)  # somebody gave the new name to another file since, or wrote to that one
            return
        drop(store, new, is_diff=False)
    if entry.is_at("diff", diff_of(old)):
        os.unlink(diff_of(old))


def _end_file_over_diff(store: Store, entry: journal.Entry) -> None:
    name = entry.places["name"]
    if entry.is_at("plain", name) and entry.is_at("diff", diff_of(name)):
        drop(store, diff_of(name), is_diff=True)


ENDINGS = {_DIFF_OVER_FILE: _end_diff_over_file, _FILE_OVER_DIFF: _end_file_over_diff}
"""What a start does, with the lock held, about each kind of renaming that a killed process began."""
