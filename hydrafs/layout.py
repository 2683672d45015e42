"""A model file as an ordered list of spans.

Goal: say which bytes of a file are numbers, of which type, and under which names; nothing more.
Rule 1: the spans of a layout cover ``[0, size)`` in order, with no gap and no overlap.
Rule 2: what is not surely numbers is literal.
Rule 3: layouts are frozen; whoever makes one proves rules 1 and 2 by making it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel, Changing, from_oserror


@runtime_checkable
class ByteSource(Protocol):
    """Bytes that can be read from anywhere: a file, a buffer, a diff that is rehydrated as it is read.

    Thread safety: ``pread`` and ``pread_into`` may be called from any number of threads at once.
    """

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``: all of them, save at the end of the source."""
        ...

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` (one-dimensional, writable bytes) from ``offset``; how many bytes were there."""
        ...

    def close(self) -> None:
        """Let go of what the source holds."""
        ...


def read_exactly(source: ByteSource, offset: int, nbytes: int) -> bytes:
    """``nbytes`` bytes from ``offset``, of a source that was known to have them.

    Raises:
        Changing: it has fewer: another file has its name by now, or it was cut.
    """
    data = source.pread(offset, nbytes)
    if len(data) != nbytes:
        where = getattr(source, "path", "")
        raise Changing("a file became shorter", where=where, detail=f"{source.size} bytes, expected {offset + nbytes}")
    return data


class BytesSource:
    """A ``ByteSource`` over a buffer in memory. Thread safety: free of shared state."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data).cast("B")

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._view.nbytes

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``; fewer only at the end."""
        return bytes(self._view[offset : offset + max(0, nbytes)])

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; how many bytes were there."""
        piece = self._view[offset : offset + out.nbytes]
        out[: piece.nbytes] = piece
        return piece.nbytes

    def close(self) -> None:
        """Let go of what is held."""
        return


class FileSource:
    """A ``ByteSource`` over a plain file, opened once and read with ``pread(2)``.

    Raises a ``HydraError`` when the file cannot be opened or read, or became shorter than it was when opened.
    Thread safety: any number of readers; ``close`` when no reader is left.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, "cannot open", self.path) from error
        try:
            self.stat = os.fstat(self.fd)
        except OSError as error:
            os.close(self.fd)
            raise from_oserror(error, "cannot open", self.path) from error
        self._size = self.stat.st_size

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._size

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``; fewer only at the end."""
        nbytes = max(0, min(nbytes, self._size - offset))
        try:
            data = os.pread(self.fd, nbytes, offset)
            while len(data) < nbytes:  # a signal or a network filesystem may cut a read short
                more = os.pread(self.fd, nbytes - len(data), offset + len(data))
                if not more:
                    raise self._shorter(offset + len(data))
                data += more
        except OSError as error:
            raise from_oserror(error, "cannot read", self.path) from error
        return data

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; how many bytes were there."""
        nbytes = max(0, min(out.nbytes, self._size - offset))
        done = 0
        try:
            while done < nbytes:
                count = os.preadv(self.fd, [out[done:nbytes]], offset + done)
                if count == 0:
                    raise self._shorter(offset + done)
                done += count
        except OSError as error:
            raise from_oserror(error, "cannot read", self.path) from error
        return done

    def _shorter(self, end: int) -> Changing:
        return Changing("a file became shorter", where=self.path, detail=f"{end} bytes, {self._size} when opened")

    def close(self) -> None:
        """Let go of what is held."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where close(2) fails, the number is free, and soon another file's
            os.close(fd)

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range ``[offset, offset + nbytes)`` of a model.

    ``dtype`` is a name of ``hydrafs.dtypes.DTYPES`` for numbers and empty for literal bytes. ``name`` is the tensor
    that the numbers are known by (a storage's first tensor where several views share it), ``aliases`` the other names,
    ``shape`` the tensor's shape where it fills the span, else the flat shape.
    """

    offset: int
    nbytes: int
    dtype: str = ""
    name: str = ""
    shape: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0:
            raise BadModel("a span has a negative range", where=self.name)
        if self.dtype:
            if self.dtype not in DTYPES:
                raise BadModel("a span has an unknown dtype", where=self.name, detail=self.dtype)
            if self.nbytes % DTYPES[self.dtype].nbytes:
                raise BadModel("a span is no whole number of elements", where=self.name)

    @property
    def end(self) -> int:
        """Where the span ends: the first byte that is not in it."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a program that loads the model gets it: contiguous elements of ``dtype`` from ``offset`` on in the
    file. Several may lie in one span (tied weights, views of a storage), and an empty one in none."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.elements * DTYPES[self.dtype].nbytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed model: ``spans`` cover ``[0, size)``. ``container`` is the format's name (``safetensors``,
    ``torch-zip``, ``torch-legacy``, ``opaque``). ``metadata`` holds the few strings a container
    carries for its readers (bounded). ``views``: the tensors that lie in the spans as they are, in the container's
    order; ``strided``: the names of those that do not (transposed, expanded, of unknown type)."""

    container: str
    size: int
    spans: tuple[Span, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    views: tuple[View, ...] = ()
    strided: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        position = 0
        for span in self.spans:
            if span.offset != position or span.nbytes == 0:
                raise BadModel("spans do not follow each other", detail=f"{span.offset}, expected {position}")
            position = span.end
        if position != self.size:
            raise BadModel("spans do not cover the model", detail=f"{position} bytes of {self.size}")

    @property
    def tensors(self) -> tuple[Span, ...]:
        """The spans that are numbers, in file order."""
        return tuple(span for span in self.spans if span.dtype)


def plain_text(text: str) -> str:
    """``text`` with lone surrogates, which no UTF-8 holds, written as escapes: file and tensor names may have them."""
    return text.encode("utf-8", "backslashreplace").decode()


def cover(
    container: str,
    size: int,
    numbers: Iterable[Span],
    metadata: Iterable[tuple[str, str]] = (),
    views: Iterable[View] = (),
    strided: Iterable[str] = (),
) -> Layout:
    """A layout from the spans that are numbers: what lies between them becomes literal.

    Empty spans are left out. A span that overlaps an earlier one or leaves the file is dropped, so its bytes are
    literal (or stay part of the earlier one): doubt costs bytes, never correctness.
    """
    spans: list[Span] = []
    position = 0
    for span in sorted(numbers, key=lambda s: (s.offset, s.nbytes)):
        if span.nbytes == 0 or span.offset < position or span.end > size:
            continue
        if span.offset > position:
            spans.append(Span(position, span.offset - position))
        spans.append(_named_plainly(span))
        position = span.end
    if position < size:
        spans.append(Span(position, size - position))
    plain = ((plain_text(key), plain_text(value)) for key, value in metadata)
    named = (replace(view, name=plain_text(view.name)) for view in views if view.offset + view.nbytes <= size)
    return Layout(container, size, tuple(spans), tuple(plain), tuple(named), tuple(map(plain_text, strided)))


def _named_plainly(span: Span) -> Span:
    names = (span.name, *span.aliases)
    plain = tuple(map(plain_text, names))
    return span if plain == names else replace(span, name=plain[0], aliases=plain[1:])
