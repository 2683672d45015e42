"""Model to diff: parse, match, encode, read back, commit.

Rule 1: the original goes only after the diff, read back from disk, has given its SHA-256.
Rule 2: a model that changes while it is read is left as it is, and nothing is written under its name.
Rule 3: whatever goes wrong, the store holds the original and no half of a diff.
Rule 4: nobody can write to the model, nor to a file that its diff is read from, while all this is done.
Rule 5: what the diff cannot carry of the model (attributes, access lists) leaves the model whole; unasked, so do an
        owner that cannot be kept, another hard link, and a base that cannot be held.
Beside the pass over the model run: the SHA-256 of a base that is new here, reading ahead, and writing the diff to disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hydrafs import containers, prefetch
from hydrafs.basehash import BaseHashes
from hydrafs.cache import ChunkCache
from hydrafs.catalog import ModelFacts
from hydrafs.choosing import AUTOMATIC, choose_codecs, codecs_for
from hydrafs.committing import all_stand, calm, disk_errors, disturbed, hold, keep_parents, may_go, unchanged
from hydrafs.composition import made_of
from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX, DiffFile, DiffWriter
from hydrafs.encode import encode_model, estimate, predictor_for
from hydrafs.errors import (
    AlreadyThere,
    Changing,
    NoSpace,
    NotFound,
    ParentUnavailable,
)
from hydrafs.fileattributes import carry
from hydrafs.filesystem import is_settled, same_mount
from hydrafs.fingerprint import facts_of
from hydrafs.identity import FileIdentity
from hydrafs.layout import FileSource
from hydrafs.leases import QuietFile
from hydrafs.openfiles import Writers
from hydrafs.opening import Opener
from hydrafs.parentage import check_chain, chosen, manifest_of, named, predicted
from hydrafs.plan import DEFAULT_CHUNK_NBYTES, make_plan
from hydrafs.refusals import all_quiet, may_doubt, needed_by, other_link, refuse, room_for_ending, stays_whole, warnings
from hydrafs.rehydrate import Rehydrated
from hydrafs.replacing import Original
from hydrafs.restore import prove
from hydrafs.store import Store, trailer_of
from hydrafs.suspect import Suspects
from hydrafs.temporary import TemporaryFile

MUST_SHRINK_BY = 0.05
_SPACE_MARGIN_NBYTES = 16 << 20

Stage = Literal["hash", "encode", "prove"]
Progress = Callable[[Stage, int, int], None]
"""``progress(stage, nbytes, total)``: so many more bytes of the stage's total are done."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to dehydrate. ``bases`` empty: found by itself, though never among ``not_bases`` (plain files that will be
    dehydrated themselves). ``jobs``: coding threads. ``codec``: one for all tensors, or the smallest for each; ``raw``
    compresses nothing. ``still`` is asked all along whether to go on: it waits, or raises what ends the work, and the
    model stays as it is; it is asked for the last time when the original has left its name. ``alone``: whether a model
    that resembles no other is compressed by itself. ``all_or_nothing``: where the original cannot go, the diff does not
    stay either, and ``Changing`` is raised; and what is done with a warning else is not done (rule 5). ``last``, where
    it is given, is asked instead of ``still`` while the store's lock is held: it must not wait. ``begin`` is called
    once, when nothing can be refused any more and before anything is written."""

    bases: tuple[Path, ...] = ()
    not_bases: tuple[Path, ...] = ()
    keep: bool = False
    jobs: int = field(default_factory=lambda: max(1, os.cpu_count() or 1))
    codec: str = AUTOMATIC
    chunk_nbytes: int = DEFAULT_CHUNK_NBYTES
    still: Callable[[], None] = lambda: None
    alone: bool = True
    all_or_nothing: bool = False
    begin: Callable[[], None] = lambda: None
    last: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a model. ``stored_nbytes`` is the diff's size, or the estimate where the model was left alone;
    ``kept_nbytes`` what its original goes on taking, because others need it or it has another name."""

    model: Path
    diff: Path | None
    size: int
    stored_nbytes: int
    sha256: bytes
    parents: tuple[str, ...]
    reasons: tuple[str, ...]
    original_removed: bool
    kept_nbytes: int = 0

    @property
    def freed_nbytes(self) -> int:
        """How many bytes the original gave back; the diff takes ``stored_nbytes`` of them."""
        return self.size - self.kept_nbytes if self.original_removed else 0


