"""The codec ``planes``: the difference to the prediction, split into byte planes that are compressed one by one.

Goal: what an optimiser's small steps leave of a tensor, small, and decoded at memory-like speed by numpy and zstandard.
Plan: words are little-endian and unsigned, of ``dtype.word_nbytes`` (n) bytes. With a prediction, the residual is
target minus prediction modulo 2**(8 n), written in balanced digits: signed bytes with
residual = sum(digit[k] * 256**k), so that a small step of either sign leaves all digits but the lowest zero. Plane k
holds digit k of every word. Without a prediction, plane k holds byte k of every word.

The payload, all little-endian: one u32 per plane (lowest plane first), its two top bits the mode, the rest a value v:
    0 constant: every byte of the plane is v;  1 stored: v bytes as they are;  2 zstd: a frame of v bytes (RFC 8878,
    without the magic number, content size declared, no checksum).
Then the planes that are not constant, in the same order, then the bytes of the target behind its last whole word.
Where the target holds no whole word there are no planes, only those bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import zstandard

from hydrafs.codecs import Words
from hydrafs.codecs.zstd import LEVEL, MAX_WINDOW_NBYTES, Pool
from hydrafs.dtypes import DType
from hydrafs.errors import CorruptChunk

_CONSTANT, _STORED, _ZSTD = range(3)
_VALUE_BITS = 30
_VALUE_MASK = (1 << _VALUE_BITS) - 1
_BLOCK = 65536
"""Words that are worked on at once: what a block touches stays in the second-level cache. 16384 costs a third more."""
_KEPT_SCRATCH_NBYTES = 8 << 20
_SAMPLE = 32768
"""Bytes of a plane that the choice of its compressor rests on."""


def _magicless(level: int, **more: int) -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
        **more,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class _Scratch:
    """A decompressor and room for planes. Thread safety: one thread at a time."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor(
            max_window_size=MAX_WINDOW_NBYTES, format=zstandard.FORMAT_ZSTD1_MAGICLESS
        )
        self._room: Words = np.empty(0, dtype=np.uint8)

    def room(self, nbytes: int) -> Words:
        if nbytes > _KEPT_SCRATCH_NBYTES:
            return np.empty(nbytes, dtype=np.uint8)
        if nbytes > self._room.size:
            self._room = np.empty(nbytes, dtype=np.uint8)
        return self._room[:nbytes]


# The planes of a 16-bit fine-tune are noise of uneven distribution: matches found in it cost more than they save, so
# the first compressor has the smallest match table there is and nearly only entropy-codes (26.9 % of an fp16 model
# against 27.6 % at level 3, 14.3 % against 16.1 % in bf16). The second finds what repeats (rows of fp32 embeddings).
_entropy = Pool(lambda: _magicless(1, strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7, target_length=0))
_matches = Pool(lambda: _magicless(LEVEL))
# For planes that are nearly constant a deep search pays, in a small table: 4.2 % of a bf16 model instead of 4.6 %.
_sparse = Pool(
    lambda: _magicless(6, strategy=zstandard.STRATEGY_BTLAZY2, hash_log=10, chain_log=10, search_log=1, min_match=6)
)
_scratch = Pool(_Scratch)


class PlanesCodec:
    """Byte planes of the difference to the prediction; see the top of this module. ``params`` is not used.

    Thread safety: any number of threads at once.
    """

    id = 3
    name = "planes"

    def train(self, samples: Iterable[tuple[Words | None, Words]], dtype: DType) -> bytes:
        """Nothing: this codec keeps no parameters."""
        return b""

    def encode(self, prediction: Words | None, target: Words, dtype: DType, params: bytes) -> bytes:
        """The payload; its planes hold under 2**30 bytes each."""
        width = dtype.word_nbytes
        rows = target.size // width
        tail = target[rows * width :].tobytes()
        if rows == 0:
            return tail
        if rows > _VALUE_MASK:
            raise ValueError(f"a chunk of {target.size} bytes is too large for one payload")
        with _scratch.lend() as scratch:
            planes = scratch.room(rows * width).reshape(width, rows)
            _split(prediction, target, rows, dtype, planes)
            header, bodies = [], []
            for plane in planes:
                mode, value, body = _pack(plane)
                header.append(mode << _VALUE_BITS | value)
                bodies.append(body)
        return b"".join([struct.pack(f"<{width}I", *header), *bodies, tail])

    def decode_into(
        self, prediction: Words | None, payload: bytes | memoryview, out: Words, dtype: DType, params: bytes
    ) -> None:
        """Fill ``out``, which must not overlap ``prediction``. Memory: at most ``out.size`` and a window beyond it.

        Raises:
            CorruptChunk: the payload cannot have come from ``encode`` with an output of this length.
        """
        view = memoryview(payload)
        width = dtype.word_nbytes
        rows = out.size // width
        tail = out[rows * width :]
        position = 4 * width if rows else 0
        if view.nbytes < position:
            raise _damaged(f"{view.nbytes} bytes, expected a header of {position} bytes")
        header = struct.unpack_from(f"<{width}I", view) if rows else ()
        constant = 0
        planes: list[tuple[int, Words]] = []
        with _scratch.lend() as scratch:
            room = scratch.room(rows * width)
            for number, entry in enumerate(header):
                mode, value = entry >> _VALUE_BITS, entry & _VALUE_MASK
                if mode == _CONSTANT:
                    if value > 0xFF:
                        raise _damaged(f"plane {number} is constant {value}")
                    digit = value - 256 if value > 127 and prediction is not None else value
                    constant += digit << (8 * number)
                    continue
                body = view[position : position + value]
                position += value
                if body.nbytes != value or (mode == _STORED and value != rows) or mode > _ZSTD:
                    raise _damaged(f"plane {number} of {rows} words has mode {mode} and {body.nbytes} of {value} bytes")
                if mode == _STORED:
                    planes.append((number, np.frombuffer(body, dtype=np.uint8)))
                else:
                    plane = room[number * rows : (number + 1) * rows]
                    _inflate(scratch.decompressor, body, plane)
                    planes.append((number, plane))
            if view.nbytes - position != tail.size:
                raise _damaged(f"{view.nbytes - position} bytes behind the planes, expected {tail.size} bytes")
            tail[:] = np.frombuffer(view[position:], dtype=np.uint8)
            _join(prediction, planes, constant, out[: rows * width], width)


