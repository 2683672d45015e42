"""The caches of WebUIs after ``hydrafs hashes --webui``: what the programs read, in the way they read it.

``Reader`` is written after the sources of A1111 1.10 and its development branch, Forge and SD.Next (``hashes.py``,
``cache.py``, ``sd_models.py``): what it may read of a model, it reads, and the tests count it. ``release``: A1111 1.10
and Forge, which read the 64 KiB at 0x100000 of every checkpoint at every listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest
from conftest import Filled, ModelMaker
from mounts import Library, Mount

from hydrafs.cli import main
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile
from hydrafs.hashing import kept_block
from hydrafs.store import Store
from hydrafs.vfs import StoreTree
from hydrafs.webui import find_models, kind_of

pytest_plugins = ["mounting_fixtures"]
Capture = pytest.CaptureFixture[str]


class Reader:
    """A WebUI that lists its models. ``reads`` counts what it had to read of them, by why."""

    def __init__(self, data: Path, kind: str, checkpoints: Path, loras: Path, *, release: bool = False) -> None:
        self.release = release
        self.kind, self.checkpoints, self.loras = kind, checkpoints, loras
        self.reads: list[tuple[str, str]] = []
        self._folder, self._file = data / "cache", data / "cache.json"
        self._caches: dict[str, Any] = {}
        self._json: dict[str, Any] = {}
        if kind == "sdnext" or not self._folder.exists():
            self._json = json.loads(self._file.read_bytes()) if self._file.is_file() else {}

    def cache(self, section: str) -> Any:
        if self.kind == "sdnext":
            return self._json.setdefault(section, {})
        if section not in self._caches:
            converting = not self._folder.exists()
            made = {section: self._make(section)}
            if converting:
                for name, values in self._json.items():
                    made.setdefault(name, self._make(name))
                    for key, value in values.items():
                        made[name][key] = value
            self._caches |= made
        return self._caches[section]

    def _make(self, section: str) -> diskcache.Cache:
        return diskcache.Cache(str(self._folder / section), size_limit=2**32, disk_min_file_size=2**18)

    def sha256(self, filename: str, title: str, *, addnet: bool = False) -> str:
        hashes = self.cache("hashes-addnet" if addnet else "hashes")
        mtime = os.path.getmtime(filename)
        if title in hashes:
            cached = hashes[title].get("mtime", 0)
            same = mtime == cached if self.kind == "a1111" else mtime <= cached  # its newest asks for the very time
            if "mtime_ns" in hashes[title]:
                stat = os.stat(filename)
                same = (hashes[title]["mtime_ns"], hashes[title]["size"]) == (stat.st_mtime_ns, stat.st_size)
            if same and hashes[title].get("sha256"):
                return str(hashes[title]["sha256"])
        self.reads.append(("whole file", filename))
        return hashlib.sha256(Path(filename).read_bytes()).hexdigest()

    def partial(self, filename: str) -> str:
        entry = self.cache("partial-hash").get(filename, {})
        if not self.release and os.path.getmtime(filename) == entry.get("mtime", 0) and entry.get("hash"):
            return str(entry["hash"])[:8]
        self.reads.append(("64 KiB", filename))
        with open(filename, "rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]

    def metadata(self, filename: str, title: str) -> Any:
        entry = self.cache("safetensors-metadata").get(title)
        if entry and os.path.getmtime(filename) <= entry.get("mtime", 0) and "value" in entry:
            return entry["value"]
        self.reads.append(("header", filename))
        with open(filename, "rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(nbytes)).get("__metadata__", {})

    def _walk(self, folder: Path) -> Iterator[str]:
        for root, _, files in os.walk(folder, followlinks=True):
            for name in files:
                endings = (".safetensors",) if self.kind == "sdnext" else (".safetensors", ".ckpt")
                if os.path.splitext(name)[1] in endings:
                    yield os.path.join(root, name)

    def list_models(self) -> dict[str, tuple[str, ...]]:
        """Every checkpoint and LoRA with its hashes, as the program shows them."""
        found: dict[str, tuple[str, ...]] = {}
        for filename in self._walk(self.checkpoints):
            name = os.path.abspath(filename).replace(os.path.abspath(self.checkpoints), "").removeprefix("/")
            if self.kind == "sdnext":
                name = os.path.splitext(name)[0]
                found[name] = (self.sha256(filename, f"checkpoint/{name}"),)
                continue
            if filename.endswith(".safetensors"):
                self.metadata(filename, f"checkpoint/{name}")
            found[name] = (self.sha256(filename, f"checkpoint/{name}"), self.partial(filename))
        for filename in self._walk(self.loras):
            name = os.path.splitext(os.path.basename(filename))[0]
            addnet = filename.endswith(".safetensors")
            if addnet and self.kind != "sdnext":
                self.metadata(filename, f"lora/{name}")
            if self.kind == "sdnext":
                found[f"lora/{name}"] = (self.sha256(filename, f"lora/{name}"),)
            else:
                found[f"lora/{name}"] = (self.sha256(filename, f"lora/{name}", addnet=addnet),)
        for cache in self._caches.values():
            cache.close()
        return found


def addnet_of(data: bytes) -> str:
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def decoded(pid: int) -> int:
    """How many bytes a daemon has read from files: what it decodes, it reads."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("rchar: "):
            return int(line.split()[1])
    raise AssertionError("no rchar")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "webui"
    (folder / "models").mkdir(parents=True)
    return folder


