"""Merge, unmerge, strength, graft, conversion: the values of the programs that people know, virtual or real."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, ModelMaker, Tensors
from merge_oracles import POSITION_IDS, a1111_merge, seed_add, seed_merge, seed_subtract, seed_unmerge
from mounts import hydrafs
from safetensors.torch import load_file
from test_cli import Ran, Run, bad, good, run

from hydrafs import assembling, containers
from hydrafs.diff import DiffFile
from hydrafs.layout import BytesSource
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_SAME

__all__ = ["run"]  # a fixture

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def sd_like(tensors: Tensors, *, channels: int = 4, seed: int = 0) -> Tensors:
    """A small network's weights under names that merging programs look at, and what else a checkpoint holds."""
    generator = torch.Generator().manual_seed(seed)
    dtype = tensors["up.weight"].dtype
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    found[CONV_IN] = torch.randn(32, channels, 3, 3, generator=generator).to(dtype)
    found["first_stage_model.decoder.weight"] = torch.linspace(-1, 1, 3000).to(dtype)
    found[POSITION_IDS] = torch.arange(77)[None]
    found["betas"] = torch.linspace(0, 1, 50)
    return found


def third(models: ModelMaker, dtype: str) -> Tensors:
    """Another fine-tune of the same base: its difference turned over."""
    base, tuned = models.base("fp32"), models.tuned("fp32")
    moved = {k: 2 * base[k] - tuned[k] if base[k].is_floating_point() else base[k] for k in base}
    return models.cast(moved, dtype)


def load(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert zipfile.ZipFile(path).testzip() is None
    tensors = loaded["state_dict"]
    assert isinstance(tensors, dict)
    return tensors


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert list(got) == list(expected) or set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*raw), name


Make = Callable[..., Tensors]


@pytest.fixture
def make(run: Run, store: Path) -> Make:
    """Run a command twice, virtual and real; the tensors, once the two were found to be the same file."""

    def make_(*arguments: object, name: str = "made.safetensors") -> Tensors:
        virtual, real = store / name, store.parent / name
        facts = good(run(*arguments, "--virtual", virtual, "--json")).json
        assert facts["path"] == str(virtual)
        assert not virtual.exists()
        written = good(run(*arguments, "--output", real, "--json")).json
        digest = hashlib.sha256(real.read_bytes()).hexdigest()
        assert facts["sha256"] == written["sha256"] == digest
        rehydrated = store.parent / ("again-" + name)
        good(run("rehydrate", virtual, "--output", rehydrated))
        assert rehydrated.read_bytes() == real.read_bytes()
        # The container is one that any parser takes for what it was meant to be.
        layout = containers.parse_strict(BytesSource(real.read_bytes()))
        assert layout.container == assembling.container_for(name)
        return load(real)

    return make_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["made.safetensors", "made.ckpt"])
class TestMerge:
    @pytest.mark.parametrize("alpha", [0.5, 0.3, 0.85])
    def test_as_the_seed_tool(
        self, make: Make, models: ModelMaker, store: Path, dtype: str, name: str, alpha: float
    ) -> None:
        a, b = sd_like(models.tuned(dtype)), sd_like(third(models, dtype), seed=1)
        b["model.of_b_alone"] = torch.ones(500, dtype=DTYPES[dtype])
        b["of b, and no key of a model's".replace("model", "")] = torch.ones(5)
        paths = [models.save(store / "a.safetensors", a), models.save(store / "b.ckpt", b, wrap=True)]
        got = make("merge", *paths, "--alpha", alpha, name=name)
        assert_same(got, seed_merge(load_file(paths[0]), b, alpha))

    def test_add_difference_as_a1111(self, make: Make, models: ModelMaker, store: Path, dtype: str, name: str) -> None:
        a, b, c = (
            sd_like(models.tuned(dtype)),
            sd_like(third(models, dtype), seed=1),
            sd_like(models.base(dtype), seed=2),
        )
        del c["model.diffusion_model.down.bias"]
        paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("abc", (a, b, c), strict=True)]
        got = make("merge", *paths[:2], "--add-difference", paths[2], "--alpha", 0.7, name=name)
        assert_same(got, a1111_merge(a, b, 0.7, c))

    def test_half(self, make: Make, models: ModelMaker, store: Path, dtype: str, name: str) -> None:
        a, b = sd_like(models.tuned(dtype)), sd_like(third(models, dtype), seed=1)
        paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("ab", (a, b), strict=True)]
        got = make("merge", *paths, "--alpha", 0.4, "--half", name=name)
        want = a1111_merge(a, b, 1 - 0.4, half=True)  # its multiplier is B's share
        want[POSITION_IDS] = got[POSITION_IDS]  # left alone there, merged in the seed tool
        assert_same(got, want)

    def test_inpainting(self, make: Make, models: ModelMaker, store: Path, dtype: str, name: str) -> None:
        a, b = sd_like(models.tuned(dtype), channels=9), sd_like(third(models, dtype), seed=1)
        c = sd_like(models.base(dtype), seed=2)
        paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("abc", (a, b, c), strict=True)]
        got = make("merge", *paths[:2], "--add-difference", paths[2], "--half", name=name)
        assert_same(got, a1111_merge(a, b, 0.5, c, half=True))


