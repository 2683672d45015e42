"""``hydrafs rm``: models out of the listing."""

from __future__ import annotations

import contextlib
import sys

import click

from hydrafs import keeping
from hydrafs.cli.common import find_model, json_option, print_json, say
from hydrafs.errors import HydraError, from_oserror


@click.command("rm", short_help="Remove models; what others need is kept out of sight.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@json_option
def command(models: tuple[str, ...], as_json: bool) -> int:
    """Remove each MODEL, plain or dehydrated, from its store.

    A model that others need moves to .hydrafs/retired/, where it goes on serving them and is in no listing; hydrafs gc
    removes it when nobody needs it any more.
    """
    results: list[dict[str, object]] = []
    worst = 0
    for name in models:
        try:
            results.append(_one(name))
        except HydraError as error:
            if len(models) == 1:
                raise
            print(f"hydrafs: {error}", file=sys.stderr)
            worst = worst or error.exit_code
            continue
        if not as_json:
            kept = " (others need it: it is kept for them, out of sight)" if results[-1]["retired"] else ""
            say(f"{results[-1]['name']}: removed{kept}")
    if as_json:
        print_json(results)
    return worst


def _one(name: str) -> dict[str, object]:
    store, entry = find_model(name)
    with contextlib.closing(store):
        listed = store.root / entry.name
        try:
            retired = keeping.needed_as(store, entry.path, is_diff=entry.is_diff) is not None
            keeping.remove_model(store, listed, protect=False)
        except OSError as error:
            raise from_oserror(error, "cannot remove the model", listed) from error
    return {"name": entry.name, "retired": retired}
