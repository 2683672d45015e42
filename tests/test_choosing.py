"""Which codec stores what: chosen by size, forced by name, refused where it cannot be had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hydrafs import restore
from hydrafs.choosing import codecs_for
from hydrafs.codecs import rans, registry
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile
from hydrafs.errors import UnsupportedDiff, UsageError
from hydrafs.store import Store

NATIVE = not rans.level().startswith("none")


def _pair(models, store: Path, dtype: str = "fp16") -> tuple[Path, Path]:
    base, tuned = store / "base.safetensors", store / "tuned.safetensors"
    models.save(base, models.base(dtype))
    models.save(tuned, models.tuned(dtype))
    return base, tuned


def _codecs(diff: Path) -> set[str]:
    with DiffFile(diff) as opened:
        used = {c for c in opened.chunk_codec if c != registry.NONE}
    return {registry.by_id(c).name for c in used}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_choice_is_no_larger_than_any_codec_alone(models, store, dtype):
    _, tuned = _pair(models, store, dtype)
    sizes = {}
    for codec in ("auto", *codecs_for("auto"), "zstd"):
        outcome = dehydrate(Store(store, create=True), tuned, Options(keep=True, codec=codec))
        assert outcome.diff is not None
        sizes[codec] = outcome.stored_nbytes
        outcome.diff.unlink()
    # Tables are trained on samples, and the choice is made on samples: one part in fifty is what that may cost.
    assert sizes["auto"] <= 1.02 * min(sizes.values()), sizes


@pytest.mark.parametrize("codec", ["planes", "zstd", "rans"])
def test_a_forced_codec_is_the_only_one(models, store, codec):
    _, tuned = _pair(models, store)
    original = tuned.read_bytes()
    if codec == "rans" and not NATIVE:
        with pytest.raises(UsageError, match="compiler"):
            dehydrate(Store(store, create=True), tuned, Options(codec=codec))
        return
    outcome = dehydrate(Store(store, create=True), tuned, Options(codec=codec))
    assert _codecs(outcome.diff) <= {codec, "zstd", "raw"}
    assert codec in _codecs(outcome.diff)
    assert restore.prove(Store(store), outcome.diff) == hashlib.sha256(original).digest()


def test_an_unknown_codec_is_refused_with_the_names(models, store):
    _, tuned = _pair(models, store)
    with pytest.raises(UsageError, match="planes"):
        dehydrate(Store(store, create=True), tuned, Options(codec="lzma"))
    assert tuned.exists()


def test_without_the_extension_planes_serve(models, store, monkeypatch):
    monkeypatch.setattr(rans, "_native", None)
    _, tuned = _pair(models, store)
    outcome = dehydrate(Store(store, create=True), tuned)
    assert "rans" not in _codecs(outcome.diff)
    with DiffFile(outcome.diff) as diff:
        assert diff.manifest.required == ()
    with pytest.raises(UsageError, match="compiler"):
        codecs_for("rans")


@pytest.mark.skipif(not NATIVE, reason="without the extension nothing writes this codec")
def test_a_reader_without_the_codec_refuses_by_name(models, store, monkeypatch):
    _, tuned = _pair(models, store)
    outcome = dehydrate(Store(store, create=True), tuned, Options(codec="rans"))
    with DiffFile(outcome.diff) as diff:
        assert diff.manifest.required == ("rans",)
    monkeypatch.setattr("hydrafs.manifest.KNOWN_FEATURES", frozenset())
    with pytest.raises(UnsupportedDiff, match="rans"):
        DiffFile(outcome.diff)


@pytest.mark.skipif(not NATIVE, reason="without the extension nothing writes this codec")
def test_what_the_extension_wrote_is_read_without_it(models, store, monkeypatch):
    _, tuned = _pair(models, store)
    original = tuned.read_bytes()
    outcome = dehydrate(Store(store, create=True), tuned, Options(codec="rans"))
    monkeypatch.setattr(rans, "_native", None)
    assert restore.prove(Store(store), outcome.diff) == hashlib.sha256(original).digest()


def test_a_second_copy_of_a_dehydrated_model_is_stored_against_the_base(models, store):
    base, tuned = _pair(models, store)
    twin = store / "twin.safetensors"
    twin.write_bytes(tuned.read_bytes())
    first = dehydrate(Store(store, create=True), tuned, Options(bases=(base,)))
    second = dehydrate(Store(store), twin)
    assert second.original_removed
    assert second.parents == ("base.safetensors",)
    assert second.sha256 == first.sha256 == restore.prove(Store(store), second.diff)
