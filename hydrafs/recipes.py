"""What each tensor of a new model is computed from: the parts that operations put together, and how they are read.

Rule: a part is a formula or a copy over tensors of the models that take part; what no formula over whole tensors gives
(the first layer of an inpainting model) is small, and is computed when the recipe is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hydrafs import predictors
from hydrafs.assembling import Blank
from hydrafs.dtypes import DTYPES
from hydrafs.errors import BadModel, UsageError
from hydrafs.formulas import REAL, WHOLE, Formula, Step, cast, evaluate, get, result_dtype
from hydrafs.layout import ByteSource, Layout, View
from hydrafs.manifest import Operand
from hydrafs.matching import stripped

_KEY = "model"
_STABLE_DIFFUSION = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "model_ema.",
    "control_model.",
)  # fmt: skip
"""How the names of tensors begin in the checkpoints that the rule of the name was made for: CompVis', Stability's."""
_MAX_PATCH_NBYTES = 64 << 20
_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that takes part: ``name`` for people, where its bytes come from, and its layout."""

    name: str
    source: ByteSource
    layout: Layout
    views: dict[str, View] = field(init=False)
    _plain: dict[str, View] = field(init=False)

    def __post_init__(self) -> None:
        if not self.layout.views:
            raise BadModel(
                "no tensors to compute with",
                where=self.name,
                detail=f"container {self.layout.container}",
                remedy="name a .safetensors, or a checkpoint that torch.save wrote",
            )
        views = {view.name: view for view in self.layout.views}
        plain: dict[str, View] = {}
        for name, view in views.items():
            plain.setdefault(stripped(name), view)
        object.__setattr__(self, "views", views)
        object.__setattr__(self, "_plain", plain)

    def find(self, name: str) -> View | None:
        """The tensor of that name, or of the same name without known prefixes."""
        return self.views.get(name) or self._plain.get(stripped(name))


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the result. With a formula it is computed from ``operands``, all of whose parents count into the
    recipe's models; without one it is a copy of the only operand. ``values``, where given, are its bytes: the formula
    or the copy is then only what predicts them."""

    tensor: Blank
    operands: tuple[Operand, ...]
    formula: Formula | None = None
    values: bytes | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model to be made: ``summary`` says what it is, ``told`` what a user should know, a line each."""

    models: tuple[Model, ...]
    parts: tuple[Part, ...]
    summary: str
    told: tuple[str, ...] = ()
    stayed: tuple[str, ...] = ()
    """The tensors that are one model's as they are, though another model has something to add to them, or none has."""


def takes_part_of(views: Iterable[str], keys: str) -> Callable[[str], bool]:
    """Which tensors take part: those with "model" in their name, as in the seed tool and A1111, or all of them. By
    ``auto`` it is the former where the names are those of Stable Diffusion's checkpoints: of a language model that
    would leave out its head."""
    if keys not in ("auto", "model", "all"):
        raise UsageError("no such choice of keys", where=keys, remedy="choose auto, model or all")
    if keys == "all" or (keys == "auto" and not any(name.startswith(_STABLE_DIFFUSION) for name in views)):
        return lambda name: True
    return lambda name: _KEY in name


def operand_of(parent: int, view: View) -> Operand:
    """A tensor of a model, as what a formula computes with."""
    return Operand(parent, view.offset, view.dtype)


def copied(parent: int, view: View, name: str = "", *, half: bool = False) -> Part:
    """The tensor as it is; with ``half``, F32 becomes F16 as in A1111."""
    tensor = Blank(name or view.name, view.dtype, view.shape)
    if half and view.dtype == "F32":
        return Part(
            replace(tensor, dtype="F16"), (operand_of(parent, view),), Formula("cast to half", (get(0), cast("F16")))
        )
    return Part(tensor, (operand_of(parent, view),))


