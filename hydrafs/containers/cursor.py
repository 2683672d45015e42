"""A forward reader over chunks of bytes, for pickles that lie somewhere in a large file.

Rule 1: at most ``limit`` bytes are taken in; memory holds one chunk and one item, whatever lengths the bytes declare.
Rule 2: running out of bytes is a ``BadModel``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource

CHUNK_NBYTES = 1 << 16


class Cursor:
    """Reads forward through ``chunks``. Thread safety: one reader.

    Args:
        chunks: the bytes, in pieces of any length.
        limit: how many bytes may be taken in all; one more is a ``BadModel``.
    """

    def __init__(self, chunks: Iterator[bytes], limit: int) -> None:
        self._chunks = chunks
        self._limit = limit
        self._data = b""
        self._at = 0
        self._before = 0  # bytes of the chunks that came before ``_data``

    @property
    def position(self) -> int:
        """How many bytes were read or skipped."""
        return self._before + self._at

    def read(self, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes. Callers ask for small items only; longer ones are for ``skip``."""
        end = self._at + nbytes
        while end > len(self._data):
            self._fill()
            end = self._at + nbytes
        data = self._data[self._at : end]
        self._at = end
        return data

    def line(self, limit: int) -> bytes:
        """The bytes up to the next newline, without it; at most ``limit`` of them."""
        searched = 0
        while (end := self._data.find(b"\n", self._at + searched, self._at + limit + 1)) < 0:
            searched = len(self._data) - self._at
            if searched > limit:
                raise BadModel("a line of a pickle is too long", detail=f"over {limit} bytes")
            self._fill()
        line = self._data[self._at : end]
        self._at = end + 1
        return line

    def skip(self, nbytes: int) -> None:
        """Pass over ``nbytes`` bytes without keeping them."""
        if self.position + nbytes > self._limit:
            raise BadModel("a pickle ends early", detail=f"{nbytes} bytes declared at {self.position}")
        while nbytes > (have := len(self._data) - self._at):
            nbytes -= have
            self._at = len(self._data)
            self._fill()
        self._at += nbytes

    def _fill(self) -> None:
        """Drop what was read and append the next chunk."""
        chunk = next(self._chunks, b"")
        self._before += self._at
        self._data = self._data[self._at :] + chunk
        self._at = 0
        if not chunk or self._before + len(self._data) > self._limit:
            raise BadModel("a pickle ends early", detail=f"after {self._before + len(self._data)} bytes")


def stored(source: ByteSource, offset: int, nbytes: int) -> Iterator[bytes]:
    """The bytes ``[offset, offset + nbytes)`` of ``source``, a chunk at a time."""
    end = min(offset + nbytes, source.size)
    while offset < end:
        chunk = source.pread(offset, min(CHUNK_NBYTES, end - offset))
        yield chunk
        offset += len(chunk)
        if not chunk:
            return


def inflated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """What a raw deflate stream holds, a chunk at a time, so that a bomb is inflated no further than it is read."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    for chunk in chunks:
        pending = chunk
        while pending and not inflate.eof:
            data = inflate.decompress(pending, CHUNK_NBYTES)
            pending = inflate.unconsumed_tail
            if data:
                yield data
    while not inflate.eof and (data := inflate.decompress(b"", CHUNK_NBYTES)):
        yield data
