"""The diffs of the seed tool: bz2 around a pickle, or a torch checkpoint.

Rule 1: content decides what a file is, not its name.
Rule 2: a compressed diff is unpacked to a temporary file, up to a limit that the caller gives; no piece of it is kept
        in memory.
Rule 3: a pickle that would import anything but what tensors are made of is refused, whatever it would do with it.
"""

from __future__ import annotations

import bz2
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from hydrafs.containers import cursor, pickle_walk, torch_zip
from hydrafs.containers.symbols import Storage, Tensor, Unpacked
from hydrafs.dtypes import BY_STORAGE_NAME, BY_TORCH_NAME
from hydrafs.errors import BadModel, UsageError, from_oserror
from hydrafs.layout import ByteSource, FileSource
from hydrafs.seed.states import Places, State, mapping, read_state, resolve
from hydrafs.temporary import TemporaryFile

BZ2_SIGNATURE = b"BZh"
_PICKLE_SIGNATURE = b"\x80"
_CHUNK_NBYTES = 1 << 20
_BUFFER_NBYTES = 1 << 20
_SMALLEST_LIMIT_NBYTES = 64 << 20

_IMPORTS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "torch.storage.UntypedStorage",
    "torch.UntypedStorage",
    "torch.Size",
    *(f"torch.{name}" for name in BY_STORAGE_NAME),
    *(f"torch.{name}" for name in BY_TORCH_NAME),
}

Progress = Callable[[int], None]


def limit_for(base_nbytes: int) -> int:
    """How large a diff against a base of ``base_nbytes`` may be once it is unpacked: a difference of half-precision
    tensors may be float64 at most, and holds no key that the base has not."""
    return 4 * base_nbytes + _SMALLEST_LIMIT_NBYTES


@contextlib.contextmanager
def open_diff(
    path: Path, folder: Path, limit: int, progress: Progress | None = None, *, nameless: bool = False
) -> Iterator[State]:
    """The state dict of a seed diff, readable until the context is left.

    Args:
        path: a ``.pbz2`` file, the same unpacked, or what ``torch.save`` wrote.
        folder: where a compressed diff is unpacked to; a temporary file, gone when the context is left.
        limit: how many bytes it may be when unpacked.
        progress: is told how many more bytes of the file were read.
        nameless: the temporary file has no name, where the filesystem can: what is no diff leaves no trace.

    Raises:
        BadModel: no diff of the tool, or a damaged or hostile one.
        NoSpace: the folder cannot take it.
    """
    with contextlib.ExitStack() as stack:
        source: FileSource = stack.enter_context(FileSource(path))
        if source.pread(0, len(BZ2_SIGNATURE)) == BZ2_SIGNATURE:
            file, place = stack.enter_context(_unpacked_in(folder, nameless=nameless))
            for block in unpacked(source, limit, path, progress):
                try:
                    file.write(block)
                except OSError as error:
                    raise from_oserror(error, "cannot unpack the diff", path) from error
            try:
                file.flush()
            except OSError as error:
                raise from_oserror(error, "cannot unpack the diff", path) from error
            source = stack.enter_context(FileSource(place))
        yield read_diff(source, path)


@contextlib.contextmanager
def _unpacked_in(folder: Path, *, nameless: bool) -> Iterator[tuple[IO[bytes], str]]:
    """A temporary file in ``folder``, and a path to it."""
    if not nameless:
        with TemporaryFile(folder) as temporary:
            yield temporary.file, os.fspath(temporary.path)
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=_BUFFER_NBYTES))
        except OSError as error:
            raise from_oserror(error, "cannot write in", folder) from error
        yield file, f"/proc/self/fd/{file.fileno()}"


def unpacked(source: ByteSource, limit: int, where: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """What a bz2 file holds, a piece at a time: every stream of it, as ``bz2.BZ2File`` reads it.

    Raises:
        BadModel: it is damaged, ends early, or holds more than ``limit`` bytes.
    """
    total, position = 0, 0
    unpacker = bz2.BZ2Decompressor()
    pending = b""
    while True:
        if unpacker.eof:
            pending = unpacker.unused_data or source.pread(position, _CHUNK_NBYTES)
            position += 0 if unpacker.unused_data else len(pending)
            if not pending or not pending.startswith(BZ2_SIGNATURE[: len(pending)]):
                return  # what stands behind the last stream is nobody's
            unpacker = bz2.BZ2Decompressor()
        if not pending and unpacker.needs_input:
            pending = source.pread(position, _CHUNK_NBYTES)
            position += len(pending)
            if not pending:
                raise BadModel("a seed diff ends early", where=where, detail=f"after {total} unpacked bytes")
            if progress:
                progress(len(pending))
        try:
            block = unpacker.decompress(pending, _CHUNK_NBYTES)
        except (OSError, ValueError) as error:
            raise BadModel("a seed diff is damaged", where=where, detail=str(error)) from error
        pending = b""
        total += len(block)
        if total > limit:
            raise BadModel(
                "a seed diff unpacks to more than a diff of this base can hold",
                where=where,
                detail=f"over {limit} bytes",
                remedy="name the base that it was made with",
            )
        if block:
            yield block


def read_diff(source: ByteSource, where: Path) -> State:
    """The state dict of an unpacked diff.

    Raises:
        BadModel: no diff of the tool, or a damaged or hostile one.
    """
    head = source.pread(0, 64)
    if head.startswith(torch_zip.SIGNATURE) or not head.startswith(_PICKLE_SIGNATURE):
        if head[:2] == b"\x1f\x8b" or source.pread(257, 5) == b"ustar":
            raise UsageError("a diff is packed", where=where, remedy="unpack it with gzip or tar first")
        return _some(read_state(source, where.name), where)
    imports: set[str] = set()
    storages: dict[str, Storage] = {}
    try:
        root = pickle_walk.walk(
            cursor.Cursor(cursor.stored(source, 0, source.size), source.size), storages, imports=imports
        )
    except BadModel as error:
        raise BadModel(error.what, where=where, detail=error.detail) from error
    if foreign := sorted(imports - _IMPORTS):
        raise BadModel(
            "a pickle would run what is no part of a tensor; it was not run",
            where=where,
            detail=", ".join(foreign[:3])[:200],
            remedy="do not load this file with anything else",
        )
    if root is not None and isinstance(root, int):  # the magic number: torch's format before 1.6
        return _some(read_state(source, where.name), where)
    values = mapping(root)
    nested = values.get("state_dict")
    if nested is not None and not isinstance(nested, Tensor):
        values = mapping(nested)
    if others := [key for key, value in values.items() if not isinstance(value, Tensor)]:
        raise BadModel("a seed diff holds what is no tensor", where=where, detail=others[0][:200])
    places = Places(source, Unpacked(root, storages, {}, little=True))
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    return _some(resolve(tensors, places, where.name), where)


def _some(state: State, where: Path) -> State:
    if not state:
        raise BadModel(
            "no diff of the seed tool",
            where=where,
            detail="there are no tensors in it",
            remedy="name what ckpt_subtract.py wrote",
        )
    return state
