"""The ``.hydra`` file: written front to back in one pass, read from its tail.

Goal: one file that says everything needed to give a model back, and how each part of it is checked.
Plan: header, chunk payloads, index, manifest, trailer (``docs/FORMAT.md`` owns every offset).
Rule 1: nothing is believed before its checksum agrees and its ranges lie in the file.
Rule 2: no size that a file declares is allocated before it is bounded.
Rule 3: the trailer alone answers ``stat``: one read, nothing decompressed.
Rule 4: a diff that has its name is written to no more. Mode and mtime of its model are changed beside it, in an
        extended attribute, which the kernel sets whole or not at all.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from hydrafs.digests import SHA256
from hydrafs.errors import CorruptDiff, UnsupportedDiff, from_oserror
from hydrafs.manifest import MAX_CHUNKS, Manifest, SpanTable, decode_hashes, decode_manifest, encode_manifest, tabulate

SUFFIX = ".hydra"
MAGIC = b"\x89HYDRA\r\n"
END_MAGIC = b"\n\rARDYH\x89"
VERSION = 1

_HEADER = struct.Struct("<8sII")
_TRAILER = struct.Struct("<QQQQQQQqII32sIIQ8s")
HEADER_NBYTES = 16
TRAILER_NBYTES = 128
assert _HEADER.size == HEADER_NBYTES
assert _TRAILER.size == TRAILER_NBYTES

INDEX_ROW: np.dtype[np.void] = np.dtype(
    [("offset", "<u8"), ("checksum", "<u8"), ("nbytes", "<u4"), ("codec", "u1"), ("flags", "u1"), ("reserved", "<u2")]
)
assert INDEX_ROW.itemsize == 24

FLAG_NARROWED = 1
"""The chunk was narrowed to its section's narrow dtype before it was coded."""
FLAG_UNPREDICTED = 2
"""The chunk was coded without its prediction, because that was smaller."""

XATTR_ATTRIBUTES = "user.hydrafs.attributes"
"""Mode and mtime of a model that were changed since its diff was written (docs/FORMAT.md)."""
_ATTRIBUTES = struct.Struct("<IIqQ")
_ATTRIBUTES_VERSION = 1
assert _ATTRIBUTES.size == 24

MAX_MANIFEST_NBYTES = 64 << 20
_TAIL_NBYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Trailer:
    """The fixed end of a diff: what ``stat`` needs, and where the rest is."""

    index_offset: int
    index_nbytes: int
    index_checksum: int
    manifest_offset: int
    manifest_nbytes: int
    manifest_checksum: int
    size: int
    mtime_ns: int
    mode: int
    manifest_full_nbytes: int
    sha256: bytes

    def pack(self) -> bytes:
        """The bytes of the trailer, checksum and magic included."""
        fields = (
            self.index_offset,
            self.index_nbytes,
            self.index_checksum,
            self.manifest_offset,
            self.manifest_nbytes,
            self.manifest_checksum,
            self.size,
            self.mtime_ns,
            self.mode,
            self.manifest_full_nbytes,
            self.sha256,
            VERSION,
            0,
        )
        body = _TRAILER.pack(*fields, 0, END_MAGIC)[:-16]
        return body + struct.pack("<Q8s", xxhash.xxh3_64_intdigest(body), END_MAGIC)


