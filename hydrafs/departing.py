"""Files that lose their name while they are open: what libfuse does about it, and what is made of that.

libfuse's path-based interface needs a name for every open file. Before it deletes one, or renames another over it, it
renames it to ``.fuse_hidden...`` beside it (``hide_node`` in ``lib/fuse.c``) and deletes that when the file is closed.
Such names exist here and nowhere else: the store sees the deletion, and the open file answers for the name.

Rule 1: no such name reaches the store or a listing, so none is left behind.
Rule 2: a file that is replaced is there until the other one is. libfuse hides the old one first; whether a rename
        follows on the same thread, or nothing because it was a deletion, is not known then. So the deletion waits until
        that thread does something else or waits for its next request, which is looked at every ``_SECONDS``, and
        whoever asks for the name meanwhile waits as well.
Rule 3: a look-up takes the attributes first and libfuse's number of the file after. Between a rename and the moment
        when libfuse knows of it these would be of two files, and readers of the old one would see the size of the new:
        for ``_TOLD_SECONDS`` after a rename, look-ups of the name wait.
Rule 4: who looked a name up before it was replaced and opens it after gets the file that it had, as on any filesystem:
        it is kept open until the replacement is done, which waits for the disk, and ``_OPENABLE_SECONDS`` more. At
        ESTALE the kernel looks once more, which may be too late again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cachetools import LRUCache

from hydrafs.handles import OpenFile

log = logging.getLogger("hydrafs.vfs")

_HIDDEN = re.compile(r"\.fuse_hidden[0-9a-f]{16}\Z")
_SECONDS = 0.02
_AT_MOST_SECONDS = 5.0
"""Who asks for the name waits for the deletion, and must not for ever."""
_TOLD_SECONDS = 0.005
_OPENABLE_SECONDS = 0.2
_REMEMBERED = 10_000


def is_hidden_name(path: str) -> bool:
    """Whether libfuse makes such names for files that are open and deleted."""
    return _HIDDEN.match(path.rpartition("/")[2]) is not None


def _waits_for_a_request(task: int) -> bool:
    """Whether a thread of this process reads from /dev/fuse, as far as proc(5) tells, or is no more. On a busy machine
    a thread that is about to rename may not get a processor, or the interpreter's lock, for longer than any wait."""
    try:
        call = Path(f"/proc/self/task/{task}/syscall").read_text().split()
    except OSError:
        return True
    try:
        # "running", or -1 outside of a call; else its number and its arguments, of which the first is what is read.
        return len(call) > 3 and os.readlink(f"/proc/self/fd/{int(call[1], 16)}") == "/dev/fuse"
    except (OSError, ValueError):
        return False


