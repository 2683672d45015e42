"""Finding out that a model was computed from others, and by which formula each of its tensors was.

Plan: samples of what no single parent explains are compared with the same places of every model that may be a parent
(``merging.find_parents``); for the parents found, larger samples give each tensor's weights; tensors of equal weights
decide together on a formula, and each takes what costs it least: that formula, another group's, or a parent as it is.
Rule 1: a model that is no merge costs a few small reads from each candidate, and nothing else changes for it.
Rule 2: nothing is made worse: a formula is taken only where a sample says that less must be stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from hydrafs import merging, predictors
from hydrafs.bases import WORTH_A_PARENT_NBYTES, Candidate
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.errors import HydraError
from hydrafs.fingerprint import bits_apart
from hydrafs.formulas import REAL, WHOLE, Formula, result_dtype
from hydrafs.layout import ByteSource
from hydrafs.manifest import SELF, Operand
from hydrafs.matching import Computed, Match, NameIndex, match, stripped
from hydrafs.merging import Pool, Words

MUST_SAVE = 0.25
"""What part of what would be stored a merge must save to be taken for one."""
MAX_CANDIDATES = 256
"""How many models are read from; the catalog's fingerprints rank them."""
_WORTH_A_LOOK = 0.02
_TENSORS = 20
_ELEMENTS = 256
_RUN = 1024
_POOL_TENSORS = 12
_POOL_ELEMENTS = 8192
_CERTAIN = 0.02
"""Below this standard deviation a weight is taken as measured."""
_MOST_GROUPS = 32
_SETTLING_TENSORS = 4
_SETTLING_ELEMENTS = 1 << 18
_UNPREDICTED = 0.9
_RECIPE_HASHES = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")

