"""What a diff says about its model: the part of ``docs/FORMAT.md`` that is msgpack.

A *section* is an ordered run of spans of one dtype that one codec stores with one set of parameters. Its spans' bytes,
put one after another, are cut into chunks of ``chunk_nbytes``; the last one is shorter. A large tensor has a section of
its own; small tensors of a kind share one, and so do all literals: that is how small spans share chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from hydrafs.codecs import registry
from hydrafs.digests import checked
from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel, CorruptDiff, HydraError, UnsupportedDiff
from hydrafs.formulas import MAX_OPERANDS, Formula, operand_elements, result_dtype
from hydrafs.predictors import NARROWINGS, castable

PREDICTION_NONE = 0
PREDICTION_SAME = 1
PREDICTION_TENSOR = 2
PREDICTION_FORMULA = 3

SELF = -1
"""The parent number that means the model itself (an EMA copy beside its live weights)."""

FORMULA_FEATURE = "formula"
"""What a diff requires of its reader where a span is predicted by a formula."""

KNOWN_FEATURES: frozenset[str] = frozenset({*registry.FEATURES.values(), FORMULA_FEATURE})
"""The features of later writers that this reader understands; version 1 itself needs none."""

MAX_SPANS = 1_000_000
MAX_PARENTS = 64
MAX_CHUNKS = 1 << 22
MAX_FORMULAS = 100_000
_MAX_STRINGS = 10_000
MIN_CHUNK_NBYTES = 4096
MAX_CHUNK_NBYTES = 64 << 20


class Parent(msgspec.Struct, array_like=True, frozen=True):
    """A model that the diff needs.

    ``sha256`` and ``size`` identify it; ``name`` is where it stood, relative to the store or absolute, and is only a
    hint. ``probe`` is the xxh3-64 of sampled blocks (``hydrafs.identity.probe``): it tells another file in a
    millisecond, before the SHA-256 is known.
    """

    sha256: bytes
    size: int
    name: str
    probe: int


class Operand(msgspec.Struct, array_like=True, frozen=True):
    """What a formula computes with: elements of type ``dtype`` from ``origin`` on in ``parent``, an index into the
    parents."""

    parent: int
    origin: int
    dtype: str


class SpanRecord(msgspec.Struct, array_like=True, frozen=True):
    """One span of the model, in file order; its offset is the sum of the sizes before it.

    ``prediction`` is one of the ``PREDICTION_`` numbers; ``parent`` an index into the parents or ``SELF``, ``origin``
    the offset in the parent of the predicting elements, ``origin_dtype`` their type (empty: the section's own). For a
    formula, ``formula`` is an index into the manifest's, ``operands`` what it computes with, and ``origin_dtype`` the
    type of its result; ``parent`` and ``origin`` say nothing.
    """

    nbytes: int
    section: int
    name: str = ""
    shape: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    prediction: int = PREDICTION_NONE
    parent: int = 0
    origin: int = 0
    origin_dtype: str = ""
    formula: int = 0
    operands: tuple[Operand, ...] = ()


class Section(msgspec.Struct, array_like=True, frozen=True):
    """How the spans of one section are stored. ``dtype`` empty: literal bytes. ``narrow``: the dtype to which chunks
    marked in the index are narrowed before they are coded. ``params``: what the codec keeps once per section."""

    dtype: str
    codec: int
    narrow: str = ""
    params: bytes = b""


class Manifest(msgspec.Struct, array_like=True, frozen=True):
    """Everything about the model that is not a chunk. Field order is the format's."""

    required: tuple[str, ...]
    name: str
    size: int
    sha256: bytes
    mode: int
    mtime_ns: int
    container: str
    chunk_nbytes: int
    parents: tuple[Parent, ...]
    sections: tuple[Section, ...]
    spans: tuple[SpanRecord, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    writer: str = ""
    formulas: tuple[Formula, ...] = ()
    hashes: tuple[tuple[str, bytes], ...] = ()
    """By name, other hashes of the model (``hydrafs.digests``): what the writer took of the bytes that it coded."""


class _Outline(msgspec.Struct, array_like=True):
    """The fields up to the last list, the lists not decoded: a list of millions fits in a few kilobytes of zstd."""

    required: msgspec.Raw
    name: str
    size: int
    sha256: bytes
    mode: int
    mtime_ns: int
    container: str
    chunk_nbytes: int
    parents: msgspec.Raw
    sections: msgspec.Raw
    spans: msgspec.Raw
    metadata: msgspec.Raw = msgspec.Raw(b"\x90")
    writer: str = ""
    formulas: msgspec.Raw = msgspec.Raw(b"\x90")
    hashes: msgspec.Raw = msgspec.Raw(b"\x90")


class _Required(msgspec.Struct, array_like=True):
    """The first field alone, so that a reader can refuse by name what it cannot decode."""

    required: msgspec.Raw


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as msgpack."""
    return msgspec.msgpack.encode(manifest)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest of ``data``.

    Raises:
        UnsupportedDiff: it requires features that are unknown here; the message names them.
        CorruptDiff: it is no manifest.
    """
    try:
        required = msgspec.msgpack.decode(data, type=_Required).required
        _bound(required, _MAX_STRINGS, "required features", where)
        unknown = sorted(set(msgspec.msgpack.decode(required, type=tuple[str, ...])) - KNOWN_FEATURES)
        if unknown:
            raise UnsupportedDiff("a diff needs features unknown here", where=where, detail=", ".join(unknown))
        outline = msgspec.msgpack.decode(data, type=_Outline)
        _bound(outline.parents, MAX_PARENTS, "parents", where)
        _bound(outline.sections, MAX_SPANS, "sections", where)
        _bound(outline.spans, MAX_SPANS, "spans", where)
        _bound(outline.metadata, _MAX_STRINGS, "strings", where)
        _bound(outline.formulas, MAX_FORMULAS, "formulas", where)
        _bound(outline.hashes, _MAX_STRINGS, "hashes", where)
        return msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDiff("the manifest of a diff cannot be read", where=where, detail=str(error)) from None


def decode_hashes(data: bytes, where: str) -> dict[str, bytes]:
    """The hashes alone of a manifest, its lists of spans passed over; those that are known here.

    Raises:
        CorruptDiff: it is no manifest.
    """
    try:
        hashes = msgspec.msgpack.decode(data, type=_Outline).hashes
        _bound(hashes, _MAX_STRINGS, "hashes", where)
        return checked(msgspec.msgpack.decode(hashes, type=tuple[tuple[str, bytes], ...]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDiff("the manifest of a diff cannot be read", where=where, detail=str(error)) from None


def _bound(packed: msgspec.Raw, limit: int, what: str, where: str) -> None:
    """Refuse a msgpack array of more than ``limit`` entries before any of them is decoded."""
    head = bytes(memoryview(packed)[:5])
    count = limit + 1
    if head and head[0] & 0xF0 == 0x90:
        count = head[0] & 0x0F
    elif head and head[0] in (0xDC, 0xDD):
        count = int.from_bytes(head[1 : 3 if head[0] == 0xDC else 5], "big")
    if count > limit:
        raise CorruptDiff("the manifest of a diff is too large", where=where, detail=f"more than {limit} {what}")


Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SpanTable:
    """The arithmetic of a manifest: where each span stands in the model, and where in its section.

    All arrays have one entry per span, save ``first_chunk`` and ``section_nbytes`` (one per section) and
    ``section_spans`` (the spans of each section, in order). Thread safety: immutable.
    """

    offsets: Table
    in_section: Table
    first_chunk: Table
    section_nbytes: Table
    section_spans: tuple[Table, ...]
    chunk_count: int

    def chunk_section(self, chunk: int) -> tuple[int, int]:
        """The section that ``chunk`` belongs to, and its number within it."""
        section = int(np.searchsorted(self.first_chunk, chunk, side="right")) - 1
        # Sections without bytes own no chunk and share their first number with the next one: the last of them is meant.
        return section, chunk - int(self.first_chunk[section])


def tabulate(manifest: Manifest, where: str) -> SpanTable:
    """Check that the manifest hangs together, and lay out its spans.

    Raises:
        CorruptDiff: spans that do not cover the model, indexes out of range, ranges outside a parent.
    """

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise CorruptDiff("the manifest of a diff contradicts itself", where=where, detail=what)

    check(len(manifest.spans) <= MAX_SPANS, "too many spans")
    check(len({p.sha256 for p in manifest.parents}) == len(manifest.parents), "a parent twice")
    check(MIN_CHUNK_NBYTES <= manifest.chunk_nbytes <= MAX_CHUNK_NBYTES, f"chunk size {manifest.chunk_nbytes}")
    check(manifest.chunk_nbytes % 16 == 0, f"chunk size {manifest.chunk_nbytes} splits elements")
    check(len(manifest.sha256) == 32, "SHA-256 of another length")
    check(0 <= manifest.size < 1 << 62, f"size {manifest.size}")
    for section in manifest.sections:
        check(not section.dtype or section.dtype in DTYPES, f"dtype {section.dtype!r}")
        narrows = NARROWINGS.get(section.narrow) == section.dtype and bool(section.dtype)
        check(not section.narrow or narrows, f"{section.dtype!r} narrowed to {section.narrow!r}")
    for parent in manifest.parents:
        check(len(parent.sha256) == 32 and 0 <= parent.size < 1 << 62, "a parent's identity")
    sections = len(manifest.sections)
    sizes = [span.nbytes for span in manifest.spans]
    owners = [span.section for span in manifest.spans]
    check(all(0 < n <= manifest.size for n in sizes), "a span without a size")
    check(sum(sizes) == manifest.size, f"spans of {sum(sizes)} bytes for a model of {manifest.size}")
    check(all(0 <= s < sections for s in owners), "a span of no section")
    nbytes = np.array(sizes, dtype=np.int64)
    owner = np.array(owners, dtype=np.int64)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(nbytes[:-1], out=offsets[1:])
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(sections + 1))
    in_section = np.zeros(len(sizes), dtype=np.int64)
    section_nbytes = np.zeros(sections, dtype=np.int64)
    section_spans = []
    for number in range(sections):
        members = order[bounds[number] : bounds[number + 1]]
        ends = np.cumsum(nbytes[members])
        in_section[members] = ends - nbytes[members]
        section_nbytes[number] = ends[-1] if len(ends) else 0
        section_spans.append(members)
    counts = -(-section_nbytes // manifest.chunk_nbytes)
    check(int(counts.sum()) <= MAX_CHUNKS, f"{int(counts.sum())} chunks")
    first_chunk = np.zeros(sections, dtype=np.int64)
    np.cumsum(counts[:-1], out=first_chunk[1:])
    table = SpanTable(offsets, in_section, first_chunk, section_nbytes, tuple(section_spans), int(counts.sum()))
    _check_predictions(manifest, table, where, check)
    return table


def _check_predictions(manifest: Manifest, table: SpanTable, where: str, check: Callable[[bool, str], None]) -> None:
    spans, sections = manifest.spans, manifest.sections
    predicts_itself = np.array(
        [s.prediction in (PREDICTION_SAME, PREDICTION_TENSOR) and s.parent == SELF for s in spans], dtype=bool
    )
    # One step only: what predicts must not itself be predicted from this model. Chunks are decoded whole, so nothing
    # that shares a section with such a span may predict either. Counted up, so that a range is asked in one step.
    tainted = np.array([bool(predicts_itself[members].any()) for members in table.section_spans], dtype=bool)
    tainted_before = np.zeros(len(spans) + 1, dtype=np.int64)
    if len(spans):
        np.cumsum(tainted[[s.section for s in spans]], out=tainted_before[1:])
    for number, span in enumerate(spans):
        section = sections[span.section]
        itemsize = DTYPES[section.dtype].nbytes if section.dtype else 1
        check(span.nbytes % itemsize == 0, f"span {number} is no whole number of elements")
        if span.prediction == PREDICTION_NONE:
            continue
        if span.prediction == PREDICTION_FORMULA:
            _check_formula(manifest, span, f"span {number}", check)
            continue
        if span.prediction not in (PREDICTION_SAME, PREDICTION_TENSOR):
            raise UnsupportedDiff(
                "a diff needs a kind of prediction unknown here", where=where, detail=f"prediction {span.prediction}"
            )
        check(-1 <= span.parent < len(manifest.parents), f"parent {span.parent}")
        check(not span.origin_dtype or (span.origin_dtype in DTYPES and bool(section.dtype)), "an origin's dtype")
        check(span.prediction != PREDICTION_SAME or not span.origin_dtype, "the same bytes of another dtype")
        if section.dtype:
            origin = DTYPES[span.origin_dtype or section.dtype]
            for coded in filter(None, (section.dtype, section.narrow)):
                check(castable(origin, DTYPES[coded]), f"{origin.name} predicts {coded}")
        nbytes = origin_nbytes(span, section)
        size = manifest.size if span.parent == SELF else manifest.parents[span.parent].size
        check(0 <= span.origin <= size - nbytes, f"span {number} is predicted from outside its parent")
        if span.parent == SELF:
            first = int(np.searchsorted(table.offsets, span.origin, side="right")) - 1
            last = int(np.searchsorted(table.offsets, span.origin + nbytes - 1, side="right"))
            if tainted_before[first] != tainted_before[last]:
                check(False, f"span {number} is predicted by what it predicts")


def _check_formula(manifest: Manifest, span: SpanRecord, name: str, check: Callable[[bool, str], None]) -> None:
    section = manifest.sections[span.section]
    check(bool(section.dtype), f"{name} is literal and computed")
    check(0 <= span.formula < len(manifest.formulas), f"{name} is computed by formula {span.formula}")
    check(0 < len(span.operands) <= MAX_OPERANDS, f"{name} is computed from {len(span.operands)} operands")
    check(all(0 <= o.parent < len(manifest.parents) and o.dtype in DTYPES for o in span.operands), f"{name}'s operands")
    formula = manifest.formulas[span.formula]
    try:
        result = result_dtype(formula, [o.dtype for o in span.operands])
        counts = operand_elements(formula, len(span.operands), span.nbytes // DTYPES[section.dtype].nbytes)
    except BadModel as error:
        check(False, f"{name}: {error.detail}")
        return
    check(result == (span.origin_dtype or section.dtype), f"{name} is computed as {result}")
    for coded in filter(None, (section.dtype, section.narrow)):
        check(castable(DTYPES[result], DTYPES[coded]), f"{result} predicts {coded}")
    for operand, count in zip(span.operands, counts, strict=True):
        end = operand.origin + count * DTYPES[operand.dtype].nbytes
        inside = 0 <= operand.origin <= end <= manifest.parents[operand.parent].size
        check(inside, f"{name} is computed from outside its parent")


def origin_nbytes(span: SpanRecord, section: Section) -> int:
    """How many bytes of the parent predict the whole span."""
    if not span.origin_dtype:
        return span.nbytes
    return span.nbytes // DTYPES[section.dtype].nbytes * DTYPES[span.origin_dtype].nbytes


def parents_used(manifest: Manifest) -> set[int]:
    """The numbers of the parents that at least one span is predicted from."""
    return {parent for span in manifest.spans for parent in parents_of(span)}


def parents_of(span: SpanRecord) -> set[int]:
    """The numbers of the parents that predict a span."""
    if span.prediction == PREDICTION_FORMULA:
        return {operand.parent for operand in span.operands}
    return {span.parent} if span.prediction != PREDICTION_NONE and span.parent != SELF else set()


__all__ = [
    "FORMULA_FEATURE",
    "PREDICTION_FORMULA",
    "PREDICTION_NONE",
    "PREDICTION_SAME",
    "PREDICTION_TENSOR",
    "SELF",
    "HydraError",
    "Manifest",
    "Operand",
    "Parent",
    "Section",
    "SpanRecord",
    "SpanTable",
    "decode_hashes",
    "decode_manifest",
    "encode_manifest",
    "origin_nbytes",
    "parents_of",
    "parents_used",
    "tabulate",
]
