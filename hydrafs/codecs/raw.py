"""The codec ``raw``: the bytes themselves, for what does not shrink or must be read fastest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hydrafs.codecs import Words
from hydrafs.dtypes import DType
from hydrafs.errors import CorruptChunk


class RawCodec:
    """The payload is the target. Thread safety: free of state."""

    id = 1
    name = "raw"

    def train(self, samples: Iterable[tuple[Words | None, Words]], dtype: DType) -> bytes:
        """Nothing: this codec keeps no parameters."""
        return b""

    def encode(self, prediction: Words | None, target: Words, dtype: DType, params: bytes) -> bytes:
        """A copy of ``target``; the rest is not looked at."""
        return target.tobytes()

    def decode_into(
        self, prediction: Words | None, payload: bytes | memoryview, out: Words, dtype: DType, params: bytes
    ) -> None:
        """Copy ``payload`` into ``out``.

        Raises:
            CorruptChunk: their lengths differ.
        """
        data = np.frombuffer(payload, dtype=np.uint8)
        if data.size != out.size:
            raise CorruptChunk(
                "a stored chunk has another length", detail=f"{data.size} bytes, expected {out.size} bytes"
            )
        out[:] = data
