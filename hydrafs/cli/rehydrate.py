"""``hydrafs rehydrate``: diff to full file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hydrafs import restore
from hydrafs.allocator import tune_allocator
from hydrafs.cli.common import find_model, human, json_option, print_json, progress_bar, say
from hydrafs.store import trailer_of


@click.command("rehydrate", short_help="Write a dehydrated model as a full file.")
@click.argument("diff", metavar="DIFF")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="PATH", help="Where to (default: beside it).")
@json_option
def command(diff: str, output: Path | None, as_json: bool) -> None:
    """Write the model that DIFF stands for as a full file, with its mode and mtime. The diff stays where it is."""
    tune_allocator()
    store, entry = find_model(diff)
    with contextlib.closing(store):
        size = trailer_of(entry.path).size if entry.is_diff else 0
        with progress_bar(f"rehydrating {Path(entry.name).name}", size) as progress:
            restored = restore.rehydrate(store, entry, output, progress=progress)
    if as_json:
        print_json({"path": str(restored.path), "size": restored.size, "sha256": restored.sha256.hex()})
    else:
        say(f"{restored.path}: {human(restored.size)}, SHA-256 {restored.sha256.hex()}")
