"""The container around tensors that are computed: the bytes of a new model that are no numbers.

Goal: a model file whose tensors exist nowhere yet, as pieces of literal bytes and places for tensors, in file order.
Plan: safetensors by its header; torch's zip by ``zipfile`` itself, into a sink that keeps everything but the tensors.
Sources: safetensors README (format); torch/serialization.py ``_save`` (records and their order), ``torch/_utils.py``
``_rebuild_tensor_v2``; Python's ``pickletools`` (opcodes).
"""

from __future__ import annotations

import io
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import msgspec

from hydrafs.dtypes import DTYPES
from hydrafs.errors import UsageError
from hydrafs.layout import Layout, Span, cover

SAFETENSORS = "safetensors"
TORCH_ZIP = "torch-zip"
_ENDINGS = {".safetensors": SAFETENSORS} | dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), TORCH_ZIP)
_ALIGNMENT = 64
_TORCH_ONLY = frozenset({"C32", "QI8", "QU8", "QI32"})


@dataclass(frozen=True, slots=True)
class Blank:
    """A tensor of a model that is to be written: its name, type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.elements * DTYPES[self.dtype].nbytes


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model file without its tensors: ``pieces`` in file order, each literal bytes or the number of a tensor."""

    container: str
    tensors: tuple[Blank, ...]
    pieces: tuple[bytes | int, ...]
    offsets: tuple[int, ...]
    size: int
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        container: str,
        tensors: Sequence[Blank],
        pieces: Sequence[bytes | int],
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Skeleton:
        """The skeleton of these pieces; those without bytes are left out."""
        kept: list[bytes | int] = []
        offsets = []
        position = 0
        for piece in pieces:
            nbytes = tensors[piece].nbytes if isinstance(piece, int) else len(piece)
            if nbytes:
                kept.append(piece)
                offsets.append(position)
                position += nbytes
        return cls(container, tuple(tensors), tuple(kept), tuple(offsets), position, tuple(metadata))

    def layout(self) -> Layout:
        """The layout that parsing the file would give."""
        numbers = [
            Span(offset, self.tensors[piece].nbytes, *_facts(self.tensors[piece]))
            for offset, piece in zip(self.offsets, self.pieces, strict=True)
            if isinstance(piece, int)
        ]
        return cover(self.container, self.size, numbers, self.metadata)

    def between(self, offset: int, end: int) -> Iterator[tuple[bytes | int, int, int]]:
        """What holds ``[offset, end)``: each piece with the range within it."""
        number = bisect_right(self.offsets, offset) - 1
        while offset < end:
            piece = self.pieces[number]
            nbytes = self.tensors[piece].nbytes if isinstance(piece, int) else len(piece)
            start = offset - self.offsets[number]
            stop = min(nbytes, end - self.offsets[number])
            yield piece, start, stop
            offset += stop - start
            number += 1


def _facts(tensor: Blank) -> tuple[str, str, tuple[int, ...]]:
    return tensor.dtype, tensor.name, tensor.shape


def container_for(name: str) -> str:
    """The container that a model's name asks for by its ending.

    Raises:
        UsageError: an ending of no container that can be written.
    """
    try:
        return _ENDINGS[PurePath(name).suffix.lower()]
    except KeyError:
        raise UsageError(
            "no container has that ending", where=name, remedy=f"name it with one of {', '.join(_ENDINGS)}"
        ) from None


