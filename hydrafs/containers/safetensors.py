"""The safetensors container: a length, a JSON header, the tensors' bytes.

Source: the format's description in safetensors' README and ``safetensors/src/tensor.rs`` (header at most 100 MB,
offsets relative to the end of the header). Holes and overlaps, which that reader refuses, are tolerated: doubt is
literal.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import msgspec

from hydrafs.containers.tensor_names import Naming
from hydrafs.dtypes import BYTES, DTYPES
from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource, Layout, Span, View, cover

CONTAINER = "safetensors"
MAX_HEADER_NBYTES = 100_000_000
# A colon stands before every value of a JSON object: this bounds what a header can become before any of it is made.
MAX_COLONS = 1 << 21
MAX_DIMENSIONS = 64
MAX_METADATA_PAIRS = 64
MAX_METADATA_NBYTES = 1 << 16


class Entry(msgspec.Struct):
    """One tensor of a header; ``data_offsets`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Header(NamedTuple):
    """A header, and where the tensors' bytes begin."""

    entries: dict[str, Entry]
    metadata: tuple[tuple[str, str], ...]
    data_offset: int


def sniff(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts with ``head`` (9 bytes or more) may be safetensors."""
    nbytes = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= nbytes <= min(MAX_HEADER_NBYTES, size - 8)


def parse(source: ByteSource) -> Layout:
    """The layout of a safetensors model. Reads the header only.

    Raises:
        BadModel: the length or the JSON of the header breaks the format's rules.
    """
    header = read_header(source)
    naming = Naming()
    spans: list[Span] = []
    views: list[View] = []
    strided: list[str] = []
    for name, entry in header.entries.items():
        span = _span(naming, name, entry, header.data_offset)
        if span is None:
            continue
        if span.nbytes:
            spans.append(span)
        if entry.dtype in DTYPES:
            views.append(View(span.name, span.dtype, span.shape, span.offset))
        else:
            strided.append(span.name)
    return cover(CONTAINER, source.size, spans, header.metadata, views, strided)


def read_header(source: ByteSource) -> Header:
    """What a header says, as it says it: neither types nor offsets are checked.

    Raises:
        BadModel: as for ``parse``.
    """
    size = source.size
    prefix = source.pread(0, 8)
    if len(prefix) < 8:
        raise BadModel("no safetensors header", detail=f"{size} bytes")
    (header_nbytes,) = struct.unpack("<Q", prefix)
    if header_nbytes > MAX_HEADER_NBYTES or 8 + header_nbytes > size:
        raise BadModel("a safetensors header is longer than it may be", detail=f"{header_nbytes} bytes of {size}")
    header = source.pread(8, header_nbytes)
    if header.count(b":") > MAX_COLONS:
        raise BadModel("a safetensors header has too many entries", detail=f"over {MAX_COLONS}")
    try:
        raw_entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = _metadata(raw_entries.pop("__metadata__", None))
        decoder = msgspec.json.Decoder(Entry)
        entries = {name: decoder.decode(raw) for name, raw in raw_entries.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadModel("a safetensors header is damaged", detail=str(error)[:200]) from error
    return Header(entries, metadata, 8 + header_nbytes)


def _span(naming: Naming, name: str, entry: Entry, data_offset: int) -> Span | None:
    """The numbers of one entry; ``None`` where its parts contradict each other."""
    begin, end = entry.data_offsets
    shape = entry.shape
    if not 0 <= begin <= end or len(shape) > MAX_DIMENSIONS or any(not 0 <= n < 1 << 63 for n in shape):
        return None
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        dtype, shape = BYTES, (end - begin,)  # sub-byte and future types: bytes are always exact
    elif math.prod(shape) * dtype.nbytes != end - begin:
        return None
    return Span(data_offset + begin, end - begin, dtype.name, naming.unique(name), shape)


def _metadata(raw: msgspec.Raw | None) -> tuple[tuple[str, str], ...]:
    """The ``__metadata__`` strings, cut to what a diff may carry."""
    if raw is None:
        return ()
    pairs = msgspec.json.decode(raw, type=dict[str, str])
    return tuple((_cut(key), _cut(value)) for key, value in list(pairs.items())[:MAX_METADATA_PAIRS])


def _cut(text: str) -> str:
    return text[:MAX_METADATA_NBYTES].encode("utf-8", "replace")[:MAX_METADATA_NBYTES].decode("utf-8", "ignore")
