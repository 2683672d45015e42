"""By which formula each tensor of a model was computed, when the models that it was made of are known.

Plan: samples give each tensor's weights; tensors of equal weights decide together on a formula (``merging``), and each
takes what costs it least: that formula, another group's, or a parent as it is.
Rule: nothing is made worse: a formula is taken only where a sample says that less must be stored.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hydrafs import merging, predictors
from hydrafs.bases import WORTH_A_PARENT_NBYTES, Candidate
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel
from hydrafs.fingerprint import bits_apart
from hydrafs.formulas import REAL, WHOLE, Formula, result_dtype
from hydrafs.layout import ByteSource, read_exactly
from hydrafs.manifest import SELF, Operand
from hydrafs.matching import Computed, Match, NameIndex, match, stripped
from hydrafs.merging import Pool, Words

MUST_SAVE = 0.25
"""What part of what would be stored a merge must save to be taken for one."""
_RUN = 1024
_POOL_TENSORS = 12
_POOL_ELEMENTS = 8192
_CERTAIN = 0.02
"""Below this standard deviation a weight is taken as measured."""
_MOST_GROUPS = 32
_SETTLING_TENSORS = 4
_SETTLING_ELEMENTS = 1 << 18
_UNPREDICTED = 0.9
_FEW = 256


@dataclass(frozen=True, slots=True)
class Recognised:
    """The parents that are used, and what predicts each tensor: ``parent`` counts into them. ``left``: what share of
    the bits of the tensors in question will have to be stored, by samples."""

    parents: tuple[Candidate, ...]
    matches: tuple[Match | Computed | None, ...]
    left: float = 0.0


def elements_of(tensor: TensorFacts) -> int:
    """How many elements a tensor has."""
    return tensor.nbytes // DTYPES[tensor.dtype].nbytes


def read_runs(source: ByteSource, offset: int, dtype: str, runs: Sequence[tuple[int, int]]) -> Words:
    """Runs of (first element, count) of what stands at ``offset``, one after another; as ``layout.read_exactly``."""
    nbytes = DTYPES[dtype].nbytes
    data = b"".join(read_exactly(source, offset + first * nbytes, count * nbytes) for first, count in runs)
    return np.frombuffer(data, np.uint8)


def small_runs(elements: int) -> list[tuple[int, int]]:
    """The place of a tensor that is looked at first."""
    count = min(_FEW, elements)
    return [((elements - count) // 3, count)]


def large_runs(elements: int) -> list[tuple[int, int]]:
    """The places of a tensor that decide about it: all of a small one."""
    if elements <= 2 * _RUN:
        return [(0, elements)]
    return [((elements - _RUN) // 4, _RUN), ((elements - _RUN) * 3 // 4, _RUN)]


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is looked at."""

    source: ByteSource
    facts: ModelFacts

    def sample(self, number: int, runs: Sequence[tuple[int, int]]) -> Words:
        """Runs of one of its tensors."""
        tensor = self.facts.tensors[number]
        return read_runs(self.source, tensor.offset, tensor.dtype, runs)


