"""The codec ``rans`` as a specification that runs: its decoder in numpy, one vector operation per step of the format.

It is what the native kernels are tested against, and what reads diffs where the extension is missing, at 3 MB/s.
``docs/RANS.md`` tells the same in words. All numbers are little-endian; nibbles are read low one first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from hydrafs.codecs import Words
from hydrafs.codecs.zstd import MAX_WINDOW_NBYTES, Pool
from hydrafs.errors import CorruptChunk, CorruptDiff

STORED, RESIDUAL, PLAIN, CONSTANT = range(4)
MODE_MASK, WIDE, SQUEEZED, EMBEDDED = 0x0F, 0x10, 0x20, 0x80
BLOCK, KEYS, CLASS_BITS, DICTIONARY, ESCAPE, LOW = 128, 16, 8, 240, 255, 1 << 16
_EIGHTHS = (256, 279, 304, 332, 362, 395, 431, 470)

_decompressors = Pool(lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES))

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Model:
    """What params say of chunks with a prediction, or without one.

    ``classes`` has a (shift, mask, base) for each class but class 0, ``maps`` its tables by key. ``tables`` and
    ``moves`` (between classes) are frequencies of symbols. ``value`` and ``width``: a symbol's value without its raw
    bits, and how many of these follow it.
    """

    form: tuple[int, bool, int]
    flip: int
    bits: int
    classes: tuple[tuple[int, int, int], ...]
    maps: Numbers
    tables: Numbers
    moves: Numbers
    value: Numbers
    width: Numbers


class _Nibbles:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self) -> int:
        value = self.data[self.at // 2] >> (self.at % 2 * 4) & 15
        self.at += 1
        return value

    def step(self, before: int, highest: int) -> int | None:
        """A number as its difference to the one before (zigzag) or, behind a 15, in full; ``None``: another code."""
        code = self.take()
        if code == 15:
            return 16 * self.take() + self.take()
        return None if code > highest else before - (code // 2 + 1) if code & 1 else before + code // 2

    def levels(self, count: int) -> list[int]:
        levels = [0] * count
        at, before = 0, 40
        while at < count:
            level = self.step(before, 13)
            if level is None:
                run = self.take()
                if run == 15:
                    break
                at += run + 1
                if at > count:
                    raise ValueError("a run of absent symbols is too long")
                continue
            if not 1 <= level <= 127:
                raise ValueError(f"a level of {level}")
            levels[at] = before = level
            at += 1
        return levels


def _frequencies(levels: list[int], total: int, least: int) -> list[int]:
    """Whole numbers that sum to ``total``, in proportion to 2 ** (level / 8); ``least`` for an absent symbol."""
    weights = [_EIGHTHS[level & 7] << (level >> 3) if level else 0 for level in levels]
    sum_ = sum(weights)
    result = [max((w * total + sum_ // 2) // sum_, 1) if w else least for w in weights]
    while left := total - sum(result):
        largest = result.index(max(result))
        result[largest] += max(left, -(result[largest] // 2))
    return result


def parse(params: bytes) -> dict[int, Model]:
    """The models of ``params``, by mode.

    Raises:
        CorruptDiff: they are damaged.
    """
    models: dict[int, Model] = {}
    try:
        while params:
            mode, model, params = _parse_model(params)
            if mode in models:
                raise ValueError("two models of a kind")
            models[mode] = model
    except (ValueError, IndexError) as error:
        raise CorruptDiff("the tables of a section are damaged", detail=str(error)) from None
    return models


def _parse_model(params: bytes) -> tuple[int, Model, bytes]:
    mode, kind, mantissa, class_count, bits, table_count, known, flip = params[:8]
    top_key, sources = (int.from_bytes(params[at : at + 2], "little") for at in (8, 10))
    nbytes, is_float = kind & 0x7F, kind >= 0x80
    good = mode in (RESIDUAL, PLAIN) and nbytes in (1, 2, 4) and 1 <= class_count <= 15 and 8 <= bits <= 12
    good = good and 1 <= table_count <= 64 and known <= 15 and len(params) >= 12 + 4 * known
    if not good or not (1 <= mantissa <= 8 * nbytes - 2 if is_float else mantissa == 0):
        raise ValueError("the head of a model")
    seen = min(mantissa, 4)
    by_exponent = (mantissa, (1 << (8 * nbytes - 1 - mantissa)) - 1, top_key)
    by_mantissa = (mantissa - seen, (1 << seen) - 1, 15)
    keyed = is_float and mode == RESIDUAL
    classes = tuple(
        (by_mantissa if sources >> c & 1 else by_exponent) if keyed else (0, 0, 0) for c in range(class_count)
    )
    symbols = np.arange(256)
    width = np.where(symbols < 16, 0, (symbols >> 3) - 1)
    value = np.where(symbols < 16, symbols, (8 | symbols & 7) << width)
    value[DICTIONARY:], width[DICTIONARY:] = 0, 0
    value[DICTIONARY : DICTIONARY + known] = np.frombuffer(params, "<u4", known, 12)
    width[ESCAPE] = 8 * nbytes
    if mode == PLAIN:
        width, value = np.where(symbols == ESCAPE, 8, 0), np.where(symbols == ESCAPE, 0, symbols)

    nibbles = _Nibbles(params[12 + 4 * known :])
    keys = KEYS if mode == RESIDUAL else 1
    maps = np.zeros((class_count, keys), np.uint64)
    before = 0
    for place in np.ndindex(maps.shape):
        before = nibbles.step(before, 14) or 0
        if not 0 <= before < table_count:
            raise ValueError(f"table {before} of {table_count}")
        maps[place] = before
    count = class_count + 1
    moves = [_frequencies(nibbles.levels(count), 1 << CLASS_BITS, 1) for _ in range(count)]
    tables = []
    for _ in range(table_count):
        levels = nibbles.levels(ESCAPE)
        if not 0 < np.count_nonzero(levels) < 1 << bits:
            raise ValueError("a table with no symbol or too many")
        tables.append([*_frequencies(levels, (1 << bits) - 1, 0), 1])
    rest = params[12 + 4 * known + (nibbles.at + 1) // 2 :]
    form = (nbytes, is_float, mantissa)
    numbers = (np.array(n, np.uint64) for n in (tables, moves, value, width))
    return mode, Model(form, flip, bits, classes, maps, *numbers), rest


def _slots(frequencies: Numbers) -> Numbers:
    """For each table and slot: the symbol, its frequency, and the slot's place in the symbol's range."""
    rows = []
    for row in frequencies:
        symbol = np.repeat(np.arange(row.size, dtype=np.uint64), row.astype(np.int64))
        start = np.cumsum(row) - row
        rows.append(np.stack([symbol, row[symbol], np.arange(symbol.size, dtype=np.uint64) - start[symbol]]))
    return np.stack(rows)


class _Stream:
    """States and the 16-bit words that fill them up."""

    def __init__(self, data: memoryview, lanes: int) -> None:
        if data.nbytes < 4 * lanes or data.nbytes % 2:
            raise _damaged(f"{data.nbytes} bytes for {lanes} states")
        self.state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
        self.words = np.frombuffer(data, "<u2", offset=4 * lanes)
        self.at = 0
        if (self.state < LOW).any():
            raise _damaged("a state starts below its bound")

    def symbols(self, slots: Numbers, table: Numbers, bits: int) -> Numbers:
        low = self.state & np.uint64((1 << bits) - 1)
        symbol: Numbers = slots[table, 0, low]
        frequency, place = slots[table, 1, low], slots[table, 2, low]
        self._fill((self.state >> np.uint64(bits)) * frequency + place)
        return symbol

    def raw(self, width: Numbers) -> Numbers:
        """The lowest ``width`` bits, at most 16, of each state."""
        value = self.state & ((np.uint64(1) << width) - np.uint64(1))
        self._fill(self.state >> width)
        return value

    def _fill(self, state: Numbers) -> None:
        low = np.flatnonzero(state < LOW)
        words = self.words[self.at : self.at + low.size]
        self.at += low.size
        if words.size < low.size:
            raise _damaged("its stream is too short")
        state[low] = state[low] << np.uint64(16) | words
        self.state = state

    def finish(self) -> None:
        if self.at != self.words.size or (self.state != LOW).any():
            raise _damaged("its stream does not end where it should")


def decode_into(
    prediction: Words | None,
    payload: bytes | memoryview,
    out: Words,
    word_nbytes: int,
    is_float: bool,
    mantissa: int,
    params: bytes,
) -> None:
    """What ``RansCodec.decode_into`` does.

    Raises:
        CorruptChunk: the payload cannot have come from ``encode`` with an output of this length.
        CorruptDiff: ``params`` are damaged.
    """
    models = parse(params)
    view = memoryview(unsqueeze(payload, out.size))
    if not view.nbytes:
        raise _damaged("it is empty")
    head, view = view[0], view[1:]
    mode, count = head & MODE_MASK, out.size // word_nbytes
    if head == STORED and view.nbytes == out.size:
        out[:] = np.frombuffer(view, np.uint8)
        return
    if head == CONSTANT and view.nbytes == word_nbytes <= 4 and out.size % word_nbytes == 0:
        out[:] = np.tile(np.frombuffer(view, np.uint8), count)
        return
    if head & ~(MODE_MASK | WIDE | EMBEDDED) or mode not in (RESIDUAL, PLAIN) or not count:
        raise _damaged(f"it begins with {head:#x}")
    if mode == RESIDUAL and prediction is None:
        raise _damaged("it needs a prediction")
    if head & EMBEDDED:
        own, view = _section(view)
        try:
            models = parse(own.tobytes())
        except CorruptDiff as error:
            raise _damaged(error.detail) from None
    if mode not in models or models[mode].form != (word_nbytes, is_float, mantissa):
        raise _damaged("its section has no tables for it")
    section, view = _section(view)
    tail = out.size - count * word_nbytes
    if view.nbytes < tail:
        raise _damaged("it is too short")
    out[count * word_nbytes :] = np.frombuffer(view[view.nbytes - tail :], np.uint8)
    view = view[: view.nbytes - tail]
    words = np.zeros(-(-count // BLOCK) * BLOCK, np.uint64)
    if mode == RESIDUAL and prediction is not None:
        words[:count] = prediction[: count * word_nbytes].view(f"<u{word_nbytes}")
    _decode_words(models[mode], section, view, words, count, 64 if head & WIDE else 32, mode == PLAIN)
    out[: count * word_nbytes] = words[:count].astype(f"<u{word_nbytes}").view(np.uint8)


def unsqueeze(payload: bytes | memoryview, most: int) -> bytes | memoryview:
    """The payload with its raw bytes as they are, where they stand as a Zstandard frame (of ``most`` bytes at most).

    Raises:
        CorruptChunk: they do not decode.
    """
    view = memoryview(payload)
    if not view.nbytes or not view[0] & SQUEEZED:
        return payload
    if view[0] & MODE_MASK != PLAIN:
        raise _damaged(f"it begins with {view[0]:#x}")
    rest = view[1:]
    for _ in range(2 if view[0] & EMBEDDED else 1):
        _, rest = _section(rest)
    frame, behind = _section(rest)
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared > most:
            raise _damaged(f"{declared} raw bytes, expected {most} at most")
        with _decompressors.lend() as decompressor:
            raw = decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None
    before = view[1 : view.nbytes - rest.nbytes]
    return b"".join([bytes([view[0] & ~SQUEEZED]), before, len(raw).to_bytes(4, "little"), raw, behind])


def squeeze(payload: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    """A plain payload, not embedded, with its raw bytes as a Zstandard frame, if that is worth it."""
    if payload[0] & (MODE_MASK | EMBEDDED) != PLAIN:
        return payload
    _, rest = _section(memoryview(payload)[1:])
    raw, behind = _section(rest)
    frame = compress(raw.tobytes())
    if len(frame) > raw.nbytes - (raw.nbytes >> 7):
        return payload
    before = payload[1 : len(payload) - rest.nbytes]
    return b"".join([bytes([payload[0] | SQUEEZED]), before, len(frame).to_bytes(4, "little"), frame, behind])


def _section(view: memoryview) -> tuple[memoryview, memoryview]:
    nbytes = int.from_bytes(view[:4], "little")
    if view.nbytes < 4 or view.nbytes - 4 < nbytes:
        raise _damaged("it is too short")
    return view[4 : 4 + nbytes], view[4 + nbytes :]


def _decode_words(
    model: Model, section: memoryview, view: memoryview, words: Numbers, count: int, lanes: int, plain: bool
) -> None:
    """Turn predicting ``words``, in whole blocks, into the words themselves."""
    stream, moves = _Stream(section, 1), _slots(model.moves)
    classes, before = [], 0
    for _ in range(0, words.size, BLOCK):
        before = int(stream.symbols(moves, np.array([before], np.uint64), CLASS_BITS)[0])
        classes.append(before)
    stream.finish()

    nbytes = model.form[0]
    raw = np.zeros(words.size, np.uint64)
    if plain:
        planes, view = _section(view)
        coded = np.repeat(np.array(classes) != 0, BLOCK)
        coded[count:] = False
        each = int(np.count_nonzero(coded))
        if planes.nbytes != each * (nbytes - 1):
            raise _damaged(f"{planes.nbytes} raw bytes for {each} words")
        for number in range(nbytes - 1):
            plane = np.frombuffer(planes, np.uint8, each, number * each)
            raw[coded] |= plane.astype(np.uint64) << np.uint64(8 * number)

    stream, slots = _Stream(view, lanes), _slots(model.tables)
    for block, number in enumerate(classes):
        if not number:
            continue
        shift, mask, base = model.classes[number - 1]
        for first in range(block * BLOCK, (block + 1) * BLOCK, lanes):
            known = words[first : first + lanes]
            key = np.clip(base - (known.astype(np.int64) >> shift & mask), 0, KEYS - 1)
            table = model.maps[number - 1][key * (not plain)]
            symbol = stream.symbols(slots, table, model.bits)
            value, width = model.value[symbol], model.width[symbol]
            value = value | stream.raw(np.minimum(width, 16))
            value = value | stream.raw(width - np.minimum(width, 16)) << np.uint64(16)
            if plain:
                top = (value ^ np.uint64(model.flip)) << np.uint64(8 * nbytes - 8)
                words[first : first + lanes] = _join(top | raw[first : first + lanes], model.form)
            else:
                words[first : first + lanes] = _add(known, value, model.form)
    stream.finish()


def _join(rotated: Numbers, form: tuple[int, bool, int]) -> Numbers:
    """Words whose sign was moved behind the lowest bit, as they were."""
    nbytes, is_float, _ = form
    if not is_float:
        return rotated
    return rotated >> np.uint64(1) | (rotated & np.uint64(1)) << np.uint64(8 * nbytes - 1)


def _add(known: Numbers, value: Numbers, form: tuple[int, bool, int]) -> Numbers:
    """The words at a zigzag distance ``value`` from ``known``, in the order of their numbers, away from zero."""
    nbytes, is_float, _ = form
    every = (1 << 8 * nbytes) - 1
    step = (value.astype(np.int64) >> 1) ^ -(value.astype(np.int64) & 1)
    if not is_float:
        return (known.astype(np.int64) + step & every).astype(np.uint64)
    negative = known.astype(np.int64) >> (8 * nbytes - 1)
    ordered = known.astype(np.int64) ^ negative * (every >> 1)
    sum_ = ordered + np.where(negative, -step, step) & every
    return (sum_ ^ (sum_ >> (8 * nbytes - 1)) * (every >> 1)).astype(np.uint64)


def _damaged(detail: str) -> CorruptChunk:
    return CorruptChunk("an entropy-coded chunk is damaged", detail=detail)
