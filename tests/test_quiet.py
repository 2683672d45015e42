"""A parent is quiet: nobody can write to a file that is hashed as one, committed as one, or read without checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Filled, ModelMaker
from mounts import Library, Mount, eventually, hydrafs
from writing_process import HOWS, writing

import hydrafs.dehydrate as dehydrating
from hydrafs import basehash, filesystem, leases
from hydrafs.cache import ChunkCache
from hydrafs.dehydrate import dehydrate
from hydrafs.diff import DiffFile
from hydrafs.errors import Changing, HydraError
from hydrafs.hashing import compute
from hydrafs.identity import FileIdentity
from hydrafs.leases import Lease, QuietFile
from hydrafs.openfiles import Writers, writers
from hydrafs.opening import Opener
from hydrafs.rehydrate import Rehydrated
from hydrafs.store import Store
from hydrafs.temporary import TEMPORARY
from hydrafs.tending import hash_unhashed

pytest_plugins = ["mounting_fixtures"]

Mounted = Callable[..., Mount]
NO_LEASES = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rested(path: Path, data: bytes = bytes(1 << 20)) -> Path:
    """A file whose times are old enough to tell what is written later."""
    path.write_bytes(data)
    return rest(path)


def rest(path: Path) -> Path:
    with path.open("rb") as file:
        until(lambda: filesystem.is_settled(path.stat(), file.fileno()))
    return path


@pytest.fixture
def without_leases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The kernel refuses leases with the errno that the test is given."""
    number: int = getattr(request, "param", errno.EINVAL)
    refuse_leases(monkeypatch, number)
    return number


def refuse_leases(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = fcntl.fcntl

    def refused(fd: int, command: int, argument: int | bytes = 0) -> object:
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            raise OSError(number, os.strerror(number))
        return original(fd, command, argument)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "fcntl", refused)
    monkeypatch.setattr(leases, "_seen_quiet", {})


