"""What a fine-tune changed, and how much: from its diff alone, and by samples of it against its parents.

Rule: the diff alone is enough for what each layer costs; samples are few, and are told as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hydrafs import predictors
from hydrafs.anatomy import KINDS, Place, place_of
from hydrafs.codecs import registry
from hydrafs.composition import operand_weights, span_costs
from hydrafs.diff import FLAG_NARROWED, DiffFile
from hydrafs.dtypes import DTYPES
from hydrafs.errors import ParentChanged
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_SAME, PREDICTION_TENSOR, SELF, parents_of
from hydrafs.prediction import Predictor
from hydrafs.rehydrate import Rehydrated

MAX_ROWS = 64
"""Parts with more blocks than this are shown with several blocks in a row."""
_SAMPLE_ELEMENTS = 1 << 16
_REAL = ("F64", "F32", "F16", "BF16")


@dataclass(slots=True)
class Cell:
    """Tensors of one kind in one block: their size, what is stored of them, and how much of them is in chunks that
    nothing is stored of."""

    nbytes: int = 0
    stored: float = 0.0
    untouched: int = 0

    @property
    def share(self) -> float:
        """What is stored of them, 0 to 1 or a little more."""
        return self.stored / self.nbytes if self.nbytes else 0.0


@dataclass(slots=True)
class Part:
    """A part of a network: ``rows`` are the names of its blocks in order, ``cells`` by row and kind."""

    name: str
    rows: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers that it has."""
        return [kind for kind in KINDS if any(k == kind for _, k in self.cells)]

    def total(self) -> Cell:
        """The whole part."""
        whole = Cell()
        for cell in self.cells.values():
            _add(whole, cell)
        return whole


@dataclass(frozen=True, slots=True)
class Sample:
    """What samples of a part say: the norm of the difference by the norm of the weights, and the share of elements
    that differ."""

    relative_norm: float
    changed: float


def parts_of(diff: DiffFile) -> list[Part]:
    """The network that the diff's model holds, block by block, with what each kind of layer costs."""
    placed: dict[str, dict[Place, Cell]] = {}
    for span, cost in zip(diff.manifest.spans, span_costs(diff), strict=True):
        if not diff.manifest.sections[span.section].dtype:
            continue
        place = place_of(span.name)
        cell = placed.setdefault(place.part, {}).setdefault(place, Cell())
        _add(cell, Cell(span.nbytes, cost.stored, cost.untouched))
    parts = [_part(name, cells) for name, cells in placed.items()]
    return sorted(parts, key=lambda part: -part.total().nbytes)


