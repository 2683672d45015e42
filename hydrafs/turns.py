"""Whose turn it is: which models rest, which are tried next and against what, and what is tried again later.

Rule 1: a model is stored against older ones only; it is not taken for what an older one was made from.
Rule 2: what may pass by itself (a full disk, too many open files) is no reason to leave a model alone for good.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydrafs import covered
from hydrafs.errors import HydraError, printable
from hydrafs.identity import FileIdentity
from hydrafs.layout import plain_text
from hydrafs.store import Store
from hydrafs.survey import PlainModel, Survey
from hydrafs.tried import Tried

__all__ = ["Seen", "is_another", "not_bases_of", "passes", "some", "tending_state", "told_of", "wanted"]

_MAX_NAMED = 20
_PASSING = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETXTBSY,
     errno.EROFS, errno.ETIMEDOUT, errno.EHOSTDOWN)
)  # fmt: skip


@dataclass(slots=True)
class Seen:
    """A plain model as it was last looked at, and since when it is what it is. ``refused``: how often in a row it could
    not be had since, and why; ``until``, ``seconds``: when it is tried again at the earliest, and what was waited."""

    identity: FileIdentity
    since: float
    refused: int = 0
    why: str = ""
    until: float = 0.0
    seconds: float = 0.0


def is_another(old: FileIdentity, new: FileIdentity) -> bool:
    """Whether a file was written to or replaced; a link that holds it changes its ctime only."""
    return (old.size, old.mtime_ns, old.inode, old.device) != (new.size, new.mtime_ns, new.inode, new.device)


def wanted(models: Sequence[PlainModel], tried: Tried) -> list[tuple[PlainModel, frozenset[str]]]:
    """Those that are to be dehydrated, and were not tried yet as they are against what is there, each with the names
    of that. One in whose midst the worker has died comes after all others."""
    whole = {m.name for m in models if m.stays and m.is_base}
    older: set[str] = set()
    turns = []
    for model in models:
        if not model.stays:
            company = frozenset(older | whole)
            if not tried.is_settled(model.name, model.identity, company):
                turns.append((model, company))
        if model.is_base and not _has_killed(model, tried):
            older.add(model.name)
    return sorted(turns, key=lambda turn: tried.deaths(turn[0].name, turn[0].identity))


def not_bases_of(model: PlainModel, models: Sequence[PlainModel], tried: Tried) -> list[Path]:
    """What ``model`` is not stored against: no model that is as old as it, because that will be dehydrated itself; and
    none in whose midst the worker has died."""
    newer = [m for m in models if (m.mtime_ns, m.name) > (model.mtime_ns, model.name) and not m.stays]
    return [m.path for m in newer] + [m.path for m in models if m is not model and _has_killed(m, tried)]


def _has_killed(model: PlainModel, tried: Tried) -> bool:
    return tried.deaths(model.name, model.identity) > 0


def passes(error: BaseException | None) -> bool:
    """Whether what stood in the way is the disk's or the system's, and may be gone later."""
    while error is not None:
        if isinstance(error, OSError | HydraError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False


def told_of(error: Exception) -> str:
    """What went wrong, on one line."""
    text = str(error) if isinstance(error, HydraError) else f"{type(error).__name__}: {error}"
    return plain_text(covered.shown(printable(text)))


def some(reasons: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Some of the reasons, by name, as text that a status can hold."""
    return tuple(sorted((plain_text(n), plain_text(why)) for n, why in reasons.items())[:_MAX_NAMED])


def tending_state(store: Store, seen: Survey) -> object:
    """What is another once names in the store's folders, or what is kept, have changed; and each hour, since what is in
    the trash gets old."""
    kept = [int(time.time() // 3600)]
    for folder in (store.held, store.retired, store.trash):
        try:
            kept.append(os.stat(folder).st_mtime_ns)
        except OSError:
            kept.append(0)
    return kept, seen.folders