class TestWriters:
    @pytest.mark.parametrize("how", HOWS)
    def test_each_way_to_write_is_seen(self, tmp_path: Path, how: str) -> None:
        path = rested(tmp_path / "model")
        with path.open("rb") as file:
            assert writers(file.fileno()) is Writers.NOBODY
            with writing(path, how) as other:
                assert writers(file.fileno()) is Writers.SOMEBODY
                other.tell("close")
                until(lambda: writers(file.fileno()) is Writers.NOBODY)

    def test_readers_do_not_count(self, tmp_path: Path) -> None:
        path = rested(tmp_path / "model")
        code = (
            "import mmap, sys\nfile = open(sys.argv[1], 'rb')\n"
            "mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\nprint(flush=True)\ninput()"
        )
        command = [sys.executable, "-c", code, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            with path.open("rb") as file:
                assert writers(file.fileno()) is Writers.NOBODY
            process.communicate(b"\n")

    def test_who_may_not_look_at_others_does_not_know(self, tmp_path: Path) -> None:
        path = rested(tmp_path / "model")
        path.chmod(0o644)
        tmp_path.chmod(0o755)
        code = (
            "import os, sys\nfrom hydrafs.openfiles import writers\nfd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "os.setgid(65534)\nos.setuid(65534)\nprint(writers(fd).name)"
        )
        for folder in (tmp_path, *tmp_path.parents):
            assert folder.stat().st_mode & 0o100
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout == "UNKNOWN\n"


class TestLeases:
    @pytest.mark.parametrize("how", HOWS)
    def test_who_can_write_already(self, tmp_path: Path, how: str) -> None:
        path = rested(tmp_path / "model")
        with writing(path, how) as other:
            with QuietFile(path) as file:
                assert file.quiet.writers is Writers.SOMEBODY
                assert not file.quiet.stands()
                with pytest.raises(Changing, match="model"):
                    file.quiet.check()
            other.tell("close")
        with QuietFile(path) as file:
            assert file.quiet.is_kernels
            assert file.quiet.stands()
            file.quiet.check()

    @pytest.mark.parametrize("how", HOWS)
    def test_who_comes_later_is_not_held_up_and_is_noticed(self, tmp_path: Path, how: str) -> None:
        path = rested(tmp_path / "model")
        with QuietFile(path) as file, QuietFile(path) as same:
            assert file.quiet.stands()
            begun = time.monotonic()
            with writing(path, how):
                assert time.monotonic() - begun < 30
                assert not file.quiet.stands()
                assert not same.quiet.stands()
                with pytest.raises(Changing):
                    file.quiet.check()

    def test_this_process_is_not_held_up_either(self, tmp_path: Path) -> None:
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            with path.open("r+b"):
                assert not file.quiet.stands()
            os.truncate(path, 10)
            assert not file.quiet.stands()

    def test_it_is_quiet_again_once_who_could_write_has_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "_AGAIN_SECONDS", 0.0)
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            for how in HOWS:
                with writing(path, how) as other:
                    assert not file.quiet.stands()
                    other.tell("close")
                if how == "dirty":  # it wrote what was there, and nobody knows
                    break
                until(file.quiet.stands)
                with pytest.raises(Changing):  # who must not be disturbed at all was
                    file.quiet.check()
            assert how != "dirty" or not file.quiet.stands()

    def test_one_thread_watches_five_hundred(self, tmp_path: Path) -> None:
        rested(tmp_path / "model")
        before = threading.active_count()
        paths = [tmp_path / str(number) for number in range(250)]
        for path in paths:
            path.write_bytes(b"model")
        files = [QuietFile(path) for path in (*paths, *paths)]
        try:
            assert threading.active_count() <= before + 1
            assert all(file.quiet.stands() for file in files)
            descriptors = len(os.listdir("/proc/self/fd"))
            more = QuietFile(paths[0])
            assert len(os.listdir("/proc/self/fd")) == descriptors + 1  # the file is open twice, the lease is one
            more.close()
            begun = time.monotonic()
            subprocess.run(
                [sys.executable, "-c", "import sys\nfor p in sys.argv[1:]: open(p,'r+b')", *paths], check=True
            )
            assert time.monotonic() - begun < 30
            assert not any(file.quiet.stands() for file in files)
        finally:
            for file in files:
                file.close()

    def test_a_forked_child_leaves_its_parents_leases_alone(self, tmp_path: Path) -> None:
        path = rested(tmp_path / "model")
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        with QuietFile(path) as file:

            def child() -> None:
                stood = file.quiet.stands()
                with QuietFile(path) as again:
                    theirs.send((stood, again.quiet.stands()))
                    theirs.recv()

            process = context.Process(target=child)
            process.start()
            assert ours.recv() == (False, True)
            assert file.quiet.stands()
            begun = time.monotonic()
            with path.open("r+b"):
                assert time.monotonic() - begun < 30
            ours.send(None)
            process.join(30)
            assert process.exitcode == 0

    def test_who_waited_goes_on_when_the_file_is_closed(self, tmp_path: Path) -> None:
        path = rested(tmp_path / "model")
        QuietFile(path).close()
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # EAGAIN where a lease is there
        os.close(fd)


