"""Opening a model of a store: its diff, its parents, their parents, and the proof that each is what it was.

Rule 1: what can be known to be wrong with a parent is found here, before a byte is served.
Rule 2: opening never reads a large parent whole: its size and a probe are compared at once, its SHA-256 comes from the
        catalog, or is taken in the background while checksums guard every byte (``hydrafs.rehydrate``, rule 2).
Rule 3: a parent is proven, and so read without checksums, while nobody can write to it (``hydrafs.leases``), and its
        SHA-256 was taken while nobody could. A SHA-256 that was taken otherwise is remembered by nobody.
Rule 4: a chain of parents is at most ``MAX_DEPTH`` long and never leads back to itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hydrafs.cache import ChunkCache
from hydrafs.diff import SUFFIX, DiffFile
from hydrafs.errors import HydraError, ParentChanged, ParentLoop, ParentMissing, ParentUnavailable, is_shortage
from hydrafs.identity import FileIdentity, is_unchanged, probe, sha256
from hydrafs.keeping import is_parent, place_of, remember, unhashed
from hydrafs.layout import FileSource
from hydrafs.leases import QuietFile
from hydrafs.manifest import Parent
from hydrafs.rehydrate import OpenParent, Rehydrated
from hydrafs.store import ModelEntry, Store, listed_name, trailer_of
from hydrafs.walk import list_folder

log = logging.getLogger(__name__)

MAX_DEPTH = 8
MAX_DIFFS = 256
"""How many diffs one model may need in all: parents of parents multiply."""
HASHED_AT_OPEN_NBYTES = 128 << 20
"""A parent of unknown SHA-256 and at most this size is hashed when it is opened: about a tenth of a second."""
_SCAN_SECONDS = 2.0


class Opener:
    """Opens the models of one store. Thread safety: any number of threads.

    ``background`` says whether large parents of unknown SHA-256 are hashed by a thread of the opener's own; a command
    that reads everything anyway does without. ``without``: files that are not to serve as parents, to see whether
    others would do.
    """

    def __init__(
        self, store: Store, cache: ChunkCache, *, background: bool = False, without: frozenset[Path] = frozenset()
    ) -> None:
        self.store = store
        self._without = without
        self.cache = cache
        self._hasher = ThreadPoolExecutor(1, "hydrafs-proof") if background else None
        self._closed = False
        self._lock = threading.Lock()
        self._hashing: set[tuple[Path, FileIdentity]] = set()
        self._proven: set[tuple[Path, FileIdentity, bytes]] = set()
        self._doubted: dict[tuple[Path, FileIdentity], bytes] = {}
        """What was taken while somebody could write: it tells a parent from another file, and proves nothing."""
        self._disproved: set[tuple[Path, FileIdentity, bytes]] = set()
        self._scan: tuple[float, dict[int, list[Path]], dict[bytes, list[Path]]] | None = None

    def open(self, entry: ModelEntry) -> FileSource | Rehydrated:
        """The model as a ``ByteSource``: the plain file, or its diff with all parents open.

        Raises:
            ParentUnavailable, CorruptDiff, UnsupportedDiff, HydraError: it cannot be served; nothing stays open.
        """
        if not entry.is_diff:
            return QuietFile(entry.path)
        return self.open_diff(entry.path)

    def open_diff(self, path: Path, fd: int | None = None) -> Rehydrated:
        """The diff at ``path``, or of the descriptor ``fd``, which is owned from here on, as the model that it stands
        for; see ``open``."""
        return self._open_chain(DiffFile(path, fd), (), iter(range(MAX_DIFFS)))

    def _open_chain(self, diff: DiffFile, above: tuple[bytes, ...], budget: Iterator[int]) -> Rehydrated:
        parents: list[OpenParent] = []
        try:
            chain = (*above, diff.manifest.sha256)
            if len(chain) > MAX_DEPTH or next(budget, None) is None:
                raise ParentLoop(
                    "a chain of parents is too long",
                    where=diff.path,
                    detail=f"more than {MAX_DEPTH} deep, or {MAX_DIFFS} diffs",
                    remedy="rehydrate a model in the chain and dehydrate it against a base",
                )
            parents.extend(self._open_parent(parent, diff, chain, budget) for parent in diff.manifest.parents)
            return Rehydrated(diff, parents, self.cache)
        except BaseException:
            diff.close()
            for parent in parents:
                parent.source.close()
            raise

    def _open_parent(
        self, parent: Parent, diff: DiffFile, chain: tuple[bytes, ...], budget: Iterator[int]
    ) -> OpenParent:
        changed: Path | None = None
        trouble: ParentUnavailable | None = None
        unreadable: tuple[Path, HydraError] | None = None
        if parent.sha256 in chain:  # a model may be stored against a full copy of itself, but not against its own diff
            trouble = ParentLoop(
                "a diff needs itself",
                where=diff.path,
                detail=f"through {parent.name}",
                remedy="restore the parent as a full file",
            )
        for path in self._candidates(parent):
            try:
                if path.name.endswith(SUFFIX):
                    if parent.sha256 not in chain and trailer_of(path).sha256 == parent.sha256:
                        source = self._open_chain(DiffFile(path), chain, budget)
                        # Its trailer claims the SHA-256, and its checksums guard what it says; neither proves it.
                        return OpenParent(source, lambda: False, parent.name)
                    continue
                opened = self._open_plain(path, parent)
            except ParentUnavailable as error:
                trouble = error
                continue
            except HydraError as error:
                if is_shortage(error):
                    raise
                log.debug("%s cannot serve as %s: %s", path, parent.name, error)
                if listed_name(path.name) == Path(parent.name).name:
                    unreadable = unreadable or (path, error)
                continue
            if opened:
                return opened
            changed = changed or path
        digest = parent.sha256.hex()
        if changed is not None:
            raise ParentChanged(
                f"a parent of {diff.path} has changed",
                where=changed,
                detail=f"not the {parent.size} bytes of SHA-256 {digest}",
                remedy=f"put the original {Path(parent.name).name} back in the store or in a base folder",
            )
        if trouble is not None:
            raise trouble
        if unreadable is not None:
            place, reason = unreadable
            raise ParentUnavailable(
                f"a parent of {diff.path} cannot be read",
                where=place,
                detail=f"{reason.what}, {reason.detail}, expected SHA-256 {digest}",
                remedy=reason.remedy or f"put the original {Path(parent.name).name} back",
            )
        raise ParentMissing(
            f"a parent of {diff.path} is missing",
            where=parent.name,
            detail=f"SHA-256 {digest}, {parent.size} bytes",
            remedy="put it back in the store, or add its folder to base_folders in .hydrafs/config.toml",
        )

    def _open_plain(self, path: Path, parent: Parent) -> OpenParent | None:
        """``path`` as the parent, or ``None`` where it is another file."""
        source = QuietFile(path)
        try:
            identity = FileIdentity.of(source.stat)
            if identity.size != parent.size or self._is_disproved(path, identity, parent.sha256):
                source.close()
                return None
            known, sure = self.store.catalog.sha256(path, identity), True
            if known is None:
                if probe(source) != parent.probe:
                    source.close()
                    return None
                known = self._doubted.get((path, identity))
                sure = False
                if known is None and identity.size <= HASHED_AT_OPEN_NBYTES:
                    known, sure = self._hash(path, source)
            if known is not None and known != parent.sha256:
                source.close()
                return None
        except BaseException:
            source.close()
            raise
        if sure:
            return OpenParent(source, lambda: source.is_proven(parent.sha256), parent.name)
        if known is None:
            self._prove_later(path, source.stat, parent)
        proven = lambda: source.is_proven(parent.sha256) and self._is_proven(path, identity, parent.sha256)  # noqa: E731
        return OpenParent(source, proven, parent.name)

    def _hash(self, path: Path, source: QuietFile) -> tuple[bytes, bool]:
        """The SHA-256 of the file, and whether it is one for as long as the file is quiet."""
        begun = source.quiet.begin()
        digest, lasting = source.sha256(lambda: sha256(source))
        identity = FileIdentity.of(source.stat)
        if lasting:
            self.store.catalog.remember_sha256(path, identity, digest)
        elif not source.quiet.lasted(begun):
            # Asked for again at every open, it would be taken at every open for as long as somebody has the file open.
            with self._lock:
                self._doubted[path, identity] = digest
            return digest, False
        return digest, True

    def find(self, parent: Parent) -> Path | None:
        """Where the parent stands, as far as its size and a probe, or what the catalog knows, can tell; hashes nothing
        that is large."""
        for path in self._candidates(parent):
            with contextlib.suppress(HydraError, OSError):
                if path.name.endswith(SUFFIX):
                    if trailer_of(path).sha256 == parent.sha256:
                        return path
                elif is_parent(self.store, path, parent):
                    return path
        return None

    def state_of(self, parents: Iterable[Parent]) -> str:
        """What keeps a diff with these parents from being served, as far as ``find`` can tell: ``parent-missing``, or
        ``parent-changed`` where another file stands under the name; empty where nothing does."""
        for parent in parents:
            if self.find(parent) is None:
                name = self.store.root / parent.name
                changed = not self.store.is_off_limits(name) and os.path.isfile(name)
                return "parent-changed" if changed else "parent-missing"
        return ""

    # Proof of large parents

    def _is_disproved(self, path: Path, identity: FileIdentity, digest: bytes) -> bool:
        with self._lock:
            return (path, identity, digest) in self._disproved

    def _is_proven(self, path: Path, identity: FileIdentity, digest: bytes) -> bool:
        with self._lock:
            return (path, identity, digest) in self._proven

    def _prove_later(self, path: Path, stat: os.stat_result, parent: Parent) -> None:
        if self._hasher is None:
            return
        identity = FileIdentity.of(stat)
        with self._lock:
            if (path, identity) in self._hashing:
                return
            self._hashing.add((path, identity))
        self._hasher.submit(self._prove, path, stat, parent)

    def _prove(self, path: Path, stat: os.stat_result, parent: Parent) -> None:
        identity, digest = FileIdentity.of(stat), parent.sha256
        try:
            with contextlib.closing(QuietFile(path)) as source:
                if is_unchanged(stat, source.stat):
                    begun = source.quiet.begin()
                    found, lasting = source.sha256(lambda: sha256(source, self._go_on))
                    if not source.quiet.lasted(begun):
                        if found == digest:
                            with self._lock:
                                self._doubted[path, identity] = found
                    elif not lasting or remember(self.store, path, source.stat, found):
                        verdict = self._proven if found == digest else self._disproved
                        with self._lock:
                            verdict.add((path, identity, digest))
                        if found != digest:
                            log.error(
                                "the parent %s, at %s, has changed: SHA-256 %s, expected %s; restore it",
                                parent.name,
                                path,
                                found.hex(),
                                digest.hex(),
                            )
        except _Closed:
            pass
        except (HydraError, OSError) as error:
            log.warning("cannot prove the parent %s: %s", path, error)
        finally:
            with self._lock:
                self._hashing.discard((path, identity))

    # Where a parent may stand

    def _candidates(self, parent: Parent) -> Iterator[Path]:
        seen: set[Path] = set()
        for path in self._places(parent):
            if path not in seen and path not in self._without:
                seen.add(path)
                # Not even a stat of what is in the mount that is being served: its answer is ours to give.
                if not self.store.is_off_limits(path) and os.path.isfile(
                    path
                ):  # a name from a diff may be one that no system call takes
                    yield path

    def _places(self, parent: Parent) -> Iterator[Path]:
        store = self.store
        hint = store.root / parent.name
        folders = (store.root, *store.base_folders)
        name = Path(parent.name).name
        hints = [hint, *(folder / name for folder in folders), *(f for f in store.base_files if f.name == name)]
        for path in hints:
            yield path
            yield Path(f"{path}{SUFFIX}")
        for folder in (store.held, store.retired):
            yield place_of(folder, parent.sha256, is_diff=False)
            yield place_of(folder, parent.sha256, is_diff=True)
        yield from store.paths_of(parent.sha256)
        yield from unhashed(store)
        by_size, by_sha256 = self._scanned()
        yield from by_sha256.get(parent.sha256, ())
        yield from by_size.get(parent.size, ())
        # A base file that was given another name in its folder is still the base.
        for folder in dict.fromkeys(file.parent for file in store.base_files):
            for entry in list_folder(folder).files:
                with contextlib.suppress(OSError):
                    if entry.stat().st_size == parent.size:
                        yield Path(entry.path)

    def _scanned(self) -> tuple[dict[int, list[Path]], dict[bytes, list[Path]]]:
        """Every file that may be a parent, plain ones by size and diffs by their model's SHA-256."""
        with self._lock:
            if self._scan and time.monotonic() - self._scan[0] < _SCAN_SECONDS:
                return self._scan[1], self._scan[2]
        by_size: dict[int, list[Path]] = {}
        by_sha256: dict[bytes, list[Path]] = {}
        for model in self.store.candidates():
            with contextlib.suppress(OSError, HydraError):
                if model.is_diff:
                    by_sha256.setdefault(trailer_of(model.path).sha256, []).append(model.path)
                else:
                    by_size.setdefault(model.path.stat().st_size, []).append(model.path)
        with self._lock:
            self._scan = (time.monotonic(), by_size, by_sha256)
        return by_size, by_sha256

    def _go_on(self, nbytes: int) -> None:
        if self._closed:
            raise _Closed

    def close(self) -> None:
        """Stop hashing in the background: an unmount does not wait for gigabytes."""
        self._closed = True
        if self._hasher is not None:
            self._hasher.shutdown(wait=True, cancel_futures=True)


class _Closed(Exception):
    """What hashing in the background ends with when nobody needs it any more."""
