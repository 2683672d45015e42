"""``hydrafs log``: what a mount has said."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import click

from hydrafs.cli.common import ask_daemon, daemon_at, say
from hydrafs.cli.known_stores import log_of
from hydrafs.errors import NotFound
from hydrafs.mountpoints import resolve

_BLOCK_NBYTES = 64 << 10
_FOLLOW_SECONDS = 0.2
_MAX_LINE_NBYTES = 1 << 20


@click.command("log", short_help="What a mount has said.")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("--lines", "-n", type=click.IntRange(0), default=50, show_default=True, help="How many, the last ones.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is said from now on, until Ctrl-C.")
def command(mountpoint: str, lines: int, follow: bool) -> None:
    """Print what the daemon of MOUNTPOINT and its worker have said: also where the mount covers the folder that the log
    is in, where the daemon does not answer, and where it is dead. Of one that logs to a terminal or a journal, its last
    warnings and errors."""
    point = resolve(Path(mountpoint).expanduser())
    fd = _open_log(point)
    if fd is None:
        answer = ask_daemon(point, "status")
        for at, text in answer["errors"][-lines or len(answer["errors"]) :]:
            say(f"{time.strftime('%F %T', time.localtime(at))} {text}")
        say(f"process {answer['pid']} logs to where it was started, a terminal or a journal: the rest is there")
        return
    try:
        for line in _last_lines(fd, lines):
            say(line)
        while follow:
            for line in _new_lines(fd):
                say(line)
            time.sleep(_FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return
    finally:
        os.close(fd)


def _open_log(point: Path) -> int | None:
    """The log, open and at its beginning; ``None`` where the daemon lives and has none that is a file.

    A daemon's is what its stderr is: reached by the descriptor, it is found below a mount that covers it, and without
    the daemon's help. Of a dead one, what was noted when it was mounted is taken.

    Raises:
        NotFound: there is no daemon, and no log of an earlier one.
    """
    pid = daemon_at(point)
    if pid:
        try:
            fd = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None  # another user's, a socket, or a terminal that is gone
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None
    path = log_of(point)
    if path is not None:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = f"{path}: {error.strerror}"
    else:
        reason = "nothing is mounted there, and nothing was by this user"
    raise NotFound("no log", where=point, detail=reason, remedy="hydrafs status lists the mounts there are")


def _last_lines(fd: int, count: int) -> list[str]:
    """The last ``count`` lines; the file is read from its end, and stands there then."""
    end = position = os.lseek(fd, 0, os.SEEK_END)
    data = b""
    while position > 0 and data.count(b"\n") <= count and len(data) < max(_BLOCK_NBYTES, count * _MAX_LINE_NBYTES):
        nbytes = min(_BLOCK_NBYTES, position)
        position -= nbytes
        data = os.pread(fd, nbytes, position) + data
    whole = data.rfind(b"\n") + 1
    os.lseek(fd, end - (len(data) - whole), os.SEEK_SET)  # a line that is being written is for later
    return [line.decode(errors="replace") for line in data[:whole].splitlines()[-count:]] if count else []


def _new_lines(fd: int) -> Iterator[str]:
    """Whole lines that were written since; a file that was made shorter is read from its beginning."""
    if os.fstat(fd).st_size < os.lseek(fd, 0, os.SEEK_CUR):
        os.lseek(fd, 0, os.SEEK_SET)
    data = b""
    while block := os.read(fd, _BLOCK_NBYTES):
        data += block
    whole = data.rfind(b"\n") + 1
    os.lseek(fd, whole - len(data), os.SEEK_CUR)
    for line in data[:whole].splitlines():
        yield line.decode(errors="replace")
