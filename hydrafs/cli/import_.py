"""``hydrafs import``: a diff of the seed tool to one of ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import click

from hydrafs.cache import ChunkCache
from hydrafs.cli.common import (
    default_jobs,
    human,
    jobs_option,
    json_option,
    percent,
    print_json,
    progress_bar,
    real_path,
    say,
    store_of,
)
from hydrafs.dehydrate import Options, Outcome, Stage, dehydrate
from hydrafs.diff import SUFFIX
from hydrafs.errors import AlreadyThere, UsageError, from_oserror
from hydrafs.opening import Opener
from hydrafs.replacing import recover
from hydrafs.seed import checkpoint
from hydrafs.seed.plan import Item, hydrated
from hydrafs.seed.reader import limit_for, open_diff
from hydrafs.seed.states import State, read_state
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile, remove_leftovers

_BASE_CACHE_NBYTES = 96 << 20


@click.command("import", short_help="Store a diff of the seed tool as one of ours.")
@click.argument("legacy", metavar="LEGACY")
@click.option("--base", required=True, metavar="PATH", help="The model that it was made against.")
@click.option("--store", "folder", metavar="DIR", help="Put the diff here (default: beside LEGACY).")
@click.option("--name", "--output", "-o", metavar="NAME", help="What to list the model as (default: LEGACY's, .ckpt).")
@jobs_option
@json_option
def command(legacy: str, base: str, folder: str | None, name: str | None, jobs: int | None, as_json: bool) -> None:
    """Store what ckpt_add.py would make of LEGACY and its base, tensor for tensor, as a diff against that base.

    LEGACY is what ckpt_subtract.py wrote, compressed or not; it is left as it is, and nothing in it is executed. The
    model is made in memory and in a temporary file of its full size in the store.
    """
    path = real_path(legacy)
    target = _target(path, folder, name)
    with contextlib.closing(store_of(target.parent)) as store, contextlib.ExitStack() as stack:
        for taken in (target, target.with_name(target.name + SUFFIX)):
            if os.path.lexists(taken):
                raise AlreadyThere("a model of that name exists", where=taken, remedy="name another with --name")
        entry = store.locate(real_path(base))
        opener = stack.enter_context(contextlib.closing(Opener(store, ChunkCache(_BASE_CACHE_NBYTES))))
        source = stack.enter_context(contextlib.closing(opener.open(entry)))
        base_state = read_state(source, entry.name)
        with progress_bar(f"reading {path.name}", path.stat().st_size if path.is_file() else 0) as progress:
            limit = limit_for(source.size)
            diff_state = stack.enter_context(open_diff(path, target.parent, limit, progress, nameless=True))
        items = hydrated(diff_state, base_state)
        # Nothing is refused any more: what killed commands left is tidied, and the model is made.
        if store.private.is_dir():
            recover(store)
        remove_leftovers(target.parent)
        temporary = stack.enter_context(TemporaryFile(target.parent))
        _write(temporary, items, path)
        outcome = _store(store, temporary, entry.path, target, default_jobs(jobs))
        if outcome.diff is None:
            temporary.commit(target)
    _tell(outcome, target, _counts(items, base_state), as_json)


def _target(path: Path, folder: str | None, name: str | None) -> Path:
    """Where the model is to be listed."""
    listed = Path(name) if name else Path(f"{path.name.removesuffix('.pbz2').removesuffix('.ckpt')}.ckpt")
    if not listed.name or listed.name in (".", ".."):
        raise UsageError("no name for the model", where=path, remedy="name it with --name")
    if listed.name.endswith(SUFFIX):
        listed = listed.with_name(listed.name.removesuffix(SUFFIX))
    if folder:
        parent = real_path(folder) / listed.parent
    else:
        parent = real_path(listed.parent) if name and listed.parent != Path() else path.parent
    return parent / listed.name


def _write(temporary: TemporaryFile, items: tuple[Item, ...], legacy: Path) -> None:
    """The full model, with LEGACY's permissions and time: what it stands for is as old as that."""
    total = sum(_nbytes(item) for item in items)
    stat = legacy.stat()
    try:
        with progress_bar("rehydrating it", total) as progress:
            checkpoint.write(temporary.file, items, progress)
        os.fchmod(temporary.file.fileno(), stat.st_mode & 0o666 | 0o400)
        temporary.seal()
        os.chmod(temporary.path, stat.st_mode & 0o666)
        os.utime(temporary.path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    except OSError as error:
        raise from_oserror(error, "cannot write the model", temporary.path.parent) from error


def _nbytes(item: Item) -> int:
    return max(ref.nbytes for ref in (item.diff, item.base) if ref is not None)


def _store(store: Store, temporary: TemporaryFile, base: Path, target: Path, jobs: int) -> Outcome:
    with contextlib.ExitStack() as stack:
        bars: dict[Stage, Callable[[int], None]] = {}
        titles = {"hash": "hashing the base", "encode": f"dehydrating {target.name}", "prove": f"proving {target.name}"}

        def report(stage: Stage, nbytes: int, total: int) -> None:
            if stage not in bars:
                stack.close()
                bars[stage] = stack.enter_context(progress_bar(titles[stage], total))
            bars[stage](nbytes)

        options = Options(bases=(base,), keep=True, jobs=jobs)
        return dehydrate(store, temporary.path, options, folder=target.parent, name=target.name, progress=report)


def _counts(items: tuple[Item, ...], base: State) -> dict[str, int]:
    counts = {how: sum(item.how == how for item in items) for how in ("added", "base", "diff")}
    keys = {item.key for item in items}
    return {**counts, "dropped": sum(key not in keys for key in base)}


def _tell(outcome: Outcome, target: Path, counts: dict[str, int], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "model": str(target),
                "diff": str(outcome.diff) if outcome.diff else None,
                "size": outcome.size,
                "stored": outcome.stored_nbytes if outcome.diff else outcome.size,
                "sha256": outcome.sha256.hex() or None,
                "parents": list(outcome.parents),
                "tensors": counts,
            }
        )
        return
    parts = [f"{counts['added']} tensors added to the base's", f"{counts['base']} are the base's"]
    if counts["diff"]:
        parts.append(f"{counts['diff']} are not in the base and stay as the diff has them")
    if counts["dropped"]:
        parts.append(f'{counts["dropped"]} of the base without "model" in their names are dropped')
    say("  " + ", ".join(parts))
    if outcome.diff is None:
        share = percent(outcome.stored_nbytes, outcome.size)
        say(f"{target.name}: kept as a full file of {human(outcome.size)}, a diff would take {share} of it")
        return
    say(
        f"{target.name}: {human(outcome.size)} -> {human(outcome.stored_nbytes)} "
        f"({percent(outcome.stored_nbytes, outcome.size)}), proved by SHA-256 {outcome.sha256.hex()[:16]}..."
    )
