"""How many links of a file are hydrafs' own: those that hold it, or keep it for others or in the trash."""

from __future__ import annotations

import os
import stat as stat_module
import time

from hydrafs.store import Store
from hydrafs.walk import Trouble, list_folder

__all__ = ["KeptLinks"]

_SETTLED_NS = 100_000_000


class KeptLinks:
    """How many links of a file are hydrafs' own: a listing leaves them out. Thread safety: any number of threads."""

    def __init__(self, store: Store) -> None:
        self._folders = (store.held, store.retired, store.trash)
        self._known: tuple[tuple[int, ...], dict[tuple[int, int], int]] = ((), {})

    def count(self, stat: os.stat_result) -> int:
        """How many of the links that ``stat`` counts are under ``held``, ``retired`` and ``trash``; no scan while they
        rest."""
        if stat.st_nlink < 2 or not stat_module.S_ISREG(stat.st_mode):
            return 0
        before = self._times()
        known = self._known
        if known[0] != before:
            links, is_whole = self._scanned()
            # A table that was taken while they changed, or may have, is good for this answer only.
            if not is_whole or self._times() != before or time.time_ns() - max(before) < _SETTLED_NS:
                return links.get((stat.st_dev, stat.st_ino), 0)
            known = self._known = (before, links)
        return known[1].get((stat.st_dev, stat.st_ino), 0)

    def _times(self) -> tuple[int, ...]:
        times = []
        for folder in self._folders:
            try:
                times.append(os.stat(folder).st_mtime_ns)
            except OSError:
                times.append(0)
        return tuple(times)

    def _scanned(self) -> tuple[dict[tuple[int, int], int], bool]:
        links: dict[tuple[int, int], int] = {}
        troubles: list[Trouble] = []
        is_whole = True
        for folder in self._folders:
            for entry in list_folder(folder, report=troubles.append).files:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except OSError:  # it went meanwhile, or cannot be looked at: the others count
                    is_whole = False
                    continue
                links[stat.st_dev, stat.st_ino] = links.get((stat.st_dev, stat.st_ino), 0) + 1
        return links, is_whole and not troubles
