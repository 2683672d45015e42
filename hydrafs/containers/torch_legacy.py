"""Checkpoints that ``torch.save`` wrote before 1.6 (and writes with ``_use_new_zipfile_serialization=False``).

Five pickles stand one behind the other: a magic number, a protocol number, facts of the writing machine, the object,
the keys of its storages. Then, per key in that order: the number of elements (int64, little-endian) and the elements.
Source: torch/serialization.py ``_legacy_save`` and ``_legacy_load``. The tar files of torch 0.1.1 are opaque.
"""

from __future__ import annotations

import struct

from hydrafs.containers import cursor, pickle_walk
from hydrafs.containers.symbols import Storage, Thing, Unpacked
from hydrafs.containers.tensor_names import MIN_UNKNOWN_NBYTES, Naming, describe
from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource, Layout, Span, View, cover

CONTAINER = "torch-legacy"
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_PICKLE_NBYTES = 1 << 28
_COUNT = struct.Struct("<q")


def sniff(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (40 bytes or more) may be a legacy checkpoint."""
    return MAGIC.to_bytes(10, "little") in head[:40] or head.startswith(f"L{MAGIC}L".encode())


def parse(source: ByteSource) -> Layout:
    """The layout of a legacy checkpoint. Reads the pickles and eight bytes per storage.

    Raises:
        BadModel: the pickles break the format's rules. Where the storages behind them do, the rest is literal.
    """
    root, storages, places, little = unpack(source)
    naming = Naming()
    known = describe(root, storages, naming)
    spans: list[Span] = []
    views: list[View] = []
    strided: list[str] = []
    for key, (offset, nbytes) in places.items():
        facts = known[key] if little else known[key].as_bytes(nbytes)
        if little or nbytes >= MIN_UNKNOWN_NBYTES:
            spans.append(Span(offset, nbytes, facts.dtype, facts.name, facts.shape, facts.aliases))
            views += facts.views_at(offset)
            strided += facts.strided
    views.sort(key=lambda view: naming.place(view.name))
    return cover(CONTAINER, source.size, spans, views=views, strided=strided)


def unpack(source: ByteSource) -> Unpacked:
    """What a legacy checkpoint describes, and where its storages stand: those before the first that breaks the rules.

    Raises:
        BadModel: the pickles break the format's rules.
    """
    root, storages, keys, offset, little = _read_pickles(source)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages.get(str(key)) if isinstance(key, (str, int)) else None
        header = source.pread(offset, _COUNT.size)
        if storage is None or not storage.consistent or storage.element_nbytes == 0 or len(header) < _COUNT.size:
            break
        (numel,) = _COUNT.unpack(header)
        offset += _COUNT.size
        if numel != storage.numel or offset + storage.nbytes > source.size or storage.key in places:
            break
        places[storage.key] = (offset, storage.nbytes)
        offset += storage.nbytes
    return Unpacked(root, storages, places, little)


def expected_size(source: ByteSource) -> int:
    """Where the storages that a legacy checkpoint describes end, as far as it says how long they are.

    Raises:
        BadModel: the pickles break the format's rules.
    """
    _, storages, keys, offset, _ = _read_pickles(source)
    known = [storages[str(key)] for key in keys if isinstance(key, (str, int)) and str(key) in storages]
    return offset + len(keys) * _COUNT.size + sum(storage.nbytes for storage in known if storage.consistent)


def _read_pickles(source: ByteSource) -> tuple[object, dict[str, Storage], list[object], int, bool]:
    """The object, its storages, their keys in the order of the file, where the first begins, and the byte order."""
    reader = cursor.Cursor(cursor.stored(source, 0, MAX_PICKLE_NBYTES), MAX_PICKLE_NBYTES)
    nothing: dict[str, Storage] = {}
    magic = pickle_walk.walk(reader, nothing)
    protocol = pickle_walk.walk(reader, nothing)
    if (not isinstance(magic, int) or magic != MAGIC) or (not isinstance(protocol, int) or protocol != PROTOCOL):
        raise BadModel("no legacy torch checkpoint")
    little = _is_little_endian(pickle_walk.walk(reader, nothing))
    storages: dict[str, Storage] = {}
    root = pickle_walk.walk(reader, storages)
    keys = pickle_walk.walk(reader, nothing)
    if not isinstance(keys, list):
        raise BadModel("a legacy torch checkpoint has no list of storages")
    return root, storages, keys, reader.position, little


def _is_little_endian(facts: object) -> bool:
    pairs = facts.pairs if isinstance(facts, Thing) else None
    for i in range(0, len(pairs or []) - 1, 2):
        if pairs is not None and isinstance(pairs[i], str) and pairs[i] == "little_endian":
            return pairs[i + 1] is True
    return True
