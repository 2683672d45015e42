"""Which files nobody should rely on: they lie where people and programs clean up, are not all there, or cannot be held.

Goal: nothing is removed for the sake of a parent that goes away by itself, and what another program is still at is left
      alone.
Rule 1: what counts is where a file really stands, links followed; and only folders below the one that the user named
        (the store, a base folder): a store in ``~/Downloads`` is wanted.
Rule 2: asking never fails and reads no more than headers; what was read of a file is known until that changes.
"""

from __future__ import annotations

import fnmatch
import os
import stat as stat_module
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydrafs.containers.complete import cut_short
from hydrafs.covered import named, real_path
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.layout import FileSource
from hydrafs.store import Store, listed_name

__all__ = ["Suspects", "Suspicion", "why_elsewhere", "why_not_held"]

_FOLDERS = {
    "a trash folder": (
        ".trash", ".trash-*", ".trashes", "trash", "trash-*", "$recycle.bin", "recycler", "recycled", "#recycle",
        "@recycle", ".recycle", ".recycle.bin", ".recycle_bin", ".recycled", "recycle bin", ".deleted", ".trashed",
        ".trashed-*", "lost+found", "lost.dir", "found.[0-9][0-9][0-9]",
    ),
    "a folder of version control": (
        ".git", "*.git", ".hg", ".svn", ".bzr", "_darcs", ".jj", ".pijul", "cvs", ".dvc", ".fossil", ".sl",
    ),
    "a folder of old versions or of synchronisation": (
        ".stversions", ".stversions.*", ".stfolder", ".stfolder.*", ".sync",
        ".dropbox.cache", ".ipynb_checkpoints", ".rsync-partial*", ".~tmp~",
    ),
    "a snapshot folder": (
        ".snapshots", ".snapshot", "~snapshot", "#snapshot", ".zfs", ".btrfs", ".rsnapshot", "rsnapshot",
        "@gmt-*", "@recently-snapshot", ".timeshift",
    ),
    "a folder that a system keeps for itself": (
        "@eadir", ".@__thumb", "system volume information", ".spotlight-v100", ".documentrevisions-v100", ".fseventsd",
        ".temporaryitems",
    ),
    "a cache folder": (".cache", "cache", "__pycache__", "caches", ".caches", ".*_cache"),
    "a folder of a program's packages": (
        "node_modules", "site-packages", "dist-packages", "venv", ".venv", "virtualenv", ".virtualenv", "virtualenvs",
        ".virtualenvs", ".conda", ".tox", ".nox", ".pixi",
    ),
    "a folder for temporary files": ("tmp", ".tmp", "temp", ".temp", "tmp.*"),
    "a folder of downloads": (
        "download", "downloads", ".download", ".downloads", "_download", "_downloads", "incomplete", ".incomplete",
        "unfinished",
    ),
}  # fmt: skip
"""What people and programs empty, by the folder's name in small letters, as fnmatch has it."""
_MARKS = {
    "pyvenv.cfg": "a virtual environment",
    "conda-meta": "a conda environment",
    "bin/activate_this.py": "a virtual environment",
    "CACHEDIR.TAG": "a cache folder",  # bford.info/cachedir
}
_DOWNLOADERS = (
    ".aria2", ".part", ".crdownload", ".download", ".downloading", ".st", ".incomplete", ".tmp", ".temp", ".partial",
    ".filepart", ".!qb", ".!ut", ".bc!", ".!sync", ".opdownload", ".aria2__temp", ".fdmdownload", ".dctmp", ".xltd",
    ".td", ".ytdl", ".unfinished", ".lftp-pget-status",
)  # fmt: skip
"""How the names of files end that a downloader keeps beside the one that it writes, or until it has its name."""
_BEFORE = (".syncthing.", "~syncthing~", ".")
_REMEMBERED = 1 << 14
_PROTECTED_LINKS = Path("/proc/sys/fs/protected_hardlinks")

