"""What the program that calls has in its hands: whether it reads, past the mount, the file that it is about to lose.

A mount and the folder that it shows are two filesystems to a program. ``cp`` and ``mv`` from one to the other do not
see that source and target are one file: ``cp`` empties it before the first byte is read, ``mv`` deletes it first.

Rule 1: only what leads to the very file counts, by device and inode: a descriptor or a mapping that is not of the
        mount, or a word of the command line. What a program has open through the mount is no reason to refuse anything.
Rule 2: nothing here asks the mount that is being served: its answer is ours to give, and the caller may hold the lock
        of a folder of it. Paths are walked step by step (``O_PATH``), and never on in the mount.
Rule 3: what cannot be looked at (another user's process, another pid namespace) is no obstacle.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["Target", "other_way"]

_MAX_WORDS = 64
"""Of a longer command line only words that end in the name of the file are followed."""
_MAX_COMMAND_NBYTES = 1 << 20
_MAX_STEPS = 128
_REMOVERS = frozenset({"rm", "unlink", "shred", "wipe"})
"""Who names a file to these wants it gone."""
_COPIERS = frozenset({"cp", "mv", "install", "ln"})
"""What these are given as a folder they copy from: a target in it is its own source."""
_MIRRORS = frozenset({"rsync", "rclone", "unison", "openrsync"})
"""These delete what is not in the folder that they are given. What is in the store by another name seems not to be."""
_SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "busybox"})

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Target:
    """What is about to be emptied, deleted or replaced.

    Args:
        name: the last part of its path.
        files: the files of the store that have the name: the plain one, its diff.
        folders: the folders of the store above it.
        device: of these files in mountinfo(5), "MAJOR:MINOR", which is not always that of stat(2).
        mount: the device of the mount that is served, as there.
        is_diff: whether the file is a diff, which goes by another name in the store.
    """

    name: str
    files: frozenset[Key]
    folders: frozenset[Key]
    device: str
    mount: str
    is_diff: bool = False


def other_way(process: int, target: Target, *, mapped: bool, folders: bool) -> str | None:
    """By which way that is not the mount ``process`` reads a file of ``target``; ``None`` where it does not.

    Args:
        process: a process or a thread, as this process knows it; 0 for one that it does not know.
        mapped: whether mappings count.
        folders: whether a folder that is copied from counts for what is in it.
    """
    if process <= 0:
        return None
    words = _command(process)
    program = os.path.basename(words[0]).lstrip("-") if words else ""
    if program in _REMOVERS:
        return None
    try:
        mounts = _mounts(process)
        found = _descriptor(process, target, mounts)
        if found is None and mapped:
            found = _mapping(process, target)
        folders = folders and (program in _COPIERS or (target.is_diff and program in _MIRRORS))
        return found or _word(process, target, mounts, program, words[1:], folders=folders)
    except OSError:
        return None


def device_of(fd: int) -> str:
    """The device of an open file as mountinfo(5) has it; empty where that does not tell."""
    with contextlib.suppress(OSError):
        mount = _mounts(os.getpid()).get(_fdinfo(os.getpid(), str(fd)).get("mnt_id", ""))
        if mount is not None:
            return mount.device
    return ""


def device_mounted_at(path: str) -> str:
    """The device of what is mounted at ``path``, the last one there; empty where nothing is."""
    with contextlib.suppress(OSError):
        found = [mount.device for mount in _mounts(os.getpid()).values() if mount.point == path]
        return found[-1] if found else ""
    return ""


@dataclass(frozen=True, slots=True)
class _Mount:
    device: str
    point: str
    kind: str

    def is_twin(self, target: Target) -> bool:
        """Whether it is another mount of hydrafs, which may be of the same store."""
        return self.kind == "fuse.hydrafs" and self.device != target.mount


def _mounts(process: int) -> dict[str, _Mount]:
    """The mounts that a process sees, by their ids."""
    found = {}
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, kind = left.split(" "), right.split(" ")
            if len(fields) > 4 and len(kind) > 1:
                found[fields[0]] = _Mount(fields[2], _unescape(fields[4]), kind[0])
    return found


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _fdinfo(process: int, number: str) -> dict[str, str]:
    """What proc(5) says of a descriptor: it asks no filesystem."""
    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii", errors="replace") as lines:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _is_one(info: dict[str, str], target: Target, mounts: dict[str, _Mount], path: str) -> bool:
    """Whether what is open at ``path``, of which proc(5) says ``info``, is a file of ``target``."""
    mount = mounts.get(info.get("mnt_id", ""))
    inodes = {inode for _, inode in target.files}
    number = info.get("ino")  # Linux 5.14
    if (mount is not None and mount.device == target.mount) or (number is not None and int(number) not in inodes):
        return False
    return _key_behind(path, mount, target) in target.files


def _key(stat: os.stat_result) -> Key:
    return stat.st_dev, stat.st_ino


def _key_behind(path: str, mount: _Mount | None, target: Target) -> Key:
    """The file itself; where it is seen in another mount of hydrafs, the file of the store."""
    if mount is not None and mount.is_twin(target):
        path = os.fsdecode(os.getxattr(path, "user.hydrafs.path"))
    return _key(os.stat(path))


def _descriptor(process: int, target: Target, mounts: dict[str, _Mount]) -> str | None:
    for number in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError, ValueError):
            if _is_one(_fdinfo(process, number), target, mounts, f"/proc/{process}/fd/{number}"):
                return os.readlink(f"/proc/{process}/fd/{number}")
    return None


def _mapping(process: int, target: Target) -> str | None:
    inodes = {str(inode) for _, inode in target.files}
    with open(f"/proc/{process}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) > 5 and fields[4] in inodes:
                major, _, minor = fields[3].partition(":")
                if f"{int(major, 16)}:{int(minor, 16)}" == target.device:
                    return fields[5].rstrip("\n")
    return None


# The command line


def _command(process: int) -> list[str]:
    with contextlib.suppress(OSError), open(f"/proc/{process}/cmdline", "rb") as file:
        return [os.fsdecode(word) for word in file.read(_MAX_COMMAND_NBYTES).split(b"\0")[:-1]]
    return []


def _word(
    process: int, target: Target, mounts: dict[str, _Mount], program: str, words: list[str], *, folders: bool
) -> str | None:
    """The word of the command line that names a file of ``target``, or with ``folders`` a folder above it."""
    wanted: Collection[Key] = target.files | target.folders if folders else target.files
    candidates = list(_paths(program, words))
    if len(candidates) > _MAX_WORDS:
        candidates = [word for word in candidates if word.rstrip("/").endswith(target.name)][:_MAX_WORDS]
    for word in candidates:
        with contextlib.suppress(OSError, ValueError):
            if _leads_to(process, word, wanted, target, mounts):
                return word
    return None


def _paths(program: str, words: list[str]) -> Iterator[str]:
    """What of a command line may be a path; of a shell, the words of the script that it was given."""
    for word in words:
        if program in _SHELLS and any(character in word for character in " \t\n;&|<>"):
            lexer = shlex.shlex(word, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            with contextlib.suppress(ValueError):
                yield from (part for part in lexer if part)
            continue
        if word and not word.startswith("-"):
            yield word
        _, equals, value = word.partition("=")  # dd if=..., --file=...
        if equals and value:
            yield value


def _leads_to(process: int, word: str, wanted: Collection[Key], target: Target, mounts: dict[str, _Mount]) -> bool:
    """Whether ``word`` is a path to one of ``wanted``, links followed, as the process would follow it."""
    if len(word) > 4096 or "\0" in word:
        return False
    root = f"/proc/{process}/root"
    fd = os.open(root if word.startswith("/") else f"/proc/{process}/cwd", os.O_PATH | os.O_CLOEXEC)
    pending = [part for part in word.split("/") if part not in ("", ".")][::-1]
    try:
        for _ in range(_MAX_STEPS):
            info = _fdinfo(os.getpid(), str(fd))
            mount = mounts.get(info.get("mnt_id", ""))
            inside = mount is not None and mount.device == target.mount
            if not pending:
                if inside or mount is None:
                    return False
                return _key_behind(f"/proc/self/fd/{fd}", mount, target) in wanted
            if inside and pending[-1] != "..":
                return False
            part = pending.pop()
            # ".." of the root of another namespace would lead out of it: such paths are for tricks, not for copies.
            step = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                link = os.readlink("", dir_fd=step)
            except OSError:
                os.close(fd)
                fd = step
                continue
            os.close(step)
            pending.extend([p for p in link.split("/") if p not in ("", ".")][::-1])
            if link.startswith("/"):
                step = os.open(root, os.O_PATH | os.O_CLOEXEC)
                os.close(fd)
                fd = step
        return False
    finally:
        os.close(fd)
