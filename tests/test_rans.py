"""The codec rans: exact for every type, length and kernel, equal to its reference, calm with any payload and params."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrafs.codecs import rans, rans_reference
from hydrafs.dtypes import BYTES, DTYPES
from hydrafs.errors import CorruptChunk, CorruptDiff, HydraError, UsageError

CODEC = rans.RansCodec()
LEVELS = rans.levels()
NATIVE = LEVELS[:-1]
CODED = [d for d in DTYPES.values() if d.word_nbytes <= 4]


@pytest.fixture(autouse=True)
def fastest_afterwards():
    before = rans._forced
    yield
    rans.force(before)


def decode(level, prediction, payload, nbytes, dtype, params):
    """What a kernel decodes, checked for writes outside of ``out`` and to the prediction."""
    rans.force(level)
    guarded = np.full(nbytes + 192, 0xA5, dtype=np.uint8)
    out = guarded[64 : 64 + nbytes]
    kept = None if prediction is None else prediction.copy()
    CODEC.decode_into(prediction, payload, out, dtype, params)
    assert (guarded[:64] == 0xA5).all()
    assert (guarded[64 + nbytes :] == 0xA5).all()
    assert kept is None or np.array_equal(kept, prediction)
    return out


def check(prediction, target, dtype, params, levels=LEVELS):
    encoded = []
    for level in NATIVE:
        rans.force(level)
        encoded.append(CODEC.encode(prediction, target, dtype, params))
    payload = encoded[0]
    assert all(e == payload for e in encoded)
    assert len(payload) <= target.size + 1
    for level in levels:
        out = decode(level, prediction, payload, target.size, dtype, params)
        assert out.tobytes() == target.tobytes(), (level, dtype.name, target.size)
    return payload


def as_bytes(words):
    return np.ascontiguousarray(words).view(np.uint8)


def weights(rng, dtype, count):
    """Words as of a trained tensor, of any type."""
    values = rng.normal(0, 0.05, count).astype(np.float32)
    bits = values.view(np.uint32)
    if dtype.kind != "float":
        return rng.integers(0, 50, count).astype(dtype.word)
    return {
        "F16": lambda: values.astype(np.float16).view(np.uint16),
        "BF16": lambda: (bits >> 16).astype(np.uint16),
        "F32": lambda: bits,
    }.get(dtype.name, lambda: (bits >> (32 - 8 * dtype.word_nbytes)).astype(dtype.word))()


def moved(rng, words, scale):
    """The same with a step added to each, some rows left alone and some moved far."""
    width = words.dtype.itemsize
    steps = np.rint(rng.laplace(0, scale, words.size)).astype(np.int64)
    row = np.arange(words.size) // 384
    steps[row % 5 == 1] = 0
    steps[row % 7 == 2] *= 50
    return (words.astype(np.int64) + steps & (1 << 8 * width) - 1).astype(words.dtype)


def special(dtype, rng, count):
    """Pairs of words where the bits of a type do something: all exponents, both signs, NaNs, infinities, ends."""
    bits = 8 * dtype.word_nbytes
    top = 1 << (bits - 1)
    mantissa = rans.MANTISSA_BITS.get(dtype.name, bits - 6)
    magnitudes = {0, 1, 2, 15, 16, 17, top - 1, top - 2, top >> 1}
    for exponent in range(top >> mantissa):
        magnitudes |= {exponent << mantissa, (exponent << mantissa) + 1, (exponent << mantissa) - 1 & top - 1}
    values = np.array(sorted(magnitudes), dtype=np.uint64)
    values = np.concatenate([values, values | np.uint64(top)]).astype(dtype.word)
    return rng.choice(values, count), rng.choice(values, count)


def test_the_native_part_is_here():
    assert "portable" in LEVELS
    assert rans.level() == LEVELS[0] or rans._forced


def test_an_unknown_level_is_refused():
    with pytest.raises(UsageError):
        rans.force("mmx")


@pytest.mark.parametrize("dtype", CODED, ids=lambda d: d.name)
def test_every_length(dtype):
    rng = np.random.default_rng(1)
    known = weights(rng, dtype, 400)
    target = moved(rng, known, 3)
    known, target = as_bytes(known), as_bytes(target)
    params = CODEC.train([(known, target), (None, target)], dtype)
    assert params
    for nbytes in [*range(301), *range(301, min(700, target.size), 41)]:
        levels = LEVELS if nbytes % 16 == 0 or nbytes in range(12) else NATIVE
        check(known[:nbytes], target[:nbytes], dtype, params, levels)
        check(None, target[:nbytes], dtype, params, levels)


@pytest.mark.parametrize("dtype", CODED, ids=lambda d: d.name)
@pytest.mark.parametrize("scale", [0.02, 2, 300])
def test_long_chunks(dtype, scale):
    rng = np.random.default_rng(int(scale))
    for count in (70_001, 12_345):
        known = weights(rng, dtype, count)
        target = moved(rng, known, scale)
        known, target = as_bytes(known), as_bytes(target)
        params = CODEC.train([(known, target), (None, target)], dtype)
        levels = LEVELS if count < 20_000 else NATIVE
        payload = check(known, target, dtype, params, levels)
        if scale < 1 and dtype.word_nbytes > 1:
            assert len(payload) < 0.25 * target.size
        check(None, target, dtype, params, levels)


@pytest.mark.parametrize("dtype", CODED, ids=lambda d: d.name)
def test_special_values(dtype):
    rng = np.random.default_rng(3)
    known, target = (as_bytes(w) for w in special(dtype, rng, 3000))
    calm = as_bytes(weights(rng, dtype, 3000))
    for params in (CODEC.train([(known, target)], dtype), CODEC.train([(calm, calm), (None, calm)], dtype), b""):
        check(known, target, dtype, params)
        check(None, target, dtype, params)
        check(calm, target, dtype, params, NATIVE)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_words(data):
    dtype = data.draw(st.sampled_from(CODED))
    known = np.frombuffer(data.draw(st.binary(max_size=600)), np.uint8)
    target = np.frombuffer(data.draw(st.binary(min_size=known.size, max_size=known.size)), np.uint8)
    mixed = np.where(np.arange(known.size) % 8 < 6, known, target).astype(np.uint8)
    params = CODEC.train([(known, mixed)], dtype) if data.draw(st.booleans()) else b""
    check(known, target, dtype, params)
    check(known, mixed, dtype, params)
    check(None, target, dtype, params)


@pytest.mark.parametrize("name", ["F64", "I64", "C128"])
def test_long_words_are_stored(name):
    target = np.arange(64, dtype=np.uint8)
    assert CODEC.train([(target, target)], DTYPES[name]) == b""
    assert check(target, target, DTYPES[name], b"") == b"\0" + target.tobytes()


def test_what_hardly_changed_takes_hardly_anything():
    rng = np.random.default_rng(4)
    dtype = DTYPES["F16"]
    known = weights(rng, dtype, 262144)
    target = known.copy()
    target[100_000:100_100] += 1
    known, target = as_bytes(known), as_bytes(target)
    params = CODEC.train([(known, target)], dtype)
    assert len(check(known, target, dtype, params, NATIVE)) < 250
    assert len(check(None, np.zeros(100_000, np.uint8), dtype, params, LEVELS)) == 3
    zeros = as_bytes(np.where(np.arange(262144) < 200_000, 0, target.view(np.uint16)).astype(np.uint16))
    assert len(check(None, zeros, dtype, CODEC.train([(None, zeros)], dtype), NATIVE)) < 0.3 * zeros.size


def test_repeated_steps_and_untouched_rows_are_found():
    """What an fp32 embedding looks like: decay moves each weight by a function of its mantissa, some rows by more."""
    rng = np.random.default_rng(5)
    known = weights(rng, DTYPES["F32"], 384 * 400)
    decay = np.where(known & 0x7FFFFF < 0x555555, 800, 1200).astype(np.uint32)
    target = known - decay
    touched = np.arange(known.size) // 384 % 10 == 3
    target[touched] += rng.integers(0, 50_000, known.size).astype(np.uint32)[touched]
    known, target = as_bytes(known), as_bytes(target)
    params = CODEC.train([(known, target)], DTYPES["F32"])
    payload = check(known, target, DTYPES["F32"], params, NATIVE)
    assert len(payload) < 384 * 40 * 2.2 + 384 * 360 * 0.15 / 8 * 2


def test_params_of_another_type_are_not_used():
    rng = np.random.default_rng(6)
    half, single = (weights(rng, DTYPES[n], 2000) for n in ("F16", "F32"))
    params = CODEC.train([(as_bytes(half), as_bytes(moved(rng, half, 2)))], DTYPES["F16"])
    check(as_bytes(single), as_bytes(moved(rng, single, 9)), DTYPES["F32"], params)
    check(as_bytes(half), as_bytes(moved(rng, half, 9)), DTYPES["BF16"], params)
    check(None, as_bytes(half), DTYPES["F16"], params)


def sample(dtype, count=3000, seed=7):
    rng = np.random.default_rng(seed)
    known = weights(rng, dtype, count)
    target = moved(rng, known, 2)
    known, target = as_bytes(known), as_bytes(target)
    params = CODEC.train([(known, target), (None, target)], dtype)
    return known, target, params, [(p, CODEC.encode(p, target, dtype, params)) for p in (known, None)]


def outcome(level, prediction, payload, nbytes, dtype, params):
    try:
        return decode(level, prediction, payload, nbytes, dtype, params).tobytes()
    except CorruptDiff:
        return None


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "I8"])
def test_damaged_payloads(name):
    """Each ends as a typed error or as wrong bytes, the same with every kernel."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(8)
    known, target, params, payloads = sample(dtype)
    for prediction, payload in payloads:
        damaged = [payload[:n] for n in (0, 1, 4, 5, 9, 20, 150, len(payload) // 2, len(payload) - 1)]
        damaged += [payload + b"\0", payload + b"\0\0"]
        for _ in range(60):
            changed = bytearray(payload)
            for place in rng.integers(0, rng.choice([12, 300, len(payload)]), rng.integers(1, 4)):
                changed[place % len(changed)] = rng.integers(0, 256)
            damaged.append(bytes(changed))
        damaged += [rng.integers(0, 256, 500).astype(np.uint8).tobytes() for _ in range(20)]
        for number, junk in enumerate(damaged):
            levels = LEVELS if number % 8 == 0 else NATIVE
            results = [outcome(level, prediction, junk, target.size, dtype, params) for level in levels]
            assert all(r == results[0] for r in results)
        longer = target.size + dtype.word_nbytes * 128
        with pytest.raises(CorruptChunk):
            decode(LEVELS[0], None if prediction is None else np.resize(known, longer), payload, longer, dtype, params)
    with pytest.raises(CorruptChunk):
        decode(LEVELS[0], None, payloads[0][1], target.size, dtype, params)


@pytest.mark.parametrize("name", ["F32", "F16"])
def test_damaged_params(name):
    dtype = DTYPES[name]
    rng = np.random.default_rng(9)
    _, target, params, payloads = sample(dtype)
    for number in range(150):
        changed = bytearray(params)
        for place in rng.integers(0, rng.choice([14, len(params)]), rng.integers(1, 3)):
            changed[place] = rng.integers(0, 256)
        changed = bytes(changed[: rng.integers(0, len(changed))] if number % 4 == 0 else changed)
        prediction, payload = payloads[number % 2]
        levels = LEVELS if number % 3 == 0 else NATIVE
        results = [outcome(level, prediction, payload, target.size, dtype, changed) for level in levels]
        assert all(r == results[0] for r in results), number
        check(prediction, target, dtype, changed, ()) if results[0] is not None else None
        head = bytes([payload[0] | rans_reference.EMBEDDED]) + len(changed).to_bytes(4, "little") + changed
        embedded = [outcome(level, prediction, head + payload[1:], target.size, dtype, b"") for level in levels]
        assert embedded == results


def test_training_on_anything():
    for dtype in CODED:
        assert CODEC.train([], dtype) == b""
        empty = np.empty(0, np.uint8)
        assert CODEC.train([(empty, empty), (None, empty)], dtype) == b""
        one = np.ones(dtype.word_nbytes, np.uint8)
        check(one, one * 0, dtype, CODEC.train([(one, one), (None, one)], dtype))
    with pytest.raises(TypeError):
        CODEC.train([(one, np.ones(99, np.uint8))], BYTES)
    with pytest.raises(ZeroDivisionError):
        CODEC.train((1 // 0 for _ in range(2)), BYTES)


def test_training_thins_what_is_much():
    rng = np.random.default_rng(10)
    dtype = DTYPES["BF16"]
    known = weights(rng, dtype, 1 << 20)
    target = moved(rng, known, 1)
    known, target = as_bytes(known), as_bytes(target)
    parts = [(known[i : i + 100_000], target[i : i + 100_000]) for i in range(0, known.size, 100_000)]
    params = CODEC.train(parts, dtype)
    assert params == CODEC.train(iter(parts), dtype)
    assert len(params) < 4000
    sizes = [len(check(*part, dtype, params, NATIVE)) for part in parts]
    assert sum(sizes) < 0.4 * known.size


@pytest.mark.parametrize("dtype", CODED, ids=lambda d: d.name)
def test_every_level_trains_and_encodes_the_same(dtype):
    rng = np.random.default_rng(14)
    known = weights(rng, dtype, 300_001)
    made = []
    for scale in (0.2, 3, 400):
        target = moved(rng, known, scale)
        pairs = [(as_bytes(known), as_bytes(target)), (None, as_bytes(target[:70_000]))]
        for level in NATIVE:
            rans.force(level)
            params = CODEC.train(pairs, dtype)
            payloads = [CODEC.encode(*pair, dtype, params) for pair in pairs]
            own = CODEC.encode(*pairs[0], dtype, b"")
            made.append((scale, params, payloads, own))
    first = {scale: what for scale, *what in reversed(made)}
    assert [level for level, (scale, *what) in zip(NATIVE * 3, made, strict=True) if what != first[scale]] == []


def test_no_prediction_beats_bytes():
    rng = np.random.default_rng(11)
    for name, bound in (("F16", 0.86), ("BF16", 0.69), ("F32", 0.85)):
        target = as_bytes(weights(rng, DTYPES[name], 100_000))
        params = CODEC.train([(None, target)], DTYPES[name])
        assert len(check(None, target, DTYPES[name], params, NATIVE)) < bound * target.size


def test_rows_of_a_shorter_type_shrink():
    rng = np.random.default_rng(12)
    dtype = DTYPES["F32"]
    values = rng.normal(0, 0.05, 100_000).astype(np.float32)
    values[20_000:60_000] = values[20_000:60_000].astype(np.float16)
    target = as_bytes(values)
    params = CODEC.train([(None, target)], dtype)
    for payload in (check(None, target, dtype, params), check(None, target, dtype, b"")):
        assert payload[0] & rans_reference.SQUEEZED
        assert len(payload) < 0.72 * target.size
        results = set()
        for number in range(80):
            changed = bytearray(payload)
            for place in rng.integers(0, (40, 4000, len(payload))[number % 3], 2):
                changed[place] ^= rng.integers(1, 256)
            changed = bytes(changed if number % 5 else changed[: rng.integers(0, len(payload))])
            outcomes = [outcome(level, None, changed, target.size, dtype, params) for level in NATIVE]
            assert all(o == outcomes[0] for o in outcomes)
            results.add(outcomes[0])
        assert None in results


def test_many_threads():
    dtype = DTYPES["F16"]
    parts = [sample(dtype, 5000, seed) for seed in range(6)]
    wrong = []

    def work(offset):
        out = np.empty(parts[0][1].size, np.uint8)
        for turn in range(60):
            _, target, params, payloads = parts[(turn + offset) % len(parts)]
            for prediction, payload in payloads:
                CODEC.decode_into(prediction, payload, out, dtype, params)
                if out.tobytes() != target.tobytes() or CODEC.encode(prediction, target, dtype, params) != payload:
                    wrong.append(turn)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_extension(monkeypatch):
    dtype = DTYPES["F16"]
    known, target, params, payloads = sample(dtype, 700)
    rans.force("")
    monkeypatch.setattr(rans, "_native", None)
    assert rans.level() == "none: extension not built"
    for prediction, payload in payloads:
        assert decode("", prediction, payload, target.size, dtype, params).tobytes() == target.tobytes()
    assert CODEC.train([(known, target)], dtype) == b""
    stored = CODEC.encode(known, target, dtype, params)
    assert decode("", known, stored, target.size, dtype, params).tobytes() == target.tobytes()
    with pytest.raises(HydraError):
        decode("", known, b"\x01", target.size, dtype, params)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "rans.json").read_text())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['dtype']}-{'tensor' if r['prediction'] else 'alone'}")
def test_payloads_of_the_first_version_decode_for_ever(level, row):
    def array(key):
        return np.frombuffer(bytes.fromhex(row[key]), np.uint8)

    prediction = None if row["prediction"] is None else array("prediction")
    target, params = array("target"), bytes.fromhex(row["params"])
    out = decode(level, prediction, bytes.fromhex(row["payload"]), target.size, DTYPES[row["dtype"]], params)
    assert out.tobytes() == target.tobytes()
