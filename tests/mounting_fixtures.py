"""Real mounts of real stores, made by the real command line, for tests of what a mount promises.

``library``  a ``Library`` that is made once: a store with dehydrated models of every kind, and what each original was.
             It is not to be changed.
``copied``   a function that gives a copy of some of it, to be changed: ``copied("base.safetensors", ...)``.
``binding``  the name of the FUSE binding; the tests that take it, or a mount, run once for each.
``live``     a ``Mount`` of the library that a whole module shares.
``mounted``  a function that mounts a store: ``mounted(store, "-o", "allow_other")`` gives a ``Mount``.

At the end of each the mount is taken down, whatever is open, its daemon is waited for, and the daemon's log must hold
nothing but the lines that the test asked for with ``Mount.logged``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, Tensors
from mounts import MTIME_NS, Library, Mount, Original
from torch import nn

from hydrafs.dehydrate import Options, dehydrate
from hydrafs.fuse import BINDINGS
from hydrafs.store import Store


class Deep(nn.Module):
    """550 layers of few values, so that a checkpoint of it has 1,100 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(550))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) * 0.05
        return x


class Wide(nn.Module):
    """Few large matrices: 22 MB in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40_000, 160)
        self.up, self.middle, self.down = nn.Linear(160, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 160)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.middle(torch.relu(self.up(self.embedding(x))))))


def fine_tuned(network: nn.Module, batch: torch.Tensor, steps: int = 2) -> tuple[Tensors, Tensors]:
    """A network's weights before and after real AdamW steps."""

    def state() -> Tensors:
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(torch.exp(torch.randn_like(parameter) * 0.5))
    before = state()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    for _ in range(steps):
        loss = network(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, state()


@pytest.fixture(scope="session")
def library(models: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Library:
    root = tmp_path_factory.mktemp("library") / "store"
    root.mkdir()
    torch.manual_seed(7)
    wide = fine_tuned(Wide(), torch.randint(0, 40_000, (4,)))
    deep = fine_tuned(Deep(), torch.randn(8, 16))
    models.save(root / "base.safetensors", models.base())
    models.save(root / "wide-base.safetensors", ModelMaker.cast(wide[0], "fp16"))
    models.save(root / "deep-base.ckpt", deep[0])
    tuned = {
        "tuned.safetensors": models.tuned(),
        "half.safetensors": models.tuned("fp16"),
        "tuned.ckpt": models.tuned(),
        "loras/brain, \u00fcml\u00e4ut [1].safetensors": models.tuned("bf16"),
        "wide.safetensors": ModelMaker.cast(wide[1], "fp16"),
        "deep.ckpt": deep[1],
    }
    for name, tensors in tuned.items():
        models.save(root / name, tensors, wrap=name == "deep.ckpt")
    models.save(root / "legacy.pt", models.tuned("fp16"), legacy=True)
    names = [*tuned, "legacy.pt"]
    originals = {}
    for number, name in enumerate(names):
        path = root / name
        path.chmod(0o640 if number % 2 else 0o444)
        os.utime(path, ns=(MTIME_NS, MTIME_NS + number))
        originals[name] = Original(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    # Files that are no models pass through as they are.
    (root / "loras" / "brain.json").write_text('{"trigger": "brain"}')
    (root / "empty.txt").touch()
    (root / "nothing in it").mkdir()
    (root / "link.safetensors").symlink_to("tuned.safetensors")
    (root / "more").symlink_to("loras")
    with contextlib.closing(Store(root, create=True)) as store:
        for name in names:
            base = {"wide": "wide-base.safetensors", "deep": "deep-base.ckpt"}.get(name[:4], "base.safetensors")
            outcome = dehydrate(store, root / name, Options(jobs=2, bases=(root / base,)))
            assert outcome.original_removed, outcome
    for name in ("base.safetensors", "wide-base.safetensors", "deep-base.ckpt", "loras/brain.json", "empty.txt"):
        path = root / name
        originals[name] = Original(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    return Library(root, originals)


@pytest.fixture
def copied(library: Library, tmp_path: Path) -> Callable[..., Library]:
    def copy(*names: str) -> Library:
        root = tmp_path / "store"
        root.mkdir()
        for name in names:
            source = library.diff(name) if library.diff(name).exists() else library.root / name
            target = root / source.relative_to(library.root)
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(source, target)
        return Library(root, {name: library.originals[name] for name in names})

    return copy


@pytest.fixture(scope="module", params=BINDINGS)
def binding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def live(library: Library, binding: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    root = tmp_path_factory.mktemp("live")
    store = root / "store"
    shutil.copytree(library.root, store, symlinks=True, ignore=shutil.ignore_patterns(".hydrafs"))
    point = root / "mount point"
    point.mkdir()
    mount = Mount(Library(store, library.originals), point, binding)
    try:
        yield mount.up()
    finally:
        mount.finish()


@pytest.fixture
def mounted(binding: str, tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    made: list[Mount] = []
    numbers = itertools.count()

    def make(library: Library, *arguments: str) -> Mount:
        point = tmp_path / f"mount point {next(numbers)}"
        point.mkdir()
        mount = Mount(library, point, binding)
        made.append(mount)
        return mount.up(*arguments)

    try:
        yield make
    finally:
        with contextlib.ExitStack() as stack:
            for mount in made:
                stack.callback(mount.finish)