@pytest.mark.parametrize("dtypes", [("fp16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_merge_of_two_precisions(make: Make, models: ModelMaker, store: Path, dtypes: tuple[str, str]) -> None:
    a, b = sd_like(models.tuned(dtypes[0])), sd_like(third(models, dtypes[1]), seed=1)
    paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("ab", (a, b), strict=True)]
    assert_same(make("merge", *paths, "--alpha", 0.3), seed_merge(a, b, 0.3))


LANGUAGE = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
"""Names of a language model's tensors: its head has no "model" in it."""


class TestWhoTakesPart:
    """By default no tensor stays as it is because of its name, but where A1111 does so, and never silently."""

    @pytest.mark.parametrize(
        "names",
        [
            LANGUAGE,
            ("model.embed_tokens.weight", "score.weight", "mm_projector.0.weight"),
            ("transformer.h.0.weight", "lm_head.weight", "visual_model.proj.weight"),
            ("vision_model.post_layernorm.weight", "visual_projection.weight", "logit_scale_up"),
            ("model.encoder.embed_positions.weight", "proj_out.weight"),
        ],
    )
    @pytest.mark.parametrize("how", ["merge", "difference", "unmerge", "strength"])
    def test_models_that_are_no_stable_diffusion(
        self, run: Run, models: ModelMaker, store: Path, names: tuple[str, ...], how: str
    ) -> None:
        torch.manual_seed(3)
        parts = [{name: torch.randn(24, 48) for name in names} for _ in range(3)]
        a, b, c = (models.save(store / f"{n}.safetensors", t) for n, t in zip("abc", parts, strict=True))
        commands = {
            "merge": ("merge", a, b, "--alpha", 0.25),
            "difference": ("merge", a, b, "--add-difference", c),
            "unmerge": ("unmerge", a, b),
            "strength": ("rehydrate", a, "--base", b, "--strength", 0.5),
        }
        facts = good(run(*commands[how], "--json", "--output", store / "made.safetensors")).json
        made = load(store / "made.safetensors")
        assert facts["as_they_are"] == []
        assert set(made) == set(names)
        assert not [name for name in names if torch.equal(made[name], parts[0][name])]

    def test_what_stays_is_named(self, run: Run, models: ModelMaker, store: Path) -> None:
        names = ("model.diffusion_model.out.weight", "first_stage_model.x.weight", "alphas_cumprod", "betas")
        a = models.save(store / "a.safetensors", {name: torch.randn(24, 48) for name in names})
        b = models.save(store / "b.safetensors", {name: torch.randn(24, 48) for name in (*names, "log_betas")})
        made = store / "made.safetensors"
        facts = good(run("merge", a, b, "--json", "--virtual", made)).json
        assert facts["as_they_are"] == ["alphas_cumprod", "betas", "log_betas"]
        (store / "made.safetensors.hydra").unlink()
        out = good(run("merge", a, b, "--virtual", made)).out
        assert "2 tensors of a.safetensors as they are: alphas_cumprod, betas" in out
        assert "log_betas" in out
        (store / "made.safetensors.hydra").unlink()
        facts = good(run("merge", a, b, "--json", "--keys", "model", "--virtual", made)).json
        assert facts["as_they_are"] == ["alphas_cumprod", "betas", "log_betas"]
        (store / "made.safetensors.hydra").unlink()
        assert good(run("merge", a, b, "--json", "--keys", "all", "--virtual", made)).json["as_they_are"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_as_the_seed_tool(make: Make, models: ModelMaker, store: Path, dtype: str) -> None:
    merged, known = sd_like(models.tuned(dtype)), sd_like(models.base(dtype), seed=1)
    paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("mk", (merged, known), strict=True)]
    assert_same(make("unmerge", *paths, "--alpha", 0.3), seed_unmerge(merged, known, 0.3))


class TestStrength:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("amount", [-0.01, 0.2, 1.0, -1.0])
    def test_as_the_seed_tool(
        self, run: Run, make: Make, models: ModelMaker, store: Path, dtype: str, amount: float
    ) -> None:
        tuned, base = sd_like(models.tuned(dtype)), sd_like(models.base(dtype), seed=1)
        models.save(store / "base.safetensors", base)
        path = models.save(store / "tuned.safetensors", tuned)
        good(run("dehydrate", path, "--base", store / "base.safetensors"))
        got = make("rehydrate", path, "--strength", amount)
        want = seed_add(seed_subtract(tuned, base), base, amount)
        # The seed tool leaves out what has no "model" in its name; here the model keeps it.
        assert_same({k: t for k, t in got.items() if "model" in k}, want)
        assert_same({k: t for k, t in got.items() if "model" not in k}, {"betas": tuned["betas"]})

    def test_none_is_the_original(self, run: Run, models: ModelMaker, store: Path) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        path = models.save(store / "tuned.safetensors", models.tuned("fp16"))
        data = path.read_bytes()
        good(run("dehydrate", path))
        good(run("rehydrate", path, "--strength", 0, "--output", store / "again.safetensors"))
        assert (store / "again.safetensors").read_bytes() == data

    def test_against_another_base_by_name(self, run: Run, make: Make, models: ModelMaker, store: Path) -> None:
        tuned, base = sd_like(models.tuned("fp32")), sd_like(models.base("fp32"), seed=1)
        paths = [models.save(store / f"{n}.ckpt", t) for n, t in zip("tb", (tuned, base), strict=True)]
        got = make("rehydrate", paths[0], "--base", paths[1], "--strength", 0.5)
        want = seed_add(seed_subtract(tuned, base), base, 0.5)
        assert_same({k: t for k, t in got.items() if "model" in k}, want)

    def test_ten_strengths_cost_nothing(self, run: Run, models: ModelMaker, store: Path) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        path = models.save(store / "tuned.safetensors", models.tuned("fp16"))
        good(run("dehydrate", path))
        for number in range(1, 11):
            facts = good(
                run(
                    "rehydrate",
                    path,
                    "--strength",
                    number / 10,
                    "--virtual",
                    store / f"s{number}.safetensors",
                    "--json",
                )
            ).json
            assert facts["stored"] < 0.02 * facts["size"]


class TestOnto:
    @pytest.mark.parametrize("amount", [None, 0.3])
    @pytest.mark.parametrize("container", ["ckpt", "safetensors"])
    def test_another_model(
        self, run: Run, make: Make, models: ModelMaker, store: Path, amount: float | None, container: str
    ) -> None:
        tuned, base, other = (
            sd_like(t, seed=n) for n, t in enumerate((models.tuned("fp16"), models.base("fp16"), third(models, "fp16")))
        )
        other["model.of_the_other_alone"] = torch.ones(300).half()
        models.save(store / "base.safetensors", base)
        path = models.save(store / "tuned.safetensors", tuned)
        onto = models.save(store / f"other.{container}", other)
        good(run("dehydrate", path, "--base", store / "base.safetensors"))
        options = [] if amount is None else ["--strength", amount]
        got = make("rehydrate", path, "--onto", onto, *options)
        want = seed_add(seed_subtract(tuned, base), other, *([amount] if amount is not None else []))
        assert_same({k: t for k, t in got.items() if "model" in k}, want)


class TestConvert:
    def test_another_vae(self, make: Make, models: ModelMaker, store: Path) -> None:
        model = sd_like(models.tuned("fp16"))
        vae = {"decoder.weight": torch.full((3000,), 0.25).half(), "loss.logvar": torch.zeros(1)}
        paths = [models.save(store / "model.ckpt", model), models.save(store / "vae.pt", vae, wrap=True)]
        got = make("convert", paths[0], "--vae", paths[1], name="made.ckpt")
        assert_same(got, {**model, "first_stage_model.decoder.weight": vae["decoder.weight"]})

    def test_without_ema(self, make: Make, models: ModelMaker, store: Path) -> None:
        model = sd_like(models.tuned("fp32"))
        ema = {
            f"model_ema.{k.removeprefix('model.').replace('.', '')}": t for k, t in model.items() if "diffusion" in k
        }
        path = models.save(store / "model.ckpt", {**model, **ema})
        assert_same(make("convert", path, "--drop-ema"), model)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cast(self, make: Make, models: ModelMaker, store: Path, dtype: str) -> None:
        model = sd_like(models.tuned("fp32"))
        path = models.save(store / "model.safetensors", model)
        want = {k: t.to(DTYPES[dtype]) if t.is_floating_point() else t for k, t in model.items()}
        assert_same(make("convert", path, "--dtype", dtype, name="made.ckpt"), want)

    def test_only_the_container(self, make: Make, models: ModelMaker, store: Path) -> None:
        model = sd_like(models.tuned("bf16"))
        path = models.save(store / "model.ckpt", model, legacy=True)
        assert_same(make("convert", path, name="made.safetensors"), model)

    def test_tied_weights_views_and_empty_tensors(self, make: Make, models: ModelMaker, store: Path) -> None:
        whole = torch.randn(60, 40)
        model = {"model.a": whole, "model.tied": whole, "model.part": whole[10:20], "model.none": torch.zeros(0, 5)}
        path = models.save(store / "model.ckpt", model)
        assert_same(make("convert", path, name="made.safetensors"), model)


def test_what_virtual_models_are_made_of(run: Run, make: Make, models: ModelMaker, store: Path) -> None:
    """Formulas with no residual; what is only copied is read straight from the parent; a recipe may use a recipe."""
    paths = [models.save(store / f"{n}.safetensors", sd_like(t)) for n, t in
             zip("ab", (models.tuned("fp16"), third(models, "fp16")), strict=True)]  # fmt: skip
    make("merge", *paths, "--alpha", 0.3)
    with DiffFile(store / "made.safetensors.hydra") as diff:
        assert diff.manifest.required == ("formula",)
        for number, span in enumerate(diff.manifest.spans):
            if diff.manifest.sections[span.section].dtype:
                assert span.prediction == (PREDICTION_SAME if span.name == "betas" else PREDICTION_FORMULA)
                first = int(diff.table.first_chunk[span.section])
                assert diff.chunk_nbytes[first] == 0, number
        assert len(diff.manifest.formulas) == 1
    second = make("unmerge", store / "made.safetensors", paths[1], "--alpha", 0.3, name="second.ckpt")
    merged = load(store.parent / "made.safetensors")
    assert_same(second, seed_unmerge(merged, load(paths[1]), 0.3))
    good(run("verify", store))


@pytest.mark.fuse
def test_a_virtual_model_in_a_mount(
    run: Run, models: ModelMaker, store: Path, tmp_path: Path, at_end: contextlib.ExitStack
) -> None:
    tensors = sd_like(models.tuned("fp16")), sd_like(third(models, "fp16"), seed=1)
    paths = [models.save(store / f"{n}.safetensors", t) for n, t in zip("ab", tensors, strict=True)]
    at = tmp_path / "mount"
    at.mkdir()
    assert hydrafs("mount", store, at).returncode == 0
    at_end.callback(hydrafs, "umount", at)
    facts = good(run("merge", at / "a.safetensors", paths[1], "--virtual", at / "made.ckpt", "--json")).json
    assert facts["path"] == str(store / "made.ckpt")
    assert_same(load(at / "made.ckpt"), seed_merge(*tensors, 0.5))
    assert hashlib.sha256((at / "made.ckpt").read_bytes()).hexdigest() == facts["sha256"]


class TestWhatDoesNotFit:
    @pytest.fixture
    def paths(self, models: ModelMaker, store: Path) -> list[Path]:
        pair = sd_like(models.tuned("fp16")), sd_like(third(models, "fp16"), seed=1)
        return [models.save(store / f"{n}.safetensors", t) for n, t in zip("ab", pair, strict=True)]

    def check(self, ran: Ran, store: Path, code: int, *words: str) -> None:
        bad(ran, code, *words)
        assert not [p for p in store.rglob("*") if "made" in p.name or p.name.startswith(".hydrafs-")]

    @pytest.mark.parametrize("where", ["--output", "--virtual"])
    def test_shapes(self, run: Run, models: ModelMaker, store: Path, paths: list[Path], where: str) -> None:
        other = load_file(paths[1])
        other["model.diffusion_model.up.weight"] = torch.ones(7, 7).half()
        path = models.save(store / "c.safetensors", other)
        ran = run("merge", paths[0], path, where, store / "made.ckpt")
        self.check(ran, store, 2, "up.weight", "512x96 and 7x7")

    def test_an_inpainting_model_comes_first(
        self, run: Run, models: ModelMaker, store: Path, paths: list[Path]
    ) -> None:
        path = models.save(store / "c.safetensors", sd_like(models.base("fp16"), channels=9))
        ran = run("merge", paths[0], path, "--virtual", store / "made.ckpt")
        self.check(ran, store, 2, "32x4x3x3 and 32x9x3x3", "name the inpainting model first")

    def test_nothing_in_common(self, run: Run, models: ModelMaker, store: Path, paths: list[Path]) -> None:
        path = models.save(store / "c.safetensors", {"encoder.weight": torch.ones(400)})
        ran = run("merge", path, paths[0], "--keys", "model", "--virtual", store / "made.ckpt")
        assert ran.code == 0 or "nothing to compute" in ran.err

    def test_other_architecture(self, run: Run, models: ModelMaker, store: Path, paths: list[Path]) -> None:
        path = models.save(store / "c.safetensors", {"encoder.weight": torch.ones(400)})
        self.check(run("unmerge", paths[0], path, "--virtual", store / "made.ckpt"), store, 2, "nothing to compute")

    def test_alpha(self, run: Run, store: Path, paths: list[Path]) -> None:
        self.check(run("unmerge", *paths, "--alpha", 0, "--virtual", store / "made.ckpt"), store, 2, "division by zero")
        for command in ("merge", "unmerge"):
            for number in ("nan", "inf"):
                ran = run(command, *paths, "--alpha", number, "--virtual", store / "made.ckpt")
                self.check(ran, store, 2, "not a ratio")
        ran = good(run("merge", *paths, "--alpha", 1.4, "--output", store / "extra.safetensors"))
        assert "alpha 1.4 is outside 0 to 1" in ran.out
        assert_same(load(store / "extra.safetensors"), seed_merge(load(paths[0]), load(paths[1]), 1.4))

    def test_where_to(self, run: Run, store: Path, paths: list[Path]) -> None:
        self.check(run("merge", *paths), store, 2, "--output PATH")
        both = ("--output", store / "made.ckpt", "--virtual", store / "made.ckpt")
        self.check(run("merge", *paths, *both), store, 2, "--virtual PATH")
        self.check(run("merge", *paths, "--virtual", store / "made.gguf"), store, 2, ".safetensors")
        self.check(run("merge", *paths, "--virtual", store / "no" / "m.ckpt"), store, 2, "no such folder")
        self.check(run("merge", *paths, "--virtual", store / "m.ckpt.hydra"), store, 2, "added by itself")
        for where in ("--output", "--virtual"):
            data = paths[0].read_bytes()
            self.check(run("merge", *paths, where, paths[0]), store, 10, "of that name exists")
            assert paths[0].read_bytes() == data

    def test_no_tensors(self, run: Run, store: Path, paths: list[Path]) -> None:
        (store / "c.ckpt").write_bytes(b"no model at all" * 1000)
        self.check(run("merge", paths[0], store / "c.ckpt", "--virtual", store / "made.ckpt"), store, 4, "no tensors")
        self.check(
            run("merge", paths[0], store / "d.ckpt", "--virtual", store / "made.ckpt"), store, 3, "no such model"
        )

    def test_a_tensor_that_is_not_contiguous(
        self, run: Run, models: ModelMaker, store: Path, paths: list[Path]
    ) -> None:
        path = models.save(store / "c.ckpt", {"model.x": torch.randn(40, 30).t(), "model.y": torch.ones(10)})
        self.check(
            run("convert", path, "--half", "--virtual", store / "made.ckpt"), store, 2, "model.x", "not contiguous"
        )

    def test_a_type_that_is_not_computed_with(self, run: Run, models: ModelMaker, store: Path) -> None:
        eight = {"model.x": torch.randn(400).to(torch.float8_e4m3fn), "model.y": torch.ones(10)}
        a = models.save(store / "c.safetensors", eight)
        b = models.save(store / "d.safetensors", {"model.x": torch.ones(400), "model.y": torch.zeros(10)})
        ran = good(run("merge", a, b, "--output", store / "extra.safetensors"))
        assert "1 tensor of c.safetensors kept, of a type that is not computed with: model.x" in ran.out
        assert torch.equal(
            load(store / "extra.safetensors")["model.x"].view(torch.uint8), eight["model.x"].view(torch.uint8)
        )

    def test_nothing_to_convert(self, run: Run, models: ModelMaker, store: Path, paths: list[Path]) -> None:
        vae = models.save(store / "vae.ckpt", {"conv.weight": torch.ones(5)})
        self.check(run("convert", paths[0], "--vae", vae, "--virtual", store / "made.ckpt"), store, 2, "does not fit")
        twice = ("--half", "--dtype", "bf16")
        self.check(run("convert", paths[0], *twice, "--virtual", store / "made.ckpt"), store, 2, "two precisions")
        assert "holds no EMA" in good(run("convert", paths[0], "--drop-ema", "--output", store / "extra.ckpt")).out

    def test_a_parent_that_is_gone(self, run: Run, store: Path, paths: list[Path]) -> None:
        good(run("merge", *paths, "--virtual", store / "made.ckpt"))
        aside = paths[1].rename(store.parent / "aside")
        good(run("verify", store))  # it is held
        shutil.rmtree(store / ".hydrafs" / "held")
        ran = run("verify", store)
        assert ran.code == 1
        assert "b.safetensors" in ran.out + ran.err
        bad(
            run("rehydrate", store / "made.ckpt", "--output", store / "extra.ckpt"),
            7,
            "b.safetensors",
            "back in the store",
        )
        aside.rename(paths[1])
        good(run("verify", store))

    def test_a_parent_that_others_need_stays_whole(self, run: Run, store: Path, paths: list[Path]) -> None:
        good(run("merge", *paths, "--virtual", store / "made.ckpt"))
        ran = good(run("dehydrate", paths[0]))
        assert "made.ckpt needs it" in ran.out
        assert paths[0].exists()

    def test_a_chain_that_is_too_long(self, run: Run, store: Path, paths: list[Path]) -> None:
        last = paths[0]
        for number in range(20):
            target = store / f"step{number}.safetensors"
            ran = run("merge", last, paths[1], "--virtual", target)
            if ran.code:
                bad(ran, 7, "too long")
                assert number > 4
                assert not target.with_name(target.name + ".hydra").exists()
                break
            last = target
        else:
            pytest.fail("chains of parents may be as long as they like")
        good(run("verify", store))

    def test_strength_without_a_base(self, run: Run, store: Path, paths: list[Path]) -> None:
        ran = run("rehydrate", paths[0], "--strength", 0.2, "--virtual", store / "made.ckpt")
        self.check(ran, store, 2, "--base")
        ran = run("rehydrate", paths[0], "--virtual", store / "made.ckpt")
        self.check(ran, store, 2, "--strength")
