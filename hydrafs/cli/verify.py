"""``hydrafs verify``: decode everything and compare."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from hydrafs import restore, tending
from hydrafs.allocator import tune_allocator
from hydrafs.cli.common import find_model, human, json_option, print_json, progress_bar, real_path, say, tell_unheld
from hydrafs.errors import HydraError, NotFound
from hydrafs.store import ModelEntry, Store, find_root


@click.command("verify", short_help="Decode everything and compare SHA-256.")
@click.argument("targets", nargs=-1, required=True, metavar="STORE_OR_DIFF...")
@json_option
def command(targets: tuple[str, ...], as_json: bool) -> int:
    """Decode every diff of each STORE, or each DIFF, and compare the SHA-256 of what comes out with what it must be.

    Exit code 1 if any is bad; each is named, with what to do.
    """
    tune_allocator()
    results = []
    for target in targets:
        store, entries = _entries(target)
        with contextlib.closing(store):
            if os.access(store.root, os.W_OK) and store.private.is_dir():
                tell_unheld([need.parent.name for need in tending.hold_parents(store)])
            for entry in entries:
                result = _check(store, entry)
                results.append(result)
                if not as_json:
                    say(f"{'ok ' if result['ok'] else 'BAD'} {result['name']}: {result['message']}")
    bad = [r for r in results if not r["ok"]]
    if as_json:
        print_json({"checked": len(results), "bad": len(bad), "models": results})
    else:
        say(f"{len(results)} diffs checked, {len(bad)} bad")
    return 1 if bad else 0


def _entries(target: str) -> tuple[Store, list[ModelEntry]]:
    path = real_path(target)
    if path.is_dir():
        root = find_root(path) or path
        store = Store(root)
        return store, [m for m in store.models(path) if m.is_diff]
    store, entry = find_model(path)
    if not entry.is_diff:
        raise NotFound("no diff of that name", where=path, remedy="a plain file has nothing to be compared with")
    return store, [entry]


def _check(store: Store, entry: ModelEntry) -> dict[str, object]:
    try:
        size = 0
        with contextlib.suppress(OSError):
            size = entry.path.stat().st_size
        with progress_bar(f"verifying {Path(entry.name).name}", size * 4) as progress:
            digest = restore.prove(store, entry.path, progress)
    except HydraError as error:
        return {"name": entry.name, "ok": False, "error": type(error).__name__, "message": str(error)}
    return {"name": entry.name, "ok": True, "sha256": digest.hex(), "message": f"{human(size)} stored"}
