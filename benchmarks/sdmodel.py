"""A model with the tensor names and shapes of Stable Diffusion 1.5, and a fine-tune of it, with made-up values.

1.066 billion parameters in fp16, 2.13 GB. Names and shapes are those of the original (LDM) layout: UNet 859.5 M, VAE
83.7 M, CLIP text encoder 123.1 M parameters, and the noise schedule's buffers. Weights are normal with the spread that
networks have (1/sqrt of the inputs). The fine-tune moves the UNet alone: each weight by a Laplace-distributed step
whose size varies from tensor to tensor and from row to row, as an optimiser's does, and one weight in 500 by thirty
times that. VAE and text encoder stay frozen, as in DreamBooth.

``python -m benchmarks.sdmodel`` makes the files, or says where they are. They are kept between runs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from benchmarks.common import bench_folder, say

Shape = tuple[int, ...]
STEP = 2e-5
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@dataclass(frozen=True, slots=True)
class Models:
    """The files: a base, its fine-tune, and the same fine-tune as a torch checkpoint."""

    base: Path
    tuned: Path
    checkpoint: Path


def _affine(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _unet(width: int) -> Iterator[tuple[str, Shape]]:
    """``openaimodel.UNetModel``: multipliers 1, 2, 4, 4, two residual blocks a level, attention at all but the last."""
    embedding, context = 4 * width, 768 * width // 320
    prefix = "model.diffusion_model"

    def residual(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
        yield from _affine(f"{name}.in_layers.0", inputs)
        yield from _affine(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        yield from _affine(f"{name}.emb_layers.1", outputs, embedding)
        yield from _affine(f"{name}.out_layers.0", outputs)
        yield from _affine(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            yield from _affine(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def attention(name: str, c: int) -> Iterator[tuple[str, Shape]]:
        yield from _affine(f"{name}.norm", c)
        yield from _affine(f"{name}.proj_in", c, c, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for which, inputs in (("attn1", c), ("attn2", context)):
            yield f"{block}.{which}.to_q.weight", (c, c)
            yield f"{block}.{which}.to_k.weight", (c, inputs)
            yield f"{block}.{which}.to_v.weight", (c, inputs)
            yield from _affine(f"{block}.{which}.to_out.0", c, c)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * c, c)
        yield from _affine(f"{block}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            yield from _affine(f"{block}.norm{i}", c)
        yield from _affine(f"{name}.proj_out", c, c, 1, 1)

    yield from _affine(f"{prefix}.time_embed.0", embedding, width)
    yield from _affine(f"{prefix}.time_embed.2", embedding, embedding)
    yield from _affine(f"{prefix}.input_blocks.0.0", width, 4, 3, 3)
    skips, channels, at = [width], width, 1
    levels = (width, 2 * width, 4 * width, 4 * width)
    for level, outputs in enumerate(levels):
        for _ in range(2):
            yield from residual(f"{prefix}.input_blocks.{at}.0", channels, outputs)
            if level < 3:
                yield from attention(f"{prefix}.input_blocks.{at}.1", outputs)
            channels = outputs
            skips.append(channels)
            at += 1
        if level < 3:
            yield from _affine(f"{prefix}.input_blocks.{at}.0.op", channels, channels, 3, 3)
            skips.append(channels)
            at += 1
    yield from residual(f"{prefix}.middle_block.0", channels, channels)
    yield from attention(f"{prefix}.middle_block.1", channels)
    yield from residual(f"{prefix}.middle_block.2", channels, channels)
    at = 0
    for level, outputs in reversed(list(enumerate(levels))):
        for i in range(3):
            yield from residual(f"{prefix}.output_blocks.{at}.0", channels + skips.pop(), outputs)
            channels, last = outputs, 1
            if level < 3:
                yield from attention(f"{prefix}.output_blocks.{at}.1", outputs)
                last = 2
            if level and i == 2:
                yield from _affine(f"{prefix}.output_blocks.{at}.{last}.conv", outputs, outputs, 3, 3)
            at += 1
    yield from _affine(f"{prefix}.out.0", width)
    yield from _affine(f"{prefix}.out.2", 4, width, 3, 3)


def _vae(width: int) -> Iterator[tuple[str, Shape]]:
    """``autoencoder.AutoencoderKL`` with multipliers 1, 2, 4, 4 and four latent channels."""
    levels = (width, 2 * width, 4 * width, 4 * width)

    def residual(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
        yield from _affine(f"{name}.norm1", inputs)
        yield from _affine(f"{name}.conv1", outputs, inputs, 3, 3)
        yield from _affine(f"{name}.norm2", outputs)
        yield from _affine(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            yield from _affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def middle(name: str, c: int) -> Iterator[tuple[str, Shape]]:
        yield from residual(f"{name}.block_1", c, c)
        yield from _affine(f"{name}.attn_1.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            yield from _affine(f"{name}.attn_1.{part}", c, c, 1, 1)
        yield from residual(f"{name}.block_2", c, c)

    prefix = "first_stage_model.encoder"
    yield from _affine(f"{prefix}.conv_in", width, 3, 3, 3)
    channels = width
    for level, outputs in enumerate(levels):
        for i in range(2):
            yield from residual(f"{prefix}.down.{level}.block.{i}", channels, outputs)
            channels = outputs
        if level < 3:
            yield from _affine(f"{prefix}.down.{level}.downsample.conv", channels, channels, 3, 3)
    yield from middle(f"{prefix}.mid", channels)
    yield from _affine(f"{prefix}.norm_out", channels)
    yield from _affine(f"{prefix}.conv_out", 8, channels, 3, 3)

    prefix = "first_stage_model.decoder"
    yield from _affine(f"{prefix}.conv_in", channels, 4, 3, 3)
    yield from middle(f"{prefix}.mid", channels)
    for level, outputs in reversed(list(enumerate(levels))):
        for i in range(3):
            yield from residual(f"{prefix}.up.{level}.block.{i}", channels, outputs)
            channels = outputs
        if level:
            yield from _affine(f"{prefix}.up.{level}.upsample.conv", channels, channels, 3, 3)
    yield from _affine(f"{prefix}.norm_out", channels)
    yield from _affine(f"{prefix}.conv_out", 3, channels, 3, 3)
    yield from _affine("first_stage_model.quant_conv", 8, 8, 1, 1)
    yield from _affine("first_stage_model.post_quant_conv", 4, 4, 1, 1)


def _text_encoder(width: int) -> Iterator[tuple[str, Shape]]:
    """``CLIPTextModel`` ViT-L/14: twelve layers, 49,408 tokens, 77 positions."""
    prefix = "cond_stage_model.transformer.text_model"
    yield f"{prefix}.embeddings.position_ids", (1, 77)
    yield f"{prefix}.embeddings.token_embedding.weight", (49408, width)
    yield f"{prefix}.embeddings.position_embedding.weight", (77, width)
    for i in range(12):
        layer = f"{prefix}.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{part}", width, width)
        yield from _affine(f"{layer}.layer_norm1", width)
        yield from _affine(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _affine(f"{layer}.mlp.fc2", width, 4 * width)
        yield from _affine(f"{layer}.layer_norm2", width)
    yield from _affine(f"{prefix}.final_layer_norm", width)


def tensors(shrink: int = 1) -> dict[str, Shape]:
    """Every tensor's name and shape, in the order of the original checkpoint; widths are divided by ``shrink``."""
    found: dict[str, Shape] = dict.fromkeys(BUFFERS, (1000,))
    found.update(_unet(320 // shrink))
    found.update(_vae(128 // shrink))
    found.update(_text_encoder(768 // shrink))
    return found


def make_models(folder: Path, *, shrink: int = 1) -> Models:
    """The three files, from ``folder`` where they are there already. Memory: a few times the largest tensor."""
    folder = folder / ("sd15" if shrink == 1 else f"sd15-{shrink}")
    folder.mkdir(parents=True, exist_ok=True)
    models = Models(folder / "sd15.safetensors", folder / "tuned.safetensors", folder / "tuned.ckpt")
    if not (models.base.exists() and models.tuned.exists()):
        start = time.monotonic()
        say(f"making a model of the shape of SD 1.5, and a fine-tune, in {folder}")
        _write_both(models, tensors(shrink))
        say(f"done in {time.monotonic() - start:.0f} s")
    if not models.checkpoint.exists():
        _write_checkpoint(models, list(tensors(shrink)))
    return models


def _write_both(models: Models, shapes: dict[str, Shape]) -> None:
    # safetensors orders a file by alignment, then name.
    names = sorted(shapes, key=lambda name: (not _is_integer(name), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        nbytes = math.prod(shapes[name]) * (8 if _is_integer(name) else 2)
        dtype = "I64" if _is_integer(name) else "F16"
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [path.with_suffix(".part") for path in (models.base, models.tuned)]
    with parts[0].open("wb") as base, parts[1].open("wb") as tuned:
        for file in (base, tuned):
            file.write(len(text).to_bytes(8, "little") + text)
        for index, name in enumerate(names):
            _write_tensor(base, tuned, name, shapes[name], np.random.default_rng([15, index]))
    parts[0].rename(models.base)
    parts[1].rename(models.tuned)


def _is_integer(name: str) -> bool:
    return name.endswith("position_ids")


def _write_tensor(base: BinaryIO, tuned: BinaryIO, name: str, shape: Shape, rng: np.random.Generator) -> None:
    if _is_integer(name) or name in BUFFERS:
        same = np.arange(shape[-1], dtype="<i8") if _is_integer(name) else _schedule(name, shape[0])
        base.write(same.data)
        tuned.write(same.data)
        return
    weights = _weights(name, shape, rng)
    halves = weights.astype("<f2")
    base.write(halves.data)
    if name.startswith("model.diffusion_model."):
        weights += _steps(shape, rng)
        halves = weights.astype("<f2")
    tuned.write(halves.data)


def _weights(name: str, shape: Shape, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        values *= 1 / math.sqrt(math.prod(shape[1:]))
    else:
        values *= 0.05
        if name.endswith("weight"):
            values += 1  # norms scale by about one
    return values


def _steps(shape: Shape, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Laplace steps of about ``STEP``, times a log-normal factor for the tensor and one for each row."""
    steps = rng.standard_exponential(shape, dtype=np.float32)
    signs = np.unpackbits(rng.integers(0, 256, -(-steps.size // 8), dtype=np.uint8), count=steps.size)
    np.negative(steps, out=steps, where=signs.view(np.bool_).reshape(shape))
    rows = np.exp(rng.normal(rng.normal(0, 0.3), 0.5, shape[0])).astype(np.float32)
    steps *= (STEP * rows).reshape(-1, *[1] * (len(shape) - 1))
    outliers = rng.integers(0, steps.size, steps.size // 500)
    steps.reshape(-1)[outliers] *= 30
    return steps


def _schedule(name: str, count: int) -> npt.NDArray[np.float16]:
    """Something smooth for a buffer of the noise schedule; the base and the fine-tune hold the same."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, count) ** 2
    values = betas if name == "betas" else np.cumprod(1 - betas) ** (1 / (1 + BUFFERS.index(name)))
    return values.astype("<f2")


def _write_checkpoint(models: Models, names: list[str]) -> None:
    import torch
    from safetensors.torch import load_file

    state = load_file(models.tuned)  # mapped: its pages are the page cache's
    part = models.checkpoint.with_suffix(".part")
    torch.save({"state_dict": {name: state[name] for name in names}, "global_step": 840000, "epoch": 0}, part)
    part.rename(models.checkpoint)


def main() -> None:
    """Make the models and list them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where to keep them (default: .bench, HYDRAFS_BENCH)")
    parser.add_argument("--shrink", type=int, default=1, choices=(1, 2, 4, 8), help="divide all widths by this")
    args = parser.parse_args()
    shapes = tensors(args.shrink)
    print(f"{len(shapes)} tensors, {sum(map(math.prod, shapes.values())) / 1e6:.2f} million values")
    models = make_models(bench_folder(args.folder), shrink=args.shrink)
    for path in (models.base, models.tuned, models.checkpoint):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")


if __name__ == "__main__":
    main()
