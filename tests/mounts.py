"""What the tests of a mount share that is no fixture: a mount by the command line, and what a store held before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hydrafs.mountpoints import our_mounts, unmount

WAIT_SECONDS = 30.0
BELIEVED_SECONDS = 1.2
"""Longer than the kernel believes a name."""
MTIME_NS = 1_600_000_000_123_456_789


@dataclass(frozen=True)
class Original:
    """A model as it was before it was dehydrated."""

    data: bytes
    mode: int
    mtime_ns: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Library:
    """A store, and the originals by the names that they are listed under."""

    root: Path
    originals: dict[str, Original]

    def diff(self, name: str) -> Path:
        return self.root / (name + ".hydra")

    def dehydrated(self) -> list[str]:
        return [name for name in self.originals if self.diff(name).exists()]


def hydrafs(*arguments: str | os.PathLike[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; its stdin is empty."""
    return subprocess.run(
        [sys.executable, "-m", "hydrafs", *map(os.fspath, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def daemons_of(point: Path) -> list[int]:
    """The processes that serve a mount at ``point``: they name it in their command line and hold /dev/fuse open."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(point) in (folder / "cmdline").read_bytes().split(b"\0") and any(
                    os.readlink(fd) == "/dev/fuse" for fd in (folder / "fd").iterdir()
                ):
                    found.append(int(folder.name))
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Callable[[], object]) -> bool:
    """Whether ``condition`` becomes true; a bound against hanging, and no measure of speed."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_mounted(point: Path) -> bool:
    return any(mount.mountpoint == point for mount in our_mounts())


def _has(line: str, patterns: tuple[str, ...]) -> bool:
    return all(re.search(pattern, line) for pattern in patterns)


class Mount:
    """A mount that was made by ``hydrafs mount``. ``path`` is the mountpoint, ``pid`` the daemon's."""

    def __init__(self, library: Library, path: Path, binding: str) -> None:
        self.library, self.path, self.binding = library, path, binding
        self.pid = 0
        self._expected: list[tuple[str, ...]] = []

    @property
    def root(self) -> Path:
        return self.library.root

    @property
    def log_path(self) -> Path:
        return self.root / ".hydrafs" / "mount.log"

    def up(self, *arguments: str, warning: str = "") -> Mount:
        # What stands in a store is what the test put there, unless it says otherwise.
        background = () if "--dehydrate" in arguments else ("--dehydrate", "off")
        done = hydrafs("mount", self.root, self.path, *background, *arguments, HYDRAFS_FUSE=self.binding)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert bool(warning) == bool(done.stderr), done.stderr
        assert warning in done.stderr
        assert done.stderr.count("\n") <= 1, done.stderr
        (self.pid,) = daemons_of(self.path)
        return self

    def log(self) -> list[str]:
        """What the daemon and its worker logged, besides what they only tell that they did."""
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return [line for line in lines if ": INFO: " not in line]

    def logged(self, *patterns: str) -> str:
        """The first line of the daemon's log that has all the patterns in it; waits for it."""
        self._expected.append(patterns)
        assert eventually(lambda: any(_has(line, patterns) for line in self.log())), (
            f"no line with {patterns} in:\n" + "\n".join(self.log())
        )
        return next(line for line in self.log() if _has(line, patterns))

    def may_log(self, *patterns: str) -> None:
        """A line with all the patterns in it is no surprise, and need not be there."""
        self._expected.append(patterns)

    def end(self) -> None:
        """Wait until the daemon has ended."""
        assert eventually(lambda: has_ended(self.pid)), f"the daemon {self.pid} did not end"
        self.pid = 0

    def down(self) -> None:
        """Take the mount down as users do."""
        done = hydrafs("umount", self.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
        self.end()

    def down_dead(self) -> None:
        """Take a mount down whose daemon is dead."""
        done = hydrafs("umount", self.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
        assert not is_mounted(self.path)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def finish(self) -> None:
        """Take down what is left, whatever is open, and look through the log."""
        while is_mounted(self.path):
            unmount(self.path, lazy=True)
        if self.pid and not eventually(lambda: has_ended(self.pid)):
            os.kill(self.pid, signal.SIGKILL)
            pytest.fail(f"the daemon {self.pid} did not end")
        surprises = [line for line in self.log() if not any(_has(line, patterns) for patterns in self._expected)]
        assert not surprises, "the daemon logged:\n" + "\n".join(surprises)


def sha256_of(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def put(source: Path, target: Path, *, mtime_ns: int | None = None) -> None:
    """Give the name ``target`` to a copy of ``source``, as a download does: whole, by a rename."""
    aside = target.with_name(f".hydrafs-{target.name}")
    shutil.copyfile(source, aside)
    if mtime_ns is not None:
        os.utime(aside, ns=(mtime_ns, mtime_ns))
    aside.rename(target)
