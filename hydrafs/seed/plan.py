"""What the seed tool makes of two models, key by key, before anything is computed.

Rule 1: its key filters are kept as they are: keys without "model" in them are dropped, a diff's own keys are kept.
Rule 2: what cannot be computed is known when a plan is made, not when it is half written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hydrafs.dtypes import DType
from hydrafs.errors import UsageError
from hydrafs.predictors import Words
from hydrafs.seed.arithmetic import (
    Shape,
    added,
    equal,
    result_dtype,
    result_shape,
    subtracted,
    times_one,
    values_changed,
)
from hydrafs.seed.states import State, TensorRef

How = Literal["added", "diff", "base"]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a rehydrated model: the sum of both, or the diff's, or the base's."""

    key: str
    how: How
    dtype: DType
    shape: Shape
    diff: TensorRef | None
    base: TensorRef | None

    def read(self) -> Words:
        """The elements, raw, contiguous, little-endian."""
        if self.diff is None:
            assert self.base is not None
            return self.base.read()
        if self.base is None:
            return self.diff.read()
        return _sum(self.diff.read(), self.diff.dtype, self.diff.shape, self.base)[0]


def _sum(words: Words, dtype: DType, shape: Shape, base: TensorRef) -> tuple[Words, DType]:
    """``diff * 1 + base * 1``, as ``ckpt_add`` computes it without ``--str``."""
    first, first_dtype = times_one(words, dtype)
    second, second_dtype = times_one(base.read(), base.dtype)
    return added(first, first_dtype, shape, second, second_dtype, base.shape)


def hydrated(diff: State, base: State) -> tuple[Item, ...]:
    """What ``ckpt_add`` saves, in its order.

    Raises:
        UsageError: two tensors cannot be added: their shapes do not fit, or torch does not add such types.
    """
    items = []
    for key, ref in diff.items():
        other = base.get(key) if "model" in key else None
        if other is None:
            items.append(Item(key, "diff", ref.dtype, ref.shape, ref, None))
            continue
        try:
            shape = result_shape(ref.shape, other.shape)
            empty = np.empty(0, dtype=np.uint8)
            types = [times_one(empty, dtype)[1] for dtype in (ref.dtype, other.dtype)]
            dtype = result_dtype(types[0], ref.shape, types[1], other.shape)
        except UsageError as error:
            raise UsageError(
                error.what, where=key, detail=error.detail, remedy="name the base that the diff was made with"
            ) from None
        items.append(Item(key, "added", dtype, shape, ref, other))
    for key, other in base.items():
        if "model" in key and key not in diff:
            items.append(Item(key, "base", other.dtype, other.shape, None, other))
    return tuple(items)


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of a diff: ``model - base``."""

    key: str
    dtype: DType
    shape: Shape
    model: TensorRef
    base: TensorRef

    def read(self) -> Words:
        """The elements, raw, contiguous, little-endian."""
        a, b = self.model, self.base
        return subtracted(a.read(), a.dtype, a.shape, b.read(), b.dtype, b.shape)[0]


@dataclass(frozen=True, slots=True)
class Dehydrated:
    """What ``ckpt_subtract`` saves of a model, and what of the model ``ckpt_add`` does not bring back from it.

    ``values``: numbers of the tensors that come back at all; ``inexact`` of them have other bits (a NaN is a NaN).
    ``retyped``: tensors that come back as another type or shape. ``refused``: tensors that torch cannot subtract, for
    which the base's come back. ``lost``: tensors that do not come back. ``foreign``: tensors of the base that come with
    it though the model has none of that name.
    """

    items: tuple[Difference, ...]
    values: int
    inexact: int
    inexact_tensors: int
    retyped: tuple[str, ...]
    refused: tuple[str, ...]
    lost: tuple[str, ...]
    foreign: tuple[str, ...]


def dehydrated(model: State, base: State, progress: Callable[[int], None] | None = None) -> Dehydrated:
    """Subtract every tensor and add it back, to know which differ and what is lost; one pair is in memory at a time.

    Args:
        progress: is told how many more bytes of the model were read.
    """
    items: list[Difference] = []
    retyped: list[str] = []
    refused: list[str] = []
    lost: list[str] = []
    values = inexact = inexact_tensors = 0
    for key, ref in model.items():
        other = base.get(key)
        if "model" not in key or other is None:
            lost.append(key)
            if progress:
                progress(ref.nbytes)
            continue
        words, base_words = ref.read(), other.read()
        back, back_dtype, back_shape = base_words, other.dtype, other.shape
        if not equal(words, ref.dtype, ref.shape, base_words, other.dtype, other.shape):
            try:
                shape = result_shape(ref.shape, other.shape)
                diff, dtype = subtracted(words, ref.dtype, ref.shape, base_words, other.dtype, other.shape)
            except UsageError:
                refused.append(key)
            else:
                items.append(Difference(key, dtype, shape, ref, other))
                back, back_dtype = _sum(diff, dtype, shape, other)
                back_shape = result_shape(shape, other.shape)
        if (back_dtype, back_shape) != (ref.dtype, ref.shape):
            retyped.append(key)
        changed = ref.numel
        if back_shape == ref.shape:
            changed = values_changed(words, ref.dtype, back, back_dtype)
        values += ref.numel
        inexact += changed
        inexact_tensors += bool(changed)
        if progress:
            progress(ref.nbytes)
    foreign = tuple(key for key in base if "model" in key and key not in model)
    return Dehydrated(
        tuple(items), values, inexact, inexact_tensors, tuple(retyped), tuple(refused), tuple(lost), foreign
    )
