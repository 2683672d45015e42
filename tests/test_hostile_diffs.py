"""Diffs that are damaged, or made to do harm: the right bytes or a typed error, in bounded time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import xxhash
import zstandard
from conftest import Filled

from hydrafs.cache import ChunkCache
from hydrafs.codecs import registry
from hydrafs.diff import INDEX_ROW, TRAILER_NBYTES, DiffFile, Trailer
from hydrafs.dtypes import DTYPES
from hydrafs.errors import (
    CorruptChunk,
    CorruptDiff,
    HydraError,
    ParentChanged,
    ParentLoop,
    ParentMissing,
    ParentUnavailable,
    UnsupportedDiff,
)
from hydrafs.formulas import Formula, Step, cast, get, scale
from hydrafs.manifest import PREDICTION_FORMULA, Manifest, Operand, Parent, Section, SpanRecord
from hydrafs.opening import MAX_DEPTH, Opener
from hydrafs.store import Store, trailer_of

RAW, ZSTD, PLANES = 1, 2, 3
Chunk = tuple[bytes, int, int, bytes]
"""Payload, codec, flags, and the decoded bytes that the checksum is taken of."""


def forge(path: Path, manifest: Manifest | bytes, chunks: Sequence[Chunk] = (), **trailer: int | bytes) -> Path:
    """A diff whose checksums all agree, whatever it says. ``trailer`` replaces fields of the trailer."""
    body = b"\x89HYDRA\r\n" + struct.pack("<II", 1, 0)
    index = b""
    for payload, codec, flags, decoded in chunks:
        index += struct.pack("<QQIBBH", len(body), xxhash.xxh3_64_intdigest(decoded), len(payload), codec, flags, 0)
        body += payload
    full = manifest if isinstance(manifest, bytes) else msgspec.msgpack.encode(manifest)
    packed = zstandard.ZstdCompressor(level=3).compress(full)
    fields: dict[str, int | bytes] = {
        "index_offset": len(body),
        "index_nbytes": len(index),
        "index_checksum": xxhash.xxh3_64_intdigest(index),
        "manifest_offset": len(body) + len(index),
        "manifest_nbytes": len(packed),
        "manifest_checksum": xxhash.xxh3_64_intdigest(packed),
        "size": manifest.size if isinstance(manifest, Manifest) else 0,
        "mtime_ns": 1,
        "mode": 0o100644,
        "manifest_full_nbytes": len(full),
        "sha256": manifest.sha256 if isinstance(manifest, Manifest) else bytes(32),
        **trailer,
    }
    end = Trailer(**fields).pack()  # type: ignore[arg-type]
    path.write_bytes(body + index + packed + end)
    return path


def manifest_of(
    spans: Sequence[SpanRecord], sections: Sequence[Section], size: int | None = None, **more: object
) -> Manifest:
    manifest = Manifest(
        (), "x.bin", sum(s.nbytes for s in spans) if size is None else size, bytes(32), 0o100644, 1, "opaque", 4096, (),
        tuple(sections), tuple(spans),
    )  # fmt: skip
    return msgspec.structs.replace(manifest, **more)


LITERAL = Section("", RAW)
HALVES = Section("F16", PLANES)


def literal(data: bytes, **more: object) -> tuple[Manifest, list[Chunk]]:
    sha256 = hashlib.sha256(data).digest()
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    return (
        manifest_of([SpanRecord(len(data), 0)], [LITERAL], sha256=sha256, **more),
        [(c, RAW, 0, c) for c in pieces],
    )


def read(root: Path, path: Path) -> bytes:
    """All of the model, opened as the mount opens it, and read in pieces."""
    store = Store(root)
    opener = Opener(store, ChunkCache(1 << 20))
    with contextlib.closing(store), contextlib.closing(opener), opener.open_diff(path) as model:
        return b"".join(model.pread(i, 10_000) for i in range(0, model.size, 10_000))


# Damage


def check_damaged(filled: Filled, damaged: bytes) -> bool:
    """Write ``damaged`` in the diff's place; whether it could be read. Wrong bytes fail the test."""
    filled.diff.write_bytes(damaged)
    try:
        data = read(filled.root, filled.diff)
    except HydraError as error:
        assert isinstance(error, CorruptDiff | UnsupportedDiff | ParentUnavailable), error
        assert "\n" not in str(error)
        return False
    assert data == filled.data
    return True