def safetensors_skeleton(tensors: Sequence[Blank], metadata: Sequence[tuple[str, str]] = ()) -> Skeleton:
    """A safetensors file; the tensors stand in the order given.

    Raises:
        UsageError: an element type that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        if tensor.dtype in _TORCH_ONLY:
            raise UsageError(
                "safetensors has no such element type", where=tensor.name, detail=tensor.dtype, remedy="name a .ckpt"
            )
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    pieces: list[bytes | int] = [struct.pack("<Q", len(text)) + text, *range(len(tensors))]
    return Skeleton.of(SAFETENSORS, tensors, pieces, metadata)


class _Sink(io.RawIOBase):
    """Takes what ``zipfile`` writes, in pieces: bytes as they are, and only the length of what is no literal."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray | int]] = []
        self.tensor = -1
        """The tensor that is being written; -1 for literal bytes."""
        self._at = 0
        self._end = 0

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = (0, self._at, self._end)[whence] + offset
        return self._at

    def write(self, data: object, /) -> int:
        block = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self._at < self._end:  # a local header gets its CRC once the data is there
            start, piece = self.pieces[bisect_right(self.pieces, self._at, key=lambda p: p[0]) - 1]
            assert isinstance(piece, bytearray)
            piece[self._at - start : self._at - start + len(block)] = block
        elif self.tensor >= 0:
            if not self.pieces or self.pieces[-1][1] != self.tensor:
                self.pieces.append((self._at, self.tensor))
        elif self.pieces and isinstance(self.pieces[-1][1], bytearray):
            self.pieces[-1][1].extend(block)
        else:
            self.pieces.append((self._at, bytearray(block)))
        self._at += len(block)
        self._end = max(self._end, self._at)
        return len(block)


def torch_zip_skeleton(
    tensors: Sequence[Blank], blocks: Callable[[int], Iterator[bytes]], stem: str = "archive", *, wrap: bool = True
) -> Skeleton:
    """The zip that ``torch.save`` writes of ``{"state_dict": {name: tensor}}``, or of the inner dict without ``wrap``.

    Args:
        tensors: in the order of the dict.
        blocks: all bytes of a tensor by its number, once for each tensor in order: the zip holds their CRC-32.
        stem: the folder in the zip.

    Raises:
        UsageError: an element type that torch has no storage type for.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, nbytes: int) -> zipfile.ZipInfo:
            info = zipfile.ZipInfo(f"{stem}/{name}", (1980, 1, 1, 0, 0, 0))
            info.file_size = nbytes
            # Aligned as torch does it, by a field "FB" in the local header, so that the file can be mapped.
            wide = nbytes * 1.05 > zipfile.ZIP64_LIMIT
            start = sink.tell() + 30 + len(info.filename) + 4 + (20 if wide else 0)
            padding = -start % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            return info

        for name, content in (("data.pkl", _pickled(tensors, wrap=wrap)), ("byteorder", b"little")):
            archive.writestr(member(name, len(content)), content)
        for number, tensor in enumerate(tensors):
            with archive.open(member(f"data/{number}", tensor.nbytes), "w") as record:
                sink.tensor = number
                for block in blocks(number):
                    record.write(block)
                sink.tensor = -1
        archive.writestr(member("version", 2), b"3\n")
    return Skeleton.of(TORCH_ZIP, tensors, [p if isinstance(p, int) else bytes(p) for _, p in sink.pieces])


def _pickled(tensors: Sequence[Blank], *, wrap: bool) -> bytes:
    """Protocol 2, as torch writes it. Nothing here is pickled by Python: the objects it stands for do not exist."""
    out = bytearray(b"\x80\x02")
    if wrap:
        out += b"}" + _text("state_dict")
    out += b"}("
    for key, tensor in enumerate(tensors):
        storage = DTYPES[tensor.dtype].storage_name
        if not storage:
            raise UsageError(
                "torch has no storage of that element type",
                where=tensor.name,
                detail=tensor.dtype,
                remedy="name a .safetensors",
            )
        strides, step = [], 1
        for extent in reversed(tensor.shape):
            strides.append(step)
            step *= max(1, extent)
        out += _text(tensor.name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"((" + _text("storage")
        out += f"ctorch\n{storage}\n".encode() + _text(str(key)) + _text("cpu") + _number(tensor.elements) + b"tQ"
        out += _number(0) + _tuple(tensor.shape) + _tuple(strides[::-1])
        out += b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
    out += b"u"
    if wrap:
        out += b"s"
    return bytes(out + b".")


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(number: int) -> bytes:
    if 0 <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    encoded = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
