"""Merges are found and cost next to nothing: each program's arithmetic, with the parents in the store among others."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_oracles as oracles
import numpy as np
import pytest
import torch
from merge_oracles import Tensors
from safetensors.torch import save_file
from torch import nn

from hydrafs import merging, recognising
from hydrafs.cache import ChunkCache
from hydrafs.cli import main
from hydrafs.dehydrate import Options
from hydrafs.dehydrate import dehydrate as api_dehydrate
from hydrafs.errors import HydraError
from hydrafs.opening import Opener
from hydrafs.recognising import Hints, hints_of
from hydrafs.store import Store

SIZE = 224
UNET = "model.diffusion_model."
NAMES = [
    *(f"{UNET}input_blocks.{i}.1.transformer_blocks.0.attn1.to_q.weight" for i in range(1, 12)),
    f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    *(f"{UNET}output_blocks.{i}.1.transformer_blocks.0.attn1.to_q.weight" for i in range(12)),
    *(f"cond_stage_model.transformer.text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(6)),
]
FROZEN = [f"first_stage_model.decoder.up.{i}.block.0.conv1.weight" for i in range(3)]


class _Network(nn.Module):
    def __init__(self, start: Tensors) -> None:
        super().__init__()
        self.layers = nn.ParameterList(start[name].clone() for name in NAMES)
        self.first = nn.Parameter(start[f"{UNET}input_blocks.0.0.weight"].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + nn.functional.conv2d(x.reshape(-1, 4, 14, 4), self.first, padding=1).mean(1).flatten(1).repeat(1, 4)
        for layer in self.layers:
            x = x + torch.tanh(x @ layer.T) * 0.2
        return x

    def state(self, start: Tensors) -> Tensors:
        found = dict(start)
        found.update({n: p.detach().clone() for n, p in zip(NAMES, self.layers, strict=True)})
        found[f"{UNET}input_blocks.0.0.weight"] = self.first.detach().clone()
        return found


def _start() -> Tensors:
    torch.manual_seed(11)
    found: Tensors = {f"{UNET}input_blocks.0.0.weight": torch.randn(64, 4, 3, 3) * 0.1}
    for name in NAMES + FROZEN:
        found[name] = torch.randn(SIZE, SIZE) * torch.exp(torch.randn(SIZE, 1) * 0.4) * 0.05
    found[oracles.POSITION_IDS] = torch.arange(77)[None]
    return found


def tuned(start: Tensors, seed: int, rate: float = 2e-4, steps: int = 8) -> Tensors:
    """``start`` after a few real AdamW steps towards something that depends on the seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = _Network(start)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    goal = torch.randn(SIZE, SIZE) * 0.1
    for _ in range(steps):
        x = torch.randn(32, SIZE)
        loss = (network(x) - x @ goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state(start)


@pytest.fixture(scope="module")
def family() -> dict[str, Tensors]:
    base = _start()
    found = {"base": base}
    for seed, name in enumerate(("a", "b", "c", "d", "decoy1", "decoy2"), 1):
        found[name] = tuned(base, seed)
    return found


def typed(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path


def run(*arguments: object) -> Any:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue()) if "--json" in arguments else out.getvalue()


def dehydrated(model: Path, *options: object) -> dict[str, Any]:
    """What dehydrating says, after the model has come back bit for bit."""
    before = hashlib.sha256(model.read_bytes()).hexdigest()
    outcome: dict[str, Any] = run("dehydrate", model, "--json", "--jobs", 2, *options)[0]
    assert outcome["diff"], outcome
    back = model.with_name("back.bin")
    run("rehydrate", outcome["diff"], "--output", back)
    assert hashlib.sha256(back.read_bytes()).hexdigest() == before
    back.unlink()
    return outcome


def stored(outcome: dict[str, Any]) -> float:
    return float(outcome["stored"]) / float(outcome["size"])


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
WEIGHTS = {block: 0.05 * (i % 19 + 1) for i, block in enumerate(oracles.BLOCKS)}

PROGRAMS: dict[str, tuple[torch.dtype, str, float, Callable[..., Tensors]]] = {
    "a1111": (HALF, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.a1111_merge(a, b, 0.3)),
    "a1111 old": (
        HALF,
        "torch before 2.1",
        0.002,
        lambda a, b, c, d: oracles.a1111_merge(a, b, 0.3, scalars="old"),
    ),
    "a1111 fp32": (FULL, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.a1111_merge(a, b, 0.45)),
    "a1111 half": (FULL, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.a1111_merge(a, b, 0.7, half=True)),
    "a1111 bf16": (BRAIN, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.a1111_merge(a, b, 0.35)),
    "a1111 odd": (HALF, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.a1111_merge(a, b, 0.123)),
    "a1111 difference": (
        HALF,
        "A1111 add difference",
        0.002,
        lambda a, b, c, d: oracles.a1111_merge(a, b, 0.6, c),
    ),
    "a1111 whole difference": (
        HALF,
        "A1111 add difference",
        0.002,
        lambda a, b, c, d: oracles.a1111_merge(a, b, 1.0, c),
    ),
    "a1111 difference old": (
        HALF,
        "torch before 2.1",
        0.002,
        lambda a, b, c, d: oracles.a1111_merge(a, b, 0.6, c, scalars="old"),
    ),
    "seed": (HALF, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.seed_merge(a, b, 0.25)),
    "seed unmerge": (HALF, "unmerge", 0.002, lambda a, b, c, d: oracles.seed_unmerge(a, b, 0.7)),
    "kohya": (
        HALF,
        "kohya merge",
        0.002,
        lambda a, b, c, d: oracles.kohya_merge([a, b], [0.6, 0.4], saving=HALF),
    ),
    "kohya fp16": (
        FULL,
        "kohya merge",
        0.002,
        lambda a, b, c, d: oracles.kohya_merge([a, b], [0.6, 0.4], precision=HALF, saving=HALF),
    ),
    "kohya three": (
        HALF,
        "kohya merge",
        0.002,
        lambda a, b, c, d: oracles.kohya_merge([b, c, a], [0.5, 0.3, 0.2], saving=HALF),
    ),
    "kohya four": (
        HALF,
        "kohya merge",
        0.002,
        lambda a, b, c, d: oracles.kohya_merge([d, b, c, a], [0.4, 0.3, 0.2, 0.1], saving=HALF),
    ),
    "kohya free": (
        HALF,
        "kohya merge",
        0.002,
        lambda a, b, c, d: oracles.kohya_merge([a, b], [0.6, 0.45], saving=HALF),
    ),
    "block weights": (HALF, "A1111 weighted sum", 0.002, lambda a, b, c, d: oracles.mbw_merge(a, b, WEIGHTS)),
    "supermerger lerp": (HALF, "supermerger lerp", 0.002, lambda a, b, c, d: oracles.supermerger_lerp(a, b, 0.4)),
    "supermerger lerp fp32": (FULL, "supermerger lerp", 0.002, lambda a, b, c, d: oracles.supermerger_lerp(a, b, 0.4)),
    "supermerger blocks": (
        HALF,
        "supermerger lerp",
        0.002,
        lambda a, b, c, d: oracles.supermerger_lerp(a, b, WEIGHTS),
    ),
    "supermerger add": (HALF, "supermerger add", 0.002, lambda a, b, c, d: oracles.supermerger_add(a, b, c, 0.4)),
    "supermerger add native": (
        HALF,
        "",
        0.002,
        lambda a, b, c, d: oracles.supermerger_add(a, b, c, 0.4, native=True),
    ),
    "sd-mecha": (FULL, "sd-mecha lerp", 0.002, lambda a, b, c, d: oracles.mecha_lerp(a, b, 0.3)),
    "comfy": (HALF, "kohya merge", 0.002, lambda a, b, c, d: oracles.comfy_merge(a, b, 0.3)),
    "double precision": (
        FULL,
        "double precision",
        0.05,
        lambda a, b, c, d: {
            k: (a[k].double() * 0.3 + b[k].double() * 0.7).float() if a[k].is_floating_point() else a[k] for k in a
        },
    ),
    "unknown rounding": (
        HALF,
        "",
        0.05,
        lambda a, b, c, d: {
            k: (a[k].bfloat16() * 0.0 + (a[k].double() * 3.1 + b[k].double() * 6.9) / 10).half()
            if a[k].is_floating_point()
            else a[k]
            for k in a
        },
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_programs_merge_is_found(program: str, family: dict[str, Tensors], store: Path) -> None:
    dtype, label, bound, merge = PROGRAMS[program]
    parents = {name: typed(tensors, dtype) for name, tensors in family.items()}
    for name, tensors in parents.items():
        save(store / f"{name}.safetensors", tensors)
    model = save(store / "merged.safetensors", merge(*(parents[n] for n in "abcd")))
    outcome = dehydrated(model)
    assert stored(outcome) <= bound
    facts = run("info", outcome["diff"], "--json")
    assert facts["made_of"] == outcome["reasons"][-len(facts["made_of"]) :]
    print(program, f"{stored(outcome):.4%}", facts["made_of"])
    assert label in facts["made_of"][0]


def lora_for(base: Tensors, *, rank: int = 8, naming: str = "kohya") -> Tensors:
    """A LoRA of some of the modules, its factors of the size that training gives them."""
    torch.manual_seed(5)
    found: Tensors = {}
    for name in NAMES:
        module = name.removesuffix(".weight")
        up, down = torch.randn(SIZE, rank) * 0.01, torch.randn(rank, SIZE) * 0.05
        if naming == "peft":
            short = module.removeprefix(UNET).removeprefix("cond_stage_model.transformer.")
            found[f"base_model.model.{short}.lora_A.weight"] = down
            found[f"base_model.model.{short}.lora_B.weight"] = up
            continue
        if naming == "nameless":
            flat = f"module_{len(found)}"
        elif module.startswith(UNET):
            flat = "lora_unet_" + module.removeprefix(UNET).replace(".", "_")
        else:
            flat = "lora_te_" + module.removeprefix("cond_stage_model.transformer.").replace(".", "_")
        found[f"{flat}.lora_up.weight"] = up
        found[f"{flat}.lora_down.weight"] = down
        found[f"{flat}.alpha"] = torch.tensor(rank / 2)
    conv = "lora_unet_input_blocks_0_0"
    if naming == "kohya":
        found[f"{conv}.lora_up.weight"] = torch.randn(64, 4, 1, 1) * 0.02
        found[f"{conv}.lora_down.weight"] = torch.randn(4, 4, 3, 3) * 0.1
    return typed(found, HALF)


def baked(base: Tensors, lora: Tensors, strength: float, naming: str) -> Tensors:
    """The base with the LoRA added in float32, whatever its modules are called."""
    if naming == "kohya":
        return oracles.lora_baked(base, lora, strength)
    ups = [t for name, t in lora.items() if name.endswith(("lora_up.weight", "lora_B.weight"))]
    downs = [t for name, t in lora.items() if name.endswith(("lora_down.weight", "lora_A.weight"))]
    ratio = 0.5 if naming == "nameless" else 1.0
    result = dict(base)
    for name, up, down in zip(NAMES, ups, downs, strict=True):
        added = strength * (up.float() @ down.float()) * ratio
        result[name] = (base[name].float() + added).to(base[name].dtype)
    return result


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=["fp16", "fp32"])
@pytest.mark.parametrize("naming", ["kohya", "peft", "nameless"])
@pytest.mark.parametrize("named", [False, True])
def test_a_lora_that_was_baked_in(
    family: dict[str, Tensors], store: Path, tmp_path: Path, dtype: torch.dtype, naming: str, named: bool
) -> None:
    where = tmp_path / "elsewhere" if named else store
    where.mkdir(exist_ok=True)
    base, lora = typed(family["a"], dtype), lora_for(family["a"], naming=naming)
    save(where / "a.safetensors", base)
    save(where / "style.safetensors", lora)
    save(store / "decoy.safetensors", typed(family["b"], dtype))
    model = save(store / "baked.safetensors", baked(base, lora, 0.8, naming))
    given = ["--base", where / "a.safetensors", "--base", where / "style.safetensors"] if named else []
    outcome = dehydrated(model, *given)
    assert stored(outcome) <= 0.05
    text = "a.safetensors + style.safetensors (LoRA, strength 0.8)"
    assert any(reason.startswith(text) for reason in outcome["reasons"])
    assert text in run("info", outcome["diff"])
    print(naming, dtype, f"{stored(outcome):.3%}", outcome["reasons"][-1])


def fill(store: Path, family: dict[str, Tensors], dtype: torch.dtype = HALF) -> dict[str, Tensors]:
    parents = {name: typed(tensors, dtype) for name, tensors in family.items()}
    for name, tensors in parents.items():
        save(store / f"{name}.safetensors", tensors)
    return parents


def test_parents_may_be_diffs_themselves(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, {name: family[name] for name in ("base", "a", "b", "decoy1")})
    for name in ("a", "b"):
        assert dehydrated(store / f"{name}.safetensors", "--base", store / "base.safetensors")["original_removed"]
    model = save(store / "merged.safetensors", oracles.a1111_merge(parents["a"], parents["b"], 0.3))
    outcome = dehydrated(model)
    assert stored(outcome) <= 0.002
    assert sorted(outcome["parents"]) == ["a.safetensors", "b.safetensors"]


def test_a_recipe_in_the_metadata_names_parents_and_numbers(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, family)
    digests = {n: hashlib.sha256((store / f"{n}.safetensors").read_bytes()).hexdigest() for n in "ab"}
    recipe = {
        "type": "webui",
        "primary_model_hash": digests["a"],
        "secondary_model_hash": digests["b"],
        "tertiary_model_hash": None,
        "interp_method": "Weighted sum",
        "multiplier": 0.31415,
        "save_as_half": False,
    }
    models = {d: {"name": f"{n}.safetensors", "legacy_hash": "0", "sd_merge_recipe": None} for n, d in digests.items()}
    strings = {"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(models)}
    hints = hints_of(tuple(strings.items()))
    assert hints.sha256s == {bytes.fromhex(d) for d in digests.values()}
    assert hints.names == {"a.safetensors", "b.safetensors"}
    assert hints.numbers[0] == 0.31415
    merged = oracles.a1111_merge(parents["a"], parents["b"], 0.31415)
    outcome = dehydrated(save(store / "merged.safetensors", merged, strings))
    assert stored(outcome) <= 0.002
    assert "0.68585 x a.safetensors + 0.31415 x b.safetensors" in outcome["reasons"][-1]


@pytest.mark.parametrize(
    "strings",
    [
        {"sd_merge_recipe": "{", "sd_merge_models": "[" * 20_000},
        {"sd_merge_recipe": "[1]", "sd_merge_models": '{"x": 3, "y": {"name": 4}}'},
        {"sd_merge_recipe": '{"primary_model_hash": "zz", "multiplier": 1e300}'},
        {"sd_merge_recipe": '{"multiplier": "x"}'},
    ],
)
def test_a_recipe_that_is_none_is_no_recipe(strings: dict[str, str]) -> None:
    assert hints_of(tuple(strings.items())) == Hints()


def test_numbers_that_are_none_and_whole_tensors_come_back(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, {name: family[name] for name in ("base", "decoy1")})
    a, b = (typed(family[n], HALF) for n in "ab")
    for tensors, value in ((a, float("nan")), (b, float("inf"))):
        tensors[NAMES[3]][5, ::7] = value
        tensors["model.steps"] = torch.tensor([3, 2**40])
    for name, tensors in (("a", a), ("b", b)):
        save(store / f"{name}.safetensors", tensors)
    parents |= {"a": a, "b": b}
    outcome = dehydrated(save(store / "merged.safetensors", oracles.seed_merge(a, b, 0.25)))
    assert stored(outcome) <= 0.002
    assert sorted(outcome["parents"]) == ["a.safetensors", "b.safetensors"]


def test_a_fine_tune_is_no_merge(family: dict[str, Tensors], store: Path) -> None:
    fill(store, family)
    model = save(store / "tuned.safetensors", typed(tuned(family["base"], 77), HALF))
    outcome = dehydrated(model)
    assert len(outcome["parents"]) == 1
    assert run("info", outcome["diff"], "--json")["made_of"] == []


def test_models_of_another_architecture_explain_nothing(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, {name: family[name] for name in ("base", "a", "b")})
    torch.manual_seed(3)
    for name in ("other1", "other2"):
        save(store / f"{name}.safetensors", {f"layers.{i}.weight": torch.randn(300, 200) for i in range(9)})
        odd = {k: torch.randn(*(n + 1 for n in t.shape)) for k, t in parents["a"].items() if t.is_floating_point()}
        save(store / f"{name}-odd.safetensors", odd)
    merged = oracles.a1111_merge(parents["a"], parents["b"], 0.5)
    alone = save(store / "alone.safetensors", {f"x.{i}": torch.randn(300, 200).half() for i in range(4)})
    assert dehydrated(alone)["parents"] == []
    assert stored(dehydrated(save(store / "merged.safetensors", merged))) <= 0.002


def test_a_copy_of_the_model_and_of_a_parent_do_not_mislead(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, {name: family[name] for name in ("base", "a", "b", "decoy1")})
    save(store / "a again.safetensors", parents["a"])
    merged = oracles.a1111_merge(parents["a"], parents["b"], 0.3)
    one = save(store / "one.safetensors", merged)
    assert stored(dehydrated(one)) <= 0.002
    # The same bytes once more: the diff of the first is a copy, and no parent of this one.
    two = save(store / "two.safetensors", merged)
    assert stored(dehydrated(two)) <= 0.002


def test_block_weights_beside_blocks_that_are_left_alone(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, family)
    weights = dict.fromkeys(oracles.BLOCKS, 0.0) | {"IN04": 0.35, "OUT07": 1.0, "M00": 0.5}
    merged = oracles.supermerger_lerp(parents["a"], parents["b"], weights)
    outcome = dehydrated(save(store / "merged.safetensors", merged))
    assert stored(outcome) <= 0.002


def test_the_best_of_sixty_models_is_found_quickly(family: dict[str, Tensors], store: Path) -> None:
    parents = fill(store, family)
    generator = torch.Generator().manual_seed(9)
    for i in range(60):
        moved = {
            k: (t.float() + 1e-3 * torch.randn(t.shape, generator=generator)).half() if t.dtype == HALF else t
            for k, t in parents["base"].items()
        }
        save(store / f"near{i}.safetensors", moved)
    model = save(store / "merged.safetensors", oracles.a1111_merge(parents["a"], parents["b"], 0.6, parents["c"]))
    dehydrated(save(store / "other.safetensors", parents["d"]))  # what is known of the models is known from here on
    start = time.monotonic()
    outcome = run("dehydrate", model, "--json", "--jobs", 2)[0]
    taken = time.monotonic() - start
    assert stored(outcome) <= 0.002
    assert taken < 10


def test_least_squares_finds_who_is_in_a_sum() -> None:
    rng = np.random.default_rng(4)
    base = rng.standard_normal((6, 256))
    models = [base + 0.01 * rng.standard_normal(base.shape) for _ in range(12)]
    for members, weights in (
        ((3, 8), (0.3, 0.7)),
        ((1, 4, 7), (1.0, 0.6, -0.6)),
        ((0, 5, 9, 11), (0.1, 0.2, 0.3, 0.4)),
    ):
        target = sum(w * models[m] for m, w in zip(members, weights, strict=True)).astype(np.float16)
        gram = np.stack(
            [
                merging.grams(
                    row.astype(np.float64), [m[i] for m in models], merging.noise_of(row.astype(float), "F16")
                )
                for i, row in enumerate(target)
            ]
        )
        found = merging.find_parents(gram, 256)
        assert found[0].members == members
        fit = merging.fit(gram, np.array([members], np.intp), 256.0)
        assert np.allclose(fit.weights[:, 0], weights, atol=0.02)
        assert (np.abs(fit.weights[:, 0] - weights) < 6 * fit.deviations[:, 0]).all()
    assert merging.find_parents(np.zeros((3, 1, 1)), 256) == []
    alone = np.stack([merging.grams(r, [m[i] for m in models], 1e-6) for i, r in enumerate(base + 0.1)])
    assert all(subset.bits < subset.alone_bits for subset in merging.find_parents(alone, 256))


def test_round_numbers_come_first() -> None:
    assert merging.snaps(0.3004, 0.001)[0] == 0.3
    assert 0.123 in merging.snaps(0.1231, 0.0001)
    assert merging.snaps(0.31, 0.001, hints=[0.3101])[0] == 0.3101
    assert merging.snaps(0.123456, 1e-9)[-1] == 0.123456
    assert 1 / 3 in merging.snaps(0.33334, 0.0001)


@pytest.mark.parametrize("which", ["a", "b", "base"])
@pytest.mark.parametrize("nbytes", [0, 4096, 100_000])
def test_a_model_that_is_cut_while_it_is_compared(
    family: dict[str, Tensors], store: Path, monkeypatch: pytest.MonkeyPatch, which: str, nbytes: int
) -> None:
    """What was known of it when it was chosen is not what is read: others serve, or it is said what happened."""
    parents = fill(store, {name: family[name] for name in ("base", "a", "b", "decoy1")})
    model = save(store / "merged.safetensors", oracles.a1111_merge(parents["a"], parents["b"], 0.3))
    before = model.read_bytes()
    find = recognising._find

    def cut_first(*arguments: Any) -> Any:
        os.truncate(store / f"{which}.safetensors", nbytes)
        return find(*arguments)

    monkeypatch.setattr(recognising, "_find", cut_first)
    with contextlib.closing(Store(store, create=True)) as opened:
        try:
            outcome = api_dehydrate(opened, model, Options(jobs=1))
        except HydraError:
            outcome = None
        if outcome is not None and outcome.original_removed:
            opener = Opener(opened, ChunkCache(1 << 20))
            with contextlib.closing(opener), contextlib.closing(opener.open(opened.locate(model))) as source:
                assert source.pread(0, source.size) == before
        else:
            assert model.read_bytes() == before
