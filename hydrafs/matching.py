"""Which parent tensor predicts which target tensor.

Pure: facts in, matches out. A wrong match costs bytes, never correctness, so doubt is settled by the fingerprints.
Order of trust: the same name; the same name without known prefixes; the same shape and close values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.fingerprint import REAL, UNRELATED, distances
from hydrafs.formulas import Formula
from hydrafs.manifest import SELF, Operand
from hydrafs.predictors import castable

GOOD = 4.0
"""Below this distance a match is taken without looking for a better one."""
USELESS = 8.0
"""From this distance on a tensor is stored with no prediction."""

PREFIXES = (
    "state_dict.",
    "module.",
    "_orig_mod.",
    "model.diffusion_model.",
    "diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "text_encoder.",
    "text_encoder_2.",
    "transformer.",
    "unet.",
    "vae.",
    "net.",
    "model.",
    "0.auto_model.",
    "auto_model.",
    "bert.",
)
EMA_PREFIX = "model_ema."


@dataclass(frozen=True, slots=True)
class Match:
    """What predicts a tensor: ``count`` leading elements of it, by those at ``offset`` in ``parent`` (an index into the
    parents, or ``SELF``), of type ``dtype``. ``how`` says by what it was found, ``distance`` how close the samples are.
    """

    parent: int
    offset: int
    dtype: str
    count: int
    how: str
    distance: float


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that a formula predicts whole, from ``operands`` in the parents; ``dtype`` is its result's type."""

    formula: Formula
    operands: tuple[Operand, ...]
    dtype: str


def stripped(name: str) -> str:
    """``name`` without the known prefixes, however many there are."""
    again = True
    while again:
        again = False
        for prefix in PREFIXES:
            if name.startswith(prefix) and len(name) > len(prefix):
                name, again = name[len(prefix) :], True
    return name


def _elements(tensor: TensorFacts) -> int:
    return tensor.nbytes // DTYPES[tensor.dtype].nbytes


def _shared_elements(target: TensorFacts, other: TensorFacts) -> int:
    """How many leading elements of ``target`` stand for those of ``other``: all where there are as many, the
    common rows where only the first dimension differs (a resized embedding), else none."""
    if not castable(DTYPES[other.dtype], DTYPES[target.dtype]):
        return 0
    mine, theirs = _elements(target), _elements(other)
    if mine == theirs:
        return mine
    if len(target.shape) >= 2 and len(other.shape) == len(target.shape) and target.shape[1:] == other.shape[1:]:
        return min(mine, theirs)
    return 0


class NameIndex:
    """The tensors of one parent, by what they can be found by."""

    def __init__(self, facts: ModelFacts) -> None:
        self.by_name: dict[str, TensorFacts] = {}
        self.by_stripped: dict[str, TensorFacts] = {}
        self.by_size: dict[int, list[TensorFacts]] = {}
        for tensor in facts.tensors:
            for name in (tensor.name, *tensor.aliases):
                self.by_name.setdefault(name, tensor)
                self.by_stripped.setdefault(stripped(name), tensor)
            self.by_size.setdefault(_elements(tensor), []).append(tensor)

    def named(self, target: TensorFacts) -> tuple[TensorFacts, str] | None:
        """The tensor of the same name, else of the same name without prefixes, and which of the two it was."""
        for name in (target.name, *target.aliases):
            found = self.by_name.get(name)
            if found and _shared_elements(target, found):
                return found, "name"
        for name in (target.name, *target.aliases):
            found = self.by_stripped.get(stripped(name))
            if found and _shared_elements(target, found):
                return found, "name without prefix"
        return None


def _match(parent: int, target: TensorFacts, found: TensorFacts, how: str, distance: float) -> Match:
    return Match(parent, found.offset, found.dtype, _shared_elements(target, found), how, distance)


def _distance(target: TensorFacts, found: TensorFacts) -> float:
    if not found.fingerprint or _elements(target) != _elements(found):
        # No sample, or samples of other places: the name is all there is to go by.
        return GOOD - 1.0
    if target.dtype == found.dtype and target.dtype not in REAL:
        # The samples of whole numbers and of 8-bit floats tell only whether they are the same.
        return 0.0 if target.fingerprint == found.fingerprint else GOOD - 1.0
    return float(distances(target, [found])[0])


def match(target: ModelFacts, parents: Sequence[ModelFacts]) -> list[Match | None]:
    """For each tensor of ``target``, what predicts it best; parents are in order of preference.

    A match found by name in an earlier parent is taken while it is good; else the closest of all that the names and the
    values suggest. EMA copies and repeated tensors are predicted by the model itself where no parent does better.
    """
    indexes = [NameIndex(parent) for parent in parents]
    return _within(target, [_best(tensor, indexes) for tensor in target.tensors])


def _best(tensor: TensorFacts, indexes: list[NameIndex]) -> Match | None:
    best: Match | None = None
    for number, index in enumerate(indexes):
        named = index.named(tensor)
        if named:
            found = _match(number, tensor, *named, _distance(tensor, named[0]))
            if found.distance < GOOD:
                return found
            if best is None or found.distance < best.distance:
                best = found
    if tensor.nbytes >= 1024:
        for number, index in enumerate(indexes):
            alike = [t for t in index.by_size.get(_elements(tensor), ()) if _shared_elements(tensor, t)]
            if alike:
                gaps = distances(tensor, alike)
                nearest = int(gaps.argmin())
                gap = float(gaps[nearest])
                if gap < (best.distance if best else UNRELATED) - 0.5:
                    best = _match(number, tensor, alike[nearest], "values", gap)
    return best if best is not None and best.distance < USELESS else None


def _predicted_within(found: Match | None) -> bool:
    return found is not None and found.parent == SELF


def _within(target: ModelFacts, matches: list[Match | None]) -> list[Match | None]:
    """Let tensors that no parent predicts well be predicted by others of the same model: EMA copies, repeated weights.

    What predicts must itself not be predicted from this model (one step only), so live weights keep their own match.
    """
    live: dict[str, int] = {}
    by_size: dict[int, list[int]] = {}
    for number, tensor in enumerate(target.tensors):
        if not tensor.name.startswith(EMA_PREFIX):
            live.setdefault(tensor.name.removeprefix("model.").replace(".", ""), number)
    result = list(matches)
    sources: set[int] = set()
    for number, tensor in enumerate(target.tensors):
        if tensor.nbytes < 1024:
            continue
        current = result[number]
        threshold = current.distance if current else USELESS
        found: int | None = None
        if tensor.name.startswith(EMA_PREFIX):
            candidate = live.get(tensor.name.removeprefix(EMA_PREFIX).replace(".", ""))
            if candidate is not None and _elements(target.tensors[candidate]) == _elements(tensor):
                found = candidate
        elif current is None:
            earlier = [i for i in by_size.get(_elements(tensor), ()) if not _predicted_within(result[i])]
            if earlier:
                gaps = distances(tensor, [target.tensors[i] for i in earlier])
                found = earlier[int(gaps.argmin())]
        if found is not None and number not in sources:
            other = target.tensors[found]
            source_match = result[found]
            gap = _distance(tensor, other)
            if gap < threshold and not _predicted_within(source_match) and _shared_elements(tensor, other):
                result[number] = _match(SELF, tensor, other, "EMA" if current is None else "EMA, closer", gap)
                sources.add(found)
        by_size.setdefault(_elements(tensor), []).append(number)
    return result
