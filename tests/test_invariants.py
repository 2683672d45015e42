"""The ten promises that everything else rests on, each attacked from outside. Details are in the files named below."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Filled, ModelMaker
from mounts import WAIT_SECONDS, Library, Mount, Original, eventually, hydrafs, is_mounted, sha256_of
from test_rooms import ROOMS

from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import HydraError, ParentUnavailable
from hydrafs.mountpoints import unmount
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile
from hydrafs.vfs import StoreTree

pytest_plugins = ["mounting_fixtures"]

Mounted = Callable[..., Mount]
Copied = Callable[..., Library]


@contextlib.contextmanager
def started(root: Path) -> Any:
    tree = StoreTree(root, 32 << 20)
    tree.start()
    try:
        yield tree
    finally:
        tree.stop()


def read_all(tree: StoreTree, path: str) -> bytes:
    with contextlib.closing(tree.open(path, os.O_RDONLY)) as file:
        out = bytearray(file.attributes().size)
        assert file.pread_into(0, memoryview(out)) == len(out)
        return bytes(out)


def test_every_promise_has_its_tests() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "SEMANTICS.md").read_text()
    design = (tests.parent / "docs" / "DESIGN.md").read_text()
    named = {
        (file, name)
        for file, names in re.findall(r"`(test_\w+)\.py::([\w:]+)`", text + design)
        for name in names.split("::")
    }
    assert len(named) > 40
    sources = {name: (tests / f"{name}.py").read_text() for name, _ in named}
    missing = [f"{file}::{name}" for file, name in named if not re.search(rf"(def|class) {name}\b", sources[file])]
    assert not missing
    promises, _ = text.split("# What it does not promise")
    rows = re.findall(r"^\| (?!promise|cause|-)(.*) \|$", promises, re.MULTILINE)
    assert len(rows) > 40
    untested = [row for row in rows if not re.search(r"`test_\w+\.py::[\w:]+`", row.rpartition(" | ")[2])]
    assert not untested


class TestOriginalBytesOrNone:
    """1. What the mount serves has the SHA-256 of the original, or the read fails. (test_hostile_diffs.py)"""

    @pytest.mark.fuse
    @pytest.mark.parametrize("optimize", ["", "2"], ids=["", "python -OO"])
    def test_damage_anywhere(
        self, copied: Copied, mounted: Mounted, monkeypatch: pytest.MonkeyPatch, optimize: str
    ) -> None:
        library = copied("base.safetensors", "half.safetensors")
        data, diff = library.originals["half.safetensors"].data, library.diff("half.safetensors")
        generator = random.Random(1)
        content = diff.read_bytes()
        for number in range(24):
            damaged = bytearray(content)
            for _ in range(1 + number % 3):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            if number % 8 == 7:
                del damaged[generator.randrange(len(damaged)) :]
            (library.root / f"{number}.safetensors.hydra").write_bytes(damaged)
        # Nothing that guards a byte may be an assert.
        monkeypatch.setenv("PYTHONOPTIMIZE", optimize)
        live = mounted(library)
        live.may_log("ERROR|WARNING", "chunk|diff")
        failed = 0
        for number in range(24):
            path = live.path / f"{number}.safetensors"
            assert path.exists()
            for block in (4096, 1 << 20):
                try:
                    with path.open("rb", buffering=0) as file:
                        got = [(o, os.pread(file.fileno(), block, o)) for o in range(0, len(data), block)]
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed += 1
                else:
                    assert all(part == data[o : o + block] for o, part in got), number
        assert failed > 24
        assert sha256_of(live.path / "half.safetensors") == library.originals["half.safetensors"].sha256

    def test_damage_to_the_base_while_it_is_in_use(self, filled: Filled, caplog: pytest.LogCaptureFixture) -> None:
        filled.dehydrate()
        generator = random.Random(2)
        base = filled.base.read_bytes()
        with started(filled.root) as tree, contextlib.closing(tree.open("/tuned.safetensors", os.O_RDONLY)) as file:
            for _ in range(40):
                damaged = bytearray(base)
                for _ in range(200):
                    damaged[generator.randrange(len(damaged))] ^= 255
                filled.base.write_bytes(damaged)
                offset = generator.randrange(len(filled.data) - 50_000)
                out = bytearray(50_000)
                with contextlib.suppress(HydraError):
                    file.pread_into(offset, memoryview(out))
                    assert out == filled.data[offset : offset + len(out)]


class TestOriginalsGoLast:
    """2. An original is removed only after the diff, read back from disk, has given its SHA-256. (test_dehydrate.py)"""

    def test_a_disk_that_lies(self, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = random.Random(3)
        flush = TemporaryFile.flush_to_disk

        def flush_and_flip(self: TemporaryFile) -> None:
            flush(self)
            if not getattr(self, "flipped", False):
                self.flipped = True  # type: ignore[attr-defined]
                place = generator.randrange(os.fstat(self.file.fileno()).st_size)
                byte = os.pread(self.file.fileno(), 1, place)[0]
                os.pwrite(self.file.fileno(), bytes([byte ^ 32]), place)

        monkeypatch.setattr(TemporaryFile, "flush_to_disk", flush_and_flip)
        refused = 0
        for _ in range(25):
            try:
                filled.dehydrate()
            except HydraError:
                refused += 1
                assert filled.tuned.read_bytes() == filled.data
                assert not filled.diff.exists()
            else:
                # Bytes that mean nothing may differ; then the diff gives the model all the same.
                assert not filled.tuned.exists()
                with started(filled.root) as tree:
                    assert read_all(tree, "/tuned.safetensors") == filled.data
                filled.diff.unlink()
                filled.tuned.write_bytes(filled.data)
        assert refused > 12


class TestNothingIsHalfDone:
    """3. Killed at any instant, the store holds the original, or the diff, or both. (test_dehydrate.py, every call)"""

    def test_kill_at_any_time(self, library: Library, tmp_path: Path) -> None:
        original = library.originals["wide.safetensors"]
        generator = random.Random(4)

        def fresh(name: str) -> Path:
            root = tmp_path / name
            root.mkdir()
            shutil.copy2(library.root / "wide-base.safetensors", root)
            (root / "wide.safetensors").write_bytes(original.data)
            return root

        def dehydrating(root: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "hydrafs", "dehydrate", "wide.safetensors"]
            return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, env=environment)

        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        begun = time.monotonic()
        assert dehydrating(fresh("whole")).wait(WAIT_SECONDS * 4) == 0
        seconds = time.monotonic() - begun
        kept = 0
        for number in range(8):
            root = fresh(str(number))
            child = dehydrating(root)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds * (number + generator.random()) / 8)
            child.kill()
            child.wait()
            plain, diff = root / "wide.safetensors", root / "wide.safetensors.hydra"
            assert plain.exists() or diff.exists()
            if plain.exists():
                kept += 1
                assert plain.read_bytes() == original.data
            if diff.exists():
                with contextlib.closing(Store(root)) as store:
                    from hydrafs.restore import prove

                    assert prove(store, diff).hex() == original.sha256
            left = [p.name for p in root.iterdir() if not p.name.startswith(".hydrafs")]
            assert set(left) <= {"wide-base.safetensors", "wide.safetensors", "wide.safetensors.hydra"}
            shutil.rmtree(root)
        assert kept


class TestRefusedAtOpen:
    """4. A diff that cannot be served fails at open, the parent's name and SHA-256 in the log. (test_vfs.py)"""

    @pytest.mark.parametrize(
        "what", ["gone", "empty", "truncated", "longer", "one bit", "another model", "folder", "link to itself", "pipe"]
    )
    def test_whatever_became_of_the_parent(
        self, models: ModelMaker, filled: Filled, caplog: pytest.LogCaptureFixture, what: str
    ) -> None:
        filled.dehydrate()
        filled.let_go()
        base, content = filled.base, filled.base.read_bytes()
        digest, times = hashlib.sha256(content).hexdigest(), filled.base.stat()
        base.unlink()
        changed = bytearray(content)
        changed[99_999] ^= 1
        if what == "folder":
            base.mkdir()
        elif what == "link to itself":
            base.symlink_to(base.name)
        elif what == "pipe":
            os.mkfifo(base)
        elif what == "another model":
            models.save(base, models.tuned("bf16"))
        elif what != "gone":
            kinds = {"empty": b"", "truncated": content[:-1], "longer": content + b"x", "one bit": bytes(changed)}
            base.write_bytes(kinds[what])
            os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
        with started(filled.root) as tree:
            before = tree.getattr("/tuned.safetensors")
            with pytest.raises(ParentUnavailable):
                tree.open("/tuned.safetensors", os.O_RDONLY)
            (line,) = [r.getMessage() for r in caplog.records if "cannot open" in r.getMessage()]
            for part in ("/tuned.safetensors", "base.safetensors", digest):
                assert part in line
            assert "tuned.safetensors" in {entry.name for entry in tree.readdir("/")}
            assert tree.getattr("/tuned.safetensors").size == before.size == len(filled.data)
            if base.is_dir():
                base.rmdir()
            base.unlink(missing_ok=True)
            base.write_bytes(content)

            def served() -> bool:
                with contextlib.suppress(HydraError):
                    return read_all(tree, "/tuned.safetensors") == filled.data
                return False

            assert eventually(served), "as soon as the parent is back"


