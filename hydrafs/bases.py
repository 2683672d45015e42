"""Finding what a model can be stored against: the best base, and others for the parts that it does not cover.

Plan: the catalog's fingerprints rank the store's plain models; some chunks are coded against the best few, and
the sizes decide; a diff may be a parent where it is clearly better; what the winner leaves unpredicted is looked for in
the rest.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydrafs import containers, predictors
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.diff import DiffFile
from hydrafs.dtypes import DTYPES
from hydrafs.errors import Changing, HydraError
from hydrafs.fingerprint import bits_apart, facts_of
from hydrafs.identity import FileIdentity
from hydrafs.layout import ByteSource, FileSource, read_exactly
from hydrafs.manifest import Manifest
from hydrafs.matching import USELESS, Match, match
from hydrafs.opening import Opener
from hydrafs.store import ModelEntry, Store

log = logging.getLogger(__name__)

FINALISTS = 4
DIFF_CANDIDATES = 32
DIFF_FINALISTS = 2
MAX_PARENTS = 4
WORTH_A_PARENT_NBYTES = 64 << 10
"""A further parent is something more that must not be lost: it has to predict at least this much."""
_RESEMBLES = 0.9
_PIECES = 256
_DIFF_MUST_BE = 0.75
_NAMED = 3
_SAMPLED_TENSORS = 12
_SAMPLE_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may serve as a parent. ``facts.tensors`` of a diff may lack fingerprints."""

    entry: ModelEntry
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Choice:
    """The parents chosen, best first, and why, one line each for the user. ``considered``: all that resemble the model
    by their fingerprints, and files of other kinds that may be a part of it, the most alike first."""

    parents: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    considered: tuple[Candidate, ...] = ()


def facts_of_file(store: Store, path: Path, source: FileSource | None = None) -> ModelFacts:
    """The facts of a plain model, from the catalog or read now.

    Raises:
        HydraError: it cannot be read.
    """
    opened = source or FileSource(path)
    try:
        identity = FileIdentity.of(opened.stat)
        facts = store.catalog.facts(path, identity)
        if facts is None:
            facts = facts_of(opened, containers.parse(opened, path.name))
            store.catalog.remember_facts(path, identity, facts)
        return facts
    finally:
        if source is None:
            opened.close()


def facts_of_diff(store: Store, path: Path) -> tuple[ModelFacts, Manifest]:
    """The facts of the model that a diff stands for: from the catalog, or from its manifest without fingerprints."""
    with DiffFile(path) as diff:
        manifest = diff.manifest
        known = store.catalog.facts(path, FileIdentity.of(diff.stat))
        if known is not None:
            return known, manifest
        offsets = diff.table.offsets.tolist()
        tensors = []
        for number, span in enumerate(manifest.spans):
            dtype = manifest.sections[span.section].dtype
            if dtype and span.name:
                tensors.append(
                    TensorFacts(span.name, dtype, span.shape, offsets[number], span.nbytes, span.aliases, b"")
                )
        return ModelFacts(manifest.container, tuple(tensors)), manifest


