"""A store that is mounted over itself: nobody's path changes, and the commands find what the mount covers."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker
from mounts import Library, Mount, daemons_of, eventually, hydrafs, is_mounted, sha256_of

import hydrafs as package

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class InPlace(Mount):
    """A mount over its own store: the log lies in the store, and is read when that is uncovered."""

    def up(self, *arguments: str, warning: str = "") -> InPlace:
        done = hydrafs("mount", self.root, *arguments, "--log-file", self.log_path, HYDRAFS_FUSE=self.binding)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert (warning in done.stderr) if warning else not done.stderr, done.stderr
        (self.pid,) = daemons_of(self.path)
        return self

    @property
    def log_path(self) -> Path:
        return self.root.parent / "mount.log"


@pytest.fixture
def in_place(cache: Path, binding: str) -> Iterator[Callable[..., InPlace]]:
    made: list[InPlace] = []

    def make(library: Library, *arguments: str) -> InPlace:
        mount = InPlace(library, library.root, binding)
        made.append(mount)
        mount.up(*arguments)
        return mount

    yield make
    for mount in made:
        mount.finish()


def test_models_are_whole_where_they_always_were(copied: Copied, in_place: Callable[..., InPlace]) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.ckpt")
    assert sorted(os.listdir(store.root)) == ["base.safetensors", "half.safetensors.hydra", "tuned.ckpt.hydra"]
    live = in_place(store)
    assert sorted(os.listdir(store.root)) == ["base.safetensors", "half.safetensors", "tuned.ckpt"]
    for name, original in store.originals.items():
        assert sha256_of(store.root / name) == original.sha256
        assert (store.root / name).stat().st_mtime_ns == original.mtime_ns
    (store.root / "sub").mkdir()
    (store.root / "sub" / "note.txt").write_text("one")
    os.replace(store.root / "half.safetensors", store.root / "sub" / "half.safetensors")
    assert sha256_of(store.root / "sub" / "half.safetensors") == store.originals["half.safetensors"].sha256
    live.down()
    assert (store.root / "sub" / "half.safetensors.hydra").exists()
    assert (store.root / "sub" / "note.txt").read_text() == "one"
    assert not (store.root / "half.safetensors").exists()


def test_commands_find_the_covered_store(
    copied: Copied, in_place: Callable[..., InPlace], models: ModelMaker, cache: Path
) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = in_place(store)
    models.save(store.root / "new.safetensors", models.tuned("bf16"))
    digest = sha256_of(store.root / "new.safetensors")
    done = hydrafs("dehydrate", store.root / "new.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/proc/" not in done.stdout
    assert sha256_of(store.root / "new.safetensors") == digest
    assert os.getxattr(store.root / "new.safetensors", "user.hydrafs.state") == b"dehydrated"
    assert sorted(os.listdir(store.root)) == ["base.safetensors", "half.safetensors", "new.safetensors"]
    for command in ("ls", "info", "verify", "bases"):
        argument = store.root if command in ("ls", "bases") else store.root / "new.safetensors"
        done = hydrafs(command, argument, *(["--json"] if command != "verify" else []))
        assert (done.returncode, done.stderr) == (0, ""), (command, done.stderr)
        assert "/proc/" not in done.stdout, (command, done.stdout)
        if command == "ls":
            found = json.loads(done.stdout)
            assert found["store"] == str(store.root)
            assert {m["name"] for m in found["models"]} == {"base.safetensors", "half.safetensors", "new.safetensors"}
    done = hydrafs("verify", store.root)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = hydrafs("verify", store.root / "nothing.safetensors")
    assert done.returncode == 3
    assert "/proc/" not in done.stderr
    assert str(store.root / "nothing.safetensors") in done.stderr
    os.chdir(store.root.parent)
    done = hydrafs("rehydrate", store.root / "new.safetensors", "--output", store.root.parent / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert sha256_of(store.root.parent / "out.safetensors") == digest
    # What the commands and the daemon found out is kept, by the names that the files have in the store.
    (catalog,) = (cache / "hydrafs").glob("*.sqlite")
    rows = sqlite3.connect(catalog).execute("SELECT path FROM files").fetchall()
    assert b"base.safetensors" in {row[0] for row in rows}
    assert not [row for row in rows if row[0].startswith(b"/proc")]
    live.down()
    assert (store.root / "new.safetensors.hydra").exists()
    assert not (store.root / "new.safetensors").exists()


def test_what_lands_in_it_is_dehydrated(
    copied: Copied, in_place: Callable[..., InPlace], models: ModelMaker, tmp_path: Path
) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = in_place(store, "--dehydrate", "auto", "--settle", "0.5", "--min-size", "1k", "--exclude", "base.*")
    path = store.root / "sub" / "new.safetensors"
    models.save(path, models.tuned("bf16"))
    digest, before = sha256_of(path), path.stat()
    assert eventually(lambda: os.getxattr(path, "user.hydrafs.state") == b"dehydrated")
    assert sha256_of(path) == digest
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert eventually(lambda: json.loads(hydrafs("status", store.root, "--json").stdout)["worker"]["models"] == 1)
    facts = json.loads(hydrafs("status", store.root, "--json").stdout)
    assert facts["store"] == str(store.root)
    assert hydrafs("control", store.root, "pause").returncode == 0
    models.save(store.root / "later.safetensors", models.tuned("bf16"))
    digest_later = sha256_of(store.root / "later.safetensors")
    assert "paused" in hydrafs("status", store.root).stdout
    assert os.getxattr(store.root / "later.safetensors", "user.hydrafs.state") == b"plain"
    assert hydrafs("control", store.root, "resume").returncode == 0
    assert eventually(lambda: os.getxattr(store.root / "later.safetensors", "user.hydrafs.state") == b"dehydrated")
    assert sha256_of(store.root / "later.safetensors") == digest_later
    live.down()
    assert path.with_name("new.safetensors.hydra").exists()
    assert not path.exists()


def test_a_second_mount_over_it_is_refused_and_a_dead_one_is_cleared(
    copied: Copied, in_place: Callable[..., InPlace]
) -> None:
    store = copied("base.safetensors", "half.safetensors")
    live = in_place(store)
    done = hydrafs("mount", store.root)
    assert done.returncode == 11
    assert "in use" in done.stderr
    live.kill()
    assert is_mounted(store.root)
    live.up(warning="hydrafs: WARNING: ")
    assert sha256_of(store.root / "half.safetensors") == store.originals["half.safetensors"].sha256


def test_links_into_the_store_and_out_of_it(copied: Copied, in_place: Callable[..., InPlace]) -> None:
    """The daemon must not follow one into its own mount, whatever it searches."""
    store = copied("base.safetensors", "half.safetensors")
    (store.root / "absolute").symlink_to(store.root)
    (store.root / "around").symlink_to(f"../{store.root.name}")
    shutil.rmtree(store.root / ".hydrafs", ignore_errors=True)
    (store.root / "base.safetensors").rename(store.root / "renamed.safetensors")
    live = in_place(store)
    # The parent has another name, so everything is searched.
    assert sha256_of(store.root / "half.safetensors") == store.originals["half.safetensors"].sha256
    assert sha256_of(store.root / "absolute" / "half.safetensors") == store.originals["half.safetensors"].sha256
    assert sha256_of(store.root / "around" / "half.safetensors") == store.originals["half.safetensors"].sha256
    for path in (store.root / "absolute" / "half.safetensors", store.root / "around"):
        done = hydrafs("verify", path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    live.down()


def test_the_python_interface(copied: Copied, binding: str) -> None:
    store = copied("base.safetensors", "half.safetensors")
    with package.mount(store.root, binding=binding) as point:
        assert point == store.root
        assert sha256_of(point / "half.safetensors") == store.originals["half.safetensors"].sha256
    assert eventually(lambda: not is_mounted(store.root))
    assert (store.root / "half.safetensors.hydra").exists()
