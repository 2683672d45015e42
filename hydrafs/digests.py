"""The hashes by which other programs know a model, beside its SHA-256: all of them in one pass over its bytes.

Whole-file hashing is what makes WebUIs slow to list and to load; a model that is read once anyway is hashed then.
Rule: whoever gives the blocks is not held up: hashes that cost more than a little have a thread each.
Sources: stable-diffusion-webui ``modules/hashes.py`` (``addnet_hash_safetensors``, ``partial_hash_from_cache``), which
has the first from kohya's sd-scripts ``library/train_util.py``; InvokeAI and ComfyUI hash whole files with BLAKE3.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from blake3 import blake3

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
_AHEAD = 4


def checked(hashes: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Those of the hashes that are known here and have the size that they must have."""
    return {name: value for name, value in hashes if len(value) == NBYTES.get(name)}


class _Lane:
    """One hash that is taken in a thread of its own, a few blocks behind at most."""

    def __init__(self, name: str, update: Callable[[memoryview], object]) -> None:
        self._update = update
        self._pool = ThreadPoolExecutor(1, f"hydrafs-{name}")
        self._pending: deque[Future[object]] = deque()

    def take(self, block: memoryview) -> None:
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._update, block))

    def drain(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Digests:
    """Takes the hashes of a file whose bytes are given in order. Thread safety: one thread gives them.

    Args:
        safetensors: whether the file is of that container, and so has an addnet hash.
    """

    def __init__(self, *, safetensors: bool) -> None:
        self._position = 0
        self._head = b""
        self._blake3 = blake3()
        self._partial = hashlib.sha256()
        self._addnet = hashlib.sha256()
        self._whole = _Lane(BLAKE3, self._blake3.update)
        self._data = _Lane(ADDNET, self._addnet.update) if safetensors else None

    def update(self, block: bytes | npt.NDArray[np.uint8]) -> None:
        """The next bytes of the file; they must not change any more."""
        view = memoryview(block)
        start, end = self._position, self._position + len(view)
        self._position = end
        self._whole.take(view)
        if self._data is not None:
            if len(self._head) < 8:
                self._head += bytes(view[: 8 - len(self._head)])
            data_offset = 8 + int.from_bytes(self._head, "little")
            if len(self._head) == 8 and end > data_offset:
                self._data.take(view[data_offset - start :] if data_offset > start else view)
        low, high = max(start, PARTIAL_OFFSET), min(end, PARTIAL_OFFSET + PARTIAL_NBYTES)
        if low < high:
            self._partial.update(view[low - start : high - start])

    def finish(self) -> tuple[tuple[str, bytes], ...]:
        """All hashes, by name, once every byte was given."""
        self._whole.drain()
        found = {BLAKE3: self._blake3.digest(), PARTIAL: self._partial.digest()}
        if self._data is not None:
            self._data.drain()
            found[ADDNET] = self._addnet.digest()
        return tuple(sorted(found.items()))

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *exc: object) -> None:
        self._whole.close()
        if self._data is not None:
            self._data.close()