def computed(
    label: str, steps: Sequence[Step], name: str, operands: Sequence[tuple[int, View]], half: bool = False
) -> Part:
    """A tensor by a formula, of the shape of the first operand."""
    dtypes = [view.dtype for _, view in operands]
    formula = Formula(label, tuple(steps))
    dtype = result_dtype(formula, dtypes)
    if half and dtype == "F32":
        formula, dtype = Formula(label + ", half", (*formula.steps, cast("F16"))), "F16"
    return Part(Blank(name, dtype, operands[0][1].shape), tuple(operand_of(*o) for o in operands), formula)


def can_compute(*views: View) -> bool:
    """Whether formulas know all of these tensors' types."""
    return all(view.dtype in REAL or view.dtype in WHOLE for view in views)


class Counts:
    """What happened to how many tensors, for the lines that are told."""

    def __init__(self) -> None:
        self._counts: dict[str, list[str]] = {}
        self._named: set[str] = set()
        self.stayed: list[str] = []

    def stay(self, what: str, name: str) -> None:
        """One more that is not computed: nobody is to learn that from the result."""
        self.add(what, name, named=True)
        self.stayed.append(name)

    def add(self, what: str, name: str, *, named: bool = False) -> None:
        """One more of which ``what`` is said; ``named``: the first few are told by name, for they are exceptions."""
        self._counts.setdefault(what, []).append(name)
        if named:
            self._named.add(what)

    def lines(self) -> tuple[str, ...]:
        """A line for each thing that happened."""
        lines = []
        for what, names in self._counts.items():
            line = f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}"
            if what in self._named:
                line += f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            lines.append(line)
        return tuple(lines)


def tell_strided(models: Sequence[Model], counts: Counts) -> None:
    """Count the tensors that no layout can place.

    Raises:
        UsageError: the first model has one: the result would lack it.
    """
    for model in models:
        for name in model.layout.strided:
            if model is models[0]:
                raise UsageError(
                    "a tensor cannot be computed with",
                    where=f"{name} of {model.name}",
                    detail="its elements are not contiguous, or of unknown type",
                    remedy="load and save the model once with torch",
                )
            counts.add(f"of {model.name} not contiguous, or of unknown type: taken as missing", name, named=True)


def has_more_channels(name: str, first: View, second: View, models: Sequence[Model]) -> bool:
    """Whether ``first`` has more input channels than ``second`` and is to be merged in its first four.

    Raises:
        UsageError: the shapes do not fit in any way that the programs know.
    """
    if first.shape == second.shape:
        return False
    fits = len(first.shape) == len(second.shape) == 4 and first.shape[::2] == second.shape[::2]
    if fits and first.shape[3] == second.shape[3] and first.shape[1] in (8, 9) and second.shape[1] == 4:
        return True
    sides = f"{'x'.join(map(str, first.shape))} and {'x'.join(map(str, second.shape))}"
    remedy = "only models of one architecture can be merged"
    if len(first.shape) == 4 and first.shape[1] == 4 and second.shape[1:2] in ((8,), (9,)):
        remedy = "name the inpainting model first"
    raise UsageError("two tensors do not fit", where=f"{name} of {models[0].name}", detail=sides, remedy=remedy)


def patched(
    formula: Formula, operands: Sequence[tuple[int, View]], models: Sequence[Model], *, half: bool = False
) -> Part:
    """The first operand's tensor with its first four input channels computed by the formula, as A1111 assigns them:
    into a tensor of its type, which ``half`` casts from F32 afterwards. Reads the tensors, which are small.

    Raises:
        UsageError: the tensor is too large to be that of an inpainting model.
        HydraError: a model cannot be read.
    """
    parent, first = operands[0]
    if first.nbytes > _MAX_PATCH_NBYTES:
        raise UsageError("two tensors do not fit", where=first.name, remedy="only inpainting models may differ so")
    dtypes = [view.dtype for _, view in operands]
    sizes = [DTYPES[dtype].nbytes for dtype in dtypes]

    def words(index: int, view: View) -> _Bytes:
        raw = np.frombuffer(models[index].source.pread(view.offset, view.nbytes), np.uint8)
        return raw.reshape(*view.shape, DTYPES[view.dtype].nbytes)

    out = np.array(words(parent, first))
    narrow = operands[1][1]
    buffers = [np.ascontiguousarray(out[:, :4]).reshape(-1)]
    buffers += [words(*operand).reshape(-1) for operand in operands[1:]]

    def read(index: int, start: int, count: int) -> _Bytes:
        return buffers[index][start * sizes[index] : (start + count) * sizes[index]]

    raw, dtype = evaluate(formula, dtypes, read, 0, narrow.elements)
    out[:, :4] = predictors.cast(raw, DTYPES[dtype], DTYPES[first.dtype]).reshape(*narrow.shape, sizes[0])
    part = copied(parent, first, half=half)
    values = predictors.cast(out.reshape(-1), DTYPES[first.dtype], DTYPES[part.tensor.dtype])
    return replace(part, values=values.tobytes())


