"""The options that say what is dehydrated in the background: of ``hydrafs mount`` and of ``hydrafs watch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from hydrafs.policy import MIN_NBYTES, SETTLE_SECONDS
from hydrafs.sizes import parse_nbytes

_Command = TypeVar("_Command", bound=Callable[..., Any])


def policy_options(command: _Command) -> _Command:
    """The options that say what is dehydrated in the background; ``policy_given`` takes them."""
    for option in reversed(
        [
            click.option(
                "--dehydrate", type=click.Choice(["auto", "off"]), help="Whether models are dehydrated [default: auto]."
            ),
            click.option(
                "--settle", type=click.FloatRange(0), metavar="SECONDS",
                help=f"How long a model must have been left alone [default: {SETTLE_SECONDS:.0f}].",
            ),
            click.option("--include", multiple=True, metavar="PATTERN", help="Only models of such names."),
            click.option("--exclude", multiple=True, metavar="PATTERN", help="No models of such names."),
            click.option("--min-size", metavar="SIZE", help=f"No smaller ones [default: {MIN_NBYTES >> 20}M]."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def policy_given(
    dehydrate: str | None,
    settle: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_size: str | None,
) -> dict[str, object]:
    """What goes before the store's configuration, by the fields of ``hydrafs.worker.Policy``."""
    return {
        "enabled": None if dehydrate is None else dehydrate == "auto",
        "settle_seconds": settle,
        "include": include or None,
        "exclude": exclude or None,
        "min_nbytes": parse_nbytes(min_size) if min_size else None,
    }
