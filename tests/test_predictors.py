"""Casting and narrowing: every bit pinned, against references that share no code with it."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrafs import predictors
from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel

FLOATS = ("F64", "F32", "F16", "BF16")
EXPONENT = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL16 = np.arange(65536, dtype="<u2")


def raw(words, name):
    return np.asarray(words, dtype=DTYPES[name].word).view(np.uint8)


def cast(words, source, target):
    result = predictors.cast(raw(words, source), DTYPES[source], DTYPES[target])
    assert result.dtype == np.uint8
    return result.view(DTYPES[target].word)


def reference(word, source, target):
    """One element, by whole numbers and fractions alone."""
    exponent_bits, mantissa_bits = EXPONENT[source], MANTISSA[source]
    sign = word >> (exponent_bits + mantissa_bits)
    exponent = word >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = word & ((1 << mantissa_bits) - 1)
    e, m = EXPONENT[target], MANTISSA[target]
    top = sign << (e + m)
    infinity = ((1 << e) - 1) << m
    if exponent == (1 << exponent_bits) - 1:
        if not fraction:
            return top | infinity
        payload = fraction << (m - mantissa_bits) if m >= mantissa_bits else fraction >> (mantissa_bits - m)
        return top | infinity | (payload or 1 << (m - 1))
    bias = (1 << (exponent_bits - 1)) - 1
    significand = fraction if exponent == 0 else fraction | 1 << mantissa_bits
    value = Fraction(significand) * Fraction(2) ** (max(exponent, 1) - bias - mantissa_bits)
    if value == 0:
        return top
    power = 0
    while Fraction(2) ** (power + 1) <= value:
        power += max(1, (value.numerator.bit_length() - value.denominator.bit_length() - power) // 2)
    while Fraction(2) ** power > value:
        power -= max(1, (power - value.numerator.bit_length() + value.denominator.bit_length()) // 2)
    assert Fraction(2) ** power <= value < Fraction(2) ** (power + 1)
    bias = (1 << (e - 1)) - 1
    power = max(power, 1 - bias)
    units = round(value / Fraction(2) ** (power - m))  # Python rounds halves to even
    return top | min(units + ((power + bias - 1) << m), infinity)


def is_nan(words, name):
    magnitude = words & np.array((1 << (EXPONENT[name] + MANTISSA[name])) - 1, dtype=words.dtype)
    return magnitude > ((1 << EXPONENT[name]) - 1) << MANTISSA[name]


def patterns(name):
    """Words of a format: any, and those around every place where rounding decides."""
    width = 8 * DTYPES[name].nbytes
    near = st.builds(
        lambda sign, exponent, high, kept, low: (
            ((sign << (width - 1) | exponent << MANTISSA[name] | high << (MANTISSA[name] - kept)) + low)
            & ((1 << width) - 1)
        ),
        st.integers(0, 1),
        st.integers(0, (1 << EXPONENT[name]) - 1),
        st.integers(0, 3),
        st.integers(2, MANTISSA[name]),
        st.integers(-2, 2),
    )
    # Exponents of the other formats' smallest, largest and half-smallest values.
    edges = st.builds(
        lambda sign, power, fraction: (
            sign << (width - 1)
            | (power + (1 << (EXPONENT[name] - 1)) - 1) << MANTISSA[name]
            | (fraction << MANTISSA[name] >> 12)
        ),
        st.integers(0, 1),
        st.one_of(st.integers(-27, -12), st.integers(13, 17), *_far(name)),
        st.one_of(st.integers(0, 4095), st.sampled_from([0, 1, 2048, 2049, 4095])),
    )
    return st.one_of(st.integers(0, (1 << width) - 1), near, edges)


def _far(name):
    if name == "F64":
        return st.integers(-151, -124), st.integers(125, 129)
    return st.integers(-126, -124), st.integers(125, 127)


@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("target", FLOATS)
def test_every_16_bit_word_against_torch_and_against_fractions(source, target):
    got = cast(ALL16, source, target)
    tensor = torch.from_numpy(ALL16.view("<i2").copy()).view(TORCH[source]).to(TORCH[target])
    expected = tensor.view(torch.uint8).numpy().view(DTYPES[target].word)
    number = ~is_nan(ALL16, source)
    assert np.array_equal(got[number], expected[number])
    assert is_nan(got, target)[~number].all()
    some = range(65536) if source == target else [*range(0, 65536, 61), *np.flatnonzero(~number)[::7].tolist()]
    if source != target:
        assert [int(got[i]) for i in some] == [reference(i, source, target) for i in some]


@pytest.mark.parametrize("target", ["F16", "BF16", "F64"])
@settings(max_examples=150, deadline=None)
@given(words=st.lists(patterns("F32"), min_size=1, max_size=40))
def test_32_bit_words_against_fractions(target, words):
    assert cast(words, "F32", target).tolist() == [reference(w, "F32", target) for w in words]


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@settings(max_examples=150, deadline=None)
@given(words=st.lists(patterns("F64"), min_size=1, max_size=40))
def test_64_bit_words_against_fractions(target, words):
    assert cast(words, "F64", target).tolist() == [reference(w, "F64", target) for w in words]


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F32", "BF16"), ("F64", "F32"), ("F64", "F16")])
def test_ties_between_neighbours_go_to_even(source, target):
    # Each pair of neighbours of the target has a middle that the source holds; so have the middles' neighbours.
    width = 8 * DTYPES[target].nbytes
    step = max(1, (1 << (width - 1)) // 4000)
    top = ((1 << EXPONENT[target]) - 1) << MANTISSA[target]
    lower = np.unique(np.r_[np.arange(0, top, step), np.arange(0, 40), np.arange(top - 40, top)])
    spread = DTYPES[source].word.type(1 << (MANTISSA[source] - MANTISSA[target] - 1))
    below = cast(lower, target, source)
    above = cast(lower + 1, target, source)
    middle = below + (above - below) // 2
    last = lower == top - 1  # the middle between the largest number and where the next would be
    middle[last] = below[last] + spread
    # A whole subnormal step spans powers of two in the source, where the middle of the words is no middle of values.
    keep = lower >= 1 << MANTISSA[target]
    got = cast(middle[keep], source, target)
    assert got.tolist() == (lower[keep] + (lower[keep] & 1)).tolist()
    assert cast(middle[keep] - 1, source, target).tolist() == lower[keep].tolist()
    assert cast(middle[keep] + 1, source, target).tolist() == (lower[keep] + 1).tolist()


def test_subnormal_halves_round_to_even():
    values = [(k + 0.5) * 2.0**-24 for k in range(1024)]
    words32 = [struct.unpack("<I", struct.pack("<f", v))[0] for v in values]
    words64 = [struct.unpack("<Q", struct.pack("<d", v))[0] for v in values]
    expected = [k + (k & 1) for k in range(1024)]
    assert cast(words32, "F32", "F16").tolist() == expected
    assert cast(words64, "F64", "F16").tolist() == expected
    assert cast([w + 1 for w in words32], "F32", "F16").tolist() == [k + 1 for k in range(1024)]
    assert cast([w - 1 for w in words64], "F64", "F16").tolist() == list(range(1024))


def test_flushing_subnormals_in_the_processor_changes_nothing():
    words64 = np.array([1, 0x3690000000000001, 0x36A0000000000000, 0x380FFFFFE0000000, 0xB800000000000001], dtype="<u8")
    words32 = np.array([1, 0x7FFFFF, 0x80000001, 0x33000001, 0x387FC000], dtype="<u4")
    halves = np.array([1, 0x3FF, 0x8001, 0x8200], dtype="<u2")

    def everything():
        return [
            cast(words64, "F64", "F32").tolist(),
            cast(words32, "F32", "F64").tolist(),
            cast(words32, "F32", "F16").tolist(),
            cast(words32, "F32", "BF16").tolist(),
            cast(halves, "F16", "F32").tolist(),
            cast(halves, "F16", "F64").tolist(),
            cast(halves, "BF16", "F64").tolist(),
            cast(halves, "BF16", "F16").tolist(),
        ]

    before = everything()
    flushing = torch.set_flush_denormal(True)
    try:
        during = everything()
    finally:
        torch.set_flush_denormal(False)
    assert flushing or before == during
    assert before == during


def test_nans_follow_the_integer_rule():
    assert cast([0x7F800001, 0xFF800001, 0x7FC00001, 0x7F802000, 0xFFFFFFFF], "F32", "F16").tolist() == [
        0x7E00, 0xFE00, 0x7E00, 0x7C01, 0xFFFF,
    ]  # fmt: skip
    assert cast([0x7F800001, 0xFF80FFFF, 0x7F810000], "F32", "BF16").tolist() == [0x7FC0, 0xFFC0, 0x7F81]
    for word in (0x7F800001, 0xFF800001):  # the smallest payload, with no larger one beside it
        assert cast([word], "F32", "F16").tolist() == [0x7E00 | word >> 16 & 0x8000]
        assert cast([word], "F32", "BF16").tolist() == [0x7FC0 | word >> 16 & 0x8000]
        assert cast([(word & 1 << 31) << 32 | 0x7FF0000000000001], "F64", "F32").tolist() == [
            0x7FC00000 | word & 1 << 31
        ]
    assert cast([0x7C01, 0xFE00, 0xFFFF], "F16", "F32").tolist() == [0x7F802000, 0xFFC00000, 0xFFFFE000]


def test_the_same_type_is_not_copied():
    for dtype in DTYPES.values():
        words = np.zeros(dtype.nbytes, dtype=np.uint8)
        assert predictors.cast(words, dtype, dtype) is words


def test_what_can_be_cast():
    for source in DTYPES.values():
        for target in DTYPES.values():
            known = source is target or (source.name in FLOATS and target.name in FLOATS)
            assert predictors.castable(source, target) is known
            if not known:
                with pytest.raises(BadModel, match=target.name):
                    predictors.cast(np.zeros(16, dtype=np.uint8), source, target)


def test_a_broken_element_is_refused():
    with pytest.raises(BadModel):
        predictors.cast(np.zeros(7, dtype=np.uint8), DTYPES["F32"], DTYPES["F16"])
    with pytest.raises(BadModel):
        predictors.narrow(np.zeros(7, dtype=np.uint8), DTYPES["F16"])
    with pytest.raises(BadModel):
        predictors.widen(np.zeros(7, dtype=np.uint8), DTYPES["F16"], DTYPES["F32"])
    with pytest.raises(BadModel):
        predictors.narrow(np.zeros(8, dtype=np.uint8), DTYPES["F64"])
    with pytest.raises(BadModel):
        predictors.widen(np.zeros(8, dtype=np.uint8), DTYPES["F16"], DTYPES["F64"])


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F32", "BF16"), ("F64", "F32")])
def test_narrowing_undoes_widening_for_every_word_nans_too(source, target):
    if target == "F32":
        narrowed = np.random.default_rng(7).integers(0, 1 << 32, 200_000, dtype="<u4")
        narrowed[:8] = [0, 1 << 31, 1, 0x7FFFFF, 0x7F800000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF]
    else:
        narrowed = np.tile(ALL16, 3)
    wide = predictors.widen(raw(narrowed, target), DTYPES[target], DTYPES[source])
    back = predictors.narrow(wide, DTYPES[target])
    assert back is not None
    assert back.tobytes() == narrowed.tobytes()


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F32", "BF16"), ("F64", "F32")])
def test_one_element_that_does_not_fit_is_found_wherever_it_is(source, target):
    count = 140_000
    good = predictors.widen(raw(np.full(count, 0x3C01), target), DTYPES[target], DTYPES[source])
    bits = 8 * DTYPES[source].nbytes
    lost = MANTISSA[source] - MANTISSA[target]
    bad = [1, 1 << (bits - 1) | 1, ((1 << EXPONENT[source]) - 1) << MANTISSA[source] | 1]
    bad.append(int(good.view(DTYPES[source].word)[0]) ^ 1 << (lost - 1))
    if (source, target) != ("F32", "BF16"):  # the wide exponent is out of the narrow range, low bits all zero
        bad += [((1 << EXPONENT[source]) - 2) << MANTISSA[source], 1 << MANTISSA[source]]
    for place in (0, 1, 1023, 1024, 1025, 65_537, count - 1):
        for word in bad:
            words = good.copy()
            words.view(DTYPES[source].word)[place] = word
            assert predictors.narrow(words, DTYPES[target]) is None
    assert predictors.narrow(good, DTYPES[target]) is not None


@settings(max_examples=300, deadline=None)
@given(words=st.lists(patterns("F32"), max_size=6), target=st.sampled_from(["F16", "BF16"]))
def test_narrow_says_yes_exactly_when_every_element_survives(words, target):
    fits = {w for w in words if reference(reference(w, "F32", target), target, "F32") == w}
    got = predictors.narrow(raw(words, "F32"), DTYPES[target])
    assert (got is not None) == (fits == set(words))
    if got is not None:
        assert predictors.widen(got, DTYPES[target], DTYPES["F32"]).tobytes() == raw(words, "F32").tobytes()


def test_nothing_is_cast_to_nothing():
    empty = np.empty(0, dtype=np.uint8)
    for source in FLOATS:
        for target in FLOATS:
            assert predictors.cast(empty, DTYPES[source], DTYPES[target]).size == 0
    for target in ("F16", "BF16", "F32"):
        assert predictors.narrow(empty, DTYPES[target]).size == 0


def test_blocks_are_joined_without_a_seam_and_the_source_is_kept():
    words = np.random.default_rng(3).integers(0, 1 << 32, 100_001, dtype="<u4")
    words.flags.writeable = False
    for target in ("F16", "BF16", "F64"):
        whole = cast(words, "F32", target)
        pieces = [cast(words[i : i + 977], "F32", target) for i in range(0, words.size, 977)]
        assert np.array_equal(whole, np.concatenate(pieces))