def test_a_truncated_diff_is_refused(filled: Filled) -> None:
    filled.dehydrate()
    whole = filled.diff.read_bytes()
    rng = random.Random(0)
    lengths = {
        *range(0, 300, 7),
        *range(len(whole) - 400, len(whole), 11),
        *(rng.randrange(len(whole)) for _ in "1" * 60),
    }
    for length in sorted(lengths):
        assert not check_damaged(filled, whole[:length]), f"{length} bytes of {len(whole)} were taken for a diff"
        with pytest.raises(CorruptDiff):
            trailer_of(filled.diff)


def test_a_diff_with_something_behind_it_is_refused(filled: Filled) -> None:
    filled.dehydrate()
    whole = filled.diff.read_bytes()
    for more in (b"\0", bytes(128), whole[:-1]):
        assert not check_damaged(filled, whole + more)
    # With a trailer at its end again it says where its parts are; if they are the right ones, it is whole.
    for more in (whole[-128:], whole):
        check_damaged(filled, whole + more)


def test_a_flipped_bit_gives_the_right_bytes_or_a_typed_error(filled: Filled) -> None:
    filled.dehydrate()
    whole = filled.diff.read_bytes()
    rng = random.Random(1)
    end = len(whole)
    with DiffFile(filled.diff) as diff:
        index = diff.trailer.index_offset
    places = [
        *range(16),
        *(rng.randrange(16, index) for _ in range(120)),
        *(rng.randrange(index, end) for _ in range(60)),
    ]
    places += range(end - 128, end)
    survived = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        if check_damaged(filled, bytes(damaged)):
            survived.append(place)
    # Four bytes of the header are reserved and nothing reads them; zstd too has bits that mean nothing.
    assert {p for p in survived if p < 16 or p >= index} <= {12, 13, 14, 15}


def test_runs_of_junk_in_a_diff(filled: Filled) -> None:
    filled.dehydrate()
    whole = filled.diff.read_bytes()
    rng = random.Random(2)
    for _ in range(60):
        start, count = rng.randrange(len(whole)), rng.randrange(1, 5000)
        junk = rng.choice([bytes(count), b"\xff" * count, rng.randbytes(count)])
        damaged = whole[:start] + junk + whole[start + count :]
        check_damaged(filled, damaged[: len(whole)])


def test_a_diff_of_junk_is_refused(store: Path) -> None:
    rng = random.Random(3)
    for nbytes in (0, 1, 127, 128, 143, 144, 145, 5000):
        (store / "x.bin.hydra").write_bytes(rng.randbytes(nbytes))
        with pytest.raises(CorruptDiff):
            read(store, store / "x.bin.hydra")


def test_a_forged_diff_that_is_sound_is_read(store: Path) -> None:
    """The forger is good: what follows is refused for what it says, not for how it is made."""
    data = random.Random(4).randbytes(9000)
    assert read(store, forge(store / "x.bin.hydra", *literal(data))) == data


# Manifests that contradict themselves

HUGE = 1 << 60
F32 = Section("F32", PLANES)
PARENT = Parent(b"p" * 32, 8192, "parent.bin", 0)


def computed(steps: Sequence[Step], *operands: Operand, nbytes: int = 8, formula: int = 0, **more: object) -> Manifest:
    """A model of one tensor that a formula predicts."""
    span = SpanRecord(nbytes, 0, prediction=PREDICTION_FORMULA, formula=formula, operands=operands)
    more = {"parents": (PARENT,), "formulas": (Formula("hostile", tuple(steps)),), **more}
    return msgspec.structs.replace(manifest_of([span], [HALVES]), **more)


HALF = Operand(0, 0, "F16")

