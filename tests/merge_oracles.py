"""What each merge program computes, in torch, in its own order of operations and dtypes: references for tests.

Each function takes state dicts (or tensors) as the program loads them, changes none of them, and gives a new state
dict in the order that the program saves. ``scalars`` is how torch treats a Python number in a product or quotient of a
16-bit tensor: ``"new"`` (torch 2.1 and later) keeps it in float32 and rounds the result once; ``"old"`` rounds the
number to the tensor's type first. For float32 tensors both are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

Tensors = dict[str, torch.Tensor]
Scalars = Literal["old", "new"]

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
_HALVES = (torch.float16, torch.bfloat16)


def scalar(value: float, dtype: torch.dtype, scalars: Scalars = "new") -> float:
    """The number that a product of ``value`` and a tensor of ``dtype`` is taken with."""
    return float(torch.tensor(value, dtype=dtype)) if scalars == "old" and dtype in _HALVES else value


def times(value: float, tensor: torch.Tensor, scalars: Scalars = "new") -> torch.Tensor:
    return scalar(value, tensor.dtype, scalars) * tensor


# The seed tool


def seed_subtract(tuned: Tensors, base: Tensors, loss: float = 0.0) -> Tensors:
    """``ckpt_subtract``: keys with "model" in them that the base has too and that differ. ``loss``: its ``--loss``."""
    diff: Tensors = {}
    for key, value in tuned.items():
        if "model" in key and key in base and not torch.equal(value, base[key]):
            diff[key] = value - base[key]
            if loss > 0.0:
                diff[key] = torch.where(diff[key].abs() > loss, diff[key], 0.0)
    return diff


def seed_add(diff: Tensors, base: Tensors, strength: float = 0, scalars: Scalars = "new") -> Tensors:
    """``ckpt_add --str``: diff*(1+s) + base*(1-s). Without ``--str`` the strength is the integer 0, so that integer
    tensors stay integers; with ``--str 0`` it is a float, and they become float32."""
    result = dict(diff)
    for key in diff:
        if "model" in key and key in base:
            up, down = 1 + strength, 1 - strength
            if isinstance(strength, float):
                up, down = scalar(up, diff[key].dtype, scalars), scalar(down, base[key].dtype, scalars)
            result[key] = diff[key] * up + base[key] * down
    for key, value in base.items():
        if "model" in key and key not in result:
            result[key] = value
    return result


def seed_merge(a: Tensors, b: Tensors, alpha: float = 0.5, scalars: Scalars = "new") -> Tensors:
    """``ckpt_merge``: alpha*A + (1-alpha)*B where both have the key, A's other keys as is, then keys of B alone."""
    result = dict(a)
    for key in a:
        if "model" in key and key in b:
            result[key] = times(alpha, a[key], scalars) + times(1 - alpha, b[key], scalars)
    for key, value in b.items():
        if "model" in key and key not in result:
            result[key] = value
    return result


def seed_unmerge(merged: Tensors, known: Tensors, alpha: float = 0.5, scalars: Scalars = "new") -> Tensors:
    """``ckpt_unmerge``: (M - (1-alpha)*K) / alpha where both have the key, other keys of M as they are."""
    result = dict(merged)
    for key in merged:
        if "model" in key and key in known:
            rest = merged[key] - times(1 - alpha, known[key], scalars)
            result[key] = rest / scalar(alpha, rest.dtype, scalars)
    return result


# AUTOMATIC1111 and Forge


def weighted_sum(a: torch.Tensor, b: torch.Tensor, alpha: float, scalars: Scalars = "new") -> torch.Tensor:
    """((1-alpha)*A) + (alpha*B), each operation rounded to its result's dtype."""
    return times(1 - alpha, a, scalars) + times(alpha, b, scalars)


def add_scaled(a: torch.Tensor, difference: torch.Tensor, alpha: float, scalars: Scalars = "new") -> torch.Tensor:
    """A + (alpha*difference)."""
    return a + times(alpha, difference, scalars)


