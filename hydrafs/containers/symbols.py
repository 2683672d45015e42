"""What a pickle of tensors says, as inert symbols: nothing here can be called, imported or compared by value.

Rule 1: symbols hold symbols, ``list``, ``tuple``, ``str``, ``int``, ``bool`` and ``None``; mappings are flat lists of
keys and values, because hashing or comparing a hostile key may recurse or collide.
Rule 2: a callable that is not on the list below becomes a ``Thing`` that keeps its arguments and state, so that the
tensors inside are still found.
Rule 3: making a symbol takes constant time and memory, whatever its arguments hold: a pickle may pass one long list to
a million callables.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeGuard

from hydrafs.dtypes import BY_STORAGE_NAME, BY_TORCH_NAME, DType

MAX_DIMENSIONS = 64
MAX_SPARSE_PARTS = 5
_MAX_INT = 1 << 62


class Global:
    """A name that a pickle would have imported."""

    __slots__ = ("path",)

    def __init__(self, module: str, name: str) -> None:
        self.path = f"{module}.{name}"


class Thing:
    """An object of unknown meaning, or a mapping (``args`` empty): arguments, list items, flat pairs, state."""

    __slots__ = ("args", "items", "pairs", "state")

    def __init__(self, args: tuple[object, ...] = ()) -> None:
        self.args = args
        self.items: list[object] | None = None
        self.pairs: list[object] | None = None
        self.state: object = None


class Blob:
    """Bytes that stand in a pickle: ``nbytes`` of them, from the cursor's position ``offset`` on. None is kept."""

    __slots__ = ("nbytes", "offset")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes


class Storage:
    """The bytes that tensors view. ``dtype`` is ``None`` where the pickle does not say (untyped, or unknown here).

    ``element_nbytes`` is the unit of ``numel`` (1 for untyped storages, 0 if unknown); ``consistent`` is false once the
    pickle has said two different things of the same key. ``blob``: the storage is a torch file of its own in the
    pickle; its type and length stand in there.
    """

    __slots__ = ("blob", "consistent", "dtype", "element_nbytes", "key", "numel", "type_name")

    def __init__(self, key: str, type_name: str, numel: int) -> None:
        self.key = key
        self.type_name = type_name
        self.numel = numel
        self.dtype: DType | None = BY_STORAGE_NAME.get(type_name)
        self.element_nbytes = self.dtype.nbytes if self.dtype else int(type_name == "UntypedStorage")
        self.consistent = True
        self.blob: Blob | None = None

    @property
    def nbytes(self) -> int:
        """The length of the storage; 0 if that is unknown."""
        return self.numel * self.element_nbytes


class StorageView:
    """A storage as one persistent id names it, from ``offset`` (elements) on."""

    __slots__ = ("offset", "storage")

    def __init__(self, storage: Storage, offset: int) -> None:
        self.storage = storage
        self.offset = offset


