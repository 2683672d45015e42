"""A sample of each tensor's values, small enough to keep for every model of a store.

The fingerprint of a tensor is its 32 middle elements, each as the upper 16 bits of its float32 value: one small read,
64 bytes, comparable between fp32, fp16 and bf16. Other element types keep the raw bytes of the same place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hydrafs import predictors
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES, DType
from hydrafs.layout import ByteSource, Layout

ELEMENTS = 32
NBYTES = 2 * ELEMENTS
UNRELATED = 16.0
"""The distance between tensors that cannot be compared."""

REAL = frozenset({"F64", "F32", "F16", "BF16"})


def fingerprint(source: ByteSource, dtype_name: str, offset: int, nbytes: int) -> bytes:
    """The fingerprint of the tensor at ``[offset, offset + nbytes)``; shorter where it has fewer elements."""
    dtype = DTYPES[dtype_name]
    if dtype_name not in REAL:
        count = min(NBYTES, nbytes)
        return source.pread(offset + (nbytes - count) // 2, count)
    total = nbytes // dtype.nbytes
    count = min(ELEMENTS, total)
    raw = np.frombuffer(source.pread(offset + (total - count) // 2 * dtype.nbytes, count * dtype.nbytes), np.uint8)
    single = predictors.cast(raw, dtype, DTYPES["F32"])
    return (single.view("<u4") >> np.uint32(16)).astype("<u2").tobytes()


def facts_of(source: ByteSource, layout: Layout) -> ModelFacts:
    """What is to be known of a parsed model: its tensors with their fingerprints. One small read per tensor."""
    return ModelFacts(
        layout.container,
        tuple(
            TensorFacts(
                s.name,
                s.dtype,
                s.shape,
                s.offset,
                s.nbytes,
                s.aliases,
                fingerprint(source, s.dtype, s.offset, s.nbytes),
            )
            for s in layout.tensors
        ),
    )


def _ordered(prints: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    words = prints.astype(np.int32)
    return np.where(words & 0x8000, -(words & 0x7FFF), words)


def distances(one: TensorFacts, others: list[TensorFacts]) -> npt.NDArray[np.float64]:
    """How far ``one`` is from each of ``others``: the mean of log2(1 + difference in units of bfloat16's last place).

    0 is the same to three digits, a fine-tune is below 4, unrelated weights are about 11. Not comparable: 16.
    """
    result = np.full(len(others), UNRELATED)
    if one.dtype not in REAL:
        for i, other in enumerate(others):
            if other.dtype == one.dtype and other.fingerprint == one.fingerprint:
                result[i] = 0.0
        return result
    usable = [
        i
        for i, o in enumerate(others)
        if o.dtype in REAL and o.fingerprint and len(o.fingerprint) == len(one.fingerprint)
    ]
    if usable and one.fingerprint:
        mine = _ordered(np.frombuffer(one.fingerprint, "<u2"))
        theirs = _ordered(np.frombuffer(b"".join(others[i].fingerprint for i in usable), "<u2"))
        gaps = np.abs(theirs.reshape(len(usable), -1) - mine)
        result[usable] = np.log2(1.0 + gaps).mean(axis=1)
    return result


def bits_apart(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8], dtype: DType) -> float:
    """The mean share of an element's bits that its difference to the prediction takes: 0 the same, 1 unrelated.

    Both are raw elements of ``dtype``, equally many.
    """
    words = dtype.word_nbytes
    signed = f"<i{words}" if dtype.kind != "unsigned" else f"<u{words}"
    a, b = (x.view(signed).astype(np.float64) for x in (one, other))
    if dtype.kind == "float":
        # Sign and magnitude to one ordered line: negative words count down from zero.
        low = -float(1 << (8 * words - 1))
        a, b = (np.where(x < 0, low - x, x) for x in (a, b))
    needed = np.where(a == b, 0.0, np.log2(1.0 + np.abs(a - b)) + 1.0)
    return float(np.minimum(needed / (8 * words), 1.0).mean()) if needed.size else 0.0
