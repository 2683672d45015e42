"""Which models another one is computed from, and how: the arithmetic alone, on samples of their values.

Plan: least squares over every pair, then over triples and fours of the best, finds the parents; their coefficients are
snapped to the numbers that people type; then each program's order of operations is tried until one gives the very bits.
Rule 1: everything is done on differences to the model, in units of its own rounding: near models stay far apart so.
Rule 2: pure. A wrong answer costs bytes, never correctness: whoever uses it stores what is left as a residual.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from hydrafs import predictors
from hydrafs.dtypes import DTYPES
from hydrafs.fingerprint import bits_apart
from hydrafs.formulas import (
    ADD,
    REAL,
    SUBTRACT,
    Formula,
    Step,
    cast,
    divide,
    evaluate,
    get,
    lerp,
    promoted,
    result_dtype,
    rounded,
    scale,
)

Words = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

GAIN_BITS = 0.1
"""By how many bits per element a further parent must come closer to be believed."""
MUST_EXPLAIN = 0.25
"""What part of what the best model leaves must be explained by others."""
EXPLAINED_BITS = 0.75
"""What is left of a model that is explained: somewhat more than the one rounding that every result has."""
EVIDENCE = 10.0
"""By how many standard deviations what a further model explains must exceed chance."""
POOLED = 32
"""How many models are tried three at a time; two thirds as many four at a time."""
_BATCH = 4096
_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_TINY = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
_STEPS = (0.05, 0.01, 0.005, 0.001, 0.0001)
BIAS = 0.004
"""How far a measured weight may be off beyond chance: parents that are a few units in the last place apart are rounded
in step with their difference."""
_LOOSE = 0.3
"""Where parents hardly differ, weights may be off by this much."""
_NUMBERS = 4
"""How many sets of numbers are tried with every program's rounding."""
_CLOSE = 2e-4
_MOST_TIED = 10
_THIRDS = (1 / 3, 2 / 3, 1 / 6)


def numbers_of(raw: Words, dtype: str) -> Numbers:
    """Raw elements as binary64."""
    if dtype in REAL:
        return predictors.cast(raw, DTYPES[dtype], DTYPES["F64"]).view("<f8")
    kind = "i" if DTYPES[dtype].kind == "signed" else "u"
    return raw.view(f"<{kind}{DTYPES[dtype].nbytes}").astype(np.float64)


def noise_of(values: Numbers, dtype: str) -> float:
    """The energy that one rounding leaves in these values of a type."""
    finite = np.abs(values[np.isfinite(values)])
    units = np.exp2(np.floor(np.log2(np.maximum(finite, 1e-300)))) * _EPSILON[dtype]
    return float((np.maximum(units, _TINY[dtype]) ** 2).sum()) / 12 + 1e-300


def grams(target: Numbers, parents: Sequence[Numbers], noise: float) -> Numbers:
    """The products of all differences parent - target of one tensor, in units of ``noise``; last the zero model's."""
    known = np.isfinite(target)
    own = np.where(known, target, 0.0)
    rows = [np.where(known & np.isfinite(p), p, own * 0.0) - own for p in parents]
    gaps = np.stack([*rows, -own]) / math.sqrt(noise)
    return gaps @ gaps.T


@dataclass(frozen=True, slots=True)
class Fit:
    """Sums of weight 1 of subsets of models, per tensor. ``left`` is the energy that remains in units of rounding,
    ``weights`` and ``deviations`` (one standard deviation) have an entry per model of the subset."""

    left: Numbers
    weights: Numbers
    deviations: Numbers


def fit(gram: Numbers, subsets: npt.NDArray[np.intp], elements: Numbers | float) -> Fit:
    """The best sum of weight 1 for each tensor and subset.

    Args:
        gram: tensors x models x models, as ``grams`` gives them.
        subsets: subsets x members.
        elements: how many elements each tensor's sample has.

    Returns:
        Arrays of tensors x subsets (x members).
    """
    first, rest = subsets[:, 0], subsets[:, 1:]
    origin = gram[:, first, first]
    to_first = gram[:, first[:, None], rest]
    inner = gram[:, rest[:, :, None], rest[:, None, :]]
    normal = inner - to_first[..., :, None] - to_first[..., None, :] + origin[..., None, None]
    right = origin[..., None] - to_first
    trace = np.trace(normal, axis1=-2, axis2=-1)
    normal = normal + (1e-13 * trace + 1e-200)[..., None, None] * np.eye(rest.shape[1])
    inverse = 1.0 / normal if rest.shape[1] == 1 else np.linalg.inv(normal)
    weights = (inverse @ right[..., None])[..., 0]
    left = np.maximum(origin - (weights * right).sum(-1), 0.0)
    variance = np.maximum(left, 1.0) / np.asarray(elements).reshape(-1, 1)
    spread = np.concatenate([inverse.sum((-2, -1))[..., None], np.diagonal(inverse, axis1=-2, axis2=-1)], -1)
    return Fit(
        left,
        np.concatenate([1.0 - weights.sum(-1, keepdims=True), weights], -1),
        np.sqrt(np.abs(spread) * variance[..., None]),
    )


