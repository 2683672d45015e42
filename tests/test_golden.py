"""Diffs of format version 1 that another program wrote (scripts/make_golden.py) decode to the bytes that it says.

Nothing here writes a golden file: a reader that goes wrong cannot make them agree with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from conftest import ModelMaker, Tensors

from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile, read_hashes
from hydrafs.manifest import PREDICTION_SAME, SELF
from hydrafs.opening import Opener
from hydrafs.restore import prove
from hydrafs.store import Store, trailer_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = [
    "cast.bin", "group.bin", "hashes.safetensors", "narrow.bin", "planes-alone.bin", "planes-tensor.bin", "raw.bin",
    "same.bin", "self.bin", "zstd.bin",
]  # fmt: skip


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def test_no_golden_file_is_missing_from_the_list() -> None:
    assert sorted(p.name.removesuffix(".hydra") for p in GOLDEN.glob("*.hydra")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_diff_gives_its_model(golden: Path, name: str) -> None:
    expected = (golden / f"{name}.expected").read_bytes()
    with contextlib.closing(Store(golden)) as store:
        assert prove(store, golden / f"{name}.hydra") == hashlib.sha256(expected).digest()
        with Opener(store, ChunkCache(1 << 20)).open_diff(golden / f"{name}.hydra") as model:
            assert model.pread(0, model.size) == expected
            for offset in range(0, len(expected), 997):
                assert model.pread(offset, 1200) == expected[offset : offset + 1200]
    trailer = trailer_of(golden / f"{name}.hydra")
    assert trailer.size == len(expected)
    assert trailer.mtime_ns == 1_700_000_000_123_456_789
    assert stat.S_IMODE(trailer.mode) == 0o640


def decoder() -> Callable[[bytes, dict[bytes, bytes]], bytes]:
    """The decoder that docs/FORMAT.md gives, as it stands there."""
    text = (Path(__file__).parent.parent / "docs" / "FORMAT.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/FORMAT.md", "exec"), names)
    return names["decode"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_of_the_format_document_agrees(name: str) -> None:
    parent = (GOLDEN / "golden-parent.bin").read_bytes()
    parents = {hashlib.sha256(parent).digest(): parent}
    model = decoder()((GOLDEN / f"{name}.hydra").read_bytes(), parents)
    assert model == (GOLDEN / f"{name}.expected").read_bytes()


@pytest.mark.parametrize(("base", "tuned"), [("fp16", "fp16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_the_document_decodes_what_hydrafs_writes(models: ModelMaker, store: Path, base: str, tuned: str) -> None:
    """A model of some kilobytes: its decoder is in no hurry."""

    def small(tensors: Tensors) -> Tensors:
        cut = {name: t[:40, :40] if t.dim() > 1 else t[:40] for name, t in tensors.items() if t.dim()}
        return {name: t.contiguous() for name, t in cut.items()}

    parent = models.save(store / "base.safetensors", small(models.base(base)))
    tensors = {f"m.{k}": v for k, v in small(models.tuned(tuned)).items()}
    tensors |= {f"model_ema.{k.removeprefix('m.').replace('.', '')}": v + 0.001 for k, v in tensors.items()}
    model = models.save(store / "tuned.ckpt", tensors)
    expected = model.read_bytes()
    with contextlib.closing(Store(store, create=True)) as opened:
        outcome = dehydrate(opened, model, Options(bases=(parent,), jobs=1, chunk_nbytes=4096, codec="planes"))
    assert outcome.diff
    data = parent.read_bytes()
    assert decoder()(outcome.diff.read_bytes(), {hashlib.sha256(data).digest(): data}) == expected


def test_the_golden_diffs_hold_every_case() -> None:
    predictions, codecs, flags, narrow, selves, origins, shared = set(), set(), set(), set(), False, set(), 0
    for name in NAMES:
        with DiffFile(GOLDEN / f"{name}.hydra") as diff:
            codecs.update(diff.chunk_codec)
            flags.update(diff.chunk_flags)
            narrow.update(s.narrow for s in diff.manifest.sections)
            predictions.update(s.prediction for s in diff.manifest.spans)
            selves |= any(s.parent == SELF for s in diff.manifest.spans)
            origins.update(s.origin_dtype for s in diff.manifest.spans)
            shared = max(shared, *(len(m) for m in diff.table.section_spans))
            assert diff.manifest.metadata == (("written by", "scripts/make_golden.py"),)
    assert codecs == {0, 1, 2, 3}
    assert flags == {0, 1, 2}
    assert narrow == {"", "F16"}
    assert PREDICTION_SAME in predictions
    assert len(predictions) == 3
    assert selves
    assert origins == {"", "F16", "F32"}
    assert shared == 60


def test_the_golden_parent_is_recognised_by_its_samples(golden: Path) -> None:
    """The parent's probe is part of the format: another writer's must be ours."""
    other = bytearray((golden / "golden-parent.bin").read_bytes())
    (golden / "golden-parent.bin").rename(golden / "renamed.ckpt")
    with contextlib.closing(Store(golden)) as store:
        prove(store, golden / "same.bin.hydra")  # found by its size, probe and SHA-256
        other[5000] ^= 1
        (golden / "renamed.ckpt").write_bytes(other)
    with contextlib.closing(Store(golden)) as store, pytest.raises(Exception, match="has changed"):
        prove(store, golden / "same.bin.hydra")


def test_the_golden_hashes_are_told(golden: Path) -> None:
    """Those with a name and a size that are known, as hashlib and BLAKE3 take them of the model."""
    model = (golden / "hashes.safetensors.expected").read_bytes()
    data_offset = 8 + int.from_bytes(model[:8], "little")
    assert read_hashes(golden / "hashes.safetensors.hydra") == {
        "sha256": hashlib.sha256(model).digest(),
        "blake3": blake3(model).digest(),
        "addnet_sha256": hashlib.sha256(model[data_offset:]).digest(),
        "partial_sha256": hashlib.sha256(b"").digest(),
    }
    assert read_hashes(golden / "same.bin.hydra").keys() == {"sha256"}, "a diff of before"
