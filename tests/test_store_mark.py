"""Which folder is the store: the one that is named, or the nearest marked one above; none is made in passing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hydrafs.catalog import Catalog
from hydrafs.errors import HydraError
from hydrafs.identity import FileIdentity
from hydrafs.store import Store, find_root, is_marked


def _marked(folder: Path, *names: str) -> Path:
    for name in names:
        place = folder / ".hydrafs" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if "." in name:
            place.write_bytes(b"")
        else:
            place.mkdir()
    return folder


@pytest.mark.parametrize("name", ["store.json", "config.toml", "catalog.sqlite", "held", "retired", "trash"])
def test_what_marks_a_store(tmp_path: Path, name: str) -> None:
    store = _marked(tmp_path / "models", name)
    (store / "a" / "b").mkdir(parents=True)
    assert find_root(store / "a" / "b") == store
    assert find_root(store) == store
    assert find_root(tmp_path) is None


def _file(folder: Path) -> None:
    (folder / ".hydrafs").write_bytes(b"")


def _link(folder: Path) -> None:
    _marked(folder / "elsewhere", "held")
    (folder / ".hydrafs").symlink_to(folder / "elsewhere" / ".hydrafs")


def _somebody_elses_thing(folder: Path) -> None:
    _marked(folder, "notes.txt")


def _in_a_folder_for_all(folder: Path) -> None:
    _marked(folder, "config.toml")
    folder.chmod(0o1777)
    os.chown(folder / ".hydrafs", 12345, 12345)


@pytest.mark.parametrize("make", [_file, _link, _somebody_elses_thing, _in_a_folder_for_all])
def test_what_does_not_mark_one(tmp_path: Path, make: Callable[[Path], None]) -> None:
    if make is _in_a_folder_for_all and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    folder = tmp_path / "models"
    (folder / "inner").mkdir(parents=True)
    make(folder)
    assert not is_marked(folder)
    assert find_root(folder / "inner") is None


def test_a_folder_of_several_people_is_a_store_of_them_all(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    folder = _marked(tmp_path / "models", "held")
    folder.chmod(0o775)
    os.chown(folder, 12345, 100)
    os.chown(folder / ".hydrafs", 12346, 100)
    assert is_marked(folder)


@pytest.mark.parametrize("names", [(), ("catalog.sqlite", "lock.file"), ("store.json",), ("held",)])
def test_a_home_is_not_one_store_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    _marked(tmp_path, *names)
    (tmp_path / ".hydrafs").mkdir(exist_ok=True)
    assert find_root(tmp_path / "models") is None
    assert find_root(tmp_path) == tmp_path  # who names it means it


@pytest.mark.parametrize("name", ["held/x.file", "retired/x.file", "config.toml"])
def test_a_home_that_keeps_models_for_others_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    _marked(tmp_path, name)
    assert find_root(tmp_path / "models") == tmp_path


def test_what_is_looked_at_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    identity = FileIdentity.of(path.stat())
    with contextlib.closing(Store(tmp_path, looks=True)) as store:
        store.catalog.remember_sha256(path, identity, bytes(32))
        with store.rest():
            assert store.catalog.sha256(path, identity) == bytes(32)
        assert os.listdir(tmp_path) == ["file"]
        with store.lock():
            assert is_marked(tmp_path)
    with contextlib.closing(Store(tmp_path, looks=True)) as store:
        assert store.catalog.sha256(path, identity) == bytes(32)


def test_a_store_is_not_made_where_something_stands(tmp_path: Path) -> None:
    (tmp_path / ".hydrafs").write_bytes(b"")
    with contextlib.closing(Store(tmp_path)) as store, pytest.raises(HydraError, match="move it away"):
        store.begin()
    with pytest.raises(HydraError, match="move it away"):
        Store(tmp_path, create=True)


class TestCatalogThatIsLookedAt:
    """What is learnt stands in front of what the file has, and is in no file before it is to be kept."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "catalog.sqlite"
        with contextlib.closing(Catalog(path)) as catalog:
            catalog.remember_sha256(Path("/a"), self.identity(1), b"a" * 32)
            catalog.remember_directory(Path("/"), 1, 2)
            catalog.remember_hashes(b"a" * 32, [("blake3", b"b" * 32)])
            catalog.remember_block(b"a" * 32, b"block")
        return path

    @staticmethod
    def identity(number: int) -> FileIdentity:
        return FileIdentity(number, number, number, number, 7)

    def test_both_are_seen_and_one_is_kept(self, path: Path) -> None:
        before = (path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir(path.parent)))
        with contextlib.closing(Catalog(path, read_only=True)) as catalog:
            assert catalog.sha256(Path("/a"), self.identity(1)) == b"a" * 32
            catalog.remember_sha256(Path("/a"), self.identity(2), b"c" * 32)
            assert catalog.sha256(Path("/a"), self.identity(1)) is None  # as in the file: one identity of each path
            catalog.remember_sha256(Path("/a"), self.identity(2), b"d" * 32)
            assert catalog.sha256(Path("/a"), self.identity(2)) == b"d" * 32
            catalog.carry(Path("/a"), self.identity(2), Path("/b"), self.identity(3))
            assert catalog.paths_of(b"d" * 32) == [Path("/a"), Path("/b")]
            catalog.remember_directory(Path("/"), 3, 4)
            assert catalog.directory(Path("/")) == (3, 4)
            catalog.remember_hashes(b"a" * 32, [("addnet_sha256", b"e" * 32)])
            assert set(catalog.hashes(b"a" * 32)) == {"blake3", "addnet_sha256"}
            assert catalog.block(b"a" * 32) == b"block"
            assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir(path.parent))) == before
            catalog.keep_in(path)
            assert catalog.sha256(Path("/b"), self.identity(3)) == b"d" * 32
        with contextlib.closing(Catalog(path)) as catalog:
            assert catalog.sha256(Path("/b"), self.identity(3)) == b"d" * 32
            assert catalog.sha256(Path("/a"), self.identity(1)) is None
            assert catalog.directory(Path("/")) == (3, 4)
            assert set(catalog.hashes(b"a" * 32)) == {"blake3", "addnet_sha256"}
            assert catalog.block(b"a" * 32) == b"block"

    @pytest.mark.parametrize("content", [None, b"", b"no database" * 1000])
    def test_one_that_is_missing_or_damaged_stays_so(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "catalog.sqlite"
        if content is not None:
            path.write_bytes(content)
        with contextlib.closing(Catalog(path, read_only=True)) as catalog:
            catalog.remember_sha256(Path("/a"), self.identity(1), b"a" * 32)
            assert catalog.sha256(Path("/a"), self.identity(1)) == b"a" * 32
        assert (path.read_bytes() if path.exists() else None) == content


def test_a_store_that_leads_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(HydraError, match="cannot open the store"):
        Store(tmp_path / "loop")
