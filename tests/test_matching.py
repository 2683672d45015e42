"""Which tensor predicts which: by name, by name without prefixes, by values; within the model; never out of range."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import ModelMaker, Tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrafs import containers
from hydrafs.catalog import ModelFacts, TensorFacts
from hydrafs.dtypes import DTYPES
from hydrafs.fingerprint import NBYTES, UNRELATED, distances, facts_of, fingerprint
from hydrafs.layout import BytesSource
from hydrafs.manifest import SELF
from hydrafs.matching import GOOD, Match, match, stripped
from hydrafs.predictors import castable


def facts(tensors: Tensors) -> ModelFacts:
    from safetensors.torch import save

    data = BytesSource(save({k: t.contiguous() for k, t in tensors.items()}))
    return facts_of(data, containers.parse(data))


def found_in(target: ModelFacts, parents: list[ModelFacts]) -> dict[str, tuple[str, str] | None]:
    """By the name of each tensor, the name of what predicts it and how that was found."""
    result: dict[str, tuple[str, str] | None] = {}
    for tensor, found in zip(target.tensors, match(target, parents), strict=True):
        result[tensor.name] = None
        if found:
            others = target.tensors if found.parent == SELF else parents[found.parent].tensors
            result[tensor.name] = (next(o.name for o in others if o.offset == found.offset), found.how)
    return result


def large(tensors: Tensors) -> set[str]:
    return {name for name, t in tensors.items() if t.nbytes >= 1024}


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tuned", ["fp32", "fp16", "bf16"])
def test_a_fine_tune_is_matched_by_name_in_any_precision(models: ModelMaker, base: str, tuned: str) -> None:
    found = found_in(facts(models.tuned(tuned)), [facts(models.base(base))])
    for name in large(models.tuned(tuned)):
        assert found[name] == (name, "name")


def test_known_prefixes_are_passed_over(models: ModelMaker) -> None:
    tensors = {f"model.diffusion_model.{k}": t for k, t in models.tuned("fp16").items()}
    found = found_in(facts(tensors), [facts({f"unet.{k}": t for k, t in models.base("fp16").items()})])
    for name in large(models.tuned("fp16")):
        assert found[f"model.diffusion_model.{name}"] == (f"unet.{name}", "name without prefix")


def test_without_names_the_values_tell(models: ModelMaker) -> None:
    tensors = {f"t{i}": t for i, t in enumerate(models.tuned("fp16").values())}
    names = dict(zip(tensors, models.tuned("fp16"), strict=True))
    found = found_in(facts(tensors), [facts(models.base("fp16"))])
    for name in large(tensors):
        assert found[name] == (names[name], "values")


def test_names_that_were_swapped_do_not_mislead(models: ModelMaker) -> None:
    """Two tensors of one shape, each under the other's name: the values are nearer to the truth."""
    tensors = models.tuned("fp16")
    tensors["up.weight"], tensors["frozen.weight"] = tensors["frozen.weight"], tensors["up.weight"]
    found = found_in(facts(tensors), [facts(models.base("fp16"))])
    assert found["up.weight"] == ("frozen.weight", "values")
    assert found["frozen.weight"] == ("up.weight", "values")


def test_a_stranger_predicts_nothing(models: ModelMaker) -> None:
    torch.manual_seed(1)
    other = {k: torch.randn_like(t) * 1e-3 if t.is_floating_point() else t for k, t in models.base().items()}
    matches = match(facts(models.tuned()), [facts(other)])
    found = found_in(facts(models.tuned()), [facts(other)])
    assert all(m is None or m.distance >= GOOD for m in matches if m and m.count > 1000)
    assert found["up.weight"] is None


def test_the_first_good_parent_is_taken_and_a_closer_one_for_what_it_lacks(models: ModelMaker) -> None:
    base = models.base("fp16")
    half = {k: t for k, t in base.items() if not k.startswith("up.")}
    target = facts(models.tuned("fp16"))
    parents = [facts(half), facts(base)]
    by_name = dict(zip((t.name for t in target.tensors), match(target, parents), strict=True))
    assert by_name["up.weight"] is not None
    assert by_name["up.weight"].parent == 1
    assert {m.parent for n, m in by_name.items() if m and n in half} == {0}


def test_a_resized_embedding_shares_its_first_rows(models: ModelMaker) -> None:
    for rows in (500, 1500):
        target = facts({"embedding.weight": torch.randn(rows, 96)})
        found = match(target, [facts(models.base())])[0]
        assert found is not None
        assert found.count == min(rows, 1000) * 96
    other = facts({"embedding.weight": torch.randn(1000, 95)})
    assert match(other, [facts(models.base())])[0] is None


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3", "I64"])
def test_types_whose_samples_tell_little_go_by_their_names(kind: str) -> None:
    """A quantised fine-tune: many values moved, and so has its sample."""
    dtype = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64}[kind]
    torch.manual_seed(2)
    raw = torch.randint(0, 100, (40_000,), dtype=torch.uint8)
    moved = raw.clone()
    moved[::2] += 1
    found = found_in(facts({"w": moved.view(dtype)}), [facts({"w": raw.view(dtype)})])
    assert found["w"] == ("w", "name")
    found = found_in(facts({"renamed": moved.view(dtype)}), [facts({"w": raw.view(dtype)})])
    assert found["renamed"] is None