class TestMetadataIsCheap:
    """5. stat, readdir, getxattr, a header, the 64 KiB at 0x100000 decode only the chunks that hold them."""

    def test_a_listing_reads_next_to_nothing(self, library: Library, tmp_path: Path) -> None:
        shutil.copytree(library.root, tmp_path / "store", symlinks=True, ignore=shutil.ignore_patterns(".hydrafs"))

        def bytes_read() -> int:
            lines = Path("/proc/self/io").read_text().splitlines()
            return int(dict(line.split(": ") for line in lines)["rchar"])

        stored = sum(library.diff(name).stat().st_size for name in library.dehydrated())
        with started(tmp_path / "store") as tree:
            before = bytes_read()
            for _ in range(3):
                for entry in tree.readdir("/"):
                    tree.getattr("/" + entry.name)
                    assert tree.listxattr("/" + entry.name) is not None
            # Of each diff its last 128 bytes, once; the rest is the catalog.
            assert bytes_read() - before < stored / 20
            assert tree.statistics().misses == 0
            holding = 0
            for name in library.dehydrated():
                with contextlib.closing(tree.opener.open_diff(library.diff(name))) as model:
                    holding += len({*model.chunks_between(0, 4096), *model.chunks_between(0x100000, 0x110000)})
                with contextlib.closing(tree.open("/" + name, os.O_RDONLY)) as file:
                    for offset, nbytes in ((0, 4096), (0x100000, 0x10000)):
                        file.pread_into(offset, memoryview(bytearray(nbytes)))
            tree.pool.close()
            assert tree.statistics().misses <= holding


