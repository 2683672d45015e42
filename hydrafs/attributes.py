"""What a file of the mount looks like from outside: what stat(2) answers, and a line of a listing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attributes:
    """The answer to stat(2). ``mode`` has the file type in it, ``blocks`` counts 512 bytes, times are nanoseconds."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    ino: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    blocks: int
    rdev: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a directory: ``mode`` needs only the file type, ``ino`` is what ``Attributes`` will say."""

    name: str
    mode: int
    ino: int
