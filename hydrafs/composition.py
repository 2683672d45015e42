"""What a dehydrated model is made of, in words: its formulas, and what each of its spans costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from hydrafs.codecs import registry
from hydrafs.diff import DiffFile
from hydrafs.formulas import Formula, rounded
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_SAME, Manifest, SpanRecord


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that formulas of one kind compute: ``text`` names the models and their weights, ``label`` the program.
    ``exact`` of the ``tensors`` need nothing stored beside it; one that shares a chunk with another is no better."""

    text: str
    label: str
    exact: int
    tensors: int

    def __str__(self) -> str:
        return f"{self.text} ({self.label}), exact for {self.exact} of {self.tensors} tensors"


def made_of(diff: DiffFile) -> list[Part]:
    """The merges that a diff consists of, the one of most tensors first; empty where no formula predicts anything."""
    manifest = diff.manifest
    weights: dict[tuple[str, tuple[int, ...]], list[Sequence[float]]] = {}
    exact: dict[tuple[str, tuple[int, ...]], int] = {}
    if not manifest.formulas:
        return []
    for span, cost in zip(manifest.spans, span_costs(diff), strict=True):
        if span.prediction == PREDICTION_FORMULA:
            parents, found = _weights(manifest, span)
            kind = (manifest.formulas[span.formula].label, parents)
            weights.setdefault(kind, []).append(found)
            exact[kind] = exact.get(kind, 0) + (not round(cost.stored))
    parts = []
    for (label, parents), rows in weights.items():
        names = [PurePath(manifest.parents[p].name).name for p in parents]
        low, high = np.min(rows, axis=0).tolist(), np.max(rows, axis=0).tolist()
        parts.append(Part(_sum_text(names, low, high), label, exact[label, parents], len(rows)))
    return sorted(parts, key=lambda part: -part.tensors)


def formula_text(manifest: Manifest, span: SpanRecord) -> str:
    """The formula of one span: the models with their weights, and the program."""
    parents, weights = _weights(manifest, span)
    names = [PurePath(manifest.parents[p].name).name for p in parents]
    return f"{_sum_text(names, weights, weights)}, {manifest.formulas[span.formula].label}"


def _weights(manifest: Manifest, span: SpanRecord) -> tuple[tuple[int, ...], list[float]]:
    """The parents that a span is computed from, and what each counts for: 0 where that is no single number."""
    found: dict[int, float] = {}
    for operand, weight in zip(
        span.operands, operand_weights(manifest.formulas[span.formula], len(span.operands)), strict=True
    ):
        found[operand.parent] = found.get(operand.parent, 0.0) + weight
    return tuple(found), list(found.values())


def operand_weights(formula: Formula, operands: int) -> list[float]:
    """What each operand counts for in a formula that sums them; the factors of a product as 0."""
    stack: list[Any] = []
    for step in formula.steps:
        if step.op == "get":
            stack.append(np.eye(operands)[step.index])
        elif step.op == "product":
            stack.append(np.zeros(operands))
        elif step.op == "scale":
            stack[-1] = stack[-1] * step.number
        elif step.op == "divide":
            stack[-1] = stack[-1] / step.number
        elif step.op != "cast":
            top, below = stack.pop(), stack.pop()
            if step.op == "lerp":
                stack.append(below + step.number * (top - below))
            else:
                stack.append(below + top if step.op == "add" else below - top)
    return [float(x) for x in stack[0]]


def _sum_text(names: Sequence[str], low: Sequence[float], high: Sequence[float]) -> str:
    text = ""
    for name, least, most in zip(names, low, high, strict=True):
        if _number(least) != _number(most):
            sign, part = "+", f"{_number(least)} to {_number(most)} x {name}"
        else:
            sign = "-" if least < 0 else "+"
            number = _number(abs(least))
            part = name if number in ("1.00", "0.00") else f"{number} x {name}"
        text += f" {sign} {part}" if text or sign == "-" else part
    return text.strip()


def _number(value: float) -> str:
    """A weight with the fewest digits that tell it, also where a program rounded it to half precision first."""
    for places in range(2, 7):
        near = round(value, places)
        if abs(near - value) < 1e-7 or value in (rounded(near, "F16"), rounded(near, "BF16")):
            return f"{near:.{places}f}"
    return f"{value:.6f}"


@dataclass(frozen=True, slots=True)
class SpanCost:
    """What a span costs: its share of the stored bytes of its chunks, how many of its bytes are the parent's or in
    chunks of which nothing is stored, and the codecs that they use."""

    stored: float
    untouched: int
    codecs: tuple[str, ...]


def span_costs(diff: DiffFile) -> list[SpanCost]:
    """What each span of a diff costs, from its index.

    A span that is its parent's very bytes costs nothing; others that share a chunk with it share by their sizes what is
    stored of the chunk.
    """
    sharers = [0] * diff.table.chunk_count
    for number, span in enumerate(diff.manifest.spans):
        if span.prediction != PREDICTION_SAME:
            for chunk, mine in _pieces(diff, number):
                sharers[chunk] += mine
    costs = []
    for number, span in enumerate(diff.manifest.spans):
        same = span.prediction == PREDICTION_SAME
        stored, untouched = 0.0, 0
        codecs: dict[str, None] = {}
        for chunk, mine in _pieces(diff, number):
            code = diff.chunk_codec[chunk]
            if not same:
                stored += diff.chunk_nbytes[chunk] * mine / sharers[chunk]
            untouched += mine if same or code == registry.NONE else 0
            codecs["-" if code == registry.NONE else registry.by_id(code).name] = None
        costs.append(SpanCost(stored, untouched, tuple(codecs)))
    return costs


def _pieces(diff: DiffFile, number: int) -> Iterator[tuple[int, int]]:
    """The chunks of a span, and how many of their bytes are its own."""
    size, table = diff.manifest.chunk_nbytes, diff.table
    span = diff.manifest.spans[number]
    begin = int(table.in_section[number])
    end = begin + span.nbytes
    first = int(table.first_chunk[span.section])
    for place in range(begin // size, -(-end // size)):
        yield first + place, min(end, (place + 1) * size) - max(begin, place * size)
