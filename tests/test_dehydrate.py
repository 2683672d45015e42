"""Models to diffs and back: every container, type and prediction, and nothing lost whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import Filled, ModelMaker, Tensors

from hydrafs import dehydrate as dehydrating
from hydrafs import keeping, opening, renaming
from hydrafs.cache import ChunkCache
from hydrafs.choosing import features_of
from hydrafs.codecs import registry
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.diff import FLAG_NARROWED, DiffFile
from hydrafs.errors import (
    AlreadyThere,
    Changing,
    HydraError,
    NoSpace,
    NotFound,
    ParentChanged,
    ParentLoop,
    ParentMissing,
    ParentUnavailable,
    UsageError,
    VerifyFailed,
)
from hydrafs.manifest import PREDICTION_NONE, PREDICTION_SAME, SELF, Manifest, SpanRecord
from hydrafs.opening import MAX_DEPTH, Opener
from hydrafs.restore import prove, rehydrate, uncompress
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile, remove_leftovers

OPTIONS = Options(jobs=2, chunk_nbytes=32 << 10)
DTYPES = ["fp32", "fp16", "bf16"]


def run(root: Path, model: Path, **options: object) -> Outcome:
    with contextlib.closing(Store(root, create=True)) as store:
        return dehydrate(store, model, dataclasses.replace(OPTIONS, **options))


def diff_of(model: Path) -> Path:
    return model.with_name(model.name + ".hydra")


def content(root: Path, model: Path) -> bytes:
    """What the model reads as now, opened as the mount opens it."""
    with contextlib.closing(Store(root)) as store:
        source = Opener(store, ChunkCache(4 << 20)).open(store.locate(model))
        with contextlib.closing(source):
            return source.pread(0, source.size)


def manifest_of(model: Path) -> Manifest:
    with DiffFile(diff_of(model)) as diff:
        return diff.manifest


def spans_by_name(model: Path) -> dict[str, SpanRecord]:
    return {span.name: span for span in manifest_of(model).spans if span.name}


def check_round_trip(root: Path, model: Path, **options: object) -> Outcome:
    """Dehydrate; the original is gone and the same bytes, mode and mtime come back. How it was done."""
    data, before = model.read_bytes(), model.stat()
    outcome = run(root, model, **options)
    assert outcome.diff == diff_of(model), outcome.reasons
    assert outcome.original_removed
    assert outcome.sha256 == hashlib.sha256(data).digest()
    assert outcome.size == len(data)
    assert outcome.stored_nbytes == outcome.diff.stat().st_size
    assert not model.exists()
    assert content(root, model) == data
    with contextlib.closing(Store(root)) as store:
        assert prove(store, outcome.diff) == outcome.sha256
        restored = rehydrate(store, store.locate(model))
    assert restored.path.read_bytes() == data
    after = restored.path.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    restored.path.unlink()
    assert not leftovers(root)
    return outcome


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob(".hydrafs-tmp-*"))


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "zip-wrapped", "legacy"])
def test_every_container_and_precision(models: ModelMaker, store: Path, kind: str, dtype: str) -> None:
    suffix = ".safetensors" if kind == "safetensors" else ".ckpt"
    extra = {"legacy": kind == "legacy", "wrap": kind == "zip-wrapped"}
    models.save(store / f"base{suffix}", models.base(dtype), **extra)
    tuned = models.save(store / f"tuned{suffix}", models.tuned(dtype), **extra)
    os.utime(tuned, ns=(1, 1_234_567_890_123_456_789))
    tuned.chmod(0o640)
    outcome = check_round_trip(store, tuned)
    assert outcome.parents == (f"base{suffix}",)
    assert outcome.stored_nbytes < (0.65 if dtype == "fp32" else 0.4) * outcome.size


@pytest.mark.parametrize(("base", "tuned"), [("safetensors", "ckpt"), ("pt", "safetensors")])
def test_a_base_in_another_container(models: ModelMaker, store: Path, base: str, tuned: str) -> None:
    models.save(store / f"base.{base}", models.base("fp16"))
    outcome = check_round_trip(store, models.save(store / f"tuned.{tuned}", models.tuned("fp16")))
    assert outcome.stored_nbytes < 0.4 * outcome.size


@pytest.mark.parametrize(("base", "tuned"), [("fp32", "fp16"), ("fp32", "bf16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_a_base_of_another_precision(models: ModelMaker, store: Path, base: str, tuned: str) -> None:
    models.save(store / "base.safetensors", models.base(base))
    model = models.save(store / "tuned.safetensors", models.tuned(tuned))
    check_round_trip(store, model)
    origins = {s.origin_dtype for s in manifest_of(model).spans if s.prediction != PREDICTION_NONE}
    assert {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[base] in origins


def test_every_type_that_torch_can_save(store: Path) -> None:
    kinds = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.complex32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
        torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    ]  # fmt: skip
    torch.manual_seed(3)
    raw = {str(k): torch.randint(0, 2 if k is torch.bool else 256, (8 * 3000,), dtype=torch.uint8) for k in kinds}

    def tensors(change: bool) -> Tensors:
        made = {}
        for kind in kinds:
            data = raw[str(kind)].clone()
            if change and kind is not torch.bool:
                data[::97] ^= 1
            made[str(kind)] = data.view(kind)
        return made

    torch.save(tensors(False), store / "base.pt")
    torch.save(tensors(True), store / "tuned.pt")
    outcome = check_round_trip(store, store / "tuned.pt")
    assert outcome.stored_nbytes < 0.3 * outcome.size


def test_bits_that_arithmetic_would_lose(store: Path) -> None:
    """NaNs of every payload, both zeros, infinities and subnormals, in the model, in the base, and in both."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = torch.arange(0, 1 << 32, 65521, dtype=torch.int64).to(torch.int32)
    base = {
        "half": words.clone().view(torch.float16),
        "brain": words.clone().view(torch.bfloat16),
        "single": wide.view(torch.float32),
    }
    tuned = {name: t.flip(0).contiguous() for name, t in base.items()}
    same = {name: t.clone() for name, t in base.items()}
    crossed = {"half": base["single"].to(torch.float16), "single": base["half"].float().repeat(2)[: wide.numel()]}
    torch.save(base, store / "base.pt")
    for name, tensors in {"flipped": tuned, "same": {**same, "more": words}, "crossed": crossed}.items():
        torch.save(tensors, store / f"{name}.pt")
        for codec in ("planes", "raw"):
            data = (store / f"{name}.pt").read_bytes()
            outcome = run(store, store / f"{name}.pt", bases=(store / "base.pt",), codec=codec)
            assert content(store, store / f"{name}.pt") == data
            if outcome.diff:
                outcome.diff.unlink()
            (store / f"{name}.pt").write_bytes(data)


