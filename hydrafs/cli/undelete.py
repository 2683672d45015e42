"""``hydrafs undelete``: what was removed through a mount."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import click

from hydrafs import trash
from hydrafs.cli.common import human, json_option, open_store, print_json, say
from hydrafs.errors import UsageError


@click.command("undelete", short_help="List or bring back what was removed through a mount.")
@click.argument("store", metavar="STORE")
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--to", metavar="NEW", help="Give it this name, relative to STORE, instead of the one that it had.")
@click.option("--purge", is_flag=True, help="Remove for good what is in the trash, and give its space back.")
@json_option
def command(store: str, name: str | None, to: str | None, purge: bool, as_json: bool) -> int:
    """Bring the model NAME back that was removed, renamed over or emptied through a mount of STORE; without NAME, list
    what can be had back.

    What was removed is kept for a day where there is room: a tenth of the filesystem at most, and no more than is free
    beside it. It goes sooner where space is needed. [trash] in .hydrafs/config.toml says for how many seconds, and
    "trash = false" that nothing is kept. What hydrafs rm removes, or a program in STORE itself, is not kept.
    """
    if (name is not None and purge) or (to is not None and name is None):
        raise UsageError("not both, or not alone", where="undelete", remedy="name a model, or --purge, or neither")
    with contextlib.closing(open_store(store)) as opened:
        if purge:
            freed = trash.purge(opened)
            if as_json:
                print_json({"freed": freed})
            else:
                say(f"{human(freed)} freed")
            return 0
        if name is None:
            found = trash.listing(opened)
            if as_json:
                print_json(
                    [
                        {"name": t.name, "size": t.nbytes, "dehydrated": t.is_diff, "removed_at": t.removed_at}
                        for t in found
                    ]
                )
                return 0
            for t in found:
                removed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t.removed_at))
                say(f"{removed}  {human(t.nbytes):>9}  {t.name}")
            return 0
        back = trash.restore(opened, name, opened.root / Path(to) if to is not None else None)
        shown = opened.relative(back)
        if as_json:
            print_json({"name": shown, "path": os.fspath(back)})
        else:
            say(f"{shown}: back")
    return 0
