"""``hydrafs dehydrate``: models to diffs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import click

from hydrafs.allocator import tune_allocator
from hydrafs.choosing import AUTOMATIC
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
from hydrafs.errors import HydraError, UsageError
from hydrafs.journal import is_about
from hydrafs.replacing import recover
from hydrafs.store import Store
from hydrafs.temporary import remove_leftovers


@click.command("dehydrate", short_help="Turn models into small diffs.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--store", "folder", metavar="DIR", help="Put the diffs here (default: beside each model).")
@click.option("--base", "bases", multiple=True, metavar="PATH", help="Store against this model; may be given again.")
@click.option("--no-compress", is_flag=True, help="Store residuals as they are, for the fastest reads.")
@click.option("--codec", metavar="NAME", help="One codec for all: rans, planes, zstd, raw (default: the best).")
@click.option("--keep", is_flag=True, help="Leave the original where it is.")
@jobs_option
@json_option
def command(
    models: tuple[str, ...],
    folder: str | None,
    bases: tuple[str, ...],
    no_compress: bool,
    codec: str | None,
    keep: bool,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Turn each MODEL into a diff, NAME.hydra, against the base that fits it best.

    The diff is read back from disk and must give the model's SHA-256 before the original is removed. A model that would
    not shrink by 5 % is left alone.
    """
    if no_compress and codec not in (None, "raw"):
        raise UsageError("options exclude each other", where=f"--no-compress, --codec {codec}", remedy="drop one")
    tune_allocator()
    paths = [real_path(m) for m in models]
    outcomes: list[dict[str, object]] = []
    worst = 0
    chosen = "raw" if no_compress else codec or AUTOMATIC
    for path in paths:
        try:
            outcome = _one(path, folder, bases, chosen, keep, default_jobs(jobs), tuple(paths))
        except HydraError as error:
            if len(paths) == 1:
                raise
            # The others are none the worse for it.
            print(f"hydrafs: {error}", file=sys.stderr)
            worst = worst or error.exit_code
            continue
        outcomes.append(_facts(outcome))
        if not as_json:
            _tell(outcome)
    if as_json:
        print_json(outcomes)
    return worst


def _one(
    path: Path,
    folder: str | None,
    bases: tuple[str, ...],
    codec: str,
    keep: bool,
    jobs: int,
    together: tuple[Path, ...],
) -> Outcome:
    target = real_path(folder) if folder else path.parent
    options = Options(
        bases=tuple(real_path(b) for b in bases),
        not_bases=together,
        keep=keep,
        jobs=jobs,
        codec=codec,
        begin=lambda: _tidy(store, target),
    )
    with contextlib.closing(store_of(target)) as store, contextlib.ExitStack() as stack:
        if not path.exists() and is_about(store, path):
            recover(store)  # the original may be what a killed command has to give back
        bars: dict[Stage, Callable[[int], None]] = {}
        titles = {"hash": "hashing the base", "encode": f"dehydrating {path.name}", "prove": f"proving {path.name}"}

        def report(stage: Stage, nbytes: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # one bar at a time: the stages follow each other
                bars[stage] = stack.enter_context(progress_bar(titles[stage], total))
            bars[stage](nbytes)

        return dehydrate(store, path, options, folder=target, progress=report)


def _tidy(store: Store, target: Path) -> None:
    """End what killed commands left; a folder that is no store yet is not made one for it."""
    if store.private.is_dir():
        recover(store)
    remove_leftovers(target)


def _facts(outcome: Outcome) -> dict[str, object]:
    return {
        "model": str(outcome.model),
        "diff": str(outcome.diff) if outcome.diff else None,
        "size": outcome.size,
        "stored": outcome.stored_nbytes if outcome.diff else outcome.size,
        "sha256": outcome.sha256.hex() or None,
        "parents": list(outcome.parents),
        "reasons": list(outcome.reasons),
        "original_removed": outcome.original_removed,
        "kept": outcome.kept_nbytes,
    }


def _tell(outcome: Outcome) -> None:
    for reason in outcome.reasons:
        say(f"  {reason}")
    if outcome.diff is None:
        share = percent(outcome.stored_nbytes, outcome.size)
        would = f"it would take {share} of its size ({human(outcome.size)})" if outcome.size else "it is empty"
        say(f"{outcome.model.name}: left alone, {would}")
        return
    kept = "" if outcome.original_removed else ", the original is kept"
    say(
        f"{outcome.model.name}: {human(outcome.size)} -> {human(outcome.stored_nbytes)} "
        f"({percent(outcome.stored_nbytes, outcome.size)}), proved by SHA-256 {outcome.sha256.hex()[:16]}...{kept}"
    )
