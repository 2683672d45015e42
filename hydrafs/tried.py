"""Which models the worker has tried and left whole, and why, so that no start tries them again.

A model is tried again when it changes, or when the store has a model that was not there when it was tried: that may be
what it was made from.
Rule 1: that a model is tried is written down before it is: one in whose midst the worker dies, again and again, is left
        alone, and the others get their turn before it.
Rule 2: a name that is no text is written down as its bytes; nothing of one model keeps the others from being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Set

import msgspec

from hydrafs.catalog import signed64
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile

__all__ = ["MAX_DEATHS", "Tried"]

MAX_DEATHS = 3
"""How often the worker may die over a model before it leaves that alone."""
_FILE = "left-whole.json"
_Key = tuple[int, int, int, int]


class _Noted(msgspec.Struct):
    """Names of models by the digest of all of them; which file was tried in which company, by its name; which file is
    being tried, and how often nobody lived to see the end of it; why those that failed did."""

    companies: dict[str, list[str]] = {}
    models: dict[str, tuple[_Key, str]] = {}
    trying: dict[str, tuple[_Key, int]] = {}
    troubles: dict[str, str] = {}


class Tried:
    """The models of one store that were left whole. Thread safety: one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.private / _FILE
        self._noted = _Noted()
        self._changed = False
        self._known: dict[str, frozenset[str]] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
            self._noted = msgspec.json.decode(self._path.read_bytes(), type=_Noted)

    def __len__(self) -> int:
        return len(self._noted.models)

    def is_settled(self, name: str, identity: FileIdentity, company: Set[str]) -> bool:
        """Whether the model was tried as it is, when all models of ``company`` were there; or not to the end, too
        often."""
        if self.deaths(name, identity) >= MAX_DEATHS:
            return True
        found = self._noted.models.get(_text(name))
        if found is None or found[0] != _key(identity):
            return False
        known = self._known.get(found[1])
        if known is None:
            known = self._known[found[1]] = frozenset(self._noted.companies.get(found[1], ()))
        return {_text(one) for one in company} <= known

    def deaths(self, name: str, identity: FileIdentity) -> int:
        """How often the model was being tried, as it is, when the worker died."""
        found = self._noted.trying.get(_text(name))
        return found[1] if found is not None and found[0] == _key(identity) else 0

    def begin(self, name: str, identity: FileIdentity) -> bool:
        """The model is going to be tried. Whether that is written down: what is not might be met first for ever."""
        with contextlib.suppress(HydraError):  # then there is nothing to write it into either
            self._store.begin()
        self._noted.trying[_text(name)] = _key(identity), self.deaths(name, identity) + 1
        return self._write()

    def end(self, name: str) -> None:
        """The trial came to an end, whichever."""
        if self._noted.trying.pop(_text(name), None) is not None:
            self._changed = True

    def note(self, name: str, identity: FileIdentity, company: frozenset[str], trouble: str = "") -> None:
        """The model was tried, and stays whole; because of a ``trouble``, or for good reason."""
        names = sorted(map(_text, company))
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
        self._noted.companies.setdefault(digest, names)
        self._noted.models[_text(name)] = (_key(identity), digest)
        self._noted.troubles.pop(_text(name), None)
        if trouble:
            self._noted.troubles[_text(name)] = trouble
        self._changed = True

    def troubles(self) -> dict[str, str]:
        """Why models that could not be tried to the end were not, by their names as text."""
        dead = {n: f"the worker died {t[1]} times at it" for n, t in self._noted.trying.items() if t[1] >= MAX_DEATHS}
        found = {**self._noted.troubles, **dead}
        return {os.fsdecode(_name(n)).encode("utf-8", "backslashreplace").decode(): why for n, why in found.items()}

    def keep(self, names: Collection[str]) -> None:
        """Forget models of other names, and write down what is left if anything changed."""
        kept = {_text(name) for name in names}
        for table in (self._noted.models, self._noted.trying, self._noted.troubles):
            for name in [name for name in table if name not in kept]:
                del table[name]
                self._changed = True
        if self._changed:
            used = {digest for _, digest in self._noted.models.values()}
            self._noted.companies = {d: n for d, n in self._noted.companies.items() if d in used}
            self._write()

    def _write(self) -> bool:
        try:
            data = msgspec.json.encode(self._noted)
            self._store.check_root()
            with TemporaryFile(self._path.parent) as temporary:
                temporary.file.write(data)
                temporary.commit(self._path, replace=True)
        except (OSError, HydraError, ValueError, msgspec.MsgspecError):
            return False  # a full store, or one that cannot be written to: it is tried again at each change
        self._changed = False
        return True


def _key(identity: FileIdentity) -> _Key:
    # Not the ctime: a link that holds the file changes it.
    size, mtime_ns, inode, device = identity.size, identity.mtime_ns, identity.inode, identity.device
    return signed64(size), signed64(mtime_ns), signed64(inode), signed64(device)


def _text(name: str) -> str:
    """A name as JSON can have it. No name has a zero byte."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "\0" + os.fsencode(name).hex()
    return name


def _name(text: str) -> bytes:
    return bytes.fromhex(text[1:]) if text.startswith("\0") else os.fsencode(text)
