"""The ``.hydra`` file: its fixed parts byte by byte, and what is read is what was written."""

from __future__ import annotations

import io
import os
import random
import struct
from pathlib import Path

import msgspec
import pytest
import xxhash
import zstandard
from conftest import Filled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydrafs.diff import (
    END_MAGIC,
    HEADER_NBYTES,
    INDEX_ROW,
    MAGIC,
    TRAILER_NBYTES,
    DiffFile,
    DiffWriter,
    Trailer,
    read_trailer,
)
from hydrafs.errors import CorruptDiff, HydraError, NotFound
from hydrafs.manifest import Manifest, Section, SpanRecord
from hydrafs.store import trailer_of

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


def manifest_of(nbytes: int, chunk_nbytes: int = 4096) -> Manifest:
    spans = (SpanRecord(nbytes, 0),) if nbytes else ()
    return Manifest(
        (), "x", nbytes, bytes(range(32)), 0o100600, 77, "opaque", chunk_nbytes, (), (Section("", 1),), spans
    )


def written(payloads: list[bytes], manifest: Manifest, order: list[int] | None = None) -> bytes:
    file = io.BytesIO()
    writer = DiffWriter(file, len(payloads))  # type: ignore[arg-type]
    for chunk in order or range(len(payloads)):
        writer.append(chunk, payloads[chunk], 1, chunk % 4, xxhash.xxh3_64_intdigest(payloads[chunk]))
    assert writer.finish(manifest) == len(file.getvalue())
    return file.getvalue()


def test_every_offset_is_what_the_format_says() -> None:
    payloads = [b"a" * 4096, b"b" * 904]
    manifest = manifest_of(5000)
    data = written(payloads, manifest)
    assert data[:16] == b"\x89HYDRA\r\n" + struct.pack("<II", 1, 0)
    assert data[16:5016] == b"".join(payloads)
    trailer = data[-128:]
    (
        index_offset, index_nbytes, index_checksum, manifest_offset, manifest_nbytes, manifest_checksum,
        size, mtime_ns, mode, full_nbytes, sha256, version, reserved, checksum, magic,
    ) = struct.unpack("<QQQQQQQqII32sIIQ8s", trailer)  # fmt: skip
    assert (index_offset, index_nbytes) == (5016, 48)
    assert (manifest_offset, manifest_offset + manifest_nbytes) == (5064, len(data) - 128)
    assert (size, mtime_ns, mode, sha256) == (5000, 77, 0o100600, bytes(range(32)))
    assert (version, reserved, magic) == (1, 0, b"\n\rARDYH\x89")
    assert checksum == xxhash.xxh3_64_intdigest(trailer[:112])
    index = data[5016:5064]
    assert index_checksum == xxhash.xxh3_64_intdigest(index)
    assert index == b"".join(
        struct.pack("<QQIBBH", offset, xxhash.xxh3_64_intdigest(p), len(p), 1, flags, 0)
        for offset, p, flags in ((16, payloads[0], 0), (4112, payloads[1], 1))
    )
    packed = data[5064:-128]
    assert manifest_checksum == xxhash.xxh3_64_intdigest(packed)
    full = zstandard.decompress(packed)
    assert len(full) == full_nbytes == zstandard.get_frame_parameters(packed).content_size
    assert full == msgspec.msgpack.encode(manifest)


def test_the_sizes_are_those_of_version_one() -> None:
    assert (HEADER_NBYTES, TRAILER_NBYTES, INDEX_ROW.itemsize) == (16, 128, 24)
    assert (MAGIC, END_MAGIC) == (b"\x89HYDRA\r\n", b"\n\rARDYH\x89")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 3000), max_size=30), seed=st.integers(0, 1000), last=st.integers(1, 4096))
def test_what_is_written_is_read(tmp_path: Path, sizes: list[int], seed: int, last: int) -> None:
    rng = random.Random(seed)
    payloads = [rng.randbytes(n) for n in sizes]
    order = list(range(len(sizes)))
    rng.shuffle(order)
    manifest = manifest_of((len(sizes) - 1) * 4096 + last if sizes else 0)
    path = tmp_path / "x.hydra"
    path.write_bytes(written(payloads, manifest, order))
    with DiffFile(path) as diff:
        assert diff.manifest == manifest
        assert [diff.payload(c) for c in range(len(sizes))] == payloads
        assert diff.chunk_flags == [c % 4 for c in range(len(sizes))]
        assert diff.chunk_checksum == [xxhash.xxh3_64_intdigest(p) for p in payloads]
        assert diff.size == path.stat().st_size
        assert trailer_of(path) == diff.trailer


@given(
    st.builds(
        Trailer, *[U64] * 7, st.integers(-(1 << 63), (1 << 63) - 1), U32, U32, st.binary(min_size=32, max_size=32)
    )
)
def test_a_trailer_is_128_bytes_whatever_is_in_it(trailer: Trailer) -> None:
    data = trailer.pack()
    assert len(data) == 128
    assert data[-8:] == END_MAGIC
    assert struct.unpack_from("<Q", data, 112)[0] == xxhash.xxh3_64_intdigest(data[:112])


def test_a_manifest_that_does_not_end_with_the_tail_is_read(tmp_path: Path) -> None:
    """The tail is read at once; index and manifest may begin before it."""
    count = 20_000
    rng = random.Random(1)
    manifest = manifest_of(count * 4096)
    manifest = msgspec.structs.replace(manifest, metadata=(("noise", rng.randbytes(200_000).hex()),))
    path = tmp_path / "x.hydra"
    path.write_bytes(written([b""] * count, manifest))
    with DiffFile(path) as diff:
        assert diff.trailer.manifest_nbytes > 128 << 10
        assert diff.manifest == manifest
        assert len(diff.chunk_offset) == count


def test_a_chunk_that_was_never_written_is_noticed() -> None:
    writer = DiffWriter(io.BytesIO(), 2)  # type: ignore[arg-type]
    writer.append(0, b"x", 1, 0, 0)
    with pytest.raises(AssertionError):
        writer.finish(manifest_of(5000))


def test_stat_needs_one_read_and_no_decompression(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.dehydrate()
    reads: list[int] = []
    pread = os.pread

    def counted(fd: int, nbytes: int, offset: int) -> bytes:
        reads.append(nbytes)
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.delattr(zstandard, "ZstdDecompressor")
    fd = os.open(filled.diff, os.O_RDONLY)
    try:
        trailer = read_trailer(fd, "x")
    finally:
        os.close(fd)
    assert reads == [128]
    assert (trailer.size, trailer.sha256) == (len(filled.data), filled.sha256)


def test_a_diff_that_becomes_shorter_while_it_is_open(filled: Filled) -> None:
    filled.dehydrate()
    with DiffFile(filled.diff) as diff:
        os.truncate(filled.diff, 1000)
        with pytest.raises(CorruptDiff, match="shorter"):
            for chunk in range(len(diff.chunk_offset)):
                diff.payload(chunk)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        DiffFile(tmp_path / "none.hydra")
    with pytest.raises(HydraError):
        DiffFile(tmp_path)
    with pytest.raises(HydraError):
        trailer_of(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "bad.hydra").write_bytes(bytes(500))
    for _ in range(5):
        with pytest.raises(CorruptDiff, match=r"bad\.hydra"):
            DiffFile(tmp_path / "bad.hydra")
    assert len(os.listdir("/proc/self/fd")) == before