def to_half(tensor: torch.Tensor, half: bool) -> torch.Tensor:
    """ "Save as float16": float32 only; bfloat16 and integers stay."""
    return tensor.half() if half and tensor.dtype == torch.float32 else tensor


def a1111_merge(
    a: Tensors,
    b: Tensors,
    alpha: float,
    c: Tensors | None = None,
    *,
    half: bool = False,
    scalars: Scalars = "new",
    add_missing: bool = False,
    vae: Tensors | None = None,
) -> Tensors:
    """ "Weighted sum" of A and B, or "Add difference" A + alpha*(B-C) where ``c`` is given, on the CPU.

    An inpainting model as A (9 input channels) or an instruct-pix2pix one (8) takes part with its first four. Only keys
    with "model" in them; SD1's position ids are left as A has them. ``half``: save as float16, merged keys alone.
    ``add_missing``: as it was until February 2023, keys of B alone are appended. ``vae``: baked in, under
    ``first_stage_model.``.
    """
    b = dict(b)
    if c is not None:
        for key in b:
            if "model" in key and key != POSITION_IDS:
                b[key] = b[key] - c[key] if key in c else torch.zeros_like(b[key])
    merge = weighted_sum if c is None else add_scaled
    result = dict(a)
    for key, first in a.items():
        if "model" not in key or key not in b or key == POSITION_IDS:
            continue
        second = b[key]
        if first.shape != second.shape and first.shape[0:1] + first.shape[2:] == second.shape[0:1] + second.shape[2:]:
            if not (first.shape[1] in (8, 9) and second.shape[1] == 4):
                raise ValueError(f"{key}: {tuple(first.shape)} and {tuple(second.shape)}")
            merged = first.clone()
            merged[:, 0:4, :, :] = merge(first[:, 0:4, :, :], second, alpha, scalars)
        else:
            merged = merge(first, second, alpha, scalars)
        result[key] = to_half(merged, half)
    if add_missing:
        for key, value in b.items():
            if "model" in key and key not in result and key != POSITION_IDS:
                result[key] = to_half(value, half)
    for key, value in (vae or {}).items():
        if "first_stage_model." + key in result:
            result["first_stage_model." + key] = to_half(value, half)
    return result


def a1111_half(a: Tensors) -> Tensors:
    """ "No interpolation" saved as float16: a copy in which every float32 tensor is half."""
    return {key: to_half(value, True) for key, value in a.items()}


# kohya-ss sd-scripts, tools/merge_models.py


def kohya_merge(
    models: Sequence[Tensors],
    ratios: Sequence[float],
    *,
    precision: torch.dtype = torch.float32,
    saving: torch.dtype = torch.float32,
    scalars: Scalars = "new",
) -> Tensors:
    """r0*X0, then + ri*Xi in the order of the arguments, in ``precision``; keys of the first model alone. Where a model
    lacks a key its ratio goes to the first model's value, added last."""
    result = {key: times(ratios[0], value.to(precision), scalars) for key, value in models[0].items()}
    owed: dict[str, float] = {}
    for model, ratio in zip(models[1:], ratios[1:], strict=True):
        for key, value in list(result.items()):
            if key in model:
                result[key] = value + times(ratio, model[key].to(precision), scalars)
            else:
                owed[key] = owed[key] + ratio if key in owed else ratio
    for key, ratio in owed.items():
        result[key] = result[key] + times(ratio, models[0][key].to(precision), scalars)
    return {key: value.to(saving) for key, value in result.items()}


# Block weights: Merge Block Weighted, supermerger

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
"""The parts that have a weight of their own: the 25 blocks of an SD1 or SD2 UNet behind BASE, which is all else."""

_BLOCK = re.compile(r"\.(input|middle|output)_blocks?\.(\d+)\.")


