"""The process that serves a mount, and how it tells the process that waits for it.

The one that serves writes lines of JSON: its process id, then that the kernel is connected, or what failed. The one
that waits reads them, then asks the mount itself; so it knows the reason of any failure, libfuse's own included.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrafs import apparmor, errors
from hydrafs.errors import Denied, HydraError, MountFailed, UsageError, from_oserror
from hydrafs.fuse import Binding, Tree, load_binding, serve
from hydrafs.limits import raise_open_files
from hydrafs.mountpoints import MountInfo, clear_stale, raise_readahead, wait_until_answers

__all__ = ["Watch", "await_mount", "serve_here", "serve_order", "serve_told"]

log = logging.getLogger("hydrafs.daemon")

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CONTAINER = "mount as root; in a container, give it --device /dev/fuse and --cap-add SYS_ADMIN"
_REMEDIES = (
    ("user_allow_other", MountFailed, "add the line user_allow_other to /etc/fuse.conf, or leave allow_other out"),
    ("mount_max", MountFailed, "raise mount_max in /etc/fuse.conf"),
    ("unknown option", UsageError, "leave the option out"),
    ("not permitted", Denied, _CONTAINER),
    ("ermission denied", Denied, _CONTAINER),
    ("write access to mountpoint", Denied, "choose a directory of your own"),
)


def serve_told(factory: Callable[[], Tree], path: Path, arguments: Sequence[str], binding: Binding, send: int) -> None:
    """Serve, and say on ``send``, a line of JSON each: who we are, and that the kernel is connected or what failed."""
    told = False

    def tell(**message: object) -> None:
        # The parent may have been killed; the mount is there all the same.
        with contextlib.suppress(OSError):
            os.write(send, json.dumps(message).encode() + b"\n")

    def started() -> None:
        nonlocal told
        # Not before: an automount lets only its own process group reach what it waits for.
        with contextlib.suppress(PermissionError):  # mount_in_background's child leads a session already
            os.setsid()
        tell(started=True)
        os.close(send)
        told = True

    tell(pid=os.getpid())
    try:
        serve_here(factory, path, arguments, binding, started)
    except BaseException as error:
        if not isinstance(error, HydraError):
            log.exception("the mount of %s failed", path)
        if not told:
            tell(**_as_message(error, path))
        raise


def _as_message(error: BaseException, path: Path) -> dict[str, object]:
    if isinstance(error, OSError):
        error = from_oserror(error, "the mount failed")
    if not isinstance(error, HydraError):
        reason = f"{type(error).__name__}: {error}"
        error = MountFailed("the mount failed", where=path, detail=reason, remedy="mount with --foreground to see more")
    fields = {"what": error.what, "where": error.where, "detail": error.detail, "remedy": error.remedy}
    return {"error": type(error).__name__, **fields}


def _from_message(message: Mapping[str, Any]) -> HydraError:
    kind: type[HydraError] = getattr(errors, message["error"], MountFailed)
    return kind(message["what"], where=message["where"], detail=message["detail"], remedy=message["remedy"])


def serve_here(
    factory: Callable[[], Tree], path: Path, arguments: Sequence[str], binding: Binding, on_init: Callable[[], None]
) -> None:
    """Make the tree and serve it until the mount is taken down."""
    raise_open_files()
    tree = factory()
    os.chdir("/")
    if threading.current_thread() is not threading.main_thread():
        raise MountFailed("a mount is served by the main thread", where=path, remedy="use mount_in_background")
    # libfuse sets its handlers for the ending signals only where nobody else has one.
    ending = [number for number in _ENDING_SIGNALS if number not in getattr(tree, "own_signals", ())]
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ending}
    captured = _CapturedStderr()
    started = False

    def connected() -> None:
        nonlocal started
        started = True
        captured.restore()
        on_init()

    try:
        code = serve(tree, os.fspath(path), arguments, binding, connected)
    finally:
        captured.restore()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not started:
        raise _libfuse_error(code, captured.text, path)
    log.info("%s is unmounted (libfuse: %d)", path, code)


def _libfuse_error(code: int, text: str, path: Path) -> HydraError:
    reason = "; ".join(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    reason = reason or f"libfuse gave no reason (code {code})"
    for pattern, kind, remedy in _REMEDIES:
        if pattern in reason:
            if kind is Denied and os.geteuid() != 0 and apparmor.is_confined() and not apparmor.is_allowed(path):
                reason += f"; AppArmor's profile {apparmor.PROFILE} does not let fusermount3 mount there"
                remedy = apparmor.REMEDY
            return kind("the mount failed", where=path, detail=reason, remedy=remedy)
    return MountFailed("the mount failed", where=path, detail=reason, remedy="hydrafs doctor tells what is missing")


class _CapturedStderr:
    """Collects what libfuse and fusermount say on file descriptor 2 until ``restore``: the only reason they give."""

    def __init__(self) -> None:
        self.text = ""
        self._lock = threading.Lock()
        sys.stderr.flush()
        self._memory = os.memfd_create("hydrafs-stderr")
        try:
            self._saved = os.dup(2)
        except OSError:
            self._saved = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(self._memory, 2)

    def restore(self) -> None:
        """Put file descriptor 2 back, and write to it what was collected. Only the first call does anything."""
        with self._lock:
            if self._memory < 0:
                return
            os.dup2(self._saved, 2)
            os.close(self._saved)
            collected = os.pread(self._memory, 64 << 10, 0)
            os.close(self._memory)
            self._memory = -1
            self.text = collected.decode(errors="replace")
            if collected:
                with contextlib.suppress(OSError):
                    os.write(2, collected)


class Watch:
    """Tells the foreground when its own mount answers, and ends the mount if it never does."""

    def __init__(self, path: Path, seconds: float, on_ready: Callable[[MountInfo], None] | None) -> None:
        self.failure: HydraError | None = None
        self._arguments = (path, seconds)
        self._on_ready = on_ready

    def start(self) -> None:
        """Begin to watch; returns at once."""
        # From libfuse's init, on a thread that has the ending signals blocked: they reach the one that waits for them.
        threading.Thread(target=self._run, name="hydrafs-watch", daemon=True).start()

    def _run(self) -> None:
        try:
            found = wait_until_answers(*self._arguments)
            raise_readahead(found)
            if self._on_ready is not None:
                self._on_ready(found)
        except HydraError as error:
            self.failure = error
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            log.exception("after the mount answered")


def await_mount(receive: int, path: Path, seconds: float) -> tuple[int, MountInfo]:
    """Follow a daemon's messages until its mount answers; what fails is taken down before it is raised."""
    pid = 0
    try:
        for message in _messages(receive, path, seconds):
            pid = message.get("pid", pid)
            if "error" in message:
                raise _from_message(message)
            if "started" in message:
                found = wait_until_answers(path, seconds)
                raise_readahead(found)
                return pid, found
        raise MountFailed(
            "the daemon died", where=path, detail="it gave no reason", remedy="mount with --foreground to see more"
        )
    except BaseException:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            _await_end(pid, 2.0)
        with contextlib.suppress(HydraError):
            clear_stale(path)
        raise


