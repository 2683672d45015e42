"""How a model will be stored: its layout and its matches, turned into spans, sections and chunks.

Pure but for the samples that tell whether a tensor's values fit a narrower type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hydrafs import predictors
from hydrafs.codecs import registry
from hydrafs.dtypes import DTYPES
from hydrafs.formulas import Formula
from hydrafs.layout import ByteSource, Layout, Span
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_NONE, PREDICTION_TENSOR, SELF, Section, SpanRecord
from hydrafs.matching import Computed, Match

DEFAULT_CHUNK_NBYTES = 1 << 20
_NARROWER = {"F32": ("F16", "BF16"), "F64": ("F32",)}
_SAMPLES = 8
_SAMPLE_NBYTES = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """The spans of a model in file order and the sections that they are stored in. ``others``: for each section, the
    codecs that are tried on each of its chunks beside its own (none where it is empty). ``formulas``: what the spans'
    ``formula`` counts into."""

    spans: tuple[SpanRecord, ...]
    sections: tuple[Section, ...]
    chunk_nbytes: int
    others: tuple[tuple[int, ...], ...] = ()
    formulas: tuple[Formula, ...] = ()


def make_plan(
    source: ByteSource,
    layout: Layout,
    matches: Sequence[Match | Computed | None],
    *,
    chunk_nbytes: int = DEFAULT_CHUNK_NBYTES,
    codec: str = "planes",
) -> Plan:
    """The plan for ``layout``; ``matches`` has one entry per tensor of it, in order.

    A tensor of at least a chunk has a section of its own. Smaller ones share a section with their like: same type, same
    kind of prediction (none, a parent, a formula, the model itself), so that what predicts is never beside what it
    predicts.
    """
    numbers_codec = registry.by_name(codec).id
    literal_codec = registry.by_name("raw" if codec == "raw" else "zstd").id
    sections: list[Section] = []
    shared: dict[tuple[str, str, str], int] = {}
    spans: list[SpanRecord] = []
    formulas: dict[Formula, int] = {}

    def section_for(span: Span, kind: str, nbytes: int) -> int:
        narrow = _narrow_dtype(source, span)
        key = (span.dtype, kind, narrow)
        if nbytes < chunk_nbytes and key in shared:
            return shared[key]
        sections.append(Section(span.dtype, numbers_codec if span.dtype else literal_codec, narrow))
        if nbytes < chunk_nbytes:
            shared[key] = len(sections) - 1
        return len(sections) - 1

    for span, match in zip(layout.spans, _with_literals(layout, matches), strict=True):
        if not span.dtype:
            spans.append(SpanRecord(span.nbytes, section_for(span, "", 0)))
            continue
        if isinstance(match, Computed):
            spans.append(
                SpanRecord(
                    span.nbytes,
                    section_for(span, "formula", span.nbytes),
                    span.name,
                    span.shape,
                    span.aliases,
                    PREDICTION_FORMULA,
                    origin_dtype="" if match.dtype == span.dtype else match.dtype,
                    formula=formulas.setdefault(match.formula, len(formulas)),
                    operands=match.operands,
                )
            )
            continue
        itemsize = DTYPES[span.dtype].nbytes
        predicted = match.count * itemsize if match else 0
        if match and predicted:
            spans.append(
                SpanRecord(
                    predicted,
                    section_for(span, "self" if match.parent == SELF else "parent", predicted),
                    span.name,
                    span.shape,
                    span.aliases,
                    PREDICTION_TENSOR,
                    match.parent,
                    match.offset,
                    "" if match.dtype == span.dtype else match.dtype,
                )
            )
        rest = span.nbytes - predicted
        if rest:
            aliases = span.aliases if not predicted else ()
            spans.append(
                SpanRecord(rest, section_for(span, "none", rest), span.name, span.shape, aliases, PREDICTION_NONE)
            )
    return Plan(tuple(spans), tuple(sections), chunk_nbytes, formulas=tuple(formulas))


def _with_literals(layout: Layout, matches: Sequence[Match | Computed | None]) -> list[Match | Computed | None]:
    found = iter(matches)
    return [next(found) if span.dtype else None for span in layout.spans]


def _narrow_dtype(source: ByteSource, span: Span) -> str:
    """The narrower type that samples of a tensor fit, or nothing. Each chunk is tried in full when it is coded."""
    if span.dtype not in _NARROWER or not span.nbytes:
        return ""
    dtype = DTYPES[span.dtype]
    whole = span.nbytes // dtype.nbytes
    count = min(whole, _SAMPLE_NBYTES // dtype.nbytes)
    places = [0] if whole <= count else [(whole - count) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    raw = b"".join(source.pread(span.offset + place * dtype.nbytes, count * dtype.nbytes) for place in places)
    sample = np.frombuffer(raw, np.uint8)
    if not sample.any():
        return ""  # zeros fit every type and say nothing of the rest
    for name in _NARROWER[span.dtype]:
        if predictors.narrow(sample, DTYPES[name]) is not None:
            return name
    return ""
