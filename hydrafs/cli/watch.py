"""``hydrafs watch``: dehydration in the background, as a process of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hydrafs.cli.common import log_to_stderr, parse_nbytes, real_path
from hydrafs.worker import MIN_NBYTES, SETTLE_SECONDS, run

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


@click.command("watch", short_help="Dehydrate what lands in a store, in the background.")
@click.argument("store", metavar="STORE")
@policy_options
def command(
    store: str,
    dehydrate: str | None,
    settle: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_size: str | None,
) -> None:
    """Dehydrate the models of STORE that have been closed and quiet for a while, one at a time, until it is ended.

    A mount does this by itself; this is for a process of its own. Where both run on one store, one of them waits. The
    options go before the store's configuration, the table [worker] in .hydrafs/config.toml.
    """
    log_to_stderr(logging.INFO, with_time=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    run(real_path(store), policy_given(dehydrate, settle, include, exclude, min_size), end=ended.wait)