def _unpack_trailer(data: bytes, diff_size: int, where: str) -> Trailer:
    if data[-8:] != END_MAGIC:
        raise CorruptDiff("a diff has no end", where=where, detail="truncated, or not a diff")
    *fields, version, _reserved, checksum, _magic = _TRAILER.unpack(data)
    if checksum != xxhash.xxh3_64_intdigest(data[:-16]):
        raise CorruptDiff("the trailer of a diff is damaged", where=where)
    if version != VERSION:
        raise UnsupportedDiff("a diff has another format version", where=where, detail=f"{version}, expected {VERSION}")
    trailer = Trailer(*fields)
    end = diff_size - TRAILER_NBYTES
    ordered = (
        HEADER_NBYTES
        <= trailer.index_offset
        <= trailer.index_offset + trailer.index_nbytes
        <= trailer.manifest_offset
        <= trailer.manifest_offset + trailer.manifest_nbytes
        <= end
    )
    if not ordered or trailer.index_nbytes % INDEX_ROW.itemsize:
        raise CorruptDiff("the trailer of a diff points outside it", where=where, detail=f"{diff_size} bytes")
    largest = max(trailer.manifest_nbytes, trailer.manifest_full_nbytes)
    if largest > MAX_MANIFEST_NBYTES or trailer.index_nbytes > MAX_CHUNKS * INDEX_ROW.itemsize:
        raise CorruptDiff("the manifest of a diff is too large", where=where, detail=f"{largest} bytes")
    return trailer


def read_trailer(fd: int, where: str, doubt: Callable[[OSError], None] | None = None) -> Trailer:
    """The trailer of the open diff ``fd``: one ``fstat`` and one read.

    Args:
        doubt: told where it cannot be known whether mode and mtime were set since; they are as they were written then.

    Raises:
        CorruptDiff, UnsupportedDiff: it is damaged, truncated, no diff, or of another version.
        HydraError: it cannot be read, which says nothing of what it is.
    """
    try:
        size = os.fstat(fd).st_size
        if size < HEADER_NBYTES + TRAILER_NBYTES:
            raise CorruptDiff("a diff is too short", where=where, detail=f"{size} bytes")
        data = os.pread(fd, TRAILER_NBYTES, size - TRAILER_NBYTES)
    except OSError as error:
        raise from_oserror(error, "cannot read", where) from error
    if len(data) != TRAILER_NBYTES:
        raise CorruptDiff("a diff became shorter", where=where)
    return _as_changed(fd, _unpack_trailer(data, size, where), data, doubt)


_NOT_SET = frozenset({errno.ENODATA, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM})


def _as_changed(fd: int, trailer: Trailer, data: bytes, doubt: Callable[[OSError], None] | None = None) -> Trailer:
    """``trailer`` with the mode and mtime that were set since ``data``, its bytes, was written."""
    try:
        value = os.getxattr(fd, XATTR_ATTRIBUTES)
    except OSError as error:
        if doubt is not None and error.errno not in _NOT_SET:
            doubt(error)
        return trailer
    if len(value) != _ATTRIBUTES.size:
        return trailer
    version, mode, mtime_ns, checksum = _ATTRIBUTES.unpack(value)
    # An attribute that was left on a file whose content is another diff's by now says nothing of that.
    if version != _ATTRIBUTES_VERSION or checksum != xxhash.xxh3_64_intdigest(data):
        return trailer
    return replace(trailer, mode=mode, mtime_ns=mtime_ns)


def set_attributes(fd: int, where: str, *, mode: int, mtime_ns: int) -> bool:
    """Change what the model of the open diff ``fd`` is served with: in one step, and nothing of the file itself.

    Returns:
        Whether it could be done; not on a filesystem without extended attributes, or where they may not be set.

    Raises:
        CorruptDiff, UnsupportedDiff: it has no trailer to go with.
        OSError: the disk failed.
    """
    read_trailer(fd, where)
    data = os.pread(fd, TRAILER_NBYTES, os.fstat(fd).st_size - TRAILER_NBYTES)
    value = _ATTRIBUTES.pack(_ATTRIBUTES_VERSION, mode, mtime_ns, xxhash.xxh3_64_intdigest(data))
    try:
        os.setxattr(fd, XATTR_ATTRIBUTES, value)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.E2BIG):
            return False
        raise
    return True


def _decompressed(packed: bytes, trailer: Trailer, where: str) -> bytes:
    expected = trailer.manifest_full_nbytes
    try:
        declared = zstandard.get_frame_parameters(packed).content_size
        if declared != expected:
            raise CorruptDiff("the manifest of a diff has another length", where=where)
        data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise CorruptDiff("the manifest of a diff cannot be read", where=where, detail=str(error)) from None
    if len(data) != expected:
        raise CorruptDiff("the manifest of a diff has another length", where=where)
    return data


