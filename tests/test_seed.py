"""The seed tool's files: what it wrote becomes a model of ours that loads to what it would have made, and back."""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DTYPES, ModelMaker, Tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_oracles import seed_add, seed_subtract
from mounts import Library, Mount

from hydrafs.cli import main
from hydrafs.dtypes import BY_TORCH_NAME
from hydrafs.errors import BadModel, HydraError, UsageError
from hydrafs.layout import BytesSource, FileSource
from hydrafs.seed import arithmetic, states
from hydrafs.seed.reader import limit_for, open_diff, read_diff, unpacked

pytest_plugins = ["mounting_fixtures"]

UNET = "model.diffusion_model."
FORMS = ("pbz2", "plain", "legacy", "unpacked")
MTIME_NS = 1_600_000_000_000_000_000
BIG = 1 << 30


# The seed tool's scripts, from their behaviour: what they do with files, around the arithmetic of merge_oracles


def ckpt_load(path: Path) -> Tensors:
    return torch.load(path, weights_only=True)["state_dict"]


def ckpt_subtract(model: Path, base: Path, output: Path, *, nocompress: bool = False) -> Path:
    return save_diff(seed_subtract(ckpt_load(model), ckpt_load(base)), output, "plain" if nocompress else "pbz2")


def save_diff(diff: Tensors, output: Path, form: str = "pbz2") -> Path:
    if form == "pbz2":
        path = output.with_name(output.name + ".pbz2")
        with bz2.BZ2File(path, "w") as file:
            pickle.dump(diff, file)
        return path
    if form == "unpacked":  # what bunzip2 leaves
        output.write_bytes(pickle.dumps(diff))
    else:
        torch.save({"state_dict": diff}, output, _use_new_zipfile_serialization=form != "legacy")
    return output


def load_diff(path: Path) -> Tensors:
    if path.suffix == ".pbz2":
        with bz2.BZ2File(path, "rb") as file:
            return pickle.load(file)
    return ckpt_load(path)


def ckpt_add(diff: Path, base: Path) -> Tensors:
    return seed_add(load_diff(diff), ckpt_load(base))


# What is compared, and with what


