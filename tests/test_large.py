"""Models of many gigabytes: memory stays bounded, parsing stays cheap, and the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydrafs import containers
from hydrafs.layout import FileSource

GIB = 1 << 30
TENSORS = 64
TENSOR_NBYTES = 128 << 20


def _write_model(path: Path, seed: int) -> bytes:
    """An 8 GiB fp16 model of small values; another seed gives values one or two units in the last place apart."""
    header: dict[str, object] = {}
    for number in range(TENSORS):
        begin = number * TENSOR_NBYTES
        header[f"blocks.{number}.weight"] = {
            "dtype": "F16",
            "shape": [TENSOR_NBYTES // 2],
            "data_offsets": [begin, begin + TENSOR_NBYTES],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base = np.random.default_rng(0).normal(0, 0.02, TENSOR_NBYTES // 2).astype(np.float16).view(np.uint16)
    steps = np.random.default_rng(seed).integers(0, 3, TENSOR_NBYTES // 2, dtype=np.uint16) if seed else np.uint16(0)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for number in range(TENSORS):
            block = np.roll(base + steps, number).tobytes()
            digest.update(block)
            file.write(block)
    return digest.digest()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_gigabytes_take_less_than_one_of_memory(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 30 * GIB:
        pytest.fail("this test needs 30 GiB of free space in the temporary folder")
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    _write_model(base, 0)
    digest = _write_model(tuned, 1)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hydrafs", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = json.loads(run("dehydrate", str(tuned), "--json"))[0]
    assert told["sha256"] == digest.hex()
    assert told["stored"] < 0.5 * told["size"]
    assert not tuned.exists()
    run("rehydrate", str(tuned), "--output", str(tmp_path / "again.safetensors"))
    again = hashlib.sha256()
    with (tmp_path / "again.safetensors").open("rb") as file:
        while block := file.read(1 << 22):
            again.update(block)
    assert again.digest() == digest
    # The largest of the children, in KiB: dehydrate, its proof included, and rehydrate.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < GIB, f"peak memory {peak / GIB:.2f} GiB"


def test_parsing_reads_only_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    nbytes = 8 * GIB
    text = json.dumps({"w": {"dtype": "F16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    with FileSource(path) as source:
        layout = containers.parse(source, path.name)
        assert layout.tensors[0].nbytes == nbytes
    os.unlink(path)
