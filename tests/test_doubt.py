"""Doubt keeps: what might be a parent is destroyed only where every folder was listed and every diff read."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from test_keeping import Family, family, read_model, sha256_of  # noqa: F401 - a fixture

from hydrafs import keeping, needs, renaming, tending
from hydrafs.store import Store

doubtful = pytest.mark.logs("nobody knows whether others need")

BASE, TUNED = "base.safetensors", "tuned0.safetensors"
ERRORS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM]

Doubt = Callable[[Family, pytest.MonkeyPatch], Callable[[], None]]
"""Makes the diffs of a family unreadable, and returns what makes them readable again."""


def _damaged(cut: Callable[[bytes], bytes]) -> Doubt:
    def make(family: Family, patch: pytest.MonkeyPatch) -> Callable[[], None]:  # noqa: F811
        kept = {p: p.read_bytes() for p in family.root.glob("*.hydra")}
        for path, data in kept.items():
            path.write_bytes(cut(data))

        def mend() -> None:
            for path, data in kept.items():
                path.write_bytes(data)

        return mend

    return make


def _fails(number: int, call: str) -> Doubt:
    """A system call fails for each diff, or for each folder of diffs, whatever asks."""

    def make(family: Family, patch: pytest.MonkeyPatch) -> Callable[[], None]:  # noqa: F811
        folder = family.root / "more"
        folder.mkdir()
        for path in list(family.root.glob("*.hydra")):
            path.rename(folder / path.name)
        real = getattr(os, call)

        def fails(path: Any, *arguments: Any, **named: Any) -> Any:
            name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            if name == str(folder) if call == "scandir" else name.startswith(f"{folder}/"):
                raise OSError(number, os.strerror(number), name)
            return real(path, *arguments, **named)

        family.store.catalog.close()
        (family.store.private / "catalog.sqlite").unlink()
        family.store = Store(family.root)
        patch.setattr(os, call, fails)

        def mend() -> None:
            patch.setattr(os, call, real)
            for path in list(folder.iterdir()):
                path.rename(family.root / path.name)

        return mend

    return make


DOUBTS: dict[str, Doubt] = {
    "empty": _damaged(lambda data: b""),
    "truncated": _damaged(lambda data: data[: len(data) // 2]),
    "no trailer": _damaged(lambda data: data[:-1]),
    "another byte": _damaged(lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
    "zeroes": _damaged(lambda data: bytes(len(data))),
    **{f"open {errno.errorcode[n]}": _fails(n, "open") for n in ERRORS},
    **{f"scandir {errno.errorcode[n]}": _fails(n, "scandir") for n in ERRORS},
    "stat EIO": _fails(errno.EIO, "stat"),
}


def _unlink(family: Family) -> None:  # noqa: F811
    keeping.remove_model(family.store, family.path(BASE))


def _rename_over(family: Family) -> None:  # noqa: F811
    other = family.path("other.safetensors")
    other.write_bytes(b"z" * 5000)
    renaming.rename_model(family.store, other, family.path(BASE))


def _overwrite(family: Family) -> None:  # noqa: F811
    keeping.before_overwrite(family.store, family.path(BASE))
    family.path(BASE).write_bytes(b"x" * 100)


def _truncate(family: Family) -> None:  # noqa: F811
    keeping.before_overwrite(family.store, family.path(BASE), truncate=True)
    os.truncate(family.path(BASE), 0)


WAYS = [_unlink, _rename_over, _overwrite, _truncate]


def _forget(family: Family, *, held: bool) -> None:  # noqa: F811
    """Nothing says what the base is: neither the catalog nor a link."""
    family.store.catalog.close()
    (family.store.private / "catalog.sqlite").unlink(missing_ok=True)
    family.store = Store(family.root)
    if not held:
        shutil.rmtree(family.store.held)
        copy = family.path("copy")
        shutil.copy2(family.path(BASE), copy)
        os.replace(copy, family.path(BASE))


def _combinations() -> list[ParameterSet]:
    """Every doubt with each way and what is known; a sixth of them is quick enough for every day."""
    return [
        pytest.param(doubt, known, way, marks=() if (d + k + w) % 6 == 0 else pytest.mark.slow)
        for d, doubt in enumerate(DOUBTS)
        for k, known in enumerate(["known", "held", "unknown"])
        for w, way in enumerate(WAYS)
    ]


@doubtful
@pytest.mark.parametrize(("doubt", "known", "way"), _combinations())
def test_a_base_of_diffs_that_cannot_be_read(
    family: Family,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    doubt: str,
    known: str,
    way: Callable[[Family], None],
) -> None:
    """Whatever becomes of its name, a diff that can be read again is served."""
    if known != "known":
        _forget(family, held=known == "held")
    mend = DOUBTS[doubt](family, monkeypatch)
    assert not needs.census(family.store).is_complete
    way(family)
    collected = tending.collect(family.store)
    assert collected.troubles
    assert not collected.removed
    mend()
    # A parent that is held was kept by that link as well; the retired one alone must do.
    shutil.rmtree(family.store.held, ignore_errors=True)
    with closing(Store(family.root)) as store:
        assert needs.census(store).is_complete
        for name, data in family.originals.items():
            if name != BASE:
                assert read_model(store, family.path(name)) == data


def test_links_that_loop_hide_no_diff(family: Family) -> None:  # noqa: F811
    for number in range(20):
        family.path(f"0loop{number}").symlink_to(f"0loop{number}")
    assert needs.census(family.store).is_complete
    keeping.remove_model(family.store, family.path(BASE))
    assert not tending.collect(family.store).removed
    family.check(but=(BASE,))


@doubtful
@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("place", ["held", "retired"])
def test_a_folder_of_kept_diffs_that_cannot_be_listed(
    family: Family, monkeypatch: pytest.MonkeyPatch, place: str, number: int  # noqa: F811
) -> None:  # fmt: skip
    folder = getattr(family.store, place)
    folder.mkdir(exist_ok=True)
    real = os.scandir

    @contextmanager
    def fails(path: Any) -> Iterator[Any]:
        with real(path) as entries:
            if os.fspath(path) == str(folder):
                raise OSError(number, os.strerror(number), path)
            yield entries

    monkeypatch.setattr(os, "scandir", fails)
    found = needs.census(family.store)
    assert [t.path for t in found.troubles] == [folder]
    other = family.path("other.safetensors")
    other.write_bytes(b"y" * 1000)
    keeping.remove_model(family.store, other)
    assert b"y" * 1000 in [p.read_bytes() for p in family.store.retired.iterdir()]


@doubtful
def test_what_is_no_model_goes_in_doubt_as_well(family: Family) -> None:  # noqa: F811
    family.path(TUNED + ".hydra").write_bytes(b"damaged")
    for name, data in (("preview.png", b"\x89PNG" * 100), ("notes.json", b'{"a": 1}'), ("empty.safetensors", b"")):
        family.path(name).write_bytes(data)
        keeping.remove_model(family.store, family.path(name))
        assert not family.path(name).exists()
    assert not family.store.retired.exists()
    for name, data in (("a.dat", b"PK\x03\x04" + b"x" * 99), ("b", b"\x08" + bytes(7) + b"{}"), ("c", b"\x80\x02x")):
        family.path(name).write_bytes(data)
        keeping.remove_model(family.store, family.path(name))
        assert data in [p.read_bytes() for p in family.store.retired.iterdir()]


def test_it_is_said_once_what_stood_in_the_way(family: Family, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    bad = family.path(TUNED + ".hydra")
    bad.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            path = family.path(f"other{number}.safetensors")
            path.write_bytes(b"y" * (1000 + number))
            keeping.remove_model(family.store, path)
    lines = [r.getMessage() for r in caplog.records if "needed" in r.getMessage() or "need" in r.getMessage()]
    assert len(lines) == 1
    assert str(bad) in lines[0]


@doubtful
def test_a_damaged_diff_that_is_removed(family: Family) -> None:  # noqa: F811
    """Its backup may come back: what it needs is not let go of as long as it is there."""
    diffs = {p: p.read_bytes() for p in family.root.glob("*.hydra")}
    for path in diffs:
        path.write_bytes(path.read_bytes()[:-1])
        keeping.remove_model(family.store, path.with_name(path.name.removesuffix(".hydra")))
        assert not path.exists()
    keeping.remove_model(family.store, family.path(BASE))
    tending.collect(family.store)
    for path, data in diffs.items():
        path.write_bytes(data)
    family.check(but=(BASE,))


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damaged", [False, True])
def test_where_nothing_can_be_linked_or_renamed_it_is_copied_without_the_lock(
    caplog: pytest.LogCaptureFixture,
    family: Family,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    way: Callable[[Family], None],
    damaged: bool,
) -> None:
    diff = family.path(TUNED + ".hydra")
    data = diff.read_bytes()
    _forget(family, held=False)
    if damaged:
        for path in family.root.glob("*.hydra"):
            path.write_bytes(path.read_bytes()[:-1])
    elsewhere = f"{family.store.private}/"

    def fails(real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **named: Any) -> None:
            if os.fspath(source).startswith(elsewhere) != os.fspath(target).startswith(elsewhere):
                raise OSError(number, os.strerror(number), source)
            real(source, target, **named)

        return call

    copied = []
    copy = keeping.copy_into

    def unlocked(*arguments: Any) -> Any:
        with family.store.lock(0.0):  # or StoreLocked
            copied.append(1)
        return copy(*arguments)

    monkeypatch.setattr(keeping, "copy_into", unlocked)
    for name in ("link", "replace", "rename"):
        monkeypatch.setattr(os, name, fails(getattr(os, name)))
    way(family)
    assert copied
    monkeypatch.undo()
    diff.write_bytes(data)
    assert read_model(family.store, family.path(TUNED)) == family.originals[TUNED]
    digest = sha256_of(family.originals[BASE])
    assert keeping.is_proven(family.store, family.store.retired / digest.hex(), digest)


def test_a_file_that_is_written_to_while_it_is_copied(
    family: Family, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """What has the name afterwards is what was written."""
    base = family.path(BASE)
    copy, times = keeping.copy_into, []

    def written(*arguments: Any) -> Any:
        found = copy(*arguments)
        if not times:
            times.append(1)
            other = family.path("other")
            other.write_bytes(b"newer")
            os.replace(other, base)
        return found

    monkeypatch.setattr(keeping, "copy_into", written)
    keeping.before_overwrite(family.store, base)
    assert base.read_bytes() == b"newer"
    family.check(but=(BASE,))


def test_a_listing_of_kept_links_that_changes_meanwhile(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    links = keeping.KeptLinks(family.store)
    base = family.path(BASE)
    for number in range(5):
        (family.store.held / f"{number}").write_bytes(b"x")
    for folder in (family.store.held,):
        os.utime(folder, ns=(1, 1))
    real = os.DirEntry.stat if hasattr(os.DirEntry, "stat") else None
    assert real is not None
    scandir = os.scandir

    @contextmanager
    def vanishing(path: Any) -> Iterator[Any]:
        with scandir(path) as entries:
            found = list(entries)
            with suppress(FileNotFoundError):
                (Path(path) / "0").unlink()
            os.utime(path, ns=(1, 1))  # within one tick of the clock
            yield iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", vanishing)
        assert links.count(base.stat()) == 1
    assert links.count(base.stat()) == 1
    lone = family.path("lone")
    lone.write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", None)  # a file with one name is not looked for
        assert links.count(lone.stat()) == 0


@pytest.mark.skipif(
    not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="needs two devices"
)
def test_diffs_of_a_disk_that_is_not_there(family: Family) -> None:  # noqa: F811
    """A link of the store leads to another disk, which is unplugged when a base goes; what is deleted there is gone."""
    disk = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (disk / "mounted").mkdir()
        family.path("more").symlink_to(disk / "mounted")
        for path in list(family.root.glob("*.hydra")):
            shutil.move(path, disk / "mounted" / path.name)
        assert len(needs.census(family.store).needs) == 1
        (disk / "mounted").rename(disk / "away")
        keeping.remove_model(family.store, family.path(BASE))
        assert not tending.collect(family.store).removed
        shutil.rmtree(family.store.held)
        (disk / "away").rename(disk / "mounted")
        assert read_model(family.store, family.path("more") / TUNED) == family.originals[TUNED]
        for path in (disk / "mounted").iterdir():
            path.unlink()
        assert tending.collect(family.store).removed
    finally:
        shutil.rmtree(disk)
