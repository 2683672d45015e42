"""``hydrafs ls``: what a store holds."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from hydrafs.cache import ChunkCache
from hydrafs.cli.common import human, json_option, open_store, percent, print_json, print_table
from hydrafs.diff import DiffFile
from hydrafs.errors import HydraError
from hydrafs.opening import Opener
from hydrafs.store import ModelEntry


@click.command("ls", short_help="What a store holds, at what cost.")
@click.argument("store", metavar="STORE")
@json_option
def command(store: str, as_json: bool) -> None:
    """List the models of STORE: full size, stored size, what is saved, and the parents."""
    with contextlib.closing(open_store(store)) as opened, contextlib.closing(Opener(opened, ChunkCache(0))) as opener:
        facts = [_facts(model, opener) for model in opened.models()]
        root = opened.root
    size = sum(f["size"] for f in facts)
    stored = sum(f["stored"] for f in facts)
    if as_json:
        print_json({"store": str(root), "models": facts, "size": size, "stored": stored, "saved": size - stored})
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
            + ", ".join(p["name"] for p in f["parents"])
            or ("" if f["state"] != "plain" else "(full file)"),
        ]
        for f in facts
    ]
    total = ["total", human(size), human(stored), human(size - stored), percent(stored, size), f"{len(facts)} models"]
    print_table(["model", "size", "stored", "saved", "ratio", "parents"], [*rows, total], right=(1, 2, 3, 4))


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
