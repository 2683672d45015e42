"""The tree that the user owns: which name means which file, what is in a listing, and how a file gets its name."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import threading
from pathlib import Path

import pytest
from conftest import Filled

from hydrafs.errors import AlreadyThere, HydraError, NotFound, UsageError
from hydrafs.needs import needs
from hydrafs.store import ModelEntry, Store, find_root, is_private, listed_name, looks_like_model
from hydrafs.temporary import TemporaryFile, remove_leftovers


@pytest.fixture
def opened(store: Path, at_end: contextlib.ExitStack) -> Store:
    return at_end.enter_context(contextlib.closing(Store(store, create=True)))


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(store: Store, folder: Path | None = None) -> list[tuple[str, bool]]:
    return [(m.name, m.is_diff) for m in store.models(folder)]


# Names


def test_the_names_of_models_and_diffs() -> None:
    assert listed_name("x.ckpt.hydra") == "x.ckpt"
    assert listed_name("x.ckpt") == "x.ckpt"
    assert listed_name(".hydra") == ".hydra"
    assert listed_name("x.hydra.hydra") == "x.hydra"
    assert looks_like_model("X.SafeTensors")
    assert not looks_like_model("x.txt")
    assert is_private(".hydrafs")
    assert is_private(".hydrafs-tmp-1")
    assert not is_private("x.hydra")


def test_a_listing_holds_models_and_diffs_and_nothing_else(store: Path, opened: Store) -> None:
    touch(store / "a.safetensors")
    touch(store / "b.ckpt.hydra")
    touch(store / "c.txt")
    touch(store / "d.txt.hydra")
    touch(store / "sub" / "e.PT")
    touch(store / ".hydrafs" / "f.ckpt")
    touch(store / ".hydrafs-tmp-abc.ckpt")
    (store / "folder.ckpt").mkdir()
    (store / "folder.hydra").mkdir()
    os.mkfifo(store / "fifo.ckpt")
    (store / "dangling.ckpt").symlink_to("nowhere")
    (store / "link.ckpt").symlink_to("a.safetensors")
    assert names(opened) == [
        ("a.safetensors", False), ("b.ckpt", True), ("d.txt", True), ("link.ckpt", False), ("sub/e.PT", False)
    ]  # fmt: skip
    assert names(opened, store / "sub") == [("sub/e.PT", False)]


def test_a_plain_file_hides_the_diff_beside_it(store: Path, opened: Store) -> None:
    touch(store / "x.ckpt", b"plain")
    touch(store / "x.ckpt.hydra", b"diff")
    assert names(opened) == [("x.ckpt", False)]
    assert opened.locate("x.ckpt") == ModelEntry("x.ckpt", store / "x.ckpt", False)
    # Named outright, the diff is meant.
    assert opened.locate("x.ckpt.hydra") == ModelEntry("x.ckpt", store / "x.ckpt.hydra", True)


def test_links_that_lead_in_circles_end(store: Path, opened: Store) -> None:
    touch(store / "a" / "x.ckpt")
    (store / "a" / "up").symlink_to("..")
    (store / "loop").symlink_to("loop")
    (store / "again").symlink_to("a")
    assert [n for n, _ in names(opened)] in (["a/x.ckpt"], ["again/x.ckpt"])


def test_a_folder_that_goes_away_is_passed_over(opened: Store, tmp_path: Path) -> None:
    assert names(opened, tmp_path / "none") == []


def test_locate_takes_paths_and_names(store: Path, opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(store / "sub" / "x.ckpt.hydra")
    entry = ModelEntry("sub/x.ckpt", store / "sub" / "x.ckpt.hydra", True)
    monkeypatch.chdir(store / "sub")
    for name in (
        "sub/x.ckpt",
        "sub/x.ckpt.hydra",
        store / "sub" / "x.ckpt",
        "x.ckpt",
        "./x.ckpt",
        "../sub/x.ckpt.hydra",
    ):
        assert opened.locate(name) == entry


@pytest.mark.parametrize("name", ["", ".", "..", "/", "//", "none.ckpt", "a\0b", "x" * 5000, ".hydra", "\n", "sub"])
def test_locate_says_so_where_nothing_is(store: Path, opened: Store, name: str) -> None:
    (store / "sub").mkdir()
    with pytest.raises(NotFound) as caught:
        opened.locate(name)
    assert str(caught.value).isprintable()


def test_the_store_of_a_path_is_the_nearest_above(store: Path) -> None:
    inner = store / "a" / "b"
    inner.mkdir(parents=True)
    assert find_root(inner) is None
    (store / ".hydrafs").mkdir()
    assert find_root(inner) == store
    (store / "a" / ".hydrafs").mkdir()
    assert find_root(inner) == store / "a"


def test_what_cannot_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Store(tmp_path / "none")
    with pytest.raises(HydraError):
        Store(touch(tmp_path / "file"))


def test_opening_a_store_to_look_changes_nothing(store: Path) -> None:
    touch(store / "x.ckpt")
    with contextlib.closing(Store(store)) as opened:
        assert names(opened)
    assert [p.name for p in store.iterdir()] == ["x.ckpt"]


def test_dependents_are_those_that_need_it(filled: Filled) -> None:
    outcome = filled.dehydrate()
    touch(filled.root / "broken.ckpt.hydra")
    with contextlib.closing(Store(filled.root)) as opened:
        from hydrafs.diff import DiffFile

        with DiffFile(filled.diff) as diff:
            base = diff.manifest.parents[0].sha256
        found = needs(opened)
        assert found[base].dependents == ["tuned.safetensors"]
        assert outcome.sha256 not in found


# Configuration


def test_base_folders_are_kept(store: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / 'two "quoted"\\ é'
    for folder in (one, two, store / "inside"):
        folder.mkdir()
    with contextlib.closing(Store(store, create=True)) as opened:
        opened.add_base_folder(one)
        opened.add_base_folder(two)
        opened.add_base_folder(one)
        opened.add_base_folder(store / "inside")  # it is searched anyway
        assert opened.base_folders == (one, two)
    with contextlib.closing(Store(store)) as opened:
        assert opened.base_folders == (one, two)
    assert not list((store / ".hydrafs").glob(".hydrafs-tmp-*"))


def test_other_settings_survive(store: Path, tmp_path: Path) -> None:
    touch(store / ".hydrafs" / "config.toml", b'policy = "mine"\nbase_folders = ["../one"]\n')
    with contextlib.closing(Store(store)) as opened:
        assert opened.base_folders == (tmp_path / "one",)
        opened.add_base_folder(tmp_path)
    text = (store / ".hydrafs" / "config.toml").read_text()
    assert 'policy = "mine"' in text
    assert "../one" in text


@pytest.mark.parametrize(
    "content", [b"base_folders = 7", b"base_folders = [7]", b"= nonsense", b"\xff\xfe", b'base_folders = "x"']
)
def test_a_configuration_that_cannot_be_read_is_named(store: Path, content: bytes) -> None:
    touch(store / ".hydrafs" / "config.toml", content)
    with pytest.raises(UsageError, match=r"config\.toml"):
        Store(store)


def _add(root: Path, folder: Path, go: threading.Event) -> None:
    with contextlib.closing(Store(root)) as opened:
        go.wait(30)
        opened.add_base_folder(folder)


def test_processes_that_add_folders_at_once_lose_none(store: Path, tmp_path: Path) -> None:
    Store(store, create=True).close()
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    folders = [tmp_path / f"f{i}" for i in range(4)]
    processes = [context.Process(target=_add, args=(store, f, go)) for f in folders]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with contextlib.closing(Store(store)) as opened:
        assert set(opened.base_folders) == set(folders)


# Temporary files and commits


def test_a_file_has_its_name_only_when_it_is_whole(store: Path) -> None:
    target = store / "x.bin"
    with TemporaryFile(store) as temporary:
        temporary.file.write(b"half")
        assert not target.exists()
        temporary.file.write(b" and half")
        temporary.commit(target)
        assert target.read_bytes() == b"half and half"
    assert [p.name for p in store.iterdir()] == ["x.bin"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_what_is_not_committed_is_removed(store: Path) -> None:
    with contextlib.suppress(RuntimeError), TemporaryFile(store) as temporary:
        temporary.file.write(b"x")
        raise RuntimeError
    assert not list(store.iterdir())


def test_the_order_of_a_commit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk first, then the name, then the folder: a power cut finds all of it or nothing."""
    done: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def fsync_(fd: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size}"
        done.append(f"fsync {kind}")
        fsync(fd)

    def link_(*args: object, **more: object) -> None:
        done.append("link")
        link(*args, **more)  # type: ignore[arg-type]

    def replace_(*args: object, **more: object) -> None:
        done.append("rename")
        replace(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync_)
    monkeypatch.setattr(os, "link", link_)
    monkeypatch.setattr(os, "replace", replace_)
    for how in (False, True):
        done.clear()
        with TemporaryFile(store) as temporary:
            temporary.file.write(b"12345")
            temporary.commit(store / "x", replace=how)
        assert done == ["fsync file of 5", "rename" if how else "link", "fsync folder"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_a_commit_writes_over_nothing(store: Path, kind: str, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # as on exFAT

        def link(*args: object, **more: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    target = store / "x"
    touch(store / "other", b"other")
    {
        "file": lambda: touch(target, b"mine"),
        "folder": target.mkdir,
        "link": lambda: target.symlink_to("other"),
        "dangling": lambda: target.symlink_to("nowhere"),
    }[kind]()
    with TemporaryFile(store) as temporary:
        temporary.file.write(b"new")
        with pytest.raises(AlreadyThere):
            temporary.commit(target)
    assert sorted(p.name for p in store.iterdir()) == ["other", "x"]
    assert (store / "other").read_bytes() == b"other"
    if kind == "file":
        assert target.read_bytes() == b"mine"
    if not links:
        with TemporaryFile(store) as temporary:
            temporary.commit(store / "free")
        assert (store / "free").exists()


def test_no_folder_to_write_in(store: Path) -> None:
    with pytest.raises(NotFound):
        TemporaryFile(store / "none")


def test_leftovers_are_told_from_files_in_use(store: Path, opened: Store) -> None:
    touch(store / ".hydrafs-tmp-dead1")
    touch(store / ".hydrafs-tmp-dead2")
    touch(store / "x.ckpt")
    with TemporaryFile(store) as living:
        assert remove_leftovers(store) == 2
        assert living.path.exists()
    assert remove_leftovers(store) == 0
    assert (store / "x.ckpt").exists()


def test_leftovers_that_may_not_be_written_to(store: Path, opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed copy of a read-only model has the mode of that."""
    call = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY and Path(path).name == ".hydrafs-tmp-dead":
            raise PermissionError(13, "Permission denied")
        return call(path, flags, *mode)

    touch(store / ".hydrafs-tmp-dead")
    monkeypatch.setattr(os, "open", refuse)
    assert remove_leftovers(store) == 1


def test_the_lock_is_held_by_one_at_a_time(opened: Store) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def one() -> None:
        nonlocal inside, most
        for _ in range(20):
            with opened.lock():
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