def dehydrate(
    store: Store,
    model: Path,
    options: Options | None = None,
    *,
    folder: Path | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Outcome:
    """Store the plain file ``model`` as a diff in ``folder`` (default: its own), prove it, and remove the original.

    Args:
        name: what the model is to be listed under (default: its file's name).
        progress: is told, by stage, how many more bytes of how many are done.

    Returns:
        What was done; ``diff`` is ``None`` where the model would not shrink by 5 % and was left alone, with the reason.

    Raises:
        HydraError: by class what the user can do; the original stands as it stood.
    """
    options = options or Options()
    folder = real_path(folder or model.parent)
    name = name or model.name
    target = folder / (name + SUFFIX)
    refuse(model)
    room_for_ending(target, model)
    if not folder.is_dir():
        raise NotFound("no such folder for the diff", where=folder, remedy=f"mkdir -p {folder}")
    with (
        contextlib.closing(QuietFile(model)) as source,
        contextlib.closing(Opener(store, ChunkCache(64 << 20))) as opener,
    ):
        opened: list[FileSource | Rehydrated] = []

        def report(stage: Stage, nbytes: int, total: int) -> None:
            options.still()
            all_quiet(source, opened, options)
            if progress:
                progress(stage, nbytes, total)

        before = FileIdentity.of(source.stat)
        if target.exists() and trailer_of(target).size != source.size:
            raise AlreadyThere("another diff has that name", where=target, remedy="move it away, or rename the model")
        all_quiet(source, (), options)
        needed = needed_by(store, model, before)
        whole = stays_whole(store, source, needed, options)
        if whole:
            return _left_alone(model, source.size, source.size, (whole,))
        store.check_locks()  # what minutes of work would end with
        if not source.size:
            return _left_alone(model, 0, 0, ())
        layout = containers.parse(source, model.name)
        facts = facts_of(source, layout)
        passed_over: dict[str, Writers] = {}
        if options.bases:
            choice = named(store, options.bases)
        else:
            choice, passed_over = chosen(
                store,
                opener,
                source,
                layout,
                facts,
                exclude=options.not_bases,
                refused=Suspects(store).of_base if options.all_or_nothing else lambda path: "",
                chunk_nbytes=options.chunk_nbytes,
            )
        entries, matches = predicted(store, opener, source, layout, facts, choice)
        if not entries and not options.alone:
            _wait_for(passed_over, options)
            return _left_alone(model, source.size, source.size, choice.reasons)
        hashes: BaseHashes | None = None
        ahead: prefetch.Prefetch | None = None
        try:
            opened.extend(opener.open(entry) for entry in entries)
            check_chain(source, opened)
            path, found = disturbed(opened)
            doubts: tuple[str, ...] = ()
            if found is Writers.UNKNOWN:
                doubts = (f"nobody can tell whether {store.relative(Path(path))} is being written to: {found.value}",)
                if not may_doubt(options):
                    return _left_alone(model, source.size, source.size, (*choice.reasons, *doubts))
            calm(opened, look=True, doubt=may_doubt(options))
            hashes = BaseHashes(store, entries, opened, doubt=may_doubt(options))
            parents = hashes.parents
            hold(opened)
            raw = options.codec == "raw"
            plan = make_plan(
                source, layout, matches, chunk_nbytes=options.chunk_nbytes, codec="raw" if raw else "planes"
            )
            ahead = prefetch.Prefetch(prefetch.for_coding(source, plan.spans, plan.sections, opened))
            if not raw:
                names = codecs_for(options.codec)
                predictor = predictor_for(source, plan, opened, manifest_of(source, name, layout, plan, parents))
                plan = choose_codecs(source, plan, predictor, names, jobs=options.jobs)
            manifest = manifest_of(source, name, layout, plan, parents)
            share = 1.0 if raw else estimate(source, plan, opened, manifest)
            if not raw and share > 0.98:
                _wait_for(passed_over, options)
                return _left_alone(model, source.size, round(share * source.size), choice.reasons)
            _check_space(folder, share * source.size, model)
            options.begin()
            with TemporaryFile(_scratch(store, folder, options)) as temporary, disk_errors(target):
                lost = carry(source.fd, temporary.file.fileno())
                if (lost.attributes and not options.keep) or (lost.owner and options.all_or_nothing):
                    return _left_alone(model, source.size, round(share * source.size), lost.reasons)

                def encoded(nbytes: int) -> None:
                    ahead.advance(nbytes)
                    temporary.write_back()
                    report("encode", nbytes, source.size)

                manifest = encode_model(
                    source,
                    plan,
                    opened,
                    lambda chunk_count: DiffWriter(temporary.file, chunk_count),
                    manifest,
                    jobs=options.jobs,
                    raw=raw,
                    progress=encoded,
                    last=lambda: hashes.complete(lambda nbytes, total: report("hash", nbytes, total)),
                )
                unchanged(model, source)
                temporary.flush_to_disk()
                stored = os.fstat(temporary.file.fileno()).st_size
                if not raw and stored > (1 - MUST_SHRINK_BY) * source.size:
                    _wait_for(passed_over, options)
                    return _left_alone(model, source.size, stored, choice.reasons)
                os.fchmod(
                    temporary.file.fileno(), source.stat.st_mode & 0o666
                )  # after the access list, which changes it
                prove(store, temporary.path, lambda nbytes: report("prove", nbytes, source.size), manifest.sha256)
                with DiffFile(temporary.path) as diff:
                    reasons = (*choice.reasons, *map(str, made_of(diff)), *doubts, *lost.reasons)
                reasons += warnings(store, entries, target)
                unheld: list[str] = []

                def keep() -> None:
                    unheld.extend(keep_parents(store, entries, manifest.parents, opened))
                    if unheld and options.all_or_nothing:
                        raise ParentUnavailable(
                            "nothing is removed for a parent that cannot be held",
                            where=model,
                            detail="; ".join(unheld),
                            remedy="move it to the store's own filesystem, or name it with --base",
                        )
                    store.add_base_files([entry.path for entry in entries if not entry.is_diff])

                removed = _commit(
                    store, source, temporary, target, options,
                    keep,
                    lambda: _remember(
                        store, model, before, target, manifest.sha256, facts,
                        settled=source.quiet.stands() and is_settled(source.stat, source.fd),
                    ),
                    opened,
                )  # fmt: skip
            reasons += tuple(f"{why}: it must not go" for why in unheld)
            if not removed and not options.keep:
                reasons += (
                    "the original is kept: it, or what its diff needs, is in use or changed; dehydrate it again",
                )
            kept = 0
            if removed and os.fstat(source.fd).st_nlink:
                kept = source.size
                reasons += (f"{needed or 'another link keeps it'}: its {source.size / 1e6:.1f} MB are not freed",)
            names = tuple(p.name for p in parents)
            made = target if os.path.lexists(target) else None
            return Outcome(model, made, source.size, stored, manifest.sha256, names, reasons, removed, kept)
        finally:
            if hashes is not None:
                hashes.close()
            if ahead is not None:
                ahead.close()
            for parent in opened:
                parent.close()


def _scratch(store: Store, folder: Path, options: Options) -> Path:
    """Where the diff is written before it gets its name. What is done unasked stands in no folder of the user's: that
    may be moved or removed meanwhile."""
    return store.private if options.all_or_nothing and same_mount(store.private, folder) else folder


def _wait_for(passed_over: Mapping[str, Writers], options: Options) -> None:
    """What nobody asked for is not given up because the one base was being written to at the moment."""
    written = [name for name, found in passed_over.items() if found is Writers.SOMEBODY]
    if written and options.all_or_nothing:
        raise Changing("a base is being written to", where=written[0])


def _commit(
    store: Store,
    source: QuietFile,
    temporary: TemporaryFile,
    target: Path,
    options: Options,
    keep_parents: Callable[[], None],
    remember: Callable[[], None],
    opened: Sequence[FileSource | Rehydrated],
) -> bool:
    """Give the proved diff its name, and let the original go; whether it went."""
    model = Path(source.path)

    last_asked = options.last or options.still

    def check() -> None:
        last_asked()
        unchanged(model, source)
        all_quiet(source, opened, options, look=True)
        if options.all_or_nothing and (link := other_link(store, os.fstat(source.fd))):
            raise Changing("a model has got another link", where=model, detail=link)

    def last() -> None:
        last_asked()
        all_quiet(source, opened, options, look=True, renamed=True)

    options.still()
    # Who renames or removes models holds the lock too: the diff takes its place in one step for them.
    with store.lock():
        check()
        all_stand(opened)
        keep_parents()
        replace = target.exists() and trailer_of(target).sha256 == trailer_of(temporary.path).sha256
        if options.keep:
            temporary.commit(target, replace=replace)
            remember()
            return False
        with Original.of(store, model, target, temporary, source.stat) as original:
            try:
                temporary.commit(target, replace=replace)
            except BaseException:
                original.give_up()  # it may have its name by now
                raise
            remember()
            try:
                removed = may_go(source, opened) and original.go(check, last)
                if not removed and options.all_or_nothing:
                    raise Changing("a model, or what its diff needs, is in use", where=model)
            except BaseException:
                if options.all_or_nothing:
                    original.give_up()
                raise
    return removed


def _left_alone(model: Path, size: int, stored: int, reasons: tuple[str, ...]) -> Outcome:
    return Outcome(model, None, size, stored, b"", (), reasons, original_removed=False)


def _check_space(folder: Path, nbytes: float, model: Path) -> None:
    free = shutil.disk_usage(folder).free
    needed = int(nbytes * 1.1) + _SPACE_MARGIN_NBYTES
    if free < needed:
        raise NoSpace(
            "not enough space for the diff",
            where=model,
            detail=f"{free / 1e6:.0f} MB free in {folder}, about {needed / 1e6:.0f} MB needed",
        )


def _remember(
    store: Store, model: Path, before: FileIdentity, target: Path, digest: bytes, facts: ModelFacts, *, settled: bool
) -> None:
    with contextlib.suppress(OSError):
        if settled:
            store.catalog.remember_sha256(real_path(model), before, digest)
        store.catalog.remember_facts(target, FileIdentity.of(os.stat(target)), facts)