def read_hashes(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The SHA-256 of a diff's model, and what other hashes the diff knows of it; nothing else of it is looked at.

    Raises:
        CorruptDiff, UnsupportedDiff, HydraError: it cannot be read.
    """
    where = os.fspath(path)
    try:
        fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        try:
            trailer = read_trailer(fd, where)
            packed = os.pread(fd, trailer.manifest_nbytes, trailer.manifest_offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_oserror(error, "cannot read the diff", where) from error
    if xxhash.xxh3_64_intdigest(packed) != trailer.manifest_checksum:
        raise CorruptDiff("the manifest of a diff is damaged", where=where)
    return {SHA256: trailer.sha256, **decode_hashes(_decompressed(packed, trailer, where), where)}


class DiffFile:
    """An open diff: its trailer, manifest, index, and the stored payloads.

    Thread safety: everything but ``close`` may be called from any number of threads.
    """

    def __init__(self, path: str | os.PathLike[str], fd: int | None = None) -> None:
        """Open and check ``path``; ``fd``, where given, is an open descriptor of it, owned from here on.

        Raises:
            CorruptDiff, UnsupportedDiff: see the message.
            HydraError: it cannot be opened or read.
        """
        self.path = os.fspath(path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        except OSError as error:
            raise from_oserror(error, "cannot open the diff", self.path) from error
        try:
            self.stat = os.fstat(self.fd)
            self._load()
        except OSError as error:
            self.close()
            raise from_oserror(error, "cannot read the diff", self.path) from error
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The size of the diff file itself, in bytes."""
        return self.stat.st_size

    @property
    def identity(self) -> tuple[int, int, int, int, int]:
        """What changes when the file does: device, inode, size, mtime_ns, ctime_ns."""
        s = self.stat
        return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns

    def _load(self) -> None:
        size = self.size
        if size < HEADER_NBYTES + TRAILER_NBYTES:
            raise CorruptDiff("a diff is too short", where=self.path, detail=f"{size} bytes")
        magic, version, _ = _HEADER.unpack(self._exactly(0, HEADER_NBYTES))
        if magic != MAGIC:
            raise CorruptDiff("not a diff", where=self.path, detail="the magic at its start is another")
        if version != VERSION:
            raise UnsupportedDiff(
                "a diff has another format version", where=self.path, detail=f"{version}, expected {VERSION}"
            )
        start = max(0, size - _TAIL_NBYTES)
        tail = self._exactly(start, size - start)
        end = tail[-TRAILER_NBYTES:]
        self.trailer = trailer = _as_changed(self.fd, _unpack_trailer(end, size, self.path), end)

        def part(offset: int, nbytes: int) -> bytes:
            if offset >= start:
                return tail[offset - start : offset - start + nbytes]
            return self._exactly(offset, nbytes)

        packed = part(trailer.manifest_offset, trailer.manifest_nbytes)
        if xxhash.xxh3_64_intdigest(packed) != trailer.manifest_checksum:
            raise CorruptDiff("the manifest of a diff is damaged", where=self.path)
        self.manifest: Manifest = decode_manifest(_decompressed(packed, trailer, self.path), self.path)
        index = part(trailer.index_offset, trailer.index_nbytes)
        if xxhash.xxh3_64_intdigest(index) != trailer.index_checksum:
            raise CorruptDiff("the index of a diff is damaged", where=self.path)
        if (self.manifest.size, self.manifest.sha256) != (trailer.size, trailer.sha256):
            raise CorruptDiff("the manifest and the trailer of a diff disagree", where=self.path)
        self.table: SpanTable = tabulate(self.manifest, self.path)
        rows: npt.NDArray[np.void] = np.frombuffer(index, dtype=INDEX_ROW)
        if len(rows) != self.table.chunk_count:
            raise CorruptDiff(
                "the index of a diff is of another length",
                where=self.path,
                detail=f"{len(rows)} rows, expected {self.table.chunk_count}",
            )
        offsets, sizes = rows["offset"], rows["nbytes"].astype(np.uint64)
        limit = np.uint64(trailer.index_offset)
        stored = sizes > 0
        if (offsets[stored] < HEADER_NBYTES).any() or (offsets > limit).any() or (sizes > limit - offsets).any():
            raise CorruptDiff("the index of a diff points outside it", where=self.path)
        # Plain lists: a chunk is looked up by scalar, and numpy's scalars cost a microsecond each.
        self.chunk_offset: list[int] = offsets.tolist()
        self.chunk_checksum: list[int] = rows["checksum"].tolist()
        self.chunk_nbytes: list[int] = rows["nbytes"].tolist()
        self.chunk_codec: list[int] = rows["codec"].tolist()
        self.chunk_flags: list[int] = rows["flags"].tolist()

    def _exactly(self, offset: int, nbytes: int) -> bytes:
        data = os.pread(self.fd, nbytes, offset)
        while len(data) < nbytes:
            more = os.pread(self.fd, nbytes - len(data), offset + len(data))
            if not more:
                raise CorruptDiff("a diff became shorter", where=self.path, detail=f"{offset + len(data)} bytes")
            data += more
        return data

    def payload(self, chunk: int) -> bytes:
        """The stored bytes of ``chunk``.

        Raises:
            CorruptDiff: the file became shorter.
            HydraError: it cannot be read.
        """
        try:
            return self._exactly(self.chunk_offset[chunk], self.chunk_nbytes[chunk])
        except OSError as error:
            raise from_oserror(error, "cannot read the diff", self.path) from error

    def close(self) -> None:
        """Close the file. No other call may be running."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where close(2) fails, the number is free, and soon another file's
            os.close(fd)

    def __enter__(self) -> DiffFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class DiffWriter:
    """Writes a diff front to back. Thread safety: one thread.

    ``append`` stores a chunk's payload under its final number, in any order of numbers; ``finish`` writes index,
    manifest and trailer. The caller owns the file: temporary name, fsync, rename.
    """

    def __init__(self, file: BinaryIO, chunk_count: int) -> None:
        self._file = file
        self._index = np.zeros(chunk_count, dtype=INDEX_ROW)
        self._written = np.zeros(chunk_count, dtype=bool)
        file.write(_HEADER.pack(MAGIC, VERSION, 0))
        self._position = HEADER_NBYTES

    def append(self, chunk: int, payload: bytes, codec: int, flags: int, checksum: int) -> None:
        """Store ``payload``; ``checksum`` is the xxh3-64 of the decoded bytes."""
        self._index[chunk] = (self._position, checksum, len(payload), codec, flags, 0)
        self._written[chunk] = True
        self._file.write(payload)
        self._position += len(payload)

    def finish(self, manifest: Manifest) -> int:
        """Write what follows the payloads; how many bytes the diff has in all."""
        if not self._written.all():
            raise AssertionError("a chunk was never written")
        index = self._index.tobytes()
        full = encode_manifest(manifest)
        packed = zstandard.ZstdCompressor(level=12, write_content_size=True).compress(full)
        trailer = Trailer(
            index_offset=self._position,
            index_nbytes=len(index),
            index_checksum=xxhash.xxh3_64_intdigest(index),
            manifest_offset=self._position + len(index),
            manifest_nbytes=len(packed),
            manifest_checksum=xxhash.xxh3_64_intdigest(packed),
            size=manifest.size,
            mtime_ns=manifest.mtime_ns,
            mode=manifest.mode,
            manifest_full_nbytes=len(full),
            sha256=manifest.sha256,
        )
        for part in (index, packed, trailer.pack()):
            self._file.write(part)
            self._position += len(part)
        return self._position
