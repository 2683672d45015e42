"""What the kernel keeps of a mount's names, and how two contents of one name are kept apart in it.

The kernel believes the attributes of a name for a second, and keeps a file's pages for as long as each open says that
they are still good. A path-based libfuse cannot tell it that either has become wrong. What is left is to say at an open
that the pages go, to refuse the open, or to send it back: at ESTALE the kernel asks for the attributes anew and opens
once more (``do_filp_open`` in ``fs/namei.c``, ``LOOKUP_REVAL`` in ``fs/fuse/dir.c``).

Rule 1: an open is served only if the size that the kernel believes is the size of what is opened.
Rule 2: while a content is open under a name, no other one is opened under it.
Rule 3: pages are kept from one open to the next only if nothing but this content was read into them.
Rule 4: what changes through the mount, the kernel knows: names move here as they move there (``move``, ``forget``), and
        the size of a file that is open for writing is the kernel's own.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache

from hydrafs.attributes import Attributes

_NAMES = 200_000
_RELEASE_SECONDS = 0.25
"""How long an open waits for another content to be closed: close(2) returns before the filesystem is told of it."""
_JUST_TOLD_SECONDS = 0.1
"""A plain file whose size is another one so soon after the kernel asked is growing: it would be sent back for ever."""


@dataclass(frozen=True, slots=True)
class Version:
    """A name as it stands at one time: the file of the store behind it, and the size that it is listed with."""

    device: int
    inode: int
    is_diff: bool
    size: int

    def same_file(self, other: Version) -> bool:
        """Whether both are one file of the store, whatever is in it."""
        return (self.device, self.inode, self.is_diff) == (other.device, other.inode, other.is_diff)


@dataclass(eq=False, slots=True)
class Claim:
    """What an open file, ``holder``, holds of a name. ``identify`` tells what its content is, and may know it better
    later on; ``keep_cache``: the kernel's pages are this very content."""

    path: str
    version: Version
    identify: Callable[[], Hashable]
    attributes: Callable[[], Attributes]
    content: Hashable = None
    keep_cache: bool = False
    used: bool = False
    holder: Any = None
    writes: bool = False


@dataclass(slots=True)
class _Pages:
    """The content that was last opened under a name; ``alone``: the kernel has no pages of any other."""

    content: Hashable
    alone: bool = False


