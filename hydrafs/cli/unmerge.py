"""``hydrafs unmerge``: the other model of a merge."""

from __future__ import annotations

from pathlib import Path

import click

from hydrafs import arithmetic
from hydrafs.cli.making import half_option, keys_option, output_options, taking, write


@click.command("unmerge", short_help="Make the other model of a merge, given one.")
@click.argument("merged", metavar="MERGED")
@click.argument("known", metavar="KNOWN")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="The share of the model that is sought.")
@half_option
@keys_option
@output_options
def command(
    merged: str,
    known: str,
    alpha: float,
    half: bool,
    keys: str,
    output: Path | None,
    virtual: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make (MERGED - (1-alpha)*KNOWN) / alpha: what was merged with KNOWN to give MERGED."""
    arithmetic.check_ratio(alpha)
    with taking([merged, known]) as models:
        recipe = arithmetic.unmerge(models[0].model, models[1].model, alpha, half=half, keys=keys)
        write(recipe, [(t.store, t.entry) for t in models], output, virtual, jobs, as_json)
