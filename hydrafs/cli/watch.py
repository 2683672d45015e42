"""``hydrafs watch``: dehydration in the background, as a process of its own."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading

import click

from hydrafs.cli.background import policy_given, policy_options
from hydrafs.cli.common import log_format_option, real_path, service_log
from hydrafs.cli.known_stores import check_expected
from hydrafs.logs import log_to
from hydrafs.store import Store
from hydrafs.worker import run


@click.command("watch", short_help="Dehydrate what lands in a store, in the background.")
@click.argument("store", metavar="STORE")
@policy_options
@click.option("--existing", is_flag=True, help="Refuse a folder without a model and a mark: its disk is missing.")
@log_format_option
def command(
    store: str,
    dehydrate: str | None,
    settle: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_size: str | None,
    existing: bool,
    log_format: str,
) -> None:
    """Dehydrate the models of STORE that have been closed and quiet for a while, one at a time, until it is ended.

    A mount does this by itself; this is for a process of its own. Where both run on one store, one of them waits. The
    options go before the store's configuration, the table [worker] in .hydrafs/config.toml.
    """
    log_to(sys.stderr, service_log(as_json=log_format == "json"))
    with contextlib.closing(Store(real_path(store), looks=True)) as opened:
        check_expected(opened, existing=existing, new=not existing)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    run(real_path(store), policy_given(dehydrate, settle, include, exclude, min_size), end=ended.wait)
