"""``hydrafs uncompress``: a diff without compression."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hydrafs import restore
from hydrafs.allocator import tune_allocator
from hydrafs.cli.common import default_jobs, find_model, human, jobs_option, json_option, print_json, progress_bar, say
from hydrafs.store import trailer_of


@click.command("uncompress", short_help="Recode a diff without compression.")
@click.argument("diff", metavar="DIFF")
@jobs_option
@json_option
def command(diff: str, jobs: int | None, as_json: bool) -> None:
    """Store each chunk of DIFF as it is, for the fastest reads.

    What a parent holds byte for byte is still not stored.
    """
    tune_allocator()
    store, entry = find_model(diff)
    with contextlib.closing(store):
        size = trailer_of(entry.path).size if entry.is_diff else 0
        with progress_bar(f"recoding {Path(entry.name).name}", size) as progress:
            before, after = restore.uncompress(store, entry, jobs=default_jobs(jobs), progress=progress)
    if as_json:
        print_json({"diff": str(entry.path), "before": before, "after": after})
    else:
        say(f"{entry.path}: {human(before)} -> {human(after)}")
