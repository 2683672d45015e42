"""A mount that is lived in: what lands in it is dehydrated behind everybody's back, and parents are not lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ModelMaker
from mounts import BELIEVED_SECONDS, Library, Mount, eventually, hydrafs, sha256_of
from safetensors.torch import load_file
from test_tending import used_nbytes

from hydrafs.errors import printable

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Mounted = Callable[..., Mount]
BACKGROUND = ("--dehydrate", "auto", "--settle", "0.5", "--min-size", "1k")


def empty(tmp_path: Path) -> Library:
    root = tmp_path / "store"
    root.mkdir(parents=True)
    return Library(root, {})


def state(path: Path) -> str:
    return os.getxattr(path, "user.hydrafs.state").decode()


def is_dehydrated(path: Path) -> Callable[[], bool]:
    def ask() -> bool:
        with contextlib.suppress(OSError):
            return state(path) == "dehydrated"
        return False

    return ask


def look(path: Path) -> tuple[object, ...]:
    s = path.stat()
    return s.st_size, s.st_mtime_ns, s.st_mode, s.st_nlink, sorted(os.listdir(path.parent)), sha256_of(path)


def test_what_lands_in_the_mount_is_dehydrated_and_nobody_notices(
    tmp_path: Path, models: ModelMaker, mounted: Mounted
) -> None:
    library = empty(tmp_path)
    models.save(library.root / "base.safetensors", models.base("fp16"))
    assert hydrafs("bases", library.root, "--pin", "base.safetensors").returncode == 0
    live = mounted(library, *BACKGROUND)
    path = live.path / "tuned.safetensors"
    models.save(path, models.tuned("fp16"))
    before = look(path)
    with path.open("rb") as reader:
        first = reader.read(1000)
        assert eventually(is_dehydrated(path))
        reader.seek(0)
        assert reader.read(1000) == first
    assert not (library.root / "tuned.safetensors").exists()
    assert look(path) == before
    assert state(live.path / "base.safetensors") == "plain"
    assert (live.path / "base.safetensors").stat().st_nlink == 1
    # The same name, written anew: the new content is what is read, and it is dehydrated in its turn.
    tensors = models.tuned("fp16")
    tensors["norm.bias"] = tensors["norm.bias"] + 1
    models.save(tmp_path / "newer.safetensors", tensors)
    path.write_bytes((tmp_path / "newer.safetensors").read_bytes())
    expected = sha256_of(tmp_path / "newer.safetensors")
    assert sha256_of(path) == expected
    assert eventually(is_dehydrated(path))
    assert sha256_of(path) == expected


@pytest.mark.parametrize("in_place", [False, True])
def test_the_log_says_what_was_done(tmp_path: Path, models: ModelMaker, binding: str, in_place: bool) -> None:
    """By who serves and by who dehydrates: one file, one look of the lines, the names that people know."""
    root = empty(tmp_path / "of\nmodels").root if not in_place else empty(tmp_path).root
    models.save(root / "base.safetensors", models.base("fp16"))
    assert hydrafs("bases", root, "--pin", "base.safetensors").returncode == 0
    point, log = root if in_place else tmp_path / "mount", tmp_path / "log"
    point.mkdir(exist_ok=True)
    where = [root] if in_place else [root, point]
    for style in ("json", "text"):
        log.unlink(missing_ok=True)
        done = hydrafs("mount", *where, *BACKGROUND, "--log-format", style, "--log-file", log, HYDRAFS_FUSE=binding)
        assert (done.returncode, done.stderr) == (0, "")
        try:
            path = models.save(point / f"{style}.safetensors", models.tuned("fp16"))
            size = path.stat().st_size
            assert eventually(is_dehydrated(path))
        finally:
            assert hydrafs("umount", point).returncode == 0
        stored = (root / f"{style}.safetensors.hydra").stat().st_size
        expected = [
            ("hydrafs.service.running", f"{root} is mounted at {point}"),
            ("hydrafs.worker", f"{root}/{path.name}: {size} -> {stored} bytes"),
            ("hydrafs.daemon", f"{point} is unmounted (libfuse: 0)"),
        ]
        assert eventually(lambda: "is unmounted" in log.read_text())
        # The kernel tells of a closing when it has time for it: until then the worker leaves the model alone.
        lines = [line for line in log.read_text().splitlines() if "is left for later" not in line]
        if style == "json":
            facts = [json.loads(line) for line in lines]
            assert [(fact["logger"], fact["message"]) for fact in facts] == expected
            assert {fact["level"] for fact in facts} == {"info"}
        else:
            for line, (who, text) in zip(lines, expected, strict=True):
                assert line.endswith(
                    ("hydrafs: worker: " if "worker" in who else "hydrafs: ") + f"INFO: {printable(text)}"
                )
                assert line[:10].replace("-", "").isdigit(), "when"


def test_delete_of_a_base_with_three_dependents(tmp_path: Path, models: ModelMaker, mounted: Mounted) -> None:
    library = empty(tmp_path)
    base = models.save(library.root / "base.safetensors", models.base("fp16"))
    names = [f"tuned{number}.safetensors" for number in range(3)]
    for number, name in enumerate(names):
        tensors = models.tuned("fp16")
        tensors["norm.weight"] = tensors["norm.weight"] + number
        models.save(library.root / name, tensors)
    base_nbytes = base.stat().st_size
    whole = used_nbytes(library.root)
    hashes = {name: sha256_of(library.root / name) for name in names}
    for name in names:
        assert hydrafs("dehydrate", "--base", base, library.root / name).returncode == 0
    (library.root / ".hydrafs" / "config.toml").write_text("trash = false\n")
    live = mounted(library)
    stored = used_nbytes(library.root)
    assert stored < whole - 2 * base_nbytes

    def check(gone: int = 0) -> None:
        for number, name in list(enumerate(names))[gone:]:
            assert sha256_of(live.path / name) == hashes[name]
            loaded = load_file(live.path / name)
            assert loaded["norm.weight"].equal(models.tuned("fp16")["norm.weight"] + number)

    check()
    os.unlink(live.path / "base.safetensors")
    assert "base.safetensors" not in os.listdir(live.path)
    assert abs(used_nbytes(library.root) - stored) < 1 << 20
    check()
    for number, name in enumerate(names, 1):
        assert json.loads(hydrafs("gc", "--json", library.root).stdout)["removed"] == []
        os.unlink(live.path / name)
        check(number)
    freed = json.loads(hydrafs("gc", "--json", library.root).stdout)["freed"]
    assert freed == base_nbytes
    assert used_nbytes(library.root) < stored - base_nbytes


def test_protect(tmp_path: Path, models: ModelMaker, mounted: Mounted) -> None:
    library = empty(tmp_path)
    models.save(library.root / "base.safetensors", models.base("fp16"))
    models.save(library.root / "tuned.safetensors", models.tuned("fp16"))
    assert hydrafs("dehydrate", library.root / "tuned.safetensors").returncode == 0
    live = mounted(library, "--protect")
    live.may_log("ERROR", "may not be re(moved|named)")
    path = live.path / "tuned.safetensors"
    for refused in (lambda: os.unlink(path), lambda: os.rename(path, live.path / "x.safetensors")):
        with pytest.raises(PermissionError):
            refused()
    with path.open("rb") as file:
        for refused in (lambda: os.unlink(path), lambda: os.rename(path, live.path / "x.safetensors")):
            with pytest.raises(PermissionError):
                refused()
        assert file.read(4)
    assert (library.root / "tuned.safetensors.hydra").exists()
    assert path.exists()
    (live.path / "note.txt").write_text("x")
    os.unlink(live.path / "note.txt")
    os.unlink(live.path / "base.safetensors")
    assert path.read_bytes()


def test_the_worker_ends_with_the_daemon(tmp_path: Path, models: ModelMaker, mounted: Mounted) -> None:
    library = empty(tmp_path)
    live = mounted(library, *BACKGROUND)

    def workers() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if b"hydrafs.worker" in (folder / "cmdline").read_bytes() and parent == live.pid:
                    found.append(int(folder.name))
        return found

    assert eventually(lambda: len(workers()) == 1)
    (pid,) = workers()
    os.kill(live.pid, signal.SIGKILL)

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    assert eventually(gone)
    live.end()
    live.down_dead()


def test_a_changed_parent_is_told(tmp_path: Path, models: ModelMaker, mounted: Mounted) -> None:
    library = empty(tmp_path)
    base = models.save(library.root / "base.safetensors", models.base("fp16"))
    models.save(library.root / "tuned.safetensors", models.tuned("fp16"))
    assert hydrafs("dehydrate", library.root / "tuned.safetensors").returncode == 0
    live = mounted(library)
    path, data = live.path / "tuned.safetensors", base.read_bytes()
    assert state(path) == "dehydrated"
    base.write_bytes(bytes(len(data)))  # in place, behind hydrafs' back
    assert eventually(lambda: state(path) == "parent-changed")
    facts = json.loads(hydrafs("ls", "--json", library.root).stdout)["models"]
    assert [f["state"] for f in facts] == ["plain", "parent-changed"]
    (library.root / "back.safetensors").write_bytes(data)
    time.sleep(BELIEVED_SECONDS)
    assert eventually(lambda: state(path) == "dehydrated")
    assert path.read_bytes()
