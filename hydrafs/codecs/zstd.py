"""The codec ``zstd``: one Zstandard frame, for literals and for whatever no parent predicts.

The contexts of ``zstandard`` are not safe for two threads at once, and a thread that the kernel's requests come on may
have no thread-local state that lasts. So contexts wait in a queue, and whoever needs one takes it out.

Source of the format: RFC 8878.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import zstandard

from hydrafs.codecs import Words
from hydrafs.dtypes import DType
from hydrafs.errors import CorruptChunk

LEVEL = 3
MAX_WINDOW_NBYTES = 1 << 23
"""The largest window that a frame may ask memory for: RFC 8878, 3.1.1.1.2, recommends that decoders support 8 MB."""
_KEPT = 16

T = TypeVar("T")


class Pool(Generic[T]):
    """Things that are dear to make and serve one thread at a time.

    Thread safety: any number of threads; ``deque`` appends and pops are atomic.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._idle: deque[T] = deque(maxlen=_KEPT)

    @contextmanager
    def lend(self) -> Iterator[T]:
        """One of them, for the length of a ``with`` block; one that an error was raised over is not used again."""
        try:
            thing = self._idle.pop()
        except IndexError:
            thing = self._make()
        yield thing
        self._idle.append(thing)


_compressors = Pool(
    lambda: zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False, write_dict_id=False)
)
_decompressors = Pool(lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES))


class ZstdCodec:
    """The payload is one frame that declares its content's size; nothing at all for an empty target.

    Thread safety: any number of threads at once.
    """

    id = 2
    name = "zstd"

    def train(self, samples: Iterable[tuple[Words | None, Words]], dtype: DType) -> bytes:
        """Nothing: this codec keeps no parameters."""
        return b""

    def encode(self, prediction: Words | None, target: Words, dtype: DType, params: bytes) -> bytes:
        """``target`` compressed at level 3; the prediction is not looked at."""
        if target.size == 0:
            return b""
        with _compressors.lend() as compressor:
            return compressor.compress(target.data)

    def decode_into(
        self, prediction: Words | None, payload: bytes | memoryview, out: Words, dtype: DType, params: bytes
    ) -> None:
        """Fill ``out`` from the frame. Memory: at most one window beyond ``out``.

        Raises:
            CorruptChunk: the payload is no such frame, or not one of ``out.size`` bytes.
        """
        if out.size == 0:
            if len(payload):
                raise CorruptChunk("an empty chunk has a payload", detail=f"{len(payload)} bytes")
            return
        try:
            declared = zstandard.get_frame_parameters(payload).content_size
            if declared != out.size:
                raise CorruptChunk(
                    "a compressed chunk declares another length", detail=f"{declared} bytes, expected {out.size} bytes"
                )
            with _decompressors.lend() as decompressor, decompressor.stream_reader(payload, closefd=False) as reader:
                count = reader.readinto(out.data)
        except zstandard.ZstdError as error:
            raise CorruptChunk("a compressed chunk is damaged", detail=str(error)) from None
        if count != out.size:
            raise CorruptChunk("a compressed chunk ends early", detail=f"{count} bytes, expected {out.size} bytes")
