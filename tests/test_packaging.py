"""What is installed beside the program: the wheel's files, man pages, shell completion; and the documents' commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import Filled
from mounts import hydrafs
from test_cli import Run, bad, good, run

from hydrafs.cli import _COMMANDS
from hydrafs.mountpoints import our_mounts, unmount
from scripts.make_man import make_pages, roff

__all__ = ["run"]  # a fixture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_pages(tmp_path_factory.mktemp("man"))


class TestManPages:
    def test_one_for_each_command(self, pages: list[Path]) -> None:
        names = {f"hydrafs-{name}.1" for name in _COMMANDS} | {"hydrafs.1", "mount.hydrafs.8"}
        assert {page.name for page in pages} == names

    def test_they_are_well_formed(self, pages: list[Path]) -> None:
        if shutil.which("mandoc") is None:
            pytest.fail("no mandoc here; scripts/setup.sh test installs it", pytrace=False)
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", *pages], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stdout

    def test_what_they_say_is_what_the_help_says(self, pages: list[Path], run: Run) -> None:
        (page,) = (p for p in pages if p.name == "hydrafs-mount.1")
        shown = subprocess.run(
            ["mandoc", "-T", "utf8", "-O", "width=500", page], capture_output=True, text=True, check=True
        )
        text = re.sub(r".\x08", "", shown.stdout)
        options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", good(run("mount", "--help")).out, re.MULTILINE)
        assert len(options) > 5
        assert not [option for option in options if option not in text]

    def test_lines_that_roff_would_take_for_requests(self) -> None:
        assert roff(".TH x\n'br\\-") == "\\&.TH x\n\\(aqbr\\e\\-"


class TestCompletion:
    def complete(self, *words: str) -> list[str]:
        """What bash is told for the last of ``words``."""
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv[0] = 'hydrafs'; from hydrafs.cli import main; main()"],
            env={
                **os.environ, "_HYDRAFS_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["hydrafs", *words]),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split()

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_shells(self, run: Run, shell: str) -> None:
        out = good(run("completion", shell)).out
        assert "_HYDRAFS_COMPLETE" in out
        if shutil.which(shell):
            done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
        bad(run("completion", "csh"), 2)

    def test_commands_options_and_files(self) -> None:
        assert self.complete("m") == ["plain,merge", "plain,mount"]
        assert self.complete("mount", "--cache") == ["plain,--cache-size"]
        assert self.complete("verify", "some") == ["file,some"]
        assert self.complete("mount", "--log-file", "x") == ["file,x"]
        assert self.complete("control", "/m", "dr") == ["plain,drop"]

    def test_names_cost_no_imports(self) -> None:
        code = (
            "import os, sys; sys.argv[0] = 'hydrafs'; os.environ.update(_HYDRAFS_COMPLETE='bash_complete',"
            "COMP_WORDS='hydrafs m', COMP_CWORD='1')\nfrom hydrafs.cli import main\n"
            "try: main()\nexcept SystemExit: pass\nassert 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.fuse
def test_a_wheel_in_an_empty_environment(filled: Filled, tmp_path: Path) -> None:
    """Built and installed as a user does, from a copy: nothing of the checkout is behind what runs."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv*", ".bench", "build", "*.so", "__pycache__", "tests", ".*_cache"),
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("hydrafs/_rans", "hydrafs/_formulas"):
        assert any(name.startswith(wanted) and name.endswith(".so") for name in names), names
    for wanted in (
        "systemd/hydrafs@.service",
        "systemd/user/hydrafs@.service",
        "systemd/example.conf",
        "hydrafs/py.typed",
    ):
        assert any(name.endswith(wanted) for name in names), names
    assert not [name for name in names if name.startswith("tests")]
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    call(tmp_path / "venv/bin/pip", "install", "-q", "--constraint", ROOT / "constraints.txt", wheel)
    program = tmp_path / "venv/bin/hydrafs"
    point = tmp_path / "mount"
    point.mkdir()
    call(program, "dehydrate", filled.tuned)
    call(program, "doctor", filled.root)
    call(program, "mount", filled.root, point)
    try:
        assert (point / "tuned.safetensors").read_bytes() == filled.data
        assert str(filled.root) in call(program, "status", point)
    finally:
        if any(mount.mountpoint == point for mount in our_mounts()):
            unmount(point)
    call(tmp_path / "venv/bin/mount.hydrafs", filled.root, point, "-o", "rw,allow_other")
    assert (point / "tuned.safetensors").read_bytes() == filled.data
    call(program, "umount", point)


def commands_in(document: Path) -> set[str]:
    """The commands of hydrafs in a document's code (prose speaks of it too), or in a unit."""
    text = document.read_text()
    if document.suffix == ".md":
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        text = "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", text)])
    return set(re.findall(r"(?:^|=|exec |sudo |&& )hydrafs ([a-z]+)\b", text, re.MULTILINE))


def test_the_documents_name_commands_that_exist() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "systemd").rglob("*.*")]
    found = set().union(*(commands_in(document) for document in documents if document.is_file()))
    assert len(found) > 12
    assert found <= set(_COMMANDS)


def test_stale_mounts_only(tmp_path: Path, run: Run) -> None:
    good(run("umount", "--stale", tmp_path))
    good(run("umount", "--stale", tmp_path / "nothing"))
    bad(run("umount", "--stale", "--lazy", tmp_path), 2, "exclude each other")


@pytest.mark.fuse
def test_stale_leaves_what_is_alive(filled: Filled, tmp_path: Path, run: Run) -> None:
    filled.dehydrate()
    point = tmp_path / "mount"
    point.mkdir()
    assert hydrafs("mount", filled.root, point).returncode == 0
    try:
        good(run("umount", "--stale", point))
        assert (point / "tuned.safetensors").read_bytes() == filled.data
    finally:
        unmount(point)
