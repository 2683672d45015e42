"""The SHA-256 of bases, taken beside the coding of a model.

Goal: a base that is used for the first time costs no pass of its own: its hash is needed when the manifest is written,
and that is the last thing to be written.
Rule 1: a base that somebody can write to while it is hashed fails the whole, and no SHA-256 of it is remembered.
Rule 2: whoever stops early (an error, an interrupt, a model that is left alone) does not wait for a base to be hashed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec

from hydrafs.covered import real_path
from hydrafs.errors import Changing
from hydrafs.identity import FileIdentity, is_unchanged, probe, sha256
from hydrafs.keeping import remember
from hydrafs.layout import ByteSource, plain_text
from hydrafs.leases import QuietFile
from hydrafs.manifest import Parent
from hydrafs.openfiles import Writers
from hydrafs.store import ModelEntry, Store, trailer_of

_TELL_SECONDS = 0.1


class BaseHashes:
    """The parents of one diff, and a thread that takes the SHA-256s which the catalog does not know, one after another.

    Thread safety: its methods are for one thread, which calls ``close`` last.
    """

    def __init__(
        self,
        store: Store,
        entries: Sequence[ModelEntry],
        opened: Sequence[ByteSource] | None = None,
        *,
        doubt: bool = False,
    ) -> None:
        """Describe the models ``entries`` as parents and begin to hash.

        Args:
            opened: the same, open: what is hashed is what the caller reads. They stay the caller's, and open.
            doubt: a base that nobody can tell of whether it is written to is hashed, and not remembered.

        Raises:
            Changing: somebody can write to one of them, or nobody can tell.
            HydraError: one of them cannot be read.
        """
        self._store, self._doubt = store, doubt
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "hydrafs-basehash")
        self._pending: list[tuple[int, Path, Future[bytes]]] = []
        self._total = 0
        self._read = 0
        self.parents: tuple[Parent, ...] = ()
        """As the manifest names them. In place of a SHA-256 that is being taken stands the parent's number, as no
        two parents may have the same; ``complete`` knows better."""
        try:
            files = [source if isinstance(source, QuietFile) else None for source in opened or ()]
            files = files or [None] * len(entries)
            self.parents = tuple(
                self._describe(number, entry, file)
                for number, (entry, file) in enumerate(zip(entries, files, strict=True))
            )
        except BaseException:
            self.close()
            raise

    def _describe(self, number: int, entry: ModelEntry, opened: QuietFile | None) -> Parent:
        name = plain_text(self._store.relative(entry.path.with_name(Path(entry.name).name)))
        if entry.is_diff:
            trailer = trailer_of(entry.path)
            return Parent(trailer.sha256, trailer.size, name, 0)
        path = real_path(entry.path)
        source = opened or QuietFile(path)
        done = _nothing if opened else source.close
        try:
            source.quiet.check(doubt=self._doubt)
            known = self._store.catalog.sha256(path, FileIdentity.of(source.stat))
            if known and not source.quiet.vouches_for(known):
                known = None
            parent = Parent(known or number.to_bytes(32, "little"), source.size, name, probe(source))
        except BaseException:
            done()
            raise
        if known:
            done()
            self._remember(entry.path, path, known)
        else:
            self._total += source.size
            self._pending.append((number, entry.path, self._pool.submit(self._take, path, source, done)))
        return parent

    def _take(self, path: Path, source: QuietFile, done: Callable[[], None]) -> bytes:
        try:
            begun = source.quiet.begin()
            digest, lasting = source.sha256(lambda: sha256(source, self._count))
            if not source.quiet.lasted(begun) and not (self._doubt and source.quiet.writers is Writers.UNKNOWN):
                raise Changing("a base was written to while it was read", where=path)
            try:
                unchanged = is_unchanged(source.stat, os.stat(path))
                if unchanged and lasting:
                    unchanged = remember(self._store, path, source.stat, digest)
            except OSError as error:
                raise Changing("a base went away while it was read", where=path) from error
            if not unchanged:
                raise Changing("a base changed while it was read", where=path)
            return digest
        finally:
            done()

    def _count(self, nbytes: int) -> None:
        self._read += nbytes
        if self._stopped.is_set():
            raise _Stopped

    def _remember(self, named: Path, resolved: Path, digest: bytes) -> None:
        if named != resolved:
            with contextlib.suppress(OSError):
                self._store.catalog.remember_sha256(named, FileIdentity.of(os.stat(named)), digest)

    def complete(self, progress: Callable[[int, int], None]) -> tuple[Parent, ...]:
        """The parents with all SHA-256s, which it waits for.

        Args:
            progress: is told, on the calling thread, how many more bytes of all that had to be hashed were read; never
                where all was known.

        Raises:
            Changing: a base changed while it was read.
            HydraError: it cannot be read.
        """
        told = 0
        complete = list(self.parents)
        for number, named, future in self._pending:
            done = False
            while not done:
                done = bool(wait((future,), timeout=_TELL_SECONDS).done)
                read = self._read
                if read > told:
                    progress(read - told, self._total)
                    told = read
            digest = future.result()
            self._remember(named, real_path(named), digest)
            complete[number] = msgspec.structs.replace(complete[number], sha256=digest)
        return tuple(complete)

    def close(self) -> None:
        """Stop; what is not known stays so. No file of the caller's is read any more."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    """The file is the caller's."""


class _Stopped(Exception):
    """What hashing ends with when nobody needs it any more."""
