"""Small models without torch: a network's weights, and fine-tunes of them, in milliseconds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

SHAPES = {"embedding.weight": (96, 64), "up.weight": (128, 64), "down.weight": (64, 128), "norm.weight": (64,)}
"""46 kB in half precision."""


def tensors(
    seed: int, delta: float = 0.0, family: int = 0
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
    """The weights of a network of that ``family``; with ``delta``, of a fine-tune of it that ``seed`` makes one of
    its own."""
    weights, change = np.random.default_rng(family), np.random.default_rng([family, seed])
    return {
        name: (
            weights.standard_t(4, shape).astype(np.float32) * 0.05
            + delta * change.standard_normal(shape).astype(np.float32)
        ).astype(np.float16)
        for name, shape in SHAPES.items()
    }  # fmt: skip


def model(seed: int, delta: float = 2e-4, family: int = 0) -> bytes:
    """The same, as the bytes of a safetensors file that no other seed has."""
    return save(tensors(seed, delta, family), {"seed": str(seed), "format": "pt"})


def save_model(path: Path, seed: int, delta: float = 2e-4, family: int = 0) -> bytes:
    """Write one, as programs do: beside its name, then renamed; its bytes."""
    data = model(seed, delta, family)
    aside = path.with_name(f"{path.name}.part")
    aside.write_bytes(data)
    os.replace(aside, path)
    return data
