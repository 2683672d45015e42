"""``hydrafs bases``: what can serve as a base."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from hydrafs import keeping
from hydrafs.cli.common import (
    human,
    json_option,
    open_store,
    print_json,
    print_table,
    real_path,
    say,
    tell_unheld,
)
from hydrafs.diff import DiffFile
from hydrafs.errors import HydraError, NotFound, UsageError
from hydrafs.identity import FileIdentity
from hydrafs.needs import census
from hydrafs.retained import unheld
from hydrafs.store import Store


@click.command("bases", short_help="What can serve as a base, and who depends on it.")
@click.argument("store", metavar="STORE")
@click.option("--pin", multiple=True, metavar="PATH", help="Keep this model whole: it is never dehydrated.")
@click.option("--unpin", multiple=True, metavar="PATH", help="Let this model be dehydrated again.")
@json_option
def command(store: str, pin: tuple[str, ...], unpin: tuple[str, ...], as_json: bool) -> None:
    """List the full models of STORE and of its base folders, and the diffs that need each.

    A parent that is a diff itself is listed too; so is one that was removed and is kept for others (retired), one whose
    name went behind hydrafs' back (held), and one that is missing.
    """
    with contextlib.closing(open_store(store)) as opened:
        if pin or unpin:
            _pin(opened, pin, unpin)
        loose = [need.parent.name for need in unheld(opened, census(opened))]
        needed: dict[str, tuple[str, int, list[str]]] = {}
        diffs: dict[str, str] = {}
        plain: list[tuple[str, Path, int]] = []
        for model in opened.candidates():
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
            state = "pinned" if name in opened.pinned else "plain"
            facts.append({"name": name, "state": state, "size": size, "sha256": digest, "dependents": dependents})
        for digest, (name, size, dependents) in needed.items():
            if digest not in met:
                state = "dehydrated" if digest in diffs else _kept(opened, bytes.fromhex(digest))
                facts.append(
                    {
                        "name": diffs.get(digest, name), "state": state, "size": size, "sha256": digest,
                        "dependents": dependents,
                    }
                )  # fmt: skip
        folders = [str(f) for f in opened.base_folders]
        files = [str(f) for f in opened.base_files]
    if as_json:
        print_json({"bases": facts, "base_folders": folders, "base_files": files, "unheld": loose})
        return
    rows = [[str(f["name"]), str(f["state"]), human(float(str(f["size"]))), _shown(f["dependents"])] for f in facts]
    print_table(["base", "state", "size", "needed by"], rows, right=(2,))
    for name in folders:
        say(f"base folder: {name}")
    for name in files:
        say(f"base file: {name}")
    tell_unheld(loose)


def _kept(store: Store, sha256: bytes) -> str:
    for folder in (store.retired, store.held):
        if any(keeping.place_of(folder, sha256, is_diff=is_diff).exists() for is_diff in (False, True)):
            return folder.name
    return "missing"


def _pin(store: Store, pin: tuple[str, ...], unpin: tuple[str, ...]) -> None:
    names = []
    for given in pin:
        entry = store.locate(real_path(given) if os.path.lexists(given) else given)
        if entry.is_diff:
            raise UsageError(
                "a dehydrated model cannot be kept whole",
                where=given,
                remedy=f"hydrafs rehydrate {entry.path} writes it as a full file, and that can be pinned",
            )
        names.append(entry.name)
    gone = [name for given in unpin for name in (given, store.relative(real_path(given))) if name in store.pinned]
    if len(gone) < len(unpin):
        raise NotFound("not pinned", where=", ".join(unpin), remedy="hydrafs bases lists what is")
    store.pin(names, unpin=gone)


def _shown(dependents: object) -> str:
    assert isinstance(dependents, list)
    if len(dependents) <= 3:
        return ", ".join(dependents) or "-"
    return ", ".join(dependents[:3]) + f" and {len(dependents) - 3} more"
