"""The mounts that a walk comes to: those of hydrafs, which it does not enter, and others that may not answer.

Rule 1: nothing at or below such a mount is asked before it is known that it answers, not even by a stat: whoever asks
        a filesystem that does not answer waits for ever. Paths are followed as text, with the kernel's table at hand.
Rule 2: a filesystem is asked in a child process (``child.ask_filesystems``).
Thread safety: all of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hydrafs.child import ask_filesystems
from hydrafs.covered import is_covered, named, reached
from hydrafs.mounttable import MountInfo, all_mounts

__all__ = ["LeftOut", "Place", "Submounts", "all_answer", "lead_astray"]

OURS = "fuse.hydrafs"
_SOURCE = "hydrafs:"
"""What the source of such a mount begins with; the name of its store follows."""
_REMOTE = frozenset((
    "fuse", "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "afs", "lustre", "gpfs", "beegfs",
    "orangefs", "pvfs2", "ocfs2", "gfs2", "coda", "ncpfs", "autofs",
))  # fmt: skip
_ANSWER_SECONDS = 2.0
_BELIEVED_SECONDS = 10.0
"""For how long an answer is believed, and for how long the lack of one: each question is a process."""
_TABLE_SECONDS = 1.0
_MAX_LINKS = 40  # as path_resolution(7) has it
_answers: dict[tuple[int, str, str], tuple[float, bool]] = {}
_asking = threading.Lock()
_tables: list[tuple[float, Submounts]] = []


@dataclass(frozen=True, slots=True)
class Place:
    """A name without links, and the mount that it is on (0 where that is not in the table)."""

    path: str
    mount_id: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A mount that is not to be entered. ``error``: why what is in it is not known; None where it holds nothing of who
    comes to it: hydrafs shows there what is stored elsewhere."""

    mount: MountInfo
    error: OSError | None = None


Judge = Callable[[MountInfo], LeftOut | None]


class Submounts:
    """The kernel's table of mounts as it was when this was made."""

    def __init__(self) -> None:
        try:
            mounts = all_mounts()
        except OSError:
            mounts = []
        self._mounts = {mount.mount_id: mount for mount in mounts}
        self._children: dict[tuple[int, str], MountInfo] = {}
        self._holders: set[tuple[str, int]] = set()
        self._trusted: set[int] = set()
        self._top = ""
        for mount in mounts:
            parent = mount.parent_id if mount.parent_id in self._mounts and mount.parent_id != mount.mount_id else 0
            path = os.fspath(mount.mountpoint)
            self._children[parent, path] = mount
            self._holders.add((os.path.dirname(path), parent))
        self.special = [mount for mount in mounts if _is_special(mount)]

    def top(self, path: str) -> Place:
        """Where the walk of ``path`` begins, which answers."""

        def judge(mount: MountInfo) -> None:
            self._trusted.add(mount.mount_id)

        place = self._place(path, judge)
        assert isinstance(place, Place)
        self._top = place.path
        return place

    def child(self, folder: Place, name: str, *, is_link: bool) -> Place | LeftOut:
        """The place of an entry of a folder, links followed; or the mount on the way there that is not to be entered:
        one of hydrafs, or one that does not answer."""
        return self._follow(name, folder, self._judge) if is_link else self._step(folder, name, self._judge)

    def holds_mounts(self, folder: Place) -> bool:
        """Whether something is mounted on entries of a folder."""
        return (folder.path, folder.mount_id) in self._holders

    def astray(self, path: str, never: str) -> LeftOut | None:
        """The first mount on the way to ``path`` that does not answer, or is at ``never``, which is not asked."""

        def judge(mount: MountInfo) -> LeftOut | None:
            if os.fspath(mount.mountpoint) == never:
                return LeftOut(mount)
            return None if _answers_now(mount, [mount]) else LeftOut(mount, _no_answer(mount))

        place = self._place(path, judge)
        return place if isinstance(place, LeftOut) else None

    def _judge(self, mount: MountInfo) -> LeftOut | None:
        if mount.mount_id in self._trusted:
            return None
        point = os.fspath(mount.mountpoint)
        if mount.fstype == OURS:
            # Over its own store it hides what is stored there; the one that the walk is below hides nothing of it.
            is_below = self._top == point or self._top.startswith(f"{point}/")
            may_hide = mount.source in (f"{_SOURCE}{_source_name(mount.mountpoint.name)}", _SOURCE)
            if is_below or (mount.source.startswith(_SOURCE) and not may_hide):
                return LeftOut(mount)
            hidden = f"hydrafs is mounted on {point}: what it covers cannot be looked at"
            return LeftOut(mount, OSError(errno.EBUSY, hidden, point))
        below = [m for m in self.special if m.fstype != OURS and m.mountpoint.is_relative_to(self._top)]
        if not _answers_now(mount, [mount, *(m for m in below if m != mount)]):
            return LeftOut(mount, _no_answer(mount))
        self._trusted.add(mount.mount_id)
        return None

    def _place(self, path: str, judge: Judge) -> Place | LeftOut:
        if is_covered(path):  # the descriptor leads below the mount that is at its name
            descriptor = "/".join(path.split("/")[:5])
            start = Place(named(descriptor), _mount_id(descriptor))
            return self._follow(path[len(descriptor) :].lstrip("/"), start, judge)
        return self._follow(os.path.join(os.getcwd(), path), Place("/", 0), judge)

    def _follow(self, path: str, start: Place, judge: Judge) -> Place | LeftOut:
        pending, place, links = _parts(path), start, 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            before = place
            if part == "/":
                step = self._down("/", 0, judge)
            elif part == "..":
                step = self._up(place, judge)
            else:
                step = self._step(place, part, judge)
            if isinstance(step, LeftOut):
                return step
            place = step
            if part in ("/", ".."):
                continue
            try:
                link = os.readlink(reached(place.path))
            except Exception:  # no link; or what fails here fails whoever looks at it as well, and is told then
                continue
            links += 1
            if links > _MAX_LINKS:
                return place  # a loop: it leads nowhere
            place = before
            pending.extend(_parts(link))
        return place

    def _step(self, folder: Place, name: str, judge: Judge) -> Place | LeftOut:
        return self._down(f"{folder.path.rstrip('/')}/{name}", folder.mount_id, judge)

    def _up(self, place: Place, judge: Judge) -> Place | LeftOut:
        mount_id = place.mount_id
        while (mount := self._mounts.get(mount_id)) is not None and os.fspath(mount.mountpoint) == place.path != "/":
            mount_id = mount.parent_id
        return self._down(os.path.dirname(place.path), mount_id, judge)

    def _down(self, path: str, mount_id: int, judge: Judge) -> Place | LeftOut:
        """What is on top at ``path`` of a mount."""
        found = None
        while (mount := self._children.get((mount_id, path))) is not None:
            found, mount_id = mount, mount.mount_id
        left_out = judge(found) if found is not None and _is_special(found) else None
        return left_out or Place(path, mount_id)


