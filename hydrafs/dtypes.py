"""The element types that models hold, under the names that safetensors gives them.

Source: safetensors ``Dtype`` (safetensors/src/tensor.rs) and torch ``ScalarType`` (c10/core/ScalarType.h). A type that
is not in this table is held as bytes (``U8``), which is always exact and only larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``kind`` says how the bits of a word are ordered: ``float`` is sign and magnitude, ``signed`` is two's complement,
    ``unsigned`` is plain. ``word_nbytes`` is the size of what is coded as one number: half of ``nbytes`` for complex
    types, ``nbytes`` otherwise.
    """

    name: str
    nbytes: int
    word_nbytes: int
    kind: Literal["float", "signed", "unsigned"]
    torch_name: str
    storage_name: str

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """The little-endian unsigned numpy type of one word."""
        return np.dtype(f"<u{self.word_nbytes}")


def _table() -> dict[str, DType]:
    rows: list[tuple[str, int, int, Literal["float", "signed", "unsigned"], str, str]] = [
        ("F64", 8, 8, "float", "float64", "DoubleStorage"),
        ("F32", 4, 4, "float", "float32", "FloatStorage"),
        ("F16", 2, 2, "float", "float16", "HalfStorage"),
        ("BF16", 2, 2, "float", "bfloat16", "BFloat16Storage"),
        ("F8_E4M3", 1, 1, "float", "float8_e4m3fn", ""),
        ("F8_E5M2", 1, 1, "float", "float8_e5m2", ""),
        ("F8_E4M3FNUZ", 1, 1, "float", "float8_e4m3fnuz", ""),
        ("F8_E5M2FNUZ", 1, 1, "float", "float8_e5m2fnuz", ""),
        ("F8_E8M0", 1, 1, "unsigned", "float8_e8m0fnu", ""),
        ("C64", 8, 4, "float", "complex64", "ComplexFloatStorage"),
        ("C128", 16, 8, "float", "complex128", "ComplexDoubleStorage"),
        ("C32", 4, 2, "float", "complex32", "ComplexHalfStorage"),
        ("I64", 8, 8, "signed", "int64", "LongStorage"),
        ("I32", 4, 4, "signed", "int32", "IntStorage"),
        ("I16", 2, 2, "signed", "int16", "ShortStorage"),
        ("I8", 1, 1, "signed", "int8", "CharStorage"),
        ("U64", 8, 8, "unsigned", "uint64", ""),
        ("U32", 4, 4, "unsigned", "uint32", ""),
        ("U16", 2, 2, "unsigned", "uint16", ""),
        ("U8", 1, 1, "unsigned", "uint8", "ByteStorage"),
        ("BOOL", 1, 1, "unsigned", "bool", "BoolStorage"),
        ("QI8", 1, 1, "signed", "qint8", "QInt8Storage"),
        ("QU8", 1, 1, "unsigned", "quint8", "QUInt8Storage"),
        ("QI32", 4, 4, "signed", "qint32", "QInt32Storage"),
    ]
    return {row[0]: DType(*row) for row in rows}


DTYPES: dict[str, DType] = _table()
BY_TORCH_NAME: dict[str, DType] = {d.torch_name: d for d in DTYPES.values()}
BY_STORAGE_NAME: dict[str, DType] = {d.storage_name: d for d in DTYPES.values() if d.storage_name}
BYTES: DType = DTYPES["U8"]