class Tensor:
    """A strided view of a storage. ``dtype`` is empty where the storage's own type holds."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(
        self, view: StorageView, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str
    ) -> None:
        self.storage = view.storage
        self.offset = view.offset + offset
        self.shape = shape
        self.stride = stride
        self.dtype = dtype

    def fills(self, numel: int) -> bool:
        """Whether the tensor is its storage of ``numel`` elements, from first to last, in order."""
        return not self.offset and math.prod(self.shape) == numel and self.is_contiguous

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements stand one behind the other, in order."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and stride != step:
                return False
            step *= extent
        return True


class Unpacked(NamedTuple):
    """A torch file by its pickle: what it describes, and offset and length of each storage's bytes in the file, by key.
    A storage that does not stand there as it is has no place. ``little``: the bytes are little-endian."""

    root: object
    storages: dict[str, Storage]
    places: dict[str, tuple[int, int]]
    little: bool


def persistent(storages: dict[str, Storage], pid: object) -> object:
    """The symbol of a persistent id of torch (``persistent_id`` in torch/serialization.py), noted in ``storages``."""
    if not isinstance(pid, tuple) or not pid:
        return Thing()
    if pid[0] == "module" and len(pid) >= 2:  # a class with its source text, in legacy files
        return pid[1]
    if pid[0] != "storage" or not 5 <= len(pid) <= 6:
        return Thing((pid,))
    kind, key, numel = pid[1], pid[2], pid[4]
    if isinstance(key, int):
        key = str(key)
    if not isinstance(kind, Global) or not kind.path.startswith("torch.") or not isinstance(key, str):
        return Thing((pid,))
    if not _is_count(numel):
        return Thing((pid,))
    type_name = kind.path.rpartition(".")[2]
    known = storages.get(key)
    if known is None:
        known = storages[key] = Storage(key, type_name, numel)
    elif known.type_name != type_name or known.numel != numel:
        known.consistent = False
    view = pid[5] if len(pid) == 6 else None
    offset = view[1] if isinstance(view, tuple) and len(view) == 3 and _is_count(view[1]) else 0
    return StorageView(known, offset)


def reduced(function: object, args: object) -> object:
    """The symbol of ``function(*args)``."""
    if not isinstance(args, tuple):
        return Thing((args,))
    path = function.path if isinstance(function, Global) else ""
    if path in _FROM_TYPE and len(args) == 4 and isinstance(args[0], Global) and isinstance(args[2], tuple):
        path, args = args[0].path, args[2]
    if path in _REBUILD:
        return _tensor(path, args) or Thing(args)
    if path in _TRANSPARENT and args:
        return args[0]
    if path == "torch.storage._load_from_bytes" and len(args) == 1 and isinstance(args[0], Blob):
        storage = Storage(f"in the pickle at {args[0].offset}", "", 0)
        storage.blob = args[0]
        return StorageView(storage, 0)
    if path == "torch._utils._rebuild_sparse_tensor" and len(args) == 2 and isinstance(args[1], tuple):
        return _sparse(args[1][:MAX_SPARSE_PARTS])
    if path in _MAPPINGS:
        return _mapping(args)
    return Thing(args)


_FROM_TYPE = {"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"}
_REBUILD = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
    "torch._utils._rebuild_qtensor": 7,
}
_TRANSPARENT = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch.Size",
    "torch.jit._pickle.restore_type_tag",
    "builtins.set",
    "builtins.frozenset",
    "builtins.list",
    "builtins.tuple",
    "__builtin__.set",
    "__builtin__.frozenset",
}
_MAPPINGS = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "builtins.dict",
    "__builtin__.dict",
}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < _MAX_INT


def _tensor(path: str, args: tuple[object, ...]) -> Tensor | None:
    if len(args) < _REBUILD[path]:
        return None
    view, offset, shape, stride = args[:4]
    if not isinstance(view, StorageView) or not _is_count(offset):
        return None
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or not len(shape) == len(stride) <= MAX_DIMENSIONS:
        return None
    if not all(_is_count(n) for n in shape) or not all(_is_count(n) for n in stride):
        return None
    dtype = ""
    if path == "torch._utils._rebuild_tensor_v3":
        symbol = args[6]
        known = BY_TORCH_NAME.get(symbol.path.removeprefix("torch.")) if isinstance(symbol, Global) else None
        dtype = known.name if known else "U8"
    return Tensor(view, offset, shape, stride, dtype)


def _sparse(data: tuple[object, ...]) -> Thing:
    """Sparse tensors by their parts: (indices, values, size...) or (compressed, plain, values, size...)."""
    tensors = [part for part in data if isinstance(part, Tensor)]
    names = ("indices", "values") if len(tensors) == 2 else ("compressed_indices", "plain_indices", "values")
    thing = Thing()
    thing.pairs = [part for pair in zip(names, tensors, strict=False) for part in pair]
    return thing


def _mapping(args: tuple[object, ...]) -> Thing:
    """``dict(pairs)`` and its kin; Python 2 wrote an ``OrderedDict`` as a list of two-item lists.

    The list is emptied, so that a pickle which gives one list to a million mappings pays for each item once.
    """
    thing = Thing()
    pairs = args[0] if args else None
    if isinstance(pairs, list):
        thing.pairs = [part for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2 for part in pair]
        pairs.clear()
    return pairs if isinstance(pairs, Thing) else thing
