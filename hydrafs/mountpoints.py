"""Mountpoints seen from outside: what of ours is mounted where, whether one can be mounted on, and taking it down.

Nothing here prints or reads the environment. The kernel's table (``/proc/self/mountinfo``, see proc(5)) is asked before
anything is touched: a ``stat`` of a mount whose daemon hangs would hang too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import queue
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hydrafs import child
from hydrafs.errors import Denied, HydraError, MountFailed, NotFound, UsageError
from hydrafs.mounttable import MountInfo, all_mounts

__all__ = ["MountInfo", "all_mounts", "check_mountpoint", "check_store_paths", "clear_stale", "how_to_end",
           "mount_above", "our_mounts", "raise_readahead", "resolve", "unmount", "wait_until_answers"]  # fmt: skip

log = logging.getLogger("hydrafs.mountpoints")

SUBTYPE = "hydrafs"
FSTYPE = f"fuse.{SUBTYPE}"
READAHEAD_KIB = 1024
_TRIGGER = "autofs"
"""What an automount leaves at its mountpoint: who looks into it waits until something was mounted on top."""
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # umount(2)
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
_DEAD_SECONDS = 2.0
"""How long to wait for a mount to say that nobody is connected: who hangs does not say it."""
_TOOL_SECONDS = 2.0
_MAX_LINKS = 40  # as path_resolution(7) has it
_SEE_LOG = "look into its log, or mount with --foreground"


def our_mounts() -> list[MountInfo]:
    """The mounts of hydrafs, whoever made them, dead ones included."""
    return [mount for mount in all_mounts() if mount.fstype == FSTYPE]


def resolve(mountpoint: str | os.PathLike[str]) -> Path:
    """The absolute path without symlinks. Nothing at or below a mount of ours is asked: its daemon may be dead, or not
    answer; what follows the name of such a mount stays as it is written."""
    ours = {os.fspath(mount.mountpoint) for mount in our_mounts()}
    text = os.path.join(os.getcwd(), mountpoint)  # not abspath: "link/.." is above where the link leads
    current, links, pending = "/", 0, text.split("/")[::-1]
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            current = os.path.dirname(current)
            continue
        step = os.path.join(current, part)
        if step in ours:
            return Path(os.path.normpath(os.path.join(step, *pending[::-1])))
        try:
            link = os.readlink(step)
        except (OSError, ValueError):
            current = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return Path(text)  # a loop: it leads nowhere
        current = "/" if link.startswith("/") else current
        pending.extend(link.split("/")[::-1])
    return Path(current)


def mount_above(path: str | os.PathLike[str]) -> MountInfo | None:
    """The mount of ours that ``path`` lies in, or is, by its name; nothing in it is asked."""
    name = resolve(path)
    above = [mount for mount in our_mounts() if name.is_relative_to(mount.mountpoint)]
    return max(above, key=lambda mount: len(mount.mountpoint.parts), default=None)


def how_to_end(mount: MountInfo) -> str:
    """What to do about a mount whose daemon does not answer."""
    number = mount.device.rpartition(":")[2]
    return (
        f"hydrafs umount --lazy {mount.mountpoint} takes it down, and then, as root, echo 1 > "
        f"/sys/fs/fuse/connections/{number}/abort frees who waits for it"
    )


def _topmost(mountpoint: Path) -> MountInfo | None:
    return next((mount for mount in reversed(all_mounts()) if mount.mountpoint == mountpoint), None)


def _is_dead(path: Path) -> bool:
    # Not stat: for a second the kernel answers that one itself.
    (answer,) = child.ask_filesystems([path], _DEAD_SECONDS)
    return answer in _DEAD


def clear_stale(mountpoint: Path) -> int:
    """Take down what dead daemons of ours left at ``mountpoint`` (resolved); how many there were.

    Only what is ours by the kernel's table *and* answers that nobody is connected is touched.
    """
    count = 0
    while count < 16:
        top = _topmost(mountpoint)
        if top is None or top.fstype != FSTYPE or not _is_dead(mountpoint):
            break
        log.warning("%s: the daemon of this mount is dead, unmounting", mountpoint)
        _unmount_path(mountpoint, lazy=True)
        count += 1
    return count


def check_mountpoint(mountpoint: Path, *, nonempty: bool = False) -> None:
    """Refuse a place that should not be mounted on. An automount's trigger is a place to mount on.

    Raises:
        NotFound: there is nothing, or a file.
        MountFailed: something is mounted there already, or the directory has files in it.
        Denied: it cannot be looked at.
    """
    top = _topmost(mountpoint)
    if top is not None and top.fstype == _TRIGGER:
        return  # empty, and not looked into: by anybody but the automounter's own that would wait for this very mount
    if top is not None:
        remedy = f"hydrafs umount {mountpoint}" if top.fstype == FSTYPE else "unmount it or choose another directory"
        raise MountFailed(
            "the mountpoint is in use", where=mountpoint, detail=f"{top.fstype} is mounted there", remedy=remedy
        )
    try:
        mode = os.stat(mountpoint).st_mode
        if not stat.S_ISDIR(mode):
            raise NotFound("the mountpoint is no directory", where=mountpoint, remedy="name a directory")
        with os.scandir(mountpoint) as names:
            empty = next(names, None) is None
    except FileNotFoundError:
        raise NotFound("no such mountpoint", where=mountpoint, remedy=f"mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise NotFound("the mountpoint is no directory", where=mountpoint, remedy="name a directory") from None
    except OSError as error:
        raise Denied(
            "the mountpoint cannot be used",
            where=mountpoint,
            detail=error.strerror or "",
            remedy="check the permissions of the directory",
        ) from None
    if not empty and not nonempty:
        raise MountFailed(
            "the mountpoint is not empty",
            where=mountpoint,
            detail="what is in it would be hidden",
            remedy="choose an empty directory, or add -o nonempty",
        )


def check_store_paths(mountpoint: Path, store_paths: Sequence[str | os.PathLike[str]], *, over_store: bool) -> None:
    """Refuse a mount that would hide what it is made of, or that would show itself.

    Args:
        mountpoint: resolved.
        store_paths: the store, then its bases' folders and files, its cache: everything that the daemon opens by name.
        over_store: the tree holds descriptors from before the mount, so a path may be the mountpoint itself.

    Raises:
        UsageError: one of the paths is at or below the mountpoint, or the mountpoint is inside one of them; or an
            automount hides the store already.
    """
    for given in store_paths:
        path = resolve(given)
        if path == mountpoint and over_store:
            top = _topmost(path)
            if top is not None and top.fstype == _TRIGGER:
                raise UsageError(
                    "an automount hides the store",
                    where=path,
                    detail="its files cannot be reached under the mount that is to be made of them",
                    remedy="mount it without automount, or at another place",
                )
            continue
        if path.is_relative_to(mountpoint):
            raise UsageError(
                "the mount would hide files that it needs",
                where=path,
                detail=f"it lies at or below the mountpoint {mountpoint}",
                remedy="choose a mountpoint outside",
            )
        if mountpoint.is_relative_to(path):
            is_store = given == store_paths[0]
            raise UsageError(
                f"the mountpoint lies inside {'the store' if is_store else 'a base folder'}",
                where=mountpoint,
                detail=f"the mount of {path} would show itself" if is_store else f"bases are looked for in {path}",
                remedy="choose a mountpoint outside",
            )


def wait_until_answers(mountpoint: Path, seconds: float) -> MountInfo:
    """Wait for a mount of ours at ``mountpoint``, where ``check_mountpoint`` saw none, to be there and answer a stat.

    The stat is made on a thread of its own, which is left behind when the daemon hangs.

    Raises:
        MountFailed: the mount answers with an error, or not at all within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    answers: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            os.stat(mountpoint)
        except OSError as error:
            answers.put(error)
        else:
            answers.put(None)

    while time.monotonic() < deadline:
        top = _topmost(mountpoint)
        if top is None or top.fstype != FSTYPE:
            time.sleep(0.002)
            continue
        threading.Thread(target=ask, name="hydrafs-answer", daemon=True).start()
        with contextlib.suppress(queue.Empty):
            error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if error is None:
                return top
            raise MountFailed("the mount does not work", where=mountpoint, detail=error.strerror or "", remedy=_SEE_LOG)
    raise MountFailed("the mount does not answer", where=mountpoint, detail=f"for {seconds:g} s", remedy=_SEE_LOG)


