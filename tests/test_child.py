"""A child finds the modules that its parent finds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydrafs import child
from hydrafs.service.running import warm

MODULE = """
import sys

def shout(order):
    sys.stdout.buffer.write(order["text"].upper().encode(errors="surrogateescape") + sys.stdin.buffer.read())
    return 3
"""


def test_a_module_that_only_the_parent_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, "only"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only").symlink_to(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    process = child.start("only_here:shout", {"text": "a\n\udcff"}, stdout=subprocess.PIPE, cwd="/")
    output, _ = process.communicate(b" until it is closed")
    assert (process.returncode, output) == (3, b"A\n\xff until it is closed")


def test_one_that_dies_at_once_is_no_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = child.start("hydrafs.cli:main", ["x" * (1 << 20)])
    assert process.wait() == 1


def test_warming_that_fails_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warm("--lately", "/nowhere")
    deadline = time.monotonic() + 60
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.05)
    assert caplog.messages == [
        "warming ended with code 3: hydrafs: no mount of hydrafs, /nowhere; hydrafs mount makes one"
    ]
