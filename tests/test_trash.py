"""What is removed through a mount can be had back for a while, and is never in the way of anything."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from test_keeping import Family, family  # noqa: F401 - a fixture

from hydrafs import keeping, needs, renaming, tending, trash
from hydrafs.cli import main
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import AlreadyThere, NotFound, UsageError
from hydrafs.retained import kept
from hydrafs.store import Store

BASE, TUNED = "base.safetensors", "tuned0.safetensors"


def remove(family: Family, name: str) -> None:  # noqa: F811
    keeping.remove_model(family.store, family.path(name), aside=trash.put)
    assert name not in family.names()


def names(store: Store) -> list[str]:
    return [t.name for t in trash.listing(store)]


def configure(store: Store, text: str) -> None:
    (store.private / "config.toml").write_text(text)


def plain(family: Family, name: str, data: bytes) -> Path:  # noqa: F811
    path = family.path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    family.originals[name] = data
    return path


@pytest.mark.parametrize("name", [TUNED, BASE, "other.safetensors", "n" * 238 + ".safetensors", "sub/caf\udce9 x.ckpt"])
def test_there_and_back(family: Family, name: str) -> None:  # noqa: F811
    """A diff, a base that others need, a plain model; the longest name, and one that is no text, in a folder."""
    if name not in family.originals:
        plain(family, name, b"PK" + os.urandom(9000))
    held = sorted(p.name for p in family.store.held.iterdir())
    path = family.path(name) if family.path(name).exists() else family.path(name + ".hydra")
    os.utime(path, ns=(1, 2))
    before = path.stat()
    remove(family, name)
    assert names(family.store) == [name]
    family.check(but=(name,))
    if name.startswith("sub"):
        family.path("sub").rmdir()
    assert trash.restore(family.store, name) == family.path(name)
    assert names(family.store) == []
    family.check()
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ino) == (before.st_mode, before.st_mtime_ns, before.st_ino)
    assert not list(family.store.trash.iterdir())
    tending.collect(family.store)
    assert sorted(p.name for p in family.store.held.iterdir()) == held


def test_the_same_name_twice(family: Family) -> None:  # noqa: F811
    for number in range(3):
        plain(family, "x.ckpt", b"%d" % number * 1000)
        remove(family, "x.ckpt")
    assert names(family.store) == ["x.ckpt"] * 3
    trash.restore(family.store, "x.ckpt")
    assert family.path("x.ckpt").read_bytes() == b"2" * 1000
    with pytest.raises(AlreadyThere):
        trash.restore(family.store, str(family.path("x.ckpt")))
    trash.restore(family.store, "x.ckpt", family.path("y.ckpt"))
    assert family.path("y.ckpt").read_bytes() == b"1" * 1000
    oldest = trash.listing(family.store)[0]
    trash.restore(family.store, oldest.path.name, family.path("z.ckpt"))
    assert family.path("z.ckpt").read_bytes() == b"0" * 1000
    with pytest.raises(NotFound):
        trash.restore(family.store, "x.ckpt")


@pytest.mark.parametrize("to", ["../outside.ckpt", ".hydrafs/held/x", "a/.hydrafs-y/z"])
def test_nothing_is_given_a_name_elsewhere(family: Family, to: str) -> None:  # noqa: F811
    remove(family, TUNED)
    with pytest.raises(UsageError):
        trash.restore(family.store, TUNED, family.root / to)
    # Nor does a record that somebody wrote say so.
    (record,) = family.store.trash.glob("*.name")
    record.write_text(json.dumps({"name": os.fsencode(to).hex()}))
    with pytest.raises(UsageError):
        trash.restore(family.store, os.path.normpath(to))
    record.write_bytes(b"{")
    (trashed,) = trash.listing(family.store)
    trash.restore(family.store, trashed.path.name, family.path(TUNED))
    family.check()


def test_what_is_renamed_over_and_truncated(family: Family) -> None:  # noqa: F811
    data = plain(family, "old.safetensors", b"old" * 1000).read_bytes()
    plain(family, "new.safetensors", b"new" * 1000)
    renaming.rename_model(
        family.store, family.path("new.safetensors"), family.path("old.safetensors"), aside=trash.put
    )  # fmt: skip
    assert family.path("old.safetensors").read_bytes() == b"new" * 1000
    keeping.before_overwrite(family.store, family.path("old.safetensors"), truncate=True, aside=trash.put)
    assert family.path("old.safetensors").read_bytes() == b""
    trash.restore(family.store, "old.safetensors", family.path("a.safetensors"))
    trash.restore(family.store, "old.safetensors", family.path("b.safetensors"))
    assert family.path("a.safetensors").read_bytes() == b"new" * 1000
    assert family.path("b.safetensors").read_bytes() == data
    # Over a diff, a diff over a file, a diff over a diff.
    plain(family, "new.safetensors", b"new" * 1000)
    renaming.rename_model(family.store, family.path("new.safetensors"), family.path(TUNED), aside=trash.put)
    renaming.rename_model(family.store, family.path("tuned1.safetensors"), family.path(TUNED), aside=trash.put)
    renaming.rename_model(family.store, family.path("tuned2.safetensors"), family.path(TUNED), aside=trash.put)
    assert names(family.store) == [TUNED] * 3
    assert family.read(TUNED) == family.originals["tuned2.safetensors"]
    for wanted in (family.originals["tuned1.safetensors"], b"new" * 1000, family.originals[TUNED]):
        trash.restore(family.store, TUNED, family.path("back.safetensors"))
        assert family.read("back.safetensors") == wanted
        keeping.remove_model(family.store, family.path("back.safetensors"))


def test_a_file_with_a_second_name_is_truncated_under_both(family: Family) -> None:  # noqa: F811
    path = plain(family, "x.safetensors", b"old" * 1000)
    os.link(path, family.path("y.safetensors"))
    keeping.before_overwrite(family.store, path, truncate=True, aside=trash.put)
    assert path.stat().st_nlink == 2
    assert path.read_bytes() == b"old" * 1000, "who asked truncates it"


def test_no_second_link_is_seen(family: Family) -> None:  # noqa: F811
    path = plain(family, "x.safetensors", b"old" * 1000)
    with family.store.lock():
        assert trash.put(family.store, path, stays=True)
    stat = path.stat()
    assert stat.st_nlink - keeping.KeptLinks(family.store).count(stat) == 1


def test_what_is_no_model_is_not_kept(family: Family) -> None:  # noqa: F811
    for name, data in (("preview.png", b"x" * 1000), ("x.safetensors.part", b"x" * 1000), ("empty.ckpt", b"")):
        plain(family, name, data)
        remove(family, name)
    os.symlink(TUNED, family.path("link.ckpt"))
    keeping.remove_model(family.store, family.path("link.ckpt"), aside=trash.put)
    assert names(family.store) == []


@pytest.mark.parametrize("text", ["trash = false", "[trash]\nseconds = 0", "[trash]\nshare = 0", "[trash]\nshare=1e-9"])
def test_it_can_be_switched_off(family: Family, text: str) -> None:  # noqa: F811
    configure(family.store, text)
    remove(family, TUNED)
    assert names(family.store) == []


@pytest.mark.parametrize("text", ["trash = 3", "[trash]\nseconds = -1", "[trash]\nshare = 2", "[trash]\ndays = 1", "["])
def test_a_configuration_that_is_not_understood_fails_no_removal(family: Family, text: str) -> None:  # noqa: F811
    configure(family.store, text)
    remove(family, TUNED)
    assert names(family.store) == []
    family.check(but=(TUNED,))


def test_what_is_older_goes_for_what_is_newer(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[1], values[2], values[3], values[4] = 1, 1_000_000, 200_000, 200_000  # frsize, blocks, bfree, bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    for number in range(6):
        plain(family, f"{number}.ckpt", bytes([number]) * 30_000)
        remove(family, f"{number}.ckpt")
        assert trash.nbytes(family.store) <= 100_000
    assert names(family.store) == ["3.ckpt", "4.ckpt", "5.ckpt"]
    plain(family, "large.ckpt", b"x" * 150_000)
    remove(family, "large.ckpt")
    assert names(family.store) == ["3.ckpt", "4.ckpt", "5.ckpt"], "what does not fit takes nothing else with it"


def test_a_diff_in_it_keeps_its_parents(family: Family) -> None:  # noqa: F811
    for name in (TUNED, "tuned1.safetensors", "tuned2.safetensors", BASE):
        remove(family, name)
    tending.maintain(family.store)
    for name in (TUNED, "tuned1.safetensors", "tuned2.safetensors", BASE):
        trash.restore(family.store, name)
    family.check()


def test_in_time_it_goes_with_what_it_needed(family: Family) -> None:  # noqa: F811
    for name in list(family.originals):
        remove(family, name)
    assert {k.folder for k in kept(family.store, needs.census(family.store))} >= {"trash"}
    configure(family.store, "[trash]\nseconds = 0.2")
    time.sleep(0.3)
    tending.maintain(family.store)
    assert [p for p in family.store.private.rglob("*") if p.parent.name in ("held", "retired", "trash")] == []


def test_what_is_needed_again_is_retired_when_it_goes(family: Family, models: ModelMaker) -> None:  # noqa: F811
    """A base was removed while nobody needed it; then a diff came back from a backup."""
    diffs = {p: p.read_bytes() for p in family.root.glob("*.hydra")}
    for path in diffs:
        path.unlink()
    tending.collect(family.store)
    remove(family, BASE)
    for path, data in diffs.items():
        path.write_bytes(data)
    assert trash.purge(family.store) >= 0
    assert names(family.store) == []
    family.check(but=(BASE,))


@pytest.mark.logs("nobody knows whether others need")
def test_in_doubt_what_goes_is_retired(family: Family) -> None:  # noqa: F811
    diffs = {p: p.read_bytes() for p in family.root.glob("*.hydra")}
    for path in diffs:
        path.unlink()
    tending.collect(family.store)
    remove(family, BASE)
    for path, data in diffs.items():
        path.write_bytes(data[:-1])
    trash.purge(family.store)
    for path, data in diffs.items():
        path.write_bytes(data)
    family.check(but=(BASE,))


def test_room_is_made(family: Family) -> None:  # noqa: F811
    for name in list(family.originals):
        remove(family, name)
    everything = sum(len(d) for n, d in family.originals.items() if n == BASE)
    assert tending.make_room(family.store) >= everything
    assert names(family.store) == []
    assert not list(family.store.retired.iterdir())
    plain(family, "a.ckpt", b"a" * 1000)
    plain(family, "b.ckpt", b"b" * 1000)
    remove(family, "a.ckpt")
    remove(family, "b.ckpt")
    assert tending.make_room(family.store, 500) == 1000
    assert names(family.store) == ["b.ckpt"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EIO, errno.EACCES, errno.ENOSPC, errno.EMLINK])
@pytest.mark.parametrize("call", ["rename", "link", "fsync", "mkdir"])
def test_a_removal_does_not_fail_for_want_of_it(
    family: Family, monkeypatch: pytest.MonkeyPatch, call: str, number: int  # noqa: F811
) -> None:  # fmt: skip
    plain(family, "x.ckpt", b"x" * 1000)
    real = getattr(os, call)

    def fails(*arguments: Any, **named: Any) -> Any:
        if call == "fsync" or any(str(family.store.trash) in os.fspath(a) for a in arguments if not isinstance(a, int)):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with contextlib.suppress(OSError):
            keeping.remove_model(family.store, family.path("x.ckpt"), aside=trash.put)
    tending.start(family.store)
    if "x.ckpt" in names(family.store):
        trash.restore(family.store, "x.ckpt")
        assert family.path("x.ckpt").read_bytes() == b"x" * 1000
    family.check(but=("x.ckpt",))


def test_a_kill_in_between(family: Family) -> None:  # noqa: F811
    """A record without a file is removed; a file without a record can be had back by what it is called there."""
    remove(family, TUNED)
    (record,) = family.store.trash.glob("*.name")
    (family.store.trash / "00000000000000000001-00000000.name").write_bytes(record.read_bytes())
    (family.store.trash / ".hydrafs-tmp-0000").write_bytes(b"x")
    record.unlink()
    tending.start(family.store)
    assert len(list(family.store.trash.iterdir())) == 1
    (trashed,) = trash.listing(family.store)
    trash.restore(family.store, trashed.name, family.path(TUNED))
    family.check()


def test_who_may_not_read_a_folder_cannot_read_what_was_in_it(family: Family) -> None:  # noqa: F811
    remove(family, TUNED)
    assert family.store.trash.stat().st_mode & 0o077 == 0


def test_the_command(family: Family, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    root = str(family.root)
    before = sorted(p.name for p in family.store.private.iterdir())
    assert main(["undelete", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert sorted(p.name for p in family.store.private.iterdir()) == before
    remove(family, TUNED)
    remove(family, "tuned1.safetensors")
    assert main(["undelete", root]) == 0
    assert TUNED in capsys.readouterr().out
    assert main(["undelete", root, "--json"]) == 0
    (entry, _) = json.loads(capsys.readouterr().out)
    assert (entry["name"], entry["dehydrated"]) == (TUNED, True)
    assert abs(entry["removed_at"] - time.time()) < 3600
    assert main(["undelete", root, TUNED]) == 0
    assert main(["undelete", root, "tuned1.safetensors", "--to", "sub/new.safetensors", "--json"]) == 0
    family.check(but=("tuned1.safetensors",))
    assert family.read("sub/new.safetensors") == family.originals["tuned1.safetensors"]
    assert main(["undelete", root, "nothing"]) == 3
    assert main(["undelete", root, "--to", "x"]) == 2
    remove(family, TUNED)
    assert main(["undelete", root, "--purge"]) == 0
    assert names(family.store) == []


def test_hydrafs_rm_does_not_use_it(family: Family) -> None:  # noqa: F811
    assert main(["rm", str(family.path(TUNED))]) == 0
    assert names(family.store) == []


def test_dehydrated_and_emptied_all_space_comes_back(family: Family, models: ModelMaker) -> None:  # noqa: F811
    path = models.save(family.path("child.safetensors"), models.tuned("fp32"))
    options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(family.path(TUNED),))
    assert dehydrate(family.store, path, options).original_removed
    for name in ("child.safetensors", *family.originals):
        remove(family, name)
    trash.purge(family.store)
    tending.maintain(family.store)
    left = [p for p in family.store.private.rglob("*") if p.parent.name in ("held", "retired", "trash")]
    assert left == []