Open = Callable[[Candidate], ByteSource | None]
"""Opens a candidate to read from; ``None`` where it cannot serve as a parent."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """The parents that are used, and what predicts each tensor: ``parent`` counts into them."""

    parents: tuple[Candidate, ...]
    matches: tuple[Match | Computed | None, ...]


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

        target = _Target(source, facts)
        unexplained = _unexplained(target, matches, [held(p) for p in parents])
        if not unexplained:
            return None
        hints = hints_of(metadata)
        found = None
        if hints.sha256s or hints.names:
            named = [c for c in candidates if c.entry.path.name in hints.names or sha256_of(c) in hints.sha256s]
            found = _find(target, unexplained, named, open_model)
        if found is None:
            found = _find(target, unexplained, candidates[:MAX_CANDIDATES], open_model)
        if found is None:
            return None
        makers, free = found
        every = [*makers, *(p for p in parents if all(p is not m for m in makers))]
        sources = [held(c) for c in every]
        if any(s is None for s in sources):
            return None
        moved = [_renumbered(m, parents, every) for m in matches]
        work = _Assembly(target, every, [s for s in sources if s], len(makers), moved, free, hints.numbers)
        return work.result()


def _renumbered(found: Match | None, parents: Sequence[Candidate], every: Sequence[Candidate]) -> Match | None:
    if found is None or found.parent == SELF:
        return found
    return replace(found, parent=next(i for i, c in enumerate(every) if c is parents[found.parent]))


def elements_of(tensor: TensorFacts) -> int:
    """How many elements a tensor has."""
    return tensor.nbytes // DTYPES[tensor.dtype].nbytes


def read_runs(source: ByteSource, offset: int, dtype: str, runs: Sequence[tuple[int, int]]) -> Words:
    """Runs of (first element, count) of what stands at ``offset``, one after another."""
    nbytes = DTYPES[dtype].nbytes
    data = b"".join(source.pread(offset + first * nbytes, count * nbytes) for first, count in runs)
    return np.frombuffer(data, np.uint8)


def _small_runs(elements: int) -> list[tuple[int, int]]:
    count = min(_ELEMENTS, elements)
    return [((elements - count) // 3, count)]


def large_runs(elements: int) -> list[tuple[int, int]]:
    """The places of a tensor that decide about it: all of a small one."""
    if elements <= 2 * _RUN:
        return [(0, elements)]
    return [((elements - _RUN) // 4, _RUN), ((elements - _RUN) * 3 // 4, _RUN)]


@dataclass(frozen=True, slots=True)
class _Target:
    source: ByteSource
    facts: ModelFacts

    def sample(self, number: int, runs: Sequence[tuple[int, int]]) -> Words:
        tensor = self.facts.tensors[number]
        return read_runs(self.source, tensor.offset, tensor.dtype, runs)


def _unexplained(target: _Target, matches: Sequence[Match | None], sources: Sequence[ByteSource | None]) -> list[int]:
    """The tensors of real numbers that are not simply those of a parent; none where they are little of the model."""
    found = []
    total = 0
    for number, (tensor, how) in enumerate(zip(target.facts.tensors, matches, strict=True)):
        total += tensor.nbytes
        if tensor.dtype not in REAL or (how is not None and how.parent == SELF):
            continue
        origin = sources[how.parent] if how else None
        if how and origin and how.count == elements_of(tensor):
            runs = _small_runs(how.count)
            theirs = predictors.cast(
                read_runs(origin, how.offset, how.dtype, runs), DTYPES[how.dtype], DTYPES[tensor.dtype]
            )
            if np.array_equal(theirs, target.sample(number, runs)):
                continue
        found.append(number)
    share = sum(target.facts.tensors[i].nbytes for i in found) / max(1, total)
    return found if share >= _WORTH_A_LOOK else []


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


# Which models


def _find(
    target: _Target, unexplained: Sequence[int], candidates: Sequence[Candidate], open_model: Open
) -> tuple[list[Candidate], bool] | None:
    """The models that explain the model together, in no meaningful order, and whether their weights are free."""
    if len(candidates) < 2:
        return None
    tensors = target.facts.tensors
    large = sorted(unexplained, key=lambda i: -tensors[i].nbytes)[: max(_TENSORS, len(unexplained) // 2)]
    chosen = sorted(large)[:: max(1, len(large) // _TENSORS)][:_TENSORS]
    own = [target.sample(i, _small_runs(elements_of(tensors[i]))) for i in chosen]
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
        return None
    rows = []
    for place, number in enumerate(chosen):
        values = merging.numbers_of(own[place], tensors[number].dtype)
        rows.append(merging.grams(values, [s[place] for s in samples], merging.noise_of(values, tensors[number].dtype)))
    found = merging.find_parents(np.stack(rows), _ELEMENTS)
    return ([kept[m] for m in found.members], found.free) if found else None


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
                (read_runs(source, t.offset, t.dtype, _small_runs(elements_of(t))), t.dtype) if t else (None, "")
                for t in found
            ]
        except HydraError:
            return None


# How


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor that all makers have: its sample and theirs, what they are called there, and how large it is."""

    number: int
    pool: Pool
    found: tuple[TensorFacts, ...]
    block: str


class _Assembly:
    """Putting together what predicts each tensor of a model whose makers are known."""

    def __init__(
        self,
        target: _Target,
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
        return Recognised(tuple(self.parents), tuple(result))

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
                known[kind] = self._decided(group, changed, kind, program, deviations.max(1))
                program = program or known[kind].label
        wins: dict[str, Counter[int]] = {}
        options: dict[int, list[tuple[float, int, Match | Computed | None]]] = {}
        for place, t in enumerate(changed):
            possible = [
                g
                for g, group in enumerate(groups)
                if (
                    np.abs(weights[place] - group.weights) <= 4 * np.hypot(deviations[place], group.deviations) + 1e-5
                ).all()
            ]
            first = home.get(place, -1)
            near, part = votes.get(t.block, Counter()), wins.setdefault(t.block.partition(".")[0], Counter())
            possible.sort(key=lambda g: (-near[g], -part[g], g != first, g))
            for rank, g in enumerate(possible[:_MOST_GROUPS]):
                kind = (g, t.pool.dtype, t.pool.dtypes)
                if kind not in known:
                    known[kind] = self._decided(groups[g], changed, kind, program, deviations.max(1))
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
    ) -> Formula:
        """The formula of a group's tensors of one kind; ``program`` is the label that others were found to have."""
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