def _part(name: str, cells: dict[Place, Cell]) -> Part:
    blocks = sorted({(place.order, place.block) for place in cells})
    group = -(-len(blocks) // MAX_ROWS)
    part = Part(name)
    row_of: dict[tuple[tuple[int, int], str], str] = {}
    for start in range(0, len(blocks), group):
        together = blocks[start : start + group]
        row = together[0][1] if len(together) == 1 else f"{together[0][1]} ... {together[-1][1]}"
        part.rows.append(row)
        row_of.update(dict.fromkeys(together, row))
    for place, cell in cells.items():
        _add(part.cells.setdefault((row_of[place.order, place.block], place.kind), Cell()), cell)
    return part


def _add(to: Cell, cell: Cell) -> None:
    to.nbytes += cell.nbytes
    to.stored += cell.stored
    to.untouched += cell.untouched


def sample(model: Rehydrated, count: int = 24) -> dict[str, Sample]:
    """By part, how far a fine-tune went from what predicts it: from up to ``count`` chunks, spread over the model.

    Raises:
        HydraError: a chunk or a parent cannot be read.
    """
    diff = model.diff
    spans, sections, table = diff.manifest.spans, diff.manifest.sections, diff.table

    def read_parent(parent: int, offset: int, out: memoryview) -> None:
        source = model if parent == SELF else model.parents[parent].source
        if source.pread_into(offset, out) != out.nbytes:
            raise ParentChanged("a parent is too short", where=diff.path)

    predictor = Predictor(spans, sections, table, read_parent, diff.manifest.formulas)
    chunks: dict[str, list[int]] = {}
    for number, span in enumerate(spans):
        if span.prediction in (PREDICTION_SAME, PREDICTION_TENSOR) and sections[span.section].dtype in _REAL:
            begin = int(table.in_section[number]) // diff.manifest.chunk_nbytes
            end = -(-(int(table.in_section[number]) + span.nbytes) // diff.manifest.chunk_nbytes)
            first = int(table.first_chunk[span.section])
            chunks.setdefault(place_of(span.name).part, []).extend(range(first + begin, first + end))
    total = sum(map(len, chunks.values()))
    found = {}
    for part, numbers in chunks.items():
        numbers = sorted(set(numbers))
        wanted = min(len(numbers), max(2, round(count * len(numbers) / max(1, total))))
        picked = {numbers[(len(numbers) - 1) * i // max(1, wanted - 1)] for i in range(wanted)}
        sums = np.zeros(4)
        for chunk in picked:
            sums += _compare(model, predictor, chunk)
        if sums[3]:
            relative = math.sqrt(sums[0] / sums[1]) if sums[1] else math.inf if sums[0] else 0.0
            found[part] = Sample(relative, float(sums[2] / sums[3]))
    return found


def _compare(model: Rehydrated, predictor: Predictor, chunk: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of the first elements of a chunk: squares of the difference and of the weights, how many differ, how many."""
    diff = model.diff
    section, place = diff.table.chunk_section(chunk)
    dtype = predictor.dtype(section)
    begin = place * diff.manifest.chunk_nbytes
    nbytes = min(diff.manifest.chunk_nbytes, int(diff.table.section_nbytes[section]) - begin)
    nbytes = min(nbytes, _SAMPLE_ELEMENTS * dtype.nbytes)
    predicted = predictor.predict(section, begin, nbytes, dtype)
    if predicted is None:
        return np.zeros(4)
    if diff.chunk_codec[chunk] == registry.NONE and not diff.chunk_flags[chunk] & FLAG_NARROWED:
        actual = predicted
    else:
        actual = np.frombuffer(memoryview(model.chunk(chunk)), np.uint8)[:nbytes]
    a, p = (predictors.cast(raw, dtype, DTYPES["F32"]).view("<f4").astype(np.float64) for raw in (actual, predicted))
    good = np.isfinite(a) & np.isfinite(p)
    a, p = a[good], p[good]
    return np.array([float(((a - p) ** 2).sum()), float((p**2).sum()), float((a != p).sum()), float(a.size)])


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a parent a model holds: ``nbytes`` of it are predicted by the parent, with this weight on average and
    between these, where a formula says so (1 where the parent alone predicts)."""

    parent: int
    nbytes: int
    weight: float
    least: float
    most: float


def shares_of(diff: DiffFile) -> tuple[Share, ...]:
    """The parents that a diff is predicted by, the one that predicts most first."""
    seen: dict[int, list[tuple[int, float]]] = {}
    manifest = diff.manifest
    computed = sum(s.nbytes for s in manifest.spans if s.prediction == PREDICTION_FORMULA)
    weights: dict[tuple[int, int], list[float]] = {}
    for span in manifest.spans:
        if span.prediction == PREDICTION_FORMULA:
            key = span.formula, len(span.operands)
            if key not in weights:
                weights[key] = operand_weights(manifest.formulas[span.formula], len(span.operands))
            by_parent: dict[int, float] = {}
            for operand, weight in zip(span.operands, weights[key], strict=True):
                by_parent[operand.parent] = by_parent.get(operand.parent, 0.0) + weight
            for parent, weight in by_parent.items():
                # A factor of a product counts for no single number.
                seen.setdefault(parent, []).append((span.nbytes, weight or math.nan))
        else:
            for parent in parents_of(span):
                # Beside a merge, what is copied from one parent says nothing of the merge.
                seen.setdefault(parent, []).append((span.nbytes, 1.0 if not computed else math.nan))
    return tuple(sorted((_share(parent, rows) for parent, rows in seen.items()), key=lambda s: -s.nbytes))


def _share(parent: int, rows: Iterable[tuple[int, float]]) -> Share:
    rows = list(rows)
    known = [(n, w) for n, w in rows if not math.isnan(w)]
    nbytes = sum(n for n, _ in rows)
    if not known:
        return Share(parent, nbytes, math.nan, math.nan, math.nan)
    mean = sum(n * w for n, w in known) / sum(n for n, _ in known)
    return Share(parent, nbytes, mean, min(w for _, w in known), max(w for _, w in known))
