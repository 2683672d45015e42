"""Who sees the folder of a store that is mounted over itself, and not the mount: there the models would go, one by one.

A container or service that was started before the mount has a table of mounts of its own, without it; and a bind
mount of the folder, made before, shows what is below. Both are found in ``/proc/PID/mountinfo`` (proc(5)): a mount of
the same filesystem whose part the store's folder is in, and which nothing covers there.
Limit: processes of the host are not seen from within a container, nor those that ``hidepid`` hides.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydrafs.covered import named
from hydrafs.errors import printable

__all__ = ["View", "uncovered_views"]


@dataclass(frozen=True, slots=True)
class View:
    """A process that sees the store's folder at ``path``, as it is below the mount."""

    pid: int
    command: str
    path: str

    def __str__(self) -> str:
        return printable(f"process {self.pid} ({self.command}) sees the store at {self.path} without the mount over it")


@dataclass(frozen=True, slots=True)
class _Mount:
    number: str
    device: str
    root: str
    point: str


def uncovered_views(root: Path) -> list[View]:
    """Views of the covered store at ``root`` (a descriptor's path, see ``hydrafs.covered``), one for each table of
    mounts that has any. Empty where that cannot be told.

    Of this process' own table only mounts of the folder itself, or of one in it, count: that another mount has the
    whole disk is how disks are looked after.
    """
    try:
        inside = _place_on_disk(root)
    except (OSError, StopIteration, ValueError):
        return []
    found = []
    for pid, table, is_own in _tables():
        for mount in table:
            if mount.device != inside.device or (is_own and mount.number == inside.number):
                continue
            if _is_in(mount.root, inside.root):
                point = mount.point  # the folder, or a part of it
            elif not is_own and _is_in(inside.root, mount.root):
                point = _join(mount.point, os.path.relpath(inside.root, mount.root))
            else:
                continue
            if _topmost(table, point) is mount:
                found.append(View(pid, _command(pid), point))
                break
    return found


def _place_on_disk(root: Path) -> _Mount:
    """The mount that the store's folder lies on, and as ``root`` where in its filesystem."""
    fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    mount = next(mount for mount in _parsed(Path("/proc/self/mountinfo").read_bytes()) if mount.number == number)
    below = os.path.relpath(os.path.realpath(os.path.dirname(named(root))), mount.point)
    return _Mount(number, mount.device, _join(_join(mount.root, below), os.path.basename(named(root))), mount.point)


def _tables() -> Iterator[tuple[int, list[_Mount], bool]]:
    """Each table of mounts that a process has, once."""
    own_space, own_table = os.readlink("/proc/self/ns/mnt"), Path("/proc/self/mountinfo").read_bytes()
    yield os.getpid(), _parsed(own_table), True
    seen: set[object] = {own_space, own_table}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            space: object = None
            with contextlib.suppress(PermissionError):  # other users' processes: their tables can be read all the same
                space = os.readlink(f"/proc/{name}/ns/mnt")
                if space in seen:
                    continue
            data = Path(f"/proc/{name}/mountinfo").read_bytes()
            if data and data not in seen:
                yield int(name), _parsed(data), False
            seen.update((data,) if space is None else (space, data))


def _parsed(data: bytes) -> list[_Mount]:
    mounts = []
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        fields = line.split(" ")
        if len(fields) > 5:
            mounts.append(_Mount(fields[0], fields[2], _unescape(fields[3]), _unescape(fields[4])))
    return mounts


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _join(folder: str, below: str) -> str:
    return os.path.normpath(os.path.join(folder, below))


def _topmost(table: list[_Mount], path: str) -> _Mount | None:
    """The mount that a path is in: the deepest, and of those at one place the last."""
    found = None
    for mount in table:
        if _is_in(path, mount.point) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
