"""Pinned arithmetic over the tensors of several parents: merges, differences, strengths, a LoRA's product.

Goal: what a merging program computed, to the last bit, any range of elements at a time, the same on every machine.
Plan: a formula is a list of steps for a stack of values. A value is a run of elements of one type; each step rounds its
result to its type at once, as the programs do that compute with tensors of that type.
Rule 1: every rounding is to nearest, ties to even. F16 and BF16 are computed in F32, rounded there, and then once more
        to their own type (torch does the same on a processor: ``aten/src/ATen/native/cpu/BinaryOpsKernel.cpp``).
Rule 2: nothing is fused but what says so, and what is fused or summed up is exact before it is rounded.
Rule 3: a NaN that a step makes or passes on is the positive quiet one with no other payload.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hydrafs import predictors
from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel

try:
    _native: Any = importlib.import_module("hydrafs._formulas")
except ImportError:  # no compiler when this was installed: numpy gives the same bits, at a third of the speed
    _native = None

Words = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]

Read = Callable[[int, int, int], Words]
"""``read(operand, first, count)``: so many raw elements of an operand, from its element ``first`` on."""

REAL = ("F64", "F32", "F16", "BF16")
"""The types that formulas compute with."""
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")
"""Types that an operand may have too. They are computed with as F32, or as the other operand's type (torch's rule)."""
MAX_STEPS = 64
MAX_OPERANDS = 8
MAX_STACK = 8
MAX_RANK = 4096
EXACT_BITS = 53
"""Sums of products below this many bits are exact in binary64, in whatever order they are taken."""
_BLOCK = 65536


class Step(msgspec.Struct, array_like=True, frozen=True):
    """One step. ``op`` is what to do; the other fields are what it needs, and zero or empty where it does not.

    ========== ===============================================================================================
    get        push operand ``index``
    cast       the top value as type ``dtype`` (from F64 to a 16-bit type by way of F32, as torch does)
    scale      the top value times ``number`` (rounded to F32 first, for F64 taken as it is)
    divide     the top value divided by ``number`` (likewise)
    add        the two top values, b on top of a: a + b, in the type that holds both
    subtract   likewise, a - b
    lerp       likewise, torch's ``lerp`` from a to b by ``number``, both F32: one fused multiply and add
    product    push the matrix product of operands ``index`` (rows x rank) and ``index + 1`` (rank x ``columns``),
               as F32: see ``_product``
    ========== ===============================================================================================
    """

    op: str
    number: float = 0.0
    index: int = 0
    dtype: str = ""
    rank: int = 0
    columns: int = 0
    shifts: tuple[int, int] = (0, 0)


class Formula(msgspec.Struct, array_like=True, frozen=True):
    """Steps that leave one value. ``label`` says for people what it is: a program's name and its method."""

    label: str
    steps: tuple[Step, ...]


def get(index: int) -> Step:
    """Push an operand."""
    return Step("get", index=index)


def cast(dtype: str) -> Step:
    """The top value as another type."""
    return Step("cast", dtype=dtype)


def scale(number: float) -> Step:
    """The top value times a number."""
    return Step("scale", number)


def divide(number: float) -> Step:
    """The top value divided by a number."""
    return Step("divide", number)


def lerp(number: float) -> Step:
    """From the value below the top to the top one, as torch does it."""
    return Step("lerp", number)


ADD = Step("add")
SUBTRACT = Step("subtract")


def promoted(one: str, other: str) -> str:
    """The type that holds both, as torch has it: the wider, F32 for F16 with BF16, the real one of a real and a whole
    one. Two whole ones have none here: empty."""
    if one in WHOLE or other in WHOLE:
        return next((name for name in (one, other) if name in REAL), "")
    if one == other:
        return one
    wide = {"F64": 3, "F32": 2}
    return max(one, other, key=lambda name: wide.get(name, 0)) if wide.keys() & {one, other} else "F32"


def rounded(number: float, dtype: str) -> float:
    """``number`` rounded to a type: a coefficient as programs have it that round it before they multiply."""
    raw = np.array([number], dtype="<f8").view(np.uint8)
    back = predictors.cast(predictors.cast(raw, DTYPES["F64"], DTYPES[dtype]), DTYPES[dtype], DTYPES["F64"])
    return float(back.view("<f8")[0])


