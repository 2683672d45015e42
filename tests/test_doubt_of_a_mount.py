"""Through a mount: a base goes while its diffs cannot be read, and what is mended afterwards is served."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Library, Mount, hydrafs

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]


def _replace(path: Path) -> None:
    path.with_name("new.safetensors").write_bytes(b"new")
    os.replace(path.with_name("new.safetensors"), path)


def _write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"newer")


WAYS: dict[str, Callable[[Path], object]] = {
    "rm": os.unlink,
    "renamed over": _replace,
    "overwritten": lambda path: path.write_bytes(b"new"),
    "written to": _write,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("doubt", ["damaged", "loops"])
def test_a_base_goes(copied: Copied, mounted: Mounted, way: str, doubt: str) -> None:
    store = copied("base.safetensors", "half.safetensors")
    (store.root / ".hydrafs").mkdir(exist_ok=True)
    (store.root / ".hydrafs" / "config.toml").write_text("trash = false\n")
    diff = store.diff("half.safetensors")
    data = diff.read_bytes()
    if doubt == "damaged":
        diff.write_bytes(data[: len(data) // 2])
    else:
        for number in range(20):
            (store.root / f"0loop{number}").symlink_to(f"0loop{number}")
    live = mounted(store)
    WAYS[way](live.path / "base.safetensors")
    if doubt == "damaged":
        live.logged("nobody knows whether others need")
        live.may_log("half.safetensors")
    done = hydrafs("gc", store.root)
    assert done.returncode == (1 if doubt == "damaged" else 0), done.stderr
    shutil.rmtree(store.root / ".hydrafs" / "held", ignore_errors=True)
    diff.write_bytes(data)  # from a backup
    assert (live.path / "half.safetensors").read_bytes() == store.originals["half.safetensors"].data
    live.down()
    assert hydrafs("verify", store.root).returncode == 0
