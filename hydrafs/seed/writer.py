"""The seed tool's diffs, written a tensor at a time: the bytes that torch's pickling gives, without torch.

A ``.pbz2`` file is what ``cPickle.dump`` of a dict of tensors gives: each storage is pickled as the bytes of a torch
file of its own (``TypedStorage.__reduce__``). The uncompressed form is a torch file in the format before 1.6, which
every ``torch.load`` reads: unlike the later zip it can be written from front to back.
Sources: torch/_utils.py ``_rebuild_tensor_v2``; torch/serialization.py ``_legacy_save``; Lib/pickletools.py.
"""

from __future__ import annotations

import bz2
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from hydrafs.containers.torch_legacy import MAGIC, PROTOCOL
from hydrafs.errors import UsageError
from hydrafs.seed.plan import Difference
from hydrafs.seed.states import contiguous

_STREAM_NBYTES = 9 * 900_000  # so many bytes are a bz2 stream of their own: whole blocks of its highest level
Progress = Callable[[int], None]


def write_compressed(
    file: BinaryIO, items: Iterable[Difference], *, jobs: int, progress: Progress | None = None
) -> None:
    """Write ``NAME.pbz2``: streams that follow each other, which ``bz2.BZ2File`` and bzip2 read as one.

    Args:
        jobs: threads that compress.
        progress: is told how many more bytes of tensors were taken.
    """
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[bytes]] = deque()
        for block in _blocks(_pickled(items, progress)):
            waiting.append(pool.submit(bz2.compress, block))
            if len(waiting) > 2 * jobs:
                file.write(waiting.popleft().result())
        while waiting:
            file.write(waiting.popleft().result())


def write_plain(file: BinaryIO, items: Sequence[Difference], progress: Progress | None = None) -> None:
    """Write what ``torch.load`` gives ``{"state_dict": diff}`` for."""
    file.write(_HEAD + b"\x80\x02}X\x0a\x00\x00\x00state_dict}(")
    for number, item in enumerate(items):
        name = _storage_name(item)
        pid = b"(" + _text("storage") + f"ctorch\n{name}\n".encode() + _text(str(number)) + _text("cpu")
        before, after = _rebuilt(item.shape)
        file.write(_text(item.key) + before + pid + _integer(_numel(item)) + b"NtQ" + after)
    file.write(b"us.\x80\x02](" + b"".join(_text(str(n)) for n in range(len(items))) + b"e.")
    for item in items:
        words = item.read()
        file.write(struct.pack("<q", _numel(item)))
        file.write(memoryview(words))
        if progress:
            progress(words.nbytes)


def _pickled(items: Iterable[Difference], progress: Progress | None) -> Iterator[bytes | memoryview]:
    """The pickle of a dict of tensors, protocol 4, without its frames and memos."""
    yield b"\x80\x04}("
    for item in items:
        words = item.read()
        key = "0"
        head = _HEAD + b"\x80\x02(" + _text("storage") + f"ctorch\n{_storage_name(item)}\n".encode() + _text(key)
        head += _text("cpu") + _integer(_numel(item)) + b"NtQ."
        head += b"\x80\x02](" + _text(key) + b"e." + struct.pack("<q", _numel(item))
        nbytes = len(head) + words.nbytes
        size = b"B" + struct.pack("<I", nbytes) if nbytes < 1 << 32 else b"\x8e" + struct.pack("<Q", nbytes)
        before, after = _rebuilt(item.shape)
        yield _text(item.key) + before + b"ctorch.storage\n_load_from_bytes\n" + size + head
        yield memoryview(words)
        yield b"\x85R" + after
        if progress:
            progress(words.nbytes)
    yield b"u."


def _rebuilt(shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The opcodes of ``_rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())`` before and behind those of
    its storage."""
    sizes = b"(" + b"".join(map(_integer, shape)) + b"t"
    steps = b"(" + b"".join(map(_integer, contiguous(shape))) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(", b"K\x00" + sizes + steps + b"\x89ccollections\nOrderedDict\n)RtR"


def _storage_name(item: Difference) -> str:
    if not item.dtype.storage_name:
        raise UsageError("the seed's format has no storage of that type", where=item.key, detail=item.dtype.torch_name)
    return item.dtype.storage_name


def _numel(item: Difference) -> int:
    return math.prod(item.shape)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes((value,))
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


_HEAD = (
    b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little") + b".\x80\x02" + _integer(PROTOCOL) + b".\x80\x02}("
    + _text("protocol_version") + _integer(PROTOCOL) + _text("little_endian") + b"\x88" + _text("type_sizes") + b"}("
    + _text("short") + _integer(2) + _text("int") + _integer(4) + _text("long") + _integer(4) + b"uu."
)  # fmt: skip


def _blocks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The pieces one after another, cut into blocks of one bz2 stream each."""
    buffer = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        while len(view) > (room := _STREAM_NBYTES - len(buffer)):
            yield bytes(buffer) + bytes(view[:room])
            buffer.clear()
            view = view[room:]
        buffer += view
    if buffer:
        yield bytes(buffer)
