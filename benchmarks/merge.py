"""The table *merge*: what a merged model costs when its parents are in the store, and how long recognising it takes.

Merges are computed by the programs' own formulas with torch (``tests/merge_oracles.py``), from the pre-trained
MiniLM and two real fine-tunes of it; then one of Stable Diffusion's shape is looked for among many of that shape.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks import minilm
from benchmarks.common import ROOT, bench_folder, link_or_copy, number, print_table, say, write_json
from benchmarks.pairs import STEPS, docstring_pairs, make_pairs
from benchmarks.sdmodel import make_models
from hydrafs import dehydrate as dehydration
from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.matching import match
from hydrafs.opening import Opener
from hydrafs.store import Store

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

KNOWN_PERCENT = 0.2
UNKNOWN_PERCENT = 5.0
BEYOND_SECONDS = 20.0
CANDIDATES = 50
PREFIX = "model."
"""Programs merge only keys that have this in them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One merged model: how it is stored, and what that took. ``plain`` is without looking for a merge."""

    case: str
    precision: str
    size: int
    stored_percent: float
    plain_percent: float
    seconds: float
    plain_seconds: float
    exact: bool
    bound_percent: float
    made_of: str


def cases() -> dict[str, tuple[float, Callable[..., State]]]:
    """Each program's name, the bound for what it stores, and its merge of three state dicts."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import merge_oracles as o  # type: ignore[import-not-found, unused-ignore]

    def stochastic(a: State, b: State, c: State) -> State:
        """A weighted sum that rounds up or down at random: no formula gives its bits."""
        torch.manual_seed(1)

        def rounded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            near = x.to(like.dtype)
            step = torch.where(x > near.double(), torch.inf, -torch.inf).to(like.dtype)
            gap = (torch.nextafter(near, step) - near).abs().double()
            away = torch.rand(x.shape) * gap < (x - near.double()).abs()
            return torch.where(away, torch.nextafter(near, step), near)

        return {
            k: rounded(0.7 * a[k].double() + 0.3 * b[k].double(), a[k]) if a[k].is_floating_point() else a[k] for k in a
        }

    half = torch.float16
    found: dict[str, tuple[float, Any]] = {
        "A1111 weighted sum": (KNOWN_PERCENT, lambda a, b, c: o.a1111_merge(a, b, 0.3)),
        "A1111 weighted sum, torch before 2.1": (
            KNOWN_PERCENT,
            lambda a, b, c: o.a1111_merge(a, b, 0.3, scalars="old"),
        ),
        "A1111 weighted sum, saved as half": (KNOWN_PERCENT, lambda a, b, c: o.a1111_merge(a, b, 0.45, half=True)),
        "A1111 add difference": (KNOWN_PERCENT, lambda a, b, c: o.a1111_merge(a, b, 0.6, c)),
        "seed tool merge": (KNOWN_PERCENT, lambda a, b, c: o.seed_merge(a, b, 0.25)),
        "seed tool unmerge": (KNOWN_PERCENT, lambda a, b, c: o.seed_unmerge(a, b, 0.7)),
        "kohya, three models": (
            KNOWN_PERCENT,
            lambda a, b, c: o.kohya_merge([a, b, c], [0.5, 0.3, 0.2], saving=half),
        ),
        "supermerger": (KNOWN_PERCENT, lambda a, b, c: o.supermerger_lerp(a, b, 0.4)),
        "supermerger add": (KNOWN_PERCENT, lambda a, b, c: o.supermerger_add(a, b, c, 0.4)),
        "sd-mecha": (KNOWN_PERCENT, lambda a, b, c: o.mecha_lerp(a, b, 0.35)),
        "ComfyUI": (KNOWN_PERCENT, lambda a, b, c: o.comfy_merge(a, b, 0.3, PREFIX)),
        "unknown (rounded at random)": (UNKNOWN_PERCENT, stochastic),
    }
    return found


