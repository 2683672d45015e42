"""Reading files into the page cache ahead of who reads them in order.

Goal: the disk is busy while the processor is. The kernel's own read-ahead is 128 KiB on most disks, and knows
nothing of a base whose tensors lie in another order than the model's.
Rule 1: it is advice: no error of it is anyone's error, and nothing is read twice because of it.
Rule 2: what is read ahead is bounded by a window, so that it is still there when its turn comes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hydrafs.dtypes import DTYPES
from hydrafs.layout import ByteSource, FileSource
from hydrafs.manifest import PREDICTION_SAME, PREDICTION_TENSOR, SELF, Section, SpanRecord

WINDOW_NBYTES = 256 << 20
"""How far ahead of the reader: what a disk of 200 MB/s gives in the second and a half that choosing codecs takes."""
STEP_NBYTES = 8 << 20
_WORTH_A_REQUEST_NBYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Range:
    """``[offset, offset + nbytes)`` of an open file, wanted when the reader is at ``position``."""

    position: int
    fd: int
    offset: int
    nbytes: int


class Prefetch:
    """A thread that asks the kernel for ``ranges``, which come in order of ``position``.

    The files must stay open until it is closed. Thread safety: any number of threads.
    """

    def __init__(self, ranges: Iterable[Range], window_nbytes: int = WINDOW_NBYTES) -> None:
        self._window = window_nbytes
        self._reached = 0
        self._closed = False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(iter(ranges),), name="hydrafs-prefetch", daemon=True)
        self._thread.start()

    def advance(self, nbytes: int) -> None:
        """The reader is ``nbytes`` further."""
        with self._moved:
            self._reached += nbytes
            self._moved.notify()

    def _run(self, ranges: Iterator[Range]) -> None:
        for wanted in ranges:
            with self._moved:
                while wanted.position >= self._reached + self._window and not self._closed:
                    self._moved.wait()
                if self._closed:
                    return
                if wanted.position + wanted.nbytes <= self._reached:
                    continue  # the reader was faster
            try:
                os.posix_fadvise(wanted.fd, wanted.offset, wanted.nbytes, os.POSIX_FADV_WILLNEED)
            except OSError:
                return

    def close(self) -> None:
        """Stop, and wait until nothing uses the files any more."""
        with self._moved:
            self._closed = True
            self._moved.notify()
        self._thread.join()


def in_order(fd: int, nbytes: int, of_nbytes: int) -> Iterator[Range]:
    """All of a file of ``nbytes``, for a reader that comes to its end at the position ``of_nbytes``."""
    for offset in range(0, nbytes, STEP_NBYTES):
        yield Range(offset * of_nbytes // nbytes, fd, offset, min(STEP_NBYTES, nbytes - offset))


def for_coding(
    source: ByteSource, spans: Sequence[SpanRecord], sections: Sequence[Section], parents: Sequence[ByteSource]
) -> Iterator[Range]:
    """What a pass over a model reads, of the model itself and of those parents that are plain files."""
    if isinstance(source, FileSource):
        yield from _merged(in_order(source.fd, source.size, source.size), _of_parents(spans, sections, parents))
    else:
        yield from _of_parents(spans, sections, parents)


def _of_parents(
    spans: Sequence[SpanRecord], sections: Sequence[Section], parents: Sequence[ByteSource]
) -> Iterator[Range]:
    """The predicting tensors in the order of the spans; neighbours make one request, as far as a step."""
    position = 0
    last: Range | None = None
    for span in spans:
        start, position = position, position + span.nbytes
        parent = parents[span.parent] if span.parent != SELF and parents else None
        if span.prediction not in (PREDICTION_SAME, PREDICTION_TENSOR) or not isinstance(parent, FileSource):
            continue
        dtype = sections[span.section].dtype
        nbytes = span.nbytes
        if span.origin_dtype:
            nbytes = span.nbytes // DTYPES[dtype].nbytes * DTYPES[span.origin_dtype].nbytes
        for begin in range(0, nbytes, STEP_NBYTES):
            count = min(STEP_NBYTES, nbytes - begin)
            at = Range(start + span.nbytes * begin // nbytes, parent.fd, span.origin + begin, count)
            joined = (
                last is not None
                and last.fd == at.fd
                and 0 <= at.offset - (last.offset + last.nbytes) < _WORTH_A_REQUEST_NBYTES
                and at.offset + at.nbytes - last.offset < STEP_NBYTES + _WORTH_A_REQUEST_NBYTES
            )
            if joined and last is not None:
                last = Range(last.position, last.fd, last.offset, at.offset + at.nbytes - last.offset)
                continue
            if last is not None and last.nbytes >= _WORTH_A_REQUEST_NBYTES:
                yield last
            last = at
    if last is not None and last.nbytes >= _WORTH_A_REQUEST_NBYTES:
        yield last


def _merged(one: Iterator[Range], other: Iterator[Range]) -> Iterator[Range]:
    first, second = next(one, None), next(other, None)
    while first is not None or second is not None:
        if second is None or (first is not None and first.position <= second.position):
            assert first is not None
            yield first
            first = next(one, None)
        else:
            yield second
            second = next(other, None)