def result_dtype(formula: Formula, dtypes: Sequence[str]) -> str:
    """The type of what the formula gives for operands of these types.

    Raises:
        BadModel: the steps are none that can be taken: unknown, out of range, with too few values, or not one result.
    """

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise BadModel("a formula cannot be computed", where=formula.label, detail=what)

    check(0 < len(formula.steps) <= MAX_STEPS, f"{len(formula.steps)} steps")
    check(len(dtypes) <= MAX_OPERANDS, f"{len(dtypes)} operands")
    check(all(d in REAL or d in WHOLE for d in dtypes), f"operands of types {', '.join(dtypes)}")
    stack: list[str] = []
    for step in formula.steps:
        check(math.isfinite(step.number), f"{step.op} by {step.number}")
        needed = {"get": 0, "product": 0, "cast": 1, "scale": 1, "divide": 1, "add": 2, "subtract": 2, "lerp": 2}
        check(step.op in needed, f"unknown step {step.op!r}")
        check(len(stack) >= needed[step.op], f"{step.op} of too few values")
        if step.op == "get":
            check(0 <= step.index < len(dtypes), f"operand {step.index}")
            stack.append(dtypes[step.index])
        elif step.op == "product":
            check(0 <= step.index < len(dtypes) - 1, f"operands {step.index} and the next")
            check(0 < step.rank <= MAX_RANK and 0 < step.columns < 1 << 31, f"rank {step.rank}, {step.columns} columns")
            check(len(step.shifts) == 2 and all(-300 <= s <= 300 for s in step.shifts), "shifts out of range")
            stack.append("F32")
        elif step.op == "cast":
            check(step.dtype in REAL, f"cast to {step.dtype!r}")
            stack[-1] = step.dtype
        elif step.op in ("scale", "divide"):
            check(step.op == "scale" or step.number != 0, "division by zero")
            stack[-1] = stack[-1] if stack[-1] in REAL else "F32"
        elif step.op in ("add", "subtract"):
            other = stack.pop()
            stack[-1] = promoted(stack[-1], other)
            check(bool(stack[-1]), f"{step.op} of whole numbers")
        elif step.op == "lerp":
            check(stack.pop() == stack[-1] == "F32", "lerp of other types than F32")
        check(len(stack) <= MAX_STACK, "too many values at once")
    check(len(stack) == 1, f"{len(stack)} results")
    check(stack[0] in REAL, "a result of whole numbers")
    return stack[0]


def operand_elements(formula: Formula, operands: int, elements: int) -> list[int]:
    """How many elements each operand has for a result of ``elements``; 0 for one that no step uses.

    Raises:
        BadModel: a product whose rows do not come out whole.
    """
    needed = [0] * operands
    for step in formula.steps:
        if step.op == "get":
            needed[step.index] = max(needed[step.index], elements)
        elif step.op == "product":
            if elements % step.columns:
                raise BadModel("a formula cannot be computed", where=formula.label, detail="rows are not whole")
            rows = elements // step.columns
            for index, count in ((step.index, rows * step.rank), (step.index + 1, step.rank * step.columns)):
                needed[index] = max(needed[index], count)
    return needed


def evaluate(formula: Formula, dtypes: Sequence[str], read: Read, first: int, count: int) -> tuple[Words, str]:
    """Elements ``[first, first + count)`` of what the formula gives, as raw little-endian elements, and their type.

    Args:
        formula: one that ``result_dtype`` accepts for ``dtypes``.
        dtypes: the operands' types.
        read: gives raw elements of an operand.

    Raises:
        BadModel: the formula cannot be computed, or this thread's floating-point mode flushes small numbers to zero.

    Thread safety: free of shared state, as safe as ``read``.
    """
    dtype = result_dtype(formula, dtypes)
    if not (_TINY * _HALF).all():
        raise BadModel(
            "small numbers are flushed to zero here",
            where=formula.label,
            remedy="a library in this process set the processor's mode; start hydrafs by itself",
        )
    nbytes = DTYPES[dtype].nbytes
    out = np.empty(count * nbytes, np.uint8)
    packed = _packed(formula) if _native and not _TYPES.keys().isdisjoint(dtypes) else b""
    if packed and dtype in _TYPES and _TYPES.keys() >= set(dtypes):
        kinds = bytes(_TYPES[name] for name in dtypes)
        _native.evaluate(packed, kinds, tuple(read(i, first, count) for i in range(len(dtypes))), _TYPES[dtype], out)
        return out, dtype
    products: dict[int, _Array] = {}
    with np.errstate(all="ignore"):
        for start in range(0, count, _BLOCK):
            block = min(_BLOCK, count - start)
            value = _run(formula, dtypes, read, first + start, block, products)
            out[start * nbytes : (start + block) * nbytes] = value.words.view(np.uint8)
    return out, dtype


_TYPES = {"F32": 0, "F16": 1, "BF16": 2}
_OPS = {"get": 0, "cast": 1, "scale": 2, "divide": 3, "add": 4, "subtract": 5, "lerp": 6}


