"""The manifest: what is written is read, and the arithmetic of sections and chunks is that of docs/FORMAT.md."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrafs.dtypes import DTYPES
from hydrafs.identity import probe
from hydrafs.layout import BytesSource
from hydrafs.manifest import (
    SELF,
    Manifest,
    Parent,
    Section,
    SpanRecord,
    decode_manifest,
    encode_manifest,
    origin_nbytes,
    parents_used,
    tabulate,
)

SHA256 = bytes(range(32))


def manifest_of(spans: list[SpanRecord], sections: list[Section], chunk_nbytes: int = 4096, **more: object) -> Manifest:
    manifest = Manifest(
        required=(),
        name="x.safetensors",
        size=sum(s.nbytes for s in spans),
        sha256=SHA256,
        mode=0o100644,
        mtime_ns=-5,
        container="safetensors",
        chunk_nbytes=chunk_nbytes,
        parents=(Parent(SHA256, 1 << 40, "a/b.ckpt", (1 << 64) - 1),),
        sections=tuple(sections),
        spans=tuple(spans),
    )
    return msgspec.structs.replace(manifest, **more)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Sound manifests: literals and numbers in any order over a few sections; predictions from one huge parent."""
    sections = draw(
        st.lists(
            st.builds(Section, st.sampled_from(["", "U8", "F16", "F32", "I64"]), st.integers(1, 3)),
            min_size=1,
            max_size=5,
        )
    )
    spans = []
    for number in draw(st.lists(st.integers(0, len(sections) - 1), max_size=30)):
        itemsize = DTYPES[sections[number].dtype].nbytes if sections[number].dtype else 1
        count = draw(st.integers(1, 5000))
        predicted = bool(sections[number].dtype) and draw(st.booleans())
        spans.append(
            SpanRecord(
                count * itemsize,
                number,
                draw(st.text(max_size=5)),
                (count,),
                tuple(draw(st.lists(st.text(max_size=3), max_size=2))),
                draw(st.sampled_from([1, 2])) if predicted else 0,
                0,
                draw(st.integers(0, 1 << 39)) if predicted else 0,
            )
        )
    return manifest_of(spans, sections, draw(st.sampled_from([4096, 4112, 65536])))


@settings(max_examples=150, deadline=None)
@given(manifests())
def test_what_is_written_is_read(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), "x") == manifest


@settings(max_examples=150, deadline=None)
@given(manifests())
def test_the_table_is_what_counting_gives(manifest: Manifest) -> None:
    """Held against the plainest way to count: span by span, byte position by byte position."""
    table = tabulate(manifest, "x")
    position = 0
    filled = [0] * len(manifest.sections)
    members: list[list[int]] = [[] for _ in manifest.sections]
    for number, span in enumerate(manifest.spans):
        assert table.offsets[number] == position
        assert table.in_section[number] == filled[span.section]
        members[span.section].append(number)
        position += span.nbytes
        filled[span.section] += span.nbytes
    assert table.section_nbytes.tolist() == filled
    assert [m.tolist() for m in table.section_spans] == members
    first = 0
    for number, nbytes in enumerate(filled):
        assert table.first_chunk[number] == first
        count = (nbytes + manifest.chunk_nbytes - 1) // manifest.chunk_nbytes
        for place in range(count):
            assert table.chunk_section(first + place) == (number, place)
        first += count
    assert table.chunk_count == first


def test_the_fields_stand_in_the_order_of_the_format() -> None:
    """docs/FORMAT.md gives this order; a writer in another language has only that."""
    span = SpanRecord(8, 0, "w", (2, 2), ("tied",), 2, SELF, 8, "F32")
    manifest = manifest_of([span], [Section("F16", 3, "", b"p")], metadata=(("format", "pt"),), writer="w 1")
    manifest = msgspec.structs.replace(manifest, hashes=(("blake3", SHA256),))
    assert msgspec.msgpack.decode(encode_manifest(manifest)) == [
        [],
        "x.safetensors",
        8,
        SHA256,
        0o100644,
        -5,
        "safetensors",
        4096,
        [[SHA256, 1 << 40, "a/b.ckpt", (1 << 64) - 1]],
        [["F16", 3, "", b"p"]],
        [[8, 0, "w", [2, 2], ["tied"], 2, -1, 8, "F32", 0, []]],
        [["format", "pt"]],
        "w 1",
        [],
        [["blake3", SHA256]],
    ]


def test_fields_at_the_end_may_be_left_out() -> None:
    packed = msgspec.msgpack.encode(
        [[], "x", 8, SHA256, 0, 0, "opaque", 4096, [], [["F16", 3]], [[8, 0]]],
    )
    manifest = decode_manifest(packed, "x")
    assert manifest.spans == (SpanRecord(8, 0),)
    assert manifest.sections == (Section("F16", 3),)
    assert (manifest.metadata, manifest.writer) == ((), "")


def test_a_model_without_bytes() -> None:
    for sections in ([], [Section("", 2)], [Section("", 2), Section("F16", 3)]):
        table = tabulate(manifest_of([], sections), "x")
        assert table.chunk_count == 0
        assert len(table.offsets) == 0


def test_a_section_that_holds_no_span_is_passed_over() -> None:
    sections = [Section("", 2), Section("F16", 3), Section("F32", 3), Section("", 2)]
    table = tabulate(manifest_of([SpanRecord(5000, 0), SpanRecord(9000, 3)], sections), "x")
    assert [table.chunk_section(c) for c in range(table.chunk_count)] == [(0, 0), (0, 1), (3, 0), (3, 1), (3, 2)]


def test_how_many_bytes_of_a_parent_predict_a_span() -> None:
    assert origin_nbytes(SpanRecord(8, 0), Section("F16", 3)) == 8
    assert origin_nbytes(SpanRecord(8, 0, origin_dtype="F32"), Section("F16", 3)) == 16
    assert origin_nbytes(SpanRecord(8, 0, origin_dtype="F16"), Section("F32", 3)) == 4
    assert origin_nbytes(SpanRecord(8, 0), Section("", 2)) == 8


def test_parents_used_are_those_that_predict() -> None:
    spans = [
        SpanRecord(8, 0, parent=7),
        SpanRecord(8, 0, prediction=1, parent=2),
        SpanRecord(8, 0, prediction=2, parent=0),
        SpanRecord(8, 0, prediction=2, parent=SELF),
    ]
    assert parents_used(manifest_of(spans, [Section("F16", 3)])) == {0, 2}


@pytest.mark.parametrize("nbytes", [0, 1, 5000, 128 << 10, (128 << 10) + 1, 1_000_003])
def test_a_probe_is_what_the_format_says(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    sample = data
    if nbytes > 128 << 10:
        sample = b"".join(data[(nbytes - 4096) * i // 31 :][:4096] for i in range(32))
    expected = xxhash.xxh3_64_intdigest(struct.pack("<Q", nbytes) + sample)
    assert probe(BytesSource(data)) == expected