def _await_end(pid: int, seconds: float) -> None:
    """Wait for a process to end, whoever is its parent; one that does not end by itself is killed."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            # "pid (name) state": Z has ended, and only waits for its parent to ask.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)


def _messages(receive: int, path: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The lines of JSON that come from ``receive``, until it is closed; ``seconds`` is how long to wait for each."""
    buffered = b""
    ready = select.poll()  # select(2) takes no descriptor from 1024 on
    ready.register(receive, select.POLLIN)
    while True:
        if not ready.poll(seconds * 1000):
            raise MountFailed("the daemon does not answer", where=path, detail=f"for {seconds:g} s")
        got = os.read(receive, 1 << 16)
        if not got:
            return
        *lines, buffered = (buffered + got).split(b"\n")
        for line in lines:
            yield json.loads(line)


def serve_order(order: Mapping[str, Any]) -> None:
    """What the child of ``mount_in_background`` runs: serve what ``order`` says until told to end."""
    # The pipe stays ours alone: what a library prints goes to stderr.
    send = os.dup(1)
    os.dup2(2, 1)

    def end_with_the_parent() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_parent, name="hydrafs-parent", daemon=True).start()

    def make() -> Tree:
        module, _, function = order["factory"].partition(":")
        tree: Tree = getattr(importlib.import_module(module), function)(**order["arguments"])
        return tree

    status = 1
    with contextlib.suppress(BaseException):
        serve_told(make, Path(order["mountpoint"]), order["options"], load_binding(order["binding"]), send)
        status = 0
    logging.shutdown()
    # Not sys.exit: the thread above sits in a read of stdin, whose lock the interpreter's end would wait for.
    os._exit(status)
