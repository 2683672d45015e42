"""The arithmetic that turns a parent's elements into a prediction, bit for bit the same on every machine.

Rule 1: rounding is to nearest, ties to even; subnormals are kept on both sides; what is too large becomes infinity.
Rule 2: a NaN keeps its sign and the top bits of its payload. Widened, it is padded with zeros and never quieted;
narrowed, a payload of which nothing is left becomes the quiet bit alone. So narrowing undoes widening for every word.
Rule 3: it is done with integers, because the modes of a processor (flush to zero, denormals are zero) and its ways with
NaNs differ. Numpy's own conversion between F32 and F16 is no faster.

Sources: IEEE 754-2008, sections 3.4 (encodings), 4.3.1 (roundTiesToEven) and 5.4.2 (conversion); bfloat16 is the upper
half of binary32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hydrafs.dtypes import DTYPES, DType
from hydrafs.errors import BadModel

Words = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]

_BLOCK = 65536
"""Elements that are worked on at once, so that the arrays in use stay in the processor's second-level cache."""


class _Format(NamedTuple):
    """An IEEE 754 interchange format, by the widths of its fields in bits."""

    exponent: int
    mantissa: int

    @property
    def nbytes(self) -> int:
        return (1 + self.exponent + self.mantissa) // 8

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(f"<u{self.nbytes}")

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1


_FORMATS: dict[str, _Format] = {
    "F64": _Format(11, 52),
    "F32": _Format(8, 23),
    "F16": _Format(5, 10),
    "BF16": _Format(8, 7),
}
NARROWINGS = {"F16": "F32", "BF16": "F32", "F32": "F64"}
"""What a type is narrowed from."""


def castable(from_dtype: DType, to_dtype: DType) -> bool:
    """Whether ``cast`` knows the way from one type to the other."""
    return from_dtype is to_dtype or (from_dtype.name in _FORMATS and to_dtype.name in _FORMATS)


def cast(source: Words, from_dtype: DType, to_dtype: DType) -> Words:
    """The elements of ``source`` as another type, rounded by the rules at the top of this module.

    Args:
        source: raw elements of ``from_dtype``, little-endian; not changed.
        from_dtype: one of F64, F32, F16, BF16, or any type when ``to_dtype`` is the same.
        to_dtype: one of the same four.

    Returns:
        The raw elements of ``to_dtype``, as many as were given; ``source`` itself, not a copy, for the same type.

    Raises:
        BadModel: the pair is not ``castable``, or ``source`` is no whole number of elements.

    Thread safety: free of shared state.
    """
    if from_dtype is to_dtype:
        return source
    if not castable(from_dtype, to_dtype):
        raise BadModel(
            "a tensor cannot be predicted from another of that type",
            detail=f"{from_dtype.name} cast to {to_dtype.name}",
            remedy="dehydrate the model again",
        )
    _whole(source, from_dtype)
    words = source.view(_FORMATS[from_dtype.name].word)
    result = np.empty(words.size * to_dtype.nbytes, dtype=np.uint8)
    out = result.view(_FORMATS[to_dtype.name].word)
    for start in range(0, words.size, _BLOCK):
        _cast_block(words[start : start + _BLOCK], from_dtype.name, to_dtype.name, out[start : start + _BLOCK])
    return result


def narrow(words: Words, to_dtype: DType) -> Words | None:
    """The elements as a narrower type, if each of them comes back bit for bit from ``widen``.

    Args:
        words: raw elements, little-endian, of F32 for F16 and BF16, of F64 for F32; not changed.
        to_dtype: F16, BF16 or F32.

    Returns:
        The raw elements of ``to_dtype``, or ``None`` when one element (a NaN and -0 included) would not survive.

    Raises:
        BadModel: another type, or ``words`` is no whole number of elements.

    Thread safety: free of shared state.
    """
    if to_dtype.name not in NARROWINGS:
        raise _no_narrowing("no type", to_dtype.name)
    from_dtype = DTYPES[NARROWINGS[to_dtype.name]]
    _whole(words, from_dtype)
    wide, small = _FORMATS[from_dtype.name], _FORMATS[to_dtype.name]
    source = words.view(wide.word)
    lost = (1 << (wide.mantissa - small.mantissa)) - 1
    result = np.empty(source.size * to_dtype.nbytes, dtype=np.uint8)
    out = result.view(small.word)
    back = np.empty(min(_BLOCK, source.size), dtype=wide.word)
    start, count = 0, 1024  # a short first block: most tensors that do not fit say so at once
    while start < source.size:
        block, into = source[start : start + count], out[start : start + count]
        # Whatever `to_dtype` can hold, subnormals and NaNs too, has none of the bits that it lacks.
        if int(np.bitwise_or.reduce(block)) & lost:
            return None
        _cast_block(block, from_dtype.name, to_dtype.name, into)
        check = back[: block.size]
        _cast_block(into, to_dtype.name, from_dtype.name, check)
        if not np.array_equal(check, block):
            return None
        start, count = start + count, _BLOCK
    return result


def widen(words: Words, from_dtype: DType, to_dtype: DType) -> Words:
    """The inverse of ``narrow``: elements of the narrow ``from_dtype`` as ``to_dtype``, every one exact, NaNs too.

    Raises:
        BadModel: not a pair that ``narrow`` knows, or ``words`` is no whole number of elements.

    Thread safety: free of shared state.
    """
    if NARROWINGS.get(from_dtype.name) != to_dtype.name:
        raise _no_narrowing(to_dtype.name, from_dtype.name)
    return cast(words, from_dtype, to_dtype)


def _no_narrowing(wide: str, small: str) -> BadModel:
    return BadModel("a type cannot be narrowed so", detail=f"{wide} to {small}", remedy="dehydrate the model again")


