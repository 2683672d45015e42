"""The programs that use models, each as it is, on a real mount: what they load is what was dehydrated."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mounts import Library, Mount, Original, hydrafs, sha256_of

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

ROOT = Path(__file__).parent.parent
SAFETENSORS = [
    "tuned.safetensors",
    "half.safetensors",
    "loras/brain, \u00fcml\u00e4ut [1].safetensors",
    "wide.safetensors",
    "base.safetensors",
]
ZIPS = ["tuned.ckpt", "deep.ckpt"]


@pytest.fixture(scope="module")
def originals(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file as it was before it was dehydrated, modes and times included."""
    root = tmp_path_factory.mktemp("originals")
    for name, original in library.originals.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(original.data)
        path.chmod(original.mode & 0o7777)
        os.utime(path, ns=(original.mtime_ns, original.mtime_ns))
    return root


def run(*command: str | os.PathLike[str], cwd: Path | None = None, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [os.fspath(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flattened(item, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same(found: Any, wanted: Any) -> None:
    """The same names and values, to the last bit: NaNs and signs of zeros too."""
    found, wanted = flattened(found), flattened(wanted)
    assert found.keys() == wanted.keys()
    assert any(isinstance(value, torch.Tensor) for value in wanted.values())
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], value))
            assert torch.equal(a, b), name
        else:
            assert found[name] == value, name


# Loaders


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_load_file(live: Mount, originals: Path, name: str) -> None:
    from safetensors.torch import load_file

    assert_same(load_file(live.path / name), load_file(originals / name))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_safe_open(live: Mount, originals: Path, name: str) -> None:
    from safetensors import safe_open

    with safe_open(live.path / name, "pt") as found, safe_open(originals / name, "pt") as wanted:
        assert found.metadata() == wanted.metadata() == {"format": "pt"}
        keys = list(wanted.keys())
        random.Random(1).shuffle(keys)
        for key in keys:
            assert_same({key: found.get_tensor(key)}, {key: wanted.get_tensor(key)})
            if wanted.get_tensor(key).dim() == 2:
                assert torch.equal(found.get_slice(key)[1:5, ::], wanted.get_slice(key)[1:5, ::])


def old_python() -> Path:
    """The interpreter that has an old safetensors; ``scripts/setup.sh test`` makes it."""
    path = Path(os.environ.get("HYDRAFS_OLD_SAFETENSORS_PYTHON") or ROOT / ".venv-old" / "bin" / "python")
    if not path.exists():
        pytest.fail(f"no {path}; run make test once, or scripts/setup.sh test", pytrace=False)
    return path


OLD = """
import sys, safetensors, torch
from safetensors.torch import load_file
from safetensors import safe_open
assert tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 6), safetensors.__version__
mount, originals, *names = sys.argv[1:]
for name in names:
    found, wanted = load_file(f"{mount}/{name}"), load_file(f"{originals}/{name}")
    assert list(found) == list(wanted), name
    with safe_open(f"{mount}/{name}", "pt") as opened:
        for key, value in wanted.items():
            for tensor in (found[key], opened.get_tensor(key)):
                assert tensor.dtype == value.dtype and torch.equal(tensor, value), key
    print(len(wanted))
"""


def test_an_old_safetensors(live: Mount, originals: Path) -> None:
    output = run(old_python(), "-c", OLD, live.path, originals, *SAFETENSORS)
    assert [int(line) > 0 for line in output.splitlines()] == [True] * len(SAFETENSORS)


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mmap"])
@pytest.mark.parametrize("name", ZIPS)
def test_torch_load(live: Mount, originals: Path, name: str, mapped: bool) -> None:
    assert_same(
        torch.load(live.path / name, weights_only=True, mmap=mapped), torch.load(originals / name, weights_only=True)
    )


def test_torch_load_of_the_legacy_format(live: Mount, originals: Path) -> None:
    name = "legacy.pt"
    assert_same(torch.load(live.path / name, weights_only=True), torch.load(originals / name, weights_only=True))


@pytest.mark.parametrize("disable_mmap", [False, True], ids=["mmap", "no mmap"])
@pytest.mark.parametrize("name", ["half.safetensors", "tuned.ckpt"])
def test_diffusers(live: Mount, originals: Path, name: str, disable_mmap: bool) -> None:
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    found = load_single_file_checkpoint(str(live.path / name), disable_mmap=disable_mmap)
    assert_same(found, load_single_file_checkpoint(str(originals / name)))


def test_a_whole_file_read_as_a_webui_without_mmap_does(live: Mount, originals: Path) -> None:
    from safetensors.torch import load

    name = "wide.safetensors"
    assert_same(load((live.path / name).read_bytes()), load((originals / name).read_bytes()))


# Scanners and hashers


@pytest.mark.parametrize("name", [*ZIPS, "legacy.pt"])
def test_picklescan(live: Mount, originals: Path, name: str) -> None:
    from picklescan.scanner import scan_file_path

    found, wanted = scan_file_path(str(live.path / name)), scan_file_path(str(originals / name))
    assert (found.scanned_files, found.issues_count, found.infected_files, found.scan_err) == (
        wanted.scanned_files, wanted.issues_count, wanted.infected_files, wanted.scan_err,
    )  # fmt: skip
    assert found.scanned_files >= 1
    assert not found.scan_err
    assert [str(g) for g in found.globals] == [str(g) for g in wanted.globals]


def test_eleven_hundred_scattered_reads(live: Mount, originals: Path) -> None:
    with zipfile.ZipFile(live.path / "deep.ckpt") as found, zipfile.ZipFile(originals / "deep.ckpt") as wanted:
        names = wanted.namelist()
        assert len(names) >= 1100
        assert found.namelist() == names
        random.Random(2).shuffle(names)
        for name in names:
            with found.open(name) as a, wanted.open(name) as b:
                assert a.read(8) == b.read(8), name
        assert found.testzip() is None


@pytest.mark.parametrize("threads", [1, 8])
def test_blake3_of_a_mapping(live: Mount, library: Library, threads: int) -> None:
    from blake3 import blake3

    for name in ("wide.safetensors", "tuned.ckpt"):
        found = blake3(max_threads=threads).update_mmap(live.path / name).hexdigest()
        assert found == blake3(library.originals[name].data).hexdigest()


def test_what_a_webui_reads_to_list_a_folder(live: Mount, library: Library) -> None:
    seen = 0
    for folder, _, files in os.walk(live.path, followlinks=True):
        for file_name in files:
            path = Path(folder) / file_name
            name = os.path.relpath(os.path.realpath(path), live.path)
            data = library.originals[name].data
            with path.open("rb") as file:
                file.seek(0x100000)
                assert hashlib.sha256(file.read(0x10000)).digest() == hashlib.sha256(data[0x100000:0x110000]).digest()
            if path.suffix == ".safetensors":
                with path.open("rb") as file:
                    (nbytes,) = struct.unpack("<Q", file.read(8))
                    assert json.loads(file.read(nbytes)) == json.loads(data[8 : 8 + nbytes])
            seen += 1
    assert seen > len(library.originals)


def test_sha256sum(live: Mount, library: Library, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{original.sha256}  {name}\n" for name, original in library.originals.items()))
    output = run("sha256sum", "--check", "--strict", sums, cwd=live.path)
    assert output.count(": OK\n") == len(library.originals)


# Copiers


def test_cp(live: Mount, library: Library, tmp_path: Path) -> None:
    run("cp", "-a", f"{live.path}/.", tmp_path / "copy")
    for name, original in library.originals.items():
        path = tmp_path / "copy" / name
        assert sha256_of(path) == original.sha256, name
        assert (path.stat().st_mode, path.stat().st_mtime_ns) == (original.mode, original.mtime_ns)
    assert not list((tmp_path / "copy").rglob("*.hydra*"))


def test_rsync_finds_nothing_to_copy(live: Mount, originals: Path, library: Library, tmp_path: Path) -> None:
    # By content, size, mode and time: what is in the mount is what was there.
    files = tmp_path / "files"
    files.write_text("".join(f"{name}\n" for name in library.originals))
    same = ("rsync", "-a", "-c", "--itemize-changes", "--omit-dir-times", f"--files-from={files}")
    assert [
        line for line in run(*same, "-n", f"{originals}/", f"{live.path}/").splitlines() if not line.startswith(".d")
    ] == []
    run(*same, f"{live.path}/", f"{tmp_path}/copy/")
    for name, original in library.originals.items():
        assert sha256_of(tmp_path / "copy" / name) == original.sha256, name


def test_tar(live: Mount, library: Library, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    run("sh", "-ec", 'tar -C "$1" -cf - . | tar -C "$2" -xf -', "sh", live.path, tmp_path / "copy")
    for name, original in library.originals.items():
        assert sha256_of(tmp_path / "copy" / name) == original.sha256, name


# fio


FIO_NBYTES = 8 << 20
FIO_OFFSET = 4096


def fio(path: Path, cwd: Path, *options: str, code: int = 0) -> dict[str, Any]:
    output = run(
        "fio", "--name=job", f"--filename={path}", f"--offset={FIO_OFFSET}", f"--size={FIO_NBYTES}",
        "--verify=crc32c", "--verify_interval=4096", "--verify_fatal=1", "--output-format=json", *options,
        cwd=cwd, code=code,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(output[output.index("{") :]) if code == 0 else {}
    return found


@pytest.fixture
def fio_model(tmp_path: Path) -> tuple[Library, str]:
    """A store with the diff of a safetensors file whose one tensor was written by fio, to be verified by it."""
    root = tmp_path / "store"
    root.mkdir()
    header = json.dumps({"written": {"dtype": "U8", "shape": [FIO_NBYTES], "data_offsets": [0, FIO_NBYTES]}}).encode()
    path = root / "fio.safetensors"
    path.write_bytes(struct.pack("<Q", FIO_OFFSET - 8) + header.ljust(FIO_OFFSET - 8))
    os.truncate(path, FIO_OFFSET + FIO_NBYTES)
    fio(path, tmp_path, "--rw=write", "--bs=64k", "--do_verify=0")
    original = Original(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    done = hydrafs("dehydrate", "--no-compress", path)
    assert done.returncode == 0, done.stderr
    assert not path.exists()
    return Library(root, {path.name: original}), path.name


@pytest.mark.parametrize(
    "how",
    [
        ("--rw=read", "--bs=1m"),
        ("--rw=randread", "--bs=4k"),
        ("--rw=randread", "--bs=16k", "--numjobs=4", "--thread"),
        ("--rw=randread", "--bs=8k", "--direct=1"),
    ],
    ids=" ".join,
)
def test_fio_verifies(
    fio_model: tuple[Library, str], mounted: Callable[..., Mount], tmp_path: Path, how: tuple[str, ...]
) -> None:
    library, name = fio_model
    live = mounted(library)
    found = fio(live.path / name, tmp_path, "--readonly", "--ioengine=psync", *how)
    assert sum(job["read"]["io_bytes"] for job in found["jobs"]) >= FIO_NBYTES
    assert all(job["error"] == 0 for job in found["jobs"])


def test_fio_would_find_a_wrong_byte(fio_model: tuple[Library, str], tmp_path: Path) -> None:
    library, name = fio_model
    content = bytearray(library.originals[name].data)
    content[FIO_OFFSET + 5_000_000] ^= 1
    wrong = tmp_path / "wrong"
    wrong.write_bytes(content)
    fio(wrong, tmp_path, "--readonly", "--rw=read", "--bs=64k", code=1)


def test_all_tools_are_there() -> None:
    for tool in ("cp", "fio", "rsync", "sha256sum", "tar", "unshare"):
        assert shutil.which(tool), f"{tool} is missing; run make test once, or scripts/setup.sh test"
    assert sys.version_info >= (3, 10)
