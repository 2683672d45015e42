"""The control socket: one line of JSON asks, one answers.

Rule 1: a request is small, an answer takes no lock that a read of the mount waits for, and a client that says nothing
        is dropped after a few seconds.
Rule 2: the socket is its owner's (mode 0600), in a folder that nobody else can write; who may connect may control.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hydrafs.errors import Denied, HydraError, MountFailed, NotFound, UsageError
from hydrafs.mountpoints import how_to_end, our_mounts

log = logging.getLogger(__name__)

MAX_REQUEST_NBYTES = 64 << 10
MAX_ANSWER_NBYTES = 16 << 20
_CLIENT_SECONDS = 5.0
_SEND_SECONDS = 60.0
ANSWER_SECONDS = 3.0
"""How long a command waits for a daemon: nothing that can be asked takes longer."""

Action = Callable[[dict[str, Any]], Any]
"""Takes a request, gives what can be written as JSON."""


def socket_name(mountpoint: Path) -> str:
    """The name of the socket of the mount at ``mountpoint`` (resolved)."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"


def runtime_folders(user: int, named: str = "") -> list[Path]:
    """Where the sockets of a user's daemons may be, the preferred place first; ``named`` is ``XDG_RUNTIME_DIR``."""
    if user == 0:
        return [Path("/run/hydrafs")]
    return [
        *([Path(named) / "hydrafs"] if named else []),
        Path(f"/run/user/{user}/hydrafs"),
        Path(f"/tmp/hydrafs-{user}"),
    ]


class Server:
    """Answers on a socket while the daemon lives. Thread safety: ``start`` and ``close`` from one thread.

    Args:
        folders: where the socket may be; the first that can be made and is ours is taken.
        mountpoint: whose daemon this is.
        actions: what can be asked, by name.
    """

    def __init__(self, folders: Sequence[Path], mountpoint: Path, actions: dict[str, Action]) -> None:
        self._folders = folders
        self._mountpoint = mountpoint
        self._actions = actions
        self._socket: socket.socket | None = None
        self.path: Path | None = None

    def start(self) -> None:
        """Listen; where no folder can be used, the daemon does without, and the log says so."""
        for folder in self._folders:
            path = folder / socket_name(self._mountpoint)
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = os.lstat(folder)
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()  # of a daemon that died: the mountpoint is ours now
                listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                listening.bind(os.fspath(path))
                os.chmod(path, 0o600)
                listening.listen(128)
            except OSError as error:
                log.debug("no control socket in %s: %s", folder, error)
                continue
            self._socket, self.path = listening, path
            threading.Thread(target=self._run, args=(listening,), name="hydrafs-control", daemon=True).start()
            return
        log.warning("no control socket: none of %s can be used", ", ".join(map(str, self._folders)))

    def _run(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), name="hydrafs-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                client.settimeout(_CLIENT_SECONDS)
                line = _line(client, MAX_REQUEST_NBYTES)
                client.settimeout(_SEND_SECONDS)
                client.sendall(_encoded(self._answer(line)))
            except OSError as error:
                log.debug("a client of the control socket went away: %s", error)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            action = self._actions.get(str(request.get("do")))
            if action is None:
                return {"error": f"no such request, {request.get('do')}; known are {', '.join(self._actions)}"}
            return {"ok": action(request)}
        except msgspec.DecodeError as error:
            return {"error": f"not a request: {error}"}
        except HydraError as error:
            return {"error": str(error)}
        except Exception as error:
            log.exception("the control socket failed")
            return {"error": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._socket is not None:
            # Only a shutdown wakes a thread that waits in accept.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.path = None


def _encoded(message: dict[str, Any]) -> bytes:
    """One line of JSON; names of files may hold bytes that are no UTF-8, which only escapes carry."""
    return json.dumps(message).encode() + b"\n"


def _line(connection: socket.socket, limit: int, deadline: float = float("inf")) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        if deadline != float("inf"):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        block = connection.recv(64 << 10)
        if not block:
            break
        data += block
        if len(data) > limit:
            raise OSError("too much at once")
    return data


def _connected(path: Path, seconds: float) -> tuple[socket.socket, int]:
    """A connection to the socket at ``path``, and the process that listens there.

    Raises:
        OSError: nobody listens, or it is another user's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(seconds)
        connection.connect(os.fspath(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return connection, struct.unpack("3i", credentials)[0]
    except BaseException:
        connection.close()
        raise


def daemon_of(folders: Sequence[Path], mountpoint: Path) -> int:
    """The process that serves the mount at ``mountpoint`` (resolved), whether it answers or not; 0 where nobody can
    tell."""
    for folder in folders:
        with contextlib.suppress(OSError):
            connection, pid = _connected(folder / socket_name(mountpoint), ANSWER_SECONDS)
            connection.close()
            return pid
    return 0


def does_not_answer(mountpoint: Path, pid: int, detail: str = "") -> MountFailed:
    """The error that says of a daemon that it does not answer, in what state it is, and what to do."""
    state = ""
    with contextlib.suppress(OSError, IndexError):
        # "pid (name) state ..."
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else ""
    who = f"process {pid}" if pid else "its process"
    remedies = [f"kill -CONT {pid} lets it go on"] if state in ("T", "t") else []
    mount = next((mount for mount in our_mounts() if mount.mountpoint == mountpoint), None)
    remedies.append(how_to_end(mount) if mount is not None else f"hydrafs umount --lazy {mountpoint} takes it down")
    return MountFailed(
        "the daemon does not answer",
        where=mountpoint,
        detail=f"{who} {_STATES.get(state, '') or detail or 'says nothing'}",
        remedy="; ".join(remedies),
    )


_STATES = {
    "T": "is stopped", "t": "is being debugged", "D": "waits for a disk or a server that does not answer",
    "Z": "has ended", "X": "has ended",
}  # fmt: skip


def ask(folders: Sequence[Path], mountpoint: Path, do: str, **request: Any) -> Any:
    """Ask the daemon of the mount at ``mountpoint`` (resolved); its answer, within ``ANSWER_SECONDS``.

    Raises:
        NotFound: no daemon listens for it.
        Denied: the socket is another user's.
        MountFailed: it does not answer; the message names its process.
        UsageError: it refused, and why.
    """
    denied: Path | None = None
    deadline = time.monotonic() + ANSWER_SECONDS
    for folder in folders:
        path, pid = folder / socket_name(mountpoint), 0
        try:
            connection, pid = _connected(path, ANSWER_SECONDS)
            with connection:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.sendall(_encoded({"do": do, **request}))
                answer = dict(json.loads(_line(connection, MAX_ANSWER_NBYTES, deadline)))
        except PermissionError:
            denied = path
            continue
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            continue
        except TimeoutError:
            raise does_not_answer(mountpoint, pid, f"says nothing for {ANSWER_SECONDS:g} s") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise does_not_answer(mountpoint, pid, f"said nothing that can be understood: {error}") from None
        if "error" in answer:
            raise UsageError("the daemon refused", where=mountpoint, detail=str(answer["error"]))
        return answer.get("ok")
    if denied is not None:
        raise Denied("the daemon is another user's", where=mountpoint, remedy="ask as that user, or as root")
    raise NotFound("no daemon of hydrafs answers here", where=mountpoint, remedy="hydrafs mount makes one")
