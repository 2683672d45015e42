"""How a line of the log looks, where it goes, and how often the same one is written."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TextIO

from hydrafs.covered import shown
from hydrafs.errors import printable

__all__ = ["Style", "log_to"]

_SILENCE_SECONDS = 60.0
_REMEMBERED_LINES = 1000


@dataclass(frozen=True, slots=True)
class Style:
    """What is logged, and how.

    Args:
        level: as ``logging`` has it.
        with_time: whether a line of text says when; one of JSON does always.
        as_json: one object per line, with ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, ``exception``.
        seldom: whether the same line is written once a minute only.
    """

    level: int = logging.WARNING
    with_time: bool = False
    as_json: bool = False
    seldom: bool = False


def log_to(stream: TextIO, style: Style, who: str = "hydrafs") -> None:
    """Let the lines of all rooms be written. Only the first call in a process does anything.

    Args:
        stream: an open text file.
        style: what is logged, and how.
        who: what begins a line of text.
    """
    handler = logging.StreamHandler(stream)
    stamp = "%(asctime)s " if style.with_time else ""
    handler.setFormatter(_JsonLines() if style.as_json else _Lines(f"{stamp}{who}: %(levelname)s: %(message)s"))
    if style.seldom:
        handler.addFilter(_Repeats())
    logging.basicConfig(level=style.level, handlers=[handler])


class _Lines(logging.Formatter):
    """A message is one line, whatever is in the names of files; those of a store that is mounted over itself are called
    as people know them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging has for it
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _JsonLines(logging.Formatter):
    """A log record as one line of JSON: what a journal or a collector takes apart."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        return shown(json.dumps(facts))


class _Repeats(logging.Filter):
    """Lets a line through once a minute: a WebUI that lists a broken model asks for it at every listing."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is to be written."""
        line, now = record.getMessage(), time.monotonic()
        if now - self._last.get(line, -_SILENCE_SECONDS) < _SILENCE_SECONDS:
            return False
        if len(self._last) >= _REMEMBERED_LINES:
            self._last.clear()
        self._last[line] = now
        return True