@pytest.mark.fuse
class TestReadsAreWhole:
    """6. A read returns all that was asked, save at the end of the file. (test_mount.py)"""

    def test_signals_and_a_starved_cache(self, copied: Copied, mounted: Mounted) -> None:
        library = copied("wide-base.safetensors", "wide.safetensors")
        live = mounted(library, "--cache-size", "2M")
        data = library.originals["wide.safetensors"].data
        previous = signal.signal(signal.SIGALRM, lambda number, frame: None)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        try:
            for flags in (0, os.O_DIRECT):
                with open(os.open(live.path / "wide.safetensors", os.O_RDONLY | flags), "rb", buffering=0) as file:
                    import mmap

                    with mmap.mmap(-1, 3 << 20) as out:
                        for offset in range(0, len(data), len(out)):
                            wanted = data[offset : offset + len(out)]
                            assert file.readinto(out) == len(wanted)
                            assert out[: len(wanted)] == wanted
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


WATCHED = """
import os, sys

me = os.getpid()
point, diary = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, argument):
    if os.getpid() == me or isinstance(argument, int):
        return
    try:
        name = os.path.abspath(os.fsdecode(argument))
    except TypeError:
        return
    if name == point or name.startswith(point + "/"):
        os.write(diary, f"{what} {name}\\n".encode())
    elif what == "open":
        os.write(diary, b"another\\n")

sys.addaudithook(lambda event, arguments: note(event, arguments[0]) if arguments else None)
for name in ("stat", "lstat", "statvfs", "access", "readlink"):
    def watched(path, *rest, real=getattr(os, name), name=name, **more):
        note(name, path)
        return real(path, *rest, **more)
    setattr(os, name, watched)
from hydrafs.cli import main
sys.exit(main(["mount", *sys.argv[3:]]))
"""


