"""``hydrafs gc``: what nobody needs any more."""

from __future__ import annotations

import contextlib

import click

from hydrafs import tending
from hydrafs.cli.common import default_jobs, human, jobs_option, json_option, open_store, print_json, say
from hydrafs.dehydrate import Options
from hydrafs.retained import aside_files


@click.command("gc", short_help="Remove retired models that nobody needs any more.")
@click.argument("store", metavar="STORE")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--rehome", is_flag=True, help="Store dependents against other models first, where that saves space.")
@jobs_option
@json_option
def command(store: str, dry_run: bool, rehome: bool, jobs: int | None, as_json: bool) -> int:
    """Remove from .hydrafs/ the retired models, and the links that hold parents, that no diff of STORE needs.

    With --rehome, the dependents of a retired model are stored against other models where all in all that takes less;
    each new diff is proved before it takes the old one's place. --dry-run changes nothing at all. A mount, and hydrafs
    watch, do all of this by themselves. Exit code 1 where a folder cannot be listed or a diff not be read: nobody knows
    what is needed, and nothing is removed.
    """
    with contextlib.closing(open_store(store)) as opened:
        dry_run = dry_run or not opened.private.is_dir()  # what is no store is not made one to find nothing in it
        if not dry_run:
            tending.start(opened)
            tending.hash_unhashed(opened)
        rehomed = tending.rehome(opened, Options(jobs=default_jobs(jobs)), dry_run=dry_run) if rehome else []
        collected = tending.collect(opened, dry_run=dry_run)
        left = list(aside_files(opened))
        removed = [(opened.relative(r.path), r) for r in collected.removed]
    freed = sum(r.freed_nbytes for _, r in removed)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "removed": [{"path": p, "freed": r.freed_nbytes, "reason": r.reason} for p, r in removed],
                "freed": freed,
                "rehomed": [
                    {"name": r.name, "before": r.before_nbytes, "after": r.after_nbytes, "parents": list(r.parents)}
                    for r in rehomed
                ],
                "unreadable": [str(p) for p in collected.unreadable],
                "aside": [opened.relative(p) for p in left],
            }
        )
        return 1 if collected.unreadable else 0
    for home in rehomed:
        parents = ", ".join(home.parents) or "nothing"
        if home.after_nbytes is None:
            say(f"{home.name}: {human(home.before_nbytes)}, would be tried against others")
            continue
        say(f"{home.name}: {human(home.before_nbytes)} -> {human(home.after_nbytes)}, needs {parents}")
    for path, r in removed:
        say(f"{path}: {human(r.freed_nbytes)}, {r.reason}")
    for trouble in collected.troubles:
        say(f"{trouble}; nobody knows what is needed, so nothing is removed (hydrafs verify says more)")
    for aside in left:
        say(f"{aside}: an original that stands aside since a kill; no diff stands for it")
    would = "would be " if dry_run else ""
    say(f"{len(removed)} {would}removed, {human(freed)} {would}freed")
    return 1 if collected.unreadable else 0
