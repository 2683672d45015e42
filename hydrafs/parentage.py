"""Which models a model is stored against, and the manifest that says so before it is coded.

Rule 1: a chain of parents is no longer than can be read, and never leads back to the model itself.
Rule 2: what somebody can write to is no parent that is found by itself (``hydrafs.leases``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hydrafs import bases
from hydrafs.catalog import ModelFacts
from hydrafs.choosing import features_of
from hydrafs.committing import disturbed
from hydrafs.encode import estimate
from hydrafs.errors import (
    HydraError,
    ParentLoop,
)
from hydrafs.explaining import explained
from hydrafs.identity import FileIdentity, sha256
from hydrafs.layout import FileSource, Layout, plain_text
from hydrafs.leases import QuietFile
from hydrafs.manifest import Manifest, Parent
from hydrafs.matching import Computed, Match, match
from hydrafs.openfiles import Writers
from hydrafs.opening import MAX_DEPTH, Opener
from hydrafs.plan import Plan, make_plan
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import ModelEntry, Store, trailer_of
from hydrafs.version import __version__

__all__ = ["check_chain", "chosen", "manifest_of", "named", "predicted"]

_COMPARED = 9
_COMPARED_NBYTES = 4096


def named(store: Store, paths: Sequence[Path]) -> bases.Choice:
    """The models at these paths, whatever they resemble.

    Raises:
        HydraError: one of them is none, or cannot be read.
    """
    candidates = []
    for path in paths:
        entry = store.locate(path)
        if entry.is_diff:
            facts, _ = bases.facts_of_diff(store, entry.path)
        else:
            facts = bases.facts_of_file(store, entry.path)
        candidates.append(bases.Candidate(entry, facts))
    reason = "base as named: " + ", ".join(c.entry.name for c in candidates)
    return bases.Choice(tuple(candidates), (reason,), tuple(candidates))


def chosen(
    store: Store,
    opener: Opener,
    source: QuietFile,
    layout: Layout,
    facts: ModelFacts,
    *,
    exclude: Sequence[Path],
    refused: Callable[[Path], str],
    chunk_nbytes: int,
) -> tuple[bases.Choice, dict[str, Writers]]:
    """What is found by itself, and what would have been found if nobody could write to it.

    Args:
        exclude, refused: see ``hydrafs.bases.choose``; the model itself is excluded.
    """
    passed_over: dict[str, Writers] = {}
    paths: list[Path] = []
    while True:
        choice = bases.choose(
            store,
            opener,
            source,
            facts,
            exclude=(Path(source.path), *exclude, *paths),
            evaluate=lambda candidate: _evaluate(opener, source, layout, facts, candidate, chunk_nbytes),
            refused=refused,
        )
        more = []
        for candidate in choice.parents:
            with contextlib.suppress(HydraError), contextlib.closing(opener.open(candidate.entry)) as parent:
                path, found = disturbed([parent])
                if path:
                    passed_over[path] = found
                    more.append(candidate.entry.path)
        if not more or set(more) <= set(paths):
            break
        paths += more
    told = (f"{store.relative(Path(path))} is no base now: {found.value}" for path, found in passed_over.items())
    return replace(choice, reasons=(*choice.reasons, *told)), passed_over


def predicted(
    store: Store, opener: Opener, source: FileSource, layout: Layout, facts: ModelFacts, choice: bases.Choice
) -> tuple[list[ModelEntry], list[Match | Computed | None]]:
    """The parents that are used, and what predicts each tensor: a parent's, or a formula where the model is a merge."""

    def open_model(candidate: bases.Candidate) -> FileSource | Rehydrated | None:
        with contextlib.suppress(HydraError):
            parent = opener.open(candidate.entry)
            try:
                check_chain(source, [parent])
                if disturbed([parent])[1] is Writers.NOBODY:
                    return parent
            except HydraError:
                pass
            parent.close()
        return None

    def sha256_of(candidate: bases.Candidate) -> bytes | None:
        path = candidate.entry.path
        with contextlib.suppress(HydraError, OSError):
            if candidate.entry.is_diff:
                return trailer_of(path).sha256
            return store.catalog.sha256(path, FileIdentity.of(path.stat()))
        return None

    parents, matches = explained(source, layout.metadata, facts, choice, open_model, sha256_of)
    return [c.entry for c in parents], matches


