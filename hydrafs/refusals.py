"""Why a model is not dehydrated, or not without a warning.

Rule: what nobody asked for is not done in doubt; what somebody asked for is done, and the doubt is said.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hydrafs.committing import calm
from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX
from hydrafs.errors import NotFound, UsageError
from hydrafs.fileattributes import never_carried
from hydrafs.identity import FileIdentity
from hydrafs.keeping import KeptLinks
from hydrafs.layout import ByteSource
from hydrafs.leases import QuietFile
from hydrafs.needs import needs
from hydrafs.store import ModelEntry, Store
from hydrafs.suspect import Suspects, why_elsewhere

__all__ = ["all_quiet", "may_doubt", "needed_by", "other_link", "refuse", "room_for_ending", "stays_whole", "warnings"]


class _Wanted(Protocol):
    """Of ``hydrafs.dehydrate.Options``: what somebody asked for."""

    @property
    def bases(self) -> Sequence[Path]: ...
    @property
    def keep(self) -> bool: ...
    @property
    def all_or_nothing(self) -> bool: ...


def all_quiet(
    source: QuietFile,
    opened: Sequence[ByteSource],
    options: _Wanted,
    *,
    look: bool = False,
    renamed: bool = False,
) -> None:
    """Return if nobody could write to the model, or to what its diff is read from, since they were opened.

    Args:
        look: without the kernel's help, look through all processes now.
        renamed: the model has got another name since.

    Raises:
        Changing: somebody could; or nobody can tell, of a base that nobody named.
    """
    source.quiet.check("a model", look=look, renamed=renamed, doubt=True)
    calm(opened, look=look, doubt=may_doubt(options))


def may_doubt(options: _Wanted) -> bool:
    """Whether a base that nobody can tell of whether it is written to is taken: somebody has named it."""
    return bool(options.bases) and not options.all_or_nothing


def stays_whole(store: Store, source: QuietFile, needed: str, options: _Wanted) -> str:
    """Why the model is to stay as it is, before anything of it is read; empty where it may go. ``needed``: who needs
    it (``needed_by``)."""
    model = Path(source.path)
    if store.is_pinned(real_path(model)) and not options.keep:
        return "it is pinned; hydrafs bases --unpin lets it go"
    if needed and not options.keep and not options.bases:
        return f"{needed}; a base stays whole"
    never = () if options.keep else never_carried(source.fd)
    if never:
        return f"its attribute {never[0]} cannot be kept"
    return other_link(store, source.stat) if options.all_or_nothing else ""


def other_link(store: Store, stat: os.stat_result) -> str:
    """What another hard link of a model means for its space; empty where it has none but hydrafs' own."""
    others = stat.st_nlink - KeptLinks(store).count(stat) - 1
    if others < 1:
        return ""
    return "another hard link" + (f" ({others} of them)" if others > 1 else "") + " keeps its space"


def warnings(store: Store, entries: Sequence[ModelEntry], target: Path) -> tuple[str, ...]:
    """What somebody who asked for it should know of the parents that the model needs from now on, and of the place
    ``target`` of its diff."""
    found = []
    if entries and why_elsewhere(store, target.parent):
        found.append(
            f"{target} is on another filesystem than its store: while that is away nobody sees what it needs; "
            "remove none of its parents then, and run no hydrafs gc"
        )
    suspects = Suspects(store)
    for entry in entries:
        suspicion = suspects.of(entry.path)
        if suspicion is not None:
            found.append(f"{entry.name} is needed from now on, and may go away: {suspicion.reason}")
    return tuple(found)


def refuse(model: Path) -> None:
    """Return if the file is one that can be dehydrated.

    Raises:
        UsageError, NotFound: it is not.
    """
    if model.is_symlink():
        raise UsageError(
            "a link is no model",
            where=model,
            detail=f"it points to {real_path(model)}",
            remedy="name the file that it points to",
        )
    if not model.exists():
        if os.path.isfile(f"{model}{SUFFIX}"):
            raise UsageError("already dehydrated", where=model, remedy="hydrafs info shows what it holds")
        raise NotFound("no such model", where=model, remedy="check the path")
    if model.is_dir():
        raise UsageError(
            "a folder is no model",
            where=model,
            remedy=f"name the models in it; hydrafs watch {model} dehydrates what lands there",
        )
    if not model.is_file():
        raise UsageError("not a file", where=model, remedy="name a model")
    if model.name.endswith(SUFFIX):
        raise UsageError("already dehydrated", where=model, remedy="hydrafs info shows what it holds")


def room_for_ending(target: Path, model: Path) -> None:
    """Return if the diff's name is one that the filesystem takes.

    Raises:
        UsageError: it is too long.
    """
    try:
        os.lstat(target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            nbytes = len(os.fsencode(target.name))
            raise UsageError(
                "the name has no room for the ending",
                where=model,
                detail=f"{nbytes} bytes with {SUFFIX}, more than the filesystem takes",
                remedy="give the model a shorter name",
            ) from None


def needed_by(store: Store, model: Path, identity: FileIdentity) -> str:
    """Who needs a plain model, in words; empty where nobody does."""
    known = store.catalog.sha256(real_path(model), identity)
    # A model that was ever a parent has its SHA-256 in the catalog; only then are the diffs asked.
    need = needs(store).get(known) if known else None
    if need is None:
        return ""
    dependents = need.dependents or ["a retired model"]
    others = f" and {len(dependents) - 1} more" if len(dependents) > 1 else ""
    return f"{dependents[0]}{others} needs it"
