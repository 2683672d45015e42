"""``torch.save({"state_dict": ...})``, as ``ckpt_add`` ends. Torch is imported here, when it is needed, and nowhere
else.

Torch writes a checkpoint from tensors in memory, so all of the model is in memory while it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from hydrafs.errors import UsageError
from hydrafs.seed.plan import Item
from hydrafs.seed.states import TensorRef


def write(file: BinaryIO, items: Iterable[Item], progress: Callable[[int], None] | None = None) -> None:
    """Write a checkpoint that loads to these tensors, in this order, into ``file``. Names of the base that are views of
    the same bytes stay so.

    Raises:
        UsageError: torch is not installed, or is too old for a type.
    """
    try:
        import torch  # noqa: PLC0415 - seconds and hundreds of megabytes that only this command pays
    except ImportError:
        raise UsageError("torch is needed to write a checkpoint", remedy="pip install torch") from None
    tensors: dict[str, Any] = {}
    shared: dict[TensorRef, Any] = {}
    for item in items:
        if item.how == "base" and item.base in shared:
            tensors[item.key] = shared[item.base]
            continue
        dtype = getattr(torch, item.dtype.torch_name, None)
        if dtype is None or item.dtype.name.startswith("Q"):
            raise UsageError(
                "this torch cannot make a tensor of that type", where=item.key, detail=item.dtype.torch_name
            )
        words = np.require(item.read(), requirements="W")
        tensors[item.key] = torch.from_numpy(words).view(dtype).reshape(item.shape)
        if item.how == "base" and item.base is not None:
            shared[item.base] = tensors[item.key]
        if progress:
            progress(words.nbytes)
    torch.save({"state_dict": tensors}, file)