def _packed(formula: Formula) -> bytes:
    """The steps as the extension takes them; empty for what it does not compute: F64, products, no arithmetic.

    Made anew each time: formulas with 0.0 and with -0.0 are equal to a cache."""
    native = all(s.op in _OPS and (s.op != "cast" or s.dtype in _TYPES) for s in formula.steps)
    if not native or all(s.op in ("get", "cast") for s in formula.steps):
        return b""
    rows = []
    for step in formula.steps:
        number = float(np.float32(step.number))
        if not math.isfinite(number) or (step.op == "divide" and not number):
            return b""
        rows.append(struct.pack("<BBxxf", _OPS[step.op], _TYPES.get(step.dtype, step.index), number))
    return b"".join(rows)


_TINY = np.array([1e-40], np.float32)
_HALF = np.array([0.5], np.float32)
_QUIET = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}
_INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


class _Value:
    """A run of elements: as raw words of its type, and as numbers that are computed with, each made when asked for.

    ``table`` says that the elements are those of ``words`` looked up in a table of all results (16-bit types)."""

    __slots__ = ("_numbers", "_table", "_words", "dtype", "made")

    def __init__(
        self,
        dtype: str,
        words: _Array | None = None,
        numbers: _Array | None = None,
        table: tuple[_Array, _Array] | None = None,
        made: bool = True,
    ) -> None:
        self.dtype = dtype
        self._words = words
        self._numbers = numbers
        self._table = table
        self.made = made
        """Whether arithmetic made it, so that its NaNs are of one kind; else they are the operand's own."""

    @property
    def words(self) -> _Array:
        """Unsigned words of the type, with one kind of NaN where arithmetic made them."""
        word = DTYPES[self.dtype].word
        if self._table is not None:
            assert self._words is not None
            return np.take(self._table[1], self._words)
        if self._words is None:
            assert self._numbers is not None
            if self.dtype in ("F64", "F32"):
                self._words = np.ascontiguousarray(self._numbers).view(word)
            else:
                raw = np.ascontiguousarray(self._numbers).view(np.uint8)
                self._words = predictors.cast(raw, DTYPES["F32"], DTYPES[self.dtype]).view(word)
            self._words = _one_nan(self._words, self.dtype)
            if self.dtype not in ("F64", "F32"):
                self._numbers = None
        return self._words

    @property
    def numbers(self) -> _Array:
        """The elements as float32, or float64 for F64; not to be written to."""
        if self._table is not None:
            assert self._words is not None
            return np.take(self._table[0], self._words)
        if self._numbers is None or self.dtype not in ("F64", "F32"):
            words = self.words
            if self.dtype == "F16":
                self._numbers = np.take(_half_numbers(), words)
            elif self.dtype == "BF16":
                self._numbers = (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
            else:
                self._numbers = words.view(np.float64 if self.dtype == "F64" else np.float32)
        return self._numbers


def _one_nan(words: _Array, dtype: str) -> _Array:
    infinity = words.dtype.type(_INFINITY[dtype])
    magnitude = words & words.dtype.type((1 << (8 * words.itemsize - 1)) - 1)
    if words.size and magnitude.max() > infinity:
        words = words.copy()
        words[magnitude > infinity] = _QUIET[dtype]
    return words


@lru_cache(1)
def _half_numbers() -> _Array:
    every = np.arange(65536, dtype="<u2").view(np.uint8)
    return predictors.cast(every, DTYPES["F16"], DTYPES["F32"]).view(np.float32)


@lru_cache(64)
def _table(dtype: str, op: str, number: str) -> tuple[_Array, _Array]:
    """What a step with one number (as ``float.hex``: 0.0 and -0.0 are two) gives for every word of a 16-bit type: as
    numbers, and as words. 384 KiB each."""
    result = _scaled(_Value(dtype, np.arange(65536, dtype="<u2")).numbers, op, float.fromhex(number))
    words = _Value(dtype, numbers=result).words
    return _Value(dtype, words).numbers, words


def _scaled(numbers: _Array, op: str, number: float) -> _Array:
    by = numbers.dtype.type(number)
    result: _Array = numbers * by if op == "scale" else numbers / by
    return result


def _run(
    formula: Formula, dtypes: Sequence[str], read: Read, first: int, count: int, products: dict[int, _Array]
) -> _Value:
    stack: list[_Value] = []
    for step in formula.steps:
        if step.op == "get":
            dtype = dtypes[step.index]
            words = read(step.index, first, count).view(DTYPES[dtype].word)
            stack.append(_Value(dtype, words, made=False))
        elif step.op == "product":
            stack.append(_Value("F32", numbers=_product(step, dtypes, read, first, count, products)))
        elif step.op == "cast":
            stack.append(_as(stack.pop(), step.dtype))
        elif step.op in ("scale", "divide"):
            value = stack.pop()
            if value.dtype in ("F16", "BF16"):
                table = _table(value.dtype, step.op, step.number.hex())
                stack.append(_Value(value.dtype, value.words, table=table))
            else:
                real = _as(value, value.dtype if value.dtype in REAL else "F32")
                stack.append(_Value(real.dtype, numbers=_scaled(real.numbers, step.op, step.number)))
        else:
            top, below = stack.pop(), stack.pop()
            dtype = promoted(below.dtype, top.dtype)
            a, b = _as(below, dtype).numbers, _as(top, dtype).numbers
            stack.append(_Value(dtype, numbers=_OF_TWO[step.op](a, b, step.number)))
    return stack[0]


def _as(value: _Value, dtype: str) -> _Value:
    if value.dtype == dtype:
        return value
    if dtype == "F32" and value.dtype in ("F16", "BF16") and value.made:
        return _Value("F32", numbers=value.numbers)
    raw = np.ascontiguousarray(value.words).view(np.uint8)
    if value.dtype in WHOLE:
        # To the wider of what is computed in, then on: a whole number of 64 bits rounds once on its way to F32.
        signed = f"<i{DTYPES[value.dtype].nbytes}" if DTYPES[value.dtype].kind == "signed" else "u1"
        numbers = raw.view(signed).astype(np.float64 if dtype == "F64" else np.float32)
        return _as(_Value("F64" if dtype == "F64" else "F32", numbers=numbers), dtype)
    if value.dtype == "F64" and dtype in ("F16", "BF16"):
        return _as(_as(value, "F32"), dtype)  # two roundings: torch's conversion goes through float too
    words = predictors.cast(raw, DTYPES[value.dtype], DTYPES[dtype]).view(DTYPES[dtype].word)
    return _Value(dtype, words, made=value.made)


def _lerp(a: _Array, b: _Array, weight: float) -> _Array:
    """``fma(w, b - a, a)`` for \\|w\\| < 1/2, else ``fma(w - 1, b - a, b)``: torch, ``ATen/native/Lerp.h``.

    The product of two binary32 is exact in binary64. Its sum with a third is rounded to odd there, after which the
    rounding to binary32 is the only one (S. Boldo, G. Melquiond: Emulation of FMA and correctly rounded sums, 2008).
    """
    w = np.float32(weight)
    small = abs(w) < np.float32(0.5)
    factor, base = (w, a) if small else (np.float32(w - np.float32(1)), b)
    product = (b - a).astype(np.float64) * np.float64(factor)
    addend = base.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    inexact = np.flatnonzero((error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error))
    away = (error[inexact] > 0) == (total[inexact] > 0)
    bits[inexact] += np.where(away, 1, -1)
    return total.astype(np.float32)


_OF_TWO: dict[str, Callable[[_Array, _Array, float], _Array]] = {
    "add": lambda a, b, _: a + b,
    "subtract": lambda a, b, _: a - b,
    "lerp": _lerp,
}


def product_shifts(up: _Array, down: _Array, rank: int) -> tuple[int, int]:
    """The powers of two by which both factors of a product are scaled before they are rounded to whole numbers, so
    that every sum of ``rank`` products is exact."""
    bits = (EXACT_BITS - max(1, rank - 1).bit_length() - 1) // 2

    def shift(matrix: _Array) -> int:
        finite = np.abs(matrix[np.isfinite(matrix)])
        largest = float(finite.max()) if finite.size else 0.0
        return max(-300, min(300, bits - math.frexp(largest)[1])) if largest else 0

    return shift(up), shift(down)


def _product(
    step: Step, dtypes: Sequence[str], read: Read, first: int, count: int, products: dict[int, _Array]
) -> _Array:
    """Rows of ``up @ down``: both are scaled by ``2**shift`` and rounded to whole numbers, whose sums of products are
    exact in binary64 (``product_shifts``); then scaled back and rounded to F32. So no order of summation, and no fused
    operation of any linear algebra library, makes a difference."""
    rank, columns = step.rank, step.columns
    first_row, last_row = first // columns, -(-(first + count) // columns)

    def whole(index: int, start: int, elements: int, shift: int) -> _Array:
        dtype = dtypes[index]
        value = _Value(dtype, read(index, start, elements).view(DTYPES[dtype].word), made=False).numbers
        return np.rint(np.nan_to_num(value.astype(np.float64), posinf=0.0, neginf=0.0) * 2.0**shift)

    if step.index not in products:
        products[step.index] = whole(step.index + 1, 0, rank * columns, step.shifts[1]).reshape(rank, columns)
    up = whole(step.index, first_row * rank, (last_row - first_row) * rank, step.shifts[0]).reshape(-1, rank)
    result = (up @ products[step.index]) * 2.0 ** -(step.shifts[0] + step.shifts[1])
    start = first - first_row * columns
    return result.reshape(-1)[start : start + count].astype(np.float32)