class TestWithoutLeases:
    @pytest.mark.parametrize("without_leases", NO_LEASES, indirect=True, ids=os.strerror)
    def test_the_processes_are_looked_through(self, tmp_path: Path, without_leases: int) -> None:
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            assert not file.quiet.is_kernels
            assert file.quiet.stands()
            file.quiet.check(look=True)
            with writing(path, "mapping") as other:
                other.write(5, 1)
                assert not file.quiet.stands()
                with pytest.raises(Changing):
                    file.quiet.check(look=True)
        with writing(path, "mapping"), QuietFile(path) as file:
            assert not file.quiet.stands()
        with writing(path, "promise"), pytest.raises(Changing):
            Lease(path)

    def test_eagain_is_a_writer_on_a_disk_of_this_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse_leases(monkeypatch, errno.EAGAIN)
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            assert file.quiet.writers is Writers.SOMEBODY

    @pytest.mark.parametrize("kind", [0x6969, 0xFF534D42, 0xFE534D42, 0x65735546, 0x0BD00BD0])
    def test_eagain_is_no_writer_on_a_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
        refuse_leases(monkeypatch, errno.EAGAIN)
        monkeypatch.setattr(filesystem, "_kind", lambda fd: kind)
        monkeypatch.setattr(filesystem, "_COARSE_NS", 20_000_000)
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            assert file.quiet.stands()
            with writing(path, "descriptor"), pytest.raises(Changing):
                file.quiet.check(look=True)
        with writing(path, "descriptor") as other:
            other.write(7, 7)
            with QuietFile(path) as file:
                assert file.quiet.writers is Writers.SOMEBODY

    def test_where_nothing_can_be_told_it_is_not_quiet(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_leases: int
    ) -> None:
        monkeypatch.setattr(leases, "writers", lambda fd, thorough=False: Writers.UNKNOWN)
        path = rested(tmp_path / "model")
        with QuietFile(path) as file:
            assert not file.quiet.stands()
            with pytest.raises(Changing, match="nobody can tell"):
                file.quiet.check()


def test_times_that_a_later_write_could_leave(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"model")
    with path.open("rb") as file:
        fd = file.fileno()
        now = time.time_ns()

        class Stat:
            st_mtime_ns = now
            st_ctime_ns = 1

        assert not filesystem.is_settled(Stat, fd)  # type: ignore[arg-type]
        Stat.st_mtime_ns = now + 3600 * 10**9
        assert filesystem.is_settled(Stat, fd)  # type: ignore[arg-type]
        Stat.st_mtime_ns = now // 10**9 * 10**9
        assert not filesystem.is_settled(Stat, fd)  # type: ignore[arg-type]
        Stat.st_mtime_ns, Stat.st_ctime_ns = 1, now
        assert not filesystem.is_settled(Stat, fd)  # type: ignore[arg-type]
        until(lambda: filesystem.is_settled(path.stat(), fd))


def place_in(base: Path, name: str) -> int:
    """Where a tensor's bytes begin in a safetensors file."""
    data = base.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return 8 + length + int(header[name]["data_offsets"][0])


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Rehydrated]:
    """The model of a store that is opened anew."""
    with contextlib.closing(Store(root)) as store, contextlib.closing(Opener(store, ChunkCache(0))) as opener:
        model = opener.open(store.locate("tuned.safetensors"))
        assert isinstance(model, Rehydrated)
        with contextlib.closing(model):
            yield model


def read_or_fail(root: Path) -> bytes | None:
    """All its bytes; ``None`` where that fails as it should."""
    try:
        with opened(root) as model:
            return model.pread(0, model.size)
    except HydraError:
        return None


