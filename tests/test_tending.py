"""What a start puts right, what is held, and what is collected when nobody needs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from test_keeping import Family, family, sha256_of  # noqa: F401 - a fixture

from hydrafs import keeping, rehome, renaming, tending
from hydrafs.cli import main
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.restore import uncompress
from hydrafs.store import Store

TUNED = [f"tuned{number}.safetensors" for number in range(3)]


def used_nbytes(root: Path) -> int:
    """What a store takes, each file once whatever its names."""
    files = {(s.st_dev, s.st_ino): s.st_size for p in root.rglob("*") if p.is_file() for s in [p.stat()]}
    return sum(size for path, size in files.items() if path)


class TestCollecting:
    def test_a_base_with_three_dependents(self, family: Family) -> None:  # noqa: F811
        """Deleted while it is needed it takes its space and serves; when the last dependent is gone, both go."""
        base = len(family.originals["base.safetensors"])
        before = used_nbytes(family.root)
        keeping.remove_model(family.store, family.path("base.safetensors"))
        assert abs(used_nbytes(family.root) - before) < 64 << 10
        for number, name in enumerate(TUNED):
            assert not tending.collect(family.store).removed
            family.check(but=("base.safetensors", *TUNED[:number]))
            keeping.remove_model(family.store, family.path(name))
        told = tending.collect(family.store, dry_run=True)
        assert sum(r.freed_nbytes for r in told.removed) == base
        assert tending.collect(family.store) == told
        assert used_nbytes(family.root) < before - base
        assert not tending.collect(family.store).removed

    def test_a_base_that_is_listed_keeps_its_link(self, family: Family) -> None:  # noqa: F811
        assert not tending.collect(family.store).removed
        for name in TUNED:
            keeping.remove_model(family.store, family.path(name))
        (removed,) = tending.collect(family.store).removed
        assert removed.freed_nbytes == 0
        assert family.path("base.safetensors").stat().st_nlink == 1

    def test_a_chain_goes_from_its_end(self, family: Family, models: ModelMaker) -> None:  # noqa: F811
        path = models.save(family.path("child.safetensors"), models.tuned("fp32"))
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(family.path(TUNED[0]),))
        assert dehydrate(family.store, path, options).original_removed
        for name in (*TUNED, "base.safetensors"):
            keeping.remove_model(family.store, family.path(name))
        data = family.read("child.safetensors")
        tending.collect(family.store)
        assert family.read("child.safetensors") == data
        keeping.remove_model(family.store, path)
        tending.collect(family.store)
        assert not [*family.store.retired.iterdir(), *family.store.held.iterdir()]

    def test_a_diff_that_cannot_be_read_stops_it(self, family: Family) -> None:  # noqa: F811
        keeping.remove_model(family.store, family.path("base.safetensors"))
        for name in TUNED:
            diff = family.path(name + ".hydra")
            data = bytearray(diff.read_bytes())
            data[-5] ^= 1
            diff.write_bytes(data)
        collected = tending.collect(family.store)
        assert len(collected.unreadable) == 3
        assert not collected.removed
        assert list(family.store.retired.iterdir())

    def test_a_retired_base_that_comes_back(self, family: Family) -> None:  # noqa: F811
        data = family.originals["base.safetensors"]
        keeping.remove_model(family.store, family.path("base.safetensors"))
        back = family.path("again.safetensors")
        back.write_bytes(data)
        with contextlib.closing(Store(family.root)) as store:
            from hydrafs.identity import FileIdentity

            store.catalog.remember_sha256(back, FileIdentity.of(back.stat()), hashlib.sha256(data).digest())
        tending.collect(family.store)
        assert not list(family.store.retired.iterdir())
        assert back.stat().st_nlink == 2
        family.check(but=("base.safetensors",))

    def test_a_base_that_was_dehydrated_itself(self, family: Family, models: ModelMaker) -> None:  # noqa: F811
        other = models.base("fp16")
        other["norm.bias"] = other["norm.bias"] + 2
        path = models.save(family.path("other.safetensors"), other)
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(path,))
        assert dehydrate(family.store, family.path("base.safetensors"), options).original_removed
        before = used_nbytes(family.root)
        tending.collect(family.store)
        assert used_nbytes(family.root) <= before - len(family.originals["base.safetensors"])
        family.check()

    def test_a_held_diff_that_is_recoded_leaves_nothing_behind(self, family: Family, models: ModelMaker) -> None:  # noqa: F811
        path = models.save(family.path("child.safetensors"), models.tuned("fp32"))
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(family.path(TUNED[0]),))
        assert dehydrate(family.store, path, options).original_removed
        uncompress(family.store, family.store.locate(family.path(TUNED[0])), jobs=1)
        diff = family.path(TUNED[0] + ".hydra")
        held = keeping.place_of(family.store.held, sha256_of(family.originals[TUNED[0]]), is_diff=True)
        assert os.path.samestat(held.stat(), diff.stat())
        family.check()

    def test_another_home(self, family: Family, models: ModelMaker) -> None:  # noqa: F811
        other = models.base("fp16")
        other["norm.bias"] = other["norm.bias"] + 2
        models.save(family.path("other.safetensors"), other)
        keeping.remove_model(family.store, family.path("base.safetensors"))
        before = used_nbytes(family.root)
        options = Options(jobs=1, chunk_nbytes=32 << 10)
        assert tending.rehome(family.store, options, dry_run=True)
        family.check(but=("base.safetensors",))
        assert list(family.store.retired.iterdir())
        rehomed = tending.rehome(family.store, options)
        assert {r.name for r in rehomed} == set(TUNED)
        assert {r.parents for r in rehomed} == {("other.safetensors",)}
        tending.collect(family.store)
        assert not list(family.store.retired.iterdir())
        assert used_nbytes(family.root) < before
        family.check(but=("base.safetensors",))

    @pytest.mark.parametrize("way", ["removed", "replaced"])
    def test_another_home_that_goes_meanwhile(
        self,
        family: Family,  # noqa: F811
        models: ModelMaker,
        monkeypatch: pytest.MonkeyPatch,
        way: str,
    ) -> None:
        """What is stored against it is in no listing until it takes its place: nobody needs the new home yet."""
        other = models.base("fp16")
        other["norm.bias"] = other["norm.bias"] + 2
        path = models.save(family.path("other.safetensors"), other)
        keeping.remove_model(family.store, family.path("base.safetensors"))
        store_one = rehome.dehydrate

        def then_it_goes(*arguments: Any, **named: Any) -> Any:
            outcome = store_one(*arguments, **named)
            if list(family.store.private.glob(".hydrafs-tmp-rehoming-*/2")) and path.exists():
                with contextlib.closing(Store(family.root)) as another:
                    if way == "replaced":
                        fresh = models.save(family.path("fresh.safetensors"), models.base("fp32"))
                        renaming.rename_model(another, fresh, path)
                    else:
                        keeping.remove_model(another, path)
                    tending.collect(another)
            return outcome

        monkeypatch.setattr(rehome, "dehydrate", then_it_goes)
        tending.rehome(family.store, Options(jobs=1, chunk_nbytes=32 << 10))
        family.check(but=("base.safetensors",))
        tending.collect(family.store)
        family.check(but=("base.safetensors",))

    def test_no_other_home(self, family: Family) -> None:  # noqa: F811
        keeping.remove_model(family.store, family.path("base.safetensors"))
        assert not tending.rehome(family.store, Options(jobs=1))
        assert not list(family.store.private.glob(".hydrafs-tmp-*"))
        family.check(but=("base.safetensors",))


class TestHolding:
    def test_what_was_made_before(self, family: Family) -> None:  # noqa: F811
        shutil.rmtree(family.store.held)
        assert tending.hold_parents(family.store) == []
        os.unlink(family.path("base.safetensors"))
        family.check(but=("base.safetensors",))

    def test_what_is_missing_is_said(self, family: Family) -> None:  # noqa: F811
        shutil.rmtree(family.store.held)
        os.unlink(family.path("base.safetensors"))
        (need,) = tending.hold_parents(family.store)
        assert sorted(need.dependents) == TUNED

    def test_a_held_file_that_was_changed_heals(self, family: Family) -> None:  # noqa: F811
        data = family.originals["base.safetensors"]
        base = family.path("base.safetensors")
        base.write_bytes(b"x" * len(data))
        assert len(tending.hold_parents(family.store)) == 1
        elsewhere = family.path("elsewhere.safetensors")
        elsewhere.write_bytes(data)
        assert tending.hold_parents(family.store) == []
        os.unlink(elsewhere)
        family.check(but=("base.safetensors",))

    def test_another_filesystem(self, models: ModelMaker, store: Path) -> None:
        shm = Path("/dev/shm")
        if not shm.is_dir() or shm.stat().st_dev == store.stat().st_dev:
            pytest.skip("/dev/shm is no other filesystem here")
        folder = shm / f"hydrafs-test-{os.getpid()}"
        try:
            base = models.save(folder / "base.safetensors", models.base("fp16"))
            path = models.save(store / "tuned.safetensors", models.tuned("fp16"))
            with contextlib.closing(Store(store, create=True)) as opened:
                assert dehydrate(opened, path, Options(jobs=1, bases=(base,))).original_removed
                (need,) = tending.hold_parents(opened)
                assert need.parent.name.endswith("base.safetensors")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class TestStart:
    def test_leftovers_anywhere(self, family: Family) -> None:  # noqa: F811
        sub = family.root / "sub" / "deeper"
        sub.mkdir(parents=True)
        for folder in (family.root, sub, family.store.private, family.store.held):
            (folder / ".hydrafs-tmp-00").write_bytes(b"half")
        (family.store.private / ".hydrafs-tmp-rehoming-x").mkdir()
        tending.start(family.store)
        assert not list(family.root.rglob(".hydrafs-tmp-*"))
        family.check()

    @pytest.mark.logs("journal that cannot be read")
    def test_a_damaged_journal(self, family: Family) -> None:  # noqa: F811
        (family.store.private / "journal-00").write_bytes(b"{")
        tending.start(family.store)
        assert not list(family.store.private.glob("journal-*"))


@pytest.fixture
def command(family: Family, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:  # noqa: F811
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


class TestCommands:
    def test_rm_and_gc(self, family: Family, command) -> None:  # type: ignore[no-untyped-def] # noqa: F811
        code, out, _ = command("rm", family.path("base.safetensors"))
        assert code == 0
        assert "others need it" in out
        facts = json.loads(command("bases", "--json", family.root)[1])
        assert [(b["name"], b["state"]) for b in facts["bases"] if b["dependents"]] == [("base.safetensors", "retired")]
        code, out, _ = command("rm", "--json", *(family.path(n) for n in TUNED))
        assert code == 0
        assert [r["retired"] for r in json.loads(out)] == [False] * 3
        dry = json.loads(command("gc", "--dry-run", "--json", family.root)[1])
        assert dry["freed"] == len(family.originals["base.safetensors"])
        assert command("gc", family.root)[0] == 0
        assert json.loads(command("gc", "--json", family.root)[1])["removed"] == []
        assert command("rm", family.path("nothing.safetensors"))[0] == 3

    def test_pin(self, family: Family, models: ModelMaker, command) -> None:  # type: ignore[no-untyped-def] # noqa: F811
        path = models.save(family.path("new.safetensors"), models.tuned("fp32"))
        assert command("bases", family.root, "--pin", path)[0] == 0
        code, out, _ = command("dehydrate", path)
        assert code == 0
        assert "pinned" in out
        assert path.exists()
        assert command("bases", family.root, "--pin", family.path(TUNED[0]))[0] == 2
        assert command("bases", family.root, "--unpin", "new.safetensors")[0] == 0
        assert command("bases", family.root, "--unpin", "new.safetensors")[0] == 3
        assert command("dehydrate", path)[0] == 0
        assert not path.exists()

    def test_verify_and_bases_warn(self, family: Family, command) -> None:  # type: ignore[no-untyped-def] # noqa: F811
        shutil.rmtree(family.store.held)
        os.unlink(family.path("base.safetensors"))
        for name in ("bases", "verify"):
            assert "base.safetensors is not held" in command(name, family.root)[2]
