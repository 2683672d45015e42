"""Folders that are covered by a mount over themselves, and how they are reached and named.

A daemon that mounts a store over itself opens the folder first: ``/proc/PID/fd/N`` leads below the mount, for it and
for the commands of the same user. To people, and in the catalog, it goes by the name that it always had.

Rule 1: a path through such a descriptor is never resolved to the name of the folder, which leads into the mount.
Thread safety: all of it; descriptors are registered before anything is asked.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

__all__ = [
    "catalog_of",
    "catalogs_folder",
    "cover",
    "is_covered",
    "keep_catalogs_in",
    "named",
    "reached",
    "real_path",
    "shown",
]

_DESCRIPTOR = re.compile(r"/proc/(?:self|\d+)/fd/\d+(?!\d)")
_homes: dict[str, str] = {}
_catalogs: list[Path] = []
_MAX_LINKS = 40


def cover(descriptor: str, home: str) -> None:
    """``descriptor``, as ``/proc/PID/fd/N``, leads to the folder that the mount at ``home`` covers."""
    _homes[descriptor] = home


def is_covered(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` leads through the descriptor of a covered folder."""
    found = _DESCRIPTOR.match(os.fspath(path))
    return found is not None and found[0] in _homes


def named(path: str | os.PathLike[str]) -> str:
    """``path`` as people know it: by the name of the folder, and not through its descriptor."""
    text = os.fspath(path)
    found = _DESCRIPTOR.match(text)
    home = _homes.get(found[0]) if found else None
    return home + text[found.end() :] if found and home else text


def reached(path: str) -> str:
    """``path``, which people know, as it is reached: through the descriptor where it lies in a covered folder."""
    for descriptor, home in _homes.items():
        if path == home or path.startswith(home + "/"):
            return descriptor + path[len(home) :]
    return path


def shown(text: str) -> str:
    """``text`` with every descriptor of a covered folder replaced by its name."""
    if not _homes:
        return text
    return _DESCRIPTOR.sub(lambda found: _homes.get(found[0], found[0]), text)


def real_path(path: str | os.PathLike[str]) -> Path:
    """``os.path.realpath``, for which a covered folder is the folder that its descriptor leads to."""
    text = os.path.abspath(path)
    found = _DESCRIPTOR.match(text)
    if found is None or found[0] not in _homes:
        return Path(os.path.realpath(text))
    root, current, links = found[0], found[0], 0
    pending = text[found.end() :].split("/")[::-1]
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if current == root:  # out of the folder, by a link in it
                outside = os.path.join(os.path.dirname(_homes[root]), *pending[::-1])
                return Path(reached(os.path.realpath(outside)))
            current = os.path.dirname(current)
            continue
        step = f"{current}/{part}"
        try:
            link = os.readlink(step)
        except OSError:
            current = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return Path(step)
        if link.startswith("/"):
            return Path(reached(os.path.realpath(os.path.join(link, *pending[::-1]))))
        pending.extend(link.split("/")[::-1])
    return Path(current)


def keep_catalogs_in(folder: Path) -> None:
    """Keep the catalogs of covered stores in ``folder``: SQLite resolves its path, and would end in the mount."""
    _catalogs[:] = [folder]


def catalogs_folder() -> Path | None:
    """What ``keep_catalogs_in`` was told."""
    return _catalogs[0] if _catalogs else None


def catalog_of(root: Path, *, make: bool = True) -> Path | None:
    """The catalog of the covered store at ``root``; ``None`` where there is no folder for it, which ``make`` makes."""
    if not _catalogs:
        return None
    digest = hashlib.sha256(os.fsencode(named(root))).hexdigest()[:32]
    try:
        if make:
            _catalogs[0].mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return _catalogs[0] / f"{digest}.sqlite"