_known: dict[FileIdentity, str] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why a file is not to be relied on, in a few words. ``folder``: the name of the folder that it lies in, where that
    is why; empty where the file itself is."""

    reason: str
    folder: str = ""


class Suspects:
    """What speaks against the files of a store, as it is at one look: folders are listed once. Thread safety: one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._named = (store.root, *store.base_folders)
        self._unfinished: dict[str, frozenset[str]] = {}
        self._marked: dict[str, str] = {}

    def of(self, path: Path) -> Suspicion | None:
        """Why the model or diff at the absolute ``path`` is neither to be dehydrated unasked nor to be a base."""
        real = real_path(path)
        for place in dict.fromkeys((real, path)):
            name = place.name.lower()
            for ending in _DOWNLOADERS:
                if name.endswith(ending):
                    return Suspicion(f"it is called {ending}, as what is being downloaded")
            if place.name in self._unfinished_in(place.parent) or listed_name(place.name) in self._unfinished_in(
                place.parent
            ):
                return Suspicion("a downloader's file stands beside it")
        found = self._of_folder(real)
        if found is not None or real.name.endswith(SUFFIX):
            return found
        reason = why_not_complete(real)
        return Suspicion(f"it is not all there: {reason}") if reason else None

    def of_base(self, path: Path) -> str:
        """Why the model or diff at the absolute ``path`` is no base to remove an original for; empty where it is."""
        found = self.of(path)
        return found.reason if found else why_not_held(self._store, path)

    def _of_folder(self, real: Path) -> Suspicion | None:
        above, parts = _below(real, self._named, self._store.root)
        for part in parts:
            above = above / part
            what = _kind_of(part) or self._mark_of(above)
            if what:
                return Suspicion(f"it lies in {what}, {part}", part)
        return None

    def _mark_of(self, folder: Path) -> str:
        key = os.fspath(folder)
        if key not in self._marked:
            self._marked[key] = next((what for mark, what in _MARKS.items() if os.path.lexists(folder / mark)), "")
        return self._marked[key]

    def _unfinished_in(self, folder: Path) -> frozenset[str]:
        """The names in a folder that a downloader's files stand beside."""
        key = os.fspath(folder)
        if key not in self._unfinished:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            self._unfinished[key] = frozenset(n for name in names for n in _downloaded(name))
        return self._unfinished[key]


def _downloaded(name: str) -> Iterable[str]:
    """Which file a downloader's file of this name is for: its own name without the ending, and without what some put
    between (``NAME.DIGEST.incomplete``) or before (``.NAME.part``)."""
    lower = name.lower()
    for ending in _DOWNLOADERS:
        if lower.endswith(ending):
            stem = name[: -len(ending)]
            for before in ("", *_BEFORE):
                if stem.startswith(before):
                    rest = stem[len(before) :]
                    yield rest
                    yield rest.rpartition(".")[0]


def _below(real: Path, folders: Iterable[Path], root: Path) -> tuple[Path, tuple[str, ...]]:
    """The folders that a file lies in below the one that the user named; what lies elsewhere, where a link leads, below
    what it has in common with the store."""
    around = [folder for folder in folders if real.is_relative_to(folder)]
    if around:
        above = max(around, key=lambda folder: len(folder.parts))
    else:
        above = Path(os.path.commonpath([named(root), os.fspath(real)]))
    return above, real.relative_to(above).parts[:-1]


def _kind_of(part: str) -> str:
    lower = part.lower()
    for what, patterns in _FOLDERS.items():
        if any(fnmatch.fnmatchcase(lower, pattern) for pattern in patterns):
            return what
    return "a folder of downloads" if lower.endswith(_DOWNLOADERS) else ""


def why_not_complete(path: Path) -> str:
    """Why the plain file at ``path`` is not all there; empty where nothing says so, or where it cannot be read."""
    try:
        identity = FileIdentity.of(os.stat(path))
        with _lock:
            if identity in _known:
                return _known[identity]
        with FileSource(path) as source:
            identity = FileIdentity.of(source.stat)
            reason = cut_short(source)
    except (OSError, HydraError):
        return ""
    with _lock:
        while len(_known) >= _REMEMBERED:
            _known.pop(next(iter(_known)), None)
        _known[identity] = reason
    return reason


# Holding


def why_not_held(store: Store, path: Path) -> str:
    """Why the file at ``path`` can have no second link in the store (``hydrafs.keeping``), as far as that is known
    without making one; empty where it can. Nothing keeps such a parent when its name goes."""
    real = real_path(path)
    elsewhere = why_elsewhere(store, real)
    if elsewhere:
        return elsewhere
    try:
        stat = os.stat(real)
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    return "" if _may_be_linked(real, stat) else "it belongs to another user, and must not be linked"


def why_elsewhere(store: Store, path: Path) -> str:
    """Why the file at ``path`` may go away without the rest of the store, or the store without it; empty where it is on
    the store's own filesystem."""
    real = real_path(path)
    try:
        ours = os.stat(store.private if store.private.is_dir() else store.root)
        if os.stat(real).st_dev != ours.st_dev or _mount_of(real) != _mount_of(store.root):
            return "it is on another filesystem"
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    return ""


def _mount_of(path: Path) -> str:
    """The number of the mount that a file is reached through: links do not go from one to another, though the
    filesystem be the same (link(2), EXDEV)."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return ""  # no /proc: it cannot be told
    finally:
        os.close(fd)
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")


def _may_be_linked(path: Path, stat: os.stat_result) -> bool:
    """What ``fs.protected_hardlinks`` says (proc(5)): one's own files, and regular ones that one may read and write."""
    if os.geteuid() in (0, stat.st_uid):
        return True
    try:
        if _PROTECTED_LINKS.read_text().strip() == "0":
            return True
    except OSError:
        return True
    special = stat.st_mode & stat_module.S_ISUID or stat.st_mode & (
        stat_module.S_ISGID | stat_module.S_IXGRP
    ) == (stat_module.S_ISGID | stat_module.S_IXGRP)  # fmt: skip
    return not special and os.access(path, os.R_OK | os.W_OK, effective_ids=True)
