"""``hydrafs ls``: what a store holds."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from hydrafs.cache import ChunkCache
from hydrafs.cli.common import (
    human,
    json_option,
    kept_facts,
    kept_line,
    open_store,
    percent,
    print_json,
    print_table,
    say,
    tell_troubles,
)
from hydrafs.diff import DiffFile
from hydrafs.errors import HydraError
from hydrafs.needs import census
from hydrafs.opening import Opener
from hydrafs.retained import kept
from hydrafs.store import ModelEntry
from hydrafs.walk import Trouble


@click.command("ls", short_help="What a store holds, at what cost.")
@click.argument("store", metavar="STORE")
@json_option
def command(store: str, as_json: bool) -> None:
    """List the models of STORE: full size, stored size, what is saved, and the parents.

    The last line says what is kept besides them: models that were removed or overwritten and that others need.
    """
    troubles: list[Trouble] = []
    with contextlib.closing(open_store(store)) as opened, contextlib.closing(Opener(opened, ChunkCache(0))) as opener:
        facts = [_facts(model, opener) for model in opened.models(trouble=troubles.append)]
        others = kept(opened, census(opened), troubles.append)
        root = opened.root
    size = sum(f["size"] for f in facts)
    stored = sum(f["stored"] for f in facts)
    besides = sum(k.nbytes for k in others)
    listed = {f.get("sha256") for f in facts}
    unlisted = {k.sha256.hex() for k in others} - listed
    for parent in (p for f in facts for p in f["parents"]):
        parent["kept"] = parent["sha256"] in unlisted
    if as_json:
        totals = {"size": size, "stored": stored, "kept": besides, "saved": size - stored - besides}
        more = {"kept_files": [kept_facts(k) for k in others], "troubles": [str(t) for t in troubles]}
        print_json({"store": str(root), "models": facts, **totals, **more})
        return
    rows = [
        [
            f["name"],
            human(f["size"]),
            human(f["stored"]),
            human(f["size"] - f["stored"]) if f["state"] != "plain" else "-",
            percent(f["stored"], f["size"]),
            f["error"]
            or (f["state"].replace("-", " ") + ": " if f["state"].startswith("parent") else "")
            + ", ".join(p["name"] + (" (as it was, kept)" if p["kept"] else "") for p in f["parents"])
            or ("" if f["state"] != "plain" else "(full file)"),
        ]
        for f in facts
    ]
    total = [
        "total",
        human(size),
        human(stored + besides),
        human(size - stored - besides),
        percent(stored + besides, size),
        f"{len(facts)} models",
    ]
    print_table(["model", "size", "stored", "saved", "ratio", "parents"], [*rows, total], right=(1, 2, 3, 4))
    if others:
        say(kept_line(others))
    tell_troubles(troubles)


def _facts(model: ModelEntry, opener: Opener) -> dict[str, Any]:
    try:
        if not model.is_diff:
            size = model.path.stat().st_size
            return {"name": model.name, "state": "plain", "size": size, "stored": size, "parents": [], "error": ""}
        with DiffFile(model.path) as diff:
            manifest = diff.manifest
            return {
                "name": model.name,
                "state": opener.state_of(manifest.parents) or "dehydrated",
                "size": manifest.size,
                "stored": diff.size,
                "sha256": manifest.sha256.hex(),
                "container": manifest.container,
                "parents": [{"name": p.name, "sha256": p.sha256.hex(), "size": p.size} for p in manifest.parents],
                "error": "",
            }
    except (HydraError, OSError) as error:
        return {"name": model.name, "state": "damaged", "size": 0, "stored": 0, "parents": [], "error": str(error)}
