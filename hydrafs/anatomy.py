"""Where in a network a tensor is, by its name: which part, which block of it, and what kind of layer.

Rule: pure, and for people: a name that fits nothing is in the part ``model``, block ``rest``, and no error.
Sources: the layouts of ldm (Stable Diffusion 1, 2, XL), diffusers, Flux and SD3, CLIP and OpenCLIP, and the
``layers.N`` of transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = (
    "self-attention", "cross-attention", "attention", "feed-forward", "convolution", "projection", "time", "norm",
    "embedding", "other",
)  # fmt: skip
"""The kinds of layers, in the order in which they are shown."""

_PARTS = (
    ("model.diffusion_model.", "UNet"),
    ("model_ema.", "EMA"),
    ("first_stage_model.", "VAE"),
    ("cond_stage_model.", "text encoder"),
    ("conditioner.embedders.0.", "text encoder 1"),
    ("conditioner.embedders.1.", "text encoder 2"),
    ("text_encoders.clip_l.", "text encoder 1"),
    ("text_encoders.clip_g.", "text encoder 2"),
    ("text_encoders.t5xxl.", "text encoder 3"),
    ("text_model.", "text encoder"),
    ("vae.", "VAE"),
    ("unet.", "UNet"),
    ("transformer.", "model"),
)
_UNET = (
    (re.compile(r"(?:^|\.)input_blocks\.(\d+)"), "in", 0),
    (re.compile(r"(?:^|\.)middle_block\b"), "middle", 1),
    (re.compile(r"(?:^|\.)output_blocks\.(\d+)"), "out", 2),
    (re.compile(r"(?:^|\.)(?:encoder\.)?down(?:_blocks)?\.(\d+)"), "down", 0),
    (re.compile(r"(?:^|\.)(?:encoder\.|decoder\.)?mid(?:_block)?\b"), "mid", 1),
    (re.compile(r"(?:^|\.)(?:decoder\.)?up(?:_blocks)?\.(\d+)"), "up", 2),
    (re.compile(r"(?:^|\.)double_blocks\.(\d+)"), "double", 0),
    (re.compile(r"(?:^|\.)joint_blocks\.(\d+)"), "joint", 0),
    (re.compile(r"(?:^|\.)single_blocks\.(\d+)"), "single", 1),
)
_LAYER = re.compile(
    r"(?:^|\.)(?:layers?|resblocks|blocks?|h|transformer_blocks|single_transformer_blocks|encoder_layers)\.(\d+)(?:\.|$)"
)
_KINDS = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"norm|(?:^|\.)ln_|(?:^|[._])ln\d?\b|layernorm|batchnorm|(?:^|\.)bn\d?\b", "norm"),
        (r"attn2\b|cross_attn|encoder_attn|crossattention", "cross-attention"),
        (r"attn1\b", "self-attention"),
        (r"emb_layers|time_emb|timestep|label_emb|vector_in|modulation|_mod\b|adaln", "time"),
        (r"\bff\b|mlp|feed_forward|(?:^|\.)fc\d|intermediate", "feed-forward"),
        (r"up_proj|down_proj|gate_proj", "feed-forward"),
        (r"(?<!attention\.)output\.dense", "feed-forward"),
        (r"attn|attention|(?:^|\.)(?:to_)?(?:q|k|v|qkv)(?:_proj)?\.|o_proj|out_proj|query|key|value", "attention"),
        (r"embed|wte|wpe|position_ids|(?:^|\.)token", "embedding"),
        (r"proj_in|proj_out|proj\b|projection", "projection"),
        (r"conv|in_layers|out_layers|skip_connection|(?:^|\.)op\.|nin_shortcut", "convolution"),
        (r"input_blocks\.0\.0|downsample|upsample", "convolution"),
    )
)


_END = re.compile(r"(?:^|\.)(?:out|final|head|lm_head|ln_f|post|norm_out|conv_out|pooler|text_projection)")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a tensor is. ``order`` sorts the blocks of a part as the data goes through them; ``block`` names one."""

    part: str
    order: tuple[int, int]
    block: str
    kind: str


def place_of(name: str) -> Place:
    """Where the tensor of that name is."""
    part, rest = _part(name)
    kind = next((kind for pattern, kind in _KINDS if pattern.search(rest)), "other")
    if part == "EMA":  # names without dots: what they copy has the same shape
        return Place(part, (0, 0), "all", "other")
    if part == "model" and ("double_blocks" in rest or "input_blocks" in rest or "down_blocks" in rest):
        part = "UNet" if "double_blocks" not in rest else "transformer"
    for pattern, label, stage in _UNET:
        found = pattern.search(rest)
        if found:
            number = int(found[1]) if found.groups() else 0
            return Place(part, (stage, number), f"{label} {number}" if found.groups() else label, kind)
    found = _LAYER.search(rest)
    if found:
        return Place(part, (0, int(found[1])), f"layer {found[1]}", kind)
    if _END.search(rest):
        return Place(part, (3, 0), "end", kind)
    return Place(part, (-1, 0), "start" if kind in ("embedding", "time") or "conv_in" in rest else "rest", kind)


def _part(name: str) -> tuple[str, str]:
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part, name[len(prefix) :]
    return "model", name
