"""``hydrafs verify``: decode everything and compare."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hydrafs import restore
from hydrafs.allocator import tune_allocator
from hydrafs.cli.common import (
    find_model,
    human,
    json_option,
    leftovers,
    print_json,
    progress_bar,
    real_path,
    say,
    store_of,
    tell_unheld,
)
from hydrafs.errors import HydraError, NotFound
from hydrafs.needs import census
from hydrafs.retained import unheld
from hydrafs.store import ModelEntry, Store
from hydrafs.walk import Trouble


@click.command("verify", short_help="Decode everything and compare SHA-256.")
@click.argument("targets", nargs=-1, required=True, metavar="STORE_OR_DIFF...")
@json_option
def command(targets: tuple[str, ...], as_json: bool) -> int:
    """Decode every diff of each STORE, or each DIFF, and compare the SHA-256 of what comes out with what it must be.

    Exit code 1 if any is bad, or could not be looked at; each is named, with what to do. Of a STORE it also names what
    killed commands left in it, and the parents that nothing but their names keeps. Nothing is changed.
    """
    tune_allocator()
    results = []
    troubles: list[Trouble] = []
    left: list[str] = []
    loose: list[str] = []
    for target in targets:
        store, entries = _entries(target, troubles)
        with contextlib.closing(store):
            if real_path(target).is_dir():
                _look_around(store, troubles, left, loose)
            for entry in entries:
                result = _check(store, entry)
                results.append(result)
                if not as_json:
                    say(f"{'ok ' if result['ok'] else 'BAD'} {result['name']}: {result['message']}")
    bad = [r for r in results if not r["ok"]]
    unseen = [t for t in dict.fromkeys(map(str, troubles)) if not any(str(r["path"]) in t for r in bad)]
    if as_json:
        more = {"troubles": unseen, "leftovers": left, "unheld": loose}
        print_json({"checked": len(results), "bad": len(bad), "models": results, **more})
    else:
        for line in unseen:
            say(f"BAD {line}: it cannot be looked at, so what is in it was not checked")
        for line in left:
            say(f"note {line}")
        say(f"{len(results)} diffs checked, {len(bad)} bad" + (f", {len(unseen)} not looked at" if unseen else ""))
    tell_unheld(loose)
    return 1 if bad or unseen else 0


def _look_around(store: Store, troubles: list[Trouble], left: list[str], loose: list[str]) -> None:
    """What cannot be looked at, what killed commands left, and the parents that only their names keep."""
    needs = census(store)
    troubles += needs.troubles
    left += leftovers(store)
    loose += [need.parent.name for need in unheld(store, needs)]


def _entries(target: str, troubles: list[Trouble]) -> tuple[Store, list[ModelEntry]]:
    path = real_path(target)
    if path.is_dir():
        store = store_of(path)
        return store, [m for m in store.models(path, trouble=troubles.append) if m.is_diff]
    store, entry = find_model(path)
    if not entry.is_diff:
        raise NotFound("no diff of that name", where=path, remedy="a plain file has nothing to be compared with")
    return store, [entry]


def _check(store: Store, entry: ModelEntry) -> dict[str, object]:
    named = {"name": entry.name, "path": str(entry.path)}
    try:
        size = 0
        with contextlib.suppress(OSError):
            size = entry.path.stat().st_size
        with progress_bar(f"verifying {Path(entry.name).name}", size * 4) as progress:
            digest = restore.prove(store, entry.path, progress)
    except HydraError as error:
        return {**named, "ok": False, "error": type(error).__name__, "message": str(error)}
    return {**named, "ok": True, "sha256": digest.hex(), "message": f"{human(size)} stored"}