def test_fp32_that_holds_fp16_is_narrowed(models: ModelMaker, store: Path) -> None:
    """As merging programs write it: every value is a float16, the file says float32."""
    models.save(store / "base.safetensors", models.base("fp16"))
    model = models.save(store / "tuned.safetensors", models.cast(models.tuned("fp16"), "fp32"))
    outcome = check_round_trip(store, model)
    assert outcome.stored_nbytes < 0.2 * outcome.size
    manifest = manifest_of(model)
    assert "F16" in {s.narrow for s in manifest.sections}
    with DiffFile(diff_of(model)) as diff:
        assert any(flags & FLAG_NARROWED for flags in diff.chunk_flags)


def test_one_value_that_does_not_fit_keeps_its_chunk_wide(models: ModelMaker, store: Path) -> None:
    tensors = models.cast(models.tuned("fp16"), "fp32")
    tensors["up.weight"][300, 5] = 1.0 + 2.0**-20
    models.save(store / "base.safetensors", models.base("fp16"))
    model = models.save(store / "tuned.safetensors", tensors)
    check_round_trip(store, model)
    with DiffFile(diff_of(model)) as diff:
        narrowed = [bool(f & FLAG_NARROWED) for f in diff.chunk_flags]
    assert any(narrowed)
    assert not all(narrowed)


def test_renamed_and_prefixed_tensors(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base("fp16"))
    prefixed = {f"model.diffusion_model.{name}": t for name, t in models.tuned("fp16").items()}
    renamed = {f"layers.{i}.w": t for i, t in enumerate(models.tuned("fp16").values())}
    for name, tensors in {"prefixed": prefixed, "renamed": renamed}.items():
        outcome = check_round_trip(store, models.save(store / f"{name}.safetensors", tensors), keep=False)
        assert outcome.stored_nbytes < 0.4 * outcome.size, name


def test_a_resized_embedding_is_predicted_row_by_row(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base("fp16"))
    for rows in (1004, 800):
        tensors = models.tuned("fp16")
        old = tensors["embedding.weight"]
        tensors["embedding.weight"] = torch.cat([old, torch.randn(8, 96).half()])[:rows]
        model = models.save(store / f"tuned{rows}.safetensors", tensors)
        check_round_trip(store, model)
        spans = [s for s in manifest_of(model).spans if s.name == "embedding.weight"]
        assert [s.prediction != PREDICTION_NONE for s in spans] == ([True, False] if rows > 1000 else [True])
        assert spans[0].nbytes == min(rows, 1000) * 96 * 2


def test_ema_copies_are_predicted_by_the_model_itself(models: ModelMaker, store: Path) -> None:
    base, tuned = models.base("fp16"), models.tuned("fp16")
    models.save(
        store / "base.safetensors", {k: torch.randn_like(t) if t.is_floating_point() else t for k, t in base.items()}
    )
    tensors = {f"model.{k}": t for k, t in tuned.items()}
    tensors |= {f"model_ema.{k.replace('.', '')}": base[k] for k in base}
    model = models.save(store / "tuned.safetensors", tensors)
    outcome = check_round_trip(store, model)
    inside = [s for s in manifest_of(model).spans if s.prediction != PREDICTION_NONE and s.parent == SELF]
    assert sum(s.nbytes for s in inside) > 0.45 * outcome.size
    # Nothing of what predicts is itself predicted from within.
    assert all(s.name.startswith("model_ema.") for s in inside)


def test_the_bytes_of_a_frozen_layer_are_not_stored(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base("fp16"))
    model = models.save(store / "tuned.safetensors", models.tuned("fp16"))
    check_round_trip(store, model)
    spans = spans_by_name(model)
    assert spans["frozen.weight"].prediction == PREDICTION_SAME
    assert spans["up.weight"].prediction not in (PREDICTION_SAME, PREDICTION_NONE)


def test_an_identical_copy_costs_next_to_nothing(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base())
    outcome = check_round_trip(store, models.save(store / "copy.safetensors", models.base()))
    assert outcome.stored_nbytes < 4000


