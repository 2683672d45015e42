"""``hydrafs rehydrate``: diff to full file, as it was, or stronger, weaker, or on another model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hydrafs import arithmetic, containers, restore
from hydrafs.allocator import tune_allocator
from hydrafs.cli.common import find_model, human, print_json, progress_bar, say
from hydrafs.cli.making import keys_option, output_options, taking, write
from hydrafs.errors import UsageError
from hydrafs.recipes import Model
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import ModelEntry, Store, trailer_of


@click.command("rehydrate", short_help="Write a dehydrated model as a full file, or a stronger one.")
@click.argument("diff", metavar="DIFF")
@click.option("--strength", type=float, metavar="S", help="Make it stronger or weaker: diff*(1+S) + base*(1-S).")
@click.option("--onto", metavar="MODEL", help="Add the difference to another model.")
@click.option(
    "--base", metavar="PATH", help="What to take the difference to (default: what the diff was made against)."
)
@keys_option
@output_options
def command(
    diff: str,
    strength: float | None,
    onto: str | None,
    base: str | None,
    keys: str,
    output: Path | None,
    virtual: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Write the model that DIFF stands for as a full file, with its mode and mtime. The diff stays where it is.

    With --strength S or --onto MODEL a new model is made: the difference to the base, weighted, on the base or on
    another model. --output names a full file for it, --virtual a diff of a few kilobytes. Strength 0 is the original.
    """
    if onto is None and not strength:
        if virtual is not None:
            raise UsageError(
                "it is listed already", where=diff, remedy="give --strength or --onto, or --output for a full file"
            )
        _restore(diff, output, as_json)
        return
    amount = arithmetic.check_ratio(strength or 0.0)
    with taking([diff, *filter(None, [base]), *filter(None, [onto])]) as models:
        first = models[0]
        graft = models[-1].model if onto is not None else None
        places = [(t.store, t.entry) for t in models]
        if base is not None:
            bases = [models[1].model]
            origins = arithmetic.origins_by_name(first.model, bases)
        elif isinstance(first.source, Rehydrated):
            bases = []
            for parent in first.source.parents:
                name = Path(parent.name).name
                bases.append(Model(name, parent.source, containers.parse(parent.source, name)))
            origins = arithmetic.origins_by_name(first.model, bases, first.source.diff)
            places[1:1] = [(first.store, _entry_of(first.store, parent.source)) for parent in first.source.parents]
        else:
            raise UsageError("not a diff", where=diff, remedy="name what it differs from with --base")
        recipe = arithmetic.strength(first.model, bases, origins, amount, graft, keys=keys)
        write(recipe, places, output, virtual, jobs, as_json)


def _entry_of(store: Store, source: object) -> ModelEntry:
    """Where an open parent stands."""
    path = source.diff.path if isinstance(source, Rehydrated) else getattr(source, "path", "")
    return ModelEntry(store.relative(Path(path)), Path(path), isinstance(source, Rehydrated))


def _restore(diff: str, output: Path | None, as_json: bool) -> None:
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
