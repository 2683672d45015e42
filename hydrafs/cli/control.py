"""``hydrafs control``: tell a running daemon what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hydrafs.cli.common import ask_daemon, check_answers, human, json_option, mounts_of, print_json, say
from hydrafs.errors import UsageError
from hydrafs.mountpoints import resolve
from hydrafs.sizes import parse_nbytes

_ACTIONS = ("cache-size", "drop", "log-level", "pause", "prefetch", "reload", "resume")


@click.command("control", short_help="Tell a running daemon what to do.")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.argument("action", type=click.Choice(_ACTIONS))
@click.argument("value", required=False)
@json_option
def command(mountpoint: str, action: str, value: str | None, as_json: bool) -> None:
    """Tell the daemon of MOUNTPOINT: cache-size SIZE, drop (what it keeps decoded), log-level debug|info|warning|error,
    prefetch MODEL (a file of the mount, or its path in there), reload (the store's config.toml), pause and
    resume (the worker that dehydrates)."""
    request: dict[str, Any] = {}
    (point,) = mounts_of(mountpoint)
    if action in ("cache-size", "log-level", "prefetch"):
        if value is None:
            raise UsageError("a value is missing", where=action, remedy="hydrafs control --help tells which")
        if action == "prefetch":
            request = {"path": os.fspath(_in_mount(Path(value), point))}
        else:
            request = {"nbytes": parse_nbytes(value)} if action == "cache-size" else {"level": value}
    elif value is not None:
        raise UsageError("a value that is not wanted", where=action, detail=value)
    answer = ask_daemon(point, action, **request)
    if as_json:
        print_json(answer)
    elif action == "cache-size":
        say(f"the cache keeps at most {human(answer['budget_nbytes'])}")
    elif action == "drop":
        say(f"{human(answer['dropped'])} dropped")
    elif action == "prefetch":
        say(f"{answer['path']} is being read into memory")
    elif action == "reload":
        say(f"base folders: {', '.join(answer['base_folders']) or 'none'}")
    elif action in ("pause", "resume"):
        say("the worker pauses until it is told to resume" if answer["paused"] else "the worker goes on")
    else:
        say(f"{action}: done")


def _in_mount(path: Path, point: Path) -> Path:
    """What a person calls a model: by a path that leads into the mount from here, or by its path in the mount."""
    resolved = resolve(path.expanduser())
    check_answers(point)
    return resolved.relative_to(point) if resolved.is_relative_to(point) and resolved.exists() else path
