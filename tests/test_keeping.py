"""Removing, renaming and overwriting models that others need: nothing that is needed is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Filled, ModelMaker
from mounts import eventually

from hydrafs import basehash, keeping, opening, renaming
from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import Changing, HydraError, ParentUnavailable, Protected
from hydrafs.hashing import KnownHashes, compute
from hydrafs.identity import FileIdentity, sha256
from hydrafs.layout import ByteSource
from hydrafs.opening import Opener
from hydrafs.store import Store

OPTIONS = Options(jobs=1, chunk_nbytes=32 << 10)


def read_model(store: Store, path: Path) -> bytes:
    opener = Opener(store, ChunkCache(1 << 20))
    with contextlib.closing(opener), contextlib.closing(opener.open(store.locate(path))) as model:
        return model.pread(0, model.size)


class Family:
    """A store with a base and models that were dehydrated against it, and what each must read as."""

    def __init__(self, root: Path, originals: dict[str, bytes]) -> None:
        self.root = root
        self.originals = originals
        self.store = Store(root, create=True)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        return read_model(self.store, self.path(name))

    def names(self) -> list[str]:
        return sorted(m.name for m in self.store.models())

    def check(self, *, but: tuple[str, ...] = ()) -> None:
        for name, data in self.originals.items():
            if name not in but:
                assert self.read(name) == data, name


@pytest.fixture
def family(models: ModelMaker, store: Path) -> Iterator[Family]:
    models.save(store / "base.safetensors", models.base("fp16"))
    for number in range(3):
        tensors = models.tuned("fp16")
        tensors["norm.weight"] = tensors["norm.weight"] + number
        models.save(store / f"tuned{number}.safetensors", tensors)
    found = Family(store, {p.name: p.read_bytes() for p in store.glob("*.safetensors")})
    for number in range(3):
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(store / "base.safetensors",))
        assert dehydrate(found.store, store / f"tuned{number}.safetensors", options).original_removed
    yield found
    found.store.close()


def sha256_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class TestHolding:
    def test_a_base_that_is_deleted_behind_hydrafs_is_not_lost(self, family: Family) -> None:
        os.unlink(family.path("base.safetensors"))
        family.check(but=("base.safetensors",))

    def test_a_base_is_held_before_the_original_goes(self, family: Family) -> None:
        base = family.path("base.safetensors")
        held = family.store.held / sha256_of(family.originals["base.safetensors"]).hex()
        assert os.path.samestat(base.stat(), held.stat())
        assert base.stat().st_nlink == 2
        assert keeping.KeptLinks(family.store).count(base.stat()) == 1

    def test_linking_does_not_make_the_catalog_forget(self, family: Family) -> None:
        base = family.path("base.safetensors")
        expected = sha256_of(family.originals["base.safetensors"])
        assert family.store.catalog.sha256(base, FileIdentity.of(base.stat())) == expected

    def test_a_file_that_is_held_while_it_is_hashed_is_the_file_it_was(self, family: Family) -> None:
        """A daemon that starts holds the parents that it finds, while a command reads one of them."""
        data = os.urandom(1 << 20)
        path = family.path("other.bin")
        path.write_bytes(data)
        links = iter(("first", "second"))

        def linked(_: int) -> None:
            with contextlib.suppress(StopIteration):
                os.link(path, family.store.private / next(links))

        entry = family.store.locate(path)
        assert compute(family.store, entry, linked)["sha256"] == sha256_of(data)
        assert KnownHashes(family.store).of_model(entry)["sha256"] == sha256_of(data)

    def test_a_base_that_is_held_while_a_model_is_stored_against_it(
        self, family: Family, models: ModelMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = family.path("new-base.safetensors")
        models.save(base, {n: t + 1 for n, t in models.base("fp16").items()})
        models.save(family.path("new.safetensors"), {n: t + 1 for n, t in models.tuned("fp16").items()})

        def linked(source: ByteSource, progress: Callable[[int], None]) -> bytes:
            found = sha256(source, progress)
            os.link(base, family.store.private / "link")
            return found

        monkeypatch.setattr(basehash, "sha256", linked)
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(base,))
        assert dehydrate(family.store, family.path("new.safetensors"), options).original_removed
        assert keeping.is_proven(family.store, base, sha256_of(base.read_bytes()))

    def test_a_large_base_that_is_held_while_it_is_proved(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = family.path("base.safetensors")
        digest = sha256_of(family.originals["base.safetensors"])
        shutil.copy2(base, family.path("copy"))
        os.replace(family.path("copy"), base)  # nothing is known of it
        shutil.rmtree(family.store.held)

        def linked(source: ByteSource, progress: Callable[[int], None]) -> bytes:
            found = sha256(source, progress)
            with family.store.lock():
                keeping.hold(family.store, base, digest)
            return found

        monkeypatch.setattr(opening, "HASHED_AT_OPEN_NBYTES", 0)
        monkeypatch.setattr(opening, "sha256", linked)
        opener = Opener(family.store, ChunkCache(1 << 20), background=True)
        with contextlib.closing(opener):
            with contextlib.closing(opener.open(family.store.locate(family.path("tuned0.safetensors")))) as model:
                assert model.pread(0, model.size) == family.originals["tuned0.safetensors"]
            assert eventually(lambda: keeping.is_proven(family.store, base, digest))
        held = keeping.place_of(family.store.held, digest, is_diff=False)
        assert os.path.samestat(held.stat(), base.stat())
        assert keeping.is_proven(family.store, held, digest), "a file is what it is under each of its names"

    def test_a_large_base_is_proved_though_the_lock_is_kept(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped command has it: who unmounts does not wait for that."""
        base = family.path("base.safetensors")
        shutil.copy2(base, family.path("copy"))
        os.replace(family.path("copy"), base)  # nothing is known of it
        shutil.rmtree(family.store.held)
        monkeypatch.setattr(opening, "HASHED_AT_OPEN_NBYTES", 0)
        monkeypatch.setattr(keeping, "_REMEMBER_SECONDS", 0.1)
        opener = Opener(family.store, ChunkCache(1 << 20), background=True)
        with family.store.lock(), contextlib.closing(opener):
            opener.open(family.store.locate(family.path("tuned0.safetensors"))).close()
            assert eventually(
                lambda: keeping.is_proven(family.store, base, sha256_of(family.originals["base.safetensors"]))
            )

    def test_a_base_that_is_written_to_while_it_is_hashed_is_another(self, family: Family, models: ModelMaker) -> None:
        path = family.path("other.bin")
        path.write_bytes(os.urandom(1 << 20))

        def written(_: int) -> None:
            with path.open("r+b") as file:
                file.write(b"x")
            with contextlib.suppress(FileExistsError):
                os.link(path, family.store.private / "link")

        with pytest.raises(Changing):
            compute(family.store, family.store.locate(path), written)
        assert not KnownHashes(family.store).of_model(family.store.locate(path))

    def test_the_hash_of_a_base_is_known_while_it_is_being_held(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A link changes the ctime of a file; the catalog is told a moment later."""
        base = family.path("other.bin")
        base.write_bytes(b"a parent")
        digest = compute(family.store, family.store.locate(base))["sha256"]
        other = Store(family.root)  # as another process has it
        asked, linked = threading.Event(), threading.Event()
        carry = other.catalog.carry

        def late(*arguments: Any) -> None:
            linked.set()
            asked.wait(0.3)
            carry(*arguments)

        monkeypatch.setattr(other.catalog, "carry", late)

        def hold() -> None:
            with other.lock():
                keeping.hold(other, base, digest)

        with contextlib.closing(other), ThreadPoolExecutor(1) as pool:
            held = pool.submit(hold)
            assert linked.wait(30)
            known = KnownHashes(family.store)
            entry = family.store.locate(base)
            assert not known.of(base, base.stat(), is_diff=False), "the moment is there"
            assert known.of_model(entry)["sha256"] == digest
            held.result()

    def test_a_held_base_that_is_written_to_is_detected_and_heals(self, family: Family) -> None:
        base = family.path("base.safetensors")
        data = family.originals["base.safetensors"]
        base.write_bytes(b"x" * len(data))
        with pytest.raises(ParentUnavailable):
            family.read("tuned0.safetensors")
        (family.root / "elsewhere.safetensors").write_bytes(data)
        family.check(but=("base.safetensors",))


class TestRemoving:
    def test_a_base_with_three_dependents(self, family: Family) -> None:
        keeping.remove_model(family.store, family.path("base.safetensors"))
        assert "base.safetensors" not in family.names()
        digest = sha256_of(family.originals["base.safetensors"])
        retired = keeping.place_of(family.store.retired, digest, is_diff=False)
        assert retired.read_bytes() == family.originals["base.safetensors"]
        assert keeping.is_proven(family.store, retired, digest), "nothing has to be hashed again"
        family.check(but=("base.safetensors",))
        for number in range(3):
            keeping.remove_model(family.store, family.path(f"tuned{number}.safetensors"))
        assert family.names() == []

    def test_a_model_nobody_needs_is_removed(self, family: Family) -> None:
        other = family.path("other.safetensors")
        other.write_bytes(b"y" * 1000)
        keeping.remove_model(family.store, other)
        assert not other.exists()
        assert not family.store.retired.exists()

    def test_a_base_whose_sha256_is_unknown(self, family: Family) -> None:
        base = family.path("base.safetensors")
        data = base.read_bytes()
        os.unlink(base)
        base.write_bytes(data)  # another inode, and nothing in the catalog
        keeping.remove_model(family.store, base)
        for held in family.store.held.iterdir():
            held.unlink()
        family.check(but=("base.safetensors",))

    def test_a_diff_that_others_need(self, family: Family, models: ModelMaker) -> None:
        path = models.save(family.path("child.safetensors"), models.tuned("fp32"))
        data = path.read_bytes()
        options = Options(jobs=1, chunk_nbytes=32 << 10, bases=(family.path("tuned0.safetensors"),))
        assert dehydrate(family.store, path, options).original_removed
        keeping.remove_model(family.store, family.path("tuned0.safetensors"))
        keeping.remove_model(family.store, family.path("base.safetensors"))
        assert family.names() == ["child.safetensors", "tuned1.safetensors", "tuned2.safetensors"]
        assert family.read("child.safetensors") == data

    def test_a_plain_file_and_the_diff_that_it_hides_go_together(self, family: Family) -> None:
        family.path("tuned0.safetensors").write_bytes(family.originals["tuned0.safetensors"])
        keeping.remove_model(family.store, family.path("tuned0.safetensors"))
        assert "tuned0.safetensors" not in family.names()

    def test_the_policy_refuses(self, family: Family) -> None:
        family.store.protect = True
        with pytest.raises(Protected) as caught:
            keeping.remove_model(family.store, family.path("tuned0.safetensors"))
        assert caught.value.errno == 1
        with pytest.raises(Protected):
            renaming.rename_model(family.store, family.path("tuned0.safetensors"), family.path("x.safetensors"))
        keeping.remove_model(family.store, family.path("base.safetensors"))
        keeping.remove_model(family.store, family.path("tuned0.safetensors"), protect=False)
        family.check(but=("base.safetensors", "tuned0.safetensors"))

    def test_what_is_not_there_and_what_is_a_folder(self, family: Family) -> None:
        with pytest.raises(FileNotFoundError):
            keeping.remove_model(family.store, family.path("nothing"))
        family.path("folder").mkdir()
        with pytest.raises(IsADirectoryError):
            keeping.remove_model(family.store, family.path("folder"))


class TestRenaming:
    def test_over_a_base(self, family: Family) -> None:
        new = family.path("new.safetensors")
        new.write_bytes(b"z" * 5000)
        renaming.rename_model(family.store, new, family.path("base.safetensors"))
        assert family.read("base.safetensors") == b"z" * 5000
        family.check(but=("base.safetensors",))

    @pytest.mark.parametrize("linked", [True, False], ids=["links", "no links"])
    def test_a_diff_over_a_base(self, family: Family, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not linked:
            monkeypatch.setattr(os, "link", _no_links)
        renaming.rename_model(family.store, family.path("tuned0.safetensors"), family.path("base.safetensors"))
        assert family.names() == ["base.safetensors", "tuned1.safetensors", "tuned2.safetensors"]
        assert family.read("base.safetensors") == family.originals["tuned0.safetensors"]
        family.check(but=("base.safetensors", "tuned0.safetensors"))
        assert not list(family.store.private.glob("renaming-*"))

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES])
    @pytest.mark.parametrize("name", ["base.safetensors", "base.safetensors.hydra", "tuned0.safetensors.hydra"])
    def test_a_name_that_cannot_be_looked_at_is_not_free(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, name: str, number: int
    ) -> None:
        look = os.lstat

        def lstat(path: str | Path) -> os.stat_result:
            if os.fspath(path) == os.fspath(family.path(name)):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return look(path)

        monkeypatch.setattr("hydrafs.keeping.os.lstat", lstat)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            renaming.rename_model(family.store, family.path("tuned0.safetensors"), family.path("base.safetensors"))
        monkeypatch.undo()
        family.check()

    def test_a_plain_file_over_a_diff(self, family: Family) -> None:
        new = family.path("new.safetensors")
        new.write_bytes(b"z" * 5000)
        renaming.rename_model(family.store, new, family.path("tuned1.safetensors"))
        assert family.read("tuned1.safetensors") == b"z" * 5000
        assert not family.path("tuned1.safetensors.hydra").exists()
        family.check(but=("tuned1.safetensors",))

    def test_a_diff_over_a_diff(self, family: Family) -> None:
        renaming.rename_model(family.store, family.path("tuned0.safetensors"), family.path("tuned1.safetensors"))
        assert family.read("tuned1.safetensors") == family.originals["tuned0.safetensors"]
        assert family.names() == ["base.safetensors", "tuned1.safetensors", "tuned2.safetensors"]

    def test_a_base_keeps_what_is_known_of_it(self, family: Family) -> None:
        new = family.path("moved.safetensors")
        renaming.rename_model(family.store, family.path("base.safetensors"), new)
        assert keeping.is_proven(family.store, new, sha256_of(family.originals["base.safetensors"]))
        family.check(but=("base.safetensors",))

    def test_a_hidden_diff_does_not_come_to_light(self, family: Family) -> None:
        family.path("tuned0.safetensors").write_bytes(b"newer")
        renaming.rename_model(family.store, family.path("tuned0.safetensors"), family.path("x.safetensors"))
        assert "tuned0.safetensors" not in family.names()
        assert family.read("x.safetensors") == b"newer"

    def test_a_pin_goes_along(self, family: Family) -> None:
        family.store.pin(["base.safetensors"])
        renaming.rename_model(family.store, family.path("base.safetensors"), family.path("b.safetensors"))
        assert family.store.pinned == {"b.safetensors"}

    @pytest.mark.parametrize("old", ["plain", "diff", "folder", "nothing"])
    @pytest.mark.parametrize("new", ["plain", "diff", "folder", "nothing"])
    @pytest.mark.parametrize("replace", [True, False])
    def test_as_rename_does(self, family: Family, tmp_path: Path, old: str, new: str, replace: bool) -> None:
        """Any kind over any kind: the result and the errno are those of a folder of plain files."""
        twin = tmp_path / "twin"
        twin.mkdir()
        names = {}
        for place, kind in (("old", old), ("new", new)):
            names[place] = f"{place}-{kind}.safetensors"
            if kind == "folder":
                (twin / names[place]).mkdir()
                family.path(names[place]).mkdir()
            elif kind != "nothing":
                data = family.originals[f"tuned{place == 'new':d}.safetensors"]
                (twin / names[place]).write_bytes(data)
                if kind == "plain":
                    family.path(names[place]).write_bytes(data)
                else:
                    number = f"tuned{place == 'new':d}.safetensors"
                    os.rename(family.path(number + ".hydra"), family.path(names[place] + ".hydra"))

        def outcome(call: Callable[[], None]) -> int:
            try:
                call()
            except OSError as error:
                return error.errno or -1
            return 0

        def plainly() -> None:
            if not replace and (twin / names["new"]).exists() and (twin / names["old"]).exists():
                raise FileExistsError(17, "")
            os.rename(twin / names["old"], twin / names["new"])

        expected = outcome(plainly)
        done = outcome(
            lambda: renaming.rename_model(
                family.store, family.path(names["old"]), family.path(names["new"]), replace=replace
            )
        )
        assert done == expected
        for name in names.values():
            if (twin / name).is_file():
                assert family.read(name) == (twin / name).read_bytes()
            else:
                assert (twin / name).is_dir() == family.path(name).is_dir()
                assert (twin / name).exists() == family.path(name).exists()


class TestOverwriting:
    @pytest.mark.parametrize("truncate", [True, False])
    def test_a_base(self, family: Family, truncate: bool) -> None:
        base = family.path("base.safetensors")
        os.chmod(base, 0o640)
        with contextlib.suppress(OSError):
            os.setxattr(base, "user.note", b"mine")
        before = base.stat()
        keeping.before_overwrite(family.store, base, truncate=truncate)
        after = base.stat()
        assert after.st_ino != before.st_ino
        assert after.st_mode == before.st_mode
        assert base.read_bytes() == (b"" if truncate else family.originals["base.safetensors"])
        base.write_bytes(b"other")
        family.check(but=("base.safetensors",))

    def test_a_file_nobody_needs_stays_the_file_that_it_is(self, family: Family) -> None:
        other = family.path("other.safetensors")
        other.write_bytes(b"y" * 1000)
        before = other.stat()
        keeping.before_overwrite(family.store, other)
        assert other.stat().st_ino == before.st_ino
        keeping.before_overwrite(family.store, family.path("not there"))

    def test_a_link_that_is_held_for_nobody_goes(self, family: Family) -> None:
        for number in range(3):
            os.unlink(family.path(f"tuned{number}.safetensors.hydra"))
        base = family.path("base.safetensors")
        assert base.stat().st_nlink == 2
        keeping.before_overwrite(family.store, base)
        assert base.stat().st_nlink == 1

    def test_a_sidecar_costs_no_look_at_every_diff(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = []
        original = keeping.census
        monkeypatch.setattr(keeping, "census", lambda *a, **k: looks.append(1) or original(*a, **k))
        for number in range(50):
            path = family.path(f"{number}.json")
            path.write_bytes(b"{}")
            keeping.before_overwrite(family.store, path)
            keeping.remove_model(family.store, path)
        assert len(looks) <= 2


def _no_links(*args: object, **kwargs: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_filesystem_without_links(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    filled.dehydrate()
    assert not list((filled.root / ".hydrafs" / "held").iterdir())
    with contextlib.closing(Store(filled.root)) as store:
        keeping.before_overwrite(store, filled.base)
        filled.base.write_bytes(b"other")
        assert read_model(store, filled.tuned) == filled.data
        with contextlib.suppress(HydraError):
            keeping.remove_model(store, filled.tuned)
