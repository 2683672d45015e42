"""A plain file takes the place of a diff, or a diff that of its original: one of them has the name all along.

Rule 1: a plain file wins over its diff. Copied up, a model is a plain file first and its diff goes after; dehydrated,
        its diff is there first and the original goes after. Both are there in between, and the journal says so: a diff
        that a user made on purpose beside a file looks the same, and is left alone.
Rule 2: an original leaves its name before it is looked at for the last time: who opens the name from then on gets the
        diff, so what was not written by then cannot be written any more. What was is brought back, at the next start
        too: a name in the journal is what leftovers are not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydrafs import journal, renaming
from hydrafs.errors import Changing, HydraError, from_oserror
from hydrafs.keeping import Aside, NeedsCopy, copy_among_retired, diff_of, drop, lstat, standing, with_copies
from hydrafs.leases import Lease
from hydrafs.store import PRIVATE, Store
from hydrafs.temporary import TemporaryFile, fsync_folder, remove_leftovers

__all__ = ["ASIDE", "Original", "left_names", "recover", "take_name"]

log = logging.getLogger(__name__)

_COPYING, _LEAVING = "copying-up", "leaving"
ASIDE = f"{PRIVATE}-aside-"
"""How the names of originals begin that have left theirs."""


# A plain file for a diff


def take_name(
    store: Store,
    temporary: TemporaryFile,
    listed: Path,
    *,
    instead_of: os.stat_result | None = None,
    aside: Aside | None = None,
) -> None:
    """Make ``temporary`` the plain file of a dehydrated model, and take its diff away. The lock is not held yet.

    Args:
        instead_of: the diff that it is made of. If that has lost the name meanwhile, nobody gets it.
        aside: where the diff can be had back from for a while: ``hydrafs.trash.put``.

    Raises:
        AlreadyThere: a plain file has the name.
        Changing: the diff that it was to replace is gone, or another one.
        OSError, HydraError: the diff still has the name, or will be gone at the next start.
    """
    temporary.flush_to_disk()  # what takes long, before the lock
    with store.lock():
        diff = standing(listed)[1]
        if instead_of is not None and (diff is None or not os.path.samestat(diff, instead_of)):
            raise Changing("a model was removed or replaced while it was made whole", where=listed)
        if diff is None:
            temporary.commit(listed)
            return
        numbers = {**journal.marks("diff", diff), **journal.marks("plain", os.fstat(temporary.file.fileno()))}
        entry = journal.write(store, _COPYING, {"name": listed, "temporary": temporary.path}, numbers)
        try:
            temporary.commit(listed)
        except BaseException:
            if not entry.is_at("plain", listed):
                entry.end()
            raise
        try:
            drop(store, diff_of(listed), is_diff=True, aside=aside)
        except NeedsCopy:
            pass  # without the lock
        else:
            entry.end()
            return
    with_copies(store, lambda: _end_copying(store, entry))
    entry.end()


def _end_copying(store: Store, entry: journal.Entry) -> None:
    name = entry.places["name"]
    if entry.is_at("plain", name):
        if entry.is_at("diff", diff_of(name)):
            drop(store, diff_of(name), is_diff=True)
    elif entry.is_at("plain", entry.places["temporary"]):
        os.unlink(entry.places["temporary"])  # it never got the name; its number may be another file's soon


# A diff for its original


@dataclass(frozen=True, slots=True)
class Original:
    """A plain model whose diff is about to take its place. Thread safety: none.

    Args:
        model: the plain file; the journal says what it was when it was read.
        diff: where its diff goes; not always beside it.
        had_diff: whether a diff of it was there already: the user's, which stays where this does not go through.
    """

    store: Store
    model: Path
    diff: Path
    had_diff: bool
    aside: Path
    entry: journal.Entry

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, store: Store, model: Path, diff: Path, temporary: TemporaryFile, stat: os.stat_result
    ) -> Iterator[Original]:
        """While the lock is held: commit the diff in here, and let the original go."""
        aside, had_diff = model.with_name(f"{ASIDE}{secrets.token_hex(8)}"), diff.exists()
        entry = journal.write(
            store,
            _LEAVING,
            {"name": model, "diff": diff, "aside": aside},
            {
                "plain": stat.st_ino, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "had_diff": int(had_diff),
                **journal.marks("diff", _flushed(temporary)),
            },
        )  # fmt: skip
        try:
            yield cls(store, model, diff, had_diff, aside, entry)
        finally:
            if not os.path.lexists(aside):  # else the next start has something to do
                entry.end()

    def give_up(self) -> None:
        """The original stays: nobody wants the diff behind it. Where it does not stand under its name, or nobody can
        tell, the diff is all that the model has, or the next start decides."""
        try:
            stands = lstat(self.model) is not None and self.entry.is_at("diff", self.diff)
        except OSError:
            return
        if stands and not self.had_diff:
            _take_back(self.store, self.entry)

    def go(self, check: Callable[[], None], last: Callable[[], None]) -> bool:
        """Remove the original if it is still the file that was read; a file that someone wrote meanwhile stays.

        Args:
            check: raises where it is not, before it leaves its name.
            last: the same, after that.

        Returns:
            Whether it is gone. If it was changed, the diff of what it was is gone instead.
        """
        try:
            try:
                check()
            except HydraError:
                if os.path.lexists(self.model):
                    self.give_up()
                raise
            self.model.rename(self.aside)
            try:
                if not _is_unchanged(self.aside, self.entry):
                    raise Changing("a model changed while it was read", where=self.model)
                last()
            except BaseException:
                _bring_back(self.aside, self.model)
                self.give_up()
                raise
            # Nobody sees its name. Tried twice; what cannot go even then goes at the next start.
            for _ in range(2):
                with contextlib.suppress(OSError):
                    self.aside.unlink(missing_ok=True)
            # It is gone, whatever the folder says: a power cut would bring back a name that a start looks into.
            with contextlib.suppress(OSError):
                fsync_folder(self.model.parent)
            return True
        except HydraError:
            return False
        except OSError as error:
            raise from_oserror(error, "the diff is stored, but the original cannot be removed", self.model) from error


def _flushed(temporary: TemporaryFile) -> os.stat_result:
    temporary.file.flush()
    return os.fstat(temporary.file.fileno())


def _bring_back(aside: Path, model: Path) -> None:
    """A write came in the middle, and wins: the file has its name again."""
    try:
        os.link(aside, model)
    except FileExistsError:
        pass  # a newer file has the name
    except OSError:
        if not os.path.lexists(model):
            aside.rename(model)
    with contextlib.suppress(OSError):
        aside.unlink()


def _end_leaving(store: Store, entry: journal.Entry) -> bool:
    """End it; whether it is ended, and not for ``hydrafs.asides`` to look into."""
    model, diff, aside = (entry.places[key] for key in ("name", "diff", "aside"))
    is_ours = entry.is_at("diff", diff)
    # The name of what stands aside is nobody else's. Another number: the store was copied, and so is everything else.
    stat = lstat(aside)
    if stat is not None and stat.st_ino != entry.numbers["plain"]:
        return False
    if stat is not None:
        # Who waited in open(2) for the worker's lease, or had the file open, may have written to it since.
        there = lstat(model)
        is_back = there is not None and os.path.samestat(there, stat)
        if is_ours and not is_back and _rests(aside, entry):
            return True
        _bring_back(aside, model)
    elif not _has_number(model, entry):
        return True  # the original is gone: the diff has its place
    # Beside an original that did not leave its name, the diff takes space for nothing, and the worker would take it
    # for the user's own. In another folder the model would be listed twice.
    if is_ours and not entry.numbers["had_diff"] and lstat(model) is not None:
        _take_back(store, entry)
    return True


def _has_number(path: Path, entry: journal.Entry) -> bool:
    now = lstat(path)
    return now is not None and now.st_ino == entry.numbers["plain"]


def left_names(store: Store) -> dict[str, Path]:
    """The names that originals had which left them, as far as a journal tells, by those that they stand aside with."""
    return {e.places["aside"].name: e.places["name"] for e in journal.entries(store) if e.kind == _LEAVING}


def _take_back(store: Store, entry: journal.Entry) -> None:
    """Remove a diff that is of no use beside its original; where that was written to, others may need the diff."""
    if _is_unchanged(entry.places["name"], entry):
        os.unlink(entry.places["diff"])
    else:
        drop(store, entry.places["diff"], is_diff=True)


def _is_unchanged(path: Path, entry: journal.Entry) -> bool:
    now = lstat(path)
    expected = tuple(entry.numbers[key] for key in ("plain", "size", "mtime_ns"))
    return now is not None and (now.st_ino, now.st_size, now.st_mtime_ns) == expected


def _rests(aside: Path, entry: journal.Entry) -> bool:
    """Remove an original of which the diff is there, unless it was changed or is open for writing; whether it went."""
    with contextlib.suppress(Changing), Lease(aside) as lease:
        if _is_unchanged(aside, entry):
            lease.check()
            aside.unlink()
            return True
    return False


# At a start


def recover(store: Store) -> None:
    """End what a killed process began, and remove its temporary files under ``.hydrafs``. Called at every start."""
    kinds = {_COPYING: _end_copying, _LEAVING: _end_leaving, **renaming.ENDINGS}
    uncopied: set[Path] = set()
    while True:
        wanted: list[Path] = []
        with store.lock():
            for entry in journal.pending(store):
                try:
                    if kinds[entry.kind](store, entry) is False:
                        continue
                except KeyError:
                    log.warning("a journal that cannot be meant is removed: %s", entry.path)
                except NeedsCopy as error:
                    wanted.append(error.path)
                    continue
                except (OSError, HydraError) as error:
                    log.error("cannot end what %s tells of (%s): %s", entry.path, entry.kind, error)
                    continue
                entry.end()
            for folder in (store.private, store.held, store.retired, store.trash):
                remove_leftovers(folder)
        if not set(wanted) - uncopied:
            return
        for path in wanted:
            uncopied.add(path)
            try:
                copy_among_retired(store, path)
            except (OSError, HydraError) as error:
                log.error("cannot keep %s among the retired: %s", path, error)
