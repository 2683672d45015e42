"""What is said of a store is what it costs: what is kept besides the listing, for whom, and why it is no smaller."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, Tensors
from test_cli import Run, good, run

from hydrafs import bases
from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.keeping import remove_model
from hydrafs.needs import census
from hydrafs.restore import prove
from hydrafs.retained import kept
from hydrafs.store import Store

__all__ = ["run"]

OPTIONS = Options(jobs=1, chunk_nbytes=32 << 10)


def fine_tune(models: ModelMaker, seed: int) -> Tensors:
    torch.manual_seed(seed)
    tensors = models.tuned("fp16")
    return {k: t + 1e-3 * torch.randn_like(t) if t.is_floating_point() else t for k, t in tensors.items()}


def store_it(root: Path, name: str, **options: Any) -> Outcome:
    with contextlib.closing(Store(root, create=True)) as store:
        given = {"jobs": 1, "chunk_nbytes": 32 << 10, **options}
        return dehydrate(store, root / name, Options(**given))


def used(root: Path) -> int:
    """What the files of a store take, each once, without hydrafs' own records."""
    files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            if name.endswith((".safetensors", ".hydra")) or len(name) == 64:
                files[stat.st_ino] = stat.st_size
    return sum(files.values())


class TestKept:
    """Whatever way a model left the listing while others need it, its bytes are in the totals, with who needs them."""

    @pytest.fixture
    def root(self, models: ModelMaker, store: Path) -> Path:
        models.save(store / "base.safetensors", models.base("fp16"))
        models.save(store / "tuned.safetensors", fine_tune(models, 1))
        assert store_it(store, "tuned.safetensors").original_removed
        return store

    def check(self, run: Run, root: Path, *, dependents: list[str]) -> dict[str, Any]:
        facts: dict[str, Any] = good(run("ls", "--json", root)).json
        assert facts["kept"] > 0
        assert facts["stored"] + facts["kept"] == used(root)
        assert facts["saved"] == facts["size"] - used(root)
        assert [f["dependents"] for f in facts["kept_files"]] == [dependents]
        out = good(run("ls", root)).out
        assert "kept for others: 1 file" in out
        assert not dependents or f"needed by {dependents[0]}" in out
        return facts

    def test_nothing_is_kept(self, run: Run, root: Path) -> None:
        facts = good(run("ls", "--json", root)).json
        assert (facts["kept"], facts["kept_files"]) == (0, [])
        assert facts["stored"] == used(root)
        assert "kept for others" not in good(run("ls", root)).out

    def test_removed(self, run: Run, root: Path) -> None:
        with contextlib.closing(Store(root)) as store:
            remove_model(store, root / "base.safetensors")
        facts = self.check(run, root, dependents=["tuned.safetensors"])
        assert facts["kept_files"][0]["folder"] == "retired"
        assert good(run("info", "--json", root / "tuned.safetensors")).json["parents"][0]["kept"]
        assert "in no listing" in good(run("info", root / "tuned.safetensors")).out

    def test_removed_behind_its_back(self, run: Run, root: Path) -> None:
        (root / "base.safetensors").unlink()
        assert self.check(run, root, dependents=["tuned.safetensors"])["kept_files"][0]["folder"] == "held"

    def test_overwritten_by_what_is_made_of_it(self, run: Run, models: ModelMaker, root: Path) -> None:
        """A model that was overwritten by its own merge is no cycle: what it needs is what it was."""
        with contextlib.closing(Store(root)) as store:
            remove_model(store, root / "base.safetensors")
        tensors = {k: t * 0.9 if t.is_floating_point() else t for k, t in models.base("fp16").items()}
        models.save(root / "base.safetensors", tensors)
        with contextlib.closing(Store(root)) as store:
            held = next(k for k in kept(store, census(store)))
        shutil.copy(held.path, root / "copy.safetensors")
        assert store_it(root, "base.safetensors", bases=(root / "copy.safetensors",)).original_removed
        (root / "copy.safetensors").unlink()
        facts = good(run("ls", "--json", root)).json
        assert facts["stored"] + facts["kept"] == used(root)
        assert "as it was, kept" in good(run("ls", root)).out

    def test_dehydrated_though_others_need_it(self, run: Run, models: ModelMaker, root: Path) -> None:
        """The saving that is told is what was saved now, and not what a collection may give later."""
        other = models.base("fp16")
        other["norm.bias"] = other["norm.bias"] + 2
        models.save(root / "other.safetensors", other)
        before = used(root)
        ran = good(run("dehydrate", "--json", "--base", root / "other.safetensors", root / "base.safetensors"))
        (facts,) = ran.json
        assert facts["original_removed"]
        assert facts["kept"] == facts["size"]
        assert used(root) >= before
        assert any("needs it" in reason and "not freed" in reason for reason in facts["reasons"])
        self.check(run, root, dependents=["tuned.safetensors"])


