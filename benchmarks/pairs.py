"""The MiniLM pair: the base and two real fine-tunes of it, 400 AdamW steps at 1e-6 and at 2e-5, in three precisions.

``python -m benchmarks.pairs`` makes the files, or says where they are. They are kept between runs.
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks import minilm
from benchmarks.common import bench_folder, say

LEARNING_RATES = ("1e-6", "2e-5")
STEPS = 400


@dataclass(frozen=True, slots=True)
class Pair:
    """One fine-tune and its base, in the same precision."""

    name: str
    precision: str
    base: Path
    tuned: Path


def make_pairs(folder: Path, *, steps: int = STEPS) -> list[Pair]:
    """The six pairs, from ``folder`` where they are there already."""
    from safetensors.torch import save_file

    folder = folder / (f"minilm-{steps}")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        Pair(f"{rate} {p}", p, folder / f"base-{p}.safetensors", folder / f"tuned-{rate}-{p}.safetensors")
        for rate in LEARNING_RATES
        for p in minilm.PRECISIONS
    ]

    def save(state: minilm.State, stem: str) -> None:
        for precision in minilm.PRECISIONS:
            temporary = folder / f".{stem}-{precision}.part"
            save_file(minilm.in_precision(state, precision), temporary, metadata={"format": "pt"})
            temporary.rename(folder / f"{stem}-{precision}.safetensors")

    if not all(p.base.exists() for p in pairs):
        save(minilm.base_state(), "base")
    for rate in LEARNING_RATES:
        if all(p.tuned.exists() for p in pairs if p.name.startswith(rate)):
            continue
        start = time.monotonic()
        say(f"fine-tuning all-MiniLM-L6-v2 for {steps} steps at {rate}")
        save(minilm.fine_tune(docstring_pairs(), steps=steps, learning_rate=float(rate)), f"tuned-{rate}")
        say(f"done in {time.monotonic() - start:.0f} s")
    return pairs


def docstring_pairs() -> list[tuple[str, str]]:
    """Neighbouring sentences of the standard library's docstrings: real English that every Python brings along."""
    found: dict[tuple[str, str], None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for text in _docstrings(path):
            sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
            sentences = [s for s in sentences if len(s) >= 25 and s.count(" ") >= 4]
            found.update(dict.fromkeys(pairwise(sentences)))
    return list(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def main() -> None:
    """Make the pairs and list them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where to keep them (default: .bench, HYDRAFS_BENCH)")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    for pair in make_pairs(bench_folder(args.folder), steps=args.steps):
        print(f"{pair.name:>10}  {pair.tuned.stat().st_size / 1e6:6.1f} MB  {pair.tuned}")


if __name__ == "__main__":
    main()
