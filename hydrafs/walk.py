"""The one walker of a folder tree: it yields what is there, and reports what it could not list or look at.

Rule 1: the trouble of one entry is that of one entry: the listing goes on behind it.
Rule 2: what a walk does not yield it has reported, unless that cannot be anything: what has just gone, and links that
        lead nowhere or to themselves. A link that may not be followed could lead to anything, and is reported.
Rule 3: a mount of hydrafs is no part of the tree that it stands in, or that a link to it stands in: it is not entered,
        nor asked. One of another filesystem that does not answer is reported. See ``hydrafs.submounts``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydrafs.errors import HydraError, printable
from hydrafs.submounts import LeftOut, Place, Submounts

__all__ = ["Folder", "Report", "Trouble", "is_gone", "list_folder", "walk"]

_PATH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Trouble:
    """A folder that could not be listed, or a file that could not be looked at or read, and why."""

    path: Path
    error: Exception

    def __str__(self) -> str:
        return printable(f"{os.fspath(self.path)}: {self.reason}")

    @property
    def reason(self) -> str:
        """What went wrong, without the place."""
        if isinstance(self.error, OSError):
            return self.error.strerror or type(self.error).__name__
        if isinstance(self.error, HydraError):
            return f"{self.error.what}: {self.error.detail}" if self.error.detail else self.error.what
        return str(self.error) or type(self.error).__name__


Report = Callable[[Trouble], object]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, as it was listed, by name. ``names``: all there are, those that were to be left out too.

    ``path`` and the entries' paths are as the walk came to them, and not resolved. ``files`` and ``folders``: what is
    one when links are followed.
    """

    path: str
    files: list[os.DirEntry[str]] = field(default_factory=list)
    folders: list[os.DirEntry[str]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def walk(
    top: str | os.PathLike[str],
    *,
    leave_out: Callable[[os.DirEntry[str]], bool] | None = None,
    report: Report | None = None,
    entered: Callable[[Path, os.stat_result], object] | None = None,
    passed_over: Callable[[str], object] | None = None,
) -> Iterator[Folder]:
    """Every folder from ``top`` down, in name order, each once, whatever links lead to it.

    Args:
        leave_out: entries that are neither yielded nor entered; hydrafs' own, or the mount that this process serves.
        report: is told what could not be listed or looked at; nothing is raised for it.
        entered: is told of each folder, before it is read.
        passed_over: is told of each entry that leads to a mount which is not entered.
    """
    seen: set[tuple[int, int]] = set()
    top = os.fspath(top)
    mounts: Submounts | None = Submounts()
    place: Place | None = None
    if mounts is not None and mounts.special:
        place = mounts.top(top)
    else:
        mounts = None  # the usual case, which costs nothing more
    told: set[int] = set()
    pending = [(top, place)]
    while pending:
        path, place = pending.pop()
        try:
            stat = os.stat(path)
        except OSError as error:
            if report is not None and (path is top or not is_gone(error)):
                report(Trouble(Path(path), error))
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if entered is not None:
            entered(Path(path), stat)
        places: dict[str, Place] = {}
        leave = leave_out
        if mounts is not None and place is not None:
            leave = _leave_mounts(mounts, place, places, told, leave_out, report, passed_over)
        folder = list_folder(path, leave_out=leave, report=report)
        yield folder
        pending.extend((entry.path, places.get(entry.name)) for entry in reversed(folder.folders))


def _leave_mounts(
    mounts: Submounts,
    folder: Place,
    places: dict[str, Place],
    told: set[int],
    leave_out: Callable[[os.DirEntry[str]], bool] | None,
    report: Report | None,
    passed_over: Callable[[str], object] | None,
) -> Callable[[os.DirEntry[str]], bool]:
    """``leave_out``, and what leads to a mount that is not to be entered: before anything else is asked of an entry.

    Args:
        places: gets the places of all other entries.
        told: the mounts that were reported.
    """
    holds_mounts = mounts.holds_mounts(folder)

    def leave(entry: os.DirEntry[str]) -> bool:
        # What is no link and no mountpoint is known by the listing; what is mounted on an entry is not asked for that.
        found = mounts.child(folder, entry.name, is_link=False) if holds_mounts else None
        if found is None or (isinstance(found, Place) and found.mount_id == folder.mount_id):
            if entry.is_symlink():
                found = mounts.child(folder, entry.name, is_link=True)
            elif found is None and entry.is_dir():
                found = mounts.child(folder, entry.name, is_link=False)
        if isinstance(found, LeftOut):
            if passed_over is not None:
                passed_over(entry.path)
            if found.error is not None and report is not None and found.mount.mount_id not in told:
                told.add(found.mount.mount_id)
                report(Trouble(Path(entry.path), found.error))
            return True
        if leave_out is not None and leave_out(entry):
            return True
        if found is not None:
            places[entry.name] = found
        return False

    return leave


def list_folder(
    path: str | os.PathLike[str],
    *,
    leave_out: Callable[[os.DirEntry[str]], bool] | None = None,
    report: Report | None = None,
) -> Folder:
    """What stands in one folder; as far as it could be read, where it could not be to its end. A folder that is not
    there is empty."""
    folder = Folder(os.fspath(path))
    entries: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder.path) as listing:
            for entry in listing:
                entries.append(entry)  # what was read before a listing fails counts
    except OSError as error:
        if report is not None and not is_gone(error):
            report(Trouble(Path(folder.path), error))
    for entry in sorted(entries, key=lambda e: e.name):
        folder.names.add(entry.name)
        try:
            if leave_out is not None and leave_out(entry):
                continue
            if entry.is_dir():
                folder.folders.append(entry)
            elif entry.is_file():
                folder.files.append(entry)
        except OSError as error:
            if report is not None and not _leads_nowhere(entry, error):
                report(Trouble(Path(entry.path), error))
    return folder


def is_gone(error: Exception) -> bool:
    """Whether an error says that there is no such file, or none any more."""
    return isinstance(error, OSError) and error.errno == errno.ENOENT


def _leads_nowhere(entry: os.DirEntry[str], error: OSError) -> bool:
    """Whether what could not be looked at cannot be anything, to anyone: whatever rights and disks there are."""
    if is_gone(error):
        return True
    try:
        is_link = entry.is_symlink()
    except OSError:
        return False
    if error.errno == errno.ENAMETOOLONG:  # of the link's target, or of the way that led here, which may be a file's
        return is_link and len(os.fsencode(entry.path)) < _PATH_MAX
    return is_link and error.errno in (errno.ELOOP, errno.ENOTDIR)
