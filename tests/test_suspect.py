"""Files that nobody should rely on: where they lie, what stands beside them, what is missing, what can hold them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker

from hydrafs.containers.complete import cut_short
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.errors import Changing, HydraError, UsageError
from hydrafs.layout import FileSource
from hydrafs.policy import Policy
from hydrafs.store import Store
from hydrafs.suspect import Suspects, why_not_complete, why_not_held

FOLDERS = [
    ".Trash-1000/files", ".Trash", ".Trashes/501", "share/Trash/files", "$RECYCLE.BIN/S-1-5", "$Recycle.Bin",
    "#recycle", "@Recycle",
    ".recycle/user", "@eaDir/x", "lost+found", ".git/annex/objects/aa/bb", ".hg/store", ".svn", ".bzr",
    ".dvc/cache", ".stversions/sub", ".stfolder", ".snapshots/1/snapshot", ".snapshot/daily", ".zfs/snapshot/x",
    "@GMT-2024.01.01-00.00.00", ".cache/huggingface/download", "__pycache__", "node_modules/x/dist",
    "lib/python3.11/site-packages/x", "venv/lib", ".venv/models", "tmp", "temp/x", "downloads", "x.download", "cache",
    ".recycled", "Recycle Bin", ".deleted/x", ".trashed-17-x", "models.git/lfs", ".fossil", ".stfolder.removed-1",
    ".btrfs/snapshot", ".rsnapshot/daily.0",
]  # fmt: skip
BESIDE = [".aria2", ".part", ".crdownload", ".download", ".downloading", ".st", ".incomplete", ".tmp", ".temp",
          ".partial", ".filepart", ".!qB", ".opdownload", ".PART", ".lftp-pget-status"]  # fmt: skip


@pytest.fixture
def opened(store: Path) -> Iterator[Store]:
    with contextlib.closing(Store(store, create=True)) as found:
        yield found


@pytest.fixture
def model(models: ModelMaker, store: Path) -> Path:
    return models.save(store / "x.safetensors", models.base("fp16"))


@pytest.fixture
def stick(store: Path) -> Iterator[Path]:
    """Another filesystem inside the store."""
    folder = store / "stick"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


class TestFolders:
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_by_name(self, opened: Store, model: Path, folder: str) -> None:
        place = opened.root / folder
        place.mkdir(parents=True, exist_ok=True)
        moved = model.rename(place / model.name)
        found = Suspects(opened).of(moved)
        assert found is not None
        assert found.folder in folder.split("/")

    @pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history", "CACHEDIR.TAG"])
    def test_by_what_stands_in_them(self, opened: Store, model: Path, mark: str) -> None:
        place = opened.root / "sub" / "env" / "share" / "models"
        place.mkdir(parents=True)
        moved = model.rename(place / model.name)
        assert Suspects(opened).of(moved) is None
        (opened.root / "sub" / "env" / mark).parent.mkdir(exist_ok=True)
        (opened.root / "sub" / "env" / mark).write_text("")
        found = Suspects(opened).of(moved)
        assert found is not None
        assert found.folder == "env"

    def test_only_below_the_store(self, tmp_path: Path, models: ModelMaker) -> None:
        root = tmp_path / "Downloads" / ".cache" / "models"
        model = models.save(root / "trashy" / "x.safetensors", models.base("fp16"))
        with contextlib.closing(Store(root, create=True)) as opened:
            assert Suspects(opened).of(model) is None
            link = root / "link.safetensors"
            link.symlink_to(models.save(tmp_path / "Downloads" / "other.safetensors", models.base("fp16")))
            assert Suspects(opened).of(link) is None, "it lies as safe as the store"

    def test_links_count_by_where_they_lead(self, opened: Store, model: Path, tmp_path: Path) -> None:
        hidden = tmp_path / ".Trash-0" / "files"
        hidden.mkdir(parents=True)
        (opened.root / "sub").symlink_to(hidden)
        moved = model.rename(hidden / model.name)
        assert Suspects(opened).of(opened.root / "sub" / model.name) is not None
        (opened.root / "y.safetensors").symlink_to(moved)
        assert Suspects(opened).of(opened.root / "y.safetensors") is not None
        (opened.root / ".git").mkdir()
        link = opened.root / ".git" / "z.safetensors"
        plain = moved.rename(model)
        link.symlink_to(plain)
        assert Suspects(opened).of(link) is None

    def test_base_folders_are_named_on_purpose(self, opened: Store, tmp_path: Path, models: ModelMaker) -> None:
        folder = tmp_path / ".cache" / "bases"
        model = models.save(folder / "x.safetensors", models.base("fp16"))
        opened.add_base_folder(folder)
        assert Suspects(opened).of(model) is None
        below = models.save(folder / ".git" / "x.safetensors", models.base("fp16"))
        assert Suspects(opened).of(below) is not None

    def test_patterns_that_ask_for_it(self) -> None:
        name = ".cache/huggingface/download/x.safetensors"
        for include in (".cache/*", "*/.cache/*", ".ca*/*", "x.safetensors", name):
            assert Policy(include=(include,)).asks(name, ".cache") == (include not in ("*/.cache/*",))
        for include in ("*.safetensors", "*", "*/*.safetensors", "x*", "*/x*"):
            assert not Policy(include=(include,)).asks(name, ".cache")
        assert Policy(include=("loras/*",)).asks("loras/a.pt", "") is False


class TestDownloads:
    @pytest.mark.parametrize("ending", BESIDE)
    def test_beside(self, opened: Store, model: Path, ending: str) -> None:
        assert Suspects(opened).of(model) is None
        (opened.root / f"other.safetensors{ending}").write_text("")
        assert Suspects(opened).of(model) is None
        (opened.root / f"x.safetensors{ending}").write_text("")
        assert Suspects(opened).of(model) is not None
        assert Suspects(opened).of(model.rename(opened.root / "z.safetensors")) is None

    @pytest.mark.parametrize(
        "name", ["x.safetensors.a1b2.incomplete", ".syncthing.x.safetensors.tmp", ".x.safetensors.part"]
    )
    def test_names_made_of_its_name(self, opened: Store, model: Path, name: str) -> None:
        (opened.root / name).write_text("")
        assert Suspects(opened).of(model) is not None

    def test_called_so_itself(self, opened: Store, model: Path) -> None:
        for ending in BESIDE:
            assert Suspects(opened).of(model.with_name(f"x.safetensors{ending}")) is not None


class TestNotAllThere:
    def kinds(self, models: ModelMaker, folder: Path) -> list[Path]:
        tensors = models.base("fp16")
        return [
            models.save(folder / "a.safetensors", tensors),
            models.save(folder / "b.ckpt", tensors),
            models.save(folder / "c.pt", tensors, legacy=True),
            models.save(folder / "d.pth", tensors, wrap=True),
        ]

    def test_whole_ones(self, models: ModelMaker, tmp_path: Path) -> None:
        for path in self.kinds(models, tmp_path):
            assert why_not_complete(path) == ""
        (tmp_path / "e.pt").write_bytes(b"\x80\x02}q\x00.")
        assert why_not_complete(tmp_path / "e.pt") == ""

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.95, 1.0])
    def test_cut_anywhere(self, models: ModelMaker, tmp_path: Path, share: float) -> None:
        for path in self.kinds(models, tmp_path):
            size = path.stat().st_size
            length = min(size - 1, int(size * share))
            os.truncate(path, length)
            assert why_not_complete(path), path.name

    def test_room_that_was_taken_beforehand(self, models: ModelMaker, tmp_path: Path) -> None:
        for path in self.kinds(models, tmp_path):
            size = path.stat().st_size
            os.truncate(path, size // 2)
            os.truncate(path, size)
            assert why_not_complete(path), path.name
            path.write_bytes(bytes(size))
            assert why_not_complete(path), path.name

    def test_a_header_that_is_not_all_there(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        for content in (b"\x40\0\0\0\0\0\0\0{", b"\x08\0\0\0\0\0\0\0{ junk }" + bytes(9)):
            path.write_bytes(content)
            assert why_not_complete(path)

    def test_it_is_known_until_it_changes(self, models: ModelMaker, tmp_path: Path) -> None:
        path = models.save(tmp_path / "x.safetensors", models.base("fp16"))
        data = path.read_bytes()
        assert why_not_complete(path) == ""
        path.write_bytes(data[:-1])
        assert why_not_complete(path)
        path.write_bytes(data)
        assert why_not_complete(path) == ""
        assert why_not_complete(tmp_path / "none.safetensors") == ""

    def test_junk_raises_nothing_but_ours(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        heads = [b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10\0\0\0\0\0\0\0{", b"PK\x05\x06"]
        for number, head in enumerate(heads * 20):
            path.write_bytes(head + os.urandom(50 * number) + (b"PK\x05\x06" + os.urandom(18)) * (number % 2))
            with FileSource(path) as source, contextlib.suppress(HydraError):
                assert isinstance(cut_short(source), str)


class TestHolding:
    def test_another_filesystem(self, opened: Store, model: Path, stick: Path, models: ModelMaker) -> None:
        assert why_not_held(opened, model) == ""
        other = models.save(stick / "x.safetensors", models.base("fp16"))
        assert "another filesystem" in why_not_held(opened, other)
        link = opened.root / "link.safetensors"
        link.symlink_to(other)
        assert "another filesystem" in why_not_held(opened, link)

    def test_the_same_filesystem_mounted_again(self, opened: Store, model: Path, tmp_path: Path) -> None:
        """Links do not go from one mount to another, though the device be the same."""
        (tmp_path / "elsewhere").mkdir()
        (opened.root / "bound").mkdir()
        subprocess.run(["mount", "--bind", tmp_path / "elsewhere", opened.root / "bound"], check=True)
        try:
            moved = opened.root / "bound" / "x.safetensors"
            moved.write_bytes(model.read_bytes())
            assert os.stat(moved).st_dev == os.stat(model).st_dev
            assert "another filesystem" in why_not_held(opened, moved)
        finally:
            subprocess.run(["umount", "-l", opened.root / "bound"], check=False)

    def test_files_of_others(self, models: ModelMaker) -> None:
        """What fs.protected_hardlinks forbids."""
        if Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "0":
            pytest.skip("this machine protects no links")
        folder = Path(tempfile.mkdtemp())  # pytest's own are for nobody else
        try:
            folder.chmod(0o755)
            model = models.save(folder / "x.safetensors", models.base("fp16"))
            Store(folder, create=True).close()
            self.ask_as_another(model)
        finally:
            shutil.rmtree(folder)

    def ask_as_another(self, model: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from hydrafs.store import Store; from hydrafs.suspect import *\n"
            "store = Store(sys.argv[1]); os.setresuid(65534, 65534, 65534)\n"
            "print(why_not_held(store, Path(sys.argv[2])))"
        )
        for mode, expected in ((0o644, True), (0o666, False)):
            model.chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", code, model.parent, model], capture_output=True, text=True, check=True
            )
            assert ("another user" in done.stdout) == expected, done


def test_a_diff_on_another_filesystem_is_told_by_hand(opened: Store, models: ModelMaker, stick: Path) -> None:
    base = models.save(opened.root / "base.safetensors", models.base("fp16"))
    for folder, told in ((stick, True), (opened.root, False)):
        tuned = models.save(folder / "tuned.safetensors", models.tuned("fp16"))
        outcome = dehydrate(opened, tuned, Options(jobs=1, bases=(base,)))
        assert outcome.diff is not None
        assert ("another filesystem than its store" in " ".join(outcome.reasons)) == told


class TestBases:
    """What a careful dehydration takes no base from; by hand it does."""

    def careful(self, opened: Store, path: Path) -> tuple[bool, str]:
        options = Options(jobs=1, alone=False, all_or_nothing=True)
        outcome = dehydrate(opened, path, options)
        return outcome.diff is not None, " ".join(outcome.reasons)

    def test_a_suspect_is_none_and_is_named(self, opened: Store, models: ModelMaker, stick: Path) -> None:
        tuned = models.save(opened.root / "tuned.safetensors", models.tuned("fp16"))
        places = [opened.root / ".Trash-1000" / "files" / "base.safetensors", stick / "base.safetensors"]
        for place in places:
            base = models.save(place, models.base("fp16"))
            made, why = self.careful(opened, tuned)
            assert not made
            assert f"{opened.relative(base)} resembles it, and is no base" in why
            base.unlink()
        base = models.save(opened.root / "base.safetensors", models.base("fp16"))
        (opened.root / "base.safetensors.aria2").write_text("")
        assert not self.careful(opened, tuned)[0]
        (opened.root / "base.safetensors.aria2").unlink()
        half = base.read_bytes()
        base.write_bytes(half[: len(half) * 6 // 10])
        assert not self.careful(opened, tuned)[0]
        assert tuned.exists()
        base.write_bytes(half)
        assert self.careful(opened, tuned)[0]

    def test_a_better_name_of_the_same_file_serves(self, opened: Store, models: ModelMaker) -> None:
        base = models.save(opened.root / ".git" / "base.safetensors", models.base("fp16"))
        (opened.root / "sub").mkdir()
        os.link(base, opened.root / "sub" / "base.safetensors")
        assert self.careful(opened, models.save(opened.root / "tuned.safetensors", models.tuned("fp16")))[0]

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSPC, errno.EACCES])
    def test_one_that_turns_out_not_to_be_linked(
        self, opened: Store, models: ModelMaker, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        base = models.save(opened.root / "base.safetensors", models.base("fp16"))
        tuned = models.save(opened.root / "tuned.safetensors", models.tuned("fp16"))
        original = os.link

        def refused(source: Path, target: Path, **options: object) -> None:
            if os.fspath(source) == os.fspath(base):
                raise OSError(number, os.strerror(number))
            original(source, target, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "link", refused)
        with pytest.raises(HydraError, match="cannot be held"):
            self.careful(opened, tuned)
        assert tuned.exists()
        assert not tuned.with_name("tuned.safetensors.hydra").exists()
        outcome = dehydrate(opened, tuned, Options(jobs=1))
        assert outcome.original_removed
        assert "cannot be held" in " ".join(outcome.reasons)

    def test_by_hand_it_is_taken(self, opened: Store, models: ModelMaker) -> None:
        models.save(opened.root / ".Trash-1000" / "base.safetensors", models.base("fp16"))
        tuned = models.save(opened.root / "tuned.safetensors", models.tuned("fp16"))
        assert dehydrate(opened, tuned, Options(jobs=1)).diff is not None

    @pytest.mark.parametrize("error", [MemoryError, ValueError, RecursionError, OverflowError, PermissionError])
    def test_the_trouble_of_one_is_not_the_others(
        self, opened: Store, models: ModelMaker, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        from hydrafs import bases

        models.save(opened.root / "a.safetensors", models.base("fp16"))
        models.save(opened.root / "base.safetensors", models.base("fp16"))
        original = bases.facts_of_file

        def failing(store: Store, path: Path, source: FileSource | None = None) -> object:
            if path.name == "a.safetensors":
                raise error("planned")
            return original(store, path, source)

        monkeypatch.setattr(bases, "facts_of_file", failing)
        assert self.careful(opened, models.save(opened.root / "tuned.safetensors", models.tuned("fp16")))[0]


@pytest.mark.parametrize("length", [250, 252, 255])
def test_a_name_without_room_for_the_ending(opened: Store, models: ModelMaker, length: int) -> None:
    ending = ".safetensors"
    models.save(opened.root / "base.safetensors", models.base("fp16"))
    path = models.save(opened.root / "short.safetensors", models.tuned("fp16"))
    path = path.rename(opened.root / ("n" * (length - len(ending)) + ending))
    with pytest.raises(UsageError, match="no room for the ending") as caught:
        dehydrate(opened, path, Options(jobs=1))
    assert caught.value.exit_code == 2
    assert path.exists()
    assert not isinstance(caught.value, Changing)