def choose(
    store: Store,
    opener: Opener,
    target: ByteSource,
    facts: ModelFacts,
    *,
    exclude: Sequence[Path],
    evaluate: Callable[[Candidate], float],
    refused: Callable[[Path], str] = lambda path: "",
) -> Choice:
    """The best parents for ``target`` among the models of the store and its base folders.

    Args:
        exclude: the model itself, and plain files that will not stay.
        evaluate: what share of the model would be stored against a candidate; asked of the few that look best. A
            candidate that it fails for, in whatever way, is none.
        refused: why a file is no base (``hydrafs.suspect``), empty where it is one. Where it resembles the model, a
            line says so.

    Nothing found is a choice too: no parents, and a line that says so.
    """
    plain, diffs, suspects = _candidates(store, exclude, refused)
    covered = [(coverage(facts, match(facts, [c.facts])), c) for c in plain]
    alike = sorted((item for item in covered if item[0] < _RESEMBLES), key=lambda item: item[0])
    not_taken = [
        f"{c.entry.name} resembles it, and is no base: {reason}"
        for c, reason in suspects
        if coverage(facts, match(facts, [c.facts])) < _RESEMBLES
    ][:_NAMED]
    resembling = [c for _, c in alike[:FINALISTS]]
    scored = sorted(((_cost(evaluate, c), c) for c in resembling), key=lambda item: item[0])
    considered = len(plain) + len(diffs[:DIFF_CANDIDATES])
    sampled = []
    for entry in diffs[:DIFF_CANDIDATES]:
        with contextlib.suppress(HydraError, OSError):
            theirs, _ = facts_of_diff(store, entry.path)
            share = coverage(facts, match(facts, [theirs]))
            if share < _RESEMBLES:
                candidate = Candidate(entry, theirs)
                alike.append((share, candidate))
                sampled.append((sampled_cost(target, facts, candidate, opener), candidate))
    for _, candidate in sorted(sampled, key=lambda item: item[0])[:DIFF_FINALISTS]:
        share = _cost(evaluate, candidate)
        # One more step in the chain costs time at every read, and one more file that must not be lost.
        if share < _DIFF_MUST_BE * (scored[0][0] if scored else 1.0):
            scored.insert(0, (share, candidate))
    # A LoRA resembles nothing, and may be what was added to a model.
    parts = (c for c in plain if any("lora" in t.name for t in c.facts.tensors[:64]))
    everything = (*(c for _, c in sorted(alike, key=lambda item: item[0])), *parts)
    if not scored:
        pieces = [c for share, c in sorted(covered, key=lambda item: item[0])[:_PIECES] if share < 1.0]
        if len(pieces) > MAX_PARENTS and coverage(facts, match(facts, [c.facts for c in pieces])) < _RESEMBLES:
            reason = f"no base: {len(pieces)} models are each a small part of it: at most {MAX_PARENTS} parents"
            return Choice((), (reason, *not_taken), everything)
        return Choice((), (f"no base: none of {considered} models resembles it", *not_taken), everything)
    best = scored[0][1]
    reason = f"base {best.entry.name}: about {scored[0][0]:.1%} of the model is new"
    if len(scored) > 1:
        reason += f" (next best {scored[1][1].entry.name}, {scored[1][0]:.1%}; {considered} considered)"
    parents, reasons = [best], [reason, *not_taken]
    _add_further(facts, parents, [c for c in plain if c is not best], reasons)
    return Choice(tuple(parents), tuple(reasons), everything)


def _cost(evaluate: Callable[[Candidate], float], candidate: Candidate) -> float:
    """What ``evaluate`` says; all of the model where it fails: a candidate's trouble is not the model's."""
    try:
        return evaluate(candidate)
    except Changing:
        raise  # the model itself is being written to, or the work is to end
    except Exception as error:
        log.info("%s serves as no base: %s", candidate.entry.path, error)
        return 1.0


def _candidates(
    store: Store, exclude: Sequence[Path], refused: Callable[[Path], str]
) -> tuple[list[Candidate], list[ModelEntry], list[tuple[Candidate, str]]]:
    """The plain models with their facts, the diffs, the newest first, and the plain ones that are refused, with why;
    each file once, whatever its names."""
    plain: list[Candidate] = []
    diffs: list[tuple[int, ModelEntry]] = []
    suspects: list[tuple[Candidate, str]] = []
    seen: set[tuple[int, int]] = set()
    for path in exclude:
        with contextlib.suppress(OSError):
            stat = path.stat()
            seen.add((stat.st_dev, stat.st_ino))
    for entry in store.candidates():
        try:
            stat = entry.path.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            reason = refused(entry.path)
            if reason:  # not by this name; it may have another
                if not entry.is_diff:
                    suspects.append((Candidate(entry, facts_of_file(store, entry.path)), reason))
                continue
            seen.add((stat.st_dev, stat.st_ino))
            if entry.is_diff:
                diffs.append((stat.st_mtime_ns, entry))
            else:
                plain.append(Candidate(entry, facts_of_file(store, entry.path)))
        except Exception as error:  # whatever one file of the store raises, the others may serve
            log.debug("%s serves as no base: %s", entry.path, error)
    return plain, [entry for _, entry in sorted(diffs, key=lambda item: -item[0])], suspects


