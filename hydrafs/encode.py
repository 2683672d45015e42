"""Coding a model chunk by chunk, in one pass over its bytes.

Plan: one thread reads the model in file order, others take its hashes; full chunks go to a pool that predicts,
codes and checks-sums them; what comes back is written in the order it was sent.
Rule: what is in memory at once is bounded: one part-filled chunk per open section, and a few chunks per worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from hydrafs import predictors
from hydrafs.choosing import read_chunk
from hydrafs.codecs import registry
from hydrafs.containers import safetensors
from hydrafs.diff import FLAG_NARROWED, FLAG_UNPREDICTED, DiffWriter
from hydrafs.digests import Digests
from hydrafs.dtypes import DTYPES
from hydrafs.errors import Changing, ParentChanged
from hydrafs.layout import ByteSource
from hydrafs.manifest import (
    PREDICTION_SAME,
    PREDICTION_TENSOR,
    SELF,
    Manifest,
    Parent,
    SpanRecord,
    tabulate,
)
from hydrafs.plan import Plan
from hydrafs.prediction import Predictor

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Coded:
    """A chunk as it will be stored, and which spans' parts in it are the very bytes that predict them."""

    payload: bytes
    codec: int
    flags: int
    checksum: int
    different: tuple[int, ...]


def code_chunk(
    predictor: Predictor,
    section: int,
    begin: int,
    target: npt.NDArray[np.uint8],
    *,
    raw: bool,
    others: Sequence[int] = (),
) -> Coded:
    """The smallest of what the section's codec gives with and without its prediction, narrowed or not, and plain bytes.

    ``raw`` stores the bytes as they are unless nothing need be stored at all. ``others``: codecs that are tried too.
    """
    record = predictor.sections[section]
    dtype = predictor.dtype(section)
    nbytes = target.nbytes
    checksum = xxhash.xxh3_64_intdigest(target)
    pieces = predictor.pieces(section, begin, nbytes)
    prediction = predictor.predict(section, begin, nbytes, dtype)
    different: set[int] = set()
    if prediction is not None:
        if same_bytes(prediction, target):
            return Coded(b"", registry.NONE, 0, checksum, ())
        for p in pieces:
            part = slice(p.place, p.place + p.nbytes)
            if _same_type(predictor.spans[p.span]) and (
                len(pieces) == 1 or not same_bytes(prediction[part], target[part])
            ):
                different.add(p.span)
    unlike = tuple(different)
    plain = Coded(target.tobytes(), registry.by_name("raw").id, FLAG_UNPREDICTED, checksum, unlike)
    if raw:
        return plain
    best = plain
    codec = registry.by_id(record.codec)
    coded, flags = dtype, 0
    if record.narrow:
        small = predictors.narrow(target, DTYPES[record.narrow])
        if small is not None:
            coded, flags, target = DTYPES[record.narrow], FLAG_NARROWED, small
            prediction = predictor.predict(section, begin, nbytes, coded)
            if prediction is not None and same_bytes(prediction, target):
                return Coded(b"", registry.NONE, flags, checksum, unlike)
    if prediction is not None:
        payload = codec.encode(prediction, target, coded, record.params)
        best = _smaller(best, Coded(payload, codec.id, flags, checksum, unlike))
        for other in others:
            payload = registry.by_id(other).encode(prediction, target, coded, b"")
            best = _smaller(best, Coded(payload, other, flags, checksum, unlike))
    if prediction is None or len(best.payload) > 0.7 * target.nbytes:
        payload = codec.encode(None, target, coded, record.params)
        best = _smaller(best, Coded(payload, codec.id, flags | FLAG_UNPREDICTED, checksum, unlike))
        if coded.kind != "float" and codec.name != "zstd":
            zstd = registry.by_name("zstd")
            payload = zstd.encode(None, target, coded, b"")
            best = _smaller(best, Coded(payload, zstd.id, flags | FLAG_UNPREDICTED, checksum, unlike))
    return best


def _smaller(one: Coded, other: Coded) -> Coded:
    return other if len(other.payload) < len(one.payload) else one