class TestCopies:
    """An exact copy of a model that is stored already is stored or left whole, for a true reason; nothing is lost."""

    @pytest.fixture
    def root(self, models: ModelMaker, store: Path) -> Path:
        """A base, b on it, and m, a merge of both, which needs b."""
        base = models.base("fp16")
        b = fine_tune(models, 2)
        models.save(store / "base.safetensors", base)
        models.save(store / "b.safetensors", b)
        merged = {
            k: (0.5 * t.float() + 0.5 * b[k].float()).half() if t.is_floating_point() else t for k, t in base.items()
        }
        shutil.copytree(store, store.parent / "originals")
        models.save(store.parent / "originals" / "m.safetensors", merged)
        assert store_it(store, "b.safetensors").original_removed
        shutil.copy(store.parent / "originals" / "m.safetensors", store)
        assert store_it(store, "m.safetensors").original_removed
        return store

    def check(self, root: Path) -> None:
        originals = root.parent / "originals"
        with contextlib.closing(Store(root)) as store:
            for model in store.models():
                original = (originals / Path(model.name).name.replace("copy-of-", "")).read_bytes()
                if model.is_diff:
                    prove(store, model.path)
                else:
                    assert model.path.read_bytes() == original

    @pytest.mark.parametrize("name", ["base.safetensors", "b.safetensors", "m.safetensors"])
    @pytest.mark.parametrize("all_or_nothing", [False, True])
    def test_of_any_of_a_family(self, root: Path, name: str, all_or_nothing: bool) -> None:
        copy = f"copy-of-{name}"
        shutil.copy(root.parent / "originals" / name, root / copy)
        outcome = store_it(root, copy, all_or_nothing=all_or_nothing)
        assert outcome.original_removed or (root / copy).exists()
        assert outcome.reasons
        self.check(root)
        shutil.copy(root.parent / "originals" / name, root / f"copy-of-{copy}")
        store_it(root, f"copy-of-{copy}")
        self.check(root)

    @pytest.mark.parametrize("base", ["b.safetensors", "m.safetensors"])
    def test_against_what_needs_it(self, run: Run, root: Path, base: str) -> None:
        copy = root / "copy-of-b.safetensors"
        shutil.copy(root.parent / "originals" / "b.safetensors", copy)
        ran = run("dehydrate", "--base", root / base, copy)
        assert ran.code == 7
        assert "same content" in ran.err
        assert "put the original" not in ran.err
        assert copy.exists()
        self.check(root)

    def test_its_twin_is_told_as_kept(self, run: Run, root: Path) -> None:
        """A copy that was stored on its twin keeps the twin's bytes when that is stored itself: they are not kept in
        silence."""
        copy, twin = root / "copy-of-base.safetensors", root / "base.safetensors"
        shutil.copy(twin, copy)
        assert store_it(root, copy.name, bases=(twin,)).original_removed
        with contextlib.closing(Store(root)) as store:
            assert len(census(store).needs) >= 1
        twin.unlink()
        facts = good(run("ls", "--json", root)).json
        assert facts["kept"] >= copy.with_name(copy.name + ".hydra").stat().st_size
        assert facts["stored"] + facts["kept"] == used(root)
        assert "kept for others" in good(run("ls", root)).out
        self.check(root)


class TestManyParents:
    """Where more models would serve than a model may have parents, that is said."""

    @pytest.mark.parametrize("shards", [8, 30])
    def test_shards(self, run: Run, models: ModelMaker, store: Path, shards: int) -> None:
        torch.manual_seed(4)
        tensors = {f"layers.{i}.weight": torch.randn(160, 256).half() for i in range(shards * 2)}
        names = list(tensors)
        for shard in range(shards):
            part = {name: tensors[name] for name in names[2 * shard : 2 * shard + 2]}
            models.save(store / f"model-{shard + 1:05}-of-{shards:05}.safetensors", part)
        tuned = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        models.save(store / "tuned.safetensors", tuned)
        outcome = store_it(store, "tuned.safetensors")
        lacking = 2 * (shards - bases.MAX_PARENTS)
        told = f"{lacking} of {2 * shards} tensors have no parent: at most {bases.MAX_PARENTS} parents"
        if not outcome.parents:
            told = f"no base: {shards} models are each a small part of it: at most {bases.MAX_PARENTS} parents"
        assert told in outcome.reasons
        if outcome.parents:
            assert told in good(run("info", store / "tuned.safetensors")).out
            assert good(run("info", "--json", store / "tuned.safetensors")).json["notes"] == [told]

    def test_enough_parents_are_not_told_of(self, models: ModelMaker, store: Path) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        models.save(store / "tuned.safetensors", fine_tune(models, 5))
        assert not [r for r in store_it(store, "tuned.safetensors").reasons if "at most" in r]


