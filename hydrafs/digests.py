"""The hashes by which programs know a model: its SHA-256 and all others in one pass over its bytes.

Whole-file hashing is what makes WebUIs slow to list and to load; a model that is read once anyway is hashed then.
Rule: whoever gives the blocks is not held up: he reads on while lanes, threads of their own, hash. Both SHA-256s are
taken side by side in one lane where the processor's SHA instructions have room for a second.
Sources: stable-diffusion-webui ``modules/hashes.py`` (``addnet_hash_safetensors``, ``partial_hash_from_cache``), which
has the first from kohya's sd-scripts ``library/train_util.py``; InvokeAI and ComfyUI hash whole files with BLAKE3.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

try:
    _native: Any = importlib.import_module("hydrafs._twins")
except ImportError:  # no compiler when this was installed, or another machine's build
    _native = None

ADDNET = "addnet_sha256"
"""SHA-256 of what follows the header of a safetensors file ("AutoV3"); other containers have none."""
BLAKE3 = "blake3"
"""BLAKE3 of the whole file."""
PARTIAL = "partial_sha256"
"""SHA-256 of the 64 KiB at 0x100000, or of what there is of them; its first 8 hexadecimal digits are the old "model
hash"."""
SHA256 = "sha256"
"""SHA-256 of the whole file. It identifies a model in a store, and is kept apart from the others."""

NBYTES = {ADDNET: 32, BLAKE3: 32, PARTIAL: 32}
"""The hashes that may stand beside the SHA-256, and their sizes."""

TITLES = {SHA256: "SHA-256", BLAKE3: "BLAKE3", ADDNET: "addnet SHA-256 (AutoV3)", PARTIAL: "partial SHA-256 (old hash)"}
"""What people call them."""

PARTIAL_OFFSET = 0x100000
PARTIAL_NBYTES = 0x10000
AHEAD = 8
"""How many blocks a lane may be behind."""


def checked(hashes: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Those of the hashes that are known here and have the size that they must have."""
    return {name: value for name, value in hashes if len(value) == NBYTES.get(name)}


class Lane:
    """A thread that hashes block after block, ``AHEAD`` behind at most. Thread safety: one thread gives them."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, f"hydrafs-{name}")
        self._pending: deque[Future[object]] = deque()

    def take(self, update: Callable[..., object], *arguments: object) -> None:
        """Have ``update(*arguments)`` called; all but the last ``AHEAD`` calls have returned then."""
        while len(self._pending) >= AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(update, *arguments))

    def drain(self) -> None:
        """Wait for all calls."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Stop; what has not begun is not done."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Twins:
    """The SHA-256 of a file and that of its end, both in one lane, where ``hydrafs/native/twins.c`` serves."""

    def __init__(self) -> None:
        self._pair = _native.begin()
        self.lanes = (Lane("sha256"),)

    def take(self, block: memoryview, skipped: int) -> None:
        self.lanes[0].take(_native.update, self._pair, block, skipped)

    def finish(self) -> tuple[bytes, bytes]:
        whole, end = _native.finish(self._pair)
        return whole, end


class _Apart:
    """The same anywhere, each in its lane."""

    def __init__(self) -> None:
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self.lanes = Lane("sha256"), Lane("addnet")

    def take(self, block: memoryview, skipped: int) -> None:
        self.lanes[0].take(self._hashes[0].update, block)
        if skipped < len(block):
            self.lanes[1].take(self._hashes[1].update, block[skipped:])

    def finish(self) -> tuple[bytes, bytes]:
        return self._hashes[0].digest(), self._hashes[1].digest()


def twins_available() -> bool:
    """Whether the SHA-256 of a file and the addnet hash cost hardly more than one of them here."""
    return _native is not None and bool(_native.available())


class Digests:
    """Takes the hashes of a file whose bytes are given in order. Thread safety: one thread gives them.

    Args:
        safetensors: whether the file is of that container, and so has an addnet hash.
    """

    def __init__(self, *, safetensors: bool) -> None:
        self._safetensors = safetensors
        self._position = 0
        self._head = b""
        self._partial = hashlib.sha256()
        self._blake3 = blake3()
        self._sha256s = _Twins() if safetensors and twins_available() else _Apart()
        self._lane = Lane(BLAKE3)

    def update(self, block: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
        """The next bytes of the file; they must not change any more."""
        view = memoryview(block)
        start, end = self._position, self._position + len(view)
        self._position = end
        self._lane.take(self._blake3.update, view)
        skipped = len(view)
        if self._safetensors:
            if len(self._head) < 8:
                self._head += bytes(view[: 8 - len(self._head)])
            if len(self._head) == 8:
                skipped = min(max(0, 8 + int.from_bytes(self._head, "little") - start), len(view))
        self._sha256s.take(view, skipped)
        low, high = max(start, PARTIAL_OFFSET), min(end, PARTIAL_OFFSET + PARTIAL_NBYTES)
        if low < high:
            self._partial.update(view[low - start : high - start])

    def finish(self) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
        """The SHA-256, and all other hashes by name, once every byte was given."""
        for lane in (self._lane, *self._sha256s.lanes):
            lane.drain()
        sha256, end = self._sha256s.finish()
        found = {BLAKE3: self._blake3.digest(), PARTIAL: self._partial.digest()}
        if self._safetensors:
            found[ADDNET] = end
        return sha256, tuple(sorted(found.items()))

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *exc: object) -> None:
        for lane in (self._lane, *self._sha256s.lanes):
            lane.close()