@contextlib.contextmanager
def _no_formulas() -> Iterator[None]:
    """Dehydrating as it is for a model that is no merge."""

    def plain(source: Any, metadata: Any, facts: Any, choice: Any, *rest: Any) -> tuple[list[Any], list[Any]]:
        return list(choice.parents), list(match(facts, [c.facts for c in choice.parents]))

    with mock.patch.object(dehydration, "explained", plain):
        yield


def _timed(model: Path, folder: Path) -> tuple[Outcome, float]:
    with contextlib.closing(Store(folder, create=True)) as store:
        start = time.monotonic()
        outcome = dehydrate(store, model, Options(keep=True))
        return outcome, time.monotonic() - start


def _comes_back(diff: Path, model: Path, folder: Path) -> bool:
    """Whether the diff gives the model's SHA-256, read by a reader of its own."""
    wanted, found = hashlib.sha256(), hashlib.sha256()
    with contextlib.closing(Store(folder)) as store, contextlib.closing(Opener(store, ChunkCache(64 << 20))) as opener:
        source = opener.open_diff(diff)
        try:
            for offset in range(0, source.size, 8 << 20):
                found.update(source.pread(offset, 8 << 20))
        finally:
            source.close()
    with model.open("rb") as file:
        while block := file.read(8 << 20):
            wanted.update(block)
    return found.digest() == wanted.digest()


def measure(case: str, precision: str, model: Path, folder: Path, bound: float) -> Measured:
    """Dehydrates ``model`` in the store ``folder``, without and with formulas; the catalog is warm for both."""
    with _no_formulas():
        outcome, _ = _timed(model, folder)
        if outcome.diff:
            outcome.diff.unlink()
        plain, plain_seconds = _timed(model, folder)
        if plain.diff:
            plain.diff.unlink()
    outcome, seconds = _timed(model, folder)
    exact = outcome.diff is not None and _comes_back(outcome.diff, model, folder)
    if outcome.diff:
        outcome.diff.unlink()
    size = model.stat().st_size
    made_of = "; ".join(reason for reason in outcome.reasons if "exact for" in reason) or "no merge"
    shares = [100 * o.stored_nbytes / size for o in (outcome, plain)]
    return Measured(case, precision, size, *shares, seconds, plain_seconds, exact, bound, made_of)


def _load(path: Path) -> State:
    from safetensors.torch import load_file

    return {PREFIX + k: t for k, t in load_file(path).items()}


def _second_fine_tune(folder: Path, steps: int, precision: str) -> Path:
    """The stronger of the two fine-tunes once more, with its texts in another order."""
    from safetensors.torch import save_file

    path = folder / f"other-2e-5-{precision}.safetensors"
    if not path.exists():
        say(f"fine-tuning all-MiniLM-L6-v2 for {steps} steps at 2e-5, with another seed")
        state = minilm.fine_tune(docstring_pairs(), steps=steps, learning_rate=2e-5, seed=1)
        for each in minilm.PRECISIONS:
            part = folder / f".other-{each}.part"
            save_file(minilm.in_precision(state, each), part, metadata={"format": "pt"})
            part.rename(folder / f"other-2e-5-{each}.safetensors")
    return path


def small_merges(bench: Path, work: Path, steps: int, precisions: Sequence[str]) -> Iterator[Measured]:
    """Every program's merge of MiniLM's fine-tunes."""
    from safetensors.torch import save_file

    pairs = make_pairs(bench, steps=steps)
    for precision in precisions:
        folder = work / precision
        folder.mkdir()
        light, strong = (p for p in pairs if p.precision == precision)
        other = _second_fine_tune(strong.base.parent, steps, precision)
        states = {"a": _load(strong.tuned), "b": _load(other), "c": _load(strong.base)}
        save_file(_load(light.tuned), folder / "nearly c.safetensors")
        for name, state in states.items():
            save_file(state, folder / f"{name}.safetensors")
        for case, (bound, merge) in cases().items():
            if "half" in case and precision != "fp32":
                continue
            model = folder / "merged.safetensors"
            save_file({k: t.contiguous() for k, t in merge(*states.values()).items()}, model)
            say(f"{case}, {precision}")
            yield measure(case, precision, model, folder, bound)
            model.unlink()


