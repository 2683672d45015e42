"""The one walker: what it yields, what it reports, and that the trouble of one entry is that of one entry."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hydrafs.store import Store
from hydrafs.walk import Trouble, list_folder, walk

ERRORS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.ENAMETOOLONG]


def files(root: Path, troubles: list[Trouble] | None = None) -> set[str]:
    report = None if troubles is None else troubles.append
    return {os.path.relpath(e.path, root) for folder in walk(root, report=report) for e in folder.files}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for name in ("a.hydra", "b/c.hydra", "b/d/e.safetensors", "z.hydra"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


ALL = {"a.hydra", "b/c.hydra", "b/d/e.safetensors", "z.hydra"}


class _Entry:
    """An entry that raises when it is looked at, as one of a filesystem that tells no types does."""

    def __init__(self, entry: os.DirEntry[str], number: int) -> None:
        self.name, self.path, self._error = entry.name, entry.path, OSError(number, os.strerror(number), entry.path)

    def is_dir(self) -> bool:
        raise self._error

    def is_file(self) -> bool:
        raise self._error

    def is_symlink(self) -> bool:
        return False


Wrap = Callable[[str, Iterator[Any]], Iterator[Any]]


def scans(monkeypatch: pytest.MonkeyPatch, wrap: Wrap) -> None:
    real = os.scandir

    @contextmanager
    def scandir(path: str) -> Iterator[Iterator[Any]]:
        with real(path) as entries:
            yield wrap(os.fspath(path), entries)

    monkeypatch.setattr(os, "scandir", scandir)


def test_all_is_yielded_once_and_in_order(tree: Path) -> None:
    (tree / "again").symlink_to("b")
    (tree / "b" / "up").symlink_to("..")
    troubles: list[Trouble] = []
    listed = list(walk(tree, report=troubles.append))
    assert files(tree) == {"a.hydra", "z.hydra", "again/c.hydra", "again/d/e.safetensors"}
    assert [os.path.relpath(f.path, tree) for f in listed] == [".", "again", "again/d"]
    assert not troubles


@pytest.mark.parametrize("number", ERRORS)
def test_one_entry_that_cannot_be_looked_at(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    scans(monkeypatch, lambda path, it: (_Entry(e, number) if e.name == "a.hydra" else e for e in it))
    troubles: list[Trouble] = []
    assert files(tree, troubles) == ALL - {"a.hydra"}
    assert [(t.path, t.error.errno) for t in troubles if isinstance(t.error, OSError)] == [(tree / "a.hydra", number)]
    assert os.strerror(number) in str(troubles[0])


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("count", [0, 1])
def test_a_listing_that_ends_midway(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    """What was read of it counts; that it was not read to its end is told; the other folders are listed."""

    def wrap(path: str, entries: Iterator[Any]) -> Iterator[Any]:
        for index, entry in enumerate(sorted(entries, key=lambda e: e.name)):
            if path == str(tree / "b") and index == count:
                raise OSError(number, os.strerror(number), path)
            yield entry

    scans(monkeypatch, wrap)
    troubles: list[Trouble] = []
    assert files(tree, troubles) == ({"a.hydra", "b/c.hydra", "z.hydra"} if count else {"a.hydra", "z.hydra"})
    assert [t.path for t in troubles] == [tree / "b"]


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_folder_that_cannot_be_entered(tree: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    real = getattr(os, call)

    def fails(path: Any, *arguments: Any, **named: Any) -> Any:
        if os.fspath(path) == str(tree / "b"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, call, fails)
    troubles: list[Trouble] = []
    assert files(tree, troubles) == {"a.hydra", "z.hydra"}
    assert [t.path for t in troubles] == [tree / "b"]


def test_links_that_lead_nowhere_are_no_trouble(tree: Path) -> None:
    for number in range(20):
        (tree / f"0loop{number}").symlink_to(f"0loop{number}")
    (tree / "0dangling").symlink_to("nothing/there")
    (tree / "0through-a-file").symlink_to("a.hydra/x")
    (tree / "0long").symlink_to("n" * 300)
    (tree / "0ring.hydra").symlink_to("0gnir.hydra")
    (tree / "0gnir.hydra").symlink_to("0ring.hydra")
    troubles: list[Trouble] = []
    assert files(tree, troubles) == ALL
    assert not troubles


def test_what_went_meanwhile_is_no_trouble(tree: Path) -> None:
    troubles: list[Trouble] = []
    found = walk(tree, report=troubles.append)
    assert next(found).path == str(tree)
    (tree / "b").rename(tree.parent / "elsewhere")
    assert not list(found)
    assert not troubles
    assert not list_folder(tree / "b", report=troubles.append).names
    assert not troubles


def test_a_top_that_is_not_there_is_trouble(tmp_path: Path) -> None:
    troubles: list[Trouble] = []
    assert not list(walk(tmp_path / "gone", report=troubles.append))
    assert [t.path for t in troubles] == [tmp_path / "gone"]


_AS_ANOTHER = """
import json, os, sys
from hydrafs.walk import walk
os.setgroups([]); os.setgid(65534); os.setuid(65534)
troubles = []
names = [os.path.relpath(e.path, sys.argv[1]) for f in walk(sys.argv[1], report=troubles.append) for e in f.files]
print(json.dumps([sorted(names), sorted(os.path.relpath(t.path, sys.argv[1]) for t in troubles)]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_what_another_user_may_not_see(tree: Path, tmp_path: Path) -> None:
    """A folder that may not be listed, one that may not be entered, and a link through one."""
    for folder, mode in (("closed", 0o700), ("listed", 0o744), ("outside", 0o700)):
        place = (tmp_path if folder == "outside" else tree) / folder
        (place / "in").mkdir(parents=True)
        (place / "in" / "x.hydra").write_bytes(b"x")
        place.chmod(mode)
    (tree / "0link").symlink_to(tmp_path / "outside" / "in")
    for folder in [tree, *tree.parents]:
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", _AS_ANOTHER, tree], capture_output=True, text=True, check=True)
    names, troubles = json.loads(done.stdout)
    assert set(names) == ALL
    assert troubles == ["0link", "closed", "listed/in"]


def test_models_are_listed_behind_trouble(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    troubles: list[Trouble] = []
    with closing(Store(tree)) as store:
        scans(monkeypatch, lambda path, it: (_Entry(e, errno.EIO) if e.name == "a.hydra" else e for e in it))
        assert [m.name for m in store.models(trouble=troubles.append)] == ["z", "b/c", "b/d/e.safetensors"]
        assert [m.name for m in store.models()] == ["z", "b/c", "b/d/e.safetensors"]
    assert [t.path for t in troubles] == [tree / "a.hydra"]


def test_a_deep_tree(tmp_path: Path) -> None:
    """Far deeper than recursion goes; where a path is longer than a system call takes, that is told."""
    deep = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 40, dir_fd=deep)
        below = os.open("d" * 40, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    troubles: list[Trouble] = []
    assert 50 < len(list(walk(tmp_path, report=troubles.append))) < 120
    assert len(troubles) == 1
    assert isinstance(troubles[0].error, OSError)
    assert troubles[0].error.errno == errno.ENAMETOOLONG
