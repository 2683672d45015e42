"""Residual codecs: what must be added to a prediction to be exact.

The ids are written into diffs, so the table is append-only: an id never changes its meaning and is never used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hydrafs.dtypes import DType

Words = npt.NDArray[np.uint8]
"""A one-dimensional, contiguous array of bytes: the raw elements, little-endian."""


class Codec(Protocol):
    """One way to store a chunk. Implementations hold no state: any number of threads may call them at once.

    ``prediction`` and ``target`` are raw element bytes (``numpy.uint8``, contiguous, equally long); ``prediction`` is
    ``None`` where nothing is known. ``params`` is what the codec keeps once per section in the manifest.
    """

    id: int
    name: str

    def train(self, samples: Iterable[tuple[Words | None, Words]], dtype: DType) -> bytes:
        """The ``params`` for a section, from pairs of prediction and target: some of its chunks, or all.

        Empty where the codec keeps nothing.
        """
        ...

    def encode(self, prediction: Words | None, target: Words, dtype: DType, params: bytes) -> bytes:
        """The payload from which ``decode_into`` gives ``target`` back, given the same prediction."""
        ...

    def decode_into(
        self, prediction: Words | None, payload: bytes | memoryview, out: Words, dtype: DType, params: bytes
    ) -> None:
        """Fill ``out`` from ``payload``.

        Raises:
            CorruptChunk: the payload cannot have come from ``encode`` with an output of this length.
        """
        ...