def test_opaque_files_and_tiny_files(models: ModelMaker, store: Path) -> None:
    (store / "text.bin").write_bytes(b"what is this?\n" * 5000)
    check_round_trip(store, store / "text.bin")
    for nbytes in (0, 1, 100):
        tiny = store / f"tiny{nbytes}.bin"
        tiny.write_bytes(bytes(nbytes))
        outcome = run(store, tiny)
        assert outcome.diff is None
        assert tiny.read_bytes() == bytes(nbytes)


def test_names_that_are_no_text(models: ModelMaker, store: Path) -> None:
    """A file's name is bytes; a tensor's name may be half a surrogate pair."""
    name = os.fsdecode(b"caf\xe9-\xff.safetensors")
    base = models.save(store / "b" / name, models.base("fp16"))
    tensors = {f"{k}\u00e9\U0001f40d": t for k, t in models.tuned("fp16").items()}
    outcome = check_round_trip(store, models.save(store / name, tensors))
    assert outcome.parents
    assert base.exists()
    torch.save({"\ud800weight": models.tuned("fp16")["up.weight"]}, store / "lone.pt")
    check_round_trip(store, store / "lone.pt", bases=(base,))


def test_no_compress_stores_the_bytes_as_they_are(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base("fp16"))
    model = models.save(store / "tuned.safetensors", models.tuned("fp16"))
    check_round_trip(store, model, codec="raw")
    with DiffFile(diff_of(model)) as diff:
        assert set(diff.chunk_codec) == {registry.NONE, registry.by_name("raw").id}


def test_uncompress_recodes_and_keeps_every_byte(filled: Filled) -> None:
    filled.dehydrate()
    small = filled.diff.stat()
    with contextlib.closing(Store(filled.root)) as store:
        before, after = uncompress(store, store.locate("tuned.safetensors"), jobs=2)
    assert before == small.st_size
    assert after == filled.diff.stat().st_size > before
    assert filled.diff.stat().st_mode == small.st_mode
    assert content(filled.root, filled.tuned) == filled.data
    with DiffFile(filled.diff) as diff:
        assert set(diff.chunk_codec) == {registry.NONE, registry.by_name("raw").id}
        assert "frozen.weight" in {s.name for s in diff.manifest.spans if s.prediction == PREDICTION_SAME}


# Finding the base


def test_the_base_is_found_among_others(models: ModelMaker, store: Path) -> None:
    torch.manual_seed(9)
    noise = {k: torch.randn_like(t.float()).half() if t.is_floating_point() else t for k, t in models.base().items()}
    models.save(store / "a-stranger.safetensors", noise)
    models.save(store / "b" / "the-base.ckpt", models.base("fp16"))
    models.save(store / "c-sibling.safetensors", {k: v * 1.5 for k, v in models.base("fp16").items()})
    (store / "notes.txt").write_text("no model")
    (store / "broken.safetensors").write_bytes(b"\xff" * 1000)
    outcome = check_round_trip(store, models.save(store / "tuned.safetensors", models.tuned("fp16")))
    assert outcome.parents == ("b/the-base.ckpt",)
    assert "b/the-base.ckpt" in outcome.reasons[0]


def test_no_base_is_said_so(models: ModelMaker, store: Path) -> None:
    model = models.save(store / "alone.safetensors", models.base("fp16"))
    data = model.read_bytes()
    outcome = run(store, model)
    assert any("no base" in reason for reason in outcome.reasons)
    assert outcome.diff is None or content(store, model) == data


def test_a_base_from_outside_the_store_is_remembered(models: ModelMaker, store: Path, tmp_path: Path) -> None:
    base = models.save(tmp_path / "elsewhere" / "base.safetensors", models.base("fp16"))
    outcome = check_round_trip(store, models.save(store / "tuned.safetensors", models.tuned("fp16")), bases=(base,))
    assert outcome.parents == (str(base),)
    with contextlib.closing(Store(store)) as opened:
        assert (opened.base_files, opened.base_folders) == ((base,), ())
    # Found by itself from now on; what else stands in its folder is not.
    models.save(
        base.with_name("closer.safetensors"), models.base("fp16") | {"up.bias": models.tuned("fp16")["up.bias"]}
    )
    tensors = models.base("fp16")
    tensors["up.bias"] += 1
    other = models.save(store / "other.safetensors", tensors)
    assert check_round_trip(store, other).parents == (str(base),)
    shutil.rmtree(store / ".hydrafs" / "held")
    base.rename(base.with_name("renamed.ckpt"))
    with contextlib.closing(Store(store)) as opened:
        prove(opened, store / "tuned.safetensors.hydra")


def test_several_bases_serve_one_model(models: ModelMaker, store: Path) -> None:
    """The VAE from one file, the rest from another."""
    torch.manual_seed(5)
    vae = {f"first_stage_model.{i}.weight": torch.randn(96, 300).half() for i in range(4)}
    models.save(store / "vae.safetensors", {k.removeprefix("first_stage_model."): v for k, v in vae.items()})
    models.save(store / "base.safetensors", models.base("fp16"))
    model = models.save(store / "tuned.safetensors", {**models.tuned("fp16"), **vae})
    outcome = check_round_trip(store, model)
    assert set(outcome.parents) == {"vae.safetensors", "base.safetensors"}
    spans = spans_by_name(model)
    assert {spans[name].prediction for name in vae} == {PREDICTION_SAME}
    assert len({spans["first_stage_model.0.weight"].parent, spans["up.weight"].parent}) == 2


def test_models_that_go_together_are_no_bases_of_each_other(models: ModelMaker, store: Path) -> None:
    first = models.save(store / "first.safetensors", models.tuned("fp16"))
    second = models.save(store / "second.safetensors", models.tuned("fp16"))
    outcome = run(store, first, not_bases=(first, second))
    assert not outcome.parents


