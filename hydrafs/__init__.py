"""hydrafs: a filesystem for model checkpoints. Fine-tunes are kept as small exact diffs and served as full files.

``open_store`` gives a store to work with, ``mount`` shows one as a folder while a ``with`` block lasts. Everything else
lives in the rooms below; importing this module imports none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydrafs.version import __version__

if TYPE_CHECKING:
    from hydrafs.api import OpenStore, mount, open_store
    from hydrafs.errors import HydraError

__all__ = ["HydraError", "OpenStore", "__version__", "mount", "open_store"]


def __getattr__(name: str) -> object:
    if name in ("OpenStore", "mount", "open_store"):
        from hydrafs import api  # noqa: PLC0415 - the command line's help must not pay for numpy

        return getattr(api, name)
    if name == "HydraError":
        from hydrafs.errors import HydraError  # noqa: PLC0415

        return HydraError
    raise AttributeError(name)
