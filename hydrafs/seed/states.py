"""A model as its state dict: names in order, each with a tensor that is read from where it stands.

Rule 1: nothing is unpickled; a tensor is a type, a shape, strides and a place, and it lies within its storage.
Rule 2: a tensor is no larger than its storage, and all together are no larger than ``MAX_SHARE`` times the file, so
        that a small file cannot ask for much work: expanded tensors, which would break this, are in no checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hydrafs.containers import safetensors, torch_legacy, torch_zip
from hydrafs.containers.symbols import Blob, Storage, StorageView, Tensor, Thing, Unpacked
from hydrafs.dtypes import DTYPES, DType
from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource
from hydrafs.predictors import Words

MAX_SHARE = 4
_HEAD_NBYTES = 64


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor where it stands: ``offset`` in bytes of ``source``, ``stride`` in elements. Equal references are views
    of the same bytes. Thread safety: that of the source."""

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    source: ByteSource
    offset: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take, one after another."""
        return self.numel * self.dtype.nbytes

    @property
    def _extent(self) -> int:
        """How many elements lie between its first and its last, both included."""
        if not self.numel:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def fits(self, storage_nbytes: int, start: int) -> bool:
        """Whether it lies within a storage that stands at ``start``, and has no more elements than that holds."""
        end = self.offset - start + self._extent * self.dtype.nbytes
        return self.offset >= start and end <= storage_nbytes and self.nbytes <= storage_nbytes

    def read(self) -> Words:
        """Its elements in order, contiguous, as raw little-endian bytes.

        Raises:
            BadModel: the source ends before the tensor does.
        """
        raw = np.empty(self._extent * self.dtype.nbytes, dtype=np.uint8)
        if self.source.pread_into(self.offset, memoryview(raw)) != raw.nbytes:
            raise BadModel("a tensor lies beyond the end of its file", detail=f"at byte {self.offset}")
        if self._extent == self.numel and _is_contiguous(self.shape, self.stride):
            return raw
        unit = self.dtype.nbytes
        elements = raw.view(f"V{unit}")
        steps = tuple(step * unit for step in self.stride)
        view = np.lib.stride_tricks.as_strided(elements, self.shape, steps, writeable=False)
        return np.ascontiguousarray(view).reshape(-1).view(np.uint8)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for extent, found in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and found != step:
            return False
        step *= extent
    return True


State = dict[str, TensorRef]


class Slice:
    """``nbytes`` bytes of another source from ``offset`` on, as a ``ByteSource``; the other stays its owner's."""

    def __init__(self, source: ByteSource, offset: int, nbytes: int) -> None:
        self._source = source
        self._offset = offset
        self._nbytes = max(0, min(nbytes, source.size - offset))

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._nbytes

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``; fewer only at the end."""
        return self._source.pread(self._offset + offset, max(0, min(nbytes, self._nbytes - offset)))

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; how many bytes were there."""
        count = max(0, min(out.nbytes, self._nbytes - offset))
        return self._source.pread_into(self._offset + offset, out[:count])

    def close(self) -> None:
        """Nothing is held."""
        return


def read_state(source: ByteSource, name: str) -> State:
    """The state dict of a model: what stands under ``state_dict`` in it if anything does, else all that it maps names
    to. What is no tensor is left out.

    Args:
        name: what to call the model in messages.

    Raises:
        BadModel: no model of a known format, or one with a tensor that is not within it.
    """
    head = source.pread(0, _HEAD_NBYTES)
    if safetensors.sniff(head, source.size):
        return _safetensors_state(source, name)
    unpacked = unpack(source, head)
    if unpacked is None:
        raise BadModel(
            "the tensors of a model cannot be read",
            where=name,
            detail="it is neither safetensors nor a torch checkpoint",
            remedy="name a .ckpt, .pt, .pth, .bin or .safetensors file",
        )
    values = mapping(unpacked.root)
    nested = values.get("state_dict")
    if isinstance(nested, Thing):
        values = mapping(nested)
    return resolve({k: v for k, v in values.items() if isinstance(v, Tensor)}, Places(source, unpacked), name)


def unpack(source: ByteSource, head: bytes) -> Unpacked | None:
    """What a torch file describes; ``None`` where ``head``, its first bytes, are of no torch file."""
    if head.startswith(torch_zip.SIGNATURE):
        return torch_zip.unpack(source)
    if torch_legacy.sniff(head):
        return torch_legacy.unpack(source)
    return None


