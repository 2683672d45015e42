"""What programs do to the models folder they live in, on a real mount: loads, hashes and space, before and after.

Each sequence is the program's own (which calls, in which order); each ends with every model that it did not change
read, hashed and loaded again, and with what the store takes on disk. The delete of a base with three dependents is in
``test_background_mount.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, Tensors
from mounts import Library, Mount, eventually, hydrafs, sha256_of
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]
SLACK_NBYTES = 32 << 10
"""Of what is allocated: the last block of each file, and folders."""


def used_nbytes(root: Path) -> int:
    """What the models and other files of a store are allocated, kept ones too; a file of several names once. What can
    be had back for a while is not counted: it goes where a write needs room."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if Path(folder).name not in (".hydrafs", "trash"):  # the catalog, logs and locks
                stat = os.lstat(Path(folder, name))
                found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def state(path: Path) -> str:
    return os.getxattr(path, "user.hydrafs.state").decode()


def is_equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Folder:
    """A mounted models folder: a base, and three fine-tunes of it that are dehydrated."""

    def __init__(self, library: Library, live: Mount) -> None:
        self.library, self.live, self.point, self.root = library, live, live.path, live.root
        # Copies: what load_file gives is mapped, and a mount that is in use cannot end.
        self.loaded = {
            name: {key: tensor.clone() for key, tensor in load_file(self.point / name).items()}
            for name in library.originals
            if name.endswith(".safetensors")
        }
        self.checked = set(library.originals)
        self.before = used_nbytes(self.root)
        self.check()

    def check(self) -> None:
        """Every model that was there and was not changed loads, and has the hash, that it had."""
        for name in self.checked:
            assert sha256_of(self.point / name) == self.library.originals[name].sha256, name
            if name in self.loaded:
                assert is_equal(load_file(self.point / name), self.loaded[name]), name

    def grew_by(self, nbytes: int) -> None:
        """The store takes that much more than at the beginning, or less where it is negative."""
        os.sync()  # some filesystems allocate blocks when they write
        grown = used_nbytes(self.root) - self.before
        assert abs(grown - nbytes) <= SLACK_NBYTES, f"{grown} bytes more, not {nbytes}"


NAMES = ("base.safetensors", "half.safetensors", "tuned.safetensors", "tuned.ckpt")


@pytest.fixture
def folder(copied: Copied, mounted: Mounted) -> Iterator[Folder]:
    library = copied(*NAMES)
    found = Folder(library, mounted(library))
    assert [state(found.point / n) for n in NAMES] == ["plain", "dehydrated", "dehydrated", "dehydrated"]
    yield found
    found.check()
    leftovers = [p for p in found.root.rglob("*") if p.name.startswith((".hydrafs-", ".fuse_hidden"))]
    assert not leftovers


def merged_of(folder: Folder) -> Tensors:
    a, b = (load_file(folder.point / name) for name in ("base.safetensors", "tuned.safetensors"))
    return {name: a[name] * 0.5 + b[name] * 0.5 for name in a}


def test_a1111_merges_two_models(folder: Folder) -> None:
    """``run_modelmerger``: two loads, a third model written in place under its final name, a copy of the ``.yaml``;
    then the list of models is made anew, with the old hash of each."""
    tensors = merged_of(folder)
    data = save(tensors, metadata={"format": "pt", "sd_merge_recipe": "{}"})
    path = folder.point / "merged.safetensors"
    path.write_bytes(data)
    (folder.point / "base.yaml").write_text("model: {}\n")
    shutil.copyfile(folder.point / "base.yaml", folder.point / "merged.yaml")
    assert sorted(n for n in os.listdir(folder.point) if n.endswith(".safetensors")) == sorted(
        [*(n for n in NAMES if n.endswith(".safetensors")), "merged.safetensors"]
    )
    with path.open("rb") as file:
        file.seek(0x100000)
        assert file.read(0x10000) == data[0x100000 : 0x100000 + 0x10000]
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert is_equal(load_file(path), tensors)
    folder.grew_by(len(data))
    # A second merge of the same name is written over the first.
    again = save({name: tensor + 1 for name, tensor in tensors.items()})
    path.write_bytes(again)
    assert sha256_of(path) == hashlib.sha256(again).hexdigest()
    folder.grew_by(len(again))
    os.unlink(path)
    folder.grew_by(0)


@pytest.mark.parametrize("name", ["half.safetensors", "base.safetensors"])
def test_safetensors_saves_over_a_model(folder: Folder, name: str) -> None:
    """``save_file`` of safetensors 0.8: a temporary file beside it, then a rename; the old one is loaded lazily."""
    tensors = merged_of(folder)
    path = folder.point / name
    old = folder.library.diff(name) if name.startswith("half") else None
    freed = old.stat().st_blocks * 512 if old else 0
    with safe_open(path, "pt") as lazy:
        names = list(lazy.keys())
        first = lazy.get_tensor(names[0])
        save_file(tensors, path, metadata={"format": "pt"})
        assert torch.equal(lazy.get_tensor(names[-1]), folder.loaded[name][names[-1]])
        assert torch.equal(first, folder.loaded[name][names[0]])
    folder.checked.remove(name)
    assert state(path) == "plain"
    assert is_equal(load_file(path), tensors)
    nbytes = path.stat().st_size
    assert sha256_of(path) == hashlib.sha256((folder.root / name).read_bytes()).hexdigest()
    assert old is None or not old.exists()
    # A base that is replaced is kept for those that need it; the diff of a model that is replaced is not.
    folder.check()
    folder.grew_by(nbytes - freed)
    assert sorted(os.listdir(folder.point)) == sorted(NAMES)