CONTRADICTIONS: dict[str, Manifest] = {
    "no such formula": computed([get(0)], HALF, formula=1),
    "a negative formula": computed([get(0)], HALF, formula=-1),
    "a formula of nothing": computed([get(0)]),
    "a formula of too much": computed([get(0)], *[HALF] * 9),
    "a formula without steps": computed([], HALF),
    "a formula of endless steps": computed([get(0), *[scale(1.0)] * 100_000], HALF),
    "a formula with an unknown step": computed([get(0), Step("system")], HALF),
    "a formula that divides by zero": computed([get(0), Step("divide")], HALF),
    "a formula that leaves nothing": computed([get(0), get(0)], HALF),
    "a formula of another type": computed([get(0), cast("F32")], HALF),
    "a formula of an unknown type": computed([get(0)], Operand(0, 0, "F17")),
    "a formula of no parent": computed([get(0)], Operand(1, 0, "F16")),
    "a formula of the model itself": computed([get(0)], Operand(-1, 0, "F16")),
    "a formula from before a parent": computed([get(0)], Operand(0, -2, "F16")),
    "a formula from behind a parent": computed([get(0)], Operand(0, 8186, "F16")),
    "a product from behind a parent": computed([Step("product", 0.0, 0, "", 4096, 4), cast("F16")], HALF, HALF),
    "a product of broken rows": computed([Step("product", 0.0, 0, "", 1, 3), cast("F16")], HALF, HALF),
    "a computed literal": computed([get(0)], HALF, sections=(Section("", RAW),)),
    "spans too short": manifest_of([SpanRecord(10, 0)], [LITERAL], 11),
    "spans too long": manifest_of([SpanRecord(10, 0)], [LITERAL], 9),
    "no spans": manifest_of([], [LITERAL], 10),
    "negative span": manifest_of([SpanRecord(20, 0), SpanRecord(-10, 0)], [LITERAL], 10),
    "empty span": manifest_of([SpanRecord(10, 0), SpanRecord(0, 0)], [LITERAL], 10),
    "huge span": manifest_of([SpanRecord(HUGE, 0)], [LITERAL]),
    "spans that wrap around": manifest_of([SpanRecord((1 << 63) - 1, 0)] * 2 + [SpanRecord(12, 0)], [LITERAL], 10),
    "size beyond 63 bits": manifest_of([SpanRecord((1 << 64) - 1, 0)], [LITERAL]),
    "negative size": manifest_of([], [], -1),
    "section out of range": manifest_of([SpanRecord(10, 1)], [LITERAL]),
    "negative section": manifest_of([SpanRecord(10, -1)], [LITERAL]),
    "no sections": manifest_of([SpanRecord(10, 0)], []),
    "chunks of nothing": manifest_of([SpanRecord(10, 0)], [LITERAL], chunk_nbytes=0),
    "chunks of one byte": manifest_of([SpanRecord(10, 0)], [LITERAL], chunk_nbytes=1),
    "negative chunks": manifest_of([SpanRecord(10, 0)], [LITERAL], chunk_nbytes=-4096),
    "odd chunks": manifest_of([SpanRecord(10, 0)], [LITERAL], chunk_nbytes=4097),
    "huge chunks": manifest_of([SpanRecord(10, 0)], [LITERAL], chunk_nbytes=HUGE),
    "short SHA-256": manifest_of([SpanRecord(10, 0)], [LITERAL], sha256=b"short"),
    "unknown dtype": manifest_of([SpanRecord(10, 0)], [Section("F17", RAW)]),
    "half an element": manifest_of([SpanRecord(11, 0)], [HALVES]),
    "narrowed to nothing known": manifest_of([SpanRecord(8, 0)], [Section("F32", PLANES, "F17")]),
    "narrowed to something wider": manifest_of([SpanRecord(8, 0)], [Section("F16", PLANES, "F32")]),
    "narrowed integers": manifest_of([SpanRecord(8, 0)], [Section("I64", PLANES, "F16")]),
    "narrowed literals": manifest_of([SpanRecord(8, 0)], [Section("", ZSTD, "F16")]),
    "parent out of range": manifest_of([SpanRecord(8, 0, prediction=2, parent=1)], [HALVES], parents=(PARENT,)),
    "parent below itself": manifest_of([SpanRecord(8, 0, prediction=2, parent=-2)], [HALVES], parents=(PARENT,)),
    "no parents": manifest_of([SpanRecord(8, 0, prediction=1, parent=0)], [HALVES]),
    "origin behind the parent": manifest_of([SpanRecord(8, 0, prediction=2, origin=8185)], [HALVES], parents=(PARENT,)),
    "origin far behind the parent": manifest_of(
        [SpanRecord(8, 0, prediction=1, origin=(1 << 64) - 8)], [HALVES], parents=(PARENT,)
    ),
    "negative origin": manifest_of([SpanRecord(8, 0, prediction=1, origin=-8)], [HALVES], parents=(PARENT,)),
    "origin of a wider type behind the parent": manifest_of(
        [SpanRecord(8, 0, prediction=2, origin=8177, origin_dtype="F32")], [HALVES], parents=(PARENT,)
    ),
    "origin of no type": manifest_of([SpanRecord(8, 0, prediction=2, origin_dtype="F17")], [HALVES], parents=(PARENT,)),
    "integers from numbers": manifest_of(
        [SpanRecord(8, 0, prediction=2, origin_dtype="F32")], [Section("I64", PLANES)], parents=(PARENT,)
    ),
    "the same bytes of another type": manifest_of(
        [SpanRecord(8, 0, prediction=1, origin_dtype="F32")], [HALVES], parents=(PARENT,)
    ),
    "a parent of negative size": manifest_of([SpanRecord(8, 0)], [HALVES], parents=(Parent(b"p" * 32, -1, "p", 0),)),
    "a parent with a short SHA-256": manifest_of([SpanRecord(8, 0)], [HALVES], parents=(Parent(b"p", 1, "p", 0),)),
    "the same parent twice": manifest_of([SpanRecord(8, 0)], [HALVES], parents=(PARENT, PARENT)),
    "predicted by itself": manifest_of([SpanRecord(8, 0, prediction=2, parent=-1, origin=0)], [HALVES]),
    "predicted by each other": manifest_of(
        [SpanRecord(8, 0, prediction=2, parent=-1, origin=8), SpanRecord(8, 1, prediction=2, parent=-1, origin=0)],
        [HALVES, HALVES],
    ),
    "predicted by what shares its chunk": manifest_of(
        [SpanRecord(8, 0, prediction=2, parent=-1, origin=8), SpanRecord(8, 0)], [HALVES]
    ),
    "predicted in two steps": manifest_of(
        [
            SpanRecord(8, 0, prediction=2, parent=-1, origin=8),
            SpanRecord(8, 1, prediction=1, parent=-1, origin=16),
            SpanRecord(8, 2),
        ],
        [HALVES, HALVES, HALVES],
    ),
    "predicted by what shares a chunk with what it predicts": manifest_of(
        [
            SpanRecord(8, 0, prediction=2, parent=-1, origin=16),
            SpanRecord(8, 1, prediction=2, parent=-1, origin=24),
            SpanRecord(8, 1),
            SpanRecord(8, 2),
        ],
        [HALVES, HALVES, HALVES],
    ),
    "predicted by two spans, one of them itself": manifest_of(
        [SpanRecord(8, 1), SpanRecord(8, 0, prediction=2, parent=-1, origin=4)], [HALVES, HALVES]
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(store: Path, what: str) -> None:
    manifest = CONTRADICTIONS[what]
    (store / "parent.bin").write_bytes(bytes(8192))
    size = manifest.size if 0 <= manifest.size < 1 << 64 else 0
    path = forge(store / "x.bin.hydra", manifest, [(b"12345678", RAW, 0, b"12345678")], size=size)
    with pytest.raises(CorruptDiff):
        read(store, path)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\x91\x90",
        b"\x93\x90\xa1x\x01",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\xc1",
        msgspec.msgpack.encode({"required": []}),
        msgspec.msgpack.encode(["feature"]),
        msgspec.msgpack.encode([[1], "x"]),
        b"\x9d\x90\xa2\xff\xfe" + bytes(11),
        msgspec.msgpack.encode(literal(b"x" * 8)[0])[:-3],
    ],
)
def test_what_is_no_manifest_is_refused(store: Path, packed: bytes) -> None:
    path = forge(store / "x.bin.hydra", packed)
    with pytest.raises(CorruptDiff):
        read(store, path)


