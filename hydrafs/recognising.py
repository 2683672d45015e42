"""Finding out that a model was computed from others, and from which.

Plan: samples of what no single parent explains are compared with the same places of every model that may be a parent
(``merging.find_parents``). Which formula each tensor follows is then for ``assigning`` to say.
Rule: a model that is no merge costs a few small reads from each candidate, and nothing else changes for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from hydrafs import merging, predictors
from hydrafs.assigning import Assembly, Recognised, Target, aligned, elements_of, read_runs, small_runs
from hydrafs.bases import Candidate
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.errors import HydraError
from hydrafs.formulas import REAL
from hydrafs.layout import ByteSource
from hydrafs.manifest import SELF
from hydrafs.matching import Match, NameIndex
from hydrafs.merging import Words

MAX_CANDIDATES = 256
"""How many models are read from; the catalog's fingerprints rank them."""
_WORTH_A_LOOK = 0.02
_NEARLY_NOTHING = 1e-4
"""What may be left of a model, as a share of its bits, for no further parents to be tried."""
_TENSORS = 20
_ELEMENTS = 256
_RECIPE_HASHES = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")

Open = Callable[[Candidate], ByteSource | None]
"""Opens a candidate to read from; ``None`` where it cannot serve as a parent."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a model's metadata says of its making: parents by SHA-256 or by file name, and the numbers used."""

    sha256s: frozenset[bytes] = frozenset()
    names: frozenset[str] = frozenset()
    numbers: tuple[float, ...] = ()


def hints_of(metadata: Sequence[tuple[str, str]]) -> Hints:
    """What A1111 and Forge write into a merged safetensors file (``sd_merge_recipe``, ``sd_merge_models``: JSON)."""
    strings = dict(metadata)
    recipe, models = (_json_object(strings.get(key, "")) for key in ("sd_merge_recipe", "sd_merge_models"))
    texts = [recipe.get(key) for key in _RECIPE_HASHES]
    hashes = {text for text in (*texts, *models) if isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text)}
    # The parents of parents stand there too; the recipe, where it is, names those that were merged last.
    if any(isinstance(text, str) for text in texts):
        hashes &= {text for text in texts if isinstance(text, str)}
    names = {m["name"] for h, m in models.items() if isinstance(m, dict) and isinstance(m.get("name"), str)}
    number = recipe.get("multiplier")
    numbers = (float(number), 1 - float(number)) if isinstance(number, int | float) and abs(number) < 100 else ()
    return Hints(frozenset(map(bytes.fromhex, hashes)), frozenset(names), numbers)


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeError):
        found = msgspec.json.decode(text)
        if isinstance(found, dict):
            return found
    return {}