class TestBasesFromOutside:
    """A base that is named from outside the store is that file, and not what stands around it."""

    @pytest.fixture
    def outside(self, models: ModelMaker, store: Path) -> Path:
        folder = store.parent / "outside"
        models.save(folder / "base.safetensors", models.base("fp16"))
        models.save(folder / "deep" / "closer.safetensors", fine_tune(models, 6))
        models.save(store / "tuned.safetensors", fine_tune(models, 6) | {"norm.bias": torch.ones(96).half()})
        (folder / "mount").mkdir()
        return folder

    @pytest.mark.parametrize("how", ["dehydrate", "merge"])
    def test_its_folder_is_not_searched(self, run: Run, store: Path, outside: Path, how: str) -> None:
        base, tuned = outside / "base.safetensors", store / "tuned.safetensors"
        if how == "dehydrate":
            good(run("dehydrate", "--base", base, tuned))
        else:
            good(run("merge", tuned, base, "--virtual", store / "made.safetensors"))
        with contextlib.closing(Store(store)) as opened:
            assert opened.base_files == (base,)
            assert opened.base_folders == ()
            assert [m.path for m in opened.candidates() if not m.path.is_relative_to(store)] == [base]
        facts = json.loads(good(run("bases", "--json", store)).out)
        assert facts["base_files"] == [str(base)]
        assert good(run("verify", store)).code == 0

    @pytest.mark.fuse
    def test_beside_it_can_be_mounted(self, run: Run, store: Path, outside: Path) -> None:
        good(run("dehydrate", "--base", outside / "base.safetensors", store / "tuned.safetensors"))
        point = outside / "mount"
        good(run("mount", store, point, "--dehydrate", "off"))
        try:
            assert (point / "tuned.safetensors").is_file()
            with contextlib.closing(Store(store)) as opened:
                assert not [m for m in opened.candidates() if m.path.is_relative_to(point)]
        finally:
            subprocess.run(["umount", "-l", point], check=True)

    @pytest.mark.fuse
    def test_a_mount_below_a_base_folder_is_not_searched(self, run: Run, store: Path, outside: Path) -> None:
        good(run("mount", store, outside / "mount", "--dehydrate", "off"))
        try:
            with contextlib.closing(Store(store, create=True)) as opened:
                opened.add_base_folder(outside)
                found = [m.path for m in opened.candidates() if not m.path.is_relative_to(store)]
                assert found == [outside / "base.safetensors", outside / "deep" / "closer.safetensors"]
        finally:
            subprocess.run(["umount", "-l", outside / "mount"], check=True)

    def test_what_is_refused_is_named_as_what_it_is(self, run: Run, store: Path, outside: Path) -> None:
        with contextlib.closing(Store(store, create=True)) as opened:
            opened.add_base_folder(outside)
        ran = run("mount", store, outside / "mount")
        assert ran.code == 2
        assert "inside a base folder" in ran.err
        (store / "inner").mkdir()
        assert "inside the store" in run("mount", store, store / "inner").err


class TestVerifyAndDoctor:
    """What cannot be looked at, what was left over, and what nothing keeps is named, and nothing of it is touched."""

    def test_leftovers_are_named(self, run: Run, models: ModelMaker, store: Path) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        models.save(store / "tuned.safetensors", fine_tune(models, 1))
        store_it(store, "tuned.safetensors")
        aside = store / ".hydrafs-aside-0123456789abcdef"
        aside.write_bytes(b"the only copy")
        (store / ".hydrafs" / "retired").mkdir(exist_ok=True)
        unhashed = store / ".hydrafs" / "retired" / "unhashed-1"
        unhashed.write_bytes(b"x" * 1000)
        for command in ("verify", "doctor"):
            out = run(command, store).out
            assert str(aside) in out
            assert str(unhashed) in out
        assert run("verify", "--json", store).json["leftovers"]
        assert aside.read_bytes() == b"the only copy"
        assert unhashed.exists()

    def test_what_cannot_be_looked_at_is_named(
        self, run: Run, models: ModelMaker, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        models.save(store / "inner" / "tuned.safetensors", fine_tune(models, 1))
        store_it(store, "inner/tuned.safetensors")
        real = os.scandir

        def scandir(path: Any = ".") -> Any:
            if str(path) == str(store / "inner"):
                raise OSError(5, "Input/output error", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        ran = run("verify", store)
        assert ran.code == 1
        assert f"{store / 'inner'}: Input/output error" in ran.out
        assert run("verify", "--json", store).json["troubles"]
        assert f"{store / 'inner'}: Input/output error" in run("doctor", store).out
        assert "Input/output error" in run("ls", store).err

    def test_parents_that_cannot_be_held_are_named(self, run: Run, models: ModelMaker, store: Path) -> None:
        models.save(store / "base.safetensors", models.base("fp16"))
        models.save(store / "tuned.safetensors", fine_tune(models, 1))
        store_it(store, "tuned.safetensors")
        shutil.rmtree(store / ".hydrafs" / "held")
        assert "not held" not in run("verify", store).err  # it can be, and will be by whoever acts
        assert not (store / ".hydrafs" / "held").exists()
        (store / "base.safetensors").unlink()
        assert "base.safetensors is not held" in run("verify", store).err
        assert "parent not held" in run("doctor", store).out
        assert run("verify", "--json", store).json["unheld"] == ["base.safetensors"]