def _damaged(detail: str) -> CorruptChunk:
    return CorruptChunk("a chunk of byte planes is damaged", detail=detail)


def _split(prediction: Words | None, target: Words, rows: int, dtype: DType, planes: Words) -> None:
    """Fill ``planes`` (word bytes by rows) from the words of ``target``."""
    width = dtype.word_nbytes
    wanted = target[: rows * width].view(dtype.word)
    if prediction is None:
        for number in range(width):
            planes[number] = wanted.view(np.uint8)[number::width]
        return
    known = prediction[: rows * width].view(dtype.word)
    # Adding 0x80 to each byte but the highest carries what is 128 or more into the next one; taking it off again
    # without borrowing (an exclusive or of the top bits) leaves signed digits.
    balance = dtype.word.type(sum(0x80 << (8 * k) for k in range(width - 1)))
    digits = np.empty(min(rows, _BLOCK), dtype=dtype.word)
    for start in range(0, rows, _BLOCK):
        block = digits[: min(_BLOCK, rows - start)]
        np.subtract(wanted[start : start + _BLOCK], known[start : start + _BLOCK], out=block)
        if width > 1:
            np.add(block, balance, out=block)
            np.bitwise_xor(block, balance, out=block)
        for number in range(width):
            planes[number, start : start + _BLOCK] = block.view(np.uint8)[number::width]


def _pack(plane: Words) -> tuple[int, int, bytes]:
    """Mode, value and body of one plane."""
    first = plane[0]
    if plane[-1] == first and (plane == first).all():
        return _CONSTANT, int(first), b""
    # A sample from the middle tells which is smaller as well as trying each does, in half the time.
    middle = max(0, (plane.size - _SAMPLE) // 2)
    sample = plane[middle : middle + _SAMPLE]
    tried = {pool: len(_compress(pool, sample)) for pool in (_entropy, _matches)}
    pool = min(tried, key=tried.__getitem__)
    body = _compress(_sparse if tried[pool] < sample.size // 8 else pool, plane)
    if len(body) >= plane.size - (plane.size >> 7):  # less than a hundredth saved is not worth the time to read it
        return _STORED, plane.size, plane.tobytes()
    return _ZSTD, len(body), body


def _compress(pool: Pool[zstandard.ZstdCompressor], plane: Words) -> bytes:
    with pool.lend() as compressor:
        return compressor.compress(plane.data)


def _inflate(decompressor: zstandard.ZstdDecompressor, body: memoryview, plane: Words) -> None:
    try:
        with decompressor.stream_reader(body, closefd=False) as reader:
            count = reader.readinto(plane.data)
            count += len(reader.read(1))
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None
    if count != plane.size:
        raise _damaged(f"a plane holds {count} bytes or more, expected {plane.size} bytes")


def _join(prediction: Words | None, planes: list[tuple[int, Words]], constant: int, out: Words, width: int) -> None:
    """Fill the words of ``out`` from planes (number and bytes, lowest first) and the sum of the constant ones."""
    kind = "u" if prediction is None else "i"
    word = np.dtype(f"<{kind}{width}")
    digit = np.dtype(f"{kind}1")
    result = out.view(word)
    rows = result.size
    known = None if prediction is None else prediction[: out.size].view(word)
    bits = 8 * width
    constant &= (1 << bits) - 1
    offset = np.array([constant], dtype=f"<u{width}").view(word)[0]
    digits = [(number, plane.view(digit)) for number, plane in reversed(planes)]
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        block = result[start:stop]
        if not digits:
            if known is None:
                block[:] = offset
            else:
                np.add(known[start:stop], offset, out=block)
            continue
        above, plane = digits[0]
        if above == 0 and known is not None:  # the usual case of a small step: one pass
            np.add(known[start:stop], plane[start:stop], out=block)
            if constant:
                np.add(block, offset, out=block)
            continue
        np.copyto(block, plane[start:stop])
        for number, plane in digits[1:]:
            np.left_shift(block, 8 * (above - number), out=block)
            np.add(block, plane[start:stop], out=block)
            above = number
        if above:
            np.left_shift(block, 8 * above, out=block)
        if constant:
            np.add(block, offset, out=block)
        if known is not None:
            np.add(block, known[start:stop], out=block)