def seed(capsys: Capture, *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["hashes", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.fuse
@pytest.mark.parametrize("kind", ["a1111", "forge", "sdnext"])
@pytest.mark.parametrize("has_folder", [True, False])
def test_a_listing_reads_nothing_of_any_model(
    live: Mount, library: Library, data: Path, capsys: Capture, kind: str, has_folder: bool
) -> None:
    (data / "models" / "Stable-diffusion").symlink_to(live.path)
    (data / "models" / "Lora").symlink_to(live.path / "loras")
    if has_folder:
        (data / "cache").mkdir()
    reader = Reader(data, kind, data / "models" / "Stable-diffusion", data / "models" / "Lora")
    if kind != "sdnext" and not has_folder:
        assert not (data / "cache").exists()
    seed(capsys, "--compute", live.root)
    facts = seed(capsys, live.root, "--webui", data, "--kind", kind)["webui"]
    assert facts["unknown"] == []
    assert facts["checkpoints"] >= len(library.dehydrated())
    assert facts["loras"] == 1
    assert any(path.endswith("cache.json") for path in facts["written"]) == (kind == "sdnext" or not has_folder)

    os.stat(live.path)
    reader = Reader(data, kind, data / "models" / "Stable-diffusion", data / "models" / "Lora")
    found = reader.list_models()
    assert reader.reads == []

    for name, original in library.originals.items():
        if not name.endswith((".safetensors",) if kind == "sdnext" else (".safetensors", ".ckpt")):
            continue
        listed = os.path.splitext(name)[0] if kind == "sdnext" else name
        assert found[listed][0] == original.sha256
        if kind != "sdnext":
            assert found[listed][1] == hashlib.sha256(original.data[0x100000:0x110000]).hexdigest()[:8]
    lora = next(name for name in library.originals if name.startswith("loras/") and name.endswith(".safetensors"))
    title = "lora/" + os.path.splitext(os.path.basename(lora))[0]
    original = library.originals[lora]
    assert found[title] == ((addnet_of(original.data) if kind == "a1111" else original.sha256),)


@pytest.mark.fuse
def test_the_mount_decodes_nothing_for_a_seeded_listing(
    live: Mount, library: Library, data: Path, capsys: Capture
) -> None:
    (data / "models" / "Stable-diffusion").symlink_to(live.path)
    (data / "cache").mkdir()
    seed(capsys, "--compute", live.root)
    seed(capsys, live.root, "--webui", data)
    before = decoded(live.pid)
    reader = Reader(data, "a1111", data / "models" / "Stable-diffusion", data / "none")
    assert reader.list_models()
    assert reader.reads == []
    smallest = min(len(o.data) for n, o in library.originals.items() if n in library.dehydrated())
    assert decoded(live.pid) - before < smallest / 4, "trailers at most"
    # The same reader without a cache reads models: the count is one that can go wrong.
    before = decoded(live.pid)
    shutil.rmtree(data / "cache")
    (data / "cache.json").unlink(missing_ok=True)
    reader = Reader(data, "a1111", data / "models" / "Stable-diffusion", data / "none")
    reader.list_models()
    assert ("whole file") in {why for why, _ in reader.reads}
    assert decoded(live.pid) - before > smallest


@pytest.mark.fuse
@pytest.mark.parametrize("kind", ["a1111", "forge"])
def test_the_64_kib_of_the_old_hash_are_served_without_decoding(
    live: Mount, library: Library, data: Path, capsys: Capture, kind: str
) -> None:
    (data / "models" / "Stable-diffusion").symlink_to(live.path)
    (data / "cache").mkdir()
    seed(capsys, "--compute", live.root)
    facts = seed(capsys, live.root, "--webui", data, "--kind", kind)["webui"]
    long = [n for n in library.dehydrated() if len(library.originals[n].data) > 0x100000 and is_checkpoint(n)]
    assert facts["blocks"] >= len(long) > 0, "links to models count as models"

    def chunks() -> int:
        """How many chunks the daemon has decoded, or found decoded."""
        assert main(["status", str(live.path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        return int(told["cache_misses"] + told["cache_hits"] + told["cache_waits"])

    for name in long:  # what the kernel holds of them would hide what is decoded
        with open(live.path / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = chunks()
    reader = Reader(data, kind, data / "models" / "Stable-diffusion", data / "none", release=True)
    found = reader.list_models()
    assert {why for why, _ in reader.reads} == {"64 KiB"}
    assert chunks() == before
    with open(live.path / long[0], "rb") as file:
        file.seek(0x100000 - 1)
        file.read(1)
    assert chunks() > before, "the count is one that can go wrong"
    for name in long:
        assert found[name][1] == hashlib.sha256(library.originals[name].data[0x100000:0x110000]).hexdigest()[:8]


def is_checkpoint(name: str) -> bool:
    return name.endswith((".safetensors", ".ckpt"))


def long_diff(models: ModelMaker, store: Path) -> tuple[Path, bytes]:
    """A store with one diff of a model that reaches over 0x110000; the diff, and the model's bytes."""
    models.save(store / "base.ckpt", models.base())
    tuned = models.save(store / "tuned.ckpt", models.tuned())
    content = tuned.read_bytes()
    assert len(content) > 0x110000
    with contextlib.closing(Store(store, create=True)) as opened:
        diff = dehydrate(opened, tuned, Options(jobs=2)).diff
    assert diff
    return diff, content


def test_a_thousand_models_are_listed_without_decoding(
    models: ModelMaker, store: Path, data: Path, capsys: Capture
) -> None:
    """On the tree of a mount, without FUSE: what A1111 1.10 and Forge do at each listing, once they are told."""
    diff, content = long_diff(models, store)
    names = [f"style-{number:04}.ckpt" for number in range(1000)]
    for name in names:
        os.link(diff, store / f"{name}.hydra")
    facts = seed(capsys, store, "--webui", data, "--checkpoints", store)["webui"]
    assert facts["blocks"] == len(names) + 1
    tree = StoreTree(store)
    tree.start()
    try:
        for name in names:
            tree.getattr(f"/{name}")
            with contextlib.closing(tree.open(f"/{name}", os.O_RDONLY)) as file:
                block = bytearray(0x10000)
                assert file.pread_into(0x100000, memoryview(block)) == len(block)
                assert block == content[0x100000:0x110000]
                few = bytearray(100)
                assert file.pread_into(0x110000 - 100, memoryview(few)) == len(few)
                assert few == content[0x110000 - 100 : 0x110000]
        assert tree.statistics().misses == 0, "nothing was decoded"
        with contextlib.closing(tree.open(f"/{names[0]}", os.O_RDONLY)) as file:
            assert file.pread_into(0x100000 - 1, memoryview(bytearray(0x10000))) == 0x10000
        assert tree.statistics().misses > 0, "the count is one that can go wrong"
    finally:
        tree.stop()


def test_a_kept_block_that_is_not_the_models_is_not_served(models: ModelMaker, store: Path) -> None:
    diff, content = long_diff(models, store)
    with contextlib.closing(Store(store)) as opened, DiffFile(diff) as opened_diff:
        sha256 = opened_diff.manifest.sha256
        opened.catalog.remember_block(sha256, bytes(0x10000))
        assert kept_block(opened.catalog, opened_diff.manifest) is None
    tree = StoreTree(store)
    tree.start()
    try:
        with contextlib.closing(tree.open("/tuned.ckpt", os.O_RDONLY)) as file:
            block = bytearray(0x10000)
            file.pread_into(0x100000, memoryview(block))
            assert block == content[0x100000:0x110000]
        tree.store.catalog.forget_blocks([sha256])
        assert tree.store.catalog.block(sha256) == bytes(0x10000)
        tree.store.catalog.forget_blocks([])
        assert tree.store.catalog.block(sha256) is None
    finally:
        tree.stop()


def test_what_others_have_in_the_caches_stays(filled: Filled, data: Path, capsys: Capture) -> None:
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    mine = {"mtime": 5.5, "sha256": "ab" * 32}
    old = {"hashes": {"checkpoint/other.ckpt": mine}, "extensions-git": {"x": {"mtime": 1, "value": [1]}}}
    (data / "cache.json").write_text(json.dumps(old))
    (data / "cache.json").chmod(0o600)
    with diskcache.Cache(str(data / "cache" / "hashes")) as cache:
        cache["checkpoint/other.ckpt"] = mine
    facts = seed(capsys, filled.root, "--webui", data)["webui"]
    assert [os.path.relpath(p, data) for p in facts["written"]] == [
        "cache/hashes", "cache/safetensors-metadata", "cache/partial-hash", "cache.json",
    ]  # fmt: skip
    assert facts["unknown"] == ["base.safetensors"] or facts["checkpoints"] == 2
    after = json.loads((data / "cache.json").read_bytes())
    assert after["extensions-git"] == old["extensions-git"]
    assert after["hashes"]["checkpoint/other.ckpt"] == mine
    assert after["hashes"]["checkpoint/tuned.safetensors"]["sha256"] == filled.sha256.hex()
    assert (data / "cache.json").stat().st_mode & 0o777 == 0o600
    with diskcache.Cache(str(data / "cache" / "hashes")) as cache:
        assert cache["checkpoint/other.ckpt"] == mine
        assert cache["checkpoint/tuned.safetensors"]["sha256"] == filled.sha256.hex()
    assert not list(data.glob(".hydrafs*"))


def test_a_cache_that_a_webui_has_open(filled: Filled, data: Path, capsys: Capture) -> None:
    """It reads and writes all the while, in another process, and sees what was put there."""
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    program = (
        "import diskcache, sys, time\n"
        "cache = diskcache.Cache(sys.argv[1], size_limit=2**32, disk_min_file_size=2**18)\n"
        "print('open', flush=True)\n"
        "for i in range(100000):\n"
        "    cache[f'mine/{i % 50}'] = {'mtime': i, 'sha256': 'x'}\n"
        "    assert cache[f'mine/{i % 50}']['mtime'] == i\n"
        "    if 'checkpoint/tuned.safetensors' in cache:\n"
        "        print(cache['checkpoint/tuned.safetensors']['sha256']); break\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(data / "cache" / "hashes")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        for _ in range(5):
            seed(capsys, filled.root, "--webui", data)
        assert other.communicate(timeout=60)[0].strip() == filled.sha256.hex()
        assert other.returncode == 0
    finally:
        other.kill()
        other.wait()


def test_a_reader_of_the_json_never_sees_a_part_of_it(filled: Filled, data: Path, capsys: Capture) -> None:
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    (data / "cache.json").write_text(json.dumps({"hashes": {f"checkpoint/{i}": {"mtime": i} for i in range(5000)}}))
    stop = threading.Event()
    broken: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert len(json.loads((data / "cache.json").read_bytes())["hashes"]) >= 5000
            except Exception as error:
                broken.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(10):
            seed(capsys, filled.root, "--webui", data, "--kind", "sdnext")
    finally:
        stop.set()
        thread.join()
    assert not broken


@pytest.mark.parametrize("content", ["not json", "[1, 2]", '{"hashes": [1]}'])
def test_a_damaged_json_is_left_alone(filled: Filled, data: Path, capsys: Capture, content: str) -> None:
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    (data / "cache.json").write_text(content)
    assert main(["hashes", str(filled.root), "--webui", str(data)]) == 2
    assert "cache.json" in capsys.readouterr().err
    assert (data / "cache.json").read_text() == content


def test_a_cache_folder_that_is_no_cache(filled: Filled, data: Path, capsys: Capture) -> None:
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    (data / "cache" / "hashes").mkdir(parents=True)
    (data / "cache" / "hashes" / "cache.db").write_bytes(b"no database" * 1000)
    assert main(["hashes", str(filled.root), "--webui", str(data)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cache/hashes" in error


def test_without_diskcache_it_says_what_to_install(
    filled: Filled, data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.dehydrate()
    (data / "models" / "Stable-diffusion").symlink_to(filled.root)
    (data / "cache").mkdir()
    monkeypatch.setitem(sys.modules, "diskcache", None)
    assert main(["hashes", str(filled.root), "--webui", str(data)]) == 2
    assert "pip install 'hydrafs[webui]'" in capsys.readouterr().err


def test_a_folder_of_models_outside_the_webui(filled: Filled, data: Path, capsys: Capture) -> None:
    filled.dehydrate()
    (data / "cache").mkdir()
    folder = filled.root
    facts = seed(capsys, folder, "--webui", data, "--checkpoints", folder, "--loras", folder / "none")["webui"]
    with diskcache.Cache(str(data / "cache" / "hashes")) as cache:
        entry = cache["checkpoint/tuned.safetensors"]
    assert entry["sha256"] == filled.sha256.hex()
    assert facts["loras"] == 0
    main(["hashes", str(folder), "--webui", str(data)])
    assert "name them with --checkpoints" in capsys.readouterr().out


def test_names_times_and_loops(models: ModelMaker, store: Path, tmp_path: Path) -> None:
    """As a program sees them that walks with links followed."""
    models.save(store / "sub" / "a.safetensors", models.base())
    models.save(store / "plain.ckpt", models.base())
    (store / "b.safetensors.hydra").write_bytes(b"damaged")
    (store / "notes.txt").touch()
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "into").symlink_to(store)
    (store / "loop").symlink_to(shown)
    os.utime(store / "plain.ckpt", ns=(5, 1_700_000_000_123_456_789))
    with contextlib.closing(Store(store)) as opened:
        found = {f.relative: f for f in find_models(opened, shown, (".safetensors", ".ckpt"))}
        assert set(found) == {"into/sub/a.safetensors", "into/plain.ckpt"}
        for one in found.values():
            assert one.filename == str(shown / one.relative)
            assert one.mtime == os.path.getmtime(one.filename)
            assert one.size == os.path.getsize(one.filename)


@pytest.mark.parametrize("mtime_ns", [0, 1, 999_999_999, 1_600_000_000_000_000_001, 1_763_216_531_987_654_321, -1])
def test_the_time_is_pythons_to_the_last_bit(store: Path, mtime_ns: int) -> None:
    path = store / "x.ckpt"
    path.touch()
    os.utime(path, ns=(0, mtime_ns))
    with contextlib.closing(Store(store)) as opened:
        (found,) = find_models(opened, store, (".ckpt",))
    assert found.mtime == os.path.getmtime(path)


def test_which_program_a_folder_belongs_to(data: Path) -> None:
    assert kind_of(data) == "a1111"
    (data / "installer.py").touch()
    assert kind_of(data) == "sdnext"
    (data / "modules_forge").mkdir()
    assert kind_of(data) == "forge"


def test_the_table(filled: Filled, capsys: Capture, make_old: Callable[[Path], None]) -> None:
    filled.dehydrate()
    make_old(filled.diff)
    assert main(["hashes", str(filled.root)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["model", "SHA-256", "BLAKE3", "addnet SHA-256", "old"]
    by_name = {row[0]: row[1:] for row in rows[1:3]}
    assert by_name["tuned.safetensors"] == [filled.sha256.hex(), "-", "-", "-"]
    assert main(["hashes", str(filled.root), "--compute"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    by_name = {row[0]: row[1:] for row in rows[1:]}
    assert all("-" not in row for row in by_name.values())
    assert by_name["tuned.safetensors"][2] == addnet_of(filled.data)
    assert by_name["base.safetensors"][0] == hashlib.sha256(filled.base.read_bytes()).hexdigest()
    filled.base.write_bytes(b"another")
    assert main(["hashes", str(filled.root)]) == 0
    assert by_name["tuned.safetensors"] == next(
        row[1:] for line in capsys.readouterr().out.splitlines() if (row := line.split("\t"))[0] == "tuned.safetensors"
    )