def block_of(key: str) -> str:
    """The block that a key belongs to, by the rules of Merge Block Weighted: the time embedding counts as IN00, the
    output layers as OUT11, a UNet's ``label_emb`` and everything outside the UNet as BASE."""
    if "model.diffusion_model." not in key:
        return "BASE"
    if "time_embed" in key:
        return "IN00"
    if ".out." in key:
        return "OUT11"
    for kind, prefix in (("input", "IN"), ("middle", "M"), ("output", "OUT")):
        for match in _BLOCK.finditer(key):
            if match[1] == kind:
                return "M00" if kind == "middle" else f"{prefix}{int(match[2]):02}"
    return "BASE"


def mbw_merge(
    a: Tensors, b: Tensors, weights: Mapping[str, float], *, half: bool = False, scalars: Scalars = "new"
) -> Tensors:
    """Merge Block Weighted: (1-w)*A + w*B with a weight per block (``BLOCKS``); "model" keys, then keys of B alone. It
    merges position ids as it does anything, and halves any merged type."""
    result = dict(a)
    for key in a:
        if "model" in key and key in b:
            merged = weighted_sum(a[key], b[key], weights[block_of(key)], scalars)
            result[key] = merged.half() if half else merged
    for key, value in b.items():
        if "model" in key and key not in result:
            result[key] = value.half() if half else value
    return result


def supermerger_lerp(a: Tensors, b: Tensors, alpha: float | Mapping[str, float]) -> Tensors:
    """supermerger: lerp(A, B, alpha) in float32, as A's dtype; one alpha, or one per block. Alpha 1 takes B as it is,
    alpha 0 leaves A."""
    result = dict(a)
    for key in a:
        if "model" in key and key in b and key != POSITION_IDS:
            weight = _weight(alpha, key)
            if weight == 1:
                result[key] = b[key]
            elif weight != 0:
                result[key] = torch.lerp(a[key].to(torch.float32), b[key].to(torch.float32), weight).to(a[key].dtype)
    for key, value in b.items():
        if "model" in key and key not in result and key != POSITION_IDS:
            result[key] = value
    return result


def _weight(alpha: float | Mapping[str, float], key: str) -> float:
    return alpha[block_of(key)] if isinstance(alpha, Mapping) else alpha


def supermerger_difference(b: Tensors, c: Tensors) -> Tensors:
    """supermerger's B-C in float32, as B's dtype; zeros where C lacks the key."""
    return {
        key: (value.to(torch.float32) - c[key].to(torch.float32)).to(value.dtype)
        if key in c
        else torch.zeros_like(value)
        for key, value in b.items()
        if "model" in key and key != POSITION_IDS
    }


def supermerger_add(
    a: Tensors, b: Tensors, c: Tensors, alpha: float | Mapping[str, float], *, native: bool = False
) -> Tensors:
    """supermerger "Add": A + alpha*(B-C), the difference as above, the sum in float32, as A's dtype; ``native``: in the
    dtypes that they have, as it was before."""
    difference = supermerger_difference(b, c)
    result = dict(a)
    for key in a:
        if key in difference:
            first, second = (t if native else t.to(torch.float32) for t in (a[key], difference[key]))
            merged = first + _weight(alpha, key) * second
            result[key] = merged if native else merged.to(a[key].dtype)
    return result


def supermerger_normal(a: Tensors, b: Tensors, alpha: float | Mapping[str, float], scalars: Scalars = "new") -> Tensors:
    """supermerger before it used lerp: as Merge Block Weighted, but alpha 1 takes B and alpha 0 leaves A as it is."""
    result = dict(a)
    for key in a:
        if "model" in key and key in b and key != POSITION_IDS:
            weight = _weight(alpha, key)
            if weight == 1:
                result[key] = b[key]
            elif weight != 0:
                result[key] = weighted_sum(a[key], b[key], weight, scalars)
    for key, value in b.items():
        if "model" in key and key not in result and key != POSITION_IDS:
            result[key] = value
    return result


# sd-mecha, ComfyUI


