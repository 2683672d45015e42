"""The Python interface: a store as an object, for programs that do not want the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydrafs import restore
from hydrafs.allocator import tune_allocator
from hydrafs.cache import ChunkCache
from hydrafs.choosing import AUTOMATIC
from hydrafs.dehydrate import Options, Outcome, Progress, dehydrate
from hydrafs.errors import UsageError
from hydrafs.layout import FileSource
from hydrafs.mounting import mount_in_background, parse_options
from hydrafs.mountpoints import resolve
from hydrafs.opening import Opener
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import ModelEntry, Store
from hydrafs.vfs import StoreTree
from hydrafs.writing import WritableTree


class OpenStore:
    """A store that is open. Close it, or use it in a ``with`` statement.

    Thread safety: ``open`` and ``verify`` from any number of threads; one ``dehydrate`` at a time.
    """

    def __init__(self, root: str | os.PathLike[str], cache_nbytes: int = 1 << 30) -> None:
        self.store = Store(root, looks=True)
        self._opener = Opener(self.store, ChunkCache(cache_nbytes))

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self.store.root

    def models(self) -> list[ModelEntry]:
        """Every model of the store, plain or dehydrated."""
        return list(self.store.models())

    def dehydrate(
        self,
        model: str | os.PathLike[str],
        *,
        bases: Sequence[str | os.PathLike[str]] = (),
        keep: bool = False,
        codec: str = AUTOMATIC,
        progress: Progress | None = None,
    ) -> Outcome:
        """Turn a plain model into a diff and remove it, after the proof that the diff gives it back.

        Args:
            model: a path, or a name relative to the store.
            bases: what to store it against; found by itself when empty.
            keep: leave the original where it is.
            codec: one for all tensors, by its name, or the smallest for each.

        Raises:
            HydraError: the original stands as it stood.
        """
        entry = self.store.locate(model)
        if entry.is_diff:
            raise UsageError("already dehydrated", where=entry.path, remedy="nothing is to be done")
        options = Options(bases=tuple(Path(b) for b in bases), keep=keep, codec=codec)
        return dehydrate(self.store, entry.path, options, progress=progress)

    def rehydrate(self, model: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
        """Write a dehydrated model as a full file; where it was written. The diff stays."""
        entry = self.store.locate(model)
        return restore.rehydrate(self.store, entry, Path(output) if output is not None else None).path

    def open(self, model: str | os.PathLike[str]) -> FileSource | Rehydrated:
        """A model as a ``ByteSource``: only what is read is decoded. Close it, or use it in a ``with`` statement."""
        return self._opener.open(self.store.locate(model))

    def verify(self, model: str | os.PathLike[str]) -> bytes:
        """Decode a dehydrated model whole and compare; its SHA-256.

        Raises:
            CorruptChunk, ParentUnavailable, VerifyFailed: what is wrong, and what to do.
        """
        entry = self.store.locate(model)
        if not entry.is_diff:
            raise UsageError("not a diff", where=entry.path, remedy="a plain file has nothing to be compared with")
        return restore.prove(self.store, entry.path)

    def close(self) -> None:
        """Close the store."""
        self._opener.close()
        self.store.close()

    def __enter__(self) -> OpenStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_store(root: str | os.PathLike[str], *, cache_nbytes: int = 1 << 30) -> OpenStore:
    """Open the store at ``root``, a folder with models.

    Raises:
        NotFound, Denied: there is no such folder, or it may not be read.
    """
    return OpenStore(root, cache_nbytes)


@contextlib.contextmanager
def mount(
    store: OpenStore | str | os.PathLike[str],
    mountpoint: str | os.PathLike[str] | None = None,
    *,
    cache_nbytes: int = 4 << 30,
    options: str = "",
    binding: str | None = None,
) -> Iterator[Path]:
    """Show a store at ``mountpoint`` while the ``with`` block lasts, from a process of its own.

    Without ``mountpoint`` it is mounted over itself. It can be written to, unless ``ro`` is among the ``options``.

    Raises:
        MountFailed, UsageError, Denied: it cannot be mounted; the message says why and what to do.
    """
    opened = store if isinstance(store, OpenStore) else None
    root = opened.root if opened else Path(os.fspath(store)).expanduser().resolve()  # type: ignore[arg-type]
    temporary = opened or OpenStore(root)
    try:
        folders = (*temporary.store.base_folders, *temporary.store.base_files)
    finally:
        if opened is None:
            temporary.close()
    parsed = parse_options(options)
    mountpoint = mountpoint if mountpoint is not None else root
    with mount_in_background(
        "hydrafs.api:make_tree",
        {
            "root": os.fspath(root),
            "cache_nbytes": cache_nbytes,
            "mountpoint": os.fspath(resolve(mountpoint)),
            "read_only": parsed.read_only,
        },
        mountpoint,
        store_paths=[root, *folders],
        options=parsed,
        binding=binding,
        over_store=os.fspath(resolve(mountpoint)) == os.fspath(root),
    ) as path:
        yield path


def make_tree(root: str, cache_nbytes: int, mountpoint: str, read_only: bool = False) -> StoreTree:
    """The tree that a mount in a child process shows."""
    tune_allocator()
    return (StoreTree if read_only else WritableTree)(root, cache_nbytes, mountpoint)
