"""What the commands that make models share: opening those that take part, writing the result, telling of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from hydrafs import containers
from hydrafs.cache import ChunkCache
from hydrafs.cli.common import (
    default_jobs,
    find_model,
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
from hydrafs.computing import Made, Progress, check_target, make_real, make_virtual
from hydrafs.errors import UsageError
from hydrafs.layout import FileSource
from hydrafs.opening import Opener
from hydrafs.recipes import Model, Recipe
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import ModelEntry, Store

_CACHE_NBYTES = 128 << 20
_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Taking:
    """A model that takes part: its store, what it is there, and the open model."""

    store: Store
    entry: ModelEntry
    source: FileSource | Rehydrated
    model: Model


def output_options(command: _Command) -> _Command:
    """The options of every command that makes a model."""
    options = (
        click.option(
            "--output", "-o", type=click.Path(path_type=Path), metavar="PATH", help="Write a full file to PATH."
        ),
        click.option(
            "--virtual",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Write a diff that costs kilobytes: the model is listed as PATH in the mount.",
        ),
        jobs_option,
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


keys_option = click.option(
    "--keys",
    type=click.Choice(["auto", "model", "all"]),
    default="auto",
    show_default=True,
    help="Which tensors take part: those with 'model' in their name, all, or (auto) the former of Stable Diffusion's "
    "checkpoints and all of others.",
)
half_option = click.option("--half", is_flag=True, help="Store fp32 results as fp16.")


@contextlib.contextmanager
def taking(names: Sequence[str | os.PathLike[str]]) -> Iterator[list[Taking]]:
    """The models of these names, open while the block lasts.

    Raises:
        HydraError: one of them is not there, or cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for name in names:
            store, entry = find_model(name)
            stack.callback(store.close)
            opener = stack.enter_context(contextlib.closing(Opener(store, ChunkCache(_CACHE_NBYTES))))
            source = stack.enter_context(contextlib.closing(opener.open(entry)))
            short = Path(entry.name).name
            found.append(Taking(store, entry, source, Model(short, source, containers.parse(source, short))))
        yield found


def write(
    recipe: Recipe,
    models: Sequence[tuple[Store, ModelEntry]],
    output: Path | None,
    virtual: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make the model of ``recipe`` where the options say, and tell of it. ``models``: where its models stand.

    Raises:
        UsageError: neither, or both, of the places were named.
    """
    if (output is None) == (virtual is None):
        raise UsageError(
            "where to is not clear",
            detail="neither or both of --output and --virtual",
            remedy="--output PATH writes a full file, --virtual PATH a diff of a few kilobytes",
        )
    if output is not None:
        with _stages("writing") as progress:
            made = make_real(recipe, _place(output), jobs=default_jobs(jobs), progress=progress)
    else:
        assert virtual is not None
        target = _place(virtual)
        check_target(target)
        with contextlib.closing(store_of(target.parent)) as store, _stages("making") as progress:
            entries = [entry for _, entry in models]
            # What the diff of another store needs is found there.
            others = {other.root for other, entry in models if entry.is_diff and other.root != store.root}
            made = make_virtual(
                store, recipe, entries, target, jobs=default_jobs(jobs), progress=progress, folders=sorted(others)
            )
    _tell(made, as_json)


def _place(path: Path) -> Path:
    """The path in the store where a path in a mount of ours was named."""
    return real_path(path.expanduser().absolute().parent) / path.name


@contextlib.contextmanager
def _stages(title: str) -> Iterator[Progress]:
    """A bar for each stage, one after another."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, Callable[[int], None]] = {}

        def progress(stage: str, nbytes: int, total: int) -> None:
            if stage not in bars:
                stack.pop_all().close()
                bars[stage] = stack.enter_context(progress_bar(f"{title}: {stage}", total))
            bars[stage](nbytes)

        yield progress


def _tell(made: Made, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "path": str(made.path),
                "stored_in": str(made.stored_in),
                "size": made.size,
                "stored": made.stored_nbytes,
                "sha256": made.sha256.hex(),
                "is": made.recipe.summary,
                "told": list(made.recipe.told),
                "as_they_are": list(made.recipe.stayed),
            }
        )
        return
    for line in made.recipe.told:
        say(line)
    say(f"{made.path}: {made.recipe.summary}")
    stored = ""
    if made.stored_in != made.path:
        stored = f" in {human(made.stored_nbytes)} ({percent(made.stored_nbytes, made.size)}), {made.stored_in.name}"
    say(f"{human(made.size)}{stored}, SHA-256 {made.sha256.hex()}")
