"""Which models are dehydrated in the background, and when: the store's configuration, and what goes before it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from hydrafs.errors import UsageError
from hydrafs.sizes import parse_nbytes
from hydrafs.store import Store

__all__ = ["MIN_NBYTES", "SETTLE_SECONDS", "Policy"]

SETTLE_SECONDS = 60.0
MIN_NBYTES = 4 << 20
_SECTION = "worker"


@dataclass(frozen=True, slots=True)
class Policy:
    """Which models are dehydrated, and when. ``include`` (empty: all) and ``exclude`` are patterns as fnmatch has them,
    of names relative to the store or of their last part. ``other_views``: ``wait`` until nobody sees a covered store
    without its mount (``hydrafs.views``), or ``ignore`` who does."""

    enabled: bool = True
    settle_seconds: float = SETTLE_SECONDS
    min_nbytes: int = MIN_NBYTES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    other_views: str = "wait"

    @classmethod
    def of(cls, store: Store, **given: Any) -> Policy:
        """The policy of the store's configuration, ``[worker]``; what is ``given`` and not ``None`` goes before it.

        Raises:
            UsageError: the configuration says something that cannot be meant.
        """
        table = store.section(_SECTION)
        where = store.private / "config.toml"

        def value(key: str, kinds: type | tuple[type, ...], default: Any) -> Any:
            found = table.get(key, default)
            if not isinstance(found, kinds) or (isinstance(found, bool) and bool is not kinds):
                raise UsageError(f"{_SECTION}.{key} cannot be meant", where=where, detail=f"{found!r}")
            return found

        def texts(key: str) -> tuple[str, ...]:
            found = value(key, list, [])
            if not all(isinstance(v, str) for v in found):
                raise UsageError(f"{_SECTION}.{key} is no list of texts", where=where, detail=f"{found!r}")
            return tuple(found)

        mode = value("dehydrate", str, "auto")
        if mode not in ("auto", "off"):
            raise UsageError(f"{_SECTION}.dehydrate is neither auto nor off", where=where, detail=repr(mode))
        other_views = value("other_views", str, "wait")
        if other_views not in ("wait", "ignore"):
            raise UsageError(
                f"{_SECTION}.other_views is neither wait nor ignore", where=where, detail=repr(other_views)
            )  # fmt: skip
        fields: dict[str, Any] = {
            "enabled": mode == "auto",
            "settle_seconds": float(value("settle", (int, float), SETTLE_SECONDS)),
            "min_nbytes": _nbytes(value("min_size", (int, str), MIN_NBYTES), where),
            "include": texts("include"),
            "exclude": texts("exclude"),
            "other_views": other_views,
        }
        return cls(**{**fields, **{k: v for k, v in given.items() if v is not None}})

    def wants(self, name: str, nbytes: int) -> bool:
        """Whether a model of this name and size is to be dehydrated."""
        included = not self.include or any(_matches(name, pattern) for pattern in self.include)
        return nbytes >= self.min_nbytes and included and not any(_matches(name, pattern) for pattern in self.exclude)

    def asks(self, name: str, folder: str) -> bool:
        """Whether a pattern of ``include`` asks for the model of this name though it lies in ``folder``, which nobody
        looks for models in: a pattern that names the file, or that folder, and not merely everything."""

        def names(pattern: str) -> bool:
            *above, last = pattern.split("/")
            exact = not _WILD.intersection(last) and last == name.rpartition("/")[2]
            lower = folder.lower()
            return exact or any(set(part) - _WILD and fnmatch.fnmatchcase(lower, part.lower()) for part in above)

        return any(_matches(name, pattern) and names(pattern) for pattern in self.include)


_WILD = frozenset("*?[]!")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition("/")[2], pattern)


def _nbytes(given: int | str, where: object) -> int:
    """``min_size`` of the configuration: bytes, or a text as ``--min-size`` takes it."""
    if isinstance(given, int):
        return given
    try:
        return parse_nbytes(given)
    except UsageError as error:
        raise UsageError(
            f"{_SECTION}.min_size is no size", where=where, detail=repr(given), remedy=error.remedy
        ) from None