def mapping(root: object) -> dict[str, object]:
    """The names that a pickled dict gives, and their values; empty where ``root`` is no dict."""
    pairs = root.pairs if isinstance(root, Thing) else None
    return {k: v for k, v in _in_twos(pairs or []) if isinstance(k, str)}


def _in_twos(pairs: list[object]) -> Iterator[tuple[object, object]]:
    return zip(pairs[::2], pairs[1::2], strict=False)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a storage stands, and what it holds where its own pickle says so."""

    offset: int
    nbytes: int
    dtype: DType | None


class Places:
    """Where the storages of one file stand, those that are files of their own in its pickle included."""

    def __init__(self, source: ByteSource, unpacked: Unpacked) -> None:
        self.source = source
        self._unpacked = unpacked
        self._inner: dict[int, tuple[_Place, int]] = {}

    def of(self, storage: Storage) -> tuple[_Place, int]:
        """The place of a storage, and how many of its elements are skipped at its beginning.

        Raises:
            BadModel: it stands nowhere as it is.
        """
        if storage.blob is not None:
            if storage.blob.offset not in self._inner:
                self._inner[storage.blob.offset] = self._unpack(storage.blob)
            return self._inner[storage.blob.offset]
        place = self._unpacked.places.get(storage.key)
        if place is None and storage.element_nbytes and not storage.numel:
            place = (0, 0)  # of no bytes, and so nowhere
        if place is None or not storage.consistent or not self._unpacked.little:
            raise BadModel("a storage is compressed, missing, or not little-endian", detail=storage.key)
        if storage.element_nbytes and storage.nbytes > place[1]:
            raise BadModel("a storage is cut short", detail=f"{place[1]} bytes of {storage.nbytes}")
        return _Place(*place, storage.dtype), 0

    def _unpack(self, blob: Blob) -> tuple[_Place, int]:
        inner = Slice(self.source, blob.offset, blob.nbytes)
        unpacked = unpack(inner, inner.pread(0, _HEAD_NBYTES))
        view = unpacked.root if unpacked else None
        if unpacked is None or not isinstance(view, StorageView) or view.storage.blob is not None:
            raise BadModel("a pickled storage is no storage of torch", detail=f"at byte {blob.offset}")
        place, _ = Places(inner, unpacked).of(view.storage)
        return _Place(blob.offset + place.offset, place.nbytes, place.dtype), view.offset


def resolve(tensors: dict[str, Tensor], places: Places, name: str) -> State:
    """Each tensor where it stands.

    Raises:
        BadModel: a storage is missing, a type is unknown, or a tensor is not within its storage (rule 2).
    """
    state: State = {}
    total = 0
    for key, tensor in tensors.items():
        where = f"{key} of {name}"
        try:
            place, skipped = places.of(tensor.storage)
        except BadModel as error:
            raise BadModel(error.what, where=where, detail=error.detail) from error
        dtype = DTYPES[tensor.dtype] if tensor.dtype else place.dtype
        if dtype is None:
            raise BadModel("a tensor has a type that is unknown here", where=where, detail=tensor.storage.type_name)
        offset = place.offset + (skipped + tensor.offset) * dtype.nbytes
        ref = TensorRef(dtype, tensor.shape, tensor.stride, places.source, offset)
        if not ref.fits(place.nbytes, place.offset):
            raise BadModel("a tensor is not within its storage", where=where, detail=f"{tensor.shape}")
        total += ref.nbytes
        if total > MAX_SHARE * places.source.size:
            raise BadModel("the tensors of a model are far larger than it is", where=name)
        state[key] = ref
    return state


def _safetensors_state(source: ByteSource, name: str) -> State:
    header = safetensors.read_header(source)
    state: State = {}
    for key, entry in header.entries.items():
        dtype = DTYPES.get(entry.dtype)
        begin, end = entry.data_offsets
        if dtype is None:
            raise BadModel("a tensor has a type that is unknown here", where=f"{key} of {name}", detail=entry.dtype)
        within = 0 <= begin <= end <= source.size - header.data_offset
        if not within or any(n < 0 for n in entry.shape) or math.prod(entry.shape) * dtype.nbytes != end - begin:
            raise BadModel("a tensor is not within its file", where=f"{key} of {name}", detail=f"{entry.shape}")
        state[key] = TensorRef(dtype, entry.shape, contiguous(entry.shape), source, header.data_offset + begin)
    return state


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of this shape whose elements follow each other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