def test_ema_copies_are_predicted_from_within(models: ModelMaker) -> None:
    tuned = {f"model.{k}": t for k, t in models.tuned().items()}
    copies = {f"model_ema.{k.replace('.', '')}": t for k, t in models.base().items()}
    found = found_in(facts({**tuned, **copies}), [])
    for name in large(models.base()):
        predicted = found[f"model_ema.{name.replace('.', '')}"]
        assert predicted is not None
        assert predicted[0] == f"model.{name}"
        assert found[f"model.{name}"] is None


def test_a_repeated_tensor_is_predicted_once(models: ModelMaker) -> None:
    weight = models.base()["up.weight"]
    target = facts({f"copy{i}": weight + 1e-4 * i for i in range(5)})
    matches = match(target, [])
    assert matches[0] is None
    assert all(m is not None and m.parent == SELF for m in matches[1:])
    assert {m.offset for m in matches[1:] if m} == {target.tensors[0].offset}


# Whatever the facts say


def a_tensor(rng: random.Random, offset: int) -> TensorFacts:
    dtype = rng.choice(list(DTYPES.values()))
    shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))
    nbytes = int(np.prod(shape)) * dtype.nbytes
    name = rng.choice(["model.", "model_ema.", "", "unet."]) + rng.choice(["a", "b", "w.x", ""])
    aliases = tuple(rng.choice("abc") for _ in range(rng.randint(0, 2)))
    sample = rng.choice([b"", rng.randbytes(NBYTES), bytes(NBYTES), rng.randbytes(rng.randint(0, 32) * 2)])
    return TensorFacts(name, dtype.name, shape, offset, nbytes, aliases, sample)


def a_model(rng: random.Random) -> ModelFacts:
    tensors, offset = [], 0
    for _ in range(rng.randint(0, 12)):
        tensors.append(a_tensor(rng, offset))
        offset += tensors[-1].nbytes
    return ModelFacts("opaque", tuple(tensors))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_match_never_reaches_beyond_what_is_there(seed: int) -> None:
    rng = random.Random(seed)
    target, parents = a_model(rng), [a_model(rng) for _ in range(rng.randint(0, 3))]
    matches: list[Match | None] = match(target, parents)
    assert len(matches) == len(target.tensors)
    for number, (tensor, found) in enumerate(zip(target.tensors, matches, strict=True)):
        if found is None:
            continue
        others = target.tensors if found.parent == SELF else parents[found.parent].tensors
        origin = next(o for o in others if o.offset == found.offset and o.nbytes)
        assert castable(DTYPES[found.dtype], DTYPES[tensor.dtype])
        assert 0 < found.count <= tensor.nbytes // DTYPES[tensor.dtype].nbytes
        assert found.count <= origin.nbytes // DTYPES[origin.dtype].nbytes
        if found.parent == SELF:
            # One step only, and never from itself.
            source = target.tensors.index(origin)
            assert source != number
            assert matches[source] is None or matches[source].parent != SELF  # type: ignore[union-attr]


def test_prefixes_are_stripped_to_the_last_and_never_to_nothing() -> None:
    assert stripped("module._orig_mod.model.diffusion_model.w") == "w"
    assert stripped("model.") == "model."
    assert stripped("") == ""
    assert stripped("unet.model.") == "model."


# Fingerprints


def print_of(tensor: torch.Tensor) -> TensorFacts:
    return facts({"w": tensor}).tensors[0]


def test_a_fingerprint_compares_precisions() -> None:
    torch.manual_seed(3)
    values = torch.randn(10_000) * 0.05
    wide, half, brain = print_of(values), print_of(values.half()), print_of(values.bfloat16())
    assert len(wide.fingerprint) == len(half.fingerprint) == len(brain.fingerprint) == NBYTES
    assert max(distances(wide, [wide, half, brain])) < 1.0
    near = print_of(values * 1.001)
    far = print_of(torch.randn(10_000) * 0.05)
    gaps = distances(wide, [near, far])
    assert gaps[0] < GOOD < 8 < gaps[1]


def test_what_cannot_be_compared_is_unrelated() -> None:
    one = print_of(torch.randn(100))
    assert distances(one, [print_of(torch.zeros(100, dtype=torch.int32))])[0] == UNRELATED
    assert distances(one, [print_of(torch.randn(20))])[0] == UNRELATED
    assert list(distances(one, [])) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_of_every_type_and_length(dtype: str) -> None:
    itemsize = DTYPES[dtype].nbytes
    for count in (0, 1, 2, 31, 32, 33, 1000):
        data = np.random.default_rng(count).integers(0, 256, count * itemsize, dtype=np.uint8).tobytes()
        made = fingerprint(BytesSource(b"head" + data + b"tail"), dtype, 4, len(data))
        assert len(made) <= NBYTES
        assert bool(made) == bool(count)
