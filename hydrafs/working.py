"""What the worker of a store is doing, told by files in ``.hydrafs`` to whoever asks; and how it is told to pause.

Rule 1: the worker may be another user's process, or another machine's view of it gone: what it said counts only while
        it holds its lock.
Rule 2: telling never fails the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hydrafs.errors import HydraError, NoLocks, from_oserror, has_no_locks
from hydrafs.store import Store
from hydrafs.temporary import TEMPORARY

__all__ = ["PAUSED", "STATES", "Work", "alone", "is_paused", "pause", "tell", "told"]

STATES = ("none", "off", "idle", "working", "waiting", "paused")
"""No worker; it wants no models; nothing to do; at a model; at a model, and somebody reads; told to pause."""
PAUSED = "worker.paused"
_LOCK = "worker.lock"
_TOLD = "worker.json"


class Work(msgspec.Struct, frozen=True):
    """What the worker is doing, and has done since it started. Bytes, and seconds since the epoch.

    ``waits_until`` is when the next model will have rested long enough, 0 where none does. ``troubled``: how many
    files could not be looked at or tried to the end; ``troubles`` names some of them, and ``whole`` some that are left
    whole on purpose, each with the reason. ``hindered``: why nothing is dehydrated at all, for now.
    """

    state: str = "none"
    pid: int = 0
    model: str = ""
    stage: str = ""
    done_nbytes: int = 0
    total_nbytes: int = 0
    since: float = 0.0
    waits_until: float = 0.0
    models: int = 0
    saved_nbytes: int = 0
    left_whole: int = 0
    last_error: str = ""
    troubled: int = 0
    troubles: tuple[tuple[str, str], ...] = ()
    whole: tuple[tuple[str, str], ...] = ()
    hindered: str = ""


def tell(store: Store, work: Work) -> None:
    """Say what is done now; whoever asks while it is written gets what was said before."""
    temporary = store.private / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        store.check_root()
        temporary.write_bytes(msgspec.json.encode(work))
        os.replace(temporary, store.private / _TOLD)
    except (HydraError, OSError, ValueError, msgspec.MsgspecError):  # also of a full disk, where the name would stay
        with contextlib.suppress(OSError):
            temporary.unlink()


def told(store: Store) -> Work:
    """What the worker of the store said last; that there is none where it does not hold its lock."""
    try:
        fd = os.open(store.private / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Work()
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return Work()
    except OSError:
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return msgspec.json.decode((store.private / _TOLD).read_bytes(), type=Work)
        return Work("idle")
    finally:
        os.close(fd)


@contextlib.contextmanager
def alone(store: Store) -> Iterator[bool]:
    """Be the worker of the store, if there is no other.

    Raises:
        NoLocks: the filesystem has none.
        HydraError: the lock file cannot be made.
    """
    path = store.private / _LOCK
    store.check_root()
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise from_oserror(error, "cannot lock the store", path) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except BlockingIOError:
            is_alone = False
        except OSError as error:
            kind = NoLocks("cannot lock the store", where=path, detail=error.strerror or "")
            raise kind if has_no_locks(error) else from_oserror(error, "cannot lock the store", path) from error
        yield is_alone  # once, whatever the body raises
    finally:
        os.close(fd)


def is_paused(store: Store) -> bool:
    """Whether the worker is to do nothing for now."""
    return os.path.lexists(_paused(store))


def pause(store: Store, on: bool) -> None:
    """Let the worker do nothing from now on, or go on; it holds until the worker is started anew.

    Raises:
        OSError: the store cannot be written.
    """
    if on:
        _paused(store).write_text(f"{time.time():.0f}\n")
    else:
        _paused(store).unlink(missing_ok=True)


def _paused(store: Store) -> Path:
    return store.private / PAUSED
