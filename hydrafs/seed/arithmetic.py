"""What torch's CPU kernels give for the sum and the difference of two tensors, bit for bit, NaNs' payloads aside.

Rule 1: both operands are cast to the common type first, then there is one operation, rounded once to that type. In
        half precision it is done in float32, which holds every such sum exactly enough that rounding twice is the same
        as rounding once (24 bits are two times 11 and two more).
Rule 2: types meet as in ``torch.result_type``: a tensor of no dimensions has a say only across kinds.
Rule 3: what torch refuses (the difference of two booleans, arithmetic on float8 and quantised types) is refused here,
        and so are complex numbers, whose product with one, which torch takes, makes NaNs of infinities.

Sources: torch "Tensor Attributes" (type promotion), c10/core/ScalarType.h ``promoteTypes``,
aten/src/ATen/native/TypeProperties.cpp ``combine_categories``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hydrafs.dtypes import DTYPES, DType
from hydrafs.errors import UsageError
from hydrafs.predictors import Words, cast, castable

Shape = tuple[int, ...]
Array = npt.NDArray[Any]

_KINDS = (("BOOL",), ("U8", "I8", "I16", "I32", "I64"), ("BF16", "F16", "F32", "F64"))
_NUMPY = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_HALVES = ("F16", "BF16")


def result_dtype(a: DType, a_shape: Shape, b: DType, b_shape: Shape) -> DType:
    """The type of the sum or difference of two tensors.

    Raises:
        UsageError: torch has no arithmetic for such types.
    """
    kinds = [_kind(a), _kind(b)]
    if bool(a_shape) != bool(b_shape):
        first, second = (0, 1) if a_shape else (1, 0)
        if kinds[first] >= kinds[second]:
            return (a, b)[first]
    if kinds[0] != kinds[1]:
        return a if kinds[0] > kinds[1] else b
    if a is b:
        return a
    if {a.name, b.name} == set(_HALVES):
        return DTYPES["F32"]
    if {a.kind, b.kind} == {"unsigned", "signed"}:  # U8 and a signed type
        signed = a if a.kind == "signed" else b
        return DTYPES["I16"] if signed.nbytes == 1 else signed
    return a if a.nbytes > b.nbytes else b


def _kind(dtype: DType) -> int:
    for number, names in enumerate(_KINDS):
        if dtype.name in names:
            return number
    raise UsageError("tensors of that type are not added or subtracted", detail=dtype.torch_name)


def result_shape(a: Shape, b: Shape) -> Shape:
    """The shape of the sum or difference of two tensors, broadcast as torch does.

    Raises:
        UsageError: the shapes do not fit.
    """
    try:
        return tuple(np.broadcast_shapes(a, b))
    except ValueError:
        raise UsageError("two tensors have shapes that do not fit", detail=f"{list(a)} and {list(b)}") from None


def times_one(words: Words, dtype: DType) -> tuple[Words, DType]:
    """``tensor * 1``: what it is, save that booleans become int64."""
    if dtype.name != "BOOL":
        return words, dtype
    return words.view("?").astype("<i8").view(np.uint8), DTYPES["I64"]


def added(a: Words, a_dtype: DType, a_shape: Shape, b: Words, b_dtype: DType, b_shape: Shape) -> tuple[Words, DType]:
    """The elements of ``a + b``, and their type.

    Raises:
        UsageError: as for ``result_dtype`` and ``result_shape``.
    """
    return _computed(np.add, a, a_dtype, a_shape, b, b_dtype, b_shape)


def subtracted(
    a: Words, a_dtype: DType, a_shape: Shape, b: Words, b_dtype: DType, b_shape: Shape
) -> tuple[Words, DType]:
    """The elements of ``a - b``, and their type.

    Raises:
        UsageError: as for ``added``; two booleans.
    """
    if a_dtype.name == b_dtype.name == "BOOL":
        raise UsageError("torch does not subtract booleans")
    return _computed(np.subtract, a, a_dtype, a_shape, b, b_dtype, b_shape)


def equal(a: Words, a_dtype: DType, a_shape: Shape, b: Words, b_dtype: DType, b_shape: Shape) -> bool:
    """``torch.equal``: the same shape and the same values in the common type. No NaN is equal; -0 is equal to 0.

    Types that torch does no arithmetic on are compared by their bits.
    """
    if a_shape != b_shape:
        return False
    try:
        common = result_dtype(a_dtype, a_shape, b_dtype, b_shape)
    except UsageError:
        return a_dtype is b_dtype and np.array_equal(a, b)
    return bool(np.array_equal(_numbers(a, a_dtype, common), _numbers(b, b_dtype, common)))


def _computed(
    operation: np.ufunc, a: Words, a_dtype: DType, a_shape: Shape, b: Words, b_dtype: DType, b_shape: Shape
) -> tuple[Words, DType]:
    common = result_dtype(a_dtype, a_shape, b_dtype, b_shape)
    result_shape(a_shape, b_shape)
    first = _numbers(a, a_dtype, common).reshape(a_shape)
    second = _numbers(b, b_dtype, common).reshape(b_shape)
    with np.errstate(all="ignore"):
        result = np.asarray(operation(first, second))
    words = np.ascontiguousarray(result).reshape(-1).view(np.uint8)
    return (cast(words, DTYPES["F32"], common) if common.name in _HALVES else words), common


def _numbers(words: Words, dtype: DType, common: DType) -> Array:
    """The elements as numpy's numbers of the type ``common``, those of a half type as float32 rounded to it."""
    target = DTYPES["F32"] if common.name in _HALVES else common
    if castable(dtype, target):
        cast_words = cast(words, dtype, common) if castable(dtype, common) else words
        return cast(cast_words, common, target).view(_NUMPY[target.name])
    with np.errstate(all="ignore"):
        numbers = words.view(_NUMPY[dtype.name]).astype(_NUMPY[target.name])
    if common.name in _HALVES:  # an integer that the half type rounds
        return cast(cast(numbers.view(np.uint8), target, common), common, target).view(_NUMPY[target.name])
    return numbers


def values_changed(words: Words, dtype: DType, others: Words, other_dtype: DType) -> int:
    """How many elements are not what they were: other bits, or, between types, another value; a NaN is a NaN."""
    if dtype is other_dtype:
        unit = dtype.nbytes
        differ = (words.reshape(-1, unit) != others.reshape(-1, unit)).any(axis=1)
    else:
        try:
            common = result_dtype(dtype, (1,), other_dtype, (1,))
        except UsageError:
            return words.size // dtype.nbytes
        differ = _numbers(words, dtype, common) != _numbers(others, other_dtype, common)
    if differ.any() and dtype.name in _KINDS[2] and other_dtype.name in _KINDS[2]:
        differ &= ~(_is_nan(words, dtype) & _is_nan(others, other_dtype))
    return int(np.count_nonzero(differ))


def _is_nan(words: Words, dtype: DType) -> npt.NDArray[np.bool_]:
    wide = words if dtype.name == "F64" else cast(words, dtype, DTYPES["F32"])
    result: npt.NDArray[np.bool_] = np.isnan(wide.view(_NUMPY["F64" if dtype.name == "F64" else "F32"]))
    return result
