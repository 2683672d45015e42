"""Finding out that a LoRA was added to a model's base: which module belongs to which tensor, and how strongly.

Plan: modules find their tensors by name, however a program flattens names, else by shape and by correlation with what
changed; least squares gives each one's strength; strengths that agree are snapped to a round number together.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hydrafs import merging
from hydrafs.assigning import Recognised, elements_of, read_runs
from hydrafs.bases import WORTH_A_PARENT_NBYTES, Candidate
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.errors import HydraError
from hydrafs.fingerprint import bits_apart
from hydrafs.formulas import (
    ADD,
    MAX_RANK,
    REAL,
    Formula,
    Step,
    cast,
    evaluate,
    get,
    product_shifts,
    result_dtype,
    scale,
)
from hydrafs.layout import ByteSource, read_exactly
from hydrafs.manifest import SELF, Operand
from hydrafs.matching import Computed, Match, stripped
from hydrafs.merging import Numbers, Words
from hydrafs.recognising import Open

_ENDINGS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"),
)
_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "base_model_model_", "unet_", "text_encoder_")
_RUN = 2048
_TRIED = 4
_CORRELATES = 0.2
_CORRELATES_NAMELESS = 0.5
_MAX_FACTOR_NBYTES = 64 << 20
_DECIDING = 8


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a LoRA: the factors of what it adds, and alpha where the file has it."""

    name: str
    up: TensorFacts
    down: TensorFacts
    alpha: TensorFacts | None

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.down.shape[0] if self.down.shape else 0

    @property
    def columns(self) -> int:
        """How many elements of the product stand in a row."""
        return elements_of(self.down) // max(1, self.rank)

    @property
    def elements(self) -> int:
        """How many elements the product has; 0 where the factors do not fit each other or are too large."""
        if not 0 < self.rank <= MAX_RANK or elements_of(self.up) % self.rank or not self.columns:
            return 0
        if max(self.up.nbytes, self.down.nbytes) > _MAX_FACTOR_NBYTES:
            return 0
        return elements_of(self.up) // self.rank * self.columns


def modules_of(facts: ModelFacts) -> list[Module]:
    """The modules of a LoRA file; none where it is another model."""
    tensors = {t.name: t for t in facts.tensors}
    found = []
    for name, up in tensors.items():
        for high, low in _ENDINGS:
            if name.endswith(high):
                stem = name.removesuffix(high)
                down = tensors.get(stem + low)
                if down and up.dtype in REAL and down.dtype in REAL:
                    alpha = tensors.get(stem + ".alpha")
                    found.append(Module(stem, up, down, alpha if alpha and alpha.dtype in REAL else None))
    return [m for m in found if m.elements]


def is_lora(facts: ModelFacts) -> bool:
    """Whether a file looks like a LoRA."""
    return any(t.name.endswith(tuple(e for pair in _ENDINGS for e in pair)) for t in facts.tensors[:64])


