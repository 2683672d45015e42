"""Making the model of a recipe: a virtual one, which is a diff of formulas, or a real file. The same bits either way.

Rule 1: what is written is proved like any diff: read back from disk, it gives the SHA-256 that was computed.
Rule 2: until then nothing stands under its name; the models that it is computed from are held meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from hydrafs.assembling import TORCH_ZIP, Skeleton, container_for, safetensors_skeleton, torch_zip_skeleton
from hydrafs.basehash import BaseHashes
from hydrafs.choosing import features_of
from hydrafs.committing import all_stand, calm, disk_errors, hold, keep_parents
from hydrafs.diff import SUFFIX, DiffWriter
from hydrafs.dtypes import DTYPES
from hydrafs.encode import encode_model
from hydrafs.errors import AlreadyThere, NoSpace, UsageError
from hydrafs.formulas import result_dtype
from hydrafs.layout import FileSource
from hydrafs.manifest import Manifest, Parent
from hydrafs.matching import Computed, Match
from hydrafs.plan import DEFAULT_CHUNK_NBYTES, make_plan
from hydrafs.recipes import Part, Recipe, elements_of
from hydrafs.rehydrate import Rehydrated
from hydrafs.restore import prove
from hydrafs.store import ModelEntry, Store, is_private
from hydrafs.temporary import TemporaryFile
from hydrafs.version import __version__

_BLOCK_NBYTES = 4 << 20
_SPACE_MARGIN_NBYTES = 16 << 20

Stage = Literal["compute", "hash", "encode", "prove", "write"]
Progress = Callable[[Stage, int, int], None]
"""``progress(stage, nbytes, total)``: so many more bytes of the stage's total are done."""


@dataclass(frozen=True, slots=True)
class Made:
    """A model that was made: under which name it is listed, where its bytes are, and what it takes on disk."""

    path: Path
    stored_in: Path
    size: int
    stored_nbytes: int
    sha256: bytes
    recipe: Recipe


