"""``hydrafs convert``: a model with another VAE, without EMA weights, or cast."""

from __future__ import annotations

from pathlib import Path

import click

from hydrafs import arithmetic
from hydrafs.assembling import container_for
from hydrafs.cli.making import output_options, taking, write
from hydrafs.errors import UsageError

_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@click.command("convert", short_help="Make a model with another VAE, without EMA, or in another precision.")
@click.argument("model", metavar="MODEL")
@click.option("--vae", metavar="PATH", help="Take the VAE from another file, whole model or VAE alone.")
@click.option("--drop-ema", is_flag=True, help="Leave out the EMA copies (model_ema.*).")
@click.option("--half", is_flag=True, help="Cast to fp16; the same as --dtype fp16.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Cast all real tensors.")
@output_options
def command(
    model: str,
    vae: str | None,
    drop_ema: bool,
    half: bool,
    dtype: str | None,
    output: Path | None,
    virtual: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make a copy of MODEL that differs in its container, its VAE, its EMA weights or its precision.

    --virtual makes it in a few kilobytes: the mount computes it when it is read.
    """
    if half and dtype not in (None, "fp16"):
        raise UsageError("two precisions at once", detail=f"--half and --dtype {dtype}", remedy="give one of them")
    wanted = "F16" if half else _DTYPES[dtype] if dtype else ""
    with taking([model] if vae is None else [model, vae]) as models:
        target = output or virtual
        if (
            target
            and not (vae or drop_ema or wanted)
            and container_for(target.name) == models[0].model.layout.container
        ):
            raise UsageError(
                "nothing to be done", where=model, remedy="give --vae, --drop-ema, --half, --dtype or another ending"
            )
        other = models[1].model if vae is not None else None
        recipe = arithmetic.convert(models[0].model, vae=other, drop_ema=drop_ema, dtype=wanted)
        write(recipe, [(t.store, t.entry) for t in models], output, virtual, jobs, as_json)