def mecha_lerp(
    a: Tensors, b: Tensors, alpha: float, *, compute: torch.dtype = torch.float32, saving: torch.dtype = torch.float16
) -> Tensors:
    """sd-mecha's weighted sum: lerp in ``compute``, saved in ``saving``; keys that both have."""
    return {key: torch.lerp(a[key].to(compute), b[key].to(compute), alpha).to(saving) for key in a if key in b}


def comfy_merge(a: Tensors, b: Tensors, ratio: float, prefix: str = "model.diffusion_model.") -> Tensors:
    """ComfyUI ModelMergeSimple: in float32 A*ratio, then += (1-ratio)*B, as the dtype that A was loaded in.

    ``ratio`` is the node's: A's share. The UNet alone (``prefix``); everything else is A's.
    """
    result = dict(a)
    for key in a:
        if key.startswith(prefix) and key in b:
            weight = a[key].to(torch.float32)
            if weight is a[key]:
                weight = weight.clone()
            if ratio != 1.0:
                weight *= ratio
            if 1.0 - ratio != 0.0:
                weight += (1.0 - ratio) * b[key].to(torch.float32)
            result[key] = weight.to(a[key].dtype)
    return result


# A LoRA baked into a base


def lora_key(module: str) -> tuple[str, str]:
    """The start of a state dict's key and the module's path in it, from the name that a LoRA file has: dots and
    underscores cannot be told apart in it, so the path is for comparing with a key that is flattened too."""
    for start, prefix in (("lora_unet_", "model.diffusion_model."), ("lora_te_", "cond_stage_model.transformer.")):
        if module.startswith(start):
            return prefix, module.removeprefix(start)
    return "", module


def lora_delta(lora: Tensors, module: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, float]:
    """up @ down of one module in ``dtype`` (a convolution's as one), and alpha / rank."""
    up, down = lora[module + ".lora_up.weight"].to(dtype), lora[module + ".lora_down.weight"].to(dtype)
    rank = down.shape[0]
    alpha = float(lora[module + ".alpha"]) if module + ".alpha" in lora else float(rank)
    if down.dim() == 2:
        product = up @ down
    elif down.shape[2:4] == (1, 1):
        product = (up.squeeze(3).squeeze(2) @ down.squeeze(3).squeeze(2)).unsqueeze(2).unsqueeze(3)
    else:
        product = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    return product, alpha / rank


def lora_weight(weight: torch.Tensor, lora: Tensors, module: str, multiplier: float = 1.0) -> torch.Tensor:
    """kohya merge_lora.py with float precision: W + multiplier*(up @ down)*(alpha/rank), evaluated from the left in
    float32, as W's dtype. (Some programs scale first: ``lora_weight_scaled_first``.)"""
    product, scale = lora_delta(lora, module)
    if product.dim() == 4 and weight.dim() == 2:
        product = product.squeeze(3).squeeze(2)
    return (weight.to(torch.float32) + multiplier * product * scale).to(weight.dtype)


def lora_weight_scaled_first(weight: torch.Tensor, lora: Tensors, module: str, multiplier: float = 1.0) -> torch.Tensor:
    """W + (multiplier*(alpha/rank))*(up @ down), the factors multiplied first, in float32, as W's dtype."""
    product, scale = lora_delta(lora, module)
    if product.dim() == 4 and weight.dim() == 2:
        product = product.squeeze(3).squeeze(2)
    return (weight.to(torch.float32) + (multiplier * scale) * product).to(weight.dtype)


def lora_baked(base: Tensors, lora: Tensors, multiplier: float = 1.0, *, scaled_first: bool = False) -> Tensors:
    """The base with a LoRA added to every weight that has a module of its name, by flattened key."""
    bake = lora_weight_scaled_first if scaled_first else lora_weight
    keys = {key.removesuffix(".weight").replace(".", "_"): key for key in base if key.endswith(".weight")}
    result = dict(base)
    for name in lora:
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            prefix, path = lora_key(module)
            key = keys.get(prefix.replace(".", "_") + path) or keys.get(path)
            if key is not None:
                result[key] = bake(base[key], lora, module, multiplier)
    return result
