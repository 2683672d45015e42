"""Fixtures that all tests share.

``models``  a ``ModelMaker``: ``models.base()`` and ``models.tuned()`` are state dicts of a small network and of the
            same network after real AdamW steps (``dtype="fp32" | "fp16" | "bf16"``; 1.2 MB in fp32);
            ``models.save(path, tensors)`` writes ``.safetensors``, or torch's zip for ``.ckpt .pt .pth .bin``
            (``legacy=True``: the format before torch 1.6; ``wrap=True``: under ``{"state_dict": ...}`` with other
            objects beside it).
``store``   an empty folder, ``tmp_path / "store"``.
``filled``  a ``Filled``: a store folder with ``base.safetensors`` and ``tuned.safetensors`` (fp16) in it, the bytes of
            the second, and ``filled.dehydrate()`` which turns it into a diff in small chunks.
``make_old``  a function that takes the hashes out of a diff, as diffs were before they held any.
``at_end``  a ``contextlib.ExitStack`` that is unwound when the test ends.

A test that logs a WARNING or worse under ``hydrafs`` fails, unless it takes ``caplog`` or says
``@pytest.mark.logs("regular expression", ...)``; each such record must match one of them, and each must be matched.
Tests marked ``fuse`` fail where there is no /dev/fuse, unless HYDRAFS_TESTS_WITHOUT_FUSE=1: then they are skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hydrafs.dehydrate import Options, Outcome, dehydrate
from hydrafs.diff import DiffFile, DiffWriter
from hydrafs.store import Store

Tensors = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "logs(*patterns): the test logs these warnings of hydrafs, and no others")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") and not os.path.exists("/dev/fuse"):
        if os.environ.get("HYDRAFS_TESTS_WITHOUT_FUSE") == "1":
            pytest.skip("no /dev/fuse, and HYDRAFS_TESTS_WITHOUT_FUSE=1")
        pytest.fail("no /dev/fuse; HYDRAFS_TESTS_WITHOUT_FUSE=1 runs the tests without it", pytrace=False)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def no_unexpected_warnings(request: pytest.FixtureRequest) -> Iterator[None]:
    if "caplog" in request.fixturenames:
        yield
        return
    marker = request.node.get_closest_marker("logs")
    patterns = [re.compile(p) for p in marker.args] if marker else []
    collector = _Collector()
    logger = logging.getLogger("hydrafs")
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
    unexpected = [line for line in collector.lines if not any(p.search(line) for p in patterns)]
    assert not unexpected, "hydrafs logged: " + "\n".join(unexpected)
    silent = [p.pattern for p in patterns if not any(p.search(line) for line in collector.lines)]
    assert not silent, f"hydrafs did not log: {silent}"


class _Network(nn.Module):
    """Every kind of tensor that matters to hydrafs: an embedding, matrices, a convolution, small vectors, an integer
    buffer, and one frozen block that a fine-tune leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 96)
        self.frozen = nn.Linear(96, 512)
        self.up = nn.Linear(96, 512)
        self.down = nn.Linear(512, 96)
        self.convolution = nn.Conv1d(96, 96, 5, padding=2)
        self.norm = nn.BatchNorm1d(96)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.relu(self.up(hidden)) + self.frozen(hidden))
        return self.norm(self.convolution(hidden.transpose(1, 2)))


def _train() -> tuple[Tensors, Tensors]:
    torch.manual_seed(20)
    network = _Network()
    # Weights of trained networks have heavy tails; torch's initialisation is uniform.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(torch.exp(torch.randn_like(parameter) * 0.5))

    def state() -> Tensors:
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    before = state()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-5)
    for _ in range(6):
        tokens = torch.randint(0, 1000, (8, 32))
        loss = (network(tokens) - torch.randn(8, 96, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, state()


@dataclass
class ModelMaker:
    """See the top of this file."""

    trained: tuple[Tensors, Tensors]

    def base(self, dtype: str = "fp32") -> Tensors:
        return self.cast(self.trained[0], dtype)

    def tuned(self, dtype: str = "fp32") -> Tensors:
        return self.cast(self.trained[1], dtype)

    @staticmethod
    def cast(tensors: Tensors, dtype: str) -> Tensors:
        to = DTYPES[dtype]
        return {k: t.to(to) if t.is_floating_point() else t.clone() for k, t in tensors.items()}

    @staticmethod
    def save(path: Path, tensors: Tensors, *, legacy: bool = False, wrap: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"format": "pt"})
        else:
            content = {"state_dict": tensors, "epoch": 3, "callbacks": {"best": [0.5, None]}} if wrap else tensors
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path


@pytest.fixture(scope="session")
def models() -> ModelMaker:
    return ModelMaker(_train())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@dataclass
class Filled:
    """See the top of this file."""

    root: Path
    base: Path
    tuned: Path
    data: bytes
    options: Options = field(default_factory=lambda: Options(jobs=2, chunk_nbytes=32 << 10))

    @property
    def diff(self) -> Path:
        return self.tuned.with_name(self.tuned.name + ".hydra")

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def let_go(self) -> None:
        """Nothing holds the base any more but its name."""
        shutil.rmtree(self.root / ".hydrafs" / "held", ignore_errors=True)

    def dehydrate(self, options: Options | None = None) -> Outcome:
        with contextlib.closing(Store(self.root, create=True)) as opened:
            return dehydrate(opened, self.tuned, options or self.options)


@pytest.fixture
def filled(models: ModelMaker, store: Path) -> Filled:
    base = models.save(store / "base.safetensors", models.base("fp16"))
    tuned = models.save(store / "tuned.safetensors", models.tuned("fp16"))
    return Filled(store, base, tuned, tuned.read_bytes())


@pytest.fixture
def at_end() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def make_old() -> Callable[[Path], None]:
    """See the top of this file."""

    def make(path: Path) -> None:
        with DiffFile(path) as diff:
            manifest = msgspec.structs.replace(diff.manifest, hashes=())
            rows = [
                (diff.payload(i), diff.chunk_codec[i], diff.chunk_flags[i], diff.chunk_checksum[i])
                for i in range(diff.table.chunk_count)
            ]
        with path.open("wb") as file:
            writer = DiffWriter(file, len(rows))
            for number, row in enumerate(rows):
                writer.append(number, *row)
            writer.finish(manifest)

    return make
