"""Who can write to a file, as /proc tells: through a descriptor, or through a mapping that outlived its descriptor.

For where the kernel gives no lease (``hydrafs.leases``). A look takes some ten milliseconds. It sees what processes
have, not what is on its way between two of them, and nothing of other machines.
"""

from __future__ import annotations

import contextlib
import enum
import os
from pathlib import Path

from hydrafs.filesystem import is_stacked

__all__ = ["Writers", "writers"]

_PROC = Path("/proc")
_PF_KTHREAD = 0x00200000
_NOT_FILES = ("socket:", "pipe:", "anon_inode:", "/dev/", "/memfd:")


class Writers(enum.Enum):
    """What a look gave: that nobody can write, that somebody can, or that not every process could be looked at."""

    NOBODY = "nobody can write to it"
    SOMEBODY = "it is open for writing"
    UNKNOWN = "not every process can be looked at"


class _Wanted:
    """The file that is looked for."""

    def __init__(self, fd: int) -> None:
        self.stat = os.fstat(fd)
        self.numbers = f"{os.major(self.stat.st_dev):02x}:{os.minor(self.stat.st_dev):02x}"
        self.inode = str(self.stat.st_ino)
        self.stacked = is_stacked(fd)
        try:
            self.path = os.readlink(_PROC / "self" / "fd" / str(fd))
        except OSError:
            self.path = ""

    def is_at(self, place: Path) -> bool:
        return os.path.samestat(os.stat(place), self.stat)


def writers(fd: int, *, thorough: bool = False) -> Writers:
    """Who can write to the file of the open descriptor ``fd``, this process included (proc(5): fd, fdinfo, maps).

    Args:
        thorough: look at all that can be looked at, also where it is known by then that it is not everything.
    """
    wanted = _Wanted(fd)
    try:
        processes = sorted(int(name) for name in os.listdir(_PROC) if name.isdecimal())
    except OSError:
        return Writers.UNKNOWN
    blind = 1 not in processes  # other users' processes are hidden (hidepid), or there is no /proc
    for number in processes:
        if blind and not thorough:
            break
        process = _PROC / str(number)
        for look in (_has_descriptor, _has_mapping):
            try:
                if look(process, wanted):
                    return Writers.SOMEBODY
            except (FileNotFoundError, ProcessLookupError):
                break  # it has ended
            except OSError:
                if not (_has_no_files(process) or (number == 1 and _is_ours(process))):
                    blind = True
                    break
    return Writers.UNKNOWN if blind else Writers.NOBODY


def _has_no_files(process: Path) -> bool:
    """Whether it is a thread of the kernel, or dead, or gone: nothing is hidden in what cannot be looked at."""
    try:
        text = (process / "stat").read_text(errors="replace")
        state, *fields = text[text.rindex(")") + 2 :].split()
        return state in "ZX" or bool(int(fields[5]) & _PF_KTHREAD)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError, IndexError):
        return False


def _is_ours(process: Path) -> bool:
    """Whether a process has the user of this one, and no other. Of init that is enough: it may have more rights than
    this process, which hide it, and it writes to no model."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(x for x in (process / "status").read_text(errors="replace").splitlines() if x.startswith("Uid:"))
        return set(line.split()[1:]) == {str(os.geteuid())}
    return False


def _has_descriptor(process: Path, wanted: _Wanted) -> bool:
    for name in os.listdir(process / "fd"):
        try:
            # No question to the filesystem of a file that is another's: that may be a mount that hangs, or our own.
            facts = dict(line.split(":", 1) for line in (process / "fdinfo" / name).read_text().splitlines() if line)
            if int(facts["flags"], 8) & os.O_ACCMODE == os.O_RDONLY:
                continue
            if "ino" in facts and not wanted.stacked:
                if facts["ino"].strip() != wanted.inode:
                    continue
            elif os.readlink(process / "fd" / name).startswith(_NOT_FILES):
                continue
            if wanted.is_at(process / "fd" / name):
                return True
        except (FileNotFoundError, ProcessLookupError, KeyError, ValueError):
            continue  # it was closed
    return False


def _has_mapping(process: Path, wanted: _Wanted) -> bool:
    for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
        place, permissions, _, device, inode, *path = line.split(None, 5)
        if permissions[3:4] != "s":
            continue
        if inode != wanted.inode and not (wanted.stacked and path and path[0] == wanted.path):
            continue
        if permissions[1] != "w" and not _may_become_writable(process, place):
            continue
        if device == wanted.numbers:
            return True
        try:
            if wanted.is_at(process / "map_files" / place):
                return True
        except OSError:
            # Whoever may not follow it cannot tell one from the other where numbers are not what stat tells.
            if wanted.stacked:
                return True
    return False


def _may_become_writable(process: Path, place: str) -> bool:
    """Whether mprotect(2) can make a shared mapping writable: it is of a descriptor that was open for writing."""
    inside = False
    with (process / "smaps").open(errors="surrogateescape") as file:
        for line in file:
            if line.startswith(place):
                inside = True
            elif inside and line.startswith("VmFlags:"):
                return "mw" in line.split()
    return False