def test_the_trailer_and_the_manifest_must_agree(store: Path) -> None:
    manifest, chunks = literal(b"x" * 5000)
    for field in ({"size": 4999}, {"sha256": b"s" * 32}):
        with pytest.raises(CorruptDiff):
            read(store, forge(store / "x.bin.hydra", manifest, chunks, **field))


@pytest.mark.parametrize(
    "field",
    [
        {"index_offset": 1 << 63},
        {"index_offset": 0},
        {"index_nbytes": (1 << 64) - 1},
        {"index_nbytes": 23},
        {"index_nbytes": 24},
        {"index_nbytes": 0},
        {"manifest_offset": (1 << 64) - 1},
        {"manifest_offset": 15},
        {"manifest_nbytes": (1 << 64) - 1},
        {"manifest_nbytes": 0},
        {"manifest_full_nbytes": (1 << 32) - 1},
        {"manifest_full_nbytes": 0},
        {"manifest_full_nbytes": 1000},
    ],
)
def test_a_trailer_that_points_elsewhere_is_refused(store: Path, field: dict[str, int]) -> None:
    manifest, chunks = literal(b"x" * 5000)
    with pytest.raises(CorruptDiff):
        read(store, forge(store / "x.bin.hydra", manifest, chunks, **field))


def test_chunks_that_point_outside_are_refused(store: Path) -> None:
    manifest, chunks = literal(b"x" * 5000)
    path = forge(store / "x.bin.hydra", manifest, chunks)
    sound = path.read_bytes()
    trailer = trailer_of(path)
    for place, value in ((0, (1 << 64) - 1), (0, trailer.index_offset), (0, 0), (16, (1 << 32) - 1)):
        index = bytearray(sound[trailer.index_offset :][: trailer.index_nbytes])
        struct.pack_into("<I" if place == 16 else "<Q", index, place, value)
        end = Trailer(
            **{
                **{n: getattr(trailer, n) for n in Trailer.__dataclass_fields__},
                "index_checksum": xxhash.xxh3_64_intdigest(bytes(index)),
            }
        ).pack()
        path.write_bytes(sound[: trailer.index_offset] + index + sound[trailer.manifest_offset : -TRAILER_NBYTES] + end)
        with pytest.raises(CorruptDiff):
            read(store, path)