@dataclass(slots=True)
class Names:
    """What the kernel knows of each name. Thread safety: any number of threads."""

    _changed: threading.Condition = field(default_factory=threading.Condition)
    _told: LRUCache[str, tuple[Version, float]] = field(default_factory=lambda: LRUCache(_NAMES))
    _pages: LRUCache[str, _Pages] = field(default_factory=lambda: LRUCache(_NAMES))
    _sent_back: LRUCache[str, Version] = field(default_factory=lambda: LRUCache(_NAMES))
    """As what each name was last opened in vain: the kernel has asked for its attributes since."""
    _open: dict[str, list[Claim]] = field(default_factory=dict)

    def told(self, path: str, version: Version) -> None:
        """The kernel is being told of ``path`` as it is in ``version``."""
        with self._changed:
            self._told[path] = version, time.monotonic()

    def open_as(self, path: str) -> Claim | None:
        """A claim on ``path``, if it is open."""
        with self._changed:
            claims = self._open.get(path)
            return claims[0] if claims else None

    def claims(self, path: str) -> list[Claim]:
        """All claims on ``path``."""
        with self._changed:
            return list(self._open.get(path, ()))

    def move(self, old: str, new: str, *, folder: bool = False) -> None:
        """``old``, a file or a ``folder`` with all that is in it, has taken the name ``new`` and the kernel knows."""
        with self._changed:
            self._forget(new)
            self._move(old, new, folder)

    def exchange(self, one: str, other: str) -> None:
        """The two names have changed places."""
        with self._changed:
            aside = "\0"  # no path begins so
            self._move(one, aside, True)
            self._move(other, one, True)
            self._move(aside, other, True)

    def forget(self, path: str) -> None:
        """``path`` is gone; whoever has it open keeps it. A file that takes the name has nothing in the kernel yet."""
        with self._changed:
            self._forget(path)

    def _forget(self, path: str) -> None:
        for table in (self._told, self._pages, self._sent_back):
            table.pop(path, None)
        # A claim without a name is in nobody's way.
        self._open.pop(path, None)

    def _move(self, old: str, new: str, folder: bool) -> None:
        prefix = old + "/"
        tables: tuple[Any, ...] = (self._told, self._pages, self._sent_back, self._open)
        for table in tables:
            inside = [key for key in table if key.startswith(prefix)] if folder else []
            for key in (old, *inside):
                if key in table:
                    table[new + key[len(old) :]] = table.pop(key)
        for path in self._open:
            if path == new or path.startswith(new + "/"):
                for claim in self._open[path]:
                    claim.path = path

    def claim(
        self,
        path: str,
        version: Version,
        identify: Callable[[], Hashable],
        attributes: Callable[[], Attributes],
        *,
        writes: bool = False,
        holder: Any = None,
    ) -> Claim:
        """Open ``path`` as ``version``, with the bytes that ``identify`` names; give it back with ``release``.

        Raises:
            OSError: EBUSY where another content is open under the name; ESTALE where the kernel must look again.
        """
        claim = Claim(path, version, identify, attributes, identify(), writes=writes, holder=holder)
        with self._changed:
            others = [old for old in self._open.get(path, ()) if old.content != claim.content]
        for old in others:
            # A plain file that was dehydrated since has a SHA-256 now, and it may be the very one that is opened.
            old.content = old.identify()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_in_the_way(claim), _RELEASE_SECONDS):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
            if self._is_stale(path, version):
                self._sent_back[path] = version
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            pages = self._pages.get(path)
            if pages is None or pages.content != claim.content:
                pages = self._pages[path] = _Pages(claim.content)
            claim.keep_cache = pages.alone
            if any(old.writes and old.version.same_file(version) for old in self._open.get(path, ())):
                # The pages have what is being written, maybe before the daemon has: were they to go now, the kernel
                # could read what was there before, and keep that. What they are is not known from this open.
                claim.keep_cache = claim.used = True
            self._open.setdefault(path, []).append(claim)
        return claim

    def _is_stale(self, path: str, version: Version) -> bool:
        told = self._told.get(path)
        if told is None or told[0] == version:
            return False
        if any(claim.writes and claim.version.same_file(version) for claim in self._open.get(path, ())):
            return False
        # While a name is open the kernel is told of what it was opened as, also where the same content has moved.
        if path in self._open and told[0].size == version.size:
            return False
        # Who lists it meanwhile may have looked before it changed, and told that after. The kernel does not look a
        # third time, and where the size is right it does no harm to open it.
        if self._sent_back.get(path) == version and told[0].size == version.size:
            return False
        growing = not version.is_diff and told[0].same_file(version)
        return not growing or time.monotonic() - told[1] > _JUST_TOLD_SECONDS

    def _is_in_the_way(self, new: Claim) -> bool:
        # A plain file that is written in place stays readable throughout, as on any filesystem. A diff does not.
        return any(
            old.content != new.content and (new.version.is_diff or not old.version.same_file(new.version))
            for old in self._open.get(new.path, ())
        )

    def rebase(
        self, claim: Claim, version: Version, identify: Callable[[], Hashable], *, writes: bool | None = None
    ) -> None:
        """An open file goes on as another one of the store, which has taken its place: it is the same to the kernel.
        ``writes``: whether it is written to from now on (default: as before)."""
        content = identify()
        with self._changed:
            claim.version, claim.identify, claim.content = version, identify, content
            if writes is not None:
                claim.writes = writes

    def used(self, claim: Claim) -> None:
        """The file was read from: the kernel has done what the open told it to do with the pages."""
        if claim.used:
            return
        claim.used = True
        with self._changed:
            pages = self._pages.get(claim.path)
            if pages is not None and pages.content == claim.content:
                pages.alone = True

    def release(self, claim: Claim) -> None:
        """The file is closed."""
        self.used(claim)
        with self._changed:
            claims = self._open.get(claim.path, [])
            if claim in claims:
                claims.remove(claim)
            if not claims:
                self._open.pop(claim.path, None)
            self._changed.notify_all()
