"""Diff to full file, diff to uncompressed diff, and the proof that a diff still gives its model.

Rule 1: what is written has the model's SHA-256, or nothing stands under its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from hydrafs import keeping
from hydrafs.cache import ChunkCache
from hydrafs.choosing import features_of
from hydrafs.codecs import registry
from hydrafs.diff import TRAILER_NBYTES, DiffWriter, read_trailer, set_attributes
from hydrafs.digests import AHEAD, Lane
from hydrafs.encode import encode_model
from hydrafs.errors import AlreadyThere, NoSpace, UsageError, VerifyFailed, from_oserror
from hydrafs.fileattributes import carry
from hydrafs.manifest import PREDICTION_SAME, PREDICTION_TENSOR
from hydrafs.opening import Opener
from hydrafs.plan import Plan
from hydrafs.prefetch import Prefetch, in_order
from hydrafs.readahead import DecodePool, Reader
from hydrafs.rehydrate import Rehydrated
from hydrafs.replacing import take_name
from hydrafs.store import ModelEntry, Store, listed_name
from hydrafs.temporary import TemporaryFile

Progress = Callable[[int], None]
_READ_NBYTES = 1 << 20
_CACHE_NBYTES = 96 << 20


def read_all(model: Rehydrated, take: Callable[[memoryview], object], progress: Progress | None = None) -> bytes:
    """Give every byte of ``model`` to ``take`` in order, decoding ahead on all cores; their SHA-256."""
    digest = hashlib.sha256()
    with contextlib.closing(Lane("sha256")) as lane:

        def taken(block: memoryview) -> None:
            lane.take(digest.update, block)
            take(block)

        read_blocks(model, taken, progress)
        lane.drain()
    return digest.digest()


def read_blocks(model: Rehydrated, take: Callable[[memoryview], object], progress: Progress | None = None) -> None:
    """``read_all`` without the SHA-256. A block stands while ``AHEAD`` more are given, as lanes need it."""
    blocks = [memoryview(bytearray(_READ_NBYTES)) for _ in range(AHEAD + 1)]
    position = 0
    with contextlib.closing(DecodePool()) as pool:
        reader = Reader(model, pool)
        for block in itertools.cycle(blocks):
            if position >= model.size:
                break
            count = reader.pread_into(position, block)
            take(block[:count])
            position += count
            if progress:
                progress(count)


def prove(store: Store, diff: Path, progress: Progress | None = None, digest: bytes | None = None) -> bytes:
    """Decode all of ``diff`` from disk and compare its SHA-256 with ``digest`` (default: the one that it states).

    Raises:
        VerifyFailed: another SHA-256 came out.
        HydraError: a chunk, a parent or the file itself is not as it should be.
    """
    opener = Opener(store, ChunkCache(_CACHE_NBYTES))
    with contextlib.closing(opener), contextlib.closing(opener.open_diff(diff)) as model:
        # What the page cache holds of the diff is not what the disk holds.
        os.posix_fadvise(model.diff.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.closing(Prefetch(in_order(model.diff.fd, model.diff.size, model.size))) as ahead:

            def read(nbytes: int) -> None:
                ahead.advance(nbytes)
                if progress:
                    progress(nbytes)

            found = read_all(model, lambda block: None, read)
        expected = digest or model.manifest.sha256
        if found != expected:
            raise _another(diff, found, expected)
        return found


def _another(diff: Path, found: bytes, expected: bytes) -> VerifyFailed:
    return VerifyFailed(
        "a diff does not give its model back",
        where=diff,
        detail=f"SHA-256 {found.hex()}, expected {expected.hex()}",
        remedy="restore its parents or the diff; check the memory and the disk of this machine",
    )


@dataclass(frozen=True, slots=True)
class Restored:
    """A full file that was written."""

    path: Path
    size: int
    sha256: bytes


def rehydrate(
    store: Store,
    entry: ModelEntry,
    output: Path | None = None,
    *,
    progress: Progress | None = None,
    instead: bool = False,
) -> Restored:
    """Write the model of a diff as a full file, with its mode, mtime, extended attributes and, as far as we may, its
    owner; the diff stays, unless told so.

    Args:
        output: where to (default: under the model's name, beside the diff). A folder gets the model's name in it.
        instead: it takes the place of the diff, which goes.

    Raises:
        AlreadyThere: a file of that name exists.
        HydraError: as for opening the model; nothing is left under the name.
    """
    if not entry.is_diff:
        raise UsageError("not a diff", where=entry.path, remedy="it is a full file already")
    listed = listed_name(entry.path.name)
    target = output or entry.path.with_name(listed)
    if target.is_dir():
        target /= listed
    if os.path.lexists(target):
        raise AlreadyThere("a file of that name exists", where=target, remedy="name another with --output")
    opener = Opener(store, ChunkCache(_CACHE_NBYTES))
    with contextlib.closing(opener), contextlib.closing(opener.open_diff(entry.path)) as model:
        _check_space(target.parent, model.size, target)
        with TemporaryFile(target.parent) as temporary:
            try:
                found = read_all(model, temporary.file.write, progress)
                temporary.file.flush()
                fd = temporary.file.fileno()
                carry(model.diff.fd, fd, model.diff.trailer.mode)
                mtime_ns = model.diff.trailer.mtime_ns
                os.utime(fd, ns=(model.diff.stat.st_atime_ns if instead else mtime_ns, mtime_ns))
            except OSError as error:
                raise from_oserror(error, "cannot write the model", target) from error
            if found != model.manifest.sha256:
                raise _another(entry.path, found, model.manifest.sha256)
            if instead:
                take_name(store, temporary, target)
            else:
                temporary.commit(target)
        return Restored(target, model.size, found)


def carry_over(source: int, target: int) -> None:
    """Give the open file ``target`` the owner and the extended attributes of ``source``, as far as we may."""
    carry(source, target)


def change_attributes(path: Path, *, mode: int, mtime_ns: int) -> None:
    """Change the mode and mtime that the model of the diff at ``path`` is served with.

    They are set beside the diff where its filesystem can (``hydrafs.diff``, rule 4). Elsewhere a copy of the diff with
    another trailer takes its place.

    Raises:
        HydraError: the diff stands as it stood.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if set_attributes(fd, os.fspath(path), mode=mode, mtime_ns=mtime_ns):
                return
            trailer = replace(read_trailer(fd, os.fspath(path)), mode=mode, mtime_ns=mtime_ns)
            stat = os.fstat(fd)
            with TemporaryFile(path.parent) as temporary:
                position, end = 0, stat.st_size - TRAILER_NBYTES
                while position < end:
                    block = os.pread(fd, min(_READ_NBYTES, end - position), position)
                    temporary.file.write(block)
                    position += len(block)
                temporary.file.write(trailer.pack())
                temporary.file.flush()
                carry_over(fd, temporary.file.fileno())
                os.fchmod(temporary.file.fileno(), stat.st_mode & 0o7777)
                temporary.commit(path, replace=True)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_oserror(error, "cannot change the attributes of a diff", path) from error


def uncompress(store: Store, entry: ModelEntry, *, jobs: int, progress: Progress | None = None) -> tuple[int, int]:
    """Recode a diff so that each chunk is stored as it is: the fastest to read. Its size in bytes before and after.

    What a parent holds byte for byte is still not stored. The old diff stays until the new one has been proved.
    """
    if not entry.is_diff:
        raise UsageError("not a diff", where=entry.path, remedy="it is a full file already")
    opener = Opener(store, ChunkCache(_CACHE_NBYTES))
    with contextlib.closing(opener), contextlib.closing(opener.open_diff(entry.path)) as model:
        manifest = model.manifest
        raw = registry.by_name("raw").id
        plan = Plan(
            tuple(
                msgspec.structs.replace(s, prediction=PREDICTION_TENSOR) if s.prediction == PREDICTION_SAME else s
                for s in manifest.spans
            ),
            tuple(msgspec.structs.replace(s, codec=raw, params=b"", narrow="") for s in manifest.sections),
            manifest.chunk_nbytes,
            formulas=manifest.formulas,
        )
        trailer = model.diff.trailer
        changed = msgspec.structs.replace(
            manifest,
            required=features_of(plan),
            spans=plan.spans,
            sections=plan.sections,
            mode=trailer.mode,
            mtime_ns=trailer.mtime_ns,
        )
        _check_space(entry.path.parent, model.size, entry.path)
        with TemporaryFile(entry.path.parent) as temporary:
            try:
                recoded = encode_model(
                    model,
                    plan,
                    [p.source for p in model.parents],
                    lambda count: DiffWriter(temporary.file, count),
                    changed,
                    jobs=jobs,
                    raw=True,
                    progress=progress,
                )
                temporary.flush_to_disk()
                os.fchmod(temporary.file.fileno(), model.diff.stat.st_mode & 0o7777)
                after = os.fstat(temporary.file.fileno()).st_size
            except OSError as error:
                raise from_oserror(error, "cannot write the diff", entry.path) from error
            if recoded.sha256 != manifest.sha256:
                raise _another(entry.path, recoded.sha256, manifest.sha256)
            prove(store, temporary.path, digest=manifest.sha256)
            temporary.commit(entry.path, replace=True)
            if keeping.place_of(store.held, manifest.sha256, is_diff=True).exists():
                keeping.hold(store, entry.path, manifest.sha256)  # the old diff would take its space for nothing
        return model.diff.size, after


def _check_space(folder: Path, nbytes: int, where: Path) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise from_oserror(error, "cannot write in", folder) from error
    if free < nbytes:
        raise NoSpace(
            "not enough space",
            where=where,
            detail=f"{free / 1e6:.0f} MB free in {folder}, {nbytes / 1e6:.0f} MB needed",
        )
