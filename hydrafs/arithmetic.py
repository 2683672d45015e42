"""Merge, unmerge, strength, graft, conversion: what each tensor of a new model is computed from.

Goal: the values of the programs that people know, bit for bit (the seed tool's ``ckpt_merge``, ``ckpt_unmerge`` and
``ckpt_add``; A1111's "Add difference" and "Save as float16"), as formulas over the tensors of models in a store.
Plan: each operation gives a *recipe*: for every tensor of the result its type, its shape, and a formula or a copy.
Rule: what does not fit is told and counted, and kept as the first model has it, or refused; never silently dropped.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydrafs.diff import DiffFile
from hydrafs.dtypes import DTYPES
from hydrafs.errors import UsageError
from hydrafs.formulas import ADD, REAL, SUBTRACT, WHOLE, Formula, cast, divide, get, promoted, result_dtype, scale
from hydrafs.layout import View
from hydrafs.manifest import PREDICTION_SAME, PREDICTION_TENSOR, SELF
from hydrafs.recipes import (
    Counts,
    Model,
    Recipe,
    can_compute,
    check_shapes,
    check_some_computed,
    computed,
    copied,
    has_more_channels,
    patched,
    takes_part_of,
    tell_strided,
    whole_difference,
)

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
_COMPARED_NBYTES = 4 << 20


def merge(a: Model, b: Model, alpha: float, *, half: bool = False, keys: str = "auto") -> Recipe:
    """``alpha*A + (1-alpha)*B`` as the seed tool's ``ckpt_merge``: tensors that take part (``takes_part_of``) and that
    both have; A's others as they are; those of B alone appended. ``half``: F32 results are stored as F16, as in A1111.

    Raises:
        UsageError: shapes that do not fit, or nothing that both have.
    """
    models = (a, b)
    takes_part = takes_part_of(a.views, keys)
    counts = Counts()
    parts = []
    for name, first in a.views.items():
        second = b.views.get(name)
        if second is None or not takes_part(name):
            counts.stay(f"of {a.name} as they are", name)
            parts.append(copied(0, first, half=half and takes_part(name)))
        elif not can_compute(first, second):
            counts.stay(f"of {a.name} kept, of a type that is not computed with", name)
            parts.append(copied(0, first))
        else:
            counts.add("merged", name)
            steps = [get(0), scale(alpha), get(1), scale(1 - alpha), ADD]
            operands = [(0, first), (1, second)]
            if has_more_channels(name, first, second, models):
                parts.append(patched(Formula("weighted sum", tuple(steps)), operands, models, half=half))
            else:
                parts.append(computed("weighted sum", steps, name, operands, half))
    for name, second in b.views.items():
        if takes_part(name) and name not in a.views:
            counts.add(f"of {b.name} alone, appended", name)
            parts.append(copied(1, second, half=half))
        elif name not in a.views:
            counts.stay(f"of {b.name} alone, left out: they take no part", name)
    tell_strided(models, counts)
    check_some_computed(parts, models)
    told = counts.lines()
    if not 0 <= alpha <= 1:
        told = (f"alpha {alpha:g} is outside 0 to 1", *told)
    summary = f"{alpha:g} x {a.name} + {1 - alpha:g} x {b.name}"
    return Recipe(models, tuple(parts), summary, told, tuple(counts.stayed))


def add_difference(a: Model, b: Model, c: Model, alpha: float, *, half: bool = False, keys: str = "auto") -> Recipe:
    """``A + alpha*(B - C)`` as A1111's "Add difference": the difference first, nothing added where C lacks the tensor
    (B - B, as A1111's zeros), A's others as they are, SD1's position ids too.

    Raises:
        UsageError: shapes that do not fit, or nothing that they have in common.
    """
    models = (a, b, c)
    takes_part = takes_part_of(a.views, keys)
    counts = Counts()
    parts = []
    for name, first in a.views.items():
        second, third = b.views.get(name), c.views.get(name)
        if second is None or not takes_part(name) or name == POSITION_IDS:
            counts.stay(f"of {a.name} as they are", name)
            parts.append(copied(0, first))
        elif third is None and second.dtype in REAL and can_compute(first) and first.shape == second.shape:
            counts.add(f"with nothing added, not in {c.name}", name, named=True)
            steps = [get(0), get(1), get(1), SUBTRACT, scale(alpha), ADD]
            parts.append(computed("A1111 add difference", steps, name, [(0, first), (1, second)], half))
        elif third is None:
            counts.stay(f"of {a.name} as they are", name)
            parts.append(copied(0, first, half=half))
        elif not can_compute(first, second, third):
            counts.stay(f"of {a.name} kept, of a type that is not computed with", name)
            parts.append(copied(0, first))
        else:
            check_shapes(name, second, third, models[1:])
            counts.add("merged", name)
            steps = [get(0), get(1), get(2), SUBTRACT, scale(alpha), ADD]
            if not promoted(second.dtype, third.dtype):  # whole numbers: what torch subtracts exactly fits F32
                steps = [get(0), get(1), cast("F32"), get(2), cast("F32"), SUBTRACT, scale(alpha), ADD]
            operands = [(0, first), (1, second), (2, third)]
            if has_more_channels(name, first, second, models):
                parts.append(patched(Formula("A1111 add difference", tuple(steps)), operands, models, half=half))
            else:
                parts.append(computed("A1111 add difference", steps, name, operands, half))
    for name in b.views:
        if name not in a.views:
            counts.stay(f"of {b.name} alone, left out", name)
    tell_strided(models, counts)
    check_some_computed(parts, models)
    told = counts.lines()
    if not 0 <= alpha <= 1:
        told = (f"alpha {alpha:g} is outside 0 to 1", *told)
    return Recipe(models, tuple(parts), f"{a.name} + {alpha:g} x ({b.name} - {c.name})", told, tuple(counts.stayed))


def unmerge(merged: Model, known: Model, alpha: float, *, half: bool = False, keys: str = "auto") -> Recipe:
    """``(MERGED - (1-alpha)*KNOWN) / alpha`` as the seed tool's ``ckpt_unmerge``: the other model of a merge.

    Raises:
        UsageError: ``alpha`` is 0, shapes that do not fit, or nothing that both have.
    """
    if alpha == 0:
        raise UsageError("alpha 0 cannot be undone", detail="a division by zero", remedy="name the alpha of the merge")
    models = (merged, known)
    takes_part = takes_part_of(merged.views, keys)
    counts = Counts()
    parts = []
    for name, first in merged.views.items():
        second = known.views.get(name)
        if second is None or not takes_part(name):
            counts.stay(f"of {merged.name} as they are", name)
            parts.append(copied(0, first, half=half and takes_part(name)))
        elif not can_compute(first, second) or not (first.dtype in REAL or second.dtype in REAL or alpha != 1):
            counts.stay(f"of {merged.name} kept, of a type that is not computed with", name)
            parts.append(copied(0, first))
        else:
            check_shapes(name, first, second, models)
            counts.add("unmerged", name)
            steps = [get(0), get(1), scale(1 - alpha), SUBTRACT, divide(alpha)]
            parts.append(computed("unmerge", steps, name, [(0, first), (1, second)], half))
    for name in known.views:
        if name not in merged.views:
            counts.stay(f"of {known.name} alone, left out", name)
    tell_strided(models, counts)
    check_some_computed(parts, models)
    told = counts.lines()
    if not 0 <= alpha <= 1:
        told = (f"alpha {alpha:g} is outside 0 to 1", *told)
    summary = f"({merged.name} - {1 - alpha:g} x {known.name}) / {alpha:g}"
    return Recipe(models, tuple(parts), summary, told, tuple(counts.stayed))


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of a fine-tune is different from: a tensor of the model ``parent`` (counted from 0), and whether
    the two are equal in every bit."""

    parent: int
    view: View
    equal: bool


def strength(
    model: Model,
    bases: Sequence[Model],
    origins: Origins,
    amount: float,
    onto: Model | None = None,
    *,
    keys: str = "auto",
) -> Recipe:
    """``(M - B)*(1+s) + B*(1-s)`` as the seed tool's ``ckpt_add --str``; with ``onto``, the same difference added to
    another model X: ``(M - B)*(1+s) + X*(1-s)``. Tensors that equal their base are the base's, or X's, own.

    Args:
        model: the fine-tune M.
        bases: the models that its tensors are different from.
        origins: what each of its tensors, by name, is different from, if that is known.
        amount: s; 0 is the difference as it is.

    Raises:
        UsageError: shapes that do not fit, or nothing whose base is known.
    """
    models = (model, *bases) if onto is None else (model, *bases, onto)
    target = len(models) - 1
    takes_part = takes_part_of(model.views, keys)
    counts = Counts()
    parts = []
    plain = amount == 0
    label = "difference" if plain else f"difference at strength {amount:g}"
    for name, view in model.views.items():
        origin = origins(name, view)
        to = None if origin is None else (origin.view if onto is None else onto.find(name))
        if origin is None or to is None or not takes_part(name):
            why = "of no known base" if origin is None else "as they are"
            counts.stay(f"of {model.name} {why if onto is None else 'as they are'}", name)
            parts.append(copied(0, view))
            continue
        parent = origin.parent + 1 if onto is None else target
        if origin.equal:
            counts.add(f"that do not differ, {models[parent].name}'s own", name)
            parts.append(copied(parent, to, name))
            continue
        shared = onto is None
        operands = [(0, view), (origin.parent + 1, origin.view), *([] if shared else [(target, to)])]
        dtypes = {other.dtype for _, other in operands}
        whole = dtypes <= set(WHOLE)
        if not (whole or dtypes <= set(REAL)) or (whole and plain and (len(dtypes) > 1 or "BOOL" in dtypes)):
            counts.stay(f"of {model.name} kept, of a type that is not computed with", name)
            parts.append(copied(0, view))
            continue
        check_shapes(name, view, origin.view, (model, models[origin.parent + 1]))
        check_shapes(name, view, to, (model, models[parent]))
        counts.add("computed", name)
        if whole and plain:
            parts.append(whole_difference(operands, models))
            continue
        base = get(1 if shared else 2)
        # The difference of whole numbers is exact in F32 as long as they are below 2**24; so is torch's, as integers.
        to_single = [cast("F32")] if whole else []
        steps = [get(0), *to_single, get(1), *to_single, SUBTRACT]
        steps += [base, ADD] if plain else [scale(1 + amount), base, scale(1 - amount), ADD]
        if not whole and result_dtype(Formula(label, tuple(steps)), [v.dtype for _, v in operands]) != view.dtype:
            steps.append(cast(view.dtype))
        parts.append(computed(label, steps, name, operands))
    if onto is not None:
        for name, view in onto.views.items():
            if model.find(name) is None:
                counts.add(f"of {onto.name} alone, appended", name)
                parts.append(copied(target, view))
    tell_strided(models, counts)
    check_some_computed(parts, models)
    what = f"{model.name} at strength {amount:g}" if onto is None else f"the difference of {model.name} on {onto.name}"
    if onto is not None and not plain:
        what += f" at strength {amount:g}"
    return Recipe(models, tuple(parts), what, counts.lines(), tuple(counts.stayed))


Origins = Callable[[str, View], Origin | None]


def origins_by_name(model: Model, bases: Sequence[Model], diff: DiffFile | None = None) -> Origins:
    """What each tensor of a model is different from: the tensor of that name in the first of ``bases`` that has one of
    its shape.

    Args:
        diff: the diff that the model is read from, ``bases`` being its parents. It knows which tensors are equal, and
            has an answer for those of other names. Without it, and where it does not know, both are read.
    """
    predicted = _predicted(diff) if diff else lambda name, view: None

    def origin(name: str, view: View) -> Origin | None:
        known = predicted(name, view)
        for number, base in enumerate(bases):
            found = base.find(name)
            if found is None or found.shape != view.shape:
                continue
            if known and (known.parent, known.view.offset, known.view.dtype) == (number, found.offset, view.dtype):
                return known
            equal = found.dtype == view.dtype and _equal(model, view, base, found)
            return Origin(number, found, equal)
        return known

    return origin


def _predicted(diff: DiffFile) -> Origins:
    """What predicts the span of a diff that a tensor lies in."""
    offsets = diff.table.offsets.tolist()
    spans, sections = diff.manifest.spans, diff.manifest.sections

    def origin(name: str, view: View) -> Origin | None:
        number = bisect_right(offsets, view.offset) - 1
        span = spans[number]
        inside = view.offset - offsets[number]
        known = span.prediction in (PREDICTION_SAME, PREDICTION_TENSOR) and span.parent != SELF
        if not known or inside + view.nbytes > span.nbytes or sections[span.section].dtype != view.dtype:
            return None
        dtype = span.origin_dtype or view.dtype
        place = span.origin + inside // DTYPES[view.dtype].nbytes * DTYPES[dtype].nbytes
        return Origin(span.parent, View(name, dtype, view.shape, place), span.prediction == PREDICTION_SAME)

    return origin


def _equal(model: Model, view: View, base: Model, other: View) -> bool:
    for at in range(0, view.nbytes, _COMPARED_NBYTES):
        nbytes = min(_COMPARED_NBYTES, view.nbytes - at)
        if model.source.pread(view.offset + at, nbytes) != base.source.pread(other.offset + at, nbytes):
            return False
    return True


def convert(model: Model, *, vae: Model | None = None, drop_ema: bool = False, dtype: str = "") -> Recipe:
    """A copy with another VAE, without its EMA weights, or cast: what people write another two gigabytes for.

    Args:
        vae: its tensors replace those of the same name under ``first_stage_model.``, as A1111 bakes one in.
        drop_ema: leave out ``model_ema.*``.
        dtype: F16, BF16 or F32: real tensors are cast to it. Empty: none is.

    Raises:
        UsageError: shapes that do not fit, or a VAE none of whose tensors is in the model.
    """
    models = (model,) if vae is None else (model, vae)
    counts = Counts()
    parts = []
    for name, view in model.views.items():
        if drop_ema and name.startswith(EMA_PREFIX):
            counts.add("of EMA weights left out", name)
            continue
        parent, source = 0, view
        if vae is not None and name.startswith(VAE_PREFIX):
            found = vae.views.get(name.removeprefix(VAE_PREFIX)) or vae.views.get(name)
            if found is not None:
                check_shapes(name, view, found, models)
                counts.add(f"from {vae.name}", name)
                parent, source = 1, found
        if dtype and source.dtype in REAL and source.dtype != dtype:
            counts.add(f"cast to {dtype}", name)
            parts.append(computed(f"cast to {dtype}", [get(0), cast(dtype)], name, [(parent, source)]))
        else:
            parts.append(copied(parent, source, name))
    if vae is not None and not any(part.operands[0].parent == 1 for part in parts):
        raise UsageError("a VAE that does not fit", where=vae.name, detail=f"no {VAE_PREFIX}* of {model.name} in it")
    told: tuple[str, ...] = ()
    if drop_ema and len(parts) == len(model.views):
        told = (f"{model.name} holds no EMA weights",)
    tell_strided(models, counts)
    done = [f"VAE of {vae.name}" if vae else "", "without EMA" if drop_ema else "", f"as {dtype}" if dtype else ""]
    summary = ", ".join([model.name, *filter(None, done)])
    return Recipe(models, tuple(parts), summary, (*told, *counts.lines()))


def check_ratio(number: float) -> float:
    """``number``, if it can be computed with.

    Raises:
        UsageError: it is not finite.
    """
    if not math.isfinite(number):
        raise UsageError("not a ratio", where=str(number), remedy="give a number such as 0.3")
    return number