class TestServing:
    @pytest.mark.parametrize("how", HOWS)
    @pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
    def test_a_write_that_shows_in_no_time_gives_no_wrong_byte(self, filled: Filled, how: str, known: bool) -> None:
        """A parent is written to through what was opened before it was hashed, while its model is open and after."""
        filled.dehydrate()
        rest(filled.base)
        place = place_in(filled.base, "frozen.weight") + 3
        byte = filled.base.read_bytes()[place] ^ 0xFF
        with writing(filled.base, how) as other:
            if not known:
                for path in (filled.root / ".hydrafs").glob("catalog*"):
                    path.unlink()
            with opened(filled.root) as model:
                assert model.pread(0, model.size) == filled.data
                other.write(place, byte)
                with contextlib.suppress(HydraError):
                    assert model.pread(0, model.size) == filled.data
                other.tell("close")
                with contextlib.suppress(HydraError):
                    assert model.pread(0, model.size) == filled.data
            assert read_or_fail(filled.root) in (None, filled.data)
        assert read_or_fail(filled.root) in (None, filled.data)

    @pytest.mark.parametrize("how", HOWS)
    def test_a_writer_that_comes_between_the_proof_and_the_read(
        self, filled: Filled, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        filled.dehydrate()
        rest(filled.base)
        place = place_in(filled.base, "frozen.weight") + 3
        byte = filled.base.read_bytes()[place] ^ 0xFF
        with opened(filled.root) as model, contextlib.ExitStack() as stack:
            (parent,) = model.parents
            assert parent.proven()
            original = parent.source.pread_into
            came = []

            def late(offset: int, out: memoryview) -> int:
                if not came:
                    came.append(stack.enter_context(writing(filled.base, how)))
                    came[0].write(place, byte)
                return original(offset, out)

            monkeypatch.setattr(parent.source, "pread_into", late)
            with pytest.raises(HydraError):
                model.pread(place, 100)
            assert came

    def test_a_quiet_parent_is_read_straight_and_one_that_is_not_through_checksums(
        self, filled: Filled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leases, "_AGAIN_SECONDS", 0.0)
        filled.dehydrate()
        rest(filled.base)
        place = place_in(filled.base, "frozen.weight")
        with opened(filled.root) as model:
            assert model.chunks_between(place, place + 100) == []
            with writing(filled.base, "descriptor") as other:
                assert model.chunks_between(place, place + 100) != []
                assert model.pread(0, model.size) == filled.data
                other.tell("close")
            until(lambda: model.chunks_between(place, place + 100) == [])

    def test_in_memory_where_times_tell_nothing(self, filled: Filled, at_end: contextlib.ExitStack) -> None:
        filled.dehydrate()
        root = Path(at_end.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        with root.joinpath("file").open("wb") as file:
            assert not filesystem.times_tell(file.fileno())
        shutil.copytree(filled.root, root / "store", symlinks=True)
        base = root / "store" / "base.safetensors"
        shutil.rmtree(root / "store" / ".hydrafs")  # it knows the other store's base
        place = place_in(base, "frozen.weight") + 3
        byte = base.read_bytes()[place] ^ 0xFF
        Store(root / "store", create=True).close()
        assert read_or_fail(root / "store") == filled.data  # the catalog knows the base now
        before = base.stat()
        with base.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            assert mapping[place] == byte ^ 0xFF
            mapping[place] = byte
        assert FileIdentity.of(base.stat()) == FileIdentity.of(before)
        assert read_or_fail(root / "store") is None

    def test_a_fresh_file_is_not_remembered(self, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its times may be of a filesystem that counts in seconds."""
        filled.dehydrate()
        filled.let_go()
        for path in (filled.root / ".hydrafs").glob("catalog*"):
            path.unlink()
        monkeypatch.setattr(filesystem, "_FINE_NS", 3600 * 10**9)
        with (
            contextlib.closing(Store(filled.root)) as store,
            contextlib.closing(Opener(store, ChunkCache(0))) as opener,
        ):
            with contextlib.closing(opener.open(store.locate("tuned.safetensors"))) as model:
                assert model.pread(0, model.size) == filled.data
            assert store.catalog.sha256(filled.base, FileIdentity.of(filled.base.stat())) is None
            monkeypatch.setattr(filesystem, "_FINE_NS", 20_000_000)
            opener.open(store.locate("tuned.safetensors")).close()
            assert store.catalog.sha256(filled.base, FileIdentity.of(filled.base.stat())) is not None


def stands_whole(filled: Filled) -> None:
    assert filled.tuned.read_bytes() == filled.data
    assert not filled.diff.exists()
    assert not [name for _, _, names in os.walk(filled.root) for name in names if TEMPORARY in name]


class TestDehydrating:
    @pytest.mark.parametrize("how", HOWS)
    def test_a_base_that_somebody_can_write_to(self, filled: Filled, how: str) -> None:
        with writing(filled.base, how):
            with pytest.raises(Changing, match=r"base\.safetensors"):
                filled.dehydrate(replace(filled.options, bases=(filled.base,)))
            stands_whole(filled)
            outcome = filled.dehydrate(replace(filled.options, keep=True))
            assert outcome.parents == ()
            assert any("base.safetensors is no base now" in reason for reason in outcome.reasons)
            filled.diff.unlink(missing_ok=True)
            with pytest.raises(Changing, match=r"base\.safetensors"):  # in the background: not now
                filled.dehydrate(replace(filled.options, alone=False, all_or_nothing=True))
            stands_whole(filled)
        assert filled.dehydrate().parents == ("base.safetensors",)

    @pytest.mark.parametrize("how", HOWS)
    @pytest.mark.parametrize("stage", ["hash", "encode", "prove", "commit"])
    @pytest.mark.parametrize("what", ["base", "model"])
    def test_a_writer_that_comes_in_the_middle(
        self,
        filled: Filled,
        at_end: contextlib.ExitStack,
        monkeypatch: pytest.MonkeyPatch,
        how: str,
        stage: str,
        what: str,
    ) -> None:
        others = []

        def come() -> None:
            if not others:
                others.append(at_end.enter_context(writing(filled.base if what == "base" else filled.tuned, how)))

        if stage == "commit":
            may_go = dehydrating.may_go
            monkeypatch.setattr(dehydrating, "may_go", lambda *arguments: (may_go(*arguments), come())[0])
        if stage == "hash":
            digest = basehash.sha256
            monkeypatch.setattr(basehash, "sha256", lambda *arguments: (come(), digest(*arguments))[1])
        with contextlib.closing(Store(filled.root, create=True)) as store, contextlib.suppress(Changing):
            outcome = dehydrate(
                store, filled.tuned, filled.options, progress=lambda s, *_: come() if s == stage else None
            )
            assert stage == "commit"
            assert not outcome.original_removed
        assert others
        stands_whole(filled)
        others[0].write(9, 65)  # it may, and nobody suffers

    def test_a_base_that_a_diff_is_read_from(self, filled: Filled, models: ModelMaker) -> None:
        """The plain file at the end of a chain counts as the parent itself does."""
        filled.dehydrate()
        further = models.tuned("fp16")
        further["norm.bias"] += 1
        path = models.save(filled.root / "further.safetensors", further)
        with writing(filled.base, "mapping"), contextlib.closing(Store(filled.root)) as store:
            options = replace(filled.options, bases=(filled.tuned,))
            with pytest.raises(Changing, match=r"base\.safetensors"):
                dehydrate(store, path, options)
        assert path.exists()

    def test_where_nothing_can_be_told_the_model_stays_whole(
        self, filled: Filled, monkeypatch: pytest.MonkeyPatch, without_leases: int
    ) -> None:
        monkeypatch.setattr(leases, "writers", lambda fd, thorough=False: Writers.UNKNOWN)
        for options in (
            replace(filled.options, bases=(filled.base,), all_or_nothing=True),
            replace(filled.options, alone=False),
            replace(filled.options, alone=False, all_or_nothing=True),
        ):
            outcome = filled.dehydrate(options)
            assert outcome.diff is None
            assert any("not every process can be looked at" in reason for reason in outcome.reasons), outcome.reasons
            stands_whole(filled)
        outcome = filled.dehydrate(replace(filled.options, bases=(filled.base,)))  # somebody insists
        assert any("nobody can tell" in reason for reason in outcome.reasons)
        with opened(filled.root) as model:
            assert not model.parents[0].proven()
            assert model.pread(0, model.size) == filled.data

    @pytest.mark.parametrize("without_leases", NO_LEASES, indirect=True, ids=os.strerror)
    def test_without_leases(self, filled: Filled, without_leases: int) -> None:
        with writing(filled.base, "promise"), pytest.raises(Changing):
            filled.dehydrate(replace(filled.options, bases=(filled.base,)))
        stands_whole(filled)
        assert filled.dehydrate().original_removed
        assert read_or_fail(filled.root) == filled.data

    def test_a_base_that_was_written_where_times_tell_nothing_is_hashed_anew(
        self, filled: Filled, at_end: contextlib.ExitStack
    ) -> None:
        root = Path(at_end.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        base = Path(shutil.copy2(filled.base, root))
        for number in range(2):
            tuned = Path(shutil.copy2(filled.tuned, root))
            with contextlib.closing(Store(root, create=True)) as store:
                assert dehydrate(store, tuned, replace(filled.options, bases=(base,))).original_removed
            with DiffFile(root / "tuned.safetensors.hydra") as diff:
                assert diff.manifest.parents[0].sha256 == hashlib.sha256(base.read_bytes()).digest()
            (root / "tuned.safetensors.hydra").unlink()
            before = base.stat()
            with base.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
                mapping[-1] = mapping[-1] ^ (number + 1)
            assert FileIdentity.of(base.stat()) == FileIdentity.of(before)

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.EIO])
    def test_a_lock_that_cannot_be_had(self, filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        original = fcntl.flock

        def flock(fd: int, operation: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
                raise OSError(number, os.strerror(number))
            original(fd, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        assert filled.dehydrate().original_removed == (number != errno.EIO)
        assert filled.tuned.exists() or read_or_fail(filled.root) == filled.data

    def test_in_the_background_nothing_is_written_in_the_models_folder(self, filled: Filled, tmp_path: Path) -> None:
        seen = set()

        def look(*_: object) -> None:
            seen.update(os.listdir(filled.root))

        with contextlib.closing(Store(filled.root, create=True)) as store:
            options = replace(filled.options, alone=False, all_or_nothing=True)
            assert dehydrate(store, filled.tuned, options, progress=look).original_removed
        assert seen == {"base.safetensors", "tuned.safetensors", ".hydrafs"}
        assert read_or_fail(filled.root) == filled.data

    @pytest.mark.parametrize("what", ["moved", "removed"])
    @pytest.mark.parametrize("stage", ["encode", "prove", "commit"])
    def test_a_folder_that_goes_meanwhile(
        self, models: ModelMaker, filled: Filled, monkeypatch: pytest.MonkeyPatch, what: str, stage: str
    ) -> None:
        folder = filled.root / "folder"
        folder.mkdir()
        model = filled.tuned.rename(folder / "tuned.safetensors")

        def go() -> None:
            if folder.exists():
                if what == "moved":
                    folder.rename(filled.root / "elsewhere")
                else:
                    shutil.rmtree(folder)

        if stage == "commit":
            keep = dehydrating.keep_parents
            monkeypatch.setattr(dehydrating, "keep_parents", lambda *arguments: (go(), keep(*arguments))[1])
        with contextlib.closing(Store(filled.root, create=True)) as store:
            options = replace(filled.options, alone=False, all_or_nothing=True)
            with pytest.raises(HydraError):
                dehydrate(store, model, options, progress=lambda s, *_: go() if s == stage else None)
        left = [os.path.join(at, name) for at, _, names in os.walk(filled.root) for name in names]
        assert not [name for name in left if "hydra" in os.path.basename(name) or "journal" in name], left
        if what == "moved":
            assert (filled.root / "elsewhere" / "tuned.safetensors").read_bytes() == filled.data


@pytest.mark.fuse
class TestMounted:
    @pytest.mark.parametrize("how", HOWS)
    def test_a_parent_that_is_written_behind_the_mount_gives_no_wrong_byte(
        self, filled: Filled, mounted: Mounted, how: str
    ) -> None:
        filled.dehydrate()
        rest(filled.base)
        place = place_in(filled.base, "frozen.weight") + 3
        byte = filled.base.read_bytes()[place] ^ 0xFF
        with writing(filled.base, how) as other:
            live = mounted(Library(filled.root, {}))
            live.may_log("may have changed|has changed|does not come out")
            path = live.path / "tuned.safetensors"

            def read() -> bytes | None:
                try:
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        return file.read()
                except OSError:
                    return None

            with path.open("rb") as reader:
                assert read() == filled.data
                other.write(place, byte)
                assert read() in (filled.data, None)
                other.tell("close")
                os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with contextlib.suppress(OSError):
                    assert reader.read() == filled.data
            assert read() in (filled.data, None)

    @pytest.mark.parametrize("how", HOWS)
    def test_a_base_that_is_written_through_the_mount(self, filled: Filled, mounted: Mounted, how: str) -> None:
        """It is no parent, or it is one as it was: what a program wrote to a mapping may not have left the kernel."""
        live = mounted(Library(filled.root, {}))
        base = filled.base.read_bytes()
        place = place_in(filled.base, "frozen.weight") + 3
        with writing(live.path / "base.safetensors", how) as other:
            other.write(9, base[9])
            done = hydrafs("dehydrate", filled.tuned, "--base", filled.base)
            if how in ("descriptor", "append"):
                assert (done.returncode, "base.safetensors" in done.stderr) == (Changing.exit_code, True), done.stderr
            if done.returncode:
                stands_whole(filled)
            other.write(place, base[place] ^ 0xFF)
            other.tell("close")
        if done.returncode:
            assert eventually(lambda: hydrafs("dehydrate", filled.tuned, "--base", filled.base).returncode == 0)
        written = bytearray(base)
        written[place] ^= 0xFF
        assert eventually(lambda: (live.path / "base.safetensors").read_bytes() == written)
        assert (live.path / "tuned.safetensors").read_bytes() == filled.data
        live.down()
        assert filled.base.read_bytes() == written
        assert read_or_fail(filled.root) == filled.data

    def test_who_opens_a_parent_that_is_being_read_is_not_held_up(self, filled: Filled, mounted: Mounted) -> None:
        filled.dehydrate()
        live = mounted(Library(filled.root, {}))
        with (live.path / "tuned.safetensors").open("rb") as reader:
            assert reader.read() == filled.data
            begun = time.monotonic()
            with writing(filled.base, "descriptor"):
                pass
            assert time.monotonic() - begun < 30  # the kernel's own patience is 45 seconds
            assert reader.seek(0) == 0
            assert reader.read() == filled.data

    def test_a_folder_is_removed_while_its_model_is_dehydrated(
        self, filled: Filled, mounted: Mounted, models: ModelMaker
    ) -> None:
        live = mounted(Library(filled.root, {}), "--dehydrate", "auto", "--settle", "0", "--min-size", "1k")
        live.may_log("(?i)went away|changed|no such")
        for number in range(6):
            folder = live.path / f"run{number}"
            models.save(folder / "model.safetensors", models.tuned("fp16"))
            deadline = time.monotonic() + 0.15 * number
            while time.monotonic() < deadline:
                time.sleep(0.01)
            shutil.rmtree(folder)
            assert not folder.exists()
            assert not (filled.root / folder.name).exists()


@pytest.mark.parametrize("how", HOWS)
class TestWhateverHashes:
    """No SHA-256 that was taken of a file while somebody could write to it is remembered, whoever takes it."""

    def is_known(self, path: Path) -> bool:
        with contextlib.closing(Store(path.parent)) as store:
            return store.catalog.sha256(path, FileIdentity.of(path.stat())) is not None

    def test_for_a_listing(self, filled: Filled, how: str) -> None:
        rest(filled.base)
        digest = hashlib.sha256(filled.base.read_bytes()).digest()
        with contextlib.closing(Store(filled.root, create=True)) as store:
            entry = store.locate(filled.base)
            with writing(filled.base, how):
                assert compute(store, entry)["sha256"] == digest
                assert not self.is_known(filled.base)
            assert compute(store, entry)["sha256"] == digest
        assert self.is_known(filled.base)

    def test_for_the_retired(self, filled: Filled, how: str) -> None:
        filled.dehydrate()
        retired = filled.root / ".hydrafs" / "retired"
        retired.mkdir()
        place = retired / "unhashed-0123456789abcdef"
        shutil.copyfile(filled.base, place)
        filled.base.unlink()
        filled.let_go()
        rest(place)
        with contextlib.closing(Store(filled.root)) as store:
            with writing(place, how):
                assert hash_unhashed(store) == 0
            assert hash_unhashed(store) == 1
        assert read_or_fail(filled.root) == filled.data