@pytest.mark.fuse
class TestTheDaemonKeepsOffItsMount:
    """7. The daemon never opens a path on its own mount."""

    def test_nothing_of_it_is_touched(self, library: Library, binding: str, tmp_path: Path) -> None:
        shutil.copytree(library.root, tmp_path / "store", symlinks=True, ignore=shutil.ignore_patterns(".hydrafs"))
        point, diary = tmp_path / "point", tmp_path / "diary"
        point.mkdir()
        # Links that lead back into the mount must not lead the daemon there. The second is as large as the base: were
        # it tried in its place, its own parent would be looked for, and so on until no thread is left.
        (tmp_path / "store" / "back").symlink_to(point)
        (tmp_path / "store" / "back.safetensors").symlink_to(point / "tuned.safetensors")
        (tmp_path / "store" / "roundabout").symlink_to("./back/../" + point.name + "/loras")
        assert len(library.originals["base.safetensors"].data) == len(library.originals["tuned.safetensors"].data)
        command = [sys.executable, "-c", WATCHED, point, diary, tmp_path / "store", point]
        try:
            environment = {**os.environ, "HYDRAFS_FUSE": binding}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            for name, original in library.originals.items():
                assert sha256_of(point / name) == original.sha256
                os.listxattr(point / name)
            assert (point / "back.safetensors").read_bytes() == library.originals["tuned.safetensors"].data
            # Now every place where the parent may be is looked at, the links too. The worker holds it, a moment later.
            held = tmp_path / "store" / ".hydrafs" / "held" / library.originals["base.safetensors"].sha256
            assert eventually(held.exists)
            held.unlink()
            (tmp_path / "store" / "base.safetensors").rename(tmp_path / "base.safetensors")
            for name in ("tuned.safetensors", "half.safetensors"):
                assert (point / name).stat()
                with pytest.raises(OSError) as caught:
                    (point / name).open("rb")
                assert caught.value.errno == errno.EIO
            # The file descriptors of whoever holds /dev/fuse; with stdin and the like none is inside.
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    links = [os.readlink(fd) for fd in (folder / "fd").iterdir()]
                    if "/dev/fuse" in links and os.fsencode(point) in (folder / "cmdline").read_bytes():
                        assert not [link for link in links if link.startswith(str(point))]
                        assert os.readlink(folder / "cwd") == "/"
            lines = diary.read_text().splitlines()
            assert "another" in lines, "the watch works"
            assert [line for line in lines if line != "another"] == []
        finally:
            while is_mounted(point):
                unmount(point, lazy=True)


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


class TestNothingIsUnpickled:
    """8. Nothing is unpickled; hostile input gets a typed error. (test_containers_hostile.py)"""

    @pytest.mark.fuse
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_a_bomb_goes_through_it_all(
        self, models: ModelMaker, store: Path, mounted: Mounted, tmp_path: Path, legacy: bool
    ) -> None:
        marker = tmp_path / "marker"
        base = models.save(store / "base.ckpt", models.base(), legacy=legacy)
        path = models.save(store / "bomb.ckpt", {**models.tuned(), "bomb": Bomb(marker)}, legacy=legacy)  # type: ignore[dict-item]
        data, mode, mtime_ns = path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns
        done = hydrafs("dehydrate", "--no-compress", "--base", base, path)
        assert done.returncode == 0, done.stderr
        assert not path.exists()
        for command in (("ls", store), ("info", path), ("bases", store), ("verify", store)):
            done = hydrafs(*command)
            assert done.returncode == 0, (command, done.stderr)
        live = mounted(Library(store, {"bomb.ckpt": Original(data, mode, mtime_ns)}))
        os.listxattr(live.path / "bomb.ckpt")
        assert (live.path / "bomb.ckpt").read_bytes() == data
        done = hydrafs("rehydrate", path, "--output", tmp_path / "again.ckpt")
        assert done.returncode == 0, done.stderr
        live.down()
        again = models.save(store / "another.ckpt", {**models.tuned("bf16"), "bomb": Bomb(marker)}, legacy=legacy)  # type: ignore[dict-item]
        assert hydrafs("dehydrate", again).returncode == 0, "with the first one among the candidates"
        assert not marker.exists()
        assert (tmp_path / "again.ckpt").read_bytes() == data
        torch.load(io.BytesIO(data), weights_only=False)
        assert marker.exists(), "the bomb is a real one"