# What a later writer may say


def test_an_unknown_feature_is_refused_by_name(store: Path) -> None:
    manifest, chunks = literal(b"x" * 5000)
    manifest = msgspec.structs.replace(manifest, required=("weights-of-antimatter", "zz\n\x1b[2J"))
    # Whatever else such a diff says: it is the feature that is named.
    packed = msgspec.msgpack.encode([manifest.required, {"another": "shape"}])
    for content in (manifest, packed):
        with pytest.raises(UnsupportedDiff, match="weights-of-antimatter") as caught:
            read(store, forge(store / "x.bin.hydra", content, chunks))
        assert "update hydrafs" in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prediction", [4, 5, 1000])
def test_an_unknown_prediction_is_refused_at_open(store: Path, prediction: int) -> None:
    manifest = manifest_of([SpanRecord(8, 0, prediction=prediction)], [HALVES], parents=(PARENT,))
    with pytest.raises(UnsupportedDiff, match=f"prediction {prediction}"):
        read(store, forge(store / "x.bin.hydra", manifest, [(b"", 0, 0, bytes(8))]))


@pytest.mark.parametrize("codec", [100, 255])
def test_an_unknown_codec_is_refused_at_open(store: Path, codec: int) -> None:
    manifest, chunks = literal(b"x" * 5000)
    chunks[1] = (b"?", codec, 0, chunks[1][3])
    path = forge(store / "x.bin.hydra", manifest, chunks)
    opener = Opener(Store(store), ChunkCache(1 << 20))
    with pytest.raises(UnsupportedDiff, match=f"codec {codec}"):
        opener.open_diff(path)


def test_another_version_is_refused(store: Path) -> None:
    manifest, chunks = literal(b"x" * 5000)
    path = forge(store / "x.bin.hydra", manifest, chunks)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 2)
    path.write_bytes(data)
    with pytest.raises(UnsupportedDiff, match="2, expected 1"):
        read(store, path)
    struct.pack_into("<I", data, 8, 1)
    struct.pack_into("<I", data, len(data) - 24, 7)
    struct.pack_into("<Q", data, len(data) - 16, xxhash.xxh3_64_intdigest(bytes(data[-128:-16])))
    path.write_bytes(data)
    with pytest.raises(UnsupportedDiff, match="7, expected 1"):
        trailer_of(path)


def test_fields_that_a_later_writer_adds_are_passed_over(store: Path) -> None:
    manifest, chunks = literal(b"x" * 5000)
    packed = msgspec.msgpack.encode([*msgspec.to_builtins(manifest, builtin_types=(bytes,)), "more", {"k": [1]}])
    path = forge(store / "x.bin.hydra", packed, chunks, size=5000, sha256=manifest.sha256)
    assert read(store, path) == b"x" * 5000


# Chunks


def one_chunk(store: Path, section: Section, payload: bytes, codec: int, flags: int = 0, size: int = 64) -> Path:
    manifest = manifest_of([SpanRecord(size, 0)], [section])
    return forge(store / "x.bin.hydra", manifest, [(payload, codec, flags, bytes(size))])


def bomb(nbytes: int, **options: object) -> bytes:
    compressor = zstandard.ZstdCompressor(level=19, **options)
    out = compressor.compressobj(size=nbytes) if options.get("write_content_size", True) else compressor.compressobj()
    data = b"".join(out.compress(bytes(1 << 20)) for _ in range(nbytes >> 20))
    return data + out.flush()


