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
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hydrafs.errors import Denied, HydraError, MountFailed, NotFound, UsageError

log = logging.getLogger(__name__)

MAX_REQUEST_NBYTES = 64 << 10
MAX_ANSWER_NBYTES = 16 << 20
_CLIENT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0

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
                client.settimeout(_ANSWER_SECONDS)
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


def _line(connection: socket.socket, limit: int) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        block = connection.recv(64 << 10)
        if not block:
            break
        data += block
        if len(data) > limit:
            raise OSError("too much at once")
    return data


def ask(folders: Sequence[Path], mountpoint: Path, do: str, **request: Any) -> Any:
    """Ask the daemon of the mount at ``mountpoint`` (resolved); its answer.

    Raises:
        NotFound: no daemon listens for it.
        Denied: the socket is another user's.
        UsageError: it refused, and why.
    """
    name = socket_name(mountpoint)
    denied: Path | None = None
    for folder in folders:
        path = folder / name
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with connection:
            try:
                connection.settimeout(_ANSWER_SECONDS)
                connection.connect(os.fspath(path))
                connection.sendall(_encoded({"do": do, **request}))
                answer = dict(json.loads(_line(connection, MAX_ANSWER_NBYTES)))
            except PermissionError:
                denied = path
                continue
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                continue
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise MountFailed(
                    "the daemon does not answer", where=mountpoint, detail=str(error), remedy="see its log"
                ) from None
        if "error" in answer:
            raise UsageError("the daemon refused", where=mountpoint, detail=str(answer["error"]))
        return answer.get("ok")
    if denied is not None:
        raise Denied("the daemon is another user's", where=mountpoint, remedy="ask as that user, or as root")
    raise NotFound("no daemon of hydrafs answers here", where=mountpoint, remedy="hydrafs mount makes one")
