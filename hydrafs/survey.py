"""The plain models of a store, and which of them must stay whole: one look, file by file.

Rule 1: whatever one file or folder raises is told with its name, and the others are looked at all the same.
Rule 2: what a diff could not be, its file stays: one that another name keeps, or that a link from outside leads to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX
from hydrafs.identity import FileIdentity
from hydrafs.keeping import KeptLinks
from hydrafs.policy import Policy
from hydrafs.store import Store, listed_name, looks_like_model
from hydrafs.suspect import Suspects, why_elsewhere

__all__ = ["PlainModel", "Survey", "survey"]

_Id = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class PlainModel:
    """A plain model. ``stays``: it is not to be dehydrated, now or later, as far as is known; ``reason``: why, where
    that is something that nobody asked for. ``is_base``: others may be stored against it."""

    mtime_ns: int
    name: str
    path: Path = field(compare=False)
    identity: FileIdentity = field(compare=False)
    stays: bool = field(compare=False)
    reason: str = field(compare=False, default="")
    is_base: bool = field(compare=False, default=True)


@dataclass(frozen=True, slots=True)
class Survey:
    """The plain models of a store, the oldest first, and when its folders changed last, by path; whether everything
    could be looked at."""

    models: tuple[PlainModel, ...]
    folders: dict[str, int]
    is_complete: bool = True


def survey(
    store: Store,
    policy: Policy,
    needed: Callable[[bytes], bool],
    trouble: Callable[[str, Exception], object],
) -> Survey:
    """Look at every plain model of ``store``, the oldest first: a model was made from older ones, and is not taken for
    what an older one was made from.

    Args:
        needed: whether diffs need the model of that SHA-256.
        trouble: is told of each file and folder that could not be looked at, by its name.
    """
    look = _Look(store)
    found: list[tuple[str, Path, os.stat_result]] = []
    for folder in store.folders(
        entered=look.enter, trouble=lambda t: trouble(store.relative(Path(t.path)), t.error)
    ):  # fmt: skip
        for entry in (*folder.files, *folder.folders):
            path = Path(entry.path)
            name = store.relative(path)
            try:
                if entry.is_symlink():
                    look.follow(path, name)
                elif entry.is_file() and looks_like_model(name) and listed_name(name) == name:
                    stat = os.lstat(path)
                    look.names.setdefault((stat.st_dev, stat.st_ino), []).append(name)
                    found.append((name, path, stat))
            except FileNotFoundError:
                continue
            except Exception as error:
                trouble(name, error)
    models = []
    for name, path, stat in found:
        try:
            identity = FileIdentity.of(stat)
            sha256 = store.catalog.sha256(path, identity)
            stays = (
                not policy.wants(name, stat.st_size)
                or store.is_pinned(path)
                or (sha256 is not None and needed(sha256))
                or os.path.lexists(f"{path}{SUFFIX}")
            )
            reason = "" if stays else look.why_whole(policy, name, path, stat)
            is_base = not look.suspects.of_base(path)
            stays = stays or bool(reason)
            models.append(PlainModel(stat.st_mtime_ns, name, path, identity, stays, reason, is_base))
        except FileNotFoundError:
            continue
        except Exception as error:
            trouble(name, error)
    return Survey(tuple(sorted(models)), look.changed)


class _Look:
    """What is known of the other files of a store when one of them is looked at."""

    def __init__(self, store: Store) -> None:
        self.suspects = Suspects(store)
        self.names: dict[_Id, list[str]] = {}
        self.changed: dict[str, int] = {}
        self._store = store
        self._kept = KeptLinks(store)
        self._folders: dict[str, _Id] = {}
        self._led_to: dict[_Id, str] = {}

    def enter(self, path: Path, stat: os.stat_result) -> None:
        """A folder is being listed."""
        self._folders[os.fspath(path)] = stat.st_dev, stat.st_ino
        self.changed[os.fspath(path)] = stat.st_mtime_ns

    def follow(self, path: Path, name: str) -> None:
        """Remember where a link leads that goes by way of outside: in a mount at another place it leads to the store's
        own folder, where a dehydrated model does not have its name. Over the store itself it leads into the mount,
        which is off limits, and no link that leads there is listed."""
        text = os.readlink(path)
        inside = os.path.relpath(real_path(path.parent), self._store.root)
        if text.startswith("/") or os.path.normpath(os.path.join(inside, text)).split("/")[0] == "..":
            stat = os.stat(path)
            self._led_to.setdefault((stat.st_dev, stat.st_ino), name)

    def why_whole(self, policy: Policy, name: str, path: Path, stat: os.stat_result) -> str:
        """Why a model that is wanted stays whole; empty where nothing speaks against dehydrating it."""
        suspicion = self.suspects.of(path)
        if suspicion is not None and not policy.asks(name, suspicion.folder):
            return suspicion.reason
        # Its parents would be kept here, where nobody sees that it needs them while its disk is away.
        elsewhere = why_elsewhere(self._store, path)
        if elsewhere and not any(policy.asks(name, folder) for folder in ("", *name.split("/")[:-1])):
            return elsewhere
        if not _has_room_for_ending(path):
            return f"its name has no room for the ending {SUFFIX}"
        names = [other for other in self.names.get((stat.st_dev, stat.st_ino), ()) if other != name]
        if stat.st_nlink - self._kept.count(stat) > 1:
            where = f"its other name {names[0]}" if names else "a hard link elsewhere"
            return f"{where} keeps its space: there is nothing to save"
        link = self._leads_to(path, stat)
        return f"the link {link} leads to it by way of the store's own folder" if link else ""

    def _leads_to(self, path: Path, stat: os.stat_result) -> str:
        if not self._led_to:
            return ""
        found = self._led_to.get((stat.st_dev, stat.st_ino), "")
        for folder in path.parents:
            place = self._folders.get(os.fspath(folder))
            if found or place is None:
                break
            found = self._led_to.get(place, "")
        return found


def _has_room_for_ending(path: Path) -> bool:
    try:
        os.lstat(f"{path}{SUFFIX}")
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True