BAD_CHUNKS: dict[str, tuple[Section, bytes, int, int]] = {
    "nothing stored and nothing predicts it": (LITERAL, b"", 0, 0),
    "a payload where there is none": (LITERAL, b"x", 0, 0),
    "raw too short": (LITERAL, b"x" * 63, RAW, 0),
    "raw too long": (LITERAL, b"x" * 65, RAW, 0),
    "raw of other bytes": (LITERAL, b"x" * 64, RAW, 0),
    "no frame": (Section("", ZSTD), b"junk", ZSTD, 0),
    "an empty frame": (Section("", ZSTD), b"", ZSTD, 0),
    "a frame of other length": (Section("", ZSTD), zstandard.compress(bytes(65)), ZSTD, 0),
    "a bomb": (Section("", ZSTD), bomb(256 << 20), ZSTD, 0),
    "a bomb that says nothing": (Section("", ZSTD), bomb(64 << 20, write_content_size=False), ZSTD, 0),
    "half a frame": (Section("", ZSTD), zstandard.compress(random.Random(5).randbytes(64))[:40], ZSTD, 0),
    "planes without a header": (HALVES, b"\0\0\0", PLANES, 0),
    "planes of an unknown mode": (HALVES, struct.pack("<II", 3 << 30, 0), PLANES, 0),
    "a constant of nine bits": (HALVES, struct.pack("<II", 256, 0), PLANES, 0),
    "planes too short": (HALVES, struct.pack("<II", 1 << 30 | 31, 0) + bytes(31), PLANES, 0),
    "planes that are not there": (HALVES, struct.pack("<II", 1 << 30 | 32, 0) + bytes(31), PLANES, 0),
    "planes and more": (HALVES, struct.pack("<II", 0, 0) + b"x", PLANES, 0),
    "a plane that is no frame": (HALVES, struct.pack("<II", 2 << 30 | 4, 0) + b"junk", PLANES, 0),
    "a plane that is a bomb": (HALVES, b"", PLANES, 0),
    "narrowed where nothing is": (HALVES, struct.pack("<II", 0, 0), PLANES, 1),
    "narrowed beyond the section": (LITERAL, b"", 0, 1),
    "of literals, in planes": (LITERAL, struct.pack("<I", 1), PLANES, 0),
}


@pytest.mark.parametrize("what", BAD_CHUNKS)
def test_a_bad_chunk_is_named(store: Path, what: str) -> None:
    section, payload, codec, flags = BAD_CHUNKS[what]
    if what == "a plane that is a bomb":
        frame = bomb(256 << 20, compression_params=None)[4:]
        payload = struct.pack("<II", 2 << 30 | len(frame), 0) + frame
    path = one_chunk(store, section, payload, codec, flags)
    with pytest.raises(CorruptChunk, match="chunk 0 of a diff") as caught:
        read(store, path)
    assert "x.bin.hydra" in str(caught.value)


def test_every_codec_refuses_junk_for_every_type() -> None:
    import numpy as np

    rng = random.Random(6)
    for name in registry.names():
        for dtype in DTYPES.values():
            for _ in range(12):
                out = np.empty(dtype.nbytes * rng.randrange(1, 50), np.uint8)
                known = np.frombuffer(rng.randbytes(out.size), np.uint8) if rng.random() < 0.5 else None
                payload = rng.randbytes(rng.randrange(0, 80))
                with contextlib.suppress(CorruptChunk):
                    registry.by_name(name).decode_into(known, payload, out, dtype, b"")


# Parents


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        ".",
        "..",
        "../../../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "x" * 5000,
        "/".join("d" * 300),
        "\n",
        ".hydrafs",
    ],
)
def test_a_parent_of_any_name_is_looked_for_and_missed(store: Path, name: str) -> None:
    parent = Parent(b"p" * 32, os.stat("/etc/passwd").st_size, name, 0)
    manifest = manifest_of([SpanRecord(8, 0, prediction=1)], [HALVES], parents=(parent,))
    path = forge(store / "x.bin.hydra", manifest, [(b"", 0, 0, bytes(8))])
    with pytest.raises((ParentMissing, ParentChanged)) as caught:
        read(store, path)
    assert (b"p" * 32).hex() in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_fifo_under_a_parents_name_does_not_hang(store: Path) -> None:
    os.mkfifo(store / "parent.bin")
    manifest = manifest_of([SpanRecord(8, 0, prediction=1)], [HALVES], parents=(PARENT,))
    with pytest.raises(ParentMissing):
        read(store, forge(store / "x.bin.hydra", manifest, [(b"", 0, 0, bytes(8))]))


