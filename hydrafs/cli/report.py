"""``hydrafs report``: a page of pictures about a store."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from hydrafs.cli.common import human, open_store, say
from hydrafs.diff import SUFFIX
from hydrafs.errors import AlreadyThere, UsageError


@click.command("report", short_help="A page of pictures about a store.")
@click.argument("store", metavar="STORE")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, metavar="FILE.html", help="The page.")
@click.option("--heat-maps", type=click.IntRange(0, 1000), default=24, show_default=True, help="How many, at most.")
def command(store: str, output: Path, heat_maps: int) -> None:
    """Make a page about STORE that needs nothing else: the family tree of its models, what they save, and for each
    fine-tune which layers it changed and how much.
    """
    output = Path(os.path.abspath(output.expanduser()))
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError("no place for the page", where=output, remedy="name a file in a folder that exists")
    _refuse_other(output)
    open_store(store).close()  # what is refused loads no matplotlib, which writes a cache of its own
    try:
        from hydrafs import report  # noqa: PLC0415 - matplotlib is there only where it was asked for
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UsageError(
            "matplotlib is not installed",
            detail="the pictures are drawn with it",
            remedy="pip install 'hydrafs[report]'",
        ) from None
    with contextlib.closing(open_store(store)) as opened:
        page = report.report(opened, human, max_heat_maps=heat_maps)
    report.write(output, page)
    say(f"{output}: {human(len(page.encode()))}")


def _refuse_other(output: Path) -> None:
    """Return if the page takes no name but that of a page.

    Raises:
        AlreadyThere: something else has it, dehydrated or not.
    """
    if os.path.lexists(f"{output}{SUFFIX}") or (os.path.lexists(output) and not _is_page(output)):
        raise AlreadyThere("another file has the name", where=output, remedy="name another with --output")


def _is_page(path: Path) -> bool:
    """Whether a file is a page, or has nothing in it."""
    try:
        with open(path, "rb") as file:
            head = file.read(64).lower()
    except OSError:
        return False
    return not head or head.startswith((b"<!doctype html", b"<html"))