@dataclass(eq=False, slots=True)
class _Leaving:
    path: str
    thread: int
    task: int
    until: float
    delete: Callable[[], None]
    kept: OpenFile | None
    taken_by: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Departed:
    """The names that libfuse gave to open files, and the deletions that wait. Thread safety: any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, list[OpenFile]] = {}
        self._leaving: dict[str, _Leaving] = {}
        self._replaced: dict[str, tuple[int, float]] = {}
        self._kept: set[OpenFile] = set()
        self._used: LRUCache[str, bool] = LRUCache(_REMEMBERED)

    def hide(
        self,
        path: str,
        hidden: str,
        files: Sequence[OpenFile],
        delete: Callable[[], None],
        kept: OpenFile | None = None,
    ) -> None:
        """``path`` was renamed to ``hidden``: ``files`` answer for that, and ``delete`` is called when it is time.

        ``kept`` answers as well, and is closed a while after the deletion, or what came in its place.
        """
        until = time.monotonic() + _AT_MOST_SECONDS
        leaving = _Leaving(path, threading.get_ident(), threading.get_native_id(), until, delete, kept)
        with self._lock:
            self._files[hidden] = [*files, kept] if kept is not None else list(files)
            if kept is not None:
                self._kept.add(kept)
            self._used[hidden] = True
            self._leaving[path] = leaving
        for file in files:
            if file.closed:  # on another thread, before we had the name
                self.closed(file)
        self._look_later(leaving)

    def _look_later(self, leaving: _Leaving) -> None:
        timer = threading.Timer(_SECONDS, self._look, (leaving,))
        timer.daemon = True
        timer.start()

    def _look(self, leaving: _Leaving) -> None:
        if leaving.thread and time.monotonic() < leaving.until and not _waits_for_a_request(leaving.task):
            self._look_later(leaving)
        else:
            self._finish(leaving)

    def _done(self, leaving: _Leaving) -> None:
        with self._lock:
            if self._leaving.get(leaving.path) is leaving:
                del self._leaving[leaving.path]
        leaving.done.set()
        if leaving.kept is not None:
            timer = threading.Timer(_OPENABLE_SECONDS, self._let_go, (leaving.kept,))
            timer.daemon = True
            timer.start()

    def _let_go(self, file: OpenFile) -> None:
        with self._lock:
            kept = file in self._kept
            self._kept.discard(file)
        if kept:
            file.close()

    def join(self, hidden: str, file: OpenFile) -> None:
        """``file`` was opened under a name that libfuse made up, and answers for it too."""
        with self._lock:
            self._files.setdefault(hidden, []).append(file)

    def file(self, hidden: str) -> OpenFile | None:
        """An open file that answers for the name."""
        with self._lock:
            files = self._files.get(hidden)
            return files[0] if files else None

    def files(self, hidden: str) -> list[OpenFile]:
        """The open files that answer for the name."""
        with self._lock:
            return list(self._files.get(hidden, ()))

    def was(self, hidden: str) -> bool:
        """Whether libfuse ever gave the name to a file: the kernel may still ask for that, and has to look again."""
        with self._lock:
            return hidden in self._used

    def closed(self, file: OpenFile) -> None:
        """``file`` was closed; a name that nobody has open any more is gone."""
        with self._lock:
            for hidden, files in list(self._files.items()):
                if file in files:
                    files.remove(file)
                    if not files:
                        del self._files[hidden]

    def replaced(self, path: str) -> None:
        """``path`` has another file now. libfuse knows when the callback has returned, and answers others meanwhile."""
        now = time.monotonic()
        with self._lock:
            self._replaced[path] = threading.get_ident(), now + _TOLD_SECONDS
            if len(self._replaced) > _REMEMBERED:
                self._replaced = {p: known for p, known in self._replaced.items() if known[1] > now}

    def _await_told(self, path: str) -> None:
        with self._lock:
            thread, until = self._replaced[path]
        left = until - time.monotonic()
        if thread != threading.get_ident() and left > 0:
            time.sleep(left)
        with self._lock:
            if self._replaced.get(path) == (thread, until):
                del self._replaced[path]

    def settle(self, path: str) -> None:
        """To be called before anything is done with ``path``: deletions that concern it are done when it returns."""
        if path in self._replaced:
            with contextlib.suppress(KeyError):
                self._await_told(path)
        if not self._leaving:
            return
        thread = threading.get_ident()
        with self._lock:
            waiting = list(self._leaving.values())
        for leaving in waiting:
            if leaving.taken_by == thread:
                continue
            if leaving.thread == thread:
                self._finish(leaving)
            elif leaving.path == path or leaving.path.rpartition("/")[0] == path.rstrip("/"):
                leaving.done.wait()

    def take_over(self, path: str) -> Callable[[], None] | None:
        """If ``path`` is about to be deleted by this thread, it is to be replaced instead: nobody deletes it now.

        Returns:
            What is to be called when it was replaced, or was not.
        """
        if not self._leaving:
            return None
        with self._lock:
            leaving = self._leaving.get(path)
            if leaving is None or leaving.thread != threading.get_ident():
                return None
            leaving.thread, leaving.taken_by = 0, leaving.thread  # whoever else comes waits for the end of it

        return lambda: self._done(leaving)

    def _finish(self, leaving: _Leaving) -> None:
        with self._lock:
            if self._leaving.get(leaving.path) is not leaving or leaving.thread == 0:
                return
            leaving.thread, leaving.taken_by = 0, threading.get_ident()
        try:
            leaving.delete()
        except Exception as error:
            log.error("cannot delete %s: %s", leaving.path, error)
        finally:
            self._done(leaving)

    def end(self) -> None:
        """Delete at once what waits."""
        with self._lock:
            waiting = list(self._leaving.values())
        for leaving in waiting:
            self._finish(leaving)
            leaving.done.wait()
        with self._lock:
            kept = list(self._kept)
        for file in kept:
            self._let_go(file)