def _add_further(facts: ModelFacts, parents: list[Candidate], others: list[Candidate], reasons: list[str]) -> None:
    while others:
        now = match(facts, [c.facts for c in parents])
        gains = []
        for other in others:
            then = match(facts, [*(c.facts for c in parents), other.facts])
            number = len(parents)
            gained = sum(
                t.nbytes
                for t, old, new in zip(facts.tensors, now, then, strict=True)
                if new and new.parent == number and (old is None or new.distance < old.distance - 1)
            )
            gains.append(gained)
        most = int(np.argmax(gains))
        if gains[most] < WORTH_A_PARENT_NBYTES:
            return
        if len(parents) >= MAX_PARENTS:
            reasons.append(_lack(now, others[most].entry.name))
            return
        reasons.append(f"also {others[most].entry.name}: closer for {gains[most] / 1e6:.1f} MB")
        parents.append(others.pop(most))


def _lack(matches: Sequence[Match | None], further: str) -> str:
    """Why a model is larger than it might be: there are more models that it is made of than parents that it gets."""
    lacking = sum(found is None for found in matches)
    if not lacking:
        return f"{further} would be closer for some tensors: at most {MAX_PARENTS} parents"
    return f"{lacking} of {len(matches)} tensors have no parent: at most {MAX_PARENTS} parents"


def coverage(facts: ModelFacts, matches: Sequence[Match | None]) -> float:
    """A rough share of the model that must be stored, from fingerprints alone: 0 nothing, 1 all of it."""
    total = cost = 0.0
    for tensor, found in zip(facts.tensors, matches, strict=True):
        total += tensor.nbytes
        distance = USELESS if found is None or found.parent < 0 else min(USELESS, found.distance)
        cost += tensor.nbytes * distance / USELESS
    return cost / total if total else 1.0


def sampled_cost(target: ByteSource, facts: ModelFacts, candidate: Candidate, opener: Opener) -> float:
    """The mean share of bits that samples of the largest matched tensors need, given the candidate's; 1 where it has
    none. Two reads of 4 KiB from each side per tensor. A candidate that cannot be read costs 1."""
    matches = match(facts, [candidate.facts])
    pairs = [(t, m) for t, m in zip(facts.tensors, matches, strict=True) if m and m.parent == 0]
    if not pairs:
        return 1.0
    pairs.sort(key=lambda pair: -pair[0].nbytes)
    step = max(1, len(pairs) // (2 * _SAMPLED_TENSORS))
    covered = sum(t.nbytes for t, _ in pairs) / max(1, sum(t.nbytes for t in facts.tensors))
    try:
        source = opener.open(candidate.entry)
    except HydraError:
        return 1.0
    costs = []
    try:
        for tensor, found in pairs[::step][:_SAMPLED_TENSORS]:
            dtype, origin = DTYPES[tensor.dtype], DTYPES[found.dtype]
            for part in (1, 3):
                first = found.count * part // 4
                count = min(found.count - first, _SAMPLE_NBYTES // dtype.nbytes)
                mine = read_exactly(target, tensor.offset + first * dtype.nbytes, count * dtype.nbytes)
                theirs = read_exactly(source, found.offset + first * origin.nbytes, count * origin.nbytes)
                predicted = predictors.cast(np.frombuffer(theirs, np.uint8), origin, dtype)
                costs.append(bits_apart(predicted, np.frombuffer(mine, np.uint8), dtype))
    except HydraError:
        return 1.0
    finally:
        source.close()
    return float(np.mean(costs)) * covered + 1.0 - covered if costs else 1.0
