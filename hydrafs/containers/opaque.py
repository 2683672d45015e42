"""Any other file: bytes that hydrafs knows nothing about."""

from __future__ import annotations

from hydrafs.layout import ByteSource, Layout, cover

CONTAINER = "opaque"


def parse(source: ByteSource) -> Layout:
    """The layout with no numbers in it. Reads nothing."""
    return cover(CONTAINER, source.size, ())