def recognise(
    source: ByteSource,
    facts: ModelFacts,
    parents: Sequence[Candidate],
    matches: Sequence[Match | None],
    candidates: Sequence[Candidate],
    open_model: Open,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    sha256_of: Callable[[Candidate], bytes | None] = lambda candidate: None,
) -> Recognised | None:
    """How the model at ``source`` is computed from others, or ``None`` where that would not save a quarter of it.

    Args:
        facts: of the model.
        parents: what it would be stored against, and ``matches`` how, one per tensor.
        candidates: the models that it may be made of, the most alike first.
        metadata: the strings that its container carries.
        sha256_of: what is known of a candidate.

    Raises:
        HydraError: the model itself cannot be read.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[int, ByteSource | None] = {}

        def held(candidate: Candidate) -> ByteSource | None:
            if id(candidate) not in opened:
                opened[id(candidate)] = found = open_model(candidate)
                if found:
                    stack.callback(found.close)
            return opened[id(candidate)]

        target = Target(source, facts)
        unexplained = _unexplained(target, matches, [held(p) for p in parents])
        if not unexplained:
            return None
        hints = hints_of(metadata)
        found: list[_Makers] = []
        if hints.sha256s or hints.names:
            named = [c for c in candidates if c.entry.path.name in hints.names or sha256_of(c) in hints.sha256s]
            found = _find(target, unexplained, named, open_model)
        if not found:
            found = _find(target, unexplained, candidates[:MAX_CANDIDATES], open_model)
        best: Recognised | None = None
        for makers, free in found:
            every = [*makers, *(p for p in parents if all(p is not m for m in makers))]
            sources = [held(c) for c in every]
            if any(s is None for s in sources):
                continue
            moved = [_renumbered(m, parents, every) for m in matches]
            work = Assembly(target, every, [s for s in sources if s], len(makers), moved, free, hints.numbers)
            result = work.result()
            if result and (best is None or result.left < best.left):
                best = result
            if best and best.left < _NEARLY_NOTHING:
                break
        return best


_Makers = tuple[list[Candidate], bool]
"""The models that a model may be made of, in no meaningful order, and whether their weights are free."""


def _renumbered(found: Match | None, parents: Sequence[Candidate], every: Sequence[Candidate]) -> Match | None:
    if found is None or found.parent == SELF:
        return found
    return replace(found, parent=next(i for i, c in enumerate(every) if c is parents[found.parent]))


def _unexplained(target: Target, matches: Sequence[Match | None], sources: Sequence[ByteSource | None]) -> list[int]:
    """The tensors of real numbers that are not simply those of a parent; none where they are little of the model."""
    found = []
    total = 0
    for number, (tensor, how) in enumerate(zip(target.facts.tensors, matches, strict=True)):
        total += tensor.nbytes
        if tensor.dtype not in REAL or (how is not None and how.parent == SELF):
            continue
        origin = sources[how.parent] if how else None
        if how and origin and how.count == elements_of(tensor):
            runs = small_runs(how.count)
            theirs = predictors.cast(
                read_runs(origin, how.offset, how.dtype, runs), DTYPES[how.dtype], DTYPES[tensor.dtype]
            )
            if np.array_equal(theirs, target.sample(number, runs)):
                continue
        found.append(number)
    share = sum(target.facts.tensors[i].nbytes for i in found) / max(1, total)
    return found if share >= _WORTH_A_LOOK else []


# Which models


def _find(
    target: Target, unexplained: Sequence[int], candidates: Sequence[Candidate], open_model: Open
) -> list[_Makers]:
    """Which models may explain the model together, the fewest first."""
    if len(candidates) < 2:
        return []
    tensors = target.facts.tensors
    large = sorted(unexplained, key=lambda i: -tensors[i].nbytes)[: max(_TENSORS, len(unexplained) // 2)]
    chosen = sorted(large)[:: max(1, len(large) // _TENSORS)][:_TENSORS]
    own = [target.sample(i, small_runs(elements_of(tensors[i]))) for i in chosen]
    kept: list[Candidate] = []
    samples: list[list[merging.Numbers]] = []
    seen: set[bytes] = set()
    for candidate in candidates:
        raws = _candidate_samples([tensors[i] for i in chosen], candidate, open_model)
        if raws is None:
            continue
        numbers = [merging.numbers_of(raw, dtype) if raw is not None else None for raw, dtype in raws]
        digest = hashlib.sha256(b"".join(n.tobytes() if n is not None else b"-" for n in numbers)).digest()
        mine = all(
            n is not None and np.array_equal(n, merging.numbers_of(o, tensors[i].dtype), equal_nan=True)
            for n, o, i in zip(numbers, own, chosen, strict=True)
        )
        if digest in seen or mine:  # a copy of another candidate, or of the model itself
            continue
        seen.add(digest)
        kept.append(candidate)
        samples.append(
            [
                n if n is not None else np.zeros(o.size // DTYPES[tensors[i].dtype].nbytes)
                for n, o, i in zip(numbers, own, chosen, strict=True)
            ]
        )
    if len(kept) < 2:
        return []
    rows = []
    for place, number in enumerate(chosen):
        values = merging.numbers_of(own[place], tensors[number].dtype)
        rows.append(merging.grams(values, [s[place] for s in samples], merging.noise_of(values, tensors[number].dtype)))
    found = merging.find_parents(np.stack(rows), _ELEMENTS)
    return [([kept[m] for m in subset.members], subset.free) for subset in found]


def _candidate_samples(
    tensors: Sequence[TensorFacts], candidate: Candidate, open_model: Open
) -> list[tuple[Words | None, str]] | None:
    """The candidate's samples and their types; ``None`` where it lacks most tensors or cannot be read."""
    names = {t.name: t for t in candidate.facts.tensors}
    plain = [names.get(t.name) for t in tensors]
    if sum(t is not None for t in plain) >= len(plain) / 2:
        found = [
            t if t and t.dtype in REAL and elements_of(t) == elements_of(mine) else None
            for t, mine in zip(plain, tensors, strict=True)
        ]
    else:
        index = NameIndex(candidate.facts)
        found = [aligned(index, t) for t in tensors]
    if sum(t is not None for t in found) < len(found) / 2:
        return None
    source = open_model(candidate)
    if source is None:
        return None
    with contextlib.closing(source):
        try:
            return [
                (read_runs(source, t.offset, t.dtype, small_runs(elements_of(t))), t.dtype) if t else (None, "")
                for t in found
            ]
        except HydraError:
            return None