class TestNamesSizesModesAndTimes:
    """9. Size, mode, mtime and name are the original's and survive remounts. (test_vfs.py: folders)"""

    @pytest.mark.fuse
    def test_odd_ones(self, models: ModelMaker, store: Path, mounted: Mounted) -> None:
        base = models.save(store / "base.safetensors", models.base("fp16"))
        odd = [
            ("plain.safetensors", 0o644, 1_700_000_000_999_999_999),
            ("before 1970.safetensors", 0o600, -1),
            ("1902.safetensors", 0o640, -2_145_916_800_000_000_001),
            ("after 2106.safetensors", 0o444, 4_294_967_296_000_000_001),
            ("epoch.safetensors", 0o4755, 0),
            ("sticky \u2603 \n .safetensors", 0o1777, 1),
            (os.fsdecode(b"\xff\xfe.safetensors"), 0o000, 1_600_000_000_000_000_000),
            ("n" * (249 - 12) + ".safetensors", 0o664, 1_600_000_000_123_456_789),
        ]
        wanted = {}
        with contextlib.closing(Store(store, create=True)) as opened:
            for name, mode, mtime_ns in odd:
                path = models.save(store / "x.safetensors", models.tuned("fp16"))
                path = path.rename(store / name)
                os.utime(path, ns=(mtime_ns, mtime_ns))
                path.chmod(mode)
                wanted[name] = (path.stat().st_size, path.stat().st_mode, path.stat().st_mtime_ns)
                assert wanted[name][2] == mtime_ns, "this disk keeps such times"
                assert dehydrate(opened, path, Options(jobs=2, bases=(base,))).original_removed
        library = Library(store, {})

        def facts(path: Path) -> tuple[int, int, int]:
            found = path.stat()
            return found.st_size, found.st_mode, found.st_mtime_ns

        live = mounted(library)
        assert sorted(os.listdir(live.path)) == sorted([*wanted, "base.safetensors"])
        assert {name: facts(live.path / name) for name in wanted} == wanted
        live.down()
        # What happens to a diff is not what happened to its model.
        for name in wanted:
            diff = library.diff(name)
            diff.write_bytes(diff.read_bytes())
            diff.chmod(0o600)
        done = hydrafs("uncompress", store / "plain.safetensors")
        assert done.returncode == 0, done.stderr
        again = mounted(library)
        assert {name: facts(again.path / name) for name in wanted} == wanted
        assert len({sha256_of(again.path / name) for name in wanted}) == 1
        assert stat.S_ISDIR(again.path.stat().st_mode)


class TestImportsGoOneWay:
    """10. Imports go one way. (test_rooms.py reads the source; here it is what is loaded that counts)"""

    @pytest.mark.parametrize("room", ["layout", "diff", "rehydrate", "matching", "vfs", "fuse", "mounting", "cli"])
    def test_a_room_loads_nothing_above_it(self, room: str) -> None:
        script = f"import sys, json, hydrafs.{room}; print(json.dumps([m for m in sys.modules]))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        loaded = json.loads(done.stdout)
        rooms = {name.split(".")[1] for name in loaded if name.startswith("hydrafs.")} - {
            "_rans",
            "_formulas",
            "_twins",
        }  # compiled, imports nothing
        allowed = ROOMS[: ROOMS.index(room) + 1]
        assert rooms <= set(allowed), rooms - set(allowed)
        assert not {"torch", "safetensors", "transformers"} & set(loaded), "torch is loaded only where it is needed"
