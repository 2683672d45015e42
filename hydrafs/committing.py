"""What must hold when a diff takes its name and its original goes: nobody wrote, nobody needs it, its parents stay.

Rule 1: two processes that store two models against each other do not both remove an original.
Rule 2: every file that a diff is read from is held by a link before the diff has its name.
Rule 3: nobody can write to any of these files from before the model is coded until its original is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydrafs import keeping
from hydrafs.errors import Changing, from_oserror, has_no_locks
from hydrafs.identity import is_unchanged
from hydrafs.layout import ByteSource, FileSource
from hydrafs.leases import QuietFile
from hydrafs.manifest import Parent
from hydrafs.openfiles import Writers
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import ModelEntry, Store
from hydrafs.suspect import why_not_held

__all__ = ["all_stand", "calm", "disk_errors", "disturbed", "hold", "keep_parents", "may_go", "unchanged"]


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Errors of the operating system while ``target`` is written, as ours."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, "cannot write the diff", target) from error


def unchanged(model: Path, source: FileSource) -> None:
    """Return if nobody has written to the file that is read, nor given its name to another.

    Raises:
        Changing: somebody has.
    """
    try:
        now = (os.stat(model), os.fstat(source.fd))
    except OSError as error:
        raise Changing("a model went away while it was read", where=model) from error
    if not all(is_unchanged(source.stat, stat) for stat in now):
        raise Changing("a model changed while it was read", where=model)


def _plain_files(opened: Sequence[ByteSource]) -> list[FileSource]:
    """Every full file that the open parents, their parents included, are read from."""
    found: list[FileSource] = []
    pending = list(opened)
    while pending:
        parent = pending.pop()
        if isinstance(parent, FileSource):
            found.append(parent)
        elif isinstance(parent, Rehydrated):
            pending += [p.source for p in parent.parents]
    return found


def calm(opened: Sequence[ByteSource], *, look: bool = False, doubt: bool = False) -> None:
    """Return if nobody could write to a file that the open parents are read from at any moment since it was opened.

    Args:
        look: without the kernel's help, look through all processes now.
        doubt: that nobody can tell is no error.

    Raises:
        Changing: somebody could, or nobody can tell.
    """
    for file in _plain_files(opened):
        if isinstance(file, QuietFile):
            file.quiet.check(look=look, doubt=doubt)


def disturbed(opened: Sequence[ByteSource]) -> tuple[str, Writers]:
    """The first file that the open parents are read from which somebody can write to, or of which nobody can tell, and
    which of both; empty where all are quiet."""
    for file in _plain_files(opened):
        if isinstance(file, QuietFile):
            found = Writers.SOMEBODY if file.quiet.was_broken else file.quiet.writers
            if found is not Writers.NOBODY:
                return file.path, found
    return "", Writers.NOBODY


def hold(opened: Sequence[ByteSource]) -> None:
    """Keep other processes from removing the parents' originals while they are parents here (``may_go``)."""
    for file in _plain_files(opened):
        with contextlib.suppress(OSError):  # a filesystem without locks, or a lock that is held: see may_go
            fcntl.flock(file.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _stands(path: str, stat: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), stat)
    except OSError:
        return False


def all_stand(opened: Sequence[ByteSource]) -> None:
    """Return if every file that the open parents are read from, diffs among them, still stands under its name; the
    caller holds the store's lock. What does not may be gone for good: nobody needed it until now.

    Raises:
        Changing: one does not.
    """
    pending = list(opened)
    while pending:
        parent = pending.pop()
        if isinstance(parent, Rehydrated):
            pending += [p.source for p in parent.parents]
            path, stat = os.fspath(parent.diff.path), parent.diff.stat
        elif isinstance(parent, FileSource):
            path, stat = parent.path, parent.stat
        else:
            continue
        if not _stands(path, stat):
            raise Changing("what a model is stored against was removed or replaced meanwhile", where=path)


def may_go(source: FileSource, opened: Sequence[ByteSource]) -> bool:
    """Whether the original may be removed: no other process is storing a model against it at this moment, and the full
    files that its diff is read from still stand under their names.

    Two processes that store two models against each other would each prove a diff while both originals are there. Each
    holds its parents with a shared lock from before the proof on, so neither gets the exclusive lock on its original.
    """
    try:
        fcntl.flock(source.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Without locks here, or with none for a file that is only read (NFS), what stands is still looked at, while
        # the store's own lock is held.
        if not has_no_locks(error):
            return False
    return all(_stands(file.path, file.stat) for file in _plain_files(opened))


def keep_parents(
    store: Store, entries: Sequence[ModelEntry], parents: Sequence[Parent], opened: Sequence[ByteSource]
) -> list[str]:
    """Hold every file that the diff will be read from, so that it outlives its name; the caller holds the store's lock.

    Args:
        entries, parents: the models, and what the manifest calls them.
        opened: the same, open, or those of them that are diffs.

    Returns:
        Those that cannot be held, with why: nothing but their names keeps them.
    """
    unheld: list[str] = []

    def hold_one(path: Path, sha256: bytes) -> None:
        if not keeping.hold(store, path, sha256):
            why = why_not_held(store, path) or "its filesystem does not let it be linked"
            unheld.append(f"{store.relative(path)} cannot be held: {why}")

    for entry, parent in zip(entries, parents, strict=True):
        hold_one(entry.path, parent.sha256)
    pending = [parent for parent in opened if isinstance(parent, Rehydrated)]
    while pending:
        diff = pending.pop()
        for record, open_parent in zip(diff.manifest.parents, diff.parents, strict=True):
            if isinstance(open_parent.source, Rehydrated):
                hold_one(Path(open_parent.source.diff.path), record.sha256)
                pending.append(open_parent.source)
            elif isinstance(open_parent.source, FileSource):
                hold_one(Path(open_parent.source.path), record.sha256)
    return unheld
