"""Putting together what the parents say of a chunk: the same code when a chunk is written and when it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydrafs import predictors
from hydrafs.dtypes import BYTES, DTYPES, DType
from hydrafs.formulas import Formula, evaluate
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_NONE, Section, SpanRecord, SpanTable

Bytes = npt.NDArray[np.uint8]
ReadParent = Callable[[int, int, memoryview], None]
"""``read(parent, offset, out)``: fill ``out`` from a parent, or raise."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one span within a chunk: ``nbytes`` bytes from ``inside`` the span stand at ``place`` in the chunk."""

    span: int
    inside: int
    place: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Predictor:
    """The predictions of one diff. Thread safety: immutable; as safe as ``read_parent``."""

    spans: Sequence[SpanRecord]
    sections: Sequence[Section]
    table: SpanTable
    read_parent: ReadParent
    formulas: Sequence[Formula] = ()

    def dtype(self, section: int) -> DType:
        """The element type of a section; bytes for literals."""
        name = self.sections[section].dtype
        return DTYPES[name] if name else BYTES

    def pieces(self, section: int, begin: int, nbytes: int) -> list[Piece]:
        """The spans that hold ``[begin, begin + nbytes)`` of a section."""
        members = self.table.section_spans[section]
        first = int(np.searchsorted(self.table.in_section[members], begin, side="right")) - 1
        pieces = []
        place = 0
        while place < nbytes:
            number = int(members[first])
            inside = begin + place - int(self.table.in_section[number])
            count = min(nbytes - place, self.spans[number].nbytes - inside)
            pieces.append(Piece(number, inside, place, count))
            place += count
            first += 1
        return pieces

    def predict(self, section: int, begin: int, nbytes: int, coded: DType) -> Bytes | None:
        """What the parents say of ``[begin, begin + nbytes)`` of a section, as elements of ``coded``.

        ``None`` where they say nothing at all; zeros for the spans without a prediction among others that have one.
        """
        pieces = self.pieces(section, begin, nbytes)
        if all(self.spans[piece.span].prediction == PREDICTION_NONE for piece in pieces):
            return None
        dtype = self.dtype(section)
        result = np.empty(nbytes // dtype.nbytes * coded.nbytes, dtype=np.uint8)
        for piece in pieces:
            span = self.spans[piece.span]
            at, count = piece.place // dtype.nbytes, piece.nbytes // dtype.nbytes
            into = result[at * coded.nbytes : (at + count) * coded.nbytes]
            if span.prediction == PREDICTION_NONE:
                into[:] = 0
                continue
            if span.prediction == PREDICTION_FORMULA:
                computed, name = self._compute(span, piece.inside // dtype.nbytes, count)
                into[:] = predictors.cast(computed, DTYPES[name], coded)
                continue
            origin = DTYPES[span.origin_dtype] if span.origin_dtype else dtype
            offset = span.origin + piece.inside // dtype.nbytes * origin.nbytes
            if origin is coded:
                self.read_parent(span.parent, offset, memoryview(into))
                continue
            raw = np.empty(count * origin.nbytes, dtype=np.uint8)
            self.read_parent(span.parent, offset, memoryview(raw))
            into[:] = predictors.cast(raw, origin, coded)
        return result

    def _compute(self, span: SpanRecord, first: int, count: int) -> tuple[Bytes, str]:
        """Elements ``[first, first + count)`` of a span that a formula predicts, and their type."""
        dtypes = [operand.dtype for operand in span.operands]

        def read(index: int, start: int, elements: int) -> Bytes:
            operand = span.operands[index]
            nbytes = DTYPES[operand.dtype].nbytes
            raw = np.empty(elements * nbytes, dtype=np.uint8)
            self.read_parent(operand.parent, operand.origin + start * nbytes, memoryview(raw))
            return raw

        return evaluate(self.formulas[span.formula], dtypes, read, first, count)