def test_a_download_beside_its_name(copied: Copied, mounted: Mounted, models: ModelMaker, tmp_path: Path) -> None:
    """To ``x.safetensors.part`` in pieces, then a rename; it is dehydrated when it has rested, and takes less."""
    library = copied(*NAMES)
    assert hydrafs("bases", library.root, "--pin", "base.safetensors").returncode == 0
    folder = Folder(library, mounted(library, "--dehydrate", "auto", "--settle", "0.5", "--min-size", "1k"))
    tensors = models.tuned()
    tensors["norm.weight"] = tensors["norm.weight"] + 1
    data = models.save(tmp_path / "download.safetensors", tensors).read_bytes()
    part, path = folder.point / "download.safetensors.part", folder.point / "download.safetensors"
    with part.open("wb") as file:
        for begin in range(0, len(data), 65_536):
            file.write(data[begin : begin + 65_536])
        file.flush()
        os.fsync(file.fileno())
        assert not path.exists()
    assert hashlib.sha256(part.read_bytes()).hexdigest() == hashlib.sha256(data).hexdigest()
    os.rename(part, path)
    assert not part.exists()
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    before = path.stat()

    def is_dehydrated() -> bool:
        with contextlib.suppress(OSError):
            return state(path) == "dehydrated"
        return False

    assert eventually(is_dehydrated)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert is_equal(load_file(path), tensors)
    assert eventually(lambda: not (folder.root / "download.safetensors").exists())
    folder.grew_by((folder.root / "download.safetensors.hydra").stat().st_blocks * 512)
    assert used_nbytes(folder.root) - folder.before < len(data) / 2
    folder.check()
    os.unlink(path)
    folder.grew_by(0)


def test_invokeai_starts_and_installs_by_a_move(folder: Folder, models: ModelMaker) -> None:
    """A ``README.txt`` at the start, unguarded; a download into a temporary folder, moved to a folder of its own; a
    model of the folder installed by a move; and both deleted with their folders."""
    (folder.point / "README.txt").write_text("The contents of this folder are managed by InvokeAI.")
    temporary = folder.point / f"tmpinstall_{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    data = models.save(temporary / "new.safetensors", models.tuned("bf16")).read_bytes()
    homes = [folder.point / str(uuid.uuid4()) for _ in range(2)]
    homes[0].mkdir()
    shutil.move(temporary / "new.safetensors", homes[0] / "new.safetensors")
    shutil.rmtree(temporary)
    assert sha256_of(homes[0] / "new.safetensors") == hashlib.sha256(data).hexdigest()
    assert is_equal(load_file(homes[0] / "new.safetensors"), models.tuned("bf16"))
    folder.grew_by(len(data))
    # The move of a dehydrated model is one of its diff: it costs nothing, and the inode's bytes are not read.
    homes[1].mkdir()
    for name in ("half.safetensors", "base.safetensors"):
        before = (folder.point / name).stat()
        shutil.move(folder.point / name, homes[1] / name)
        after = (homes[1] / name).stat()
        assert (after.st_size, after.st_mtime_ns, after.st_mode) == (before.st_size, before.st_mtime_ns, before.st_mode)
        assert sha256_of(homes[1] / name) == folder.library.originals[name].sha256
        assert is_equal(load_file(homes[1] / name), folder.loaded[name])
        folder.checked.remove(name)
    assert (folder.root / homes[1].name / "half.safetensors.hydra").exists()
    folder.check()
    folder.grew_by(len(data))
    # Its folder as a whole, with the base in it: what others need is kept.
    diff = (folder.root / homes[1].name / "half.safetensors.hydra").stat().st_blocks * 512
    for home in homes:
        shutil.rmtree(home)
    assert sorted(os.listdir(folder.point)) == ["README.txt", "tuned.ckpt", "tuned.safetensors"]
    folder.check()
    folder.grew_by(-diff)


def test_sidecars_are_replaced(folder: Folder) -> None:
    """Lora-Manager's ``.metadata.json``: to ``.tmp``, then ``os.replace``, again and again."""
    listing = os.listdir(folder.point)
    for name in NAMES:
        stem = folder.point / name.rpartition(".")[0]
        for number in range(5):
            temporary = Path(f"{stem}.metadata.json.tmp")
            with temporary.open("w") as file:
                file.write(f'{{"sha256": "{sha256_of(folder.point / name)}", "number": {number}}}')
            os.replace(temporary, f"{stem}.metadata.json")
        assert f'"number": {number}' in Path(f"{stem}.metadata.json").read_text()
    sidecars = {f"{name.rpartition('.')[0]}.metadata.json" for name in NAMES}
    assert set(os.listdir(folder.point)) == {*listing, *sidecars}
    folder.check()
    folder.grew_by(4096 * len(sidecars))
