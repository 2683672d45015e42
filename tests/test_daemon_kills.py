"""The daemon of a real mount is killed, again and again, while clients write, rename, delete and copy up."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Library, Mount

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]

STEADY = ("base.safetensors", "half.safetensors", "tuned.ckpt")
"""Models that no client touches but one, which deletes and replaces the base that the others need."""

_CLIENT = """
import itertools, os, sys
point, name, what = sys.argv[1:]
path = os.path.join(point, name)
print("go", flush=True)
try:
    for number in itertools.count():
        if what == "rename over":
            # The last whole content that was named is told, as fsync and rename promise.
            with open(path + ".tmp", "wb") as file:
                file.write(b"%08d" % number * 5000)
                file.flush()
                os.fsync(file.fileno())
            print("next", number, flush=True)
            os.replace(path + ".tmp", path)
            print("done", number, flush=True)
        elif what == "write":
            fd = os.open(path, os.O_RDWR)  # the first one copies up
            os.pwrite(fd, b"%08d" % number, 8 * (number % 1000))
            os.fsync(fd)
            os.close(fd)
            print("done", number, flush=True)
        elif what == "make and delete":
            with open(path + ".new", "wb") as file:
                file.write(b"x" * 100_000)
            os.rename(path + ".new", path + ".made")
            os.unlink(path + ".made")
        elif what == "replace the base":
            with open(path + ".tmp", "wb") as file:
                file.write(b"not a base")
            os.replace(path + ".tmp", path)
            os.unlink(path)
except OSError:
    pass
"""


class Client:
    """A process that does one thing over and over until its mount dies."""

    def __init__(self, point: Path, name: str, what: str) -> None:
        command = [sys.executable, "-c", _CLIENT, os.fspath(point), name, what]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "go\n"

    def told(self) -> dict[str, int]:
        """The last number that it told of each thing; waits until it has ended."""
        out, errors = self._process.communicate(timeout=60)
        assert not errors, errors
        found = {}
        for line in out.splitlines():
            what, number = line.split()
            found[what] = int(number)
        return found


def stored_names(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if ".hydrafs" not in p.relative_to(root).parts)


def killed(live: Mount, library: Library, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    kept = live.root.parent / "kept"
    shutil.copytree(live.root, kept, ignore=shutil.ignore_patterns(".hydrafs"))
    data = library.originals["tuned.safetensors"].data
    for number in range(rounds):
        clients = {
            what: Client(live.path, name, what)
            for what, name in {
                "rename over": "wide.safetensors",
                "write": "tuned.safetensors",
                "make and delete": "half.safetensors",
                "replace the base": "base.safetensors",
            }.items()
        }
        # Now in the first calls, the copying up, now in the midst of the loops.
        pause = chance.random() ** 3 * 0.8
        time.sleep(pause)
        live.kill()
        told = {what: client.told() for what, client in clients.items()}
        live.up(warning="daemon of this mount is dead")
        where = f"round {number}, killed after {pause:.3f} s"

        # What is listed is listed once, and nothing hides behind it.
        names = stored_names(live.root)
        assert not [n for n in names if n.removesuffix(".hydra") != n and n.removesuffix(".hydra") in names], where
        # What nobody wrote to is what it was, whatever became of the base.
        for name in STEADY[1:]:
            content = (live.path / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == library.originals[name].sha256, f"{where}: {name}"
        base = live.path / "base.safetensors"
        assert not base.exists() or base.read_bytes() in (library.originals[base.name].data, b"not a base"), where
        # A rename over is done or not, and no more is lost than the one that was under way.
        last = told["rename over"]
        allowed = {b"%08d" % n * 5000 for n in {last.get("next", -1), last.get("done", -1)} if n >= 0}
        if "done" not in last:
            allowed.add(library.originals["wide.safetensors"].data)
        assert (live.path / "wide.safetensors").read_bytes() in allowed, f"{where}: {last}"
        # What was synced stands; the rest is the model's.
        done = told["write"].get("done", -1)
        found = (live.path / "tuned.safetensors").read_bytes()
        expected = bytearray(data)
        for n in range(max(0, done - 999), done + 1):
            expected[8 * (n % 1000) : 8 * (n % 1000) + 8] = b"%08d" % n
        under_way = bytearray(expected)
        under_way[8 * ((done + 1) % 1000) : 8 * ((done + 1) % 1000) + 8] = b"%08d" % (done + 1)
        assert found in (expected, under_way), where

        if number == rounds - 1:
            break
        # The next round begins with what this one began with.
        live.down()
        for path in live.root.iterdir():
            if path.name != ".hydrafs":
                path.unlink()
        for folder in ("held", "retired"):
            shutil.rmtree(live.root / ".hydrafs" / folder, ignore_errors=True)
        for path in kept.iterdir():
            shutil.copy2(path, live.root / path.name)
        live.up()


def test_killed_while_clients_write(copied: Copied, mounted: Mounted) -> None:
    library = copied(*STEADY, "tuned.safetensors", "wide-base.safetensors", "wide.safetensors")
    killed(mounted(library), library, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_many_times_while_clients_write(copied: Copied, mounted: Mounted) -> None:
    library = copied(*STEADY, "tuned.safetensors", "wide-base.safetensors", "wide.safetensors")
    killed(mounted(library), library, 60, 2)