def assert_same(found: Tensors, wanted: Tensors) -> None:
    """The same names in the same order, types, shapes and bits."""
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(bits(found[key]), bits(value)), key


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run_(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run_


Run = Callable[..., Ran]


def good(ran: Ran) -> Ran:
    assert (ran.code, ran.err) == (0, "")
    return ran


def bad(ran: Ran, code: int, *words: str) -> Ran:
    assert (ran.code, ran.out) == (code, ""), ran
    assert ran.err.startswith("hydrafs: ")
    assert ran.err.count("\n") == 1
    for word in words:
        assert word in ran.err
    return ran


def base_of(models: ModelMaker, dtype: str) -> Tensors:
    tensors = {UNET + key: value for key, value in models.base(dtype).items()}
    tensors["betas"] = torch.linspace(0, 1, 40)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    return tensors


def tuned_of(models: ModelMaker, dtype: str) -> Tensors:
    tensors = {UNET + key: value for key, value in models.tuned(dtype).items()}
    tensors["betas"] = torch.linspace(0, 2, 40)
    tensors["model.of.its.own"] = torch.ones(5)
    return tensors


@dataclass
class Pair:
    """A base and a fine-tune as files, and a folder for the rest."""

    root: Path
    base: Path
    tuned: Path

    @property
    def diff(self) -> Path:
        return self.root / "tuned.ckpt.hydra"


@pytest.fixture
def pair(models: ModelMaker, store: Path, request: pytest.FixtureRequest) -> Pair:
    dtype = getattr(request, "param", "fp16")
    return Pair(
        store,
        models.save(store / "base.ckpt", base_of(models, dtype), wrap=True),
        models.save(store / "tuned.ckpt", tuned_of(models, dtype), wrap=True),
    )


# Import


@pytest.mark.fuse
def test_what_the_mount_shows_is_what_ckpt_add_makes(
    run: Run, models: ModelMaker, tmp_path: Path, mounted: Callable[..., Mount]
) -> None:
    """Every precision in every form that the tool's diffs come in."""
    store, aside = tmp_path / "store", tmp_path / "aside"
    store.mkdir()
    aside.mkdir()
    wanted: dict[str, Tensors] = {}
    legacy: dict[Path, bytes] = {}
    for dtype in DTYPES:
        base = models.save(store / f"base-{dtype}.ckpt", base_of(models, dtype), wrap=True)
        diff = seed_subtract(tuned_of(models, dtype), base_of(models, dtype))
        assert UNET + "frozen.weight" not in diff
        assert diff[UNET + "norm.num_batches_tracked"].dtype == torch.int64
        for form in FORMS:
            path = save_diff(diff, aside / f"{dtype}-{form}", form)
            legacy[path] = path.read_bytes()
            os.utime(path, ns=(MTIME_NS, MTIME_NS))
            facts = good(run("import", path, "--base", base, "--store", store, "--json")).json
            assert facts["diff"] == str(store / f"{dtype}-{form}.ckpt.hydra")
            assert facts["parents"] == [base.name]
            assert facts["stored"] < 0.95 * facts["size"]
            wanted[f"{dtype}-{form}.ckpt"] = seed_add(load_or_take(path, form, diff), ckpt_load(base))
    mount = mounted(Library(store, {}))
    for name, tensors in wanted.items():
        path = mount.path / name
        loaded = torch.load(path, weights_only=True)
        assert list(loaded) == ["state_dict"]
        assert_same(loaded["state_dict"], tensors)
        assert path.stat().st_mtime_ns == MTIME_NS
    assert {path: path.read_bytes() for path in legacy} == legacy
    assert not list(store.glob(".hydrafs-tmp-*"))


def load_or_take(path: Path, form: str, diff: Tensors) -> Tensors:
    return diff if form == "unpacked" else load_diff(path)


def imported(run: Run, path: Path, base: Path, *more: object) -> tuple[Any, Tensors]:
    """What the command said, and what the model loads to when it is written out again."""
    facts = good(run("import", "--json", path, "--base", base, *more)).json
    assert facts["diff"], "it was to shrink"
    output = path.with_name("written.ckpt")
    good(run("rehydrate", facts["diff"], "-o", output))
    loaded = ckpt_load(output)
    output.unlink()
    return facts, loaded


def test_which_tensors_come_from_where(run: Run, pair: Pair, tmp_path: Path) -> None:
    path = ckpt_subtract(pair.tuned, pair.base, tmp_path / "dehydrated")
    facts, loaded = imported(run, path, pair.base, "--store", pair.root)
    diff, base = load_diff(path), ckpt_load(pair.base)
    assert_same(loaded, ckpt_add(path, pair.base))
    appended = [key for key in base if "model" in key and key not in diff]
    assert facts["tensors"] == {"added": len(diff), "base": len(appended), "diff": 0, "dropped": 1}
    assert "betas" not in loaded
    assert "model.of.its.own" not in loaded
    assert "model_ema.decay" in appended
    (pair.root / "dehydrated.ckpt.hydra").unlink()
    text = good(run("import", path, "--base", pair.base, "--store", pair.root)).out
    assert f"{len(diff)} tensors added to the base's, {len(appended)} are the base's" in text
    assert '1 of the base without "model" in their names are dropped' in text
    assert "dehydrated.ckpt: " in text


def test_keys_that_the_base_has_not_stay_as_the_diff_has_them(run: Run, pair: Pair, tmp_path: Path) -> None:
    """A diff made with another base, or by another tool."""
    base = ckpt_load(pair.base)
    diff = seed_subtract(ckpt_load(pair.tuned), base)
    diff["model.only.here"] = torch.randn(30, 4)
    diff["betas"] = torch.ones(40)  # no "model" in it: not added, though the base has it
    diff["ümläut\n.model"] = torch.tensor([True, False])
    path = save_diff(diff, tmp_path / "odd")
    facts, loaded = imported(run, path, pair.base, "--store", pair.root)
    assert_same(loaded, seed_add(load_diff(path), base))
    assert torch.equal(loaded["betas"], torch.ones(40))
    assert facts["tensors"]["diff"] == 3
    assert facts["tensors"]["dropped"] == 0


def test_types_meet_as_in_torch(run: Run, pair: Pair, tmp_path: Path) -> None:
    """A diff on a base of another precision, integers, booleans, float64, broadcast shapes, no dimensions."""
    base = ckpt_load(pair.base)
    kinds = {
        "model.half_on_single": (torch.randn(50).half(), torch.randn(50)),
        "model.single_on_half": (torch.randn(50), torch.randn(50).half()),
        "model.half_on_bfloat": (torch.randn(50).half(), torch.randn(50).bfloat16()),
        "model.double_on_half": (torch.randn(50).double(), torch.randn(50).half()),
        "model.long": (torch.tensor([1, -5, 2**62]), torch.tensor([3, 4, 2**62])),
        "model.bytes": (torch.tensor([200, 3], dtype=torch.uint8), torch.tensor([100, 4], dtype=torch.uint8)),
        "model.short_on_byte": (torch.tensor([-3, 4], dtype=torch.int8), torch.tensor([200, 4], dtype=torch.uint8)),
        "model.long_on_half": (torch.tensor([4097, 70000, -3]), torch.tensor([0.5, 1, 2]).half()),
        "model.booleans": (torch.tensor([True, False]), torch.tensor([True, True])),
        "model.scalar_on_row": (torch.tensor(0.1), torch.randn(3).half()),
        "model.row_on_column": (torch.randn(1, 4), torch.randn(3, 1)),
        "model.empty": (torch.zeros(0, 3), torch.zeros(0, 3)),
    }
    diff = seed_subtract(ckpt_load(pair.tuned), base)
    for key, (difference, value) in kinds.items():
        diff[key], base[key] = difference, value
    torch.save({"state_dict": base}, pair.base)
    for form in ("pbz2", "plain"):
        path = save_diff(diff, tmp_path / f"kinds-{form}", form)
        _, loaded = imported(run, path, pair.base, "--store", pair.root)
        assert_same(loaded, ckpt_add(path, pair.base))
    assert loaded["model.booleans"].dtype == torch.int64
    assert loaded["model.scalar_on_row"].dtype == torch.float16


def test_views_and_tied_tensors(run: Run, pair: Pair, tmp_path: Path) -> None:
    """Slices, transposes and tensors that share a storage, in the diff and in the base."""
    base = ckpt_load(pair.base)
    shared = torch.randn(40, 60)
    base.update({"model.tied.a": shared, "model.tied.b": shared, "model.part": shared[3:9, 5:], "model.t": shared.T})
    torch.save({"state_dict": base}, pair.base)
    diff = seed_subtract(ckpt_load(pair.tuned), base)
    wide = torch.randn(60, 40)
    diff.update({"model.t": wide, "model.part": wide.T[3:9, 5:], "model.own.part": wide[::2, 1]})
    for form in FORMS:
        path = save_diff(diff, tmp_path / f"views-{form}", form)
        _, loaded = imported(run, path, pair.base, "--store", pair.root)
        assert_same(loaded, seed_add(diff, ckpt_load(pair.base)))
        assert loaded["model.tied.a"].data_ptr() == loaded["model.tied.b"].data_ptr()


def test_a_base_of_any_kind_and_under_any_name(run: Run, pair: Pair, models: ModelMaker, tmp_path: Path) -> None:
    """safetensors, the format before torch 1.6, no state_dict around it, and a diff of ours."""
    path = ckpt_subtract(pair.tuned, pair.base, tmp_path / "dehydrated")
    wanted = ckpt_add(path, pair.base)
    tensors = ckpt_load(pair.base)
    others = {
        "other.safetensors": {},
        "other.pt": {"legacy": True},
        "bare.ckpt": {},
    }
    for number, (name, how) in enumerate(others.items()):
        base = models.save(tmp_path / "bases" / name, tensors, **how)
        _, loaded = imported(run, path, base, "--store", pair.root, "--name", f"from{number}")
        assert loaded.keys() == wanted.keys()
        assert_same({key: loaded[key] for key in wanted}, wanted)  # safetensors sorts its keys
    copy = models.save(pair.root / "copy.ckpt", tensors)
    assert good(run("dehydrate", "--json", "--base", pair.base, copy)).json[0]["diff"]
    _, loaded = imported(run, path, pair.root / "copy.ckpt", "--store", pair.root, "-o", "last.ckpt")
    assert_same(loaded, wanted)


def test_where_it_is_put(run: Run, pair: Pair, tmp_path: Path) -> None:
    path = ckpt_subtract(pair.tuned, pair.base, pair.root / "dehydrated", nocompress=True)
    assert path.name == "dehydrated"
    facts = good(run("import", "--json", path, "--base", pair.base)).json
    assert facts["diff"] == str(pair.root / "dehydrated.ckpt.hydra")
    assert stat.S_IMODE((pair.root / "dehydrated.ckpt.hydra").stat().st_mode) == stat.S_IMODE(path.stat().st_mode)
    bad(run("import", path, "--base", pair.base), 10, "dehydrated.ckpt.hydra", "--name")
    bad(run("import", path, "--base", pair.base, "--name", "base.ckpt"), 10, "base.ckpt")
    other = tmp_path / "other"
    other.mkdir()
    facts = good(run("import", "--json", path, "--base", pair.base, "--output", other / "named.ckpt.hydra")).json
    assert facts["diff"] == str(other / "named.ckpt.hydra")
    assert str(pair.root) in (other / ".hydrafs" / "config.toml").read_text()
    good(run("verify", other))


def test_a_model_that_does_not_shrink_is_kept_whole(run: Run, pair: Pair, tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.a": torch.zeros(1)}}, pair.base)
    path = save_diff({"model.b": torch.randint(0, 256, (400_000,), dtype=torch.uint8)}, tmp_path / "noise")
    path.chmod(0o640)
    facts = good(run("import", "--json", path, "--base", pair.base, "--store", pair.root)).json
    assert facts["diff"] is None
    assert facts["model"] == str(pair.root / "noise.ckpt")
    assert_same(ckpt_load(pair.root / "noise.ckpt"), ckpt_add(path, pair.base))
    assert stat.S_IMODE((pair.root / "noise.ckpt").stat().st_mode) == 0o640


# Refused


def test_what_cannot_be_added_is_refused(run: Run, pair: Pair, tmp_path: Path) -> None:
    key = UNET + "up.weight"
    path = save_diff({key: torch.randn(3, 5)}, tmp_path / "shapes")
    bad(run("import", path, "--base", pair.base, "--store", pair.root), 2, key, "[3, 5] and [512, 96]", "base")
    path = save_diff({key: torch.zeros(512, 96).to(torch.float8_e4m3fn)}, tmp_path / "types")
    bad(run("import", path, "--base", pair.base, "--store", pair.root), 2, key, "float8_e4m3fn")
    assert sorted(p.name for p in pair.root.iterdir()) == ["base.ckpt", "tuned.ckpt"]


def test_arguments_that_cannot_be_meant(run: Run, pair: Pair, tmp_path: Path) -> None:
    path = ckpt_subtract(pair.tuned, pair.base, tmp_path / "dehydrated")
    bad(run("import", path), 2, "--base")
    bad(run("import", tmp_path / "none.pbz2", "--base", pair.base), 3, "none.pbz2")
    bad(run("import", path, "--base", tmp_path / "none.ckpt"), 3, "none.ckpt")
    bad(run("import", path, "--base", pair.base, "--store", tmp_path / "none"), 3, "none")
    junk = tmp_path / "junk"
    junk.write_bytes(os.urandom(4000))
    bad(run("import", junk, "--base", pair.base), 4, "junk")
    bad(run("import", path, "--base", junk), 4, "junk", ".safetensors")
    packed = tmp_path / "dehydrated.gz"
    packed.write_bytes(b"\x1f\x8b" + bytes(100))
    bad(run("import", packed, "--base", pair.base), 2, "gzip")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_executes(run: Run, pair: Pair, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tensor = torch.ones(4)
    for number, content in enumerate(
        [Evil(marker), {"model.a": Evil(marker)}, {"model.a": tensor, "b": Evil(marker)}, {Evil(marker): tensor}]
    ):
        path = save_diff(content, tmp_path / f"evil{number}")  # type: ignore[arg-type]
        bad(run("import", path, "--base", pair.base), 4, f"evil{number}.pbz2", "system", "not run")
    for form in ("plain", "legacy"):
        path = save_diff({"model.a": Evil(marker)}, tmp_path / f"evil-{form}", form)  # type: ignore[dict-item]
        bad(run("import", path, "--base", pair.base), 4, f"evil-{form}")
    inner = io.BytesIO()
    torch.save(Evil(marker), inner, _use_new_zipfile_serialization=False)
    hidden = pickle.dumps({"model.a": tensor}).replace(b"torch._utils", b"torch._utilz")
    path = tmp_path / "hidden.pbz2"
    path.write_bytes(bz2.compress(hidden))
    bad(run("import", path, "--base", pair.base), 4, "torch._utilz")
    path.write_bytes(bz2.compress(with_storage(inner.getvalue())))
    bad(run("import", path, "--base", pair.base), 4, "no storage of torch", "model.a")
    assert not marker.exists()


def with_storage(blob: bytes) -> bytes:
    """The pickle of {"model.a": a tensor of 4 float32} whose storage is pickled as ``blob``."""
    size = b"B" + len(blob).to_bytes(4, "little")
    return (
        b"\x80\x04}X\x07\0\0\0model.actorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
        + size + blob + b"\x85RK\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def storage(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def typed(tensor: torch.Tensor, *, modern: bool = False) -> bytes:
    buffer = io.BytesIO()
    typed_storage = torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )
    torch.save(typed_storage, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def read(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    state = read_diff(BytesSource(data), Path("x"))
    return {key: ref.read().view(f"<u{ref.dtype.nbytes}").reshape(ref.shape) for key, ref in state.items()}


def test_storages_of_either_format() -> None:
    """torch pickles storages in its old format; the new one reads the same."""
    wanted = np.arange(4, dtype="<f4").view("<u4")
    for blob in (typed(torch.arange(4.0)), typed(torch.arange(4.0), modern=True)):
        assert np.array_equal(read(with_storage(blob))["model.a"], wanted)
    with pytest.raises(BadModel, match="type"):  # bytes of no type
        read(with_storage(storage(torch.arange(4.0))))
    with pytest.raises(BadModel, match="within its storage"):
        read(with_storage(typed(torch.arange(3.0))))
    deep = with_storage(with_storage(typed(torch.arange(4.0))))
    with pytest.raises(BadModel):
        read(deep)


def test_types_without_a_storage_of_their_own() -> None:
    state = {"model.f8": torch.arange(4.0).to(torch.float8_e5m2), "model.u16": torch.tensor([1, 2]).to(torch.uint16)}
    found = read_diff(BytesSource(pickle.dumps(state)), Path("x"))
    for key, tensor in state.items():
        assert found[key].dtype is BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
        assert found[key].read().tobytes() == bits(tensor).numpy().tobytes()


def test_tensors_that_are_not_within_their_storage(tmp_path: Path) -> None:
    """Sizes, strides and offsets that reach beyond, or that make much of little."""
    good_pickle = with_storage(typed(torch.arange(4.0)))
    assert read(good_pickle)["model.a"].shape == (4,)
    place = b"\x85RK\x00K\x04\x85K\x01\x85"
    assert good_pickle.count(place) == 1
    for offset, size, step in ((1, 4, 1), (0, 5, 1), (0, 4, 2), (0, 200, 0), (255, 1, 1)):
        wrong = b"\x85RK" + bytes([offset]) + b"K" + bytes([size]) + b"\x85K" + bytes([step]) + b"\x85"
        with pytest.raises(BadModel, match="within its storage"):
            read(good_pickle.replace(place, wrong))
    huge = b"\x85RK\x00" + b"J\xff\xff\xff\x7f" * 2 + b"\x86" + b"K\x00K\x00\x86"
    with pytest.raises(BadModel, match="within its storage"):
        read(good_pickle.replace(place, huge))
    many = {f"model.{n}": torch.ones(1000) for n in range(3)}
    one = torch.ones(1000)
    with pytest.raises(BadModel, match="far larger"):
        path = tmp_path / "many.ckpt"
        torch.save({f"model.{n}": one for n in range(3000)} | many, path)
        with FileSource(path) as source:
            states.read_state(source, "many")


def test_bombs(run: Run, pair: Pair, tmp_path: Path) -> None:
    """Little that unpacks to much; pickles that ask for much."""
    bomb = tmp_path / "bomb.pbz2"
    head = b"\x80\x04}X\x07\0\0\0model.a\x8e" + (1 << 40).to_bytes(8, "little")
    unpacker = bz2.BZ2Compressor()
    with bomb.open("wb") as file:
        file.write(unpacker.compress(head))
        for _ in range(96):
            file.write(unpacker.compress(bytes(1 << 20)))
        file.write(unpacker.flush())
    assert bomb.stat().st_size < 10_000
    assert limit_for(pair.base.stat().st_size) < 96 << 20
    bad(run("import", bomb, "--base", pair.base, "--store", pair.root), 4, "bomb.pbz2", "more than", "base")
    assert not list(pair.root.glob(".hydrafs-tmp-*"))
    with pytest.raises(BadModel, match="ends early"):
        read(head + bytes(1000))
    for many in (
        b"\x80\x04" + b"(" * 500_000 + b".",
        b"\x80\x04]" + b"]a" * 500_000 + b".",
        b"\x80\x04" + b"N\x85" + b"\x85" * 500_000 + b".",
        b"\x80\x04}" + b"N0" * 500_000 + b".",
    ):
        with pytest.raises(BadModel):
            read(many)


def test_a_hostile_diff_takes_bounded_memory(pair: Pair, tmp_path: Path) -> None:
    """In a process of its own, so that its peak is the reader's."""
    path = tmp_path / "large.pbz2"
    compressor = bz2.BZ2Compressor()
    with path.open("wb") as file:
        file.write(compressor.compress(b"\x80\x04}X\x07\0\0\0model.aB" + (1 << 31).to_bytes(4, "little")))
        for _ in range(600):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    script = (
        "import resource, sys; from pathlib import Path; from hydrafs.seed.reader import open_diff\n"
        "from hydrafs.errors import BadModel\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    with open_diff(Path(sys.argv[1]), Path(sys.argv[2]), 1 << 40): pass\n"
        "except BadModel as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path, tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    message, kibibytes = done.stdout.splitlines()
    assert "ends early" in message
    assert int(kibibytes) < 48 << 10


@pytest.fixture(scope="module")
def small_diff() -> bytes:
    """A diff of a few tensors, unpacked."""
    return pickle.dumps({"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(3).half(), "x": one_view()})


def one_view() -> torch.Tensor:
    return torch.arange(10)[2:5]


def survives(data: bytes) -> None:
    with contextlib.suppress(HydraError):
        for ref in read_diff(BytesSource(data), Path("x")).values():
            ref.read()


def test_truncated_anywhere(small_diff: bytes) -> None:
    for length in range(0, len(small_diff), 3):
        with pytest.raises(HydraError):
            read(small_diff[:length])
    packed = bz2.compress(small_diff)
    for length in range(3, len(packed), 7):
        with pytest.raises(BadModel, match="early"):
            list(unpacked(BytesSource(packed[:length]), BIG, Path("x")))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bits(small_diff: bytes, data: st.DataObject) -> None:
    wrong = bytearray(small_diff)
    for at in data.draw(st.lists(st.integers(0, len(wrong) * 8 - 1), min_size=1, max_size=10)):
        wrong[at // 8] ^= 1 << at % 8
    survives(bytes(wrong))


def test_bz2_streams(tmp_path: Path, small_diff: bytes) -> None:
    """Several one after another, as parallel bzip2 programs write; junk behind them; damage."""
    third = len(small_diff) // 3
    packed = b"".join(bz2.compress(part) for part in (small_diff[:third], b"", small_diff[third:]))
    for tail in (b"", b"junk", bytes(5000)):
        assert b"".join(unpacked(BytesSource(packed + tail), BIG, Path("x"))) == small_diff
    with pytest.raises(BadModel, match="damaged"):
        list(unpacked(BytesSource(packed[:40] + b"\xff" + packed[41:]), BIG, Path("x")))
    path = tmp_path / "several.pbz2"
    path.write_bytes(packed)
    with open_diff(path, tmp_path, BIG) as state:
        assert list(state) == ["model.a", "model.b", "x"]
        assert state["x"].read().view("<i8").tolist() == [2, 3, 4]
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [path]


# The arithmetic


FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def words_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return bits(tensor).numpy().copy()


def kind_of(tensor: torch.Tensor) -> Any:
    return BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]


def operands(a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
    return words_of(a), kind_of(a), tuple(a.shape), words_of(b), kind_of(b), tuple(b.shape)


def assert_computes(a: torch.Tensor, b: torch.Tensor) -> None:
    """Sum and difference are torch's: type, shape and bits, a NaN being a NaN."""
    for ours, wanted in ((arithmetic.added, a + b), (arithmetic.subtracted, a - b)):
        words, dtype = ours(*operands(a, b))
        assert dtype.torch_name == str(wanted.dtype).removeprefix("torch.")
        found = torch.from_numpy(words.copy()).view(wanted.dtype).reshape(wanted.shape)
        if wanted.is_floating_point():
            assert torch.equal(found.isnan(), wanted.isnan())
            found, wanted = found.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), wanted.clone()
            wanted = wanted.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        assert torch.equal(bits(found), bits(wanted))
    assert arithmetic.equal(*operands(a, b)) == torch.equal(a, b)
    assert arithmetic.equal(*operands(a, a)) == torch.equal(a, a)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_with_many(name: str) -> None:
    """All 65,536 words, each with itself, its neighbours, and a few hundred others."""
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(FLOATS[name])
    torch.manual_seed(3)
    for shift in (0, 1, 1024, 32768, *torch.randint(0, 65536, (40,)).tolist()):
        assert_computes(every, every.roll(shift))
    assert_computes(every, every[torch.randperm(65536)])


@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_sums_are_torchs(first: str, second: str) -> None:
    """Random words, and values close to each other, whose difference is where rounding shows."""
    torch.manual_seed(4)
    for a_name, b_name in ((first, second), (second, first)):
        a, b = FLOATS[a_name], FLOATS[b_name]
        a_words = torch.randint(0, 256, (20_000 * 8,), dtype=torch.uint8).view(a)[:20_000]
        b_words = torch.randint(0, 256, (20_000 * 8,), dtype=torch.uint8).view(b)[:20_000]
        assert_computes(a_words, b_words)
        weights = torch.randn(20_000) * torch.exp(torch.randn(20_000))
        assert_computes(weights.to(a), (weights + 1e-4 * torch.randn(20_000)).to(b))
        assert_computes((weights * 1e-6).to(a), (weights * 1e-6).to(b))


ALL = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip


def test_types_and_shapes_of_results_are_torchs() -> None:
    for a in ALL:
        for b in ALL:
            for a_shape in ((), (2,)):
                for b_shape in ((), (2,), (3, 1)):
                    first, second = torch.ones(a_shape).to(a), torch.ones(b_shape).to(b)
                    found = arithmetic.result_dtype(kind_of(first), a_shape, kind_of(second), b_shape)
                    assert found.torch_name == str(torch.result_type(first, second)).removeprefix("torch."), (a, b)
                    assert arithmetic.result_shape(a_shape, b_shape) == torch.broadcast_shapes(a_shape, b_shape)
    for shapes in (((2,), (3,)), ((2, 2), (3, 1, 4))):
        with pytest.raises(UsageError, match="fit"):
            arithmetic.result_shape(*shapes)


def test_other_kinds_of_numbers() -> None:
    torch.manual_seed(5)
    raw = torch.randint(-(2**62), 2**62, (1000,))
    for a in ALL[1:]:
        for b in ALL[1:]:
            assert_computes(raw.to(a), raw.roll(1).to(b))
    with pytest.raises(UsageError, match="booleans"):
        arithmetic.subtracted(*operands(torch.tensor([True]), torch.tensor([False])))
    with pytest.raises(UsageError, match="float8"):
        arithmetic.added(*operands(torch.ones(1).to(torch.float8_e5m2), torch.ones(1)))
    with pytest.raises(UsageError, match="complex64"):
        arithmetic.added(*operands(torch.ones(1, dtype=torch.complex64), torch.ones(1)))


def test_values_that_changed() -> None:
    def changed(a: torch.Tensor, b: torch.Tensor) -> int:
        return arithmetic.values_changed(words_of(a), kind_of(a), words_of(b), kind_of(b))

    nan, other_nan = torch.tensor([0x7E00, 0x7E01], dtype=torch.int16).view(torch.float16)
    a = torch.stack([torch.tensor(1.0).half(), torch.tensor(0.0).half(), nan, torch.tensor(2.0).half()])
    b = torch.stack([torch.tensor(1.0).half(), torch.tensor(-0.0).half(), other_nan, torch.tensor(3.0).half()])
    assert changed(a, a) == 0
    assert changed(a, b) == 2
    assert changed(a, a.float()) == 0
    assert changed(a, b.float()) == 1
    assert changed(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1
    assert changed(torch.ones(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64)) == 2
    assert changed(torch.ones(2, dtype=torch.complex64), torch.ones(2)) == 2


# Export


@pytest.fixture
def dehydrated(run: Run, pair: Pair) -> Pair:
    assert good(run("dehydrate", "--json", "--keep", "--base", pair.base, pair.tuned)).json[0]["diff"]
    return pair


@pytest.mark.parametrize("pair", DTYPES, indirect=True)
@pytest.mark.parametrize("plain", [False, True], ids=["pbz2", "nocompress"])
def test_export_is_what_ckpt_subtract_writes(run: Run, dehydrated: Pair, plain: bool, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    more = ["--no-compress"] if plain else []
    facts = good(
        run("export", "--seed", dehydrated.diff, "--base", dehydrated.base, "-o", output, "--json", *more)
    ).json
    path = Path(facts["path"])
    assert path == (output if plain else tmp_path / "exported.pbz2")
    theirs = load_diff(ckpt_subtract(dehydrated.tuned, dehydrated.base, tmp_path / "theirs", nocompress=plain))
    assert_same(load_diff(path), theirs)
    back = ckpt_add(path, dehydrated.base)
    wanted = ckpt_load(dehydrated.tuned)
    common = [key for key in wanted if key in back]
    differ = {key: int((back[key] != wanted[key]).sum()) for key in common}
    assert facts["values"] == sum(wanted[key].numel() for key in common)
    assert facts["inexact"] == sum(differ.values())
    # Half-precision differences of values within a factor of two are exact (Sterbenz); small weights' need not be.
    assert facts["inexact"] > 0 or wanted[UNET + "up.weight"].dtype == torch.float16
    assert facts["inexact_tensors"] == sum(map(bool, differ.values()))
    assert facts["lost"] == [key for key in wanted if key not in back] == ["betas", "model.of.its.own"]
    assert facts["foreign"] == ["model_ema.decay", "model_ema.num_updates"]
    assert facts["tensors"] == len(theirs)
    assert (facts["retyped"], facts["refused"]) == ([], [])
    assert facts["stored"] == path.stat().st_size


def test_export_there_and_back(run: Run, dehydrated: Pair, tmp_path: Path) -> None:
    """Ours, as theirs, as ours again: what their tool would have made of it."""
    path = Path(good(run("export", "--seed", "--json", dehydrated.tuned, "--base", dehydrated.base)).json["path"])
    assert path == dehydrated.root / "tuned.pbz2"
    _, loaded = imported(run, path, dehydrated.base, "--name", "again.ckpt")
    assert_same(loaded, ckpt_add(path, dehydrated.base))


def test_export_tells_what_is_lost(run: Run, dehydrated: Pair, tmp_path: Path) -> None:
    text = good(run("export", "--seed", dehydrated.tuned, "--base", dehydrated.base)).out
    assert "ckpt_add.py does not bring back" in text
    assert "values exactly" in text
    assert "2 tensors do not come back: not in the base" in text
    assert "2 tensors of the base come with them: model_ema.decay" in text
    bad(run("export", "--seed", dehydrated.tuned, "--base", dehydrated.base), 10, "tuned.pbz2", "--output")
    bad(run("export", dehydrated.tuned, "--base", dehydrated.base), 2, "--seed")
    bad(run("export", "--seed", dehydrated.base, "--base", dehydrated.base), 2, "nothing to write")
    bad(
        run("export", "--seed", dehydrated.base, "--base", dehydrated.base, "--no-compress", "-o", "x.pbz2"), 2, ".pbz2"
    )


def test_export_of_what_the_seed_cannot_hold(run: Run, store: Path) -> None:
    """Types that torch does not subtract, shapes that do not fit, other precisions: each is told."""
    base = {
        "model.bool": torch.tensor([True, False]),
        "model.f8": torch.ones(4).to(torch.float8_e4m3fn),
        "model.shape": torch.ones(3),
        "model.wider": torch.randn(50),
        "model.zero": torch.tensor([0.0, 1.0]),
        "model.same": torch.ones(9),
    }
    model = {
        "model.bool": torch.tensor([True, True]),
        "model.f8": torch.zeros(4).to(torch.float8_e4m3fn),
        "model.shape": torch.ones(2),
        "model.wider": base["model.wider"].half(),
        "model.zero": torch.tensor([-0.0, 1.0]),
        "model.same": torch.ones(9).half(),
    }
    torch.save({"state_dict": base}, store / "base.ckpt")
    torch.save({"state_dict": model}, store / "model.ckpt")
    facts = good(run("export", "--seed", "--json", store / "model.ckpt", "--base", store / "base.ckpt")).json
    assert facts["refused"] == ["model.bool", "model.f8", "model.shape"]
    assert facts["retyped"] == ["model.shape", "model.wider", "model.same"]
    fitting = {key: model[key] for key in ("model.wider", "model.zero", "model.same")}
    assert_same(load_diff(Path(facts["path"])), seed_subtract(fitting, base))
    back = ckpt_add(Path(facts["path"]), store / "base.ckpt")
    wider = int((back["model.wider"] != model["model.wider"].float()).sum())
    assert facts["inexact"] == 1 + 4 + 2 + wider + 1  # the last is the -0, which equal() takes for 0


def test_export_of_large_tensors_and_odd_names(run: Run, store: Path) -> None:
    """Several bz2 streams; names that are no identifiers; a thousand tensors."""
    torch.manual_seed(6)
    base = {f"model.{n}": torch.randn(n % 7, 3) for n in range(1000)}
    base["model.large"] = torch.randn(3_000_000)
    base["model.ümläut\n'\"\\ {}"] = torch.randn(2, 1, 3, 1)
    base["model.scalar"] = torch.tensor(1.5)
    model = {key: value + 0.25 for key, value in base.items()}
    torch.save(base, store / "base.ckpt")
    torch.save(model, store / "model.ckpt")
    wanted = seed_subtract(model, base)
    for number, more in enumerate((["-j", 3], ["--no-compress"])):
        output = store / f"out{number}"
        facts = good(
            run("export", "--seed", "--json", store / "model.ckpt", "--base", store / "base.ckpt", "-o", output, *more)
        ).json
        assert_same(load_diff(Path(facts["path"])), wanted)


# What it costs those who do not use it


def test_torch_is_loaded_by_import_alone(pair: Pair, tmp_path: Path) -> None:
    """Not by help, not by export, not by an import that is refused before anything is written."""
    path = ckpt_subtract(pair.tuned, pair.base, tmp_path / "dehydrated")
    script = (
        "import sys; from hydrafs.cli import main; code = main(sys.argv[1:]);"
        "print('torch' in sys.modules, code, file=sys.stderr)"
    )

    def loads_torch(*arguments: object) -> tuple[bool, int]:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        loaded, code = done.stderr.splitlines()[-1].split()
        return loaded == "True", int(code)

    assert loads_torch("--help") == (False, 0)
    assert loads_torch("import", "--help") == (False, 0)
    assert loads_torch("export", "--seed", pair.tuned, "--base", pair.base, "-o", tmp_path / "x") == (False, 0)
    assert loads_torch("import", tmp_path / "none", "--base", pair.base) == (False, 3)
    assert loads_torch("import", path, "--base", pair.base) == (True, 0)


def test_without_torch(pair: Pair, tmp_path: Path) -> None:
    path = ckpt_subtract(pair.tuned, pair.base, tmp_path / "dehydrated")
    script = "import sys; sys.modules['torch'] = None; from hydrafs.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "import", str(path), "--base", str(pair.base)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install torch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dehydrated.pbz2", "store"]


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob(".hydrafs-tmp-*"))
