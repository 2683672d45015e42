"""Which file a file is: by what the filesystem says of it, by samples of it, and by all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from hydrafs.errors import Changing
from hydrafs.layout import ByteSource

PROBE_BLOCKS = 32
PROBE_BLOCK_NBYTES = 4096
_READ_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a filesystem says of a file. Equal identities of one path: the same content, as far as can be known without
    reading it. ``ctime_ns`` is in it because a program can set mtime back, and cannot set ctime."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileIdentity:
        """The identity in a stat result."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


def is_unchanged(before: os.stat_result, now: os.stat_result) -> bool:
    """Whether a file is what it was: of the same identity, or of one that differs by a link made or gone since.
    Links change the ctime of a file, and whoever holds a parent makes one at any time (``hydrafs.keeping``)."""
    then, found = FileIdentity.of(before), FileIdentity.of(now)
    linked = before.st_nlink != now.st_nlink
    return found == then or (linked and dataclasses.replace(found, ctime_ns=then.ctime_ns) == then)


def probe(source: ByteSource) -> int:
    """The xxh3-64 of 32 blocks of 4 KiB, spread evenly from the first byte to the last, and the size.

    Tells one model from another in a millisecond; proves nothing. A source of up to 128 KiB is hashed whole.
    """
    size = source.size
    state = xxhash.xxh3_64(size.to_bytes(8, "little"))
    if size <= PROBE_BLOCKS * PROBE_BLOCK_NBYTES:
        state.update(source.pread(0, size))
    else:
        for block in range(PROBE_BLOCKS):
            offset = (size - PROBE_BLOCK_NBYTES) * block // (PROBE_BLOCKS - 1)
            state.update(source.pread(offset, PROBE_BLOCK_NBYTES))
    return state.intdigest()


def sha256(source: ByteSource, progress: Callable[[int], None] | None = None) -> bytes:
    """The SHA-256 of all bytes; ``progress`` is told how many more were read.

    Raises:
        Changing: the source gave fewer bytes than it has.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ_NBYTES, max(1, source.size))))
    position = 0
    while position < source.size:
        count = source.pread_into(position, buffer)
        if count == 0:
            raise Changing("a file became shorter", detail=f"{position} bytes, expected {source.size}")
        digest.update(buffer[:count])
        position += count
        if progress:
            progress(count)
    return digest.digest()
