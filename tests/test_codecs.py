"""Codecs: exact for every type and length, calm with any payload, safe from many threads, and pinned for ever."""

import resource
import struct
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hydrafs.codecs import registry
from hydrafs.dtypes import BYTES, DTYPES
from hydrafs.errors import CorruptChunk, UnsupportedDiff, UsageError

NAMES = ("raw", "zstd", "planes")


def words(data):
    return np.frombuffer(data, dtype=np.uint8)


def decode(name, prediction, payload, nbytes, dtype=BYTES):
    """What a codec decodes, checked for writes outside of ``out`` and to the prediction."""
    guarded = np.full(nbytes + 128, 0xA5, dtype=np.uint8)
    out = guarded[64 : 64 + nbytes]
    kept = None if prediction is None else prediction.copy()
    registry.by_name(name).decode_into(prediction, payload, out, dtype, b"")
    assert (guarded[:64] == 0xA5).all()
    assert (guarded[64 + nbytes :] == 0xA5).all()
    assert kept is None or np.array_equal(kept, prediction)
    return out


def check(name, prediction, target, dtype):
    for array in (prediction, target):
        if array is not None:
            array.flags.writeable = False
    payload = registry.by_name(name).encode(prediction, target, dtype, b"")
    assert isinstance(payload, bytes)
    assert decode(name, prediction, payload, target.size, dtype).tobytes() == target.tobytes()
    assert decode(name, prediction, memoryview(b"x" + payload)[1:], target.size, dtype).tobytes() == target.tobytes()
    return payload


def special(dtype):
    """Words where the bits of a type do something: zeros, largest, smallest, infinities, NaNs, both signs."""
    bits = 8 * dtype.word_nbytes
    top = 1 << (bits - 1)
    magnitudes = {0, 1, 2, top - 1, top - 2, top >> 1, 127, 128, 129, 255, 0x80 % top}
    for mantissa in (m for m in (2, 3, 7, 10, 23, 52) if m < bits - 1):
        infinity = top - (1 << mantissa)
        magnitudes |= {infinity, infinity + 1, infinity - 1, infinity | 1 << (mantissa - 1), (1 << mantissa) - 1}
    values = sorted(m & (top - 1) for m in magnitudes)
    return np.array(values + [top | m for m in values], dtype=dtype.word)


def steps(rng, dtype, count):
    """A prediction and a target near it, as an optimiser leaves them, with a few wild words."""
    base = rng.integers(0, 256, count * dtype.word_nbytes, dtype=np.uint8)
    step = np.rint(rng.standard_t(2, count) * 20).astype(np.int64).astype(dtype.word)
    near = (base.view(dtype.word) + step).view(np.uint8)
    wild = rng.random(near.size) < 0.001
    near[wild] = 0xFF
    return base, near


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: d.name)
def test_every_type_and_every_short_length(name, dtype):
    rng = np.random.default_rng(1)
    for nbytes in range(71):
        target = rng.integers(0, 256, nbytes, dtype=np.uint8)
        near = target.copy()
        near[:: dtype.word_nbytes] += rng.integers(0, 3, near[:: dtype.word_nbytes].size, dtype=np.uint8)
        check(name, None, target, dtype)
        check(name, near, target, dtype)
        check(name, rng.integers(0, 256, nbytes, dtype=np.uint8), target, dtype)
        check(name, target.copy(), target, dtype)
        check(name, np.zeros(nbytes, dtype=np.uint8), target, dtype)
        check(name, target, np.zeros(nbytes, dtype=np.uint8), dtype)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES.values())))
def test_any_bytes(name, data, dtype):
    target = data.draw(hnp.arrays(np.uint8, st.integers(0, 300)))
    like = st.one_of(st.none(), hnp.arrays(np.uint8, target.size), hnp.arrays(np.uint8, target.size, fill=st.just(0)))
    check(name, data.draw(like), target, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: d.name)
def test_every_pair_of_special_values(dtype):
    values = special(dtype)
    target = np.repeat(values, values.size)
    prediction = np.tile(values, values.size)
    for name in NAMES:
        check(name, prediction.view(np.uint8).copy(), target.view(np.uint8).copy(), dtype)


def test_every_16_bit_difference():
    target = np.arange(65536, dtype="<u2")
    for anchor in (0, 1, 0x7FFF, 0x8000, 0xFF80, 0xFFFF, 0x3C00):
        check("planes", np.full(65536, anchor, dtype="<u2").view(np.uint8), target.view(np.uint8).copy(), DTYPES["F16"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "C128", "I8", "BOOL"])