def lead_astray(path: str | os.PathLike[str], never: str | os.PathLike[str] | None = None) -> bool:
    """Whether the way to the absolute ``path`` goes through a filesystem that does not answer, or the mount at
    ``never``, which is not asked. The kernel's table is read once in a second."""
    now = time.monotonic()
    if not _tables or now - _tables[0][0] > _TABLE_SECONDS:
        _tables[:] = [(now, Submounts())]
    table = _tables[0][1]
    never = os.fspath(never) if never is not None else ""
    if all(os.fspath(mount.mountpoint) == never for mount in table.special):
        return False
    return table.astray(os.fspath(path), never) is not None


def all_answer() -> bool:
    """Whether every mount answers that might not."""
    special = Submounts().special
    return all(_answers_now(mount, special) for mount in special)


def _parts(path: str) -> list[str]:
    """The parts of a path, the last one first; that of an absolute one begin with ``/``."""
    parts = path.split("/")[::-1]
    return [*parts, "/"] if path.startswith("/") else parts


def _is_special(mount: MountInfo) -> bool:
    return mount.fstype in _REMOTE or mount.fstype.startswith("fuse.")


def _source_name(name: str) -> str:
    return re.sub(r"[^\w.+@=-]", "_", name)


def _no_answer(mount: MountInfo) -> OSError:
    return OSError(errno.ETIMEDOUT, f"{mount.fstype}, mounted on {mount.mountpoint}, does not answer", mount.mountpoint)


def _answers_now(mount: MountInfo, mounts: list[MountInfo]) -> bool:
    """Whether a mount answers; ``mounts`` are asked with it, all at a time."""

    def key(mount: MountInfo) -> tuple[int, str, str]:
        return mount.mount_id, mount.device, os.fspath(mount.mountpoint)

    with _asking:
        now = time.monotonic()
        for known in [k for k, (when, _) in _answers.items() if now - when > _BELIEVED_SECONDS]:
            del _answers[known]
        if key(mount) not in _answers:
            unknown = [m for m in mounts if key(m) not in _answers]
            try:
                said = ask_filesystems([reached(os.fspath(m.mountpoint)) for m in unknown], _ANSWER_SECONDS)
            except OSError:  # no more processes: nobody knows
                return False
            now = time.monotonic()
            _answers.update({key(m): (now, s is not None) for m, s in zip(unknown, said, strict=True)})
        return _answers[key(mount)][1]


def _mount_id(path: str) -> int:
    """The mount that what ``path`` leads to is on; the filesystem is not asked."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
                if line.startswith("mnt_id:"):
                    return int(line.split()[1])
        finally:
            os.close(fd)
    return 0