def dependent(path: Path, sha256: bytes, parent_sha256: bytes, parent_name: str) -> Path:
    parent = Parent(parent_sha256, 8, parent_name, 0)
    manifest = manifest_of([SpanRecord(8, 0, prediction=1)], [HALVES], parents=(parent,), sha256=sha256)
    return forge(path, manifest, [(b"", 0, 0, bytes(8))])


def test_a_loop_of_parents_is_refused(store: Path) -> None:
    a, b, c = (letter * 32 for letter in (b"a", b"b", b"c"))
    itself = dependent(store / "self.bin.hydra", a, a, "self.bin")
    with pytest.raises(ParentLoop):
        read(store, itself)
    itself.unlink()
    paths = [
        dependent(store / "a.bin.hydra", a, b, "b.bin"),
        dependent(store / "b.bin.hydra", b, c, "c.bin"),
        dependent(store / "c.bin.hydra", c, a, "a.bin"),
    ]
    for path in paths:
        with pytest.raises(ParentLoop):
            read(store, path)


def test_a_chain_of_parents_has_a_limit(store: Path) -> None:
    digests = [bytes([i]) * 32 for i in range(MAX_DEPTH + 2)]
    data = bytes(8)
    forge(store / "0.bin.hydra", manifest_of([SpanRecord(8, 0)], [LITERAL], sha256=digests[0]), [(data, RAW, 0, data)])
    for i in range(1, MAX_DEPTH + 1):
        dependent(store / f"{i}.bin.hydra", digests[i], digests[i - 1], f"{i - 1}.bin")
    assert read(store, store / f"{MAX_DEPTH - 1}.bin.hydra") == data
    with pytest.raises(ParentLoop, match=f"more than {MAX_DEPTH}"):
        read(store, store / f"{MAX_DEPTH}.bin.hydra")


def test_parents_that_multiply_are_refused_in_bounded_time(store: Path) -> None:
    """Each of eight levels needs all twenty diffs of the level below: 20^7 ways, were they all opened."""
    width = 20
    for level in range(MAX_DEPTH):
        for i in range(width):
            names = [(f"{level - 1}-{j}.bin", bytes([level, j]) * 16) for j in range(width)] if level else []
            parents = tuple(Parent(sha256, 8, name, 0) for name, sha256 in names)
            manifest = manifest_of([SpanRecord(8, 0)], [LITERAL], sha256=bytes([level + 1, i]) * 16, parents=parents)
            forge(store / f"{level}-{i}.bin.hydra", manifest, [(bytes(8), RAW, 0, bytes(8))])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HydraError):
        read(store, store / f"{MAX_DEPTH - 1}-0.bin.hydra")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_parent_that_claims_a_sha256_is_not_believed(filled: Filled) -> None:
    """The base was replaced by a diff that says it is the base, and holds other bytes: sound checksums, wrong model."""
    filled.dehydrate()
    filled.let_go()
    original = filled.base.read_bytes()
    sha256 = hashlib.sha256(original).digest()
    filled.base.unlink()
    changed = bytearray(original)
    for place in range(2000, len(changed), 5000):
        changed[place] ^= 0x40
    manifest, chunks = literal(bytes(changed))
    forge(filled.root / "base.safetensors.hydra", msgspec.structs.replace(manifest, sha256=sha256), chunks)
    store = Store(filled.root)
    opener = Opener(store, ChunkCache(1 << 20))
    with contextlib.closing(store), opener.open_diff(filled.diff) as model:
        refused = 0
        for offset in range(0, model.size, 4096):
            try:
                assert model.pread(offset, 4096) == filled.data[offset : offset + 4096]
            except HydraError:
                refused += 1
        assert refused


# Time and memory

_BOUNDED = """
import contextlib, resource, sys, time
from pathlib import Path
from hydrafs.cache import ChunkCache
from hydrafs.errors import HydraError
from hydrafs.opening import Opener
from hydrafs.store import Store
import numpy, zstandard, xxhash
vm = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (vm + int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
path = Path(sys.argv[1])
try:
    with Opener(Store(path.parent), ChunkCache(1 << 20)).open_diff(path) as model:
        for offset in range(0, model.size, 1 << 20):
            model.pread(offset, 1 << 20)
except HydraError as error:
    print(type(error).__name__)
else:
    print("read")
"""


