"""Killed between any two file operations, a store has lost nothing and lists nothing twice; a start tidies up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ModelMaker
from scenarios import MORE, SCENARIOS

from hydrafs.dehydrate import Options, dehydrate
from hydrafs.store import Store


@pytest.fixture(scope="module")
def template(models: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; tuned0, 1, 2 against it; child against tuned0; fresh and another base, plain."""
    root = tmp_path_factory.mktemp("template") / "store"
    base = models.save(root / "base.safetensors", models.base("fp16"))
    with contextlib.closing(Store(root, create=True)) as store:
        for number in range(3):
            tensors = models.tuned("fp16")
            tensors["norm.weight"] = tensors["norm.weight"] + number
            path = models.save(root / f"tuned{number}.safetensors", tensors)
            options = Options(jobs=1, chunk_nbytes=256 << 10, bases=(base,))
            assert dehydrate(store, path, options).original_removed
        path = models.save(root / "child.safetensors", models.tuned("fp32"))
        options = Options(jobs=1, chunk_nbytes=256 << 10, bases=(root / "tuned0.safetensors",))
        assert dehydrate(store, path, options).original_removed
        fresh = models.tuned("fp16")
        fresh["norm.bias"] = fresh["norm.bias"] + 1
        models.save(root / "fresh.safetensors", fresh)
        other = models.base("fp16")
        other["norm.bias"] = other["norm.bias"] + 2
        models.save(root / "other-base.safetensors", other)
    return root


def kills(template: Path, scratch: Path, scenario: str, mode: str, first: int, stride: int, limit: int) -> int:
    numbers = [str(n) for n in (first, stride, limit)]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), template, scratch, scenario, mode, *numbers],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_some_instants(template: Path, tmp_path: Path, scenario: str) -> None:
    first = 1 if scenario == "remove the last" else 2  # it is one unlink, and there is no second instant
    assert kills(template, tmp_path, scenario, "before", first, 4, 6) >= 1


@pytest.mark.parametrize("scenario", ["a worker's step", "overwrite a diff that is a parent", "write into a diff"])
def test_killed_at_the_last_instants(template: Path, tmp_path: Path, scenario: str) -> None:
    assert kills(template, tmp_path, scenario, "after", 8, 3, 5) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*SCENARIOS, *MORE])
def test_killed_at_every_instant(template: Path, tmp_path: Path, scenario: str) -> None:
    """Before each operation of each change, and after each: no two of the kills are the same."""
    total = sum(kills(template, tmp_path, scenario, mode, 1, 1, 1000) for mode in ("before", "after"))
    _made[scenario] = total
    print(f"{scenario}: {total}")
    if len(_made) == len(SCENARIOS) + len(MORE):
        print(f"{sum(_made.values())} different kills")
        assert sum(_made.values()) >= 500


_made: dict[str, int] = {}