def raise_readahead(mount: MountInfo) -> bool:
    """Let the kernel read ahead 1 MiB on this mount; whether it could be set (only root may, and not everywhere).

    At 128 KiB, the default, sequential reads come to less than half the speed; 4 MiB and more slow mapped loads down.
    """
    knob = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb")
    try:
        knob.write_text(f"{READAHEAD_KIB}\n")
    except OSError as error:
        log.debug("%s: readahead stays as it is: %s", mount.mountpoint, error)
        return False
    return True


def unmount(mountpoint: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """Take a mount of ours down; its daemon ends by itself.

    Args:
        mountpoint: where it is mounted.
        lazy: also while files are open on it: the name is free at once, the daemon lives until they are closed.

    Raises:
        NotFound: nothing is mounted there.
        MountFailed: it is not ours, or busy.
        Denied: it is someone else's.
    """
    path = resolve(mountpoint)
    top = _topmost(path)
    if top is None:
        ours = ", ".join(str(mount.mountpoint) for mount in our_mounts())
        raise NotFound(
            "nothing is mounted", where=path, remedy=f"mounted now: {ours}" if ours else "no hydrafs mount is up"
        )
    if top.fstype != FSTYPE:
        raise MountFailed("not a hydrafs mount", where=path, detail=f"it is {top.fstype}", remedy=f"umount {path}")
    try:
        _unmount_path(path, lazy=lazy)
    except MountFailed:
        if lazy:
            raise
        # Once more also where it lives: a file that was closed a moment ago may have been what it was busy with.
        _unmount_path(path, lazy=_is_dead(path))


def _unmount_path(path: Path, *, lazy: bool) -> None:
    """Nothing here asks the mount: umount(2) does not, by the path without following what is there."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) == 0:
            return
        number = ctypes.get_errno()
        raise _unmount_error(path, os.strerror(number), busy=number == errno.EBUSY)
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool is None:
        raise MountFailed("fusermount3 is not installed", remedy="install fuse3, or unmount as root")
    command = [tool, "-u", *(["-z"] if lazy else []), "--", os.fspath(path)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # no pipe, which one that hangs would keep open
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd="/")
        try:
            code = process.wait(_TOOL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.returncode = -9  # it may be beyond any signal
            top = _topmost(path)
            raise MountFailed(
                "the mount cannot be taken down",
                where=path,
                detail=f"{tool} does not end",
                remedy=how_to_end(top) if top is not None else "ask root",
            ) from None
        said.seek(0)
        reason = said.read().strip()
    if code != 0:
        raise _unmount_error(path, reason, busy="busy" in reason)


def _unmount_error(path: Path, reason: str, *, busy: bool) -> HydraError:
    if busy:
        return MountFailed(
            "the mount is in use",
            where=path,
            detail=reason,
            remedy=f"close what uses it (fuser -vm {path} lists that), or add --lazy",
        )
    return Denied("the mount cannot be taken down", where=path, detail=reason, remedy="ask as who mounted it, or root")