def test_a_base_that_is_needed_stays_whole(filled: Filled) -> None:
    filled.dehydrate()
    outcome = run(filled.root, filled.base)
    assert outcome.diff is None
    assert "tuned.safetensors needs it" in outcome.reasons[0]
    assert filled.base.exists()
    assert content(filled.root, filled.tuned) == filled.data


# Diffs as parents


def test_a_diff_is_a_parent(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.safetensors", models.base("fp16"))
    first = models.save(store / "first.safetensors", models.tuned("fp16"))
    run(store, first)
    tensors = models.tuned("fp16")
    tensors["norm.weight"] += 0.01
    second = models.save(store / "second.safetensors", tensors)
    outcome = check_round_trip(store, second)
    assert outcome.parents == ("first.safetensors",), outcome.reasons
    assert outcome.stored_nbytes < 0.05 * outcome.size


def chain(models: ModelMaker, store: Path, length: int) -> Iterator[Callable[[], Outcome]]:
    """Models each of which is dehydrated against the one before it."""
    tensors = models.tuned("fp16")
    previous = models.save(store / "base.safetensors", models.base("fp16"))
    for i in range(length):
        tensors["norm.weight"] = tensors["norm.weight"] + 0.25
        model = models.save(store / f"{i}.safetensors", tensors)
        yield lambda model=model, previous=previous: run(store, model, bases=(previous,))
        previous = model


def test_a_chain_of_diffs_has_a_limit(models: ModelMaker, store: Path) -> None:
    steps = list(chain(models, store, MAX_DEPTH + 1))
    for step in steps[:MAX_DEPTH]:
        assert step().diff
    last = store / f"{MAX_DEPTH}.safetensors"
    data = last.read_bytes()
    with pytest.raises(ParentLoop, match="chain"):
        steps[MAX_DEPTH]()
    assert last.read_bytes() == data
    assert not diff_of(last).exists()
    deepest = store / f"{MAX_DEPTH - 1}.safetensors"
    assert hashlib.sha256(content(store, deepest)).digest() == manifest_of(deepest).sha256


def test_a_model_is_not_stored_against_itself(filled: Filled) -> None:
    with pytest.raises(HydraError):
        run(filled.root, filled.base, bases=(filled.base,))
    assert filled.base.exists()
    filled.dehydrate()
    # tuned needs base; base against tuned would leave neither.
    data = filled.base.read_bytes()
    with pytest.raises(ParentLoop):
        run(filled.root, filled.base, bases=(filled.tuned,))
    assert filled.base.read_bytes() == data
    assert content(filled.root, filled.tuned) == filled.data


def test_a_parent_may_be_dehydrated_later(models: ModelMaker, filled: Filled) -> None:
    """The base becomes a diff against another base: the models that need it find it as a diff."""
    filled.dehydrate()
    tensors = models.base("fp16")
    tensors["up.bias"] = tensors["up.bias"] + 1
    models.save(filled.root / "older.safetensors", tensors)
    data = filled.base.read_bytes()
    outcome = run(filled.root, filled.base, bases=(filled.root / "older.safetensors",))
    assert outcome.original_removed
    assert content(filled.root, filled.base) == data
    assert content(filled.root, filled.tuned) == filled.data


# What is left alone


def test_a_model_that_would_not_shrink_is_left_alone(store: Path) -> None:
    model = store / "noise.bin"
    model.write_bytes(os.urandom(300_000))
    before = model.stat()
    outcome = run(store, model)
    assert outcome.diff is None
    assert not outcome.original_removed
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(p.name for p in store.iterdir()) == [".hydrafs", "noise.bin"]


def test_four_per_cent_are_too_little_and_eight_are_enough(store: Path) -> None:
    for share, enough in ((0.04, False), (0.08, True)):
        model = store / f"{share}.bin"
        zeros = int(1_000_000 * share)
        model.write_bytes(os.urandom(1_000_000 - zeros) + bytes(zeros))
        assert bool(run(store, model).diff) == enough


def test_keep_keeps_the_original(filled: Filled) -> None:
    outcome = filled.dehydrate(dataclasses.replace(filled.options, keep=True))
    assert outcome.diff == filled.diff
    assert not outcome.original_removed
    assert filled.tuned.read_bytes() == filled.data
    filled.tuned.unlink()
    assert content(filled.root, filled.tuned) == filled.data


def test_what_is_no_model_file_is_refused(filled: Filled) -> None:
    filled.dehydrate()
    (filled.root / "link.safetensors").symlink_to(filled.base)
    for name, error in {
        "missing.safetensors": NotFound,
        "link.safetensors": UsageError,
        "tuned.safetensors.hydra": UsageError,
        "": UsageError,
    }.items():
        with pytest.raises(error):
            run(filled.root, filled.root / name)
    assert filled.base.exists()


def test_another_diff_of_that_name_is_not_replaced(models: ModelMaker, filled: Filled) -> None:
    filled.dehydrate()
    diff = filled.diff.read_bytes()
    for tensors in (models.tuned("bf16"), models.base("fp16"), models.tuned("fp32")):
        models.save(filled.tuned, tensors)
        mine = filled.tuned.read_bytes()
        with pytest.raises(AlreadyThere):
            filled.dehydrate()
        assert filled.diff.read_bytes() == diff
        assert filled.tuned.read_bytes() == mine
    filled.diff.write_bytes(diff[:1000])  # a damaged one is no less in the way
    with pytest.raises(HydraError):
        filled.dehydrate()
    assert filled.tuned.read_bytes() == mine


def test_the_same_model_again_takes_the_place_of_its_diff(filled: Filled) -> None:
    filled.dehydrate(dataclasses.replace(filled.options, keep=True))
    assert filled.dehydrate().original_removed
    assert content(filled.root, filled.tuned) == filled.data


def test_rehydrate_writes_over_nothing(filled: Filled) -> None:
    filled.dehydrate()
    taken = filled.root / "taken.safetensors"
    taken.write_bytes(b"mine")
    dangling = filled.root / "dangling"
    dangling.symlink_to("nowhere")
    with contextlib.closing(Store(filled.root)) as store:
        entry = store.locate("tuned.safetensors")
        for output in (taken, dangling):
            with pytest.raises(AlreadyThere):
                rehydrate(store, entry, output)
        with pytest.raises(NotFound):
            rehydrate(store, entry, filled.root / "no" / "such" / "folder")
        folder = filled.root / "out"
        folder.mkdir()
        assert rehydrate(store, entry, folder).path == folder / "tuned.safetensors"
    assert taken.read_bytes() == b"mine"
    assert not (filled.root / "nowhere").exists()
    assert not leftovers(filled.root)


# The original changes meanwhile


@pytest.mark.parametrize("stage", ["encode", "prove"])
@pytest.mark.parametrize("how", ["in place", "replaced", "removed", "shorter", "grown"])
def test_a_model_that_changes_while_it_is_read(filled: Filled, stage: str, how: str) -> None:
    """The progress is told in the middle of reading, by the thread that reads."""
    other = bytearray(filled.data)
    other[-1] ^= 1
    told = False

    def change(now: str, nbytes: int, total: int) -> None:
        nonlocal told
        if now != stage or told:
            return
        told = True
        if how == "in place":
            with filled.tuned.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(other[-1:])
            os.utime(filled.tuned, ns=(0, before.st_mtime_ns))
        elif how == "shorter":
            os.truncate(filled.tuned, len(filled.data) - 1)
        elif how == "grown":
            with filled.tuned.open("ab") as file:
                file.write(b"x")
        else:
            filled.tuned.unlink()
            if how == "replaced":
                filled.tuned.write_bytes(other)

    before = filled.tuned.stat()
    with contextlib.closing(Store(filled.root, create=True)) as store, pytest.raises(Changing):
        dehydrate(store, filled.tuned, filled.options, progress=change)
    assert told
    assert not filled.diff.exists()
    assert not leftovers(filled.root)
    expected = {
        "in place": other, "replaced": other, "shorter": filled.data[:-1], "grown": filled.data + b"x", "removed": None
    }[how]  # fmt: skip
    assert (filled.tuned.read_bytes() if filled.tuned.exists() else None) == expected


def test_a_model_that_is_written_after_the_commit_stays(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = TemporaryFile.commit

    def write_after(self: TemporaryFile, target: Path, *, replace: bool = False) -> None:
        commit(self, target, replace=replace)
        if target == filled.diff:
            filled.tuned.write_bytes(b"someone's new model")

    monkeypatch.setattr(TemporaryFile, "commit", write_after)
    outcome = filled.dehydrate()
    assert not outcome.original_removed
    assert filled.tuned.read_bytes() == b"someone's new model"


def test_a_base_that_changes_while_it_is_read(filled: Filled) -> None:
    def change(stage: str, nbytes: int, total: int) -> None:
        if stage == "encode":
            with filled.base.open("r+b") as file:
                file.seek(-20_000, os.SEEK_END)
                file.write(bytes(20_000))

    with contextlib.closing(Store(filled.root, create=True)) as store, pytest.raises(HydraError):
        dehydrate(store, filled.tuned, filled.options, progress=change)
    assert filled.tuned.read_bytes() == filled.data
    assert not filled.diff.exists()


@pytest.mark.parametrize("identical", [True, False])
def test_a_base_that_goes_away_during_the_proof(models: ModelMaker, filled: Filled, identical: bool) -> None:
    """The proof holds open files; what it proves is worth nothing once their names are gone. A model that equals its
    base would even find itself in the base's place."""
    if identical:
        filled.tuned.write_bytes(filled.base.read_bytes())
    data = filled.tuned.read_bytes()

    def remove(stage: str, nbytes: int, total: int) -> None:
        if stage == "prove":
            filled.base.unlink(missing_ok=True)

    with (
        contextlib.closing(Store(filled.root, create=True)) as store,
        pytest.raises(Changing, match="removed or replaced"),
    ):
        dehydrate(store, filled.tuned, filled.options, progress=remove)
    assert filled.tuned.read_bytes() == data
    assert not filled.diff.exists()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_parent_that_is_a_diff_goes_away_during_the_proof(
    models: ModelMaker, filled: Filled, keep: bool, replaced: bool
) -> None:
    """Nobody needed it until now: who deletes it deletes it for good."""
    filled.dehydrate()
    child = models.save(filled.root / "child.safetensors", models.tuned("fp32"))
    data = child.read_bytes()

    def remove(stage: str, nbytes: int, total: int) -> None:
        if stage == "prove" and filled.diff.exists():
            with contextlib.closing(Store(filled.root)) as other:
                if replaced:
                    fresh = models.save(filled.root / "fresh.safetensors", models.base("fp16"))
                    renaming.rename_model(other, fresh, filled.tuned)
                else:
                    keeping.remove_model(other, filled.tuned)

    options = dataclasses.replace(filled.options, bases=(filled.tuned,), keep=keep)
    with contextlib.closing(Store(filled.root, create=True)) as store:
        with pytest.raises(Changing, match="removed or replaced"):
            dehydrate(store, child, options, progress=remove)
        assert child.read_bytes() == data
        assert not store.entry(child).is_diff  # type: ignore[union-attr]


def test_two_that_are_stored_against_each_other_at_once(models: ModelMaker, filled: Filled) -> None:
    """Each proof is good while both originals are there; one of them has to stay."""
    data = {path: path.read_bytes() for path in (filled.base, filled.tuned)}
    inner: list[Outcome] = []

    def other_way(stage: str, nbytes: int, total: int) -> None:
        if stage == "prove" and not inner:
            inner.append(run(filled.root, filled.base, bases=(filled.tuned,)))

    with contextlib.closing(Store(filled.root, create=True)) as store:
        options = dataclasses.replace(filled.options, bases=(filled.base,))
        outer = dehydrate(store, filled.tuned, options, progress=other_way)
    assert inner
    assert not (inner[0].original_removed and outer.original_removed)
    for path, expected in data.items():
        assert content(filled.root, path) == expected


def test_a_disk_that_forgets_does_not_cost_the_original(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back is not what was written: the proof fails, and the original stays."""
    flush = TemporaryFile.flush_to_disk

    def forget(self: TemporaryFile) -> None:
        flush(self)
        os.pwrite(self.file.fileno(), b"\xff", 3000)

    monkeypatch.setattr(TemporaryFile, "flush_to_disk", forget)
    with pytest.raises(HydraError):
        filled.dehydrate()
    assert filled.tuned.read_bytes() == filled.data
    assert not filled.diff.exists()
    assert not leftovers(filled.root)


def test_a_codec_that_errs_does_not_cost_the_original(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums are taken of what was read, so whatever goes wrong in coding is found by the proof."""
    planes = registry.by_name("planes")
    encode = type(planes).encode

    def wrong(self: object, prediction: object, target: object, dtype: object, params: bytes) -> bytes:
        changed = target.copy()  # type: ignore[attr-defined]
        changed[len(changed) // 2] ^= 1
        return encode(planes, prediction, changed, dtype, params)  # type: ignore[arg-type]

    monkeypatch.setattr(type(planes), "encode", wrong)
    with pytest.raises(HydraError):
        filled.dehydrate()
    assert filled.tuned.read_bytes() == filled.data
    assert not filled.diff.exists()


# Killed, or failing, between any two file operations

_CHILD = """
import errno, os, signal, sys
mode, count, root, model = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
done, armed = 0, False

def step(call, watched=lambda *args: True):
    def wrapped(*args, **kwargs):
        global done
        if not armed or not watched(*args):
            return call(*args, **kwargs)
        done += 1
        if done == count and mode == "kill-before":
            os.kill(os.getpid(), signal.SIGKILL)
        if done == count and mode == "fail":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        number = done
        try:
            return call(*args, **kwargs)
        finally:
            if number == count and mode == "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
    return wrapped

# Before pathlib is imported: that of Python 3.10 keeps these functions.
for name in ("fsync", "link", "rename", "replace", "unlink", "fchmod", "fchown", "utime", "mkdir", "ftruncate"):
    setattr(os, name, step(getattr(os, name)))
os.open = step(os.open, lambda path, flags, *mode: flags & os.O_CREAT)

import contextlib
from pathlib import Path
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffWriter
from hydrafs.errors import HydraError
from hydrafs.replacing import recover
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile, remove_leftovers

# A payload lies in a buffer, and any write may be the one that takes it to the disk.
append = DiffWriter.append
def append_and_flush(self, *args):
    append(self, *args)
    self._file.flush()
DiffWriter.append = step(append_and_flush)
DiffWriter.finish = step(DiffWriter.finish)

with contextlib.closing(Store(root, create=True)) as store:
    recover(store)
    remove_leftovers(Path(root))
    armed = True
    try:
        outcome = dehydrate(store, Path(model), Options(jobs=1, chunk_nbytes=32 << 10))
    except HydraError as error:
        print(type(error).__name__)
    else:
        print("done", bool(outcome.diff), outcome.original_removed)
print(done)
"""


def child(filled: Filled, mode: str, count: int) -> tuple[int, list[str]]:
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, mode, str(count), filled.root, filled.tuned],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout.split()


def check_nothing_lost(filled: Filled) -> None:
    """The original, or a diff that gives it, or both; nothing else under their names; the base as it was."""
    assert filled.tuned.exists() or filled.diff.exists()
    if filled.tuned.exists():
        assert filled.tuned.read_bytes() == filled.data
    if filled.diff.exists():
        assert stat.S_IMODE(filled.diff.stat().st_mode) == 0o644
        with contextlib.closing(Store(filled.root)) as store:
            assert prove(store, filled.diff) == filled.sha256
    names = {p.name for p in filled.root.iterdir() if not p.name.startswith(".hydrafs")}
    assert names <= {"base.safetensors", "tuned.safetensors", "tuned.safetensors.hydra"}


def count_steps(filled: Filled) -> int:
    """How many operations change the disk: one per payload, and those around them."""
    code, printed = child(filled, "count", 0)
    assert (code, printed[:3]) == (0, ["done", "True", "True"])
    total = int(printed[-1])
    with DiffFile(filled.diff) as diff:
        assert total >= len(diff.chunk_offset) + 8
    return total


def put_back(filled: Filled) -> None:
    filled.let_go()
    with contextlib.suppress(FileNotFoundError):
        filled.diff.unlink()
    if not filled.tuned.exists():
        filled.tuned.write_bytes(filled.data)
        filled.tuned.chmod(0o644)


def everything(filled: Filled, steps: list[int], mode: str) -> None:
    for step in steps:
        put_back(filled)
        code, printed = child(filled, mode, step)
        check_nothing_lost(filled)
        if mode == "fail":
            assert code == 0
            assert printed[0] in ("NoSpace", "done"), f"operation {step}: {printed}"
            assert not leftovers(filled.root), f"operation {step} left something behind"
        else:
            assert code == -signal.SIGKILL, f"operation {step} was not reached"
    # Another run finds its way, and takes away what the killed ones left.
    put_back(filled)
    code, printed = child(filled, "count", 0)
    assert printed[:3] == ["done", "True", "True"]
    assert not leftovers(filled.root)
    check_nothing_lost(filled)


def test_killed_at_any_instant_nothing_is_lost(filled: Filled) -> None:
    total = count_steps(filled)
    everything(filled, [1, 2, 7, *range(total - 9, total + 1)], "kill-before")


def test_a_disk_that_is_full_at_any_instant(filled: Filled) -> None:
    total = count_steps(filled)
    everything(filled, [1, 2, 7, *range(total - 9, total + 1)], "fail")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill-before", "kill-after", "fail"])
def test_every_single_operation(filled: Filled, mode: str) -> None:
    everything(filled, list(range(1, count_steps(filled) + 1)), mode)


def test_leftovers_of_the_living_are_left_alone(store: Path) -> None:
    with contextlib.closing(Store(store, create=True)), TemporaryFile(store) as temporary:
        (store / ".hydrafs-tmp-0123456789abcdef").write_bytes(b"half a diff")
        assert remove_leftovers(store) == 1
        assert temporary.path.exists()
        temporary.file.write(b"x")
        temporary.commit(store / "x")
    assert (store / "x").read_bytes() == b"x"


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path, at_end: contextlib.ExitStack) -> Path:
    """A disk of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "hydrafs-test", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mount(8) is not permitted; test_a_disk_that_is_full_at_any_instant stands in for it")
    at_end.callback(subprocess.run, ["umount", "-l", folder], check=True)
    return folder


def test_a_full_disk_is_noticed_before(models: ModelMaker, small_disk: Path) -> None:
    base = models.save(small_disk / "base.safetensors", models.base("fp16"))
    model = models.save(small_disk / "tuned.safetensors", models.tuned("fp16"))
    with pytest.raises(NoSpace, match="free"):
        run(small_disk, model, bases=(base,))
    assert sorted(p.name for p in small_disk.iterdir()) == [".hydrafs", "base.safetensors", "tuned.safetensors"]


@pytest.mark.parametrize("left", [0, 4096, 40_000, 90_000])
def test_a_disk_that_fills_up_meanwhile(
    models: ModelMaker, small_disk: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(small_disk / "base.safetensors", models.base("fp16"))
    model = models.save(small_disk / "tuned.safetensors", models.tuned("fp16"))
    data = model.read_bytes()
    Store(small_disk, create=True).close()
    monkeypatch.setattr(dehydrating, "_check_space", lambda *args: None)  # someone else takes the space meanwhile
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    with (small_disk / "other").open("wb") as file:
        file.write(bytes(max(0, free - left)))
    with pytest.raises(NoSpace):
        run(small_disk, model)
    assert model.read_bytes() == data
    assert not diff_of(model).exists()
    assert not leftovers(small_disk)


def test_rehydrating_to_a_full_disk(filled: Filled, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.dehydrate()
    (small_disk / "other").write_bytes(bytes(2_800_000))
    with contextlib.closing(Store(filled.root)) as store:
        entry = store.locate("tuned.safetensors")
        with pytest.raises(NoSpace):
            rehydrate(store, entry, small_disk / "out")
        monkeypatch.setattr("hydrafs.restore._check_space", lambda *args: None)
        with pytest.raises(NoSpace):
            rehydrate(store, entry, small_disk / "out")
    assert sorted(p.name for p in small_disk.iterdir()) == ["other"]


# The base is not what it was


def test_a_missing_base_is_named_at_open(filled: Filled) -> None:
    sha256 = hashlib.sha256(filled.base.read_bytes()).hexdigest()
    filled.dehydrate()
    filled.let_go()
    filled.base.rename(filled.root.parent / "gone")
    with pytest.raises(ParentMissing) as caught:
        content(filled.root, filled.tuned)
    assert "base.safetensors" in str(caught.value)
    assert sha256 in str(caught.value)
    (filled.root / "sub").mkdir()
    (filled.root.parent / "gone").rename(filled.root / "sub" / "another-name.ckpt")
    assert content(filled.root, filled.tuned) == filled.data


def test_a_changed_base_is_named_at_open(models: ModelMaker, filled: Filled) -> None:
    original = filled.base.read_bytes()
    sha256 = hashlib.sha256(original).hexdigest()
    filled.dehydrate()
    for data in (original[:-1] + bytes([original[-1] ^ 1]), original + b"x", original[:-1], b"", bytes(len(original))):
        filled.base.write_bytes(data)
        with pytest.raises(ParentUnavailable) as caught:
            content(filled.root, filled.tuned)
        assert "base.safetensors" in str(caught.value)
        assert sha256 in str(caught.value)
        assert isinstance(caught.value, ParentChanged)
    filled.base.write_bytes(original)
    assert content(filled.root, filled.tuned) == filled.data


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file; its size and its times are as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("hashed", [True, False])
def test_flipped_bits_in_a_base_never_give_wrong_bytes(
    filled: Filled, hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hashed``: found when the base is opened. Else the base is one of those too large for that."""
    filled.dehydrate()
    if not hashed:
        monkeypatch.setattr(opening, "HASHED_AT_OPEN_NBYTES", 0)
        monkeypatch.setattr(opening, "probe", lambda source: manifest_of(filled.tuned).parents[0].probe)
    refused = 0
    for offset in range(5_000, len(filled.data), 40_000):
        flip(filled.base, offset)
        try:
            with contextlib.closing(Store(filled.root)) as store:
                model = Opener(store, ChunkCache(4 << 20)).open_diff(filled.diff)
                with model:
                    for place in range(0, model.size, 10_000):
                        try:
                            assert model.pread(place, 10_000) == filled.data[place : place + 10_000]
                        except HydraError as error:
                            assert "base.safetensors" in str(error)
                            refused += 1
        except ParentChanged:
            refused += 1
            assert hashed
        flip(filled.base, offset)
    assert refused
    assert content(filled.root, filled.tuned) == filled.data


def test_a_base_that_is_modified_while_a_model_is_open(filled: Filled) -> None:
    filled.dehydrate()
    with contextlib.closing(Store(filled.root)) as store, Opener(store, ChunkCache(0)).open_diff(filled.diff) as model:
        table = model.diff.table
        same = [i for i, s in enumerate(model.manifest.spans) if s.prediction == PREDICTION_SAME]
        offset = int(table.offsets[same[0]])
        assert model.pread(offset, 100) == filled.data[offset : offset + 100]
        span = model.manifest.spans[same[0]]
        flip(filled.base, span.origin + 50)
        with pytest.raises(ParentChanged, match=r"base\.safetensors"):
            model.pread(offset, 100)
        # Whatever does not rest on what was changed is served.
        served = 0
        for place in range(0, model.size, 20_000):
            with contextlib.suppress(HydraError):
                assert model.pread(place, 20_000) == filled.data[place : place + 20_000]
                served += 1
        assert served
        flip(filled.base, span.origin + 50)
        assert model.pread(0, model.size) == filled.data


@pytest.mark.parametrize("how", ["truncated", "replaced", "removed"])
def test_a_base_that_goes_away_while_a_model_is_open(filled: Filled, how: str) -> None:
    filled.dehydrate()
    with contextlib.closing(Store(filled.root)) as store, Opener(store, ChunkCache(0)).open_diff(filled.diff) as model:
        if how == "truncated":
            os.truncate(filled.base, 1000)
            with pytest.raises(HydraError):
                model.pread(0, model.size)
        else:
            filled.base.unlink()
            if how == "replaced":
                filled.base.write_bytes(bytes(len(filled.data)))
            assert model.pread(0, model.size) == filled.data  # the file that is open is the one that it was


def test_a_base_that_is_written_at_once_after_it_was_hashed(filled: Filled) -> None:
    """A change within the same tick of the filesystem's clock must not hide behind unchanged times."""
    filled.dehydrate()
    original = filled.base.read_bytes()
    for turn in range(40):
        filled.base.write_bytes(original)
        with contextlib.closing(Store(filled.root)) as store:
            model = Opener(store, ChunkCache(0)).open_diff(filled.diff)
            span = next(s for s in model.manifest.spans if s.prediction == PREDICTION_SAME)
            with filled.base.open("r+b", buffering=0) as file:
                file.seek(span.origin)
                file.write(b"\xa5" * 64)
            with model, contextlib.suppress(HydraError):
                data = model.pread(0, model.size)
                assert data == filled.data, f"turn {turn}"
        with contextlib.closing(Store(filled.root)) as store, pytest.raises(ParentChanged):
            Opener(store, ChunkCache(0)).open_diff(filled.diff)


def test_verify_finds_what_is_wrong_with_a_base(filled: Filled) -> None:
    filled.dehydrate()
    flip(filled.base, 100_000)
    with contextlib.closing(Store(filled.root)) as store, pytest.raises(ParentUnavailable):
        prove(store, filled.diff)


def test_a_manifest_that_states_another_sha256_fails_the_proof(filled: Filled) -> None:
    filled.dehydrate()
    with contextlib.closing(Store(filled.root)) as store:
        with pytest.raises(VerifyFailed) as caught:
            prove(store, filled.diff, digest=bytes(32))
        assert filled.sha256.hex() in str(caught.value)


def test_the_manifest_says_what_the_model_was(filled: Filled) -> None:
    before = filled.tuned.stat()
    filled.dehydrate()
    manifest = manifest_of(filled.tuned)
    assert (manifest.name, manifest.size, manifest.sha256) == ("tuned.safetensors", len(filled.data), filled.sha256)
    assert (manifest.mode, manifest.mtime_ns, manifest.container) == (before.st_mode, before.st_mtime_ns, "safetensors")
    assert dict(manifest.metadata).get("format") == "pt"
    assert manifest.writer.startswith("hydrafs ")
    assert manifest.required == features_of(manifest)
    assert msgspec.structs.asdict(manifest.parents[0])["size"] == filled.base.stat().st_size
    assert set(spans_by_name(filled.tuned)) == set(torch_names(filled))


def torch_names(filled: Filled) -> list[str]:
    from safetensors import safe_open

    path = filled.root.parent / "copy.safetensors"
    path.write_bytes(filled.data)
    with safe_open(path, "pt") as file:
        return list(file.keys())
