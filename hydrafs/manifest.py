"""What a diff says about its model: the part of ``docs/FORMAT.md`` that is msgpack.

A *section* is an ordered run of spans of one dtype that one codec stores with one set of parameters. Its spans' bytes,
put one after another, are cut into chunks of ``chunk_nbytes``; the last one is shorter. A large tensor has a section of
its own; small tensors of a kind share one, and so do all literals: that is how small spans share chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from hydrafs.dtypes import DTYPES
from hydrafs.errors import CorruptDiff, HydraError, UnsupportedDiff

PREDICTION_NONE = 0
PREDICTION_SAME = 1
PREDICTION_TENSOR = 2
PREDICTION_FORMULA = 3

SELF = -1
"""The parent number that means the model itself (an EMA copy beside its live weights)."""

KNOWN_FEATURES: frozenset[str] = frozenset()
"""The features of later writers that this reader understands; version 1 itself needs none."""

MAX_SPANS = 4_000_000
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


class SpanRecord(msgspec.Struct, array_like=True, frozen=True):
    """One span of the model, in file order; its offset is the sum of the sizes before it.

    ``prediction`` is one of the ``PREDICTION_`` numbers; ``parent`` an index into the parents or ``SELF``, ``origin``
    the offset in the parent of the predicting elements, ``origin_dtype`` their type (empty: the section's own).
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


class _Required(msgspec.Struct, array_like=True):
    """The first field alone, so that a reader can refuse by name what it cannot decode."""

    required: tuple[str, ...]


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
        unknown = sorted(set(msgspec.msgpack.decode(data, type=_Required, strict=True).required) - KNOWN_FEATURES)
        if unknown:
            raise UnsupportedDiff("a diff needs features unknown here", where=where, detail=", ".join(unknown))
        return msgspec.msgpack.decode(data, type=Manifest, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDiff("the manifest of a diff cannot be read", where=where, detail=str(error)) from None


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
    check(MIN_CHUNK_NBYTES <= manifest.chunk_nbytes <= MAX_CHUNK_NBYTES, f"chunk size {manifest.chunk_nbytes}")
    check(manifest.chunk_nbytes % 16 == 0, f"chunk size {manifest.chunk_nbytes} splits elements")
    check(len(manifest.sha256) == 32, "SHA-256 of another length")
    check(0 <= manifest.size < 1 << 62, f"size {manifest.size}")
    for section in manifest.sections:
        check(not section.dtype or section.dtype in DTYPES, f"dtype {section.dtype!r}")
        check(not section.narrow or (section.narrow in DTYPES and bool(section.dtype)), f"narrow {section.narrow!r}")
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
    first_chunk = np.zeros(sections, dtype=np.int64)
    np.cumsum(counts[:-1], out=first_chunk[1:])
    table = SpanTable(offsets, in_section, first_chunk, section_nbytes, tuple(section_spans), int(counts.sum()))
    _check_predictions(manifest, table, check)
    return table


def _check_predictions(manifest: Manifest, table: SpanTable, check: object) -> None:
    assert callable(check)
    predicts_itself = np.array(
        [s.prediction != PREDICTION_NONE and s.parent == SELF for s in manifest.spans], dtype=bool
    )
    for number, span in enumerate(manifest.spans):
        section = manifest.sections[span.section]
        itemsize = DTYPES[section.dtype].nbytes if section.dtype else 1
        check(span.nbytes % itemsize == 0, f"span {number} is no whole number of elements")
        if span.prediction == PREDICTION_NONE:
            continue
        check(span.prediction in (PREDICTION_SAME, PREDICTION_TENSOR), f"prediction {span.prediction}")
        check(-1 <= span.parent < len(manifest.parents), f"parent {span.parent}")
        check(not span.origin_dtype or (span.origin_dtype in DTYPES and bool(section.dtype)), "an origin's dtype")
        check(span.prediction != PREDICTION_SAME or not span.origin_dtype, "the same bytes of another dtype")
        nbytes = origin_nbytes(span, section)
        size = manifest.size if span.parent == SELF else manifest.parents[span.parent].size
        check(0 <= span.origin <= size - nbytes, f"span {number} is predicted from outside its parent")
        if span.parent == SELF:
            # One step only: the bytes that predict must not themselves be predicted from this model.
            first = int(np.searchsorted(table.offsets, span.origin, side="right")) - 1
            last = int(np.searchsorted(table.offsets, span.origin + nbytes - 1, side="right"))
            check(not predicts_itself[first:last].any(), f"span {number} is predicted by what it predicts")
            # Chunks are decoded whole: a chunk that holds both ends would need itself.
            sections = {manifest.spans[i].section for i in range(first, last)}
            check(span.section not in sections, f"span {number} shares a section with what predicts it")
            for other in sections:
                members = table.section_spans[other]
                check(not predicts_itself[members].any(), f"span {number} is predicted by what it predicts")


def origin_nbytes(span: SpanRecord, section: Section) -> int:
    """How many bytes of the parent predict the whole span."""
    if not span.origin_dtype:
        return span.nbytes
    return span.nbytes // DTYPES[section.dtype].nbytes * DTYPES[span.origin_dtype].nbytes


def parents_used(manifest: Manifest) -> set[int]:
    """The numbers of the parents that at least one span is predicted from."""
    return {s.parent for s in manifest.spans if s.prediction != PREDICTION_NONE and s.parent != SELF}


__all__ = [
    "PREDICTION_FORMULA",
    "PREDICTION_NONE",
    "PREDICTION_SAME",
    "PREDICTION_TENSOR",
    "SELF",
    "HydraError",
    "Manifest",
    "Parent",
    "Section",
    "SpanRecord",
    "SpanTable",
    "decode_manifest",
    "encode_manifest",
    "origin_nbytes",
    "parents_used",
    "tabulate",
]
