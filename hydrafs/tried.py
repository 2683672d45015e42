"""Which models the worker has tried and left whole, so that no start tries them again.

A model is tried again when it changes, or when the store has a model that was not there when it was tried: that may be
what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Set

import msgspec

from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile

__all__ = ["Tried"]

_FILE = "left-whole.json"
_Key = tuple[int, int, int, int]


class _Noted(msgspec.Struct):
    """Names of models by the digest of all of them; which file was tried in which company, by its name."""

    companies: dict[str, list[str]] = {}
    models: dict[str, tuple[_Key, str]] = {}


class Tried:
    """The models of one store that were left whole. Thread safety: one thread."""

    def __init__(self, store: Store) -> None:
        self._path = store.private / _FILE
        self._noted = _Noted()
        self._changed = False
        self._known: dict[str, frozenset[str]] = {}
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
            self._noted = msgspec.json.decode(self._path.read_bytes(), type=_Noted)

    def __len__(self) -> int:
        return len(self._noted.models)

    def is_settled(self, name: str, identity: FileIdentity, company: Set[str]) -> bool:
        """Whether the model was tried as it is, when all models of ``company`` were there."""
        found = self._noted.models.get(name)
        if found is None or found[0] != _key(identity):
            return False
        known = self._known.get(found[1])
        if known is None:
            known = self._known[found[1]] = frozenset(self._noted.companies.get(found[1], ()))
        return company <= known

    def note(self, name: str, identity: FileIdentity, company: frozenset[str]) -> None:
        """The model was tried."""
        names = sorted(company)
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._noted.companies.setdefault(digest, names)
        self._noted.models[name] = (_key(identity), digest)
        self._changed = True

    def keep(self, names: Collection[str]) -> None:
        """Forget models of other names, and write down what is left if anything changed."""
        gone = [name for name in self._noted.models if name not in names]
        for name in gone:
            del self._noted.models[name]
        if not gone and not self._changed:
            return
        used = {digest for _, digest in self._noted.models.values()}
        self._noted.companies = {d: n for d, n in self._noted.companies.items() if d in used}
        self._changed = False
        # Names that are no text cannot be written: such a model is tried at every start.
        with contextlib.suppress(OSError, HydraError, UnicodeEncodeError, ValueError):
            data = msgspec.json.encode(self._noted)
            with TemporaryFile(self._path.parent) as temporary:
                temporary.file.write(data)
                temporary.commit(self._path, replace=True)


def _key(identity: FileIdentity) -> _Key:
    # Not the ctime: a link that holds the file changes it.
    return identity.size, identity.mtime_ns, identity.inode, identity.device
