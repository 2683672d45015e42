"""What hashes are known of the models of a store, by whom they are known, and taking those that are not.

Rule: what is known is told without reading a model; a model is read only when it is asked for, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from cachetools import LRUCache

from hydrafs import containers
from hydrafs.cache import ChunkCache
from hydrafs.catalog import Catalog
from hydrafs.containers import safetensors
from hydrafs.diff import DiffFile, read_hashes
from hydrafs.digests import ADDNET, NBYTES, PARTIAL, PARTIAL_NBYTES, PARTIAL_OFFSET, SHA256, Digests, checked
from hydrafs.errors import Changing, CorruptDiff, HydraError, UnsupportedDiff, VerifyFailed
from hydrafs.identity import FileIdentity, is_unchanged
from hydrafs.keeping import remember
from hydrafs.layout import FileSource
from hydrafs.leases import QuietFile
from hydrafs.manifest import Manifest
from hydrafs.opening import Opener
from hydrafs.rehydrate import Rehydrated
from hydrafs.restore import read_blocks
from hydrafs.store import ModelEntry, Store

_KEPT = 100_000
_READ_NBYTES = 1 << 20
_CACHE_NBYTES = 96 << 20

Progress = Callable[[int], None]


class KnownHashes:
    """The hashes that are known of files. Thread safety: any number of threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._of_diffs: LRUCache[str, tuple[FileIdentity, dict[str, bytes]]] = LRUCache(_KEPT)

    def of(self, path: Path, stat: os.stat_result, *, is_diff: bool) -> dict[str, bytes]:
        """The known hashes, by name, of the model that the file at ``path`` holds; empty where it is damaged.

        Reads a diff's manifest once; decodes nothing.
        """
        identity = FileIdentity.of(stat)
        if not is_diff:
            sha256 = self._store.catalog.sha256(path, identity)
            return {SHA256: sha256, **self._store.catalog.hashes(sha256)} if sha256 else {}
        key = os.fspath(path)
        with self._lock:
            kept = self._of_diffs.get(key)
        if kept and kept[0] == identity:
            found = kept[1]
        else:
            try:
                found = read_hashes(path)
            except (CorruptDiff, UnsupportedDiff):
                found = {}
            except HydraError:
                return {}  # not now; that says nothing of the diff, and is not kept
            with self._lock:
                self._of_diffs[key] = (identity, found)
        if SHA256 in found and len(found) == 1:  # written before diffs held the others
            return {**self._store.catalog.hashes(found[SHA256]), **found}
        return found

    def of_model(self, entry: ModelEntry) -> dict[str, bytes]:
        """The known hashes of a model of the store as it stands, by name.

        Raises:
            OSError: it is gone.
        """
        found = self.of(entry.path, entry.path.stat(), is_diff=entry.is_diff)
        if SHA256 not in found and not entry.is_diff and self._store.private.is_dir():
            # A link that is being made changes the identity of a file a moment before the catalog is told.
            with contextlib.suppress(HydraError), self._store.rest():
                found = self.of(entry.path, entry.path.stat(), is_diff=False)
        return found


def kept_block(catalog: Catalog, manifest: Manifest) -> bytes | None:
    """The 64 KiB at 0x100000 of a model, where the catalog has them and its diff says that they are right."""
    wanted = checked(manifest.hashes).get(PARTIAL)
    data = catalog.block(manifest.sha256) if wanted else None
    return data if data is not None and hashlib.sha256(data).digest() == wanted else None


def keep_block(store: Store, model: Rehydrated) -> bool:
    """Decode the 64 KiB at 0x100000 of a model into the catalog, so that reading them decodes nothing. Whether it could
    be done: the model is that long, and its diff knows their hash.

    Raises:
        HydraError: they cannot be read.
    """
    if model.size <= PARTIAL_OFFSET or PARTIAL not in checked(model.manifest.hashes):
        return False
    if kept_block(store.catalog, model.manifest) is None:
        store.catalog.remember_block(model.manifest.sha256, model.pread(PARTIAL_OFFSET, PARTIAL_NBYTES))
    return kept_block(store.catalog, model.manifest) is not None


def missing(known: dict[str, bytes], container: str) -> list[str]:
    """The names of the hashes that a model of this container has and that are not known."""
    wanted = [SHA256, *NBYTES]
    return [name for name in wanted if name not in known and (name != ADDNET or container == safetensors.CONTAINER)]


def container_of(entry: ModelEntry) -> str:
    """The container of a model, from its diff or from its first bytes.

    Raises:
        HydraError: it cannot be read.
    """
    if entry.is_diff:
        with DiffFile(entry.path) as diff:
            return diff.manifest.container
    with FileSource(entry.path) as source:
        return containers.parse(source, entry.path.name).container


def compute(store: Store, entry: ModelEntry, progress: Progress | None = None) -> dict[str, bytes]:
    """Read a whole model for its hashes, and keep them in the catalog; all of them, by name.

    Raises:
        Changing: it was written to meanwhile.
        HydraError: it cannot be read.
    """
    digests = Digests(safetensors=container_of(entry) == safetensors.CONTAINER)
    with digests:
        if entry.is_diff:
            opener = Opener(store, ChunkCache(_CACHE_NBYTES))
            with contextlib.closing(opener), contextlib.closing(opener.open_diff(entry.path)) as model:
                read_blocks(model, digests.update, progress)
                sha256, others = digests.finish()
                if sha256 != model.manifest.sha256:
                    raise VerifyFailed("a diff does not give its model back", where=entry.path)
        else:
            sha256, others = _hash_file(store, entry.path, digests, progress)
    store.catalog.remember_hashes(sha256, others)
    return {SHA256: sha256, **dict(others)}


def _hash_file(
    store: Store, path: Path, digests: Digests, progress: Progress | None
) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
    with contextlib.closing(QuietFile(path)) as source:
        begun = source.quiet.begin()
        position = 0
        while block := source.pread(position, _READ_NBYTES):
            digests.update(block)
            position += len(block)
            if progress:
                progress(len(block))
        sha256, others = digests.finish()
        try:
            unchanged = position == source.size and is_unchanged(source.stat, os.stat(path))
            if unchanged and source.quiet.settle(begun):  # of what somebody can write to, it is for this time only
                unchanged = remember(store, path, source.stat, sha256)
        except OSError as error:
            raise Changing("a model went away while it was read", where=path) from error
    if not unchanged:
        raise Changing("a model changed while it was read", where=path)
    return sha256, others