def _whole(words: Words, dtype: DType) -> None:
    if words.nbytes % dtype.nbytes:
        raise BadModel(
            "a tensor is no whole number of elements",
            detail=f"{words.nbytes} bytes of {dtype.name}",
            remedy="dehydrate the model again",
        )


def _cast_block(words: _Array, source: str, target: str, out: _Array) -> None:
    """Cast unsigned words of format ``source`` into ``out``, unsigned words of format ``target``."""
    if (source, target) == ("BF16", "F32"):
        out[:] = words
        out <<= 16
    elif (source, target) == ("F32", "BF16"):
        _to_bfloat16(words, out)
    elif {source, target} == {"F16", "BF16"}:
        middle = np.empty(words.size, dtype="<u4")  # F32 holds both, so this rounds once
        _cast_block(words, source, "F32", middle)
        _cast_block(middle, "F32", target, out)
    elif words.itemsize > out.itemsize:
        _down(words, _FORMATS[source], _FORMATS[target], out)
    else:
        _up(words, _FORMATS[source], _FORMATS[target], out)


def _to_bfloat16(words: _Array, out: _Array) -> None:
    form, small = _FORMATS["F32"], _FORMATS["BF16"]
    rounded = words >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += words
    rounded >>= np.uint32(16)
    out[:] = rounded
    magnitude = words & np.uint32(form.sign - 1)
    if magnitude.size and int(magnitude.max()) > form.infinity:
        nan = magnitude > form.infinity
        out[nan] = _narrow_nan(words[nan], form, small)


def _narrow_nan(words: _Array, wide: _Format, small: _Format) -> _Array:
    """NaNs of ``wide`` as NaNs of ``small``: sign and top payload bits kept, never an empty payload."""
    payload = (words & ((1 << wide.mantissa) - 1)) >> (wide.mantissa - small.mantissa)
    payload[payload == 0] = 1 << (small.mantissa - 1)
    return (_moved_sign(words, wide, small) | small.infinity | payload).astype(small.word)


def _widen_special(words: _Array, small: _Format, wide: _Format) -> _Array:
    """Infinities and NaNs of ``small`` as those of ``wide``: sign and payload kept, zeros behind."""
    values = words.astype(wide.word)
    payload = (values & ((1 << small.mantissa) - 1)) << (wide.mantissa - small.mantissa)
    sign = (values & small.sign) << (8 * (wide.nbytes - small.nbytes))
    result: _Array = sign | wide.infinity | payload
    return result


def _moved_sign(words: _Array, wide: _Format, small: _Format) -> _Array:
    moved: _Array = (words & wide.sign) >> (8 * (wide.nbytes - small.nbytes))
    return moved


def _down(words: _Array, wide: _Format, small: _Format, out: _Array) -> None:
    """To a format of fewer exponent bits, or from F64. Rounding adds just under half a unit, plus the last kept bit for
    ties to even; a carry runs on into the exponent, which is what it should do."""
    word = wide.word.type
    shift = wide.mantissa - small.mantissa
    lowest = wide.bias - small.bias + 1  # the exponent field whose values are normal in `small`

    magnitude = words & word(wide.sign - 1)
    result = magnitude >> word(shift)
    result &= word(1)
    result += magnitude
    result += word((1 << (shift - 1)) - 1)
    result >>= word(shift)
    result -= word((lowest - 1) << small.mantissa)  # what is too small wraps around, and is done again below
    largest = int(magnitude.max()) if magnitude.size else 0
    if largest >= (lowest + (1 << small.exponent) - 2) << wide.mantissa:
        result[magnitude >= word((lowest + (1 << small.exponent) - 2) << wide.mantissa)] = small.infinity

    tiny = np.flatnonzero(magnitude < word(lowest << wide.mantissa))
    if tiny.size:
        fraction = magnitude[tiny]
        level = fraction >> word(wide.mantissa)
        fraction &= word((1 << wide.mantissa) - 1)
        # A subnormal of `wide` is far below half of any value of `small`, so the implicit bit may be set for it too.
        fraction |= word(1 << wide.mantissa)
        drop = np.minimum(word(shift + lowest) - level, word(wide.mantissa + 2))
        odd = (fraction >> drop) & word(1)
        half = (word(1) << (drop - word(1))) - word(1)
        result[tiny] = (fraction + half + odd) >> drop

    sign = words & word(wide.sign)
    sign >>= word(8 * (wide.nbytes - small.nbytes))
    result |= sign
    out[:] = result
    if largest > wide.infinity:
        nan = magnitude > word(wide.infinity)
        out[nan] = _narrow_nan(words[nan], wide, small)


def _up(words: _Array, small: _Format, wide: _Format, out: _Array) -> None:
    """To F64, or from F16 to F32: a format that holds every value of ``small``, its subnormals as normal numbers."""
    word = wide.word.type
    magnitude = words & small.word.type(small.sign - 1)
    out[:] = magnitude
    out <<= word(wide.mantissa - small.mantissa)
    out += word((wide.bias - small.bias) << wide.mantissa)
    tiny = np.flatnonzero(magnitude < (1 << small.mantissa))
    if tiny.size:  # whole numbers of a unit; neither they nor the products are subnormal, so no mode touches them
        value = np.dtype(f"<f{wide.nbytes}").type
        out[tiny] = (magnitude[tiny].astype(value) * value(2.0 ** (1 - small.bias - small.mantissa))).view(wide.word)
    sign = words.astype(wide.word)
    sign &= word(small.sign)
    sign <<= word(8 * (wide.nbytes - small.nbytes))
    out |= sign
    if magnitude.size and int(magnitude.max()) >= small.infinity:
        special = magnitude >= small.infinity
        out[special] = _widen_special(words[special], small, wide)