def test_long_chunks_across_blocks(name, dtype):
    rng = np.random.default_rng(2)
    dtype = DTYPES[dtype]
    for count in (65_535, 65_536, 65_537, 200_003):
        base, near = steps(rng, dtype, count)
        payload = check(name, base, near, dtype)
        if name == "planes":
            assert len(payload) < 0.93 * near.size
        check(name, None, near, dtype)
        check(name, np.r_[base, base[:1]], np.r_[near, near[:1]], dtype)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_predictions_and_outputs_at_odd_addresses(offset):
    base, near = steps(np.random.default_rng(3), DTYPES["F32"], 70_000)
    moved = np.zeros(base.size + 8, dtype=np.uint8)
    moved[offset : offset + base.size] = base
    prediction = moved[offset : offset + base.size]
    payload = registry.by_name("planes").encode(prediction, near, DTYPES["F32"], b"")
    room = np.zeros(near.size + 8, dtype=np.uint8)
    out = room[offset : offset + near.size]
    registry.by_name("planes").decode_into(prediction, payload, out, DTYPES["F32"], b"")
    assert np.array_equal(out, near)


def test_planes_that_say_nothing_cost_next_to_nothing():
    rng = np.random.default_rng(4)
    base = rng.integers(0, 256, 1 << 18, dtype=np.uint8)
    for dtype in (DTYPES["F16"], DTYPES["F32"], DTYPES["F64"]):
        assert len(check("planes", base, base.copy(), dtype)) == 4 * dtype.word_nbytes
        # Steps of either sign below 128 units leave one plane only, so at most a byte a word.
        step = rng.integers(-128, 128, base.size // dtype.word_nbytes).astype(dtype.word)
        near = (base.view(dtype.word) + step).view(np.uint8)
        assert len(check("planes", base, near, dtype)) <= base.size // dtype.word_nbytes + 4 * dtype.word_nbytes


def test_noise_is_stored_and_hardly_grows():
    noise = np.random.default_rng(5).integers(0, 256, 100_000, dtype=np.uint8)
    assert len(check("planes", None, noise, DTYPES["F16"])) == noise.size + 8
    assert len(check("raw", None, noise, DTYPES["F16"])) == noise.size


# -- payloads that no encoder made ------------------------------------------------------------------------------------


def survives(name, prediction, payload, nbytes, dtype):
    try:
        assert decode(name, prediction, payload, nbytes, dtype).size == nbytes
    except CorruptChunk as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=400, deadline=None)