def outcome(path: Path, memory_nbytes: int) -> str:
    """What became of opening and reading ``path`` with only so much memory: an error's name, or ``read``."""
    run = subprocess.run(
        [sys.executable, "-c", _BOUNDED, path, str(memory_nbytes)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _array(count: int) -> bytes:
    return struct.pack(">BI", 0xDD, count)


def _manifest_with(field: int, packed: bytes) -> bytes:
    manifest = manifest_of([SpanRecord(8, 0)], [LITERAL])
    fields = [msgspec.msgpack.encode(v) for v in msgspec.to_builtins(manifest, builtin_types=(bytes,))]
    fields[field] = packed
    return bytes([0x90 | len(fields)]) + b"".join(fields)


MANY: dict[str, Callable[[], bytes]] = {
    "required features": lambda: _manifest_with(0, _array(10_000_000) + b"\xa0" * 10_000_000),
    "parents": lambda: _manifest_with(8, _array(5_000_000) + b"\x94\xc4\x00\x00\xa0\x00" * 5_000_000),
    "sections": lambda: _manifest_with(9, _array(10_000_000) + b"\x92\xa0\x01" * 10_000_000),
    "spans": lambda: _manifest_with(10, _array(10_000_000) + b"\x92\x01\x00" * 10_000_000),
    "strings": lambda: _manifest_with(11, _array(10_000_000) + b"\x92\xa0\xa0" * 10_000_000),
    "bytes": lambda: _manifest_with(3, struct.pack(">BI", 0xC6, 1 << 29) + bytes(1 << 29)),
}


@pytest.mark.parametrize("what", MANY)
def test_a_manifest_of_millions_is_refused_in_little_memory(store: Path, what: str) -> None:
    path = forge(store / "x.bin.hydra", MANY[what]())
    assert path.stat().st_size < 200_000
    assert outcome(path, 256 << 20) == "CorruptDiff"


def test_many_spans_that_predict_each_other_take_no_long_time(store: Path) -> None:
    """Each of 100,000 spans is predicted by all the other half: pair by pair, the checks would take hours."""
    count = 100_000
    spans = [SpanRecord(count, 0, prediction=2, parent=-1, origin=count * count)] * count
    spans += [SpanRecord(1, 1)] * count
    manifest = manifest_of(spans, [Section("U8", PLANES), Section("U8", PLANES)])
    path = forge(store / "x.bin.hydra", msgspec.msgpack.encode(manifest), size=manifest.size)
    assert outcome(path, 512 << 20) == "CorruptDiff"


def test_a_sparse_diff_is_not_read_whole(store: Path) -> None:
    """A hole of a terabyte where the trailer says that the manifest, or the index, is."""
    manifest, chunks = literal(b"x" * 5000)
    path = forge(store / "x.bin.hydra", manifest, chunks)
    whole = path.read_bytes()
    trailer = {n: getattr(trailer_of(path), n) for n in Trailer.__dataclass_fields__}
    for field in ("manifest", "index"):
        moved = dict(trailer, manifest_offset=16 + (1 << 40))
        moved["index_nbytes"] = (1 << 40) // 24 * 24 if field == "index" else moved["index_nbytes"]
        moved["index_offset"] = 16
        if field == "manifest":
            moved |= {"index_nbytes": 24, "manifest_offset": 40, "manifest_nbytes": 1 << 40}
        path.unlink()
        with path.open("wb") as file:
            file.write(whole[:16])
            file.seek(1 << 41)
            file.write(Trailer(**moved).pack())
        assert outcome(path, 256 << 20) == "CorruptDiff"


def test_a_model_of_an_exabyte_is_refused(store: Path) -> None:
    for size in (1 << 45, 1 << 61):
        manifest = manifest_of([SpanRecord(size, 0)], [LITERAL], chunk_nbytes=4096)
        assert outcome(forge(store / "x.bin.hydra", manifest), 256 << 20) == "CorruptDiff"


def test_a_chunk_that_is_a_bomb_takes_little_memory(store: Path) -> None:
    large = 60 << 20
    section = Section("F32", PLANES)
    frame = bomb(1 << 30)[4:]
    payload = struct.pack("<IIII", *([2 << 30 | len(frame)] * 4)) + frame * 4
    for made, codec in ((payload, PLANES), (bomb(1 << 30), ZSTD)):
        manifest = manifest_of([SpanRecord(large, 0)], [section], chunk_nbytes=64 << 20)
        path = forge(store / "x.bin.hydra", manifest, [(made, codec, 0, b"")])
        assert outcome(path, 512 << 20) == "CorruptChunk"


def test_the_index_row_has_the_size_that_the_format_says() -> None:
    assert INDEX_ROW.itemsize == 24
    assert TRAILER_NBYTES == 128
