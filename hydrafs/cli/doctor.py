"""``hydrafs doctor``: what this machine has of what hydrafs needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from hydrafs.cli import findings
from hydrafs.cli.common import check_answers, json_option, print_json, print_table, real_path
from hydrafs.errors import MountFailed
from hydrafs.mountpoints import resolve


@click.command("doctor", short_help="What is there, and what to do.")
@click.argument("store", metavar="[STORE]", required=False)
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@json_option
def command(store: str | None, mountpoint: str | None, as_json: bool) -> int:
    """Look at everything that a mount needs, and say what to do about what is missing; with STORE, at that store too,
    and with MOUNTPOINT at whether it may be mounted there.

    Exit code 11 if a mount cannot work here.
    """
    found = [
        *findings.system(),
        *findings.fuse(),
        *findings.confined(_place(store, mountpoint)),
        *findings.limits(),
        *findings.python(),
        *findings.mounts(),
        *findings.units(),
        *findings.clock(),
        *(_store(store) if store is not None else ()),
    ]
    bad = [f for f in found if f.state == "bad"]
    if as_json:
        print_json({"ok": not bad, "findings": [asdict(f) for f in found]})
    else:
        print_table(["what", "state", "found", "what to do"], [[f.what, f.state, f.found, f.remedy] for f in found])
    return MountFailed.exit_code if bad else 0


def _store(store: str) -> Iterator[findings.Finding]:
    try:
        check_answers(store)
    except MountFailed as error:
        yield findings.Finding("store", "bad", f"{error.where}: {error.what}: {error.detail}", error.remedy)
    else:
        yield from findings.store(real_path(store))


def _place(store: str | None, mountpoint: str | None) -> Path | None:
    """Where a mount is meant to be: over the store itself, where nothing else is said."""
    place = mountpoint or store
    return resolve(Path(place).expanduser()) if place is not None else None