def large_merge(bench: Path, work: Path, shrink: int, candidates: int) -> Measured:
    """A1111's weighted sum of two models of Stable Diffusion's shape, among ``candidates`` models of that shape."""
    import torch
    from safetensors.torch import load_file, save_file

    models = make_models(bench, shrink=shrink)
    folder = work / "many"
    folder.mkdir()
    link_or_copy(models.base, folder / "base.safetensors")
    link_or_copy(models.tuned, folder / "tuned.safetensors")
    base = load_file(models.base)
    say(f"making {candidates - 2} more of {models.base.stat().st_size / 1e6:.0f} MB each")
    for i in range(candidates - 2):
        torch.manual_seed(i)
        moved = {
            k: t + torch.randn(t.shape, dtype=torch.float32).mul_(2e-3 * float(t.float().std())).half()
            if k.startswith("model.diffusion_model.") and t.dim() > 1
            else t
            for k, t in base.items()
        }
        save_file(moved, folder / f"other{i}.safetensors")
        if i == 0:
            other = moved
    model = folder / "merged.safetensors"
    merge = cases()["A1111 weighted sum"][1]
    save_file({k: t.contiguous() for k, t in merge(load_file(models.tuned), other, base).items()}, model)
    say("dehydrating")
    return measure(f"A1111 weighted sum, {candidates} candidates", "fp16", model, folder, KNOWN_PERCENT)


def print_results(results: Sequence[Measured]) -> None:
    """The table."""
    rows = []
    for r in results:
        beyond = r.seconds - r.plain_seconds
        met = r.stored_percent <= r.bound_percent and r.exact and (r.size < 1e8 or beyond <= BEYOND_SECONDS)
        rows.append(
            [
                f"{r.case}, {r.precision}",
                number(r.size / 1e6),
                number(r.stored_percent, 3),
                number(r.plain_percent, 1),
                number(beyond, 2),
                number(r.plain_seconds, 2),
                "exact" if r.exact else "WRONG",
                f"{r.bound_percent:g} % {'met' if r.made_of and met else 'NOT met'}",
            ]
        )
    header = ["merge", "MB", "stored %", "plain %", "beyond s", "plain s", "read back", "bound"]
    print_table("merge: models whose parents are in the store", header, rows)
    print()
    for r in results:
        print(f"{r.case}, {r.precision}: {r.made_of}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to keep models (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of MiniLM's fine-tunes")
    parser.add_argument("--part", choices=("small", "large"), default=None, help="one half of the table")
    parser.add_argument("--precision", choices=("fp16", "fp32", "bf16"), action="append")
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--shrink", type=int, default=4, choices=(1, 2, 4, 8), help="of the large models' widths")
    parser.add_argument("--quick", action="store_true", help="tiny models, to test the benchmark itself")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers here too (- for stdout)")
    args = parser.parse_args()
    bench = bench_folder(args.folder)
    work = Path(tempfile.mkdtemp(prefix="merge-", dir=bench))
    results: list[Measured] = []
    try:
        if args.part != "large":
            precisions = args.precision or (["fp16"] if args.quick else ["fp16", "fp32"])
            results += small_merges(bench, work, 4 if args.quick else args.steps, precisions)
        if args.part != "small":
            shrink, candidates = (8, 6) if args.quick else (args.shrink, args.candidates)
            results.append(large_merge(bench, work, shrink, candidates))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print_results(results)
    write_json(args.json, [asdict(r) for r in results])


if __name__ == "__main__":
    main()