def aligned(index: NameIndex, tensor: TensorFacts) -> TensorFacts | None:
    """The tensor of a parent that stands element by element for one of the model."""
    for names, by in (
        ((tensor.name, *tensor.aliases), index.by_name),
        (tuple(map(stripped, (tensor.name, *tensor.aliases))), index.by_stripped),
    ):
        for name in names:
            found = by.get(name)
            if found and found.dtype in (*REAL, *WHOLE) and elements_of(found) == elements_of(tensor):
                return found
    return None


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor that all makers have: its sample and theirs, what they are called there, and how large it is."""

    number: int
    pool: Pool
    found: tuple[TensorFacts, ...]
    block: str


class Assembly:
    """Putting together what predicts each tensor of a model whose makers are known."""

    def __init__(
        self,
        target: Target,
        parents: Sequence[Candidate],
        sources: Sequence[ByteSource],
        makers: int,
        matches: Sequence[Match | None],
        free: bool,
        numbers: Sequence[float],
    ) -> None:
        self.target, self.parents, self.sources, self.makers = target, parents, sources, makers
        self.matches, self.free, self.numbers = matches, free, numbers
        self.tensors = list(self._sampled())

    def _sampled(self) -> Iterator[_Tensor]:
        indexes = [NameIndex(c.facts) for c in self.parents[: self.makers]]
        for number, tensor in enumerate(self.target.facts.tensors):
            if tensor.dtype not in REAL:
                continue
            found = [aligned(index, tensor) for index in indexes]
            if not all(found):
                continue
            theirs = tuple(t for t in found if t)
            runs = large_runs(elements_of(tensor))
            operands = tuple(read_runs(s, t.offset, t.dtype, runs) for s, t in zip(self.sources, theirs, strict=False))
            pool = Pool(tensor.dtype, self.target.sample(number, runs), tuple(t.dtype for t in theirs), operands)
            yield _Tensor(number, pool, theirs, _block(tensor.name))

    def result(self) -> Recognised | None:
        """What predicts each tensor; ``None`` where it would not save what it must."""
        tensors = self.target.facts.tensors
        plain = {t.number: self._plain(t) for t in self.tensors}
        changed = [t for t in self.tensors if min(plain[t.number])[0] > 0]
        if not changed:
            return None
        formulas = self._formulas(changed)
        result = self._others(set(plain))
        before = after = 0.0
        extra: Counter[int] = Counter()
        taken: dict[int, list[tuple[float, int, Match | Computed | None]]] = {}
        for t in self.tensors:
            number, nbytes = t.number, tensors[t.number].nbytes
            options = sorted([*plain[number], *formulas.get(number, [])], key=lambda option: option[:2])
            best = options[0]
            now = next((o[0] for o in plain[number] if o[2] is self.matches[number]), _UNPREDICTED)
            before, after = before + nbytes * now, after + nbytes * best[0]
            result[number] = best[2]
            taken[number] = options
            if isinstance(best[2], Match) and best[2].parent >= self.makers:
                without = next((o[0] for o in options if self._by_makers(o[2])), _UNPREDICTED)
                extra[best[2].parent] += int(nbytes * (without - best[0]))
        if after > (1 - MUST_SAVE) * before:
            return None
        for number, options in taken.items():
            how = result[number]
            if isinstance(how, Match) and how.parent >= self.makers and extra[how.parent] < WORTH_A_PARENT_NBYTES:
                result[number] = next((o[2] for o in options if self._by_makers(o[2])), None)
        nbytes = sum(tensors[t.number].nbytes for t in self.tensors)
        return Recognised(tuple(self.parents), tuple(result), after / max(1, nbytes))

    def _by_makers(self, how: Match | Computed | None) -> bool:
        return not isinstance(how, Match) or how.parent < self.makers

    def _plain(self, t: _Tensor) -> list[tuple[float, int, Match | Computed | None]]:
        """What each maker and the present match cost a tensor, the makers preferred where they cost the same."""
        tensor = self.target.facts.tensors[t.number]
        options: list[tuple[float, int, Match | Computed | None]] = []
        for parent, found in enumerate(t.found):
            if found.dtype in REAL:
                how = Match(parent, found.offset, found.dtype, elements_of(tensor), "merge", 0.0)
                options.append((self._apart(t.pool, t.pool.operands[parent], found.dtype), parent, how))
        now = self.matches[t.number]
        if now is None or now.count != elements_of(tensor):
            options.append((_UNPREDICTED, len(t.found), now))
        else:
            source = self.target.source if now.parent == SELF else self.sources[now.parent]
            raw = read_runs(source, now.offset, now.dtype, large_runs(now.count))
            options.append((self._apart(t.pool, raw, now.dtype), len(t.found), now))
        return options

    @staticmethod
    def _apart(pool: Pool, raw: Words, dtype: str) -> float:
        own = DTYPES[pool.dtype]
        return bits_apart(predictors.cast(raw, DTYPES[dtype], own), pool.target, own)

    def _others(self, done: set[int]) -> list[Match | Computed | None]:
        """What predicts the tensors that no formula can: as before, or a maker where it does as well."""
        result: list[Match | Computed | None] = list(self.matches)
        fallback = match(self.target.facts, [c.facts for c in self.parents[: self.makers]])
        for number, (now, then) in enumerate(zip(self.matches, fallback, strict=True)):
            if number not in done and then and then.parent != SELF and (now is None or then.distance <= now.distance):
                result[number] = then if now is None or now.parent != SELF else now
        return result

    def _formulas(self, changed: Sequence[_Tensor]) -> dict[int, list[tuple[float, int, Match | Computed | None]]]:
        """For tensors that no parent gives as they are, the formulas of the groups that they may belong to."""
        grams = []
        for t in changed:
            values = merging.numbers_of(t.pool.target, t.pool.dtype)
            theirs = [merging.numbers_of(o, d) for o, d in zip(t.pool.operands, t.pool.dtypes, strict=True)]
            grams.append(merging.grams(values, theirs, merging.noise_of(values, t.pool.dtype)))
        elements = np.array([t.pool.target.nbytes // DTYPES[t.pool.dtype].nbytes for t in changed], np.float64)
        members = range(self.makers + 1) if self.free else range(self.makers)
        fits = merging.fit(np.stack(grams), np.array([list(members)], np.intp), elements)
        weights, deviations = fits.weights[:, 0, : self.makers], fits.deviations[:, 0, : self.makers]
        groups = merging.grouped(weights, deviations)
        votes: dict[str, Counter[int]] = {}
        home = {place: g for g, group in enumerate(groups) for place in group.tensors}
        for place, g in home.items():
            # Where the parents hardly differ, any weights fit: what the neighbours have is likely there.
            if deviations[place].max() < _CERTAIN:
                votes.setdefault(changed[place].block, Counter())[g] += 1
        known: dict[tuple[int, str, tuple[str, ...]], Formula] = {}
        program = ""
        for g, group in enumerate(groups):
            # The most telling first: what they were made by, the others probably were.
            kinds = Counter((changed[i].pool.dtype, changed[i].pool.dtypes) for i in group.tensors)
            for (dtype, dtypes), _ in kinds.most_common():
                kind = (g, dtype, dtypes)
                known[kind] = self._decided(group, changed, kind, program, deviations.max(1), known.values())
                program = program or known[kind].label
        wins: dict[str, Counter[int]] = {}
        options: dict[int, list[tuple[float, int, Match | Computed | None]]] = {}
        for place, t in enumerate(changed):
            possible = [
                g
                for g, group in enumerate(groups)
                if (
                    np.abs(weights[place] - group.weights)
                    <= 4 * np.hypot(deviations[place], group.deviations) + merging.BIAS
                ).all()
            ]
            first = home.get(place, -1)
            near, part = votes.get(t.block, Counter()), wins.setdefault(t.block.partition(".")[0], Counter())
            possible.sort(key=lambda g: (-near[g], -part[g], g != first, g))
            for rank, g in enumerate(possible[:_MOST_GROUPS]):
                kind = (g, t.pool.dtype, t.pool.dtypes)
                if kind not in known:
                    known[kind] = self._decided(groups[g], changed, kind, program, deviations.max(1), known.values())
                price = merging.cost(known[kind], t.pool)
                options.setdefault(t.number, []).append((price, 100 + rank, self._computed(known[kind], t)))
                if not price:
                    part[g] += 1
                    break
        return options

    def _decided(
        self,
        group: merging.Group,
        changed: Sequence[_Tensor],
        kind: tuple[int, str, tuple[str, ...]],
        program: str,
        deviations: merging.Numbers,
        known: Iterable[Formula],
    ) -> Formula:
        """The formula of a group's tensors of one kind; ``program`` is the label that the first had, ``known`` are
        the formulas of other groups."""
        places = [i for i in group.tensors if (changed[i].pool.dtype, changed[i].pool.dtypes) == kind[1:]]
        places = places or [i for i, t in enumerate(changed) if (t.pool.dtype, t.pool.dtypes) == kind[1:]]
        places.sort(key=lambda i: deviations[i])
        certain = [i for i in places if deviations[i] <= 20 * deviations[places[0]]][: 4 * _POOL_TENSORS]
        alike = [changed[i] for i in certain[:: max(1, len(certain) // _POOL_TENSORS)][:_POOL_TENSORS]]
        each = _POOL_ELEMENTS // len(alike)

        def head(raws: Sequence[Words], dtype: str) -> Words:
            return np.concatenate([raw[: each * DTYPES[dtype].nbytes] for raw in raws])

        pool = Pool(
            kind[1],
            head([t.pool.target for t in alike], kind[1]),
            kind[2],
            tuple(head([t.pool.operands[i] for t in alike], dtype) for i, dtype in enumerate(kind[2])),
        )
        for formula in dict.fromkeys(known):  # what others of the kind were found to follow
            with contextlib.suppress(BadModel):
                if result_dtype(formula, kind[2]) and not merging.cost(formula, pool):
                    return formula
        tied = merging.best_formulas(
            pool,
            group.weights,
            group.deviations,
            free=self.free,
            hints=self.numbers,
            program=program,
        )
        if len(tied) == 1:
            return tied[0]
        more = [self._part(t) for t in sorted(alike, key=lambda t: -elements_of(t.found[0]))[:_SETTLING_TENSORS]]
        prices = [sum(merging.cost(formula, pool) for pool in more) for formula in tied]
        return tied[int(np.argmin(prices))]

    def _part(self, t: _Tensor) -> Pool:
        """The first part of a tensor: many times what its sample holds."""
        runs = [(0, min(_SETTLING_ELEMENTS, elements_of(t.found[0])))]
        operands = (read_runs(s, f.offset, f.dtype, runs) for s, f in zip(self.sources, t.found, strict=False))
        return replace(t.pool, target=self.target.sample(t.number, runs), operands=tuple(operands))

    @staticmethod
    def _computed(formula: Formula, t: _Tensor) -> Computed:
        operands = tuple(Operand(parent, found.offset, found.dtype) for parent, found in enumerate(t.found))
        return Computed(formula, operands, result_dtype(formula, t.pool.dtypes))


def _block(name: str) -> str:
    """What a tensor's neighbours share: the name up to its first number."""
    found = re.match(r".*?\d+", name)
    return found[0] if found else name