@given(
    payload=st.binary(max_size=120),
    nbytes=st.integers(0, 90),
    dtype=st.sampled_from([DTYPES[n] for n in ("U8", "F16", "F32", "F64", "C64")]),
    predicted=st.booleans(),
)
def test_junk(name, payload, nbytes, dtype, predicted):
    survives(name, np.zeros(nbytes, dtype=np.uint8) if predicted else None, payload, nbytes, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_payloads(name):
    rng = np.random.default_rng(6)
    dtype = DTYPES["F16"]
    base, near = steps(rng, dtype, 3_000)
    for prediction in (base, None):
        payload = registry.by_name(name).encode(prediction, near, dtype, b"")
        for cut in {*range(40), *range(40, len(payload), 97), len(payload) - 1}:
            with pytest.raises(CorruptChunk):
                decode(name, prediction, payload[:cut], near.size, dtype)
        for wrong in (0, 1, near.size - 1, near.size - 2, near.size + 1, near.size + 2, 2 * near.size):
            like = None if prediction is None else np.zeros(wrong, dtype=np.uint8)
            with pytest.raises(CorruptChunk):
                decode(name, like, payload, wrong, dtype)
        for _ in range(300):
            bad = bytearray(payload)
            for place in rng.integers(0, min(len(bad), rng.choice([24, len(bad)])), rng.integers(1, 4)):
                bad[place] ^= 1 << rng.integers(0, 8)
            survives(name, prediction, bytes(bad), near.size, dtype)


def bomb(window, blocks):
    """A frame without magic number or declared size: ``blocks`` runs of 128 KiB, four bytes each (RFC 8878, 3.1.1)."""
    run = struct.pack("<I", (131072 << 3 | 1 << 1) & 0xFFFFFF)[:3] + b"\x00"
    return bytes([0x00, (window - 10) << 3]) + run * blocks


@pytest.mark.parametrize("window", [17, 23, 31, 41])
def test_a_frame_that_expands_to_gigabytes_takes_no_memory(window):
    nbytes = 1 << 16
    frame = bomb(window, 100_000)  # 12 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planes = struct.pack("<2I", 2 << 30 | len(frame), 0) + frame
    survives("planes", None, planes, nbytes, DTYPES["F16"])
    survives("planes", None, struct.pack("<8I", 2 << 30 | len(frame), *[0] * 7) + frame, nbytes, DTYPES["F64"])
    magic = struct.pack("<I", zstandard.MAGIC_NUMBER)
    with pytest.raises(CorruptChunk):
        decode("zstd", None, magic + frame, nbytes)
    declared = magic + bytes([0x80, frame[1]]) + struct.pack("<I", nbytes) + frame[2:]
    survives("zstd", None, declared, nbytes, BYTES)
    huge = magic + bytes([0xE0]) + struct.pack("<Q", 1 << 60) + frame[2:]
    with pytest.raises(CorruptChunk):
        decode("zstd", None, huge, nbytes)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB


def test_headers_that_lie():
    nbytes, dtype = 64, DTYPES["F16"]
    stored = bytes(range(32))
    good = struct.pack("<2I", 1 << 30 | 32, 0) + stored
    decode("planes", None, good, nbytes, dtype)
    for header in (
        (3 << 30 | 32, 0),  # no such mode
        (1 << 30 | 31, 0),
        (1 << 30 | 33, 0),
        (1 << 30 | 0x3FFFFFFF, 0),
        (2 << 30 | 0x3FFFFFFF, 0),
        (2 << 30, 0),
        (256, 0),  # no such byte
        (0, 0),  # bytes that nothing explains
    ):
        with pytest.raises(CorruptChunk):
            decode("planes", None, struct.pack("<2I", *header) + stored, nbytes, dtype)
    with pytest.raises(CorruptChunk):
        decode("planes", None, good + b"x", nbytes, dtype)
    with pytest.raises(CorruptChunk):
        decode("zstd", None, b"x", 0)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_eight_threads_at_once(name):
    codec = registry.by_name(name)
    dtype = DTYPES["F16"]
    cases = [steps(np.random.default_rng(seed), dtype, 20_000 + 7_001 * seed) for seed in range(8)]
    payloads = [codec.encode(base, near, dtype, b"") for base, near in cases]
    wrong = []
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        for turn in range(24):
            base, near = cases[(seed + turn) % 8]
            payload = payloads[(seed + turn) % 8]
            out = np.empty(near.size, dtype=np.uint8)
            if turn % 5 == 4:  # a failure in one thread leaves nothing behind for the next
                try:
                    codec.decode_into(base, payload[: len(payload) // 2], out, dtype, b"")
                    wrong.append("a cut payload passed")
                except CorruptChunk:
                    pass
            codec.decode_into(base, payload, out, dtype, b"")
            if not np.array_equal(out, near):
                wrong.append("decoded something else")
            if turn % 6 == 0 and codec.encode(base, near, dtype, b"") != payload:
                wrong.append("encoded something else")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- the table, and payloads that must decode for ever ----------------------------------------------------------------


def test_ids_are_pinned():
    assert registry.NONE == 0
    pinned = {"raw": 1, "zstd": 2, "planes": 3, "rans": 4}
    assert {name: registry.by_name(name).id for name in registry.names()} == pinned
    for name in pinned:
        codec = registry.by_name(name)
        assert codec.name == name
        assert registry.by_id(codec.id) is codec


@pytest.mark.parametrize("number", [registry.NONE, 5, 6, 255, -1])
def test_an_unknown_id_is_named(number):
    with pytest.raises(UnsupportedDiff, match=f"codec {number}"):
        registry.by_id(number)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="raw, zstd, planes"):
        registry.by_name("bzip3")


def test_payload_of_raw_is_pinned():
    assert decode("raw", None, bytes.fromhex("00ff10"), 3).tobytes() == b"\x00\xff\x10"


def test_payload_of_zstd_is_pinned():
    payload = bytes.fromhex("28b52ffd203c5d00002868796472610100c459b4")
    assert decode("zstd", None, payload, 60).tobytes() == b"hydra" * 12


def test_payload_of_planes_is_pinned():
    # Compressed low and high planes, and a byte behind the last whole word.
    payload = bytes.fromhex("120000801100008020306d00002803fc8238000200b85a4c3b22203065000020000001ff020040012b8e0807")
    prediction = np.arange(0x3C00, 0x3C00 + 48, dtype="<u2")
    step = np.array([3, -4, 130, -200] * 6 + [0] * 24, dtype="<i2").view("<u2")
    out = decode("planes", np.r_[prediction.view(np.uint8), np.uint8(9)], payload, 97, DTYPES["F16"])
    assert out[:96].tobytes() == (prediction + step).tobytes()
    assert out[96] == 7
    # Constant and stored digits of either sign.
    payload = bytes.fromhex("0300004000000000030000400000000005ff00000010")
    out = decode("planes", np.zeros(12, dtype=np.uint8), payload, 12, DTYPES["I32"])
    assert out.view("<i4").tolist() == [5, -1, 1 << 20]
    # No prediction: the bytes themselves.
    payload = bytes.fromhex("060000400600004006000040060000400004080c1014000306090c0f00020406080a000102030405")
    out = decode("planes", None, payload, 24, DTYPES["F32"])
    assert out.view("<u4").tolist() == [i * 0x01020304 for i in range(6)]
    # Constant bytes alone, 255 with a prediction being -1 and carried into every byte above.
    payload = struct.pack("<4I", 0xFF, 0, 0, 0)
    assert decode("planes", None, payload, 8, DTYPES["U32"]).view("<u4").tolist() == [255, 255]
    known = np.array([0, 7], dtype="<u4").view(np.uint8)
    assert decode("planes", known, payload, 8, DTYPES["U32"]).view("<u4").tolist() == [0xFFFFFFFF, 6]
