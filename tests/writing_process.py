"""Another process that can write to a file, as tests need it: it holds the file in some way and writes when told.

``python writing_process.py PATH HOW`` says ``ready`` and does what it reads, a line each: ``write OFFSET BYTE``, or
``close``.
``HOW``: ``descriptor`` open for reading and writing; ``append`` open for writing alone; ``mapping`` a shared writable
mapping whose descriptor was closed; ``dirty`` the same, with a byte of each page written (to what it was) beforehand;
``promise`` a mapping for reading alone of a descriptor that was open for writing, made writable when it is to write.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOWS = ("descriptor", "append", "mapping", "dirty", "promise")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class WritingProcess:
    """The process, as the test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, line: str) -> None:
        """Let it do something, and wait until it has."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def write(self, offset: int, byte: int) -> None:
        """Write one byte."""
        self.tell(f"write {offset} {byte}")


@contextlib.contextmanager
def writing(path: Path, how: str) -> Iterator[WritingProcess]:
    """Another process that holds ``path`` in that way, until the end."""
    command = [sys.executable, __file__, os.fspath(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield WritingProcess(process)
        finally:
            process.kill()


def _main(path: str, how: str) -> None:
    fd = os.open(path, os.O_WRONLY if how == "append" else os.O_RDWR)
    size = os.fstat(fd).st_size
    address = 0
    if how in ("mapping", "dirty", "promise"):
        protection = mmap.PROT_READ if how == "promise" else mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        os.close(fd)
        if how == "dirty":
            for offset in range(0, size, mmap.PAGESIZE):
                place = ctypes.c_ubyte.from_address(address + offset)
                place.value = place.value
    print("ready", flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "write":
            offset, byte = map(int, numbers)
            if how == "promise":
                assert _libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            if address:
                ctypes.c_ubyte.from_address(address + offset).value = byte
            else:
                os.pwrite(fd, bytes([byte]), offset)
        elif address:
            _libc.munmap(address, size)
        else:
            os.close(fd)
        print("done", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
