"""Random access to a diff as the model that it stands for.

Goal: any byte range of the model, decoding only the chunks that hold it.
Rule 1: a decoded chunk is checked against its stored xxh3 before a byte of it leaves.
Rule 2: a ``same`` span is read straight from its parent only while that parent is *proven* (its SHA-256 is known for
        the very file that is open, and nobody can write to it), and still is after the read; otherwise it goes through
        a chunk and its checksum like everything else.
Rule 3: no lock is held while decoding or reading.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from hydrafs import predictors
from hydrafs.cache import Chunk, ChunkCache
from hydrafs.codecs import registry
from hydrafs.diff import FLAG_NARROWED, FLAG_UNPREDICTED, DiffFile
from hydrafs.dtypes import DTYPES
from hydrafs.errors import CorruptChunk, HydraError, ParentChanged
from hydrafs.layout import ByteSource
from hydrafs.manifest import PREDICTION_SAME, SELF, parents_of
from hydrafs.prediction import Predictor


@dataclass(frozen=True, slots=True)
class OpenParent:
    """A parent as it stands open: where its bytes come from, and whether its SHA-256 is known to be the right one.

    ``proven`` is asked before and after every read: the proof may be found while the diff is open, and somebody may
    open the parent for writing at any moment.
    """

    source: ByteSource
    proven: Callable[[], bool]
    name: str


class Rehydrated:
    """A ``ByteSource`` over a diff and its open parents. ``UnsupportedDiff`` where it uses a codec unknown here.

    Owns the diff and the parents' sources and closes them with its last share (``retain``). Thread safety: any number
    of readers, each of whom holds a share.
    """

    def __init__(self, diff: DiffFile, parents: Sequence[OpenParent], cache: ChunkCache) -> None:
        for codec in set(diff.chunk_codec) - {registry.NONE}:
            registry.by_id(codec)  # what cannot be read is refused when it is opened
        self.diff = diff
        self.manifest = manifest = diff.manifest
        self._parents = tuple(parents)
        self._cache = cache
        self._lock = threading.Lock()
        self._shares = 1
        self._key: Hashable = diff.identity
        self._chunk_nbytes = manifest.chunk_nbytes
        table = diff.table
        self._predictor = Predictor(manifest.spans, manifest.sections, table, self._read_parent, manifest.formulas)
        # Plain lists, as in DiffFile: these are looked up one by one.
        self._offsets: list[int] = table.offsets.tolist()
        self._in_section: list[int] = table.in_section.tolist()
        self._first_chunk: list[int] = table.first_chunk.tolist()
        self._section_nbytes: list[int] = table.section_nbytes.tolist()

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.manifest.size

    @property
    def parents(self) -> tuple[OpenParent, ...]:
        """The open parents, in the manifest's order."""
        return self._parents

    @property
    def cache_budget_nbytes(self) -> int:
        """How many bytes of decoded chunks the cache keeps at most."""
        return self._cache.budget_nbytes

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``; fewer only at the end."""
        nbytes = max(0, min(nbytes, self.size - offset))
        out = bytearray(nbytes)
        self.pread_into(offset, memoryview(out))
        return bytes(out)

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` with the model's bytes from ``offset``; how many there were.

        Raises:
            CorruptChunk: a chunk did not decode to what was stored.
            HydraError: a parent or the diff cannot be read.
        """
        nbytes = max(0, min(out.nbytes, self.size - offset))
        end = offset + nbytes
        position = offset
        number = bisect_right(self._offsets, offset) - 1
        while position < end:
            span = self.manifest.spans[number]
            start = self._offsets[number]
            stop = min(end, start + span.nbytes)
            piece = out[position - offset : stop - offset]
            if span.prediction == PREDICTION_SAME and self._straight(number):
                self._read_parent(span.parent, span.origin + position - start, piece)
                if not self._straight(number):
                    self._copy_from_chunks(number, position - start, piece)
            else:
                self._copy_from_chunks(number, position - start, piece)
            position = stop
            number += 1
        return nbytes

    def _straight(self, number: int) -> bool:
        span = self.manifest.spans[number]
        return span.parent != SELF and self._parents[span.parent].proven()

    def _copy_from_chunks(self, number: int, begin: int, out: memoryview) -> None:
        chunk_nbytes = self._chunk_nbytes
        section = self.manifest.spans[number].section
        place = self._in_section[number] + begin
        done = 0
        while done < out.nbytes:
            chunk_number, inside = divmod(place + done, chunk_nbytes)
            chunk = self.chunk(self._first_chunk[section] + chunk_number)
            count = min(out.nbytes - done, chunk.nbytes - inside)
            out[done : done + count] = memoryview(chunk)[inside : inside + count]
            done += count

    def chunk(self, number: int) -> Chunk:
        """The decoded bytes of a chunk, from the cache or made now; not to be written to."""
        return self._cache.get((self._key, number), lambda: self._decode(number))

    def is_cached(self, number: int) -> bool:
        """Whether a chunk is in the cache, or being decoded."""
        return self._cache.has((self._key, number))

    def chunks_between(self, offset: int, end: int) -> list[int]:
        """The chunks that a read of ``[offset, end)`` would decode, in file order, each once."""
        found: dict[int, None] = {}
        number = bisect_right(self._offsets, offset) - 1
        end = min(end, self.size)
        while offset < end:
            span = self.manifest.spans[number]
            start = self._offsets[number]
            stop = min(end, start + span.nbytes)
            if not (span.prediction == PREDICTION_SAME and self._straight(number)):
                base = self._first_chunk[span.section]
                first = (self._in_section[number] + offset - start) // self._chunk_nbytes
                last = (self._in_section[number] + stop - 1 - start) // self._chunk_nbytes
                found.update(dict.fromkeys(range(base + first, base + last + 1)))
            offset = stop
            number += 1
        return list(found)

    def tensor_range(self, offset: int) -> tuple[int, int]:
        """The range of the span that holds ``offset``, where it is numbers; an empty range for literal bytes."""
        number = bisect_right(self._offsets, offset) - 1
        span = self.manifest.spans[number]
        if not self.manifest.sections[span.section].dtype:
            return offset, offset
        return self._offsets[number], self._offsets[number] + span.nbytes

    def _decode(self, number: int) -> Chunk:
        diff = self.diff
        section_number, place = diff.table.chunk_section(number)
        section = self.manifest.sections[section_number]
        dtype = self._predictor.dtype(section_number)
        begin = place * self._chunk_nbytes
        nbytes = min(self._chunk_nbytes, self._section_nbytes[section_number] - begin)
        flags, codec_id = diff.chunk_flags[number], diff.chunk_codec[number]
        coded = dtype
        if flags & FLAG_NARROWED:
            if not section.narrow:
                raise self._corrupt(number, "narrowed in a section that is not")
            coded = DTYPES[section.narrow]
        try:
            prediction = None
            if not flags & FLAG_UNPREDICTED:
                prediction = self._predictor.predict(section_number, begin, nbytes, coded)
            if codec_id == registry.NONE:
                if prediction is None or diff.chunk_nbytes[number]:
                    raise self._corrupt(number, "nothing is stored and nothing predicts it")
                out = prediction
            else:
                out = np.empty(nbytes // dtype.nbytes * coded.nbytes, dtype=np.uint8)
                params = section.params if codec_id == section.codec else b""
                payload = diff.payload(number)
                registry.by_id(codec_id).decode_into(prediction, payload, out, coded, params)
            if coded is not dtype:
                out = predictors.widen(out, coded, dtype)
        except CorruptChunk as error:
            raise self._corrupt(number, error.detail or error.what) from None
        if out.nbytes != nbytes or xxhash.xxh3_64_intdigest(out) != diff.chunk_checksum[number]:
            raise self._damaged(number, section_number, begin, nbytes)
        out.flags.writeable = False
        return out

    def _read_parent(self, parent: int, offset: int, out: memoryview) -> None:
        source: ByteSource = self if parent == SELF else self._parents[parent].source
        if source.pread_into(offset, out) != out.nbytes:
            name = self.manifest.name if parent == SELF else self._parents[parent].name
            raise ParentChanged("a parent is too short", where=name, remedy="restore the parent")

    def _corrupt(self, number: int, detail: str) -> CorruptChunk:
        return CorruptChunk(f"chunk {number} of a diff cannot be decoded", where=self.diff.path, detail=detail)

    def _damaged(self, number: int, section: int, begin: int, nbytes: int) -> HydraError:
        spans = [self.manifest.spans[piece.span] for piece in self._predictor.pieces(section, begin, nbytes)]
        names = [s.name for s in spans if s.name][:2]
        inside = f" (in {', '.join(names)})" if names else ""
        unproven = [
            self._parents[number].name
            for number in sorted({parent for span in spans for parent in parents_of(span)})
            if not self._parents[number].proven()
        ]
        if unproven:
            return ParentChanged(
                f"chunk {number} of {self.diff.path} does not come out as it was stored{inside}",
                where=unproven[0],
                detail="this parent may have changed, or the diff is damaged",
                remedy="restore the parent, or run hydrafs verify on the store",
            )
        return self._corrupt(number, f"its checksum does not agree{inside}")

    def retain(self) -> None:
        """Take a share in the model: each share needs one ``close``, and the last one closes the files."""
        with self._lock:
            self._shares += 1

    def close(self) -> None:
        """Give a share back; the last one closes the diff and the parents."""
        with self._lock:
            self._shares -= 1
            if self._shares:
                return
        with contextlib.ExitStack() as closing:  # all of them, also where one fails
            for parent in self._parents:
                closing.callback(parent.source.close)
            closing.callback(self.diff.close)

    def __enter__(self) -> Rehydrated:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
