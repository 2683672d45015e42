"""``hydrafs log``: also of a mount that covers its own log, of a daemon that hangs, and of one that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Filled
from mounts import eventually, hydrafs, is_mounted
from test_hung_daemon import hydrafs_json

from hydrafs.cli.log import _last_lines, _new_lines
from hydrafs.errors import NotFound
from hydrafs.mountpoints import clear_stale, unmount


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mount"
    folder.mkdir()
    yield folder
    clear_stale(folder)
    if is_mounted(folder):
        unmount(folder, lazy=True)


@pytest.mark.fuse
@pytest.mark.parametrize("over_the_store", [False, True])
def test_what_a_mount_has_said(filled: Filled, point: Path, tmp_path: Path, over_the_store: bool) -> None:
    filled.dehydrate()
    filled.diff.with_name("bad.safetensors.hydra").write_bytes(b"x" * 1000)
    state = os.fspath(tmp_path / "state")
    at = filled.root if over_the_store else point
    ran = hydrafs(
        "mount", filled.root, *([] if over_the_store else [point]), "--dehydrate", "off", XDG_STATE_HOME=state
    )
    assert ran.returncode == 0, ran.stderr
    try:
        os.listdir(at)
        assert (at / "bad.safetensors").stat().st_size == 1000
        said = hydrafs("log", at, XDG_STATE_HOME=state)
        assert said.returncode == 0, said.stderr
        assert "is mounted at" in said.stdout
        assert eventually(lambda: "bad.safetensors" in hydrafs("log", at, XDG_STATE_HOME=state).stdout)
        assert len(hydrafs("log", at, "-n", "1", XDG_STATE_HOME=state).stdout.splitlines()) == 1
        pid = int(str(hydrafs_json("status", at)["pid"]))
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "is mounted at" in hydrafs("log", at, XDG_STATE_HOME=state).stdout
        finally:
            os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not Path(f"/proc/{pid}").exists())
        assert hydrafs("umount", "--stale", at).returncode == 0
        assert "is mounted at" in hydrafs("log", at, XDG_STATE_HOME=state).stdout
    finally:
        clear_stale(at)
        if is_mounted(at):
            unmount(at, lazy=True)


@pytest.mark.fuse
def test_of_one_that_logs_elsewhere(filled: Filled, point: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hydrafs", "mount", filled.root, point, "--foreground", "--dehydrate", "off"],
        stderr=subprocess.PIPE,
    ) as daemon:
        assert eventually(lambda: hydrafs("status", point).returncode == 0)
        said = hydrafs("log", point)
        assert f"process {daemon.pid} logs to where it was started" in said.stdout
        daemon.terminate()


def test_of_nothing(tmp_path: Path) -> None:
    ran = hydrafs("log", tmp_path, XDG_STATE_HOME=os.fspath(tmp_path))
    assert ran.returncode == NotFound.exit_code
    assert "no log" in ran.stderr


def test_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(50_000)) + b"a part of")
    fd = os.open(path, os.O_RDONLY)
    assert _last_lines(fd, 2) == ["line 49998", "line 49999"]
    assert list(_new_lines(fd)) == []
    with path.open("ab") as file:
        file.write(b" a line\nand more\n")
    assert list(_new_lines(fd)) == ["a part of a line", "and more"]
    path.write_bytes(b"anew\n")
    assert list(_new_lines(fd)) == ["anew"]
    assert _last_lines(fd, 0) == []
    assert _last_lines(fd, 1000) == ["anew"]
    os.close(fd)
