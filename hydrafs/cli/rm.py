"""``hydrafs rm``: models out of the listing."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from hydrafs import keeping
from hydrafs.cli.common import find_model, human, json_option, print_json, say
from hydrafs.errors import HydraError, from_oserror


@click.command("rm", short_help="Remove models; what others need is kept out of sight.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@json_option
def command(models: tuple[str, ...], as_json: bool) -> int:
    """Remove each MODEL, plain or dehydrated, from its store.

    A model that others need, or may need while a diff cannot be read, moves to .hydrafs/retired/, where it goes on
    serving them and is in no listing; it goes when nobody needs it any more, by a mount, hydrafs watch or hydrafs gc.
    Everything else is gone at once: hydrafs undelete has only what was removed through a mount.
    """
    results: list[dict[str, Any]] = []
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
            say(f"{results[-1]['name']}: removed{_kept(results[-1])}")
    if as_json:
        print_json(results)
    return worst


def _one(name: str) -> dict[str, Any]:
    store, entry = find_model(name)
    with contextlib.closing(store):
        listed = store.root / entry.name
        try:
            nbytes = os.stat(entry.path).st_size
            removal = keeping.remove_model(store, listed, protect=False)
        except OSError as error:
            raise from_oserror(error, "cannot remove the model", listed) from error
    return {
        "name": entry.name,
        "retired": removal.is_retired,
        "kept_for": list(removal.dependents),
        "kept_nbytes": nbytes if removal.is_retired else 0,
        "doubts": [str(trouble) for trouble in removal.doubts],
    }


def _kept(result: dict[str, Any]) -> str:
    if not result["retired"]:
        return ""
    size = human(result["kept_nbytes"])
    if result["doubts"]:
        return f" ({size} are kept, out of sight: nobody knows whether others need it, {result['doubts'][0]})"
    names = result["kept_for"]
    who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "models that are kept"
    return f" (others need it: {size} are kept for {who}, out of sight)"
