"""Space comes back by itself: what nobody needs goes, and chains never take more than whole models would."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_keeping import Family, family, read_model  # noqa: F401 - a fixture

from hydrafs import collection, keeping, opening, rehome, tending
from hydrafs.cli import main
from hydrafs.errors import Changing
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.worker import Worker

TUNED = [f"tuned{number}.safetensors" for number in range(3)]


def models_nbytes(root: Path) -> int:
    """What the models of a store take, listed and kept, each file once."""
    places = [p for p in root.rglob("*") if p.parent == root or p.parent.name in ("held", "retired", "trash")]
    return sum({(s.st_dev, s.st_ino): s.st_size for p in places if p.is_file() for s in [p.stat()]}.values())


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("drift", [1e-3, 0.2])
def test_a_training_run_that_keeps_its_last_checkpoints(store: Path, kept: int, drift: float) -> None:
    """Each is dehydrated, and the oldest removed: they never take more than they would as plain files."""
    torch.manual_seed(3)
    state = {f"layer{n}.weight": torch.randn(128, 128).half() for n in range(4)}
    now, originals = [0.0], {}
    with contextlib.closing(Store(store, create=True)) as opened:
        worker = Worker(opened, Policy(settle_seconds=0.0, min_nbytes=1), clock=lambda: now[0])
        for epoch in range(16):
            noise = {n: torch.randn(t.shape) for n, t in state.items()}
            state = {n: (t.float() * (1 + drift * noise[n])).half() for n, t in state.items()}
            path = store / f"epoch{epoch:02}.safetensors"
            save_file(state, path)
            os.utime(path, (1.6e9 + epoch, 1.6e9 + epoch))
            originals[path] = path.read_bytes()
            if len(originals) > kept:
                oldest = min(originals)
                keeping.remove_model(opened, oldest)
                del originals[oldest]
            now[0] += 1000
            worker.step()
            worker.step()
            assert models_nbytes(store) <= sum(map(len, originals.values())) + (8 << 10), epoch
            for path, data in originals.items():
                assert read_model(opened, path) == data
        for path in originals:
            keeping.remove_model(opened, path)
        worker.step()
        assert models_nbytes(store) == 0


def test_a_base_and_its_dependents_that_are_all_removed(family: Family) -> None:  # noqa: F811
    for name in ("base.safetensors", *TUNED):
        keeping.remove_model(family.store, family.path(name))
    done = tending.maintain(family.store)
    assert done.freed_nbytes >= len(family.originals["base.safetensors"])
    assert models_nbytes(family.root) == 0


def test_what_is_unhashed_gets_its_name_and_goes_when_nobody_needs_it(
    family: Family, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    diffs = {p: p.read_bytes() for p in family.root.glob("*.hydra")}
    family.store.catalog.close()
    (family.store.private / "catalog.sqlite").unlink()
    family.store = Store(family.root)
    for path, data in diffs.items():
        path.write_bytes(data[:-1])
    other = family.path("other.safetensors")
    other.write_bytes(b"y" * 1000)
    keeping.remove_model(family.store, other)
    keeping.remove_model(family.store, family.path("base.safetensors"))
    assert len(keeping.unhashed(family.store)) == 2
    done = tending.maintain(family.store)
    assert {t.path for t in done.troubles} == set(diffs)
    assert not keeping.unhashed(family.store)
    assert len(list(family.store.retired.iterdir())) == 2
    for path, data in diffs.items():
        path.write_bytes(data)
    family.check(but=("base.safetensors",))
    done = tending.maintain(family.store, rehomes=False)
    assert not done.troubles
    assert len(list(family.store.retired.iterdir())) == 1
    family.check(but=("base.safetensors",))


@pytest.mark.logs("nobody knows whether others need")
def test_a_damaged_diff_that_was_removed_goes_in_time(family: Family) -> None:  # noqa: F811
    path = family.path(TUNED[0] + ".hydra")
    path.write_bytes(path.read_bytes()[:-1])
    keeping.remove_model(family.store, family.path(TUNED[0]))
    assert tending.maintain(family.store).troubles
    (family.store.private / "config.toml").write_text("[trash]\nseconds = 0\n")
    tending.maintain(family.store)
    assert not tending.maintain(family.store).troubles
    family.check(but=(TUNED[0],))


@pytest.mark.parametrize("number", range(12))
def test_it_is_interrupted_at_any_moment(family: Family, number: int) -> None:  # noqa: F811
    keeping.remove_model(family.store, family.path("base.safetensors"))
    keeping.remove_model(family.store, family.path(TUNED[2]))
    asked = []

    def still() -> None:
        asked.append(1)
        if len(asked) > number:
            raise Changing("the worker ends")

    with contextlib.suppress(Changing):
        tending.maintain(family.store, still=still)
    family.check(but=("base.safetensors", TUNED[2]))
    tending.start(family.store)
    assert not list(family.store.private.glob(".hydrafs-tmp-*"))


def test_what_takes_long_is_done_without_the_lock(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Searching parents, opening all models, hashing and storing anew: a removal meanwhile does not wait."""
    calls = []

    def unlocked(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            with family.store.lock(0.0):  # or StoreLocked
                calls.append(name)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    for name in ("find", "open_diff"):
        unlocked(opening.Opener, name)
    unlocked(tending, "sha256")
    for name in ("rehydrate", "dehydrate"):
        unlocked(rehome, name)
    keeping.remove_model(family.store, family.path("base.safetensors"))
    for place in family.store.held.iterdir():
        place.unlink()
    (retired,) = family.store.retired.iterdir()
    retired.rename(family.store.retired / "unhashed-0")
    keeping.remove_model(family.store, family.path(TUNED[2]))
    keeping.remove_model(family.store, family.path(TUNED[1]))
    tending.maintain(family.store)
    assert {"find", "sha256", "rehydrate"} <= set(calls)
    family.check(but=("base.safetensors", *TUNED[1:]))
    assert models_nbytes(family.root) <= len(family.originals[TUNED[0]])


def snapshot(root: Path) -> dict[str, tuple[int, ...]]:
    return {
        str(p.relative_to(root)): (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink)
        for p in [root, *root.rglob("*")]
        for s in [p.lstat()]
    }


@pytest.mark.parametrize("arguments", [["gc", "--dry-run"], ["gc", "--dry-run", "--rehome"], ["undelete"]])
@pytest.mark.parametrize("ours", [True, False])
def test_a_question_changes_nothing(
    family: Family, arguments: list[str], ours: bool, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Where a retired base has come back, a killed process left things, and nobody needs others."""
    base = family.path("base.safetensors")
    data = base.read_bytes()
    keeping.remove_model(family.store, base)
    keeping.remove_model(family.store, family.path(TUNED[0]))
    base.write_bytes(data)
    digest = next(family.store.retired.iterdir()).name
    keeping.remember_locked(family.store, base, bytes.fromhex(digest))
    (family.root / ".hydrafs-tmp-0").write_bytes(b"left")
    (family.store.private / ".hydrafs-tmp-1").write_bytes(b"left")
    family.store.close()
    if not ours:
        for name in ("lock", "catalog.sqlite", "store.json"):
            (family.store.private / name).unlink(missing_ok=True)
    before = snapshot(family.root)
    assert main([arguments[0], str(family.root), *arguments[1:]]) == 0
    assert snapshot(family.root) == before
    assert "Traceback" not in capsys.readouterr().err
    family.store = Store(family.root)


def test_what_a_dry_run_says_is_what_is_done(family: Family) -> None:  # noqa: F811
    base = family.path("base.safetensors")
    data = base.read_bytes()
    keeping.remove_model(family.store, base)
    base.write_bytes(data)
    keeping.remember_locked(family.store, base, bytes.fromhex(next(family.store.retired.iterdir()).name))
    told = tending.collect(family.store, dry_run=True)
    assert [r.path.parent for r in told.removed] == [family.store.retired]
    assert [r.path for r in tending.collect(family.store).removed] == [r.path for r in told.removed]
    assert collection.collect is tending.collect
    family.check()


@pytest.mark.logs("nobody knows whether others need")
def test_rm_says_for_whom_it_is_kept(family: Family, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["rm", str(family.path("base.safetensors"))]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TUNED)
    family.path(TUNED[0] + ".hydra").write_bytes(b"damaged")
    family.path("x.safetensors").write_bytes(b"x" * 999)
    assert main(["rm", str(family.path("x.safetensors"))]) == 0
    assert TUNED[0] in capsys.readouterr().out