def whole_difference(operands: Sequence[tuple[int, View]], models: Sequence[Model]) -> Part:
    """``M - B + X`` of three tensors of whole numbers of one type, which formulas do not compute: counters and position
    ids, which are small and are read.

    Raises:
        UsageError: they are not small.
        HydraError: a model cannot be read.
    """
    (parent, first), *_ = operands
    if first.nbytes > _MAX_PATCH_NBYTES:
        raise UsageError("a tensor is too large", where=first.name, detail=f"{first.dtype}, {first.nbytes} bytes")
    word = DTYPES[first.dtype].word  # unsigned: they wrap around, as torch's do
    m, b, x = (np.frombuffer(models[i].source.pread(v.offset, v.nbytes), np.uint8).view(word) for i, v in operands)
    return replace(copied(parent, first), values=(m - b + x).astype(word).tobytes())


def check_shapes(name: str, first: View, second: View, models: Sequence[Model]) -> None:
    """Refuse two tensors of different shapes.

    Raises:
        UsageError: they differ.
    """
    if first.shape != second.shape:
        raise UsageError(
            "two tensors do not fit",
            where=f"{name} of {models[0].name} and {models[1].name}",
            detail=f"{'x'.join(map(str, first.shape))} and {'x'.join(map(str, second.shape))}",
            remedy="only models of one architecture can be computed with",
        )


def check_some_computed(parts: Sequence[Part], models: Sequence[Model]) -> None:
    """Refuse a recipe that would only copy its first model.

    Raises:
        UsageError: it would.
    """
    if not any(part.formula or part.values or part.operands[0].parent for part in parts):
        names = " and ".join(model.name for model in models)
        raise UsageError(
            "nothing to compute",
            where=names,
            detail="no tensors in common, or none that differ",
            remedy="name models of one architecture; --keys all takes every tensor",
        )


def blocks_of(recipe: Recipe, number: int, nbytes: int) -> Iterator[bytes]:
    """The bytes of a tensor of the result, ``nbytes`` (whole elements) at a time."""
    tensor = recipe.parts[number].tensor
    step = max(1, nbytes // DTYPES[tensor.dtype].nbytes)
    for first in range(0, tensor.elements, step):
        yield elements_of(recipe, number, first, min(step, tensor.elements - first))


def elements_of(recipe: Recipe, number: int, first: int, count: int) -> bytes:
    """Elements ``[first, first + count)`` of a tensor of the result.

    Raises:
        HydraError: a parent cannot be read.
    """
    part = recipe.parts[number]
    size = DTYPES[part.tensor.dtype].nbytes
    if part.values is not None:
        return part.values[first * size : (first + count) * size]

    def read(index: int, start: int, elements: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        operand = part.operands[index]
        nbytes = DTYPES[operand.dtype].nbytes
        data = recipe.models[operand.parent].source.pread(operand.origin + start * nbytes, elements * nbytes)
        return np.frombuffer(data, np.uint8)

    if part.formula is None:
        return read(0, first, count).tobytes()
    return evaluate(part.formula, [o.dtype for o in part.operands], read, first, count)[0].tobytes()
