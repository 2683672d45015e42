"""Finding libfuse through a binding, mfusepy or fusepy, and how libfuse is tuned.

Both bindings load libfuse when they are imported and describe its structures; that is all that is used of them.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

from hydrafs.errors import MountFailed

__all__ = ["BINDINGS", "Binding", "has_coherent_direct_writes", "load_binding"]

BINDINGS = ("mfusepy", "fusepy")
"""Names of the bindings, the preferred one first."""

_MODULES = {"mfusepy": "mfusepy", "fusepy": "fuse"}
# Named libraries first: find_library runs ldconfig or gcc, which are slow and not everywhere.
_LIBFUSE3 = ("libfuse3.so.4", "libfuse3.so.3")
_LIBFUSE2 = ("libfuse.so.2",)
_LIBRARY_PATH = "FUSE_LIBRARY_PATH"
_NO_LIBFUSE = "install libfuse3 (Debian, Ubuntu: apt install fuse3; Fedora: dnf install fuse3); hydrafs doctor checks"

MAX_READ_NBYTES = {3: 1 << 20, 2: 128 << 10}
"""The largest read request, by libfuse's major version: the kernel gives libfuse2 no more than 32 pages."""
READAHEAD_NBYTES = 1 << 20
MAX_BACKGROUND = 64
MAX_THREADS = 64
"""More than may wait for a store's lock at a time (``hydrafs.store_lock.MAX_WAITING``): some are left to read."""
IDLE_THREADS = 16
TIMEOUT_SECONDS = 1.0
"""How long the kernel trusts a name and its attributes: the time in which a change of the store is seen."""
# Absent names are not remembered at all: a model must open at once after it was added, also for who asked too early.
NEGATIVE_TIMEOUT_SECONDS = 0.0


_COHERENT_DIRECT_WRITES = (6, 18, 3)


def has_coherent_direct_writes(release: str) -> bool:
    """Whether the kernel of this ``uname -r`` keeps a file's cached pages right while another open writes past them.

    Before Linux 6.18.3 a read that competes with such a write may leave the old bytes in the cache (the fix is "fuse:
    Invalidate the page cache after FOPEN_DIRECT_IO write"). Where it was brought to older ones, nothing tells of it.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return numbers is not None and tuple(int(number or 0) for number in numbers.groups()) >= _COHERENT_DIRECT_WRITES


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding that is loaded, with the libfuse behind it."""

    name: str
    module: Any
    major: int
    minor: int
    library: str

    @property
    def max_read_nbytes(self) -> int:
        """The largest read request."""
        return MAX_READ_NBYTES[self.major]

    def options(self) -> list[str]:
        """The ``-o`` options that this libfuse takes its tuning from; libfuse3 takes the rest in ``init``."""
        common = [
            f"max_read={self.max_read_nbytes}",
            f"attr_timeout={TIMEOUT_SECONDS}",
            f"entry_timeout={TIMEOUT_SECONDS}",
            f"negative_timeout={NEGATIVE_TIMEOUT_SECONDS}",
        ]
        if self.major >= 3:
            threads = [f"max_threads={MAX_THREADS}"] if self.minor >= 12 else []
            return [*common, *threads, f"max_idle_threads={IDLE_THREADS}"]
        return [
            *common,
            # libfuse2 looks by itself too; whether the place may be mounted on was decided before.
            "nonempty",
            "use_ino",
            "readdir_ino",
            # Requests to write of more than a page; and an open that truncates says so, instead of truncating after.
            "big_writes",
            "atomic_o_trunc",
            f"max_write={self.max_read_nbytes}",
            f"max_readahead={READAHEAD_NBYTES}",
            f"max_background={MAX_BACKGROUND}",
            f"congestion_threshold={MAX_BACKGROUND * 3 // 4}",
        ]


def load_binding(name: str | None = None) -> Binding:
    """Load libfuse through the binding called ``name``, or through the first that works.

    Raises:
        MountFailed: an unknown name, a binding that is not installed, or no libfuse.
    """
    if name and name not in BINDINGS:
        raise MountFailed(
            "unknown FUSE binding",
            where=name,
            detail=f"expected {' or '.join(BINDINGS)}",
            remedy="set HYDRAFS_FUSE to one of them, or unset it",
        )
    failure: MountFailed | None = None
    for candidate in (name,) if name else BINDINGS:
        try:
            return _load(candidate)
        except MountFailed as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _load(name: str) -> Binding:
    sonames = (*_LIBFUSE3, *_LIBFUSE2) if name == "mfusepy" else _LIBFUSE2
    library = next(filter(_loads, sonames), None)
    library = library or (name == "mfusepy" and find_library("fuse3")) or find_library("fuse")
    module = sys.modules.get(_MODULES[name])
    if module is None:
        # The only way to tell a binding which libfuse to load when it is imported; a path that the user has set wins.
        ours = bool(library) and _LIBRARY_PATH not in os.environ
        if ours:
            os.environ[_LIBRARY_PATH] = str(library)
        try:
            module = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError:
            raise MountFailed("the FUSE binding is not installed", where=name, remedy=f"pip install {name}") from None
        except (OSError, AttributeError) as error:
            raise MountFailed("libfuse does not load", where=name, detail=str(error), remedy=_NO_LIBFUSE) from None
        finally:
            if ours:
                del os.environ[_LIBRARY_PATH]
    if not all(hasattr(module, needed) for needed in ("fuse_operations", "c_stat", "c_statvfs", "_libfuse")):
        raise MountFailed(
            "another package stands under the name of the FUSE binding",
            where=getattr(module, "__file__", name),
            remedy=f"pip uninstall fuse-python; pip install {name}",
        )
    lib = module._libfuse
    version = lib.fuse_version()
    major, minor = divmod(version, 10) if version < 100 else divmod(version, 100)
    if major not in ((2, 3) if name == "mfusepy" else (2,)):
        raise MountFailed(
            "this libfuse does not go with the FUSE binding",
            where=lib._name,
            detail=f"{name} got version {version}",
            remedy=f"unset {_LIBRARY_PATH}, and install {'libfuse3' if name == 'mfusepy' else 'libfuse2'}",
        )
    return Binding(name, module, major, minor, str(lib._name))


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True
