"""Each call fails once, and nothing is lost by it: in one process (``failing.py``), and on real ones (``tracing.py``).

Here are samples, another part of each scenario; ``make test-faults`` tries every error of every call.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scenarios import SCENARIOS

TESTS = Path(__file__).parent
GROUPS = [
    *(SCENARIOS[i::4] for i in range(4)),
    ["a worker's step", "write into a base", "write into a diff that is a parent", "cut a base to nothing",
     "collect with dependents of a retired diff", "remove a folder"],
    ["read", "read through a mount", "mount", "list", "start after a kill: dehydrate",
     "start after a kill: write into a diff"],
]  # fmt: skip


def run(program: str, *arguments: str) -> tuple[int, str]:
    """How many injections there were; nothing was lost."""
    done = subprocess.run(
        [sys.executable, TESTS / program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = re.findall(r"^all .*", done.stdout, re.MULTILINE)
    return int(total.split(" seed ")[1].split()[2]), done.stdout


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_some_calls_fail(names: list[str]) -> None:
    number, said = run("failing.py", "--sample", "8", *names)
    assert number >= 6 * len(names), said


_DESTROYS = """
import shutil, sys
import failing
from hydrafs import keeping

right = keeping.remove_model

def remove_model(store, path):
    try:
        right(store, path)
    finally:
        if failing.State.hit:
            path.unlink(missing_ok=True)
            for folder in (store.held, store.retired):
                shutil.rmtree(folder, ignore_errors=True)

keeping.remove_model = remove_model
sys.exit(failing.main())
"""


def test_a_loss_is_seen() -> None:
    """The harness itself: where a base is destroyed that others need, it says so."""
    done = subprocess.run(
        [sys.executable, "-c", _DESTROYS, "--sample", "3", "remove a base"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(TESTS), *filter(None, sys.path)])},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "LOST" in done.stdout, done.stdout + done.stderr


@pytest.mark.fuse
@pytest.mark.skipif(os.environ.get("HYDRAFS_TESTS_WITHOUT_STRACE") == "1", reason="HYDRAFS_TESTS_WITHOUT_STRACE=1")
@pytest.mark.parametrize("names", [["dehydrate", "remove a base", "collect", "watch"], ["mount: delete a base"]])
def test_some_system_calls_fail(names: list[str]) -> None:
    assert shutil.which("strace"), "strace is missing; run scripts/setup.sh test"
    number, said = run("tracing.py", "--sample", "5", *names)
    assert number >= 2 * len(names), said
