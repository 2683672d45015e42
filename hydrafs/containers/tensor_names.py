"""From a pickle's symbols to storages with names.

Rule 1: every container is visited once, in the pickle's order, without recursion; names are made for tensors only.
Rule 2: names are unique in a model, are valid UTF-8, and take up a bounded amount of memory.
Rule 3: ``state_dict.`` at the top is left out, and so are the inner attributes of a pickled ``torch.nn.Module``, so
that the names are those of the same weights in a safetensors file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydrafs.containers.symbols import Storage, Tensor, Thing
from hydrafs.dtypes import BYTES, DTYPES
from hydrafs.layout import View

MAX_NAME_LENGTH = 4096
MAX_NAMES_LENGTH = 1 << 25
MAX_KEY_LENGTH = 512
MAX_DEPTH = 64
# Bytes of unknown meaning are worth a section of their own only where they fill a page.
MIN_UNKNOWN_NBYTES = 4096

_TOP = "state_dict"
_MODULE_ATTRIBUTES = {"_parameters", "_buffers", "_modules"}


class Naming:
    """Gives out names that are unique, clean and bounded in all. Thread safety: one user."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._copies: dict[str, int] = {}
        self._length = 0

    @property
    def spent(self) -> bool:
        """Whether no more names are given out."""
        return self._length > MAX_NAMES_LENGTH

    def unique(self, *candidates: str) -> str:
        """The first candidate that is free, else the last with a number behind it; empty when memory is spent."""
        name = ""
        if self.spent:
            return name
        for candidate in candidates:
            name = candidate[:MAX_NAME_LENGTH].encode("utf-8", "replace").decode()
            if name not in self._taken:
                break
        stem = name
        while name in self._taken:
            self._copies[stem] = self._copies.get(stem, 1) + 1
            name = f"{stem}#{self._copies[stem]}"
        self._length += len(name)
        self._taken[name] = len(self._taken)
        return name

    def place(self, name: str) -> int:
        """How many names were given out before this one."""
        return self._taken[name]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one storage: an element type, the length in bytes (``None``: all there is), names and shape.

    ``views``: its tensors, with their place in the storage as offset; ``strided``: the names of those that are not
    contiguous in it, or of a type unknown here."""

    dtype: str
    nbytes: int | None
    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    views: tuple[View, ...] = ()
    strided: tuple[str, ...] = ()

    def views_at(self, offset: int) -> list[View]:
        """Its tensors where the storage stands at ``offset`` in the file."""
        return [replace(view, offset=offset + view.offset) for view in self.views]

    def as_bytes(self, nbytes: int) -> Known:
        """The same storage as ``nbytes`` plain bytes."""
        strided = (*(view.name for view in self.views), *self.strided)
        return Known(BYTES.name, nbytes, self.name, (nbytes,), self.aliases, (), strided)


class _Place:
    """A link of a path: its parent's link, and the key under it."""

    __slots__ = ("key", "parent")

    def __init__(self, parent: _Place | None, key: str) -> None:
        self.parent = parent
        self.key = key


def describe(root: object, storages: dict[str, Storage], naming: Naming, prefix: str = "") -> dict[str, Known]:
    """What ``root`` says of each storage, by key; storages of which it contradicts itself are left out.

    Args:
        root: the symbol that ``pickle_walk.walk`` gave.
        storages: those that it filled.
        naming: shared by all that is named in one model.
        prefix: put before every name.
    """
    views: dict[str, list[Tensor]] = {}
    names: dict[str, list[str]] = {}
    named: dict[str, list[tuple[str, Tensor]]] = {}
    for place, tensor in _tensors(root):
        key = tensor.storage.key
        views.setdefault(key, []).append(tensor)
        if path := "" if naming.spent else _path(place):
            short = path.removeprefix(_TOP + ".")
            if name := naming.unique(prefix + short, prefix + path):
                names.setdefault(key, []).append(name)
                named.setdefault(key, []).append((name, tensor))
    known = {}
    for key, storage in storages.items():
        if storage.consistent:
            given = names.get(key) or [naming.unique(f"{prefix}storage/{key}")]
            known[key] = _known(storage, views.get(key, []), given, named.get(key, []))
    return known


