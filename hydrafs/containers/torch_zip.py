"""Checkpoints that ``torch.save`` writes since 1.6: a zip of stored records, one per storage, and a pickle of tensors.

Rule 1: a storage is numbers only where its record is stored, unencrypted, alone under its name, and its local header
agrees with the directory; data offsets come from local headers, whose extra field holds torch's alignment padding.
Rule 2: the directory is read in a few large reads, each local header in one; records are not read.
Source: PKWARE APPNOTE 6.3.10 (4.3.7 local header, 4.3.12 directory); torch caffe2/serialize/inline_container.cc and
torch/serialization.py ``_save`` (``data.pkl``, ``data/KEY``, ``byteorder``, ``version``).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator

from hydrafs.containers import cursor, pickle_walk
from hydrafs.containers.symbols import Storage, Unpacked
from hydrafs.containers.tensor_names import MIN_UNKNOWN_NBYTES, Known, Naming, describe
from hydrafs.dtypes import BYTES
from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource, Layout, Span, View, cover

CONTAINER = "torch-zip"
SIGNATURE = b"PK\x03\x04"
MAX_PICKLE_NBYTES = 1 << 28
# Some 200,000 records of torch's usual names. The shortest entries, 365,000 of them, take 150 MB and 1.2 s of zipfile.
MAX_DIRECTORY_NBYTES = 1 << 24
_TAIL_NBYTES = 1 << 17
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_PATCHED = 0x20
_LOCAL = struct.Struct("<4s5H3I2H")


def parse(source: ByteSource) -> Layout:
    """The layout of a torch zip. Reads the directory, the pickles, and the local headers of the storages.

    Raises:
        BadModel: no zip, no torch checkpoint in it, or a damaged pickle.
    """
    archive = _Archive(source)
    prefix = archive.checkpoint_prefix()
    little = archive.small(prefix + "byteorder").strip() in (b"", b"little")
    naming = Naming()
    spans: list[Span] = []
    views: list[View] = []
    strided: list[str] = []
    for pickled in ("data", "constants"):  # TorchScript keeps a second pickle
        pickle_name, folder = f"{prefix}{pickled}.pkl", f"{prefix}{pickled}/"
        if pickle_name not in archive.members:
            continue
        storages: dict[str, Storage] = {}
        records = archive.read_pickle(pickle_name)
        root = pickle_walk.walk(cursor.Cursor(records, MAX_PICKLE_NBYTES), storages)
        known = describe(root, storages, naming, "" if pickled == "data" else "constants.")
        del root
        for name in archive.members:
            if name.startswith(folder) and name != folder:
                key = name[len(folder) :]
                if key in storages and key not in known:  # the pickle contradicts itself
                    continue
                span = _span(archive, name, known.get(key), naming, little)
                facts = known.get(key)
                if span is not None:
                    spans.append(span)
                    if facts is not None and span.nbytes == facts.nbytes and little:
                        views += facts.views_at(span.offset)
                        strided += facts.strided
                elif facts is not None and facts.nbytes == 0:
                    views += facts.views_at(0)  # tensors without elements
    views.sort(key=lambda view: naming.place(view.name))
    return cover(CONTAINER, source.size, spans, views=views, strided=strided)


def unpack(source: ByteSource) -> Unpacked:
    """What the main pickle of a torch zip describes, and where its storages stand.

    Raises:
        BadModel: as for ``parse``.
    """
    archive = _Archive(source)
    prefix = archive.checkpoint_prefix()
    little = archive.small(prefix + "byteorder").strip() in (b"", b"little")
    storages: dict[str, Storage] = {}
    records = archive.read_pickle(prefix + "data.pkl")
    root = pickle_walk.walk(cursor.Cursor(records, MAX_PICKLE_NBYTES), storages)
    places: dict[str, tuple[int, int]] = {}
    for key in storages:
        place = archive.locate(f"{prefix}data/{key}") if f"{prefix}data/{key}" in archive.members else None
        if place is not None:
            places[key] = place
    return Unpacked(root, storages, places, little)


def _span(archive: _Archive, member: str, known: Known | None, naming: Naming, little: bool) -> Span | None:
    """The numbers of one record; ``None`` where it stays literal."""
    located = archive.locate(member)
    if located is None:
        return None
    offset, nbytes = located
    if known is None:
        known = Known(BYTES.name, None, naming.unique("storage/" + member.rpartition("/")[2]), (), ())
    if known.nbytes is None or not little:
        known = known.as_bytes(nbytes if known.nbytes is None else known.nbytes)
        if known.nbytes is None or known.nbytes < MIN_UNKNOWN_NBYTES:
            return None
    if known.nbytes is None or not 0 < known.nbytes <= nbytes:
        return None
    return Span(offset, known.nbytes, known.dtype, known.name, known.shape, known.aliases)


class _Archive:
    """The members of a zip that are alone under their names, by name."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        try:
            # No ``with``: a ZipFile that is given a file does not own it, and only its directory is wanted.
            archive = zipfile.ZipFile(_Seekable(source))
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, OSError, ValueError) as error:
            raise BadModel("a zip directory is damaged", detail=str(error)[:200]) from error
        self.directory_offset: int = archive.start_dir
        self.members: dict[str, zipfile.ZipInfo] = {}
        twice: set[str] = set()
        for info in archive.infolist():
            name = info.orig_filename
            if name in self.members:
                twice.add(name)
            self.members[name] = info
        for name in twice:  # readers differ in which of them they take
            del self.members[name]

    def checkpoint_prefix(self) -> str:
        """The folder, with its slash, that holds the checkpoint's ``data.pkl``."""
        candidates = [name[: -len("data.pkl")] for name in self.members if name.endswith("data.pkl")]
        candidates = [prefix for prefix in candidates if not prefix or prefix.endswith("/")]
        if not candidates:
            raise BadModel("a zip is no torch checkpoint", detail="no data.pkl in it")
        if len(candidates) == 1:
            return candidates[0]
        versioned = [p for p in candidates if p + "version" in self.members or p + ".data/version" in self.members]
        return (versioned or candidates)[0]

    def small(self, name: str) -> bytes:
        """The content of a member of a few bytes; empty if there is none."""
        if name not in self.members or self.members[name].file_size > 64:
            return b""
        return next(self.read_pickle(name), b"")[:64]  # the first chunk only: the declared size may be a lie

    def read_pickle(self, name: str) -> Iterator[bytes]:
        """The content of a stored or deflated member, a chunk at a time."""
        info = self.members[name]
        located = self._data_range(info)
        if located is None or info.file_size > MAX_PICKLE_NBYTES:
            raise BadModel("a zip member cannot be read", where=name)
        chunks = cursor.stored(self.source, *located)
        if info.compress_type == zipfile.ZIP_STORED:
            return chunks
        if info.compress_type == zipfile.ZIP_DEFLATED:
            return cursor.inflated(chunks)
        raise BadModel("a zip member cannot be read", where=name, detail=f"method {info.compress_type}")

    def locate(self, name: str) -> tuple[int, int] | None:
        """Offset and length of a member's bytes, if they stand in the file as they are."""
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.file_size == 0:
            return None
        return self._data_range(info)

    def _data_range(self, info: zipfile.ZipInfo) -> tuple[int, int] | None:
        """Where a member's data stands, if its local header confirms the directory."""
        if info.flag_bits & (_ENCRYPTED | _PATCHED):
            return None
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        header_nbytes = _LOCAL.size + len(name)
        if not 0 <= info.header_offset <= self.directory_offset - header_nbytes:
            return None
        header = self.source.pread(info.header_offset, header_nbytes)
        if len(header) < header_nbytes:
            return None
        signature, _, flags, method, _, _, _, _, _, name_nbytes, extra_nbytes = _LOCAL.unpack_from(header)
        if signature != SIGNATURE or flags & (_ENCRYPTED | _PATCHED) or method != info.compress_type:
            return None
        if name_nbytes != len(name) or header[_LOCAL.size :] != name:
            return None
        offset = info.header_offset + _LOCAL.size + name_nbytes + extra_nbytes
        if offset + info.compress_size > min(self.directory_offset, self.source.size):
            return None
        return offset, info.compress_size


class _Seekable:
    """A ``ByteSource`` as the file that ``zipfile`` asks for; the tail is read once, longer reads are bounded."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._at = 0
        self._tail_offset = max(0, source.size - _TAIL_NBYTES)
        self._tail = source.pread(self._tail_offset, _TAIL_NBYTES)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        start = (0, self._at, self._source.size)[whence]
        if start + offset < 0:
            raise OSError("before the start")  # zipfile takes it for "no such record here"
        self._at = start + offset
        return self._at

    def read(self, nbytes: int = -1, /) -> bytes:
        left = max(0, self._source.size - self._at)
        nbytes = left if nbytes is None or nbytes < 0 else min(nbytes, left)
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise BadModel("a zip directory is too large", detail=f"{nbytes} bytes, at most {MAX_DIRECTORY_NBYTES}")
        if self._at >= self._tail_offset:
            start = self._at - self._tail_offset
            data = self._tail[start : start + nbytes]
        else:
            data = self._source.pread(self._at, nbytes)
        self._at += len(data)
        return data

    def close(self) -> None:
        return None
