"""The append-only table of codec ids: an id never changes its meaning and is never used again.

0 is the prediction itself; the next free id is 5.
"""

from __future__ import annotations

from hydrafs.codecs import Codec
from hydrafs.codecs.planes import PlanesCodec
from hydrafs.codecs.rans import RansCodec
from hydrafs.codecs.raw import RawCodec
from hydrafs.codecs.zstd import ZstdCodec
from hydrafs.errors import UnsupportedDiff, UsageError

NONE = 0
"""The prediction is exact: there is no payload and no codec."""

_CODECS: tuple[Codec, ...] = (RawCodec(), ZstdCodec(), PlanesCodec(), RansCodec())
_BY_ID: dict[int, Codec] = {codec.id: codec for codec in _CODECS}
_BY_NAME: dict[str, Codec] = {codec.name: codec for codec in _CODECS}


FEATURES: dict[int, str] = {RansCodec.id: "rans"}
"""What a diff requires by name where a codec is used that the first readers of version 1 did not have."""


def feature(codec_id: int) -> str:
    """The feature that a diff with this codec requires of its reader; empty for those that every reader has."""
    return FEATURES.get(codec_id, "")


def names() -> tuple[str, ...]:
    """The names of all codecs, in the order of their ids."""
    return tuple(_BY_NAME)


def by_id(codec_id: int) -> Codec:
    """The codec that a diff names by number.

    Raises:
        UnsupportedDiff: this version has no codec of that id (``NONE`` is none).
    """
    try:
        return _BY_ID[codec_id]
    except KeyError:
        raise UnsupportedDiff("a diff needs a codec that is not known here", detail=f"codec {codec_id}") from None


def by_name(name: str) -> Codec:
    """The codec that a user names.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UsageError("no such codec", where=name, remedy=f"choose one of {', '.join(names())}") from None
