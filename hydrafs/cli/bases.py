"""``hydrafs bases``: what can serve as a base."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hydrafs.cli.common import human, json_option, open_store, print_json, print_table, say
from hydrafs.diff import DiffFile
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity


@click.command("bases", short_help="What can serve as a base, and who depends on it.")
@click.argument("store", metavar="STORE")
@json_option
def command(store: str, as_json: bool) -> None:
    """List the full models of STORE and of its base folders, and the diffs that need each.

    A parent that is a diff itself is listed too, and one that is missing is named as such.
    """
    with contextlib.closing(open_store(store)) as opened:
        needed: dict[str, tuple[str, int, list[str]]] = {}
        diffs: dict[str, str] = {}
        plain: list[tuple[str, Path, int]] = []
        for folder in (opened.root, *opened.base_folders):
            for model in opened.models(folder):
                with contextlib.suppress(OSError, HydraError):
                    if not model.is_diff:
                        plain.append((model.name, model.path, model.path.stat().st_size))
                        continue
                    with DiffFile(model.path) as diff:
                        diffs[diff.manifest.sha256.hex()] = model.name
                        for parent in diff.manifest.parents:
                            digest = parent.sha256.hex()
                            needed.setdefault(digest, (parent.name, parent.size, []))[2].append(model.name)
        facts = []
        met = set()
        for name, path, size in plain:
            known = opened.catalog.sha256(path, FileIdentity.of(path.stat()))
            digest = known.hex() if known else ""
            dependents = needed[digest][2] if digest in needed else []
            if not known:
                # A parent that was moved has no entry in the catalog under its new name.
                alike = [d for d, (n, s, _) in needed.items() if s == size and Path(n).name == path.name]
                digest, dependents = (alike[0], needed[alike[0]][2]) if alike else ("", [])
            met.add(digest)
            facts.append({"name": name, "state": "plain", "size": size, "sha256": digest, "dependents": dependents})
        for digest, (name, size, dependents) in needed.items():
            if digest not in met:
                state = "dehydrated" if digest in diffs else "missing"
                facts.append(
                    {
                        "name": diffs.get(digest, name), "state": state, "size": size, "sha256": digest,
                        "dependents": dependents,
                    }
                )  # fmt: skip
        folders = [str(f) for f in opened.base_folders]
    if as_json:
        print_json({"bases": facts, "base_folders": folders})
        return
    rows = [[str(f["name"]), str(f["state"]), human(float(str(f["size"]))), _shown(f["dependents"])] for f in facts]
    print_table(["base", "state", "size", "needed by"], rows, right=(2,))
    for name in folders:
        say(f"base folder: {name}")


def _shown(dependents: object) -> str:
    assert isinstance(dependents, list)
    if len(dependents) <= 3:
        return ", ".join(dependents) or "-"
    return ", ".join(dependents[:3]) + f" and {len(dependents) - 3} more"
