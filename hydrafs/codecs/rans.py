"""The codec ``rans``: entropy coding of the difference to the prediction, given the prediction's exponent.

Goal: the smallest payloads for an optimiser's steps, decoded at memory-like speed. ``docs/RANS.md`` describes stream
and params; ``rans_reference`` decodes them in plain Python; ``hydrafs/native`` does the work where it could be built.
Rules: ``params`` serve all chunks of a section. A chunk that they do not serve brings its own. Whatever happens, the
first byte of a payload says how to read the rest, and a payload is at most a byte longer than its chunk.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import zstandard

from hydrafs.codecs import Words, rans_reference
from hydrafs.codecs.zstd import Pool
from hydrafs.dtypes import DType
from hydrafs.errors import CorruptChunk, CorruptDiff, UsageError

try:
    _native: Any = importlib.import_module("hydrafs._rans")
except ImportError:  # no compiler when this was installed, or another machine's build
    _native = None

REFERENCE = "reference"
MANTISSA_BITS = {
    "F64": 52,
    "F32": 23,
    "F16": 10,
    "BF16": 7,
    "F8_E4M3": 3,
    "F8_E5M2": 2,
    "F8_E4M3FNUZ": 3,
    "F8_E5M2FNUZ": 2,
    "C64": 23,
    "C128": 52,
    "C32": 10,
}
_MODELS_KEPT = 32
"""Decoding tables that wait for their section's next chunk: 16 KiB for each of its 10 to 40 tables."""

_forced = ""


def levels() -> tuple[str, ...]:
    """The decoders that work here, the fastest first; ``reference`` always does."""
    return (*(_native.levels() if _native else ()), REFERENCE)


def level() -> str:
    """What decodes here: ``avx512``, ``avx2``, ``portable``, ``reference`` if forced, or what is missing."""
    if not _native:
        return "none: extension not built"
    return _forced or str(levels()[0])


def force(name: str) -> None:
    """Let ``name`` decode from now on, in all threads; an empty one lets the fastest.

    Raises:
        UsageError: this machine or this build has none of that name.
    """
    global _forced  # noqa: PLW0603
    if name and name not in levels():
        raise UsageError("no such SIMD level here", where=name, remedy=f"choose one of {', '.join(levels())}")
    _forced = name


# Read here, once, so that any test or script can be run with each kernel without a change to it.
if _wanted := os.environ.get("HYDRAFS_SIMD"):
    try:
        force(_wanted)
    except UsageError as error:  # not a reason for the command line to fail before it has begun
        logging.getLogger(__name__).warning("HYDRAFS_SIMD: %s", error)


@lru_cache(_MODELS_KEPT)
def _model(params: bytes) -> Any:
    return _native.model(params)


# Raw mantissa bytes are noise, unless rows of a tensor were once a shorter type: then whole planes of them are zero.
_compressors = Pool(lambda: zstandard.ZstdCompressor(level=1, write_content_size=True, write_checksum=False))


def _squeeze(payload: bytes) -> bytes:
    with _compressors.lend() as compressor:
        return rans_reference.squeeze(payload, compressor.compress)


def _kernel() -> str:
    return _FASTEST if _forced in ("", REFERENCE) else _forced


def _format(dtype: DType) -> tuple[int, bool, int]:
    """Bytes of a word, whether it is sign and magnitude, and its mantissa's bits (0 for whole numbers)."""
    is_float = dtype.kind == "float"
    return dtype.word_nbytes, is_float, MANTISSA_BITS[dtype.name] if is_float else 0


class RansCodec:
    """See the top of this module.

    Thread safety: any number of threads at once; the native part holds no lock of the interpreter's.
    """

    id = 4
    name = "rans"

    def train(self, samples: Iterable[tuple[Words | None, Words]], dtype: DType) -> bytes:
        """The params for a section, from pairs of prediction and target: some of its chunks, or all.

        Pairs without a prediction train what codes such chunks. At most half a million words of either kind are kept.
        Empty where nothing can be learned: no samples, words of 8 bytes, no extension.
        """
        return bytes(_native.train(samples, _kernel(), *_format(dtype))) if _native else b""

    def encode(self, prediction: Words | None, target: Words, dtype: DType, params: bytes) -> bytes:
        """The payload: with ``params``, or with its own where these are empty or of another kind."""
        if _native is None or dtype.word_nbytes > 4 or not target.size:
            return b"\0" + target.tobytes()
        form = _format(dtype)
        try:
            return _squeeze(_native.encode(_model(params), _kernel(), prediction, target, *form))
        except ValueError:
            pass  # params without such a model, or damaged ones
        own = bytes(_native.train([(prediction, target)], _kernel(), *form))
        payload = _squeeze(_native.encode(_model.__wrapped__(own), _kernel(), prediction, target, *form))
        if payload[0] & rans_reference.MODE_MASK in (rans_reference.STORED, rans_reference.CONSTANT):
            return payload
        head = bytes([payload[0] | rans_reference.EMBEDDED]) + len(own).to_bytes(4, "little") + own
        payload = head + payload[1:]
        return payload if len(payload) <= target.size else b"\0" + target.tobytes()

    def decode_into(
        self, prediction: Words | None, payload: bytes | memoryview, out: Words, dtype: DType, params: bytes
    ) -> None:
        """Fill ``out``, which must not overlap ``prediction``. Memory: a byte per 128 words, and what the tables take.

        Raises:
            CorruptChunk: the payload cannot have come from ``encode`` with an output of this length.
            CorruptDiff: no params of any section look like ``params``.
        """
        form = _format(dtype)
        if _native is None or _forced == REFERENCE:
            rans_reference.decode_into(prediction, payload, out, *form, params)
            return
        try:
            model = _model(params)
        except ValueError:
            raise CorruptDiff("the tables of a section are damaged", detail=f"{len(params)} bytes") from None
        payload = rans_reference.unsqueeze(payload, out.size)
        try:
            _native.decode_into(model, _kernel(), prediction, payload, out, *form)
        except ValueError:
            raise CorruptChunk(
                "an entropy-coded chunk is damaged", detail=f"{len(payload)} bytes for {out.size} bytes"
            ) from None


_FASTEST = levels()[0]
