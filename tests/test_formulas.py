"""Pinned arithmetic: the values that torch computes, the same whatever range is asked for, and nothing hostile."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrafs import formulas
from hydrafs.dtypes import BY_TORCH_NAME, DTYPES
from hydrafs.errors import BadModel
from hydrafs.formulas import ADD, SUBTRACT, Formula, Step, cast, divide, evaluate, get, lerp, result_dtype, scale

COUNT = 70_000  # more than one block
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
REAL = list(NAMES)


@pytest.fixture(params=["native", "numpy"], autouse=True, scope="module")
def computed_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this file runs with the extension and without: the bits are the same."""
    native = formulas._native
    if request.param == "native" and native is None:
        pytest.fail("the extension is not built")
    formulas._native = native if request.param == "native" else None
    yield str(request.param)
    formulas._native = native


def special(dtype: torch.dtype) -> torch.Tensor:
    """Numbers that rounding, underflow and overflow go wrong with first."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal * 0.37, info.eps]
    values += [
        3 * info.tiny / 1024,
        1 + info.eps,
        1 - info.eps / 2,
        65504.0,
        65520.0,
        1e-7,
        float("inf"),
        float("-inf"),
    ]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def tensors(dtype: torch.dtype, number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(COUNT, generator=generator, dtype=torch.float64) * 0.05
    found = [first] + [first + torch.randn(COUNT, generator=generator, dtype=torch.float64) * 0.01 for _ in range(2)]
    found = [t.to(dtype) for t in found[:number]]
    hard = special(dtype)
    for shift, tensor in enumerate(found):
        tensor[: len(hard) ** 2] = (
            torch.roll(hard, shift)
            .repeat_interleave(len(hard) ** shift % 323 or 1)
            .repeat(len(hard) ** 2)[: len(hard) ** 2]
        )
    return found


def raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def run(
    steps: Sequence[Step], operands: Sequence[torch.Tensor], first: int = 0, count: int | None = None
) -> tuple[npt.NDArray[np.uint8], str]:
    names = [BY_TORCH_NAME[str(t.dtype).removeprefix("torch.")].name for t in operands]
    buffers = [raw(t) for t in operands]

    def read(index: int, start: int, elements: int) -> npt.NDArray[np.uint8]:
        nbytes = DTYPES[names[index]].nbytes
        assert (start + elements) * nbytes <= buffers[index].size
        return buffers[index][start * nbytes : (start + elements) * nbytes]

    total = operands[0].numel() if count is None else count
    return evaluate(Formula("test", tuple(steps)), names, read, first, total)


def assert_equal(steps: Sequence[Step], operands: Sequence[torch.Tensor], expected: torch.Tensor) -> None:
    got, dtype = run(steps, operands)
    assert dtype == NAMES[expected.dtype]
    words = DTYPES[dtype].word
    nan = torch.isnan(expected).numpy()
    assert np.array_equal(got.view(words)[~nan], raw(expected).view(words)[~nan])
    back = torch.from_numpy(got.copy()).view(expected.dtype)
    assert bool(torch.isnan(back).numpy()[nan].all())
    # One kind of NaN, whatever the processor makes: positive, quiet, and nothing else.
    quiet = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}[dtype]
    assert set(got.view(words)[nan].tolist()) <= {quiet}


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.45, 0.123, 1.0, -0.25, 1.5])
@pytest.mark.parametrize("dtype", REAL, ids=lambda d: NAMES[d])
class TestWhatTorchComputes:
    def test_weighted_sum(self, dtype: torch.dtype, alpha: float) -> None:
        a, b = tensors(dtype, 2)
        steps = [get(0), scale(1 - alpha), get(1), scale(alpha), ADD]
        assert_equal(steps, [a, b], ((1 - alpha) * a) + (alpha * b))

    def test_add_difference(self, dtype: torch.dtype, alpha: float) -> None:
        a, b, c = tensors(dtype)
        steps = [get(0), get(1), get(2), SUBTRACT, scale(alpha), ADD]
        assert_equal(steps, [a, b, c], a + (alpha * (b - c)))

    def test_unmerge(self, dtype: torch.dtype, alpha: float) -> None:
        a, b = tensors(dtype, 2)
        steps = [get(0), get(1), scale(1 - alpha), SUBTRACT, divide(alpha)]
        assert_equal(steps, [a, b], (a - (1 - alpha) * b) / alpha)

    def test_strength(self, dtype: torch.dtype, alpha: float) -> None:
        a, b = tensors(dtype, 2)
        steps = [get(0), get(1), SUBTRACT, scale(1 + alpha), get(1), scale(1 - alpha), ADD]
        assert_equal(steps, [a, b], (a - b) * (1 + alpha) + b * (1 - alpha))

    def test_with_another_type(self, dtype: torch.dtype, alpha: float) -> None:
        a = tensors(dtype, 1)[0]
        for other in REAL:
            b = tensors(other, 2)[1]
            steps = [get(0), scale(1 - alpha), get(1), scale(alpha), ADD, cast("F16")]
            assert_equal(steps, [a, b], (((1 - alpha) * a) + (alpha * b)).half())

    def test_lerp_in_single_precision(self, dtype: torch.dtype, alpha: float) -> None:
        a, b = tensors(dtype, 2)
        whole = len(a) // 64 * 64  # torch fuses in the body of a run, and not in its tail
        a, b = a[:whole], b[:whole]
        steps = [get(0), cast("F32"), get(1), cast("F32"), lerp(alpha), cast("BF16")]
        one = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert_equal(steps, [a, b], torch.lerp(a.float(), b.float(), alpha).bfloat16())
        finally:
            torch.set_num_threads(one)


def test_whole_numbers_are_computed_as_torch_does() -> None:
    real = tensors(torch.float16, 1)[0][:77]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        whole = torch.arange(77).to(dtype)
        other = (torch.arange(77) * 3 % 50).to(dtype)
        assert_equal([get(0), scale(0.3), get(1), scale(0.7), ADD], [whole, other], (0.3 * whole) + (0.7 * other))
        assert_equal([get(0), get(1), ADD], [whole, real], whole + real)
    large = torch.tensor([2**53 + 1, 2**24 + 1, -(2**40) + 7])
    assert_equal([get(0), scale(1.0)], [large], 1.0 * large)


def test_a_coefficient_rounded_first_is_another_number() -> None:
    """torch before 2.1 rounded a number to half precision before it multiplied."""
    a = tensors(torch.float16, 1)[0]
    before = formulas.rounded(0.3, "F16")
    assert before == float(torch.tensor(0.3).half())
    assert formulas.rounded(0.3, "BF16") == float(torch.tensor(0.3).bfloat16())
    assert_equal([get(0), scale(before)], [a], (a.float() * torch.tensor(0.3).half().float()).half())
    assert not np.array_equal(run([get(0), scale(before)], [a])[0], run([get(0), scale(0.3)], [a])[0])


FORMULAS = [
    (get(0), scale(0.7), get(1), scale(0.3), ADD),
    (get(0), get(1), get(2), SUBTRACT, scale(0.45), ADD),
    (get(0), cast("F32"), get(1), cast("F32"), lerp(0.3), cast("F16")),
    (Step("product", index=0, rank=7, columns=50, shifts=(20, 20)), get(2), ADD, cast("F16")),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMULAS), st.integers(0, COUNT - 1), st.integers(0, COUNT), st.sampled_from(REAL))
def test_any_range_is_a_part_of_the_whole(steps: tuple[Step, ...], first: int, count: int, dtype: torch.dtype) -> None:
    operands = tensors(dtype)
    count = min(count, COUNT - first)
    whole, name = run(steps, operands)
    part, _ = run(steps, operands, first, count)
    nbytes = DTYPES[name].nbytes
    assert np.array_equal(part, whole[first * nbytes : (first + count) * nbytes])


def test_the_bits_are_pinned() -> None:
    """The same on every machine and with every numpy: what a diff was made with must come out where it is read."""
    numbers = random.Random(1)
    words = np.array([numbers.getrandbits(16) for _ in range(3 * 5000)], "<u2").reshape(3, -1)
    found = hashlib.sha256()
    for name in ("F16", "BF16"):
        operands = [w.view(np.uint8) for w in words]
        for steps in FORMULAS:
            out, _ = evaluate(
                Formula("", steps), [name] * 3, lambda i, a, n, held=operands: held[i][2 * a : 2 * (a + n)], 0, 5000
            )
            found.update(out)
    assert found.hexdigest() == PINNED


PINNED = "9f1317b9b20ae70a57ed726edbca1ef1e5dfaf4274dd757df61265e70ea9361e"


class TestProduct:
    def test_every_sum_is_exact_before_it_is_rounded(self) -> None:
        rng = np.random.default_rng(3)
        rank, rows, columns = 5, 4, 3
        up = (rng.standard_normal((rows, rank)) * 10 ** rng.uniform(-4, 1, (rows, rank))).astype(np.float32)
        down = rng.standard_normal((rank, columns)).astype(np.float32)
        shifts = formulas.product_shifts(up, down, rank)
        step = Step("product", index=0, rank=rank, columns=columns, shifts=shifts)
        got, _ = run([step], [torch.from_numpy(up), torch.from_numpy(down)], 0, rows * columns)
        for row in range(rows):
            for column in range(columns):
                exact = sum(
                    Fraction(round(Fraction(float(up[row, k])) * 2 ** shifts[0]))
                    * Fraction(round(Fraction(float(down[k, column])) * 2 ** shifts[1]))
                    for k in range(rank)
                ) / Fraction(2) ** (shifts[0] + shifts[1])
                assert got.view("<f4")[row * columns + column] == np.float32(float(exact))

    @pytest.mark.parametrize("rank", [1, 4, 32, 128, 4096])
    def test_it_is_close_to_torchs(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        up = torch.randn(60, rank, generator=generator).half()
        down = torch.randn(rank, 90, generator=generator).half()
        step = Step(
            "product",
            index=0,
            rank=rank,
            columns=90,
            shifts=formulas.product_shifts(up.float().numpy(), down.float().numpy(), rank),
        )
        bits = sum(step.shifts) and rank * float((up.float().abs().max() * 2.0 ** step.shifts[0]).item()) * float(
            (down.float().abs().max() * 2.0 ** step.shifts[1]).item()
        )
        assert bits <= 2**53
        got, _ = run([step], [up, down], 0, 60 * 90)
        want = (up.double() @ down.double()).numpy().reshape(-1)
        assert np.allclose(got.view("<f4"), want, rtol=0, atol=1e-4 * np.abs(want).max())

    def test_zeros_and_numbers_that_are_none(self) -> None:
        assert formulas.product_shifts(np.zeros((2, 2), "f4"), np.full((2, 2), np.inf, "f4"), 2) == (0, 0)
        step = Step("product", index=0, rank=2, columns=2)
        got, _ = run([step], [torch.full((2, 2), float("nan")), torch.ones(2, 2)], 0, 4)
        assert not got.any()


@pytest.mark.parametrize(
    ("steps", "dtypes"),
    [
        ((), ["F16"]),
        ((ADD,), ["F16"]),
        ((get(1),), ["F16"]),
        ((get(-1),), ["F16"]),
        ((get(0), get(0)), ["F16"]),
        ((get(0), Step("sin")), ["F16"]),
        ((get(0), scale(float("nan"))), ["F16"]),
        ((get(0), scale(float("inf"))), ["F16"]),
        ((get(0), divide(0.0)), ["F16"]),
        ((get(0), cast("F8_E4M3")), ["F16"]),
        ((get(0), cast("x")), ["F16"]),
        ((get(0),), ["C64"]),
        ((get(0),), ["I64"]),
        ((get(0), get(0), ADD), ["I64"]),
        ((get(0), get(0), lerp(0.5)), ["F16"]),
        ((get(0), get(1), lerp(0.5)), ["F16", "F32"]),
        ((get(0),) * 9 + (ADD,) * 8, ["F16"]),
        ((get(0),) + (scale(1.0),) * 64, ["F16"]),
        ((get(0),), ["F16"] * 9),
        ((Step("product", index=0, rank=2, columns=2),), ["F16"]),
        ((Step("product", index=0, rank=0, columns=2),), ["F16"] * 2),
        ((Step("product", index=0, rank=1 << 20, columns=2),), ["F16"] * 2),
        ((Step("product", index=0, rank=2, columns=0),), ["F16"] * 2),
        ((Step("product", index=0, rank=2, columns=2, shifts=(5000, 0)),), ["F16"] * 2),
    ],
)
def test_what_cannot_be_computed_is_refused(steps: tuple[Step, ...], dtypes: list[str]) -> None:
    with pytest.raises(BadModel):
        result_dtype(Formula("hostile", steps), dtypes)


def test_what_operands_must_hold() -> None:
    product = Formula("", (Step("product", index=1, rank=3, columns=4), get(0), ADD))
    assert formulas.operand_elements(product, 3, 20) == [20, 15, 12]
    with pytest.raises(BadModel):
        formulas.operand_elements(product, 3, 21)
    assert formulas.operand_elements(Formula("", (get(1),)), 2, 5) == [0, 5]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_extension_gives_the_bits_of_numpy(data: st.DataObject) -> None:
    """Any formula that can be computed, over any words at all."""
    native = pytest.importorskip("hydrafs._formulas")
    names = data.draw(st.lists(st.sampled_from(["F32", "F16", "BF16"]), min_size=1, max_size=3))
    numbers = st.floats(-4, 4, width=32) | st.sampled_from([1e-30, 3e38, -0.0, 0.3, 1.0])
    simple = st.one_of(
        st.builds(get, st.integers(0, len(names) - 1)),
        st.builds(cast, st.sampled_from(["F32", "F16", "BF16"])),
        st.builds(scale, numbers),
        st.builds(divide, numbers),
        st.builds(lerp, numbers),
        st.sampled_from([ADD, SUBTRACT]),
    )
    steps = tuple(data.draw(st.lists(simple, min_size=2, max_size=10)))
    try:
        result_dtype(Formula("", steps), names)
    except BadModel:
        return
    count = data.draw(st.integers(0, 5000))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    buffers = [rng.integers(0, 256, count * DTYPES[name].nbytes).astype(np.uint8) for name in names]

    def read(index: int, first: int, elements: int) -> npt.NDArray[np.uint8]:
        return buffers[index][first * DTYPES[names[index]].nbytes :][: elements * DTYPES[names[index]].nbytes]

    before = formulas._native
    try:
        formulas._native = native
        fast, _ = evaluate(Formula("", steps), names, read, 0, count)
        formulas._native = None
        slow, _ = evaluate(Formula("", steps), names, read, 0, count)
    finally:
        formulas._native = before
    assert np.array_equal(fast, slow)


@pytest.mark.parametrize(
    ("steps", "types", "operands", "result", "nbytes"),
    [
        (b"", b"\1", (bytes(4),), 1, 4),
        (b"\0", b"\1", (bytes(4),), 1, 4),
        (b"\0\1" + bytes(6), b"\1", (bytes(4),), 1, 4),  # another operand than there is
        (b"\7\0" + bytes(6), b"\1", (bytes(4),), 1, 4),  # no such step
        (bytes(8) + b"\1\3" + bytes(6), b"\1", (bytes(4),), 1, 4),  # no such type
        (b"\4\0" + bytes(6), b"\1", (bytes(4),), 1, 4),  # nothing to add
        (bytes(16), b"\1", (bytes(4),), 1, 4),  # two results
        (bytes(8 * 9) + b"\4\0\0\0\0\0\0\0" * 8, b"\1", (bytes(4),), 1, 4),  # too deep
        (bytes(8 * 65), b"\1", (bytes(4),), 1, 4),
        (bytes(8), b"\1", (bytes(3),), 1, 4),
        (bytes(8), b"\1", (bytes(6),), 1, 4),
        (bytes(8), b"\1", (), 1, 4),
        (bytes(8), b"\1", (None,), 1, 4),
        (bytes(8), b"\1" * 9, (bytes(4),) * 9, 1, 4),
        (bytes(8), b"\3", (bytes(4),), 1, 4),
        (bytes(8), b"\1", (bytes(4),), 0, 8),  # another type than it leaves
        (bytes(8), b"\1", (bytes(4),), 9, 4),
        (bytes(8), b"\1", (bytes(4),), 1, 3),
    ],
)
def test_what_the_extension_refuses(
    steps: bytes, types: bytes, operands: tuple[bytes, ...], result: int, nbytes: int
) -> None:
    native = pytest.importorskip("hydrafs._formulas")
    with pytest.raises(ValueError, match="no formula"):
        native.evaluate(steps, types, operands, result, bytearray(nbytes))