@dataclass(frozen=True, slots=True)
class _Changed:
    """A tensor that its base does not give exactly: a run of it and of the base's."""

    number: int
    tensor: TensorFacts
    how: Match
    first: int
    own: Words
    theirs: Words

    @property
    def moved(self) -> Numbers:
        gap = merging.numbers_of(self.own, self.tensor.dtype) - merging.numbers_of(self.theirs, self.how.dtype)
        return np.nan_to_num(gap, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A module at its tensor: the raw factors, a run of their product, and the strength that fits it."""

    module: Module
    changed: _Changed
    factors: tuple[Words, Words]
    shifts: tuple[int, int]
    ratio: float
    strength: float
    deviation: float

    def formula(self, label: str, steps: Sequence[Step]) -> Formula:
        product = Step("product", index=1, rank=self.module.rank, columns=self.module.columns, shifts=self.shifts)
        return Formula(label, tuple(product if s.op == "product" else s for s in steps))

    @property
    def dtypes(self) -> tuple[str, str, str]:
        return self.changed.how.dtype, self.module.up.dtype, self.module.down.dtype

    def cost(self, formula: Formula) -> float:
        made = _run(formula, self.dtypes, (self.changed.theirs, *self.factors), self.changed.first, self.changed.own)
        return bits_apart(made, self.changed.own, DTYPES[self.changed.tensor.dtype])


def _run(formula: Formula, dtypes: Sequence[str], raws: Sequence[Words], first: int, like: Words) -> Words:
    """A run of what a formula gives; the first operand is there from ``first`` on, the factors are there whole."""

    def read(index: int, start: int, count: int) -> Words:
        nbytes = DTYPES[dtypes[index]].nbytes
        at = start - first if index == 0 else start
        return raws[index][at * nbytes : (at + count) * nbytes]

    count = raws[0].nbytes // DTYPES[dtypes[0]].nbytes
    return evaluate(formula, dtypes, read, first, count)[0]


def recognise_lora(
    source: ByteSource,
    facts: ModelFacts,
    parents: Sequence[Candidate],
    matches: Sequence[Match | None],
    candidates: Sequence[Candidate],
    open_model: Open,
) -> Recognised | None:
    """What a LoRA among ``candidates`` was added to, and how; ``None`` where none was. See ``recognising.recognise``.

    Raises:
        HydraError: the model itself cannot be read.
    """
    loras = [c for c in candidates if is_lora(c.facts)]
    bases = [p for p in parents if not is_lora(p.facts)]
    if not loras or not bases:
        return None
    best: tuple[int, Candidate, dict[int, Computed]] | None = None
    with contextlib.ExitStack() as stack:
        sources = []
        for parent in parents:
            opened = open_model(parent)
            if opened is None:
                return None
            stack.callback(opened.close)
            sources.append(opened)
        for lora in loras:
            opened = open_model(lora)
            if opened is None:
                continue
            with contextlib.closing(opened), contextlib.suppress(HydraError):
                found, saved = _from_lora(source, facts, matches, sources, lora, opened)
                if saved >= WORTH_A_PARENT_NBYTES and (best is None or saved > best[0]):
                    best = (saved, lora, found)
    if best is None:
        return None
    _, lora, computed = best
    return Recognised((*parents, lora), tuple(computed.get(i, how) for i, how in enumerate(matches)))


def _from_lora(
    source: ByteSource,
    facts: ModelFacts,
    matches: Sequence[Match | None],
    sources: Sequence[ByteSource],
    lora: Candidate,
    opened: ByteSource,
) -> tuple[dict[int, Computed], int]:
    """For each tensor that a LoRA changed, the formula, and about how many bytes they save all together. The LoRA is
    the parent after the last of ``sources``."""
    modules = modules_of(lora.facts)
    changed: dict[int, _Changed | None] = {}

    def look(number: int) -> _Changed | None:
        if number not in changed:
            changed[number] = _changed(source, facts.tensors[number], number, matches[number], sources)
        return changed[number]

    names = _names(facts)
    by_size: dict[int, list[int]] = {}
    for number, tensor in enumerate(facts.tensors):
        if tensor.dtype in REAL:
            by_size.setdefault(elements_of(tensor), []).append(number)
    targets = [_named(m, names, facts) for m in modules]
    order = [i for i, t in enumerate(targets) if t is not None] or list(range(len(modules)))
    # A few modules tell whether it is this LoRA at all.
    tried = order[:: max(1, len(order) // _TRIED)][:_TRIED]
    if not any(_place(modules[i], targets[i], look, by_size, opened) for i in tried):
        return {}, 0
    placed = [_place(m, t, look, by_size, opened) for m, t in zip(modules, targets, strict=True)]
    return _decided([p for p in placed if p], len(sources))


def _changed(
    source: ByteSource, tensor: TensorFacts, number: int, how: Match | None, sources: Sequence[ByteSource]
) -> _Changed | None:
    elements = elements_of(tensor)
    if how is None or how.parent == SELF or how.count != elements or tensor.dtype not in REAL:
        return None
    count = min(_RUN, elements)
    first = (elements - count) // 2
    own = read_runs(source, tensor.offset, tensor.dtype, [(first, count)])
    theirs = read_runs(sources[how.parent], how.offset, how.dtype, [(first, count)])
    found = _Changed(number, tensor, how, first, own, theirs)
    return found if found.moved.any() else None


def _place(
    module: Module,
    target: int | None,
    look: Callable[[int], _Changed | None],
    by_size: dict[int, list[int]],
    opened: ByteSource,
) -> _Placed | None:
    up, down = (np.frombuffer(read_exactly(opened, t.offset, t.nbytes), np.uint8) for t in (module.up, module.down))
    ups, downs = merging.numbers_of(up, module.up.dtype), merging.numbers_of(down, module.down.dtype)
    shifts = product_shifts(ups, downs, module.rank)
    ratio = 1.0
    if module.alpha:
        alpha = merging.numbers_of(
            np.frombuffer(read_exactly(opened, module.alpha.offset, module.alpha.nbytes), np.uint8), module.alpha.dtype
        )
        ratio = float(alpha[0]) / module.rank if alpha.size == 1 and np.isfinite(alpha[0]) and alpha[0] else 1.0
    numbers = [target] if target is not None else by_size.get(module.elements, [])
    best: tuple[float, _Placed] | None = None
    for number in numbers:
        changed = look(number)
        if changed is None:
            continue
        moved = changed.moved
        columns = module.columns
        last = changed.first + moved.size
        rows = slice(changed.first // columns, -(-last // columns))
        part = ups.reshape(-1, module.rank)[rows] @ downs.reshape(module.rank, columns)
        product = part.reshape(-1)[changed.first - rows.start * columns :][: moved.size]
        energy = float(product @ product)
        if not energy > 0 or not np.isfinite(energy):
            continue
        fitted = float(product @ moved) / energy
        correlation = fitted * np.sqrt(energy / float(moved @ moved))
        if abs(correlation) < (_CORRELATES if target is not None else _CORRELATES_NAMELESS):
            continue
        left = moved - fitted * product
        deviation = float(np.sqrt(left @ left / moved.size / energy))
        found = _Placed(module, changed, (up, down), shifts, ratio, fitted / ratio, deviation / abs(ratio))
        if best is None or abs(correlation) > best[0]:
            best = (abs(correlation), found)
    return best[1] if best else None


def _decided(placed: Sequence[_Placed], parent: int) -> tuple[dict[int, Computed], int]:
    if not placed:
        return {}, 0
    weights = np.array([[p.strength] for p in placed])
    deviations = np.array([[p.deviation] for p in placed])
    result: dict[int, Computed] = {}
    saved = 0.0
    for group in merging.grouped(weights, deviations):
        members = [placed[i] for i in group.tensors]
        deciding = sorted(members, key=lambda p: p.deviation)[:_DECIDING]
        choices = []
        for rank, strength in enumerate(merging.snaps(float(group.weights[0]), float(group.deviations[0]))):
            for variant in range(_VARIANTS):
                price = sum(p.cost(_formula(p, strength, variant)) for p in deciding)
                choices.append((price, rank, variant, strength))
            if not min(choices)[0]:
                break
        _, _, variant, strength = min(choices)
        for p in members:
            formula = _formula(p, strength, variant)
            how, number = p.changed.how, p.changed.number
            gain = p.cost(_finished(p, Formula("", (get(0),)))) - p.cost(formula)
            if gain > 0 and number not in result:
                saved += gain * p.changed.tensor.nbytes
                operands = (
                    Operand(how.parent, how.offset, how.dtype),
                    Operand(parent, p.module.up.offset, p.module.up.dtype),
                    Operand(parent, p.module.down.offset, p.module.down.dtype),
                )
                result[number] = Computed(formula, operands, result_dtype(formula, p.dtypes))
    return result, int(saved)


_VARIANTS = 4


def _formula(placed: _Placed, strength: float, variant: int) -> Formula:
    """W + strength * (up @ down) * ratio: from the left or both numbers first, in F32 or in the weight's own type."""
    native, first = divmod(variant, 2)
    ratio = placed.ratio
    numbers = [strength * ratio] if first else [n for n in (strength, ratio) if n != 1.0]
    dtype = placed.changed.how.dtype
    steps = [get(0), *([] if native else [cast("F32")]), Step("product"), *([cast(dtype)] if native else [])]
    steps += [*(scale(n) for n in numbers), ADD]
    label = f"LoRA, strength {round(strength, 4):g}" + (f", {dtype}" if native else "")
    return _finished(placed, placed.formula(label, steps))


def _finished(placed: _Placed, formula: Formula) -> Formula:
    target = placed.changed.tensor.dtype
    if result_dtype(formula, placed.dtypes) == target:
        return formula
    return Formula(formula.label, (*formula.steps, cast(target)))


# Names


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _names(facts: ModelFacts) -> dict[str, int]:
    """The tensors by their names with dots and prefixes taken away, and by what diffusers calls them."""
    found: dict[str, int] = {}
    for number, tensor in enumerate(facts.tensors):
        if tensor.name.endswith(".bias") or tensor.dtype not in REAL:
            continue
        for name in (tensor.name, stripped(tensor.name), _diffusers_name(stripped(tensor.name))):
            if name:
                found.setdefault(_flat(name), number)
    return found


def _named(module: Module, names: dict[str, int], facts: ModelFacts) -> int | None:
    name = _flat(module.name)
    for flat in (name, *(name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), _flat(stripped(module.name))):
        number = names.get(flat)
        if number is not None and elements_of(facts.tensors[number]) == module.elements:
            return number
    return None


_INSIDE = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _diffusers_name(name: str) -> str:
    """What diffusers calls a tensor of an SD1 or SD2 UNet; empty for others. Source: the layout of both UNets, in
    which a level has two (down) or three (up) layers of a residual block and, where it attends, a transformer."""
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(?:(\d+)\.)?(.*)", name)
    if not found:
        return ""
    kind, one, two, rest = found[1], int(found[2]), found[3], found[4]
    for inside, theirs in _INSIDE.items():
        if rest.startswith(inside + "."):
            rest = theirs + rest.removeprefix(inside)
    if kind == "middle":
        return f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[one]}.{rest}" if one < 3 else ""
    if two is None:
        return ""
    if kind == "input":
        level, layer = divmod(one - 1, 3)
        if one == 0:
            return ""
        if layer == 2:
            return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        return f"down_blocks.{level}.{'attentions' if two == '1' else 'resnets'}.{layer}.{rest}"
    level, layer = divmod(one, 3)
    if rest.startswith("conv.") and two != "0":
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    return f"up_blocks.{level}.{'attentions' if two == '1' else 'resnets'}.{layer}.{rest}"
