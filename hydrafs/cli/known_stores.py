"""Which folders were stores when they were mounted last, so that an empty folder in place of one is not made a store.

Kept in ``stores.json`` of the user's state folder (``$XDG_STATE_HOME/hydrafs``), with where each mount logs to. Nothing
depends on it: without it, or where it cannot be written, only ``--existing`` tells an empty folder from a new store.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from hydrafs.covered import named
from hydrafs.errors import StoreGone
from hydrafs.store import Store, is_marked

__all__ = ["check_expected", "log_of", "remember", "state_folder"]

_MAX_STORES = 500
_MAX_NBYTES = 1 << 20


def state_folder() -> Path:
    """Where hydrafs keeps what is a user's and no store's."""
    return Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "hydrafs"


def _read() -> dict[str, dict[str, Any]]:
    try:
        with (state_folder() / "stores.json").open("rb") as file:
            read = json.loads(file.read(_MAX_NBYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in read.items() if isinstance(v, dict)} if isinstance(read, dict) else {}


def remember(root: Path, mark: str, mountpoint: Path, log_path: str | None) -> None:
    """The folder ``root`` is a store, and is mounted at ``mountpoint``. Where that cannot be written, it is not."""
    stores = _read()
    name = named(root)
    stores.pop(name, None)
    stores[name] = {"mark": mark, "mountpoint": os.fspath(mountpoint), "log": log_path or ""}
    for old in list(stores)[:-_MAX_STORES]:
        del stores[old]
    folder = state_folder()
    temporary = folder / f".stores-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            temporary.write_text(json.dumps(stores))
            os.replace(temporary, folder / "stores.json")
        finally:
            temporary.unlink(missing_ok=True)


def log_of(mountpoint: Path) -> Path | None:
    """Where the last mount at ``mountpoint`` (resolved) logged to, if it is known and was a file."""
    for facts in reversed(list(_read().values())):
        if facts.get("mountpoint") == os.fspath(mountpoint) and isinstance(facts.get("log"), str) and facts["log"]:
            return Path(facts["log"])
    return None


def check_expected(store: Store, *, existing: bool, new: bool) -> None:
    """Refuse a folder without a mark and without a model where a store is expected: its disk may not be there yet.

    Args:
        existing: a store is expected, whether this user has seen one there or not.
        new: none is.

    Raises:
        StoreGone: nothing was made or changed.
    """
    if new or is_marked(store.root) or any(True for _ in store.models()):
        return
    was_one = named(store.root) in _read()
    if existing or was_one:
        raise StoreGone(
            "a store is expected here",
            where=named(store.root),
            detail="there is no model and no mark of one" + (", and there was" if was_one else ""),
            remedy="mount its disk first; for an empty new store add --new",
        )