def bits_left(left: Numbers) -> Numbers:
    """What remains, in bits per element above rounding: the mean over the tensors (the first axis)."""
    mean: Numbers = 0.5 * np.log2(np.maximum(left, 1.0)).mean(0)
    return mean


@dataclass(frozen=True, slots=True)
class Subset:
    """Models that together explain another, and how many bits per element they and the best of all models leave.
    ``free``: their weights do not add up to 1."""

    members: tuple[int, ...]
    bits: float
    alone_bits: float
    free: bool = False


def find_parents(gram: Numbers, elements: float) -> list[Subset]:
    """The models that explain the target, two to four; empty where they are no better than one.

    Where two or three explain it well and a further one still has a say in what they leave (of a model and a light
    fine-tune of it, each explains nearly all of the other), both answers are given, the fewer models first.

    Args:
        gram: tensors x models x models, as ``grams`` gives them; the last model is zero, for free weights.
        elements: of each tensor's sample.
    """
    count = gram.shape[1] - 1
    alone = bits_left(np.diagonal(gram, axis1=1, axis2=2)[:, :count]) if count else np.array([math.inf])
    least = float(alone.min())
    if count < 2 or least < GAIN_BITS:
        return []
    pairs = _subsets(range(count), 2)
    scores = _scored(gram, pairs, elements)
    best = Subset(tuple(pairs[scores.argmin()].tolist()), float(scores.min()), least)
    # Which models are worth trying with two others: those that do well alone or in a pair.
    promise = alone.copy()
    np.minimum.at(promise, pairs[:, 0], scores)
    np.minimum.at(promise, pairs[:, 1], scores)
    ranked = np.argsort(promise, kind="stable").tolist()
    for members, pool in ((3, POOLED), (4, POOLED * 2 // 3)):
        if members > 3 and best.bits < EXPLAINED_BITS:
            break
        tried = _subsets([*sorted(ranked[:pool]), count], members)
        if not len(tried):
            continue
        scores = _scored(gram, tried, elements)
        found = tried[scores.argmin()].tolist()
        if float(scores.min()) < best.bits - GAIN_BITS:
            real = tuple(m for m in found if m != count)
            best = Subset(real, float(scores.min()), least, free=len(real) < len(found))
    # What is taken for certain must explain a good part; what is only looked at further, need not.
    enough = min(least - GAIN_BITS, (1 - MUST_EXPLAIN) * least)
    if best.bits >= enough or len(best.members) < 2:
        return []
    answers = [best]
    while not best.free and len(best.members) < 4 and best.bits < EXPLAINED_BITS:
        more = [tuple(sorted({*best.members, m})) for m in range(count) if m not in best.members]
        if not more:
            break
        before = fit(gram, np.array([best.members], np.intp), elements).left
        after = fit(gram, np.array(more, np.intp), elements).left
        evidence = (elements * (before - after) / np.maximum(after, 0.5)).sum(0)
        if float(evidence.max()) < len(gram) + EVIDENCE * math.sqrt(2 * len(gram)):
            break
        chosen = int(evidence.argmax())
        best = Subset(more[chosen], float(bits_left(after)[chosen]), least)
        answers.append(best)
    return answers


def _subsets(models: Sequence[int] | range, members: int) -> npt.NDArray[np.intp]:
    return np.array(list(itertools.combinations(models, members)), np.intp).reshape(-1, members)


def _scored(gram: Numbers, subsets: npt.NDArray[np.intp], elements: float) -> Numbers:
    parts = [subsets[i : i + _BATCH] for i in range(0, len(subsets), _BATCH)]
    return np.concatenate([bits_left(fit(gram, part, elements).left) for part in parts])


# Coefficients


def snaps(value: float, deviation: float, hints: Sequence[float] = ()) -> list[float]:
    """The round numbers that a measured one may stand for, the roundest first, then itself."""
    reach = 4 * deviation + BIAS
    found: dict[float, None] = {hint: None for hint in hints if abs(hint - value) <= reach}
    for step in _STEPS:
        nearest = round(value / step)
        for k in sorted(range(nearest - 2, nearest + 3), key=lambda k: abs(k * step - value)):
            if abs(k * step - value) <= reach:
                found[round(k * step, 6)] = None
    found.update({sign * third: None for third in _THIRDS for sign in (1, -1) if abs(sign * third - value) <= reach})
    return [*list(found)[:24], value]


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors with the same weights, as far as can be told."""

    weights: Numbers
    deviations: Numbers
    tensors: tuple[int, ...]


def grouped(weights: Numbers, deviations: Numbers, most: int = 64) -> list[Group]:
    """Tensors (rows) whose weights agree within their deviations, the largest group first. Those of which little is
    known stand with the first that they may belong to."""
    order = np.argsort(deviations.max(1), kind="stable")
    free = np.ones(len(order), bool)
    groups: list[Group] = []
    for seed in order:
        if not free[seed] or len(groups) == most:
            continue
        center, spread = weights[seed], deviations[seed]
        for _ in range(2):  # the second time around what the first gave
            near = np.abs(weights - center) <= 4 * np.hypot(deviations, spread) + BIAS
            members = np.flatnonzero(near.all(1) & free)
            if not len(members):
                members = np.array([seed])
            precision = 1 / np.maximum(deviations[members], 1e-9) ** 2
            center = (weights[members] * precision).sum(0) / precision.sum(0)
            spread = 1 / np.sqrt(precision.sum(0))
        free[members] = False
        free[seed] = False
        groups.append(Group(center, spread, tuple(members.tolist())))
    return sorted(groups, key=lambda g: -len(g.tensors))


# What programs compute


@dataclass(frozen=True, slots=True)
class Pool:
    """Samples of tensors of one kind: the target's raw elements and, aligned with them, each operand's."""

    dtype: str
    target: Words
    dtypes: tuple[str, ...]
    operands: tuple[Words, ...]


def computed(formula: Formula, pool: Pool) -> Words:
    """What a formula gives for a sample, as elements of the target's type."""
    count = pool.target.nbytes // DTYPES[pool.dtype].nbytes

    def read(index: int, first: int, elements: int) -> Words:
        nbytes = DTYPES[pool.dtypes[index]].nbytes
        return pool.operands[index][first * nbytes : (first + elements) * nbytes]

    result, name = evaluate(formula, pool.dtypes, read, 0, count)
    return predictors.cast(result, DTYPES[name], DTYPES[pool.dtype])


def cost(formula: Formula, pool: Pool) -> float:
    """The mean share of an element's bits that a sample is away from what the formula gives: 0 exact, 1 unrelated."""
    return bits_apart(computed(formula, pool), pool.target, DTYPES[pool.dtype])


def best_formulas(
    pool: Pool,
    weights: Numbers,
    deviations: Numbers,
    *,
    free: bool = False,
    hints: Sequence[float] = (),
    program: str = "",
) -> list[Formula]:
    """The formulas for operands of about these weights that give most of a sample's bits, the best first: more than
    one where the sample does not tell them apart.

    Args:
        free: the weights do not add up to 1.
        hints: numbers that the model's own metadata names.
        program: the label that is likely: if such formulas are exact, no others are tried.
    """
    tried = _tried(pool, _makers(pool, weights, deviations, free, hints), program)
    if len(weights) == 3 and not free and min(t[0] for t in tried):
        tried += _tried(pool, _loose_makers(pool, weights), program)
    tried.sort(key=lambda t: t[:2])
    least = tried[0][0]
    return [formula for price, _, formula in tried if price <= max(2 * least, least + _CLOSE)][:_MOST_TIED]


def _tried(pool: Pool, makers: Sequence[_Maker], program: str) -> list[tuple[float, int, Formula]]:
    """What the formulas of the likeliest numbers cost, with the place of their numbers."""
    ranked: list[tuple[float, int, Callable[[], Iterator[Formula]]]] = []
    for number, (numbers, maker) in enumerate(makers):
        # In double precision with one rounding at the end the right numbers show best, whatever the program did.
        probe = _finished(pool, "", _sum_steps(pool, range(len(numbers)), numbers, "F64", False))
        ranked.append((cost(probe, pool), number, maker))
    ranked.sort(key=lambda item: item[:2])
    tried: list[tuple[float, int, Formula]] = []
    if program:
        likely = [(n, formula) for _, n, maker in ranked[:_NUMBERS] for formula in maker() if formula.label == program]
        tried = [(cost(formula, pool), number, formula) for number, formula in likely]
    if not tried or min(t[0] for t in tried):
        for _, number, maker in ranked[:_NUMBERS]:
            tried += [(cost(f, pool), number, f) for f in maker() if not program or f.label != program]
            if tried and not min(t[0] for t in tried):
                break
    return tried


_Maker = tuple[Sequence[float], Callable[[], Iterator[Formula]]]
"""What the operands count for, and what makes the formulas in which they do."""


def _makers(pool: Pool, weights: Numbers, deviations: Numbers, free: bool, hints: Sequence[float]) -> list[_Maker]:
    """For each set of numbers that may be meant, what makes its formulas."""
    made: list[_Maker] = []
    measured = [(float(w), float(d)) for w, d in zip(weights, deviations, strict=True)]
    if len(measured) == 2 and not free:
        made += [((1 - w, w), partial(_of_two, pool, w)) for w in snaps(*measured[1], hints)]
        for merged, known in ((0, 1), (1, 0)):
            over, deviation = measured[merged]
            if over > 1:
                for alpha in snaps(1 / over, deviation / over**2, hints):
                    numbers = [1 - 1 / alpha] * 2
                    numbers[merged] = 1 / alpha
                    made.append((numbers, partial(_unmerged, pool, alpha, merged, known)))
        return made
    if len(measured) == 3 and not free:
        for a in range(3):
            if abs(measured[a][0] - 1) <= 4 * measured[a][1] + 1e-3:
                b, c = (i for i in range(3) if i != a)
                for weight in snaps(*measured[b], hints):
                    numbers = [1.0, 1.0, 1.0]
                    numbers[b], numbers[c] = weight, -weight
                    made.append((numbers, partial(_differences, pool, weight, a, b, c)))
    choices = itertools.product(*(snaps(w, d, hints)[:6] for w, d in measured))
    off = {c: not free and abs(sum(c) - 1) > 1e-9 for c in choices}
    rounder = sorted(off, key=lambda c: (off[c], sum(map(_places, c))))
    made += [(numbers, partial(_sums, pool, numbers)) for numbers in rounder[:48]]
    return made


def _loose_makers(pool: Pool, weights: Numbers) -> list[_Maker]:
    """Sums and differences of three in steps of 0.05, far and wide: what is left where least squares cannot tell."""
    made: list[_Maker] = []
    grid = [round(0.05 * k, 2) for k in range(1, 21)]
    for a in range(3):
        b, c = (i for i in range(3) if i != a)
        if abs(weights[a] - 1) < 10 * BIAS:
            for weight in grid:
                sign = 1 if weights[b] > 0 else -1
                numbers = [1.0, 1.0, 1.0]
                numbers[b], numbers[c] = sign * weight, -sign * weight
                made.append((numbers, partial(_differences, pool, sign * weight, a, b, c)))
    for one, two in itertools.product(grid, grid):
        sums = (one, two, round(1 - one - two, 2))
        if sums[2] > 0 and all(abs(w - n) < _LOOSE for w, n in zip(weights, sums, strict=True)):
            made.append((sums, partial(_sums, pool, sums)))
    return made


def _places(number: float) -> int:
    return len(f"{number:.10f}".rstrip("0"))


def _finished(pool: Pool, label: str, steps: Sequence[Step]) -> Formula:
    """The steps, and a cast to the target's type where the result has another that does not fit into it."""
    result = result_dtype(Formula(label, tuple(steps)), pool.dtypes)
    narrower = DTYPES[result].nbytes < DTYPES[pool.dtype].nbytes
    return Formula(label, tuple(steps) if result == pool.dtype or narrower else (*steps, cast(pool.dtype)))


def _has_halves(dtypes: Sequence[str]) -> bool:
    return any(d in ("F16", "BF16") for d in dtypes)


def _sum_steps(pool: Pool, order: Sequence[int], numbers: Sequence[float], compute: str, old: bool) -> list[Step]:
    """acc = n0*X0, then + ni*Xi, each in its own type or in ``compute``."""
    steps: list[Step] = []
    for place, index in enumerate(order):
        dtype = compute or pool.dtypes[index]
        number = rounded(numbers[index], dtype) if old and dtype in REAL else numbers[index]
        steps += [get(index), *([cast(compute)] if compute else []), scale(number)]
        steps += [ADD] if place else []
    return steps


def _sums(pool: Pool, numbers: Sequence[float]) -> Iterator[Formula]:
    """Weighted sums in each order of the operands (the first two can be swapped), type and rounding of the numbers."""
    program = "A1111 weighted sum" if len(numbers) == 2 else "weighted sum"
    orders = [o for o in itertools.permutations(range(len(numbers))) if o[0] < o[1]]
    halves = _has_halves(pool.dtypes)
    same = len(set(pool.dtypes)) == 1
    for compute in ("", "F32", "F16", "BF16", "F64"):
        if compute and same and pool.dtypes[0] == compute:
            continue
        label = f"kohya merge, {compute}" if compute in ("F16", "BF16") else program
        label = "kohya merge" if compute == "F32" else "weighted sum in double precision" if compute == "F64" else label
        for old in (False, True) if compute in ("F16", "BF16") or (not compute and halves) else (False,):
            name = f"{label}, torch before 2.1" if old else label
            for order in orders:
                yield _finished(pool, name, _sum_steps(pool, order, numbers, compute, old))


def _of_two(pool: Pool, alpha: float) -> Iterator[Formula]:
    sums = _sums(pool, (1 - alpha, alpha))
    yield next(sums)
    singles = [[get(i), *([cast("F32")] if pool.dtypes[i] != "F32" else [])] for i in (0, 1)]
    name = "supermerger lerp" if pool.dtype == pool.dtypes[0] == pool.dtypes[1] else "sd-mecha lerp"
    for a, b, weight in ((0, 1, alpha), (1, 0, 1 - alpha)):
        yield _finished(pool, name, [*singles[a], *singles[b], lerp(weight)])
    yield from sums
    for a, b, weight in ((0, 1, alpha), (1, 0, 1 - alpha)):
        # torch's lerp where it does not fuse, and a difference that is added to the model it was taken from
        yield _finished(pool, "lerp", [*singles[a], *singles[b], *singles[a], SUBTRACT, scale(weight), ADD])
        yield from _differences(pool, weight, a, b, a)


def _differences(pool: Pool, weight: float, a: int, b: int, c: int) -> Iterator[Formula]:
    """A + weight * (B - C)."""
    taken = [get(b), get(c), SUBTRACT]
    dtype = promoted(pool.dtypes[b], pool.dtypes[c])
    if dtype:  # none for whole numbers
        yield _finished(pool, "A1111 add difference", [get(a), *taken, scale(weight), ADD])
    if dtype in ("F16", "BF16"):
        old = [get(a), *taken, scale(rounded(weight, dtype)), ADD]
        yield _finished(pool, "A1111 add difference, torch before 2.1", old)
    f32 = [get(b), cast("F32"), get(c), cast("F32"), SUBTRACT]
    back = [cast(pool.dtypes[b])] if pool.dtypes[b] in REAL else []
    for steps in ([*f32, *back, cast("F32")], [*f32]):
        yield _finished(pool, "supermerger add", [get(a), cast("F32"), *steps, scale(weight), ADD])
    yield _finished(pool, "supermerger add, native", [get(a), *f32, *back, scale(weight), ADD])
    f64 = [get(b), cast("F64"), get(c), cast("F64"), SUBTRACT, scale(weight), ADD]
    yield _finished(pool, "add difference in double precision", [get(a), cast("F64"), *f64])


def _unmerged(pool: Pool, alpha: float, merged: int, known: int) -> Iterator[Formula]:
    """(M - (1-alpha)*K) / alpha."""
    for compute in ("", "F32"):
        to = [cast(compute)] if compute else []
        for old in (False, True) if not compute and _has_halves(pool.dtypes) else (False,):
            by, share = 1 - alpha, alpha
            if old:
                by = rounded(by, pool.dtypes[known]) if pool.dtypes[known] in REAL else by
                share = rounded(share, promoted(pool.dtypes[merged], pool.dtypes[known]) or "F32")
            steps = [get(merged), *to, get(known), *to, scale(by), SUBTRACT, divide(share)]
            yield _finished(pool, "unmerge" + (", torch before 2.1" if old else ""), steps)