def _known(storage: Storage, views: list[Tensor], names: list[str], named: list[tuple[str, Tensor]]) -> Known:
    name, aliases = names[0], tuple(names[1:])
    if storage.element_nbytes == 0:
        return Known(BYTES.name, None, name, (), aliases)
    nbytes = storage.nbytes
    dtype = storage.dtype
    if dtype is None:
        types = {view.dtype for view in views}
        dtype = DTYPES.get(types.pop(), BYTES) if len(types) == 1 else BYTES
        if nbytes % dtype.nbytes:
            dtype = BYTES
    numel = nbytes // dtype.nbytes
    whole = bool(views) and views[0].fills(numel)
    tensors, strided = [], []
    for tensor_name, tensor in named:
        own = DTYPES.get(tensor.dtype) or storage.dtype
        view = View(tensor_name, own.name, tensor.shape, tensor.offset * own.nbytes) if own else None
        sane = view is not None and min(view.offset, 0, *view.shape) == 0 and view.offset + view.nbytes <= nbytes
        if view and sane and tensor.is_contiguous:
            tensors.append(view)
        else:
            strided.append(tensor_name)
    shape = views[0].shape if whole else (numel,)
    return Known(dtype.name, nbytes, name, shape, aliases, tuple(tensors), tuple(strided))


def _tensors(root: object) -> list[tuple[_Place, Tensor]]:
    """Every tensor under ``root`` with its place, in the pickle's order, ``state_dict`` first."""
    found: list[tuple[_Place, Tensor]] = []
    seen: set[int] = set()
    top = _Place(None, "")
    todo: list[tuple[_Place, object, bool]] = [(top, root, False)]
    while todo:
        place, value, is_state = todo.pop()
        if isinstance(value, Tensor):
            found.append((place, value))
            continue
        if not isinstance(value, (list, tuple, Thing)) or id(value) in seen:
            continue
        seen.add(id(value))
        children: list[tuple[_Place, object, bool]] = []
        if isinstance(value, Thing):
            children.append((place, value.args, False))  # a tuple may be shared by many: it is visited once
            children += _numbered(place, value.items or ())
            children += _keyed(place, value.pairs or [], is_state)
            if place is top:
                children.sort(key=lambda child: child[0].key != _TOP)
            children.append((place, value.state, True))
        elif is_state:  # (dict, slots), or several states
            children = [(place, item, True) for item in value]
        else:
            children = _numbered(place, value)
        todo.extend(reversed(children))
    return found


_CONTAINERS = (list, tuple, Thing, Tensor)


def _numbered(place: _Place, items: tuple[object, ...] | list[object]) -> list[tuple[_Place, object, bool]]:
    return [(_Place(place, str(i)), item, False) for i, item in enumerate(items) if isinstance(item, _CONTAINERS)]


def _keyed(place: _Place, pairs: list[object], is_state: bool) -> list[tuple[_Place, object, bool]]:
    children: list[tuple[_Place, object, bool]] = []
    for i in range(0, len(pairs) - 1, 2):
        key, item = pairs[i], pairs[i + 1]
        if not isinstance(item, _CONTAINERS):
            continue
        if is_state and isinstance(key, str) and key in _MODULE_ATTRIBUTES:
            children.append((place, item, False))
        else:
            text = str(key) if isinstance(key, (str, int)) else f"#{i // 2}"
            children.append((_Place(place, text), item, False))
    return children


def _path(place: _Place) -> str:
    """The keys down to ``place``, joined by dots; empty if it lies too deep to be a name."""
    keys: list[str] = []
    link: _Place | None = place
    while link is not None and link.parent is not None:
        keys.append(link.key[:MAX_KEY_LENGTH])
        if len(keys) > MAX_DEPTH:
            return ""
        link = link.parent
    return ".".join(reversed(keys)) or "tensor"
