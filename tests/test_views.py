"""Programs that see a covered store without its mount: nothing goes before their eyes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker
from mounts import Library, Mount, daemons_of, eventually, hydrafs

from hydrafs.working import Work, told

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

BACKGROUND = ("--dehydrate", "auto", "--settle", "0.2", "--min-size", "1k")


class Covered(Mount):
    """A mount over its own store, which dehydrates."""

    def up(self, *arguments: str, warning: str = "") -> Covered:
        done = hydrafs("mount", self.root, *arguments, "--log-file", self.log_path, HYDRAFS_FUSE=self.binding)
        assert done.returncode == 0, done.stderr
        (self.pid,) = daemons_of(self.path)
        return self

    @property
    def log_path(self) -> Path:
        return self.root.parent / "mount.log"

    @property
    def below(self) -> Path:
        """The store's folder, as the daemon reaches it."""
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            path = Path(f"/proc/{self.pid}/fd/{name}")
            with contextlib.suppress(OSError):
                if os.readlink(path) == os.fspath(self.root) and (path / ".hydrafs").is_dir():
                    return path
        raise AssertionError("the daemon has no descriptor of the store")

    def work(self) -> Work:
        class Reached:
            private = self.below / ".hydrafs"

        return told(Reached())  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path, models: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    models.save(folder / "base.safetensors", models.base("fp16"))
    models.save(folder / "loras" / "tuned.safetensors", models.tuned("fp16"))
    os.utime(folder / "base.safetensors", (1, 1))
    assert hydrafs("bases", folder, "--pin", "base.safetensors").returncode == 0
    return folder


@pytest.fixture
def covered(root: Path) -> Iterator[Callable[..., Covered]]:
    made: list[Covered] = []

    def make(*arguments: str) -> Covered:
        mount = Covered(Library(root, {}), root, "mfusepy")
        made.append(mount)
        mount.up(*arguments)
        mount.may_log("WARNING", "sees the store at")
        return mount

    yield make
    for mount in made:
        mount.finish()


def apart(command: str) -> subprocess.Popen[bytes]:
    """A process with a table of mounts of its own, which gets nothing of what is mounted later."""
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", f"{command}\necho ready; exec sleep 600"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("kind", ["the same place", "a part bound elsewhere", "the folder above bound elsewhere"])
def test_nothing_goes_before_the_eyes_of_a_container(
    root: Path, tmp_path: Path, covered: Callable[..., Covered], kind: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    binds = {
        "the same place": ":",
        "a part bound elsewhere": f"mount --bind {root}/loras {tmp_path}/elsewhere; mount -t tmpfs none {root}",
        "the folder above bound elsewhere": f"mount --bind {tmp_path} /mnt; mount -t tmpfs none {root}",
    }
    process = apart(binds[kind])
    try:
        live = covered(*BACKGROUND)
        assert eventually(lambda: bool(live.work().hindered))
        assert f"process {process.pid} (sleep)" in live.work().hindered
        assert (live.below / "loras" / "tuned.safetensors").exists()
        assert "waits: process" in hydrafs("status", root).stdout
    finally:
        process.kill()
        process.wait()
    assert eventually((live.below / "loras" / "tuned.safetensors.hydra").exists)
    assert eventually(lambda: live.work().hindered == "")


def test_a_bind_mount_of_the_folder_made_before(root: Path, tmp_path: Path, covered: Callable[..., Covered]) -> None:
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(["mount", "--bind", root, tmp_path / "elsewhere"], check=True)
    try:
        live = covered(*BACKGROUND)
        assert eventually(lambda: f"{tmp_path}/elsewhere" in live.work().hindered)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "elsewhere"], check=True)
    assert eventually((live.below / "loras" / "tuned.safetensors.hydra").exists)


@pytest.mark.parametrize("kind", ["it does not show the folder", "it sees the mount", "the configuration ignores it"])
def test_who_is_no_obstacle(root: Path, covered: Callable[..., Covered], kind: str) -> None:
    command = ":"
    if kind == "it does not show the folder":
        command = f"mount -t tmpfs none {root.parent}"
    if kind == "the configuration ignores it":
        config = root / ".hydrafs" / "config.toml"
        config.write_text(config.read_text() + '\n[worker]\nother_views = "ignore"\n')
    process = None if kind == "it sees the mount" else apart(command)
    try:
        live = covered(*BACKGROUND)
        if process is None:
            process = apart(command)
        assert eventually((live.below / "loras" / "tuned.safetensors.hydra").exists)
    finally:
        assert process is not None
        process.kill()
        process.wait()