def manifest_of(source: FileSource, name: str, layout: Layout, plan: Plan, parents: Sequence[Parent]) -> Manifest:
    """The manifest as it is known before the model has been read: all but its SHA-256."""
    return Manifest(
        required=features_of(plan),
        name=plain_text(name),
        size=source.size,
        sha256=bytes(32),
        mode=source.stat.st_mode,
        mtime_ns=source.stat.st_mtime_ns,
        container=layout.container,
        chunk_nbytes=plan.chunk_nbytes,
        parents=tuple(parents),
        sections=plan.sections,
        spans=plan.spans,
        metadata=layout.metadata,
        writer=f"hydrafs {__version__}",
        formulas=plan.formulas,
    )


def _evaluate(
    opener: Opener, source: FileSource, layout: Layout, facts: ModelFacts, candidate: bases.Candidate, chunk_nbytes: int
) -> float:
    """What share of the model would be stored against a candidate; all of it where the candidate cannot serve."""
    matches = match(facts, [candidate.facts])
    try:
        with contextlib.closing(opener.open(candidate.entry)) as parent:
            check_chain(source, [parent])
            plan = make_plan(source, layout, matches, chunk_nbytes=chunk_nbytes)
            record = Parent(bytes(32), parent.size, candidate.entry.name, 0)
            return estimate(source, plan, [parent], manifest_of(source, candidate.entry.name, layout, plan, [record]))
    except HydraError:
        return 1.0


def check_chain(source: FileSource, opened: Sequence[FileSource | Rehydrated]) -> None:
    """Refuse a chain of parents that is too long, or that leads back to the model itself: to its file, or to a diff of
    the same content, as a diff cannot need a model of its own SHA-256."""
    pending = [(parent, 2) for parent in opened]
    while pending:
        parent, depth = pending.pop()
        if isinstance(parent, Rehydrated) and depth > MAX_DEPTH:
            raise ParentLoop(
                "the chain of parents would be too long",
                where=source.path,
                detail=f"at most {MAX_DEPTH}",
                remedy="name a full model with --base",
            )
        if isinstance(parent, Rehydrated):
            if _is_copy(source, parent):
                raise ParentLoop(
                    "a model cannot be stored against a diff of the same content",
                    where=source.path,
                    detail=f"{parent.diff.path} is a copy of it, or of what it needs",
                    remedy="name another base, or remove one of the copies",
                )
            pending += [(p.source, depth + 1) for p in parent.parents if isinstance(p.source, FileSource | Rehydrated)]
        elif (parent.stat.st_dev, parent.stat.st_ino) == (source.stat.st_dev, source.stat.st_ino):
            raise ParentLoop(
                "a model cannot be stored against itself",
                where=source.path,
                detail="it is needed to read the base",
                remedy="name another base",
            )


def _is_copy(source: FileSource, other: Rehydrated) -> bool:
    """Whether a diff stands for the very bytes of ``source``. Fine-tunes of one base have one size: most are told apart
    by a few blocks, and none is hashed for it."""
    if other.size != source.size:
        return False
    for part in range(_COMPARED):
        offset = max(0, source.size - _COMPARED_NBYTES) * part // (_COMPARED - 1)
        if source.pread(offset, _COMPARED_NBYTES) != other.pread(offset, _COMPARED_NBYTES):
            return False
    return _sha256_of(source) == other.manifest.sha256


@functools.lru_cache(maxsize=1)
def _sha256_of(source: FileSource) -> bytes:
    return sha256(source)