class ComputedModel:
    """A ``ByteSource`` over a recipe and the container around it: every byte is computed when it is read.

    Thread safety: any number of readers.
    """

    def __init__(self, recipe: Recipe, skeleton: Skeleton) -> None:
        self._recipe = recipe
        self.skeleton = skeleton

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.skeleton.size

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset``; fewer only at the end."""
        end = min(self.size, offset + max(0, nbytes))
        if offset >= end:
            return b""
        return b"".join(self._piece(*found) for found in self.skeleton.between(offset, end))

    def _piece(self, piece: bytes | int, start: int, stop: int) -> bytes:
        if isinstance(piece, bytes):
            return piece[start:stop]
        size = DTYPES[self.skeleton.tensors[piece].dtype].nbytes
        first, last = start // size, -(-stop // size)
        return elements_of(self._recipe, piece, first, last - first)[start - first * size : stop - first * size]

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset``; how many bytes there were."""
        data = self.pread(offset, out.nbytes)
        out[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Nothing: the recipe's models belong to whoever opened them."""


def make_virtual(
    store: Store,
    recipe: Recipe,
    entries: Sequence[ModelEntry],
    target: Path,
    *,
    jobs: int,
    progress: Progress,
    folders: Sequence[Path] = (),
) -> Made:
    """Write the recipe as a diff, so that the model is listed as ``target``: formulas, and no residual but for tensors
    that formulas do not give.

    Args:
        entries: the models of the recipe, in its order.
        folders: stores that some of them are in, and this one is not: the store's base folders from then on.

    Raises:
        AlreadyThere: something stands under that name.
        HydraError: a model cannot be read, or the diff not be written; nothing is left.
    """
    diff = target.with_name(target.name + SUFFIX)
    check_target(target)
    sources = [model.source for model in recipe.models]
    opened = [source for source in sources if isinstance(source, FileSource | Rehydrated)]
    calm(opened, look=True, doubt=True)
    hold(opened)
    records, number, used = _parents(store, recipe, entries, progress)
    model = ComputedModel(recipe, _skeleton(recipe, target.name, jobs, progress))
    matches = [_match(part, number) for part in recipe.parts if part.tensor.nbytes]
    plan = make_plan(model, model.skeleton.layout(), matches, chunk_nbytes=DEFAULT_CHUNK_NBYTES)
    mode = _mode(recipe)
    manifest = Manifest(
        required=features_of(plan),
        name=target.name,
        size=model.size,
        sha256=bytes(32),
        mode=mode,
        mtime_ns=time.time_ns(),
        container=model.skeleton.container,
        chunk_nbytes=plan.chunk_nbytes,
        parents=tuple(records),
        sections=plan.sections,
        spans=plan.spans,
        metadata=model.skeleton.metadata,
        writer=f"hydrafs {__version__}",
        formulas=plan.formulas,
    )

    def encoded(nbytes: int) -> None:
        calm(opened, doubt=True)
        progress("encode", nbytes, model.size)

    with TemporaryFile(target.parent) as temporary, disk_errors(diff):
        manifest = encode_model(
            model,
            plan,
            [sources[i] for i in used],
            lambda count: DiffWriter(temporary.file, count),
            manifest,
            jobs=jobs,
            progress=encoded,
        )
        temporary.flush_to_disk()
        os.fchmod(temporary.file.fileno(), mode & 0o666)
        stored = os.fstat(temporary.file.fileno()).st_size
        prove(store, temporary.path, lambda nbytes: progress("prove", nbytes, model.size), manifest.sha256)
        with store.lock():
            calm(opened, look=True, doubt=True)
            all_stand(opened)
            keep_parents(store, [entries[i] for i in used], records, opened)
            store.add_base_files([entries[i].path for i in used if not entries[i].is_diff])
            store.add_base_folders(folders)
            temporary.commit(diff)
    return Made(target, diff, model.size, stored, manifest.sha256, recipe)


def make_real(recipe: Recipe, target: Path, *, jobs: int, progress: Progress) -> Made:
    """Write the recipe as a full file: the bytes that ``make_virtual`` would show.

    Raises:
        AlreadyThere: something stands under that name.
        HydraError: a model cannot be read, or the file not be written; nothing is left.
    """
    check_target(target)
    skeleton = _skeleton(recipe, target.name, jobs, progress)
    free = shutil.disk_usage(target.parent).free
    if free < skeleton.size + _SPACE_MARGIN_NBYTES:
        raise NoSpace(
            "not enough space for the model",
            where=target,
            detail=f"{free / 1e6:.0f} MB free, {skeleton.size / 1e6:.0f} MB needed",
        )
    digest = hashlib.sha256()
    with TemporaryFile(target.parent) as temporary, disk_errors(target):
        numbers = [piece for piece in skeleton.pieces if isinstance(piece, int)]
        with contextlib.closing(_computed_blocks(recipe, numbers, jobs)) as blocks:
            for piece in skeleton.pieces:
                parts = iter([piece]) if isinstance(piece, bytes) else _of_tensor(recipe, piece, blocks)
                for block in parts:
                    digest.update(block)
                    temporary.file.write(block)
                    progress("write", len(block), skeleton.size)
        temporary.flush_to_disk()
        os.fchmod(temporary.file.fileno(), _mode(recipe) & 0o666)
        temporary.commit(target)
    return Made(target, target, skeleton.size, skeleton.size, digest.digest(), recipe)


def _mode(recipe: Recipe) -> int:
    """The first model's mode: what a copy of it would have."""
    first = recipe.models[0].source
    if isinstance(first, Rehydrated):
        return first.diff.trailer.mode
    return first.stat.st_mode if isinstance(first, FileSource) else 0o100644


def check_target(target: Path) -> None:
    """Refuse a place where no model can be made.

    Raises:
        AlreadyThere: something stands under that name.
        UsageError: it is no name for a model, or there is no such folder.
    """
    for path in (target, target.with_name(target.name + SUFFIX)):
        if os.path.lexists(path):
            raise AlreadyThere("a model of that name exists", where=path, remedy="name another, or move it away")
    if target.name.endswith(SUFFIX) or is_private(target.name):
        raise UsageError("not a name for a model", where=target, remedy=f"leave {SUFFIX} out: it is added by itself")
    if not target.parent.is_dir():
        raise UsageError("no such folder", where=target.parent, remedy="make it first")
    container_for(target.name)


def _parents(
    store: Store, recipe: Recipe, entries: Sequence[ModelEntry], progress: Progress
) -> tuple[list[Parent], dict[int, int], list[int]]:
    """The parents that the recipe uses, each once; for each of its models the number of its parent; and for each parent
    the number of its model."""
    wanted = sorted({operand.parent for part in recipe.parts for operand in part.operands})
    with contextlib.closing(BaseHashes(store, [entries[model] for model in wanted], doubt=True)) as hashes:
        found = hashes.complete(functools.partial(progress, "hash"))
    parents: list[Parent] = []
    number: dict[int, int] = {}
    used: list[int] = []
    for model, record in zip(wanted, found, strict=True):
        same = next((at for at, known in enumerate(parents) if known.sha256 == record.sha256), None)
        if same is None:
            same = len(parents)
            parents.append(record)
            used.append(model)
        number[model] = same
    return parents, number, used


def _match(part: Part, number: dict[int, int]) -> Match | Computed:
    operands = tuple(msgspec.structs.replace(o, parent=number[o.parent]) for o in part.operands)
    if part.formula is not None:
        return Computed(part.formula, operands, result_dtype(part.formula, [o.dtype for o in operands]))
    only = operands[0]
    return Match(only.parent, only.origin, only.dtype, part.tensor.elements, "copy", 0.0)


def _skeleton(recipe: Recipe, name: str, jobs: int, progress: Progress) -> Skeleton:
    """The container around the recipe's tensors. A zip holds checksums, for which all is computed once."""
    tensors = [part.tensor for part in recipe.parts]
    if container_for(name) != TORCH_ZIP:
        about = {"summary": recipe.summary, "models": [model.name for model in recipe.models]}
        return safetensors_skeleton(tensors, [("format", "pt"), ("hydrafs", msgspec.json.encode(about).decode())])
    total = sum(tensor.nbytes for tensor in tensors)
    with contextlib.closing(_computed_blocks(recipe, range(len(tensors)), jobs)) as blocks:

        def of_tensor(number: int) -> Iterator[bytes]:
            for block in _of_tensor(recipe, number, blocks):
                progress("compute", len(block), total)
                yield block

        return torch_zip_skeleton(tensors, of_tensor)


def _computed_blocks(recipe: Recipe, numbers: Sequence[int], jobs: int) -> Generator[bytes, None, None]:
    """All blocks of these tensors in order, computed ahead by ``jobs`` threads."""

    def tasks() -> Iterator[tuple[int, int, int]]:
        for number in numbers:
            tensor = recipe.parts[number].tensor
            step = _BLOCK_NBYTES // DTYPES[tensor.dtype].nbytes
            for first in range(0, tensor.elements, step):
                yield number, first, min(step, tensor.elements - first)

    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(jobs, "hydrafs-compute") as pool:
        try:
            for task in tasks():
                pending.append(pool.submit(elements_of, recipe, *task))
                if len(pending) > 2 * jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _of_tensor(recipe: Recipe, number: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    left = recipe.parts[number].tensor.nbytes
    while left > 0:
        block = next(blocks)
        left -= len(block)
        yield block
