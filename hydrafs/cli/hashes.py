"""``hydrafs hashes``: what is known of the models' hashes, and telling WebUIs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from hydrafs.cli.common import json_option, open_store, print_json, print_table, progress_bar, say
from hydrafs.digests import ADDNET, BLAKE3, PARTIAL, SHA256
from hydrafs.errors import HydraError
from hydrafs.hashing import KnownHashes, compute, container_of, missing
from hydrafs.store import ModelEntry, Store


@click.command("hashes", short_help="The models' known hashes; tells them to WebUIs.")
@click.argument("store", metavar="STORE")
@click.option("--compute", "read", is_flag=True, help="Read the models whose hashes are not all known, once.")
@click.option(
    "--webui", type=click.Path(path_type=Path), metavar="DIR", help="Fill the hash caches of the WebUI in DIR."
)
@click.option("--kind", type=click.Choice(["a1111", "forge", "sdnext"]), help="What it is (default: by what is there).")
@click.option(
    "--checkpoints",
    multiple=True,
    metavar="DIR",
    help="A folder that it lists (default: models/Stable-diffusion in it).",
)
@click.option("--loras", multiple=True, metavar="DIR", help="Another (default: models/Lora and models/LyCORIS in it).")
@json_option
def command(
    store: str,
    read: bool,
    webui: Path | None,
    kind: str | None,
    checkpoints: tuple[str, ...],
    loras: tuple[str, ...],
    as_json: bool,
) -> int:
    """Tell the hashes of the models of STORE that are known: SHA-256, BLAKE3, addnet (AutoV3) and the old 8 digits.

    Every diff holds them; nothing is read. --webui puts them where A1111, Forge and SD.Next keep theirs, so that they
    list and load models without hashing them.
    """
    worst = 0
    with contextlib.closing(open_store(store)) as opened:
        known = KnownHashes(opened)
        facts = []
        for entry in opened.models():
            fact, code = _facts(opened, known, entry, read)
            facts.append(fact)
            worst = worst or code
        seeded = _seed(opened, webui.expanduser(), kind, checkpoints, loras) if webui else None
    if as_json:
        print_json({"models": facts, "webui": seeded})
        return worst
    if seeded is None:
        rows = [
            [f["name"], *(f["hashes"].get(n, "-") for n in (SHA256, BLAKE3, ADDNET)), f["hashes"].get(PARTIAL, "-")[:8]]
            for f in facts
        ]
        print_table(["model", "SHA-256", "BLAKE3", "addnet SHA-256", "old"], rows)
        unknown = sum(not f["hashes"] for f in facts)
        if unknown:
            say(f"{unknown} models of unknown hash: hydrafs hashes --compute reads them once")
        return worst
    say(f"{seeded['kind']}: {seeded['checkpoints']} checkpoints and {seeded['loras']} LoRAs in {webui}")
    for path in seeded["written"]:
        say(f"  {path}")
    if seeded["blocks"]:
        say(f"kept in the store's catalog: what {seeded['blocks']} old hashes are taken of, 64 KiB each")
    if seeded["unknown"]:
        names = ", ".join(seeded["unknown"][:3]) + (", ..." if len(seeded["unknown"]) > 3 else "")
        say(f"{len(seeded['unknown'])} of unknown hash ({names}): hydrafs hashes --compute reads them once")
    if not seeded["checkpoints"] and not seeded["loras"]:
        say("no model of the store is in the folders that it lists: name them with --checkpoints and --loras")
    elif seeded["kind"] == "sdnext":
        say("an SD.Next that is running keeps its own copy and writes it over this: do it again once it is stopped")
    return worst


def _facts(store: Store, known: KnownHashes, entry: ModelEntry, read: bool) -> tuple[dict[str, Any], int]:
    try:
        hashes = known.of_model(entry)
        if read and missing(hashes, container_of(entry)):
            store.begin()
            with progress_bar(f"hashing {Path(entry.name).name}", os.path.getsize(entry.path)) as progress:
                hashes = compute(store, entry, progress)
        return {"name": entry.name, "hashes": {n: v.hex() for n, v in hashes.items()}, "error": ""}, 0
    except OSError as error:
        return {"name": entry.name, "hashes": {}, "error": str(error)}, 0
    except HydraError as error:
        # The others are none the worse for it.
        print(f"hydrafs: {error}", file=sys.stderr)
        return {"name": entry.name, "hashes": {}, "error": str(error)}, error.exit_code


def _seed(
    store: Store, webui: Path, kind: str | None, checkpoints: tuple[str, ...], loras: tuple[str, ...]
) -> dict[str, Any]:
    from hydrafs.webui import entries_of, kind_of, seed  # noqa: PLC0415 - only where it is asked for

    of = kind or kind_of(webui)
    folders = [Path(p) for p in checkpoints] or [webui / "models" / "Stable-diffusion"]
    lora_folders = [Path(p) for p in loras] or [webui / "models" / "Lora", webui / "models" / "LyCORIS"]
    if store.private.is_dir():
        store.begin()  # its catalog keeps what old hashes are taken of
    entries, told = entries_of(store, of, folders, lora_folders)  # type: ignore[arg-type]
    seed(webui, of, entries, told)  # type: ignore[arg-type]
    return {
        "kind": of,
        "checkpoints": told.checkpoints,
        "loras": told.loras,
        "blocks": told.blocks,
        "unknown": told.unknown,
        "written": told.written,
    }
