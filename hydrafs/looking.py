"""When a store changes: inotify's word for it, which costs nothing while nothing happens."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydrafs.store import PRIVATE, is_private
from hydrafs.submounts import all_answer
from hydrafs.walk import walk

__all__ = ["watched"]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(root: Path, changed: Callable[[], None], *, private: frozenset[str] = frozenset()) -> Iterator[bool]:
    """Call ``changed``, on another thread, whenever a file of the store was closed after writing, came, went or was
    renamed.

    Args:
        root: the store's folder.
        private: names in ``.hydrafs`` that count as well; all else that hydrafs keeps for itself does not.

    Yields:
        Whether that can be had: the kernel may have no watches left, and the library may be missing.
    """
    observer: Any = None
    try:
        # Who watches asks every folder, and where every link leads.
        passed_over: list[str] = []
        if not all_answer() and any(passed_over for _ in walk(root, passed_over=passed_over.append)):
            raise OSError(f"{passed_over[0]} leads to a mount that may not answer")
        observer = _observer(root, changed, private)
    except ImportError:
        log.info("watchdog is not installed: the store is looked at every minute")
    except (OSError, RuntimeError) as error:
        log.warning("the store cannot be watched, it is looked at every minute: %s", error)
    try:
        yield observer is not None
    finally:
        if observer is not None:
            observer.stop()
            observer.join(2.0)


def _observer(root: Path, changed: Callable[[], None], private: frozenset[str]) -> Any:
    from watchdog import events  # noqa: PLC0415 - a worker only; the mount does without
    from watchdog.observers import Observer  # noqa: PLC0415

    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it takes its own end for an error
    # A covered store is reached through a link in /proc: what it leads to is watched, and not the link.
    folder = f"{root}/."

    def counts(path: str | bytes) -> bool:
        parts = os.path.relpath(os.fsdecode(path), folder).split("/")
        return not any(is_private(part) for part in parts) or (parts[0] == PRIVATE and parts[-1] in private)

    class Handler(events.FileSystemEventHandler):
        def on_any_event(self, event: events.FileSystemEvent) -> None:
            if counts(event.src_path) or (event.dest_path and counts(event.dest_path)):
                changed()

    observer = Observer()
    kinds = [events.FileClosedEvent, events.FileMovedEvent, events.FileDeletedEvent, events.DirMovedEvent,
             events.DirCreatedEvent, events.FileCreatedEvent]  # fmt: skip
    observer.schedule(Handler(), folder, recursive=True, event_filter=kinds)
    observer.start()
    return observer