def same_bytes(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether two arrays of the same number of bytes are equal; what differs mostly does so within its first page."""
    head, whole = 4096, one.nbytes // 8 * 8
    return (
        np.array_equal(one[:head], other[:head])
        and np.array_equal(one[:whole].view(np.uint64), other[:whole].view(np.uint64))
        and np.array_equal(one[whole:], other[whole:])
    )


def _same_type(span: SpanRecord) -> bool:
    return span.prediction in (PREDICTION_SAME, PREDICTION_TENSOR) and not span.origin_dtype


def encode_model(
    source: ByteSource,
    plan: Plan,
    parents: Sequence[ByteSource],
    writer: Callable[[int], DiffWriter],
    manifest: Manifest,
    *,
    jobs: int,
    raw: bool = False,
    progress: Progress | None = None,
    last: Callable[[], tuple[Parent, ...]] | None = None,
) -> Manifest:
    """Code all of ``source`` into the ``DiffWriter`` that ``writer(chunk_count)`` gives, and finish the diff.

    Args:
        manifest: as it will be, save for the hashes and for spans that turn out to be the very bytes of their parent.
        last: gives the parents as they are to be written, when all chunks are; what it raises ends it all.
        jobs: how many threads code.
        progress: is told how many more bytes of the model were read.

    Returns:
        The manifest as it was written.

    Raises:
        Changing: the model became shorter while it was read.
        HydraError: it or a parent cannot be read, or the diff not be written.
    """
    predictor = predictor_for(source, plan, parents, manifest)
    table = predictor.table
    output = writer(table.chunk_count)
    different: set[int] = set()
    pending: deque[tuple[int, Future[Coded]]] = deque()

    def write_one() -> None:
        chunk, future = pending.popleft()
        coded = future.result()
        different.update(coded.different)
        output.append(chunk, coded.payload, coded.codec, coded.flags, coded.checksum)

    filling: dict[int, bytearray] = {}
    sent = [0] * len(plan.sections)
    left = table.section_nbytes.tolist()
    hashes = Digests(safetensors=manifest.container == safetensors.CONTAINER)

    def taken(block: bytes | npt.NDArray[np.uint8], section: int) -> None:
        hashes.update(block)
        left[section] -= len(block)
        if progress:
            progress(len(block))

    def send(section: int, target: npt.NDArray[np.uint8]) -> None:
        others = plan.others[section] if plan.others else ()
        begin = sent[section] * plan.chunk_nbytes
        future = pool.submit(code_chunk, predictor, section, begin, target, raw=raw, others=others)
        pending.append((int(table.first_chunk[section]) + sent[section], future))
        sent[section] += 1
        while len(pending) > 3 * jobs + 2:
            write_one()

    with hashes, ThreadPoolExecutor(jobs, "hydrafs-encode") as pool:
        try:
            for number, span in enumerate(plan.spans):
                section = span.section
                offset, end = int(table.offsets[number]), int(table.offsets[number]) + span.nbytes
                while offset < end:
                    chunk = min(plan.chunk_nbytes, left[section])
                    if section not in filling and end - offset >= chunk:
                        # Most bytes of most models: a chunk of one tensor, read to where it is coded from.
                        target = np.empty(chunk, np.uint8)
                        count = source.pread_into(offset, memoryview(target))
                        if count < chunk:
                            raise Changing("a model became shorter while it was read", where=manifest.name)
                        taken(target, section)
                        send(section, target)
                    else:
                        buffer = filling.setdefault(section, bytearray())
                        count = min(end - offset, plan.chunk_nbytes - len(buffer))
                        block = source.pread(offset, count)
                        if len(block) < count:
                            raise Changing("a model became shorter while it was read", where=manifest.name)
                        taken(block, section)
                        buffer += block
                        if len(buffer) == plan.chunk_nbytes or not left[section]:
                            send(section, np.frombuffer(filling.pop(section), np.uint8))
                    offset += count
            while pending:
                write_one()
            sha256, others = hashes.finish()
        except BaseException:
            for _, future in pending:
                future.cancel()
            raise
    spans = tuple(
        msgspec.structs.replace(span, prediction=PREDICTION_SAME)
        if _same_type(span) and number not in different and span.parent != SELF
        else span
        for number, span in enumerate(plan.spans)
    )
    known = last() if last else manifest.parents
    complete = msgspec.structs.replace(manifest, spans=spans, sha256=sha256, parents=known, hashes=others)
    output.finish(complete)
    return complete


def predictor_for(source: ByteSource, plan: Plan, parents: Sequence[ByteSource], manifest: Manifest) -> Predictor:
    """What predicts the chunks of ``plan`` while the model is there in full: ``source`` itself and its parents."""

    def read_parent(parent: int, offset: int, out: memoryview) -> None:
        origin = source if parent == SELF else parents[parent]
        if origin.pread_into(offset, out) != out.nbytes:
            name = manifest.name if parent == SELF else manifest.parents[parent].name
            raise ParentChanged("a parent became shorter", where=name)

    return Predictor(plan.spans, plan.sections, tabulate(manifest, manifest.name), read_parent, plan.formulas)


def estimate(
    source: ByteSource, plan: Plan, parents: Sequence[ByteSource], manifest: Manifest, samples: int = 24
) -> float:
    """What share of the model will be stored, from ``samples`` chunks spread over it.

    For deciding whether there is room and whether it is worth it; some per cent off at times.
    """
    predictor = predictor_for(source, plan, parents, manifest)
    table = predictor.table
    total = stored = 0
    if not table.chunk_count:
        return 0.0
    for number in sorted({(table.chunk_count - 1) * i // max(1, samples - 1) for i in range(samples)}):
        section, place = table.chunk_section(number)
        begin = place * plan.chunk_nbytes
        nbytes = min(plan.chunk_nbytes, int(table.section_nbytes[section]) - begin)
        coded = code_chunk(predictor, section, begin, read_chunk(source, predictor, section, begin, nbytes), raw=False)
        total += nbytes
        stored += len(coded.payload)
    return stored / total if total else 0.0
