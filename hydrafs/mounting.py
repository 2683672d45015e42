"""From a tree to a mount that answers: options, checks, the daemon, signals, and the way down.

Rule 1: ``mount`` returns when the mount answers, or raises with the reason; a failed mount leaves nothing behind.
Rule 2: forks happen before the tree exists; whatever a tree starts, it starts in the process that serves.
Rule 3: the daemon never touches its own mount, save for one stat on a thread that nothing waits for.
Rule 4: SIGTERM, SIGINT and SIGHUP unmount, whatever is open, and are a success.

Nothing here prints or reads the environment.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydrafs import child
from hydrafs.daemon import Watch, await_mount, serve_here, serve_told
from hydrafs.errors import Denied, MountFailed, from_oserror
from hydrafs.fuse import Binding, Tree, load_binding
from hydrafs.mountoptions import MountOptions, parse_options
from hydrafs.mountpoints import (
    SUBTYPE,
    MountInfo,
    check_mountpoint,
    check_store_paths,
    clear_stale,
    our_mounts,
    resolve,
    unmount,
)

__all__ = ["MountInfo", "MountOptions", "mount", "mount_in_background", "our_mounts", "parse_options", "preflight",
           "unmount"]  # fmt: skip

log = logging.getLogger("hydrafs.mounting")

_DEVICE = "/dev/fuse"
_NO_OPTIONS = MountOptions()


def preflight(
    mountpoint: str | os.PathLike[str],
    *,
    store_paths: Sequence[str | os.PathLike[str]],
    options: MountOptions,
    binding: str | None = None,
    over_store: bool = False,
) -> tuple[Path, Binding]:
    """Everything that can be known to be wrong before a mount; a stale mount of ours is taken down on the way.

    Returns:
        The mountpoint, resolved, and the binding, loaded.

    Raises:
        UsageError, NotFound, MountFailed, Denied: each says what to do.
    """
    path = resolve(mountpoint)
    check_store_paths(path, store_paths, over_store=over_store)
    clear_stale(path)
    check_mountpoint(path, nonempty=options.nonempty or over_store)
    loaded = load_binding(binding)
    _check_device()
    helper = "fusermount3" if loaded.major >= 3 else "fusermount"
    if os.geteuid() != 0 and shutil.which(helper) is None:
        raise MountFailed(f"{helper} is not installed", remedy="install the fuse3 package, or mount as root")
    return path, loaded


def _check_device() -> None:
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "modprobe fuse; in a container, give it --device /dev/fuse and --cap-add SYS_ADMIN"
        raise MountFailed("this system has no FUSE", where=_DEVICE, detail="no such file", remedy=remedy) from None
    except PermissionError as error:
        remedy = "mount as root, or let your user open it (chmod 666 /dev/fuse is the default elsewhere)"
        raise Denied("FUSE may not be used", where=_DEVICE, detail=error.strerror or "", remedy=remedy) from None
    except OSError as error:
        raise MountFailed(
            "FUSE does not work here", where=_DEVICE, detail=error.strerror or "", remedy="modprobe fuse"
        ) from None


def mount(
    tree_factory: Callable[[], Tree],
    mountpoint: str | os.PathLike[str],
    *,
    store_paths: Sequence[str | os.PathLike[str]],
    options: MountOptions = _NO_OPTIONS,
    foreground: bool = False,
    binding: str | None = None,
    log_path: str | os.PathLike[str] | None = None,
    over_store: bool = False,
    on_ready: Callable[[MountInfo], None] | None = None,
    timeout_seconds: float = 30.0,
) -> int:
    """Mount what ``tree_factory`` makes, in a daemon or, with ``foreground``, in this process until it is unmounted.

    Args:
        tree_factory: called once, in the process that serves. Paths that its tree keeps must be absolute: the process
            that serves works in ``/``.
        mountpoint: an empty directory.
        store_paths: everything that the tree opens by name; the first one gives the mount its source name.
        options: see ``parse_options``.
        foreground: serve here; needs the main thread. stdout and stderr stay as they are.
        binding: ``mfusepy``, ``fusepy``, or None for the first that works.
        log_path: where the daemon's stdout and stderr go; nowhere by default.
        over_store: the tree reaches its files through descriptors from before the mount, so ``mountpoint`` may be the
            store itself.
        on_ready: called when the mount answers: in a daemon's parent before ``mount`` returns, in the foreground on a
            thread.
        timeout_seconds: how long to wait for the tree to be made, and then for the mount to answer.

    Returns:
        The daemon's process id; this process's own after a foreground mount has ended.

    Raises:
        HydraError: what ``preflight`` says, what ``tree_factory`` raised, or the reason that libfuse gave.
    """
    path, loaded = preflight(
        mountpoint, store_paths=store_paths, options=options, binding=binding, over_store=over_store
    )
    arguments = _arguments(options, store_paths)
    if foreground:
        watch = Watch(path, timeout_seconds, on_ready)
        serve_here(tree_factory, path, arguments, loaded, watch.start)
        if watch.failure is not None:
            raise watch.failure
        return os.getpid()
    try:
        output = os.open(log_path or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise from_oserror(error, "cannot write the log", log_path or os.devnull) from error
        log.warning("there is no room for the log %s: nothing is logged", log_path)
        output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    receive, send = os.pipe()
    try:
        child = _fork()
        if child == 0:
            os.close(receive)
            _daemon(lambda: serve_told(tree_factory, path, arguments, loaded, send), output)
    finally:
        os.close(output)
        os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as messages:
        pid, found = await_mount(messages.fileno(), path, timeout_seconds)
    if on_ready is not None:
        on_ready(found)
    return pid


def _arguments(options: MountOptions, store_paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    name = re.sub(r"[^\w.+@=-]", "_", resolve(store_paths[0]).name) if store_paths else ""
    # ComfyUI takes a mount whose source looks like a device for a fast disk, and reads weights again at every step.
    return [f"fsname={options.fsname or f'{SUBTYPE}:{name}'}", f"subtype={SUBTYPE}", *options.arguments()]


def _fork() -> int:
    with warnings.catch_warnings():
        # numpy's BLAS has threads from its import on, and has handlers for fork; nothing else runs yet (rule 2).
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _daemon(serve: Callable[[], None], output: int) -> NoReturn:
    """What the forked child does; never returns into the parent's code."""
    status = 1
    try:
        if _fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(number, target)
        serve()
        status = 0
    except BaseException:  # told by serve_told
        pass
    finally:
        with contextlib.suppress(BaseException):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def mount_in_background(
    factory: str,
    arguments: Mapping[str, Any],
    mountpoint: str | os.PathLike[str],
    *,
    store_paths: Sequence[str | os.PathLike[str]],
    options: MountOptions = _NO_OPTIONS,
    binding: str | None = None,
    over_store: bool = False,
    timeout_seconds: float = 30.0,
) -> Iterator[Path]:
    """Mount for as long as the ``with`` block lasts, for programs: the daemon is a fresh child process, not a fork.

    A program that has torch loaded has threads, and a fork of it could hang in a lock that one of them held. The mount
    goes when the block ends and also when this process dies.

    Args:
        factory: ``module:function``, called in the child with ``arguments``; gives the tree.
        arguments: keyword arguments, of what JSON can say.
        mountpoint, store_paths, options, binding, over_store, timeout_seconds: as for ``mount``.

    Yields:
        The mountpoint, resolved.

    Raises:
        HydraError: as ``mount``.
    """
    path, loaded = preflight(
        mountpoint, store_paths=store_paths, options=options, binding=binding, over_store=over_store
    )
    order = {
        "factory": factory,
        "arguments": dict(arguments),
        "mountpoint": os.fspath(path),
        "options": _arguments(options, store_paths),
        "binding": loaded.name,
    }
    process = child.start("hydrafs.daemon:serve_order", order, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await_mount(process.stdout.fileno(), path, timeout_seconds)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            log.error("%s: the daemon does not end, killing it", path)
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()
        clear_stale(path)
