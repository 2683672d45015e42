"""A program that reads a model in the store and writes to its name in the mount: the content survives."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Library, Mount
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hydrafs import callers

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]

PLAIN = "plain.safetensors"
DIFF = "half.safetensors"


def run(*command: str | Path, cwd: Path | None = None) -> int:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode


def python(code: str, *arguments: str | Path) -> int:
    return run(sys.executable, "-c", code, *arguments)


# Each is given the store, the mount and a name, and is to leave what has the name as it is.

COPIES: dict[str, Callable[[Path, Path, str], int]] = {
    "cp": lambda r, m, n: run("cp", r / n, m / n),
    "cp -a": lambda r, m, n: run("cp", "-a", r / n, m / n),
    "cp -f": lambda r, m, n: run("cp", "-f", r / n, m / n),
    "cp into a folder": lambda r, m, n: run("cp", r / n, f"{m}/"),
    "cp --remove-destination": lambda r, m, n: run("cp", "--remove-destination", r / n, m / n),
    "cp -r": lambda r, m, n: run("cp", "-r", f"{r}/.", m),
    "cp, relative": lambda r, m, n: run("cp", n, m / n, cwd=r),
    "mv": lambda r, m, n: run("mv", r / n, m / n),
    "mv into a folder": lambda r, m, n: run("mv", r / n, m),
    "mv -f, relative": lambda r, m, n: run("mv", "-f", f"../{r.name}/./{n}", m / n, cwd=r.parent / r.name),
    "mv -t": lambda r, m, n: run("mv", "-t", m, r / "note.txt", r / n),
    "install": lambda r, m, n: run("install", r / n, m / n),
    "dd": lambda r, m, n: run("dd", f"if={r / n}", f"of={m / n}", "status=none"),
    "cat": lambda r, m, n: run("sh", "-c", f"cat '{r / n}' > '{m / n}'"),
    "cat <": lambda r, m, n: run("sh", "-c", 'cat < "$0" > "$1"', r / n, m / n),
    "tee": lambda r, m, n: run("sh", "-c", 'tee "$1" < "$0" > /dev/null', r / n, m / n),
    "ln -sf": lambda r, m, n: run("ln", "-sf", r / n, m / n),
    "shutil.copy": lambda r, m, n: python("import shutil,sys; shutil.copy(*sys.argv[1:])", r / n, m / n),
    "shutil.copyfile": lambda r, m, n: python("import shutil,sys; shutil.copyfile(*sys.argv[1:])", r / n, m / n),
    "shutil.move": lambda r, m, n: python("import shutil,sys; shutil.move(*sys.argv[1:])", r / n, m / n),
    "rsync": lambda r, m, n: run("rsync", "-a", r / n, f"{m}/"),
    "rsync -I": lambda r, m, n: run("rsync", "-aI", r / n, f"{m}/"),
    "rsync --inplace": lambda r, m, n: run("rsync", "-aI", "--inplace", r / n, f"{m}/"),
    "a mapping": lambda r, m, n: python(
        "import mmap,os,sys\n"
        "fd=os.open(sys.argv[1],os.O_RDONLY); data=mmap.mmap(fd,0,prot=mmap.PROT_READ); os.close(fd)\n"
        "open(sys.argv[2],'wb').write(data)",
        r / n, m / n,
    ),
    "truncate": lambda r, m, n: python(
        "import os,sys\nwith open(sys.argv[1],'rb') as f:\n"
        " os.truncate(sys.argv[2],0); open(sys.argv[2],'r+b').write(f.read())",
        r / n, m / n,
    ),
    "ftruncate": lambda r, m, n: python(
        "import os,sys\nwith open(sys.argv[1],'rb') as f, open(sys.argv[2],'r+b') as g:\n"
        " g.truncate(0); g.write(f.read())",
        r / n, m / n,
    ),
}  # fmt: skip
SILENT = {"rsync", "rsync -I", "rsync --inplace", "cp -r"}
"""What may succeed, for the content is the same afterwards."""


def filled(copied: Copied) -> Library:
    store = copied("base.safetensors", DIFF, "tuned.safetensors")
    shutil.copy2(store.root / "base.safetensors", store.root / PLAIN)
    with (store.root / PLAIN).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")  # nobody needs it
    (store.root / "note.txt").write_text("a note")
    return store


@pytest.mark.parametrize("how", COPIES)
def test_the_content_survives_under_its_name(copied: Copied, mounted: Mounted, how: str) -> None:
    store = filled(copied)
    live = mounted(store)
    live.may_log("who reads it from the store", "is not")
    live.may_log("needed by others")
    before = {name: (live.path / name).read_bytes() for name in (PLAIN, "base.safetensors", DIFF)}
    for name in (PLAIN, "base.safetensors"):
        code = COPIES[how](store.root, live.path, name)
        assert (live.path / name).read_bytes() == before[name]
        assert (store.root / name).read_bytes() == before[name]
        assert how in SILENT or code != 0
        if code != 0 and how not in SILENT:
            live.logged("who reads it from the store", name)
    assert {name: (live.path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("how", ["cp", "mv", "install", "dd", "cat", "shutil.copy", "cp --remove-destination"])
def test_a_diff_is_not_copied_over_its_model(copied: Copied, mounted: Mounted, how: str) -> None:
    store = filled(copied)
    live = mounted(store)
    live.may_log("who reads it from the store", "is not")
    before = (live.path / DIFF).read_bytes()
    diff = f"{store.root / DIFF}.hydra"
    code = {
        "cp": lambda: run("cp", diff, live.path / DIFF),
        "mv": lambda: run("mv", diff, live.path / DIFF),
        "install": lambda: run("install", diff, live.path / DIFF),
        "dd": lambda: run("dd", f"if={diff}", f"of={live.path / DIFF}", "status=none"),
        "cat": lambda: run("sh", "-c", f"cat {diff} > '{live.path / DIFF}'"),
        "shutil.copy": lambda: python("import shutil,sys; shutil.copy(*sys.argv[1:])", diff, live.path / DIFF),
        "cp --remove-destination": lambda: run("cp", "--remove-destination", diff, live.path / DIFF),
    }[how]()
    assert code != 0
    assert (live.path / DIFF).read_bytes() == before
    assert Path(diff).exists()


def test_a_mirror_of_the_store_into_the_mount_deletes_no_model(copied: Copied, mounted: Mounted) -> None:
    """The store has ``NAME.hydra`` where the mount has ``NAME``."""
    store = filled(copied)
    live = mounted(store)
    live.may_log("who reads it from the store", "is not")
    before = {name: (live.path / name).read_bytes() for name in sorted(os.listdir(live.path))}
    for options in (["-a", "--delete"], ["-a", "--delete-before", "--inplace"], ["-rI", "--delete-after"]):
        run("rsync", *options, f"{store.root}/", f"{live.path}/")
        assert {name: (live.path / name).read_bytes() for name in sorted(os.listdir(live.path))} == before
    live.logged("who reads it from the store", "deleted")


@pytest.mark.parametrize("kind", ["hard link", "symlink", "symlink of a folder"])
def test_other_names_of_the_same_file(copied: Copied, mounted: Mounted, tmp_path: Path, kind: str) -> None:
    store = filled(copied)
    live = mounted(store)
    live.may_log("who reads it from the store", "is not")
    data = (live.path / PLAIN).read_bytes()
    other = tmp_path / "other name"
    if kind == "hard link":
        os.link(store.root / PLAIN, other)
    elif kind == "symlink":
        other.symlink_to(store.root / PLAIN)
    else:
        other.symlink_to(store.root)
        other /= PLAIN
    for program in ("cp", "mv", "install"):
        assert run(program, other, live.path / PLAIN) != 0
        assert (live.path / PLAIN).read_bytes() == data
        assert other.read_bytes() == data


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make bind mounts")
def test_through_a_bind_mount(copied: Copied, mounted: Mounted, tmp_path: Path) -> None:
    store = filled(copied)
    bound = tmp_path / "bound"
    bound.mkdir()
    assert run("mount", "--bind", store.root, bound) == 0
    try:
        live = mounted(store)
        live.may_log("who reads it from the store", "is not")
        data = (live.path / PLAIN).read_bytes()
        for program in ("cp", "mv"):
            assert run(program, bound / PLAIN, live.path / PLAIN) != 0
            assert (live.path / PLAIN).read_bytes() == data
    finally:
        run("umount", bound)


def test_through_another_mount_of_the_store(copied: Copied, mounted: Mounted) -> None:
    store = filled(copied)
    live, twin = mounted(store), mounted(store, "--read-only")
    for each in (live, twin):  # they have one log
        each.may_log("who reads it from the store", "is not")
    for name in (PLAIN, DIFF):
        data = (live.path / name).read_bytes()
        for program in ("cp", "mv"):
            assert run(program, twin.path / name, live.path / name) != 0
            assert (live.path / name).read_bytes() == data


def test_what_programs_do_all_day_is_not_refused(copied: Copied, mounted: Mounted, tmp_path: Path) -> None:
    store = filled(copied)
    live = mounted(store)
    m, r = live.path, store.root
    # Reads through the mount and saves over it, with the old one open and mapped.
    tensors = load_file(m / PLAIN)
    with safe_open(m / PLAIN, "pt") as opened, (m / PLAIN).open("rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            pass
        assert list(opened.keys())
        (m / "copy.safetensors").write_bytes((m / PLAIN).read_bytes())
        save_file(tensors, m / PLAIN)
    assert sorted(load_file(m / PLAIN)) == sorted(tensors)
    # Copies from the store, and from the mount, to other names; replaces; deletes; by both paths.
    assert run("cp", r / PLAIN, m / "one.safetensors") == 0
    assert run("cp", r / "base.safetensors", m / "one.safetensors") == 0  # another file is overwritten
    assert run("cp", m / "one.safetensors", m / "two.safetensors") == 0
    assert run("mv", m / "two.safetensors", m / PLAIN) == 0
    assert run("cp", m / PLAIN, tmp_path / "away.safetensors") == 0
    assert run("cp", tmp_path / "away.safetensors", m / PLAIN) == 0
    assert run("mv", tmp_path / "away.safetensors", m / PLAIN) == 0
    assert run("mv", r / "one.safetensors", m / "three.safetensors") == 0
    assert run("rsync", "-aI", m / "three.safetensors", m / "four.safetensors") == 0
    assert run("sh", "-c", f"cat '{r / PLAIN}' > '{m / 'five.safetensors'}'") == 0
    # Somebody else has it open past the mount.
    with (r / "five.safetensors").open("rb"):
        assert run("sh", "-c", f"echo new > '{m / 'five.safetensors'}'") == 0
        assert run("rm", m / "five.safetensors") == 0
    assert run("rm", m / "four.safetensors", r / "three.safetensors") == 0
    assert run("rm", "-r", m / DIFF, m / "tuned.safetensors", f"{r}/note.txt") == 0
    assert run("cp", r / "base.safetensors", m / DIFF) == 0
    assert python("import sys,os; os.unlink(sys.argv[1])", m / DIFF) == 0
    # Small files that are no models, whoever reads them.
    (m / "config.json").write_text("{}")
    with (r / "config.json").open():
        (m / "config.json").write_text('{"a": 1}')
        os.unlink(m / "config.json")
    live.may_log("needed by others")


def test_the_errno_and_what_is_left(copied: Copied, mounted: Mounted) -> None:
    store = filled(copied)
    live = mounted(store)
    live.may_log("who reads it from the store", "is not")
    with (store.root / PLAIN).open("rb") as source:
        for call in (
            lambda: (live.path / PLAIN).open("wb"),
            lambda: os.truncate(live.path / PLAIN, 0),
            lambda: os.unlink(live.path / PLAIN),
            lambda: os.replace(live.path / "tuned.safetensors", live.path / PLAIN),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EBUSY
        assert source.read() == (live.path / PLAIN).read_bytes()
    os.unlink(live.path / PLAIN)
    line = live.logged("who reads it from the store", PLAIN)
    assert "name both by the mount" in line


def test_a_process_that_cannot_be_looked_at() -> None:
    target = callers.Target("a", frozenset({(1, 2)}), frozenset(), "1:2", "0:99")
    for process in (0, -1, 2**22 - 1):
        assert callers.other_way(process, target, mapped=True, folders=True) is None
