"""``hydrafs merge``: a model out of two or three others."""

from __future__ import annotations

from pathlib import Path

import click

from hydrafs import arithmetic
from hydrafs.cli.making import half_option, keys_option, output_options, taking, write


@click.command("merge", short_help="Make a model out of two or three others.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="How much of A, or of the difference.")
@click.option("--add-difference", "c", metavar="C", help="Make A + alpha*(B - C) instead.")
@half_option
@keys_option
@output_options
def command(
    a: str,
    b: str,
    alpha: float,
    c: str | None,
    half: bool,
    keys: str,
    output: Path | None,
    virtual: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make alpha*A + (1-alpha)*B.

    Tensors that both have are merged (of Stable Diffusion's checkpoints those with "model" in their names, as A1111
    does); A's others stay, and those of B alone are appended. What stays as it is is named.
    With --add-difference C it is A + alpha*(B - C). The result has A's order of tensors, and the container that PATH's
    ending names. --virtual makes it in a few kilobytes: the mount computes it when it is read.
    """
    arithmetic.check_ratio(alpha)
    with taking([a, b] if c is None else [a, b, c]) as models:
        taken = [t.model for t in models]
        if c is None:
            recipe = arithmetic.merge(taken[0], taken[1], alpha, half=half, keys=keys)
        else:
            recipe = arithmetic.add_difference(taken[0], taken[1], taken[2], alpha, half=half, keys=keys)
        write(recipe, [(t.store, t.entry) for t in models], output, virtual, jobs, as_json)
