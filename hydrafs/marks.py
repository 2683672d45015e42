"""Which folder is a store: what marks one, and finding the nearest above a path."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat as stat_module
from pathlib import Path

from hydrafs.root_identity import MARK

__all__ = ["PRIVATE", "find_root", "is_marked"]

PRIVATE = ".hydrafs"
_MARKS = (MARK, "config.toml", "catalog.sqlite", "held", "retired", "trash")
"""What hydrafs keeps in ``.hydrafs``: a folder that holds none of it is not hydrafs' own."""
_PRECIOUS = ("held", "retired", "trash")


def find_root(path: Path) -> Path | None:
    """The store that ``path`` is in: the nearest marked folder, it or one above it (``is_marked``).

    From below, ``/`` and a home are a store only where their ``.hydrafs`` keeps models for others or a configuration:
    a mark that got there by accident would make one store of everything.
    """
    for folder in (path, *path.parents):
        if is_marked(folder) and (folder == path or not _is_everything(folder) or _is_kept_in(folder)):
            return folder
    return None


def is_marked(folder: Path) -> bool:
    """Whether a folder is a store: its ``.hydrafs`` is a real folder with something of hydrafs' own in it, or an empty
    one, as who marks a store by hand makes it. Where anybody may put files, it must be the user's, or root's, or be of
    who owns the folder."""
    private = folder / PRIVATE
    try:
        stat = os.lstat(private)
        if not stat_module.S_ISDIR(stat.st_mode):
            return False
        above = os.stat(folder)
        if above.st_mode & stat_module.S_IWOTH and stat.st_uid not in (0, os.geteuid(), above.st_uid):
            return False
        names = os.listdir(private)
        return not names or any(name in _MARKS for name in names)
    except OSError:
        return False


def _is_everything(folder: Path) -> bool:
    """Whether a folder is the top of the tree, or somebody's home."""
    if folder == folder.parent:
        return True
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError, OSError):
        homes.add(pwd.getpwuid(os.stat(folder).st_uid).pw_dir)
    return any(os.path.realpath(home) == os.fspath(folder) for home in homes)


def _is_kept_in(folder: Path) -> bool:
    """Whether the store ``folder`` keeps models for others, or was configured."""
    if (folder / PRIVATE / "config.toml").is_file():
        return True
    for name in _PRECIOUS:
        with contextlib.suppress(OSError):
            if os.listdir(folder / PRIVATE / name):
                return True
    return False
