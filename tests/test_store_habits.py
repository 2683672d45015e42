"""What a mount does about habits of the machine: options of mount(8), copied attributes, folders that come and go."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Library, Mount, eventually, hydrafs, sha256_of

from hydrafs import folder_times
from hydrafs.attributes import Entry
from hydrafs.catalog import Catalog
from hydrafs.errors import UsageError
from hydrafs.folder_times import FolderTimes, birth_ns
from hydrafs.mountoptions import parse_options
from hydrafs.temporary import TemporaryFile
from hydrafs.writing import WritableTree

pytest_plugins = ["mounting_fixtures"]
pytestmark = pytest.mark.fuse

Copied = Callable[..., Library]
Mounted = Callable[..., Mount]

STANDARD = (
    "async,atime,noatime,auto,noauto,defaults,dev,nodev,diratime,nodiratime,dirsync,exec,noexec,group,nogroup,iversion,"
    "noiversion,mand,nomand,_netdev,nofail,owner,noowner,relatime,norelatime,strictatime,nostrictatime,lazytime,nolazytime,"
    "suid,nosuid,silent,loud,sync,user,nouser,users,nousers,comment=a remark,x-systemd.automount,"
    "x-systemd.requires=network.target,x-gvfs-hide,X-mount.mkdir,rw"
)


@pytest.fixture
def tree(copied: Copied) -> Iterator[WritableTree]:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    tree = WritableTree(store.root, 8 << 20)
    tree.start()
    try:
        yield tree
    finally:
        tree.stop()


# Options


@pytest.mark.parametrize("number", range(4))
def test_every_standard_option_mounts(copied: Copied, mounted: Mounted, number: int) -> None:
    """Alone options differ from all at once: the last of two that disagree counts."""
    options = STANDARD.split(",")
    store = copied("base.safetensors")
    chosen = STANDARD if number == 0 else ",".join(options[number - 1 :: 3])
    live = mounted(store, "-o", chosen)
    assert sha256_of(live.path / "base.safetensors") == store.originals["base.safetensors"].sha256


@pytest.mark.parametrize("option", sorted({*STANDARD.split(","), "lazytime", "nodiratime"}))
def test_no_standard_option_is_handed_on_that_libfuse_does_not_know(option: str) -> None:
    known = {"ro", "nosuid", "nodev", "noexec", "noatime", "sync", "async", "dirsync"}
    assert set(parse_options(option).arguments()) <= known


def test_a_remount_says_what_to_do(copied: Copied, mounted: Mounted) -> None:
    with pytest.raises(UsageError, match=r"keeps its options.*umount"):
        parse_options("remount,ro")
    store = copied("base.safetensors")
    live = mounted(store)
    done = hydrafs("mount", store.root, live.path, "-o", "remount,ro")
    assert done.returncode == 2
    assert "mount it again with the options" in done.stderr


# Attributes that came with a copy


@pytest.mark.parametrize("dehydrated", [False, True])
def test_a_hash_that_was_copied_is_not_believed(copied: Copied, mounted: Mounted, dehydrated: bool) -> None:
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    name = "half.safetensors" if dehydrated else "new.safetensors"
    file = store.diff(name) if dehydrated else store.root / name
    if not dehydrated:
        file.write_bytes(b"edited since")
    for attribute in ("user.hash.sha256", "user.hash.mine", "user.hydrafs.state", "user.hydrafs.parents",
                      "user.hydrafs.stored_size", "user.hydrafs.unheard.of", "user.hydrafs.path"):  # fmt: skip
        os.setxattr(file, attribute, b"from somewhere else")
    os.setxattr(file, "user.own", b"passes")
    live = mounted(store)
    path = live.path / name
    names = os.listxattr(path)
    values = {name: os.getxattr(path, name) for name in names}
    assert b"from somewhere else" not in values.values()
    assert values["user.own"] == b"passes"
    assert values["user.hydrafs.state"] == (b"dehydrated" if dehydrated else b"plain")
    for attribute in ("user.hash.mine", "user.hydrafs.unheard.of"):
        assert attribute not in names
        with pytest.raises(OSError) as caught:
            os.getxattr(path, attribute)
        assert caught.value.errno == errno.ENODATA
    assert os.getxattr(path, "user.hydrafs.path") == os.fsencode(file)
    if dehydrated:
        assert values["user.hash.sha256"].decode() == store.originals[name].sha256
    else:
        assert "user.hash.sha256" not in names
    # On its way out of the mount and back nothing comes along.
    copy = store.root / "copy.safetensors"
    subprocess.run(["cp", "-a", path, copy], check=True)
    (live.path / "copy.safetensors").open("ab").close()
    with (live.path / "copy.safetensors").open("r+b") as changed:
        changed.write(b"something else")
    assert "user.hash.sha256" not in os.listxattr(live.path / "copy.safetensors")


# Folders


def test_a_folder_that_was_made_anew_has_its_own_time(copied: Copied, mounted: Mounted) -> None:
    store = copied("base.safetensors")
    live = mounted(store)
    for number, root in enumerate((live.path, store.root)):
        folder = live.path / f"folder{number}"
        folder.mkdir()
        (folder / "a.txt").write_text("a")
        os.utime(folder, ns=(10**18, 10**18))
        assert folder.stat().st_mtime_ns == 10**18
        shutil.rmtree(root / folder.name)
        again = root / folder.name
        again.mkdir()
        (again / "a.txt").write_text("a")
        assert eventually(lambda folder=folder: folder.stat().st_mtime_ns > 10**18)  # type: ignore[misc]


def test_tables_that_many_threads_change(tmp_path: Path) -> None:
    """Folders are renamed while others are looked at and touched."""
    catalog = Catalog(None)
    times = FolderTimes(catalog, lambda real: [Entry("a", 0o100000, 1)])
    folders = []
    for number in range(300):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        folders.append(os.fspath(folder))
    failures: list[BaseException] = []
    end = time.monotonic() + 1.0

    def work(number: int) -> None:
        try:
            while time.monotonic() < end:
                for folder in folders[number::3]:
                    times.touched(folder)
                    assert times.shown(folder, os.stat(folder))
                    times.moved(folder, folder + "x", None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    catalog.close()
    assert not failures


def test_when_a_folder_was_made(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    born = birth_ns(os.fspath(folder))
    assert born == 0 or abs(time.time_ns() - born) < 3600 * 10**9
    assert birth_ns(os.fspath(tmp_path / "nothing")) == 0


def test_an_older_catalog_still_tells_a_folders_time(tmp_path: Path) -> None:
    catalog = Catalog(None)
    times = FolderTimes(catalog, lambda real: [])
    folder = os.fspath(tmp_path)
    import xxhash

    catalog.remember_directory(tmp_path, xxhash.xxh3_64_intdigest(b"") >> 1, 12345)
    assert times.shown(folder, os.stat(folder)) == 12345
    assert FolderTimes(catalog, lambda real: []).shown(folder, os.stat(folder)) == 12345
    assert FolderTimes(catalog, lambda real: [Entry("b", 0o100000, 1)]).shown(folder, os.stat(folder)) != 12345
    catalog.close()


def test_a_folder_in_which_somebody_dehydrates_is_removed(tree: WritableTree) -> None:
    """A temporary file that somebody is writing stands in it: the mount shows the folder empty, and it goes."""
    root = tree.store.root
    tree.mkdir("/folder", 0o755)
    with TemporaryFile(root / "folder") as temporary:
        temporary.file.write(b"half a diff")
        assert tree.readdir("/folder") == []
        tree.rmdir("/folder")
        assert not (root / "folder").exists()
    tree.mkdir("/folder", 0o755)
    (root / "folder" / ".hydrafs-tmp-left").write_bytes(b"by a kill")
    tree.rmdir("/folder")
    tree.mkdir("/folder", 0o755)
    (root / "folder" / ".hydrafs-aside-1").write_bytes(b"maybe the only copy")
    with pytest.raises(OSError) as caught:
        tree.rmdir("/folder")
    assert caught.value.errno == errno.ENOTEMPTY
    assert (root / "folder" / ".hydrafs-aside-1").exists()


def test_a_folder_that_is_moved_leaves_no_temporary_file(tree: WritableTree) -> None:
    root = tree.store.root
    tree.mkdir("/folder", 0o755)
    with TemporaryFile(root / "folder") as temporary:
        temporary.file.write(b"half a diff")
        tree.rename("/folder", "/elsewhere")
    assert os.listdir(root / "elsewhere") == []


def test_fstat_of_a_folder_that_was_removed(copied: Copied, mounted: Mounted) -> None:
    live = mounted(copied("base.safetensors"))
    folder = live.path / "folder"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        folder.rmdir()
        time.sleep(1.2)  # until then the kernel may answer by itself
        with pytest.raises(OSError) as caught:
            os.fstat(fd)
        assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    finally:
        os.close(fd)


def test_many_writers_that_wait_for_the_lock_leave_the_readers_alone(copied: Copied, mounted: Mounted) -> None:
    """A stopped command has the store's lock; more programs wait for it than libfuse once had threads."""
    store = copied("base.safetensors", "half.safetensors", "tuned.safetensors")
    live = mounted(store)
    live.may_log("another process is changing the store")
    live.may_log("too many programs wait")
    folders = []
    for number in range(80):
        folder = store.root / f"folder{number}"
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"a" * 100_000)
        folders.append(live.path / folder.name)
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, store.root / ".hydrafs" / "lock"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        answers: list[int] = []

        def remove(folder: Path) -> None:
            try:
                os.unlink(folder / "a.safetensors")
            except OSError as error:
                answers.append(error.errno or 0)
            else:
                answers.append(0)

        threads = [threading.Thread(target=remove, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        while_waiting = 0
        while len(answers) < len(threads):
            for name in ("base.safetensors", "half.safetensors", "tuned.safetensors"):
                began = len(answers)
                assert sha256_of(live.path / name) == store.originals[name].sha256
                while_waiting += began < len(threads)
        for thread in threads:
            thread.join()
        assert set(answers) == {errno.EBUSY}
        assert while_waiting >= 3
    finally:
        holder.kill()
        holder.communicate()
    assert eventually(lambda: _removed(folders[0] / "a.safetensors"))


def _removed(path: Path) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def test_a_change_through_the_mount_does_not_cost_a_listing(
    tree: WritableTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is known without one is what a listing says: who changes the folder behind the mount, and none of its
    names, does not change its time."""
    root = tree.store.root
    tree.mkdir("/folder", 0o755)
    for number in range(50):
        (root / "folder" / f"{number}.txt").touch()
    listings: list[str] = []
    real = tree.folder_times._members

    def counted(folder: str) -> object:
        listings.append(folder)
        return real(folder)

    monkeypatch.setattr(tree.folder_times, "_members", counted)
    monkeypatch.setattr(folder_times, "_SETTLED_NS", 10**15)  # on a busy machine a moment is long
    tree.getattr("/folder")
    assert len(listings) == 1
    changes: list[Callable[[], object]] = [
        lambda: tree.create("/folder/new", os.O_RDWR, 0o644).close(),
        lambda: tree.mkdir("/folder/inside", 0o755),
        lambda: tree.symlink("new", "/folder/link"),
        lambda: tree.link("/folder/new", "/folder/second"),
        lambda: tree.rename("/folder/new", "/folder/renamed"),
        lambda: tree.rename("/folder/second", "/folder/renamed2"),
        lambda: tree.rename("/folder/0.txt", "/folder/1.txt"),
        lambda: tree.rename("/folder/2.txt", "/outside.txt"),
        lambda: tree.rename("/half.safetensors", "/folder/half.safetensors"),
        lambda: tree.rename("/folder/3.txt", "/folder/half.safetensors"),
        lambda: tree.rename("/tuned.safetensors", "/folder/tuned.safetensors"),
        lambda: tree.unlink("/folder/tuned.safetensors"),
        lambda: tree.unlink("/folder/link"),
        lambda: tree.rmdir("/folder/inside"),
        lambda: tree.mknod("/folder/pipe", 0o010644),
    ]
    for number, change in enumerate(changes):
        before = tree.getattr("/folder").mtime_ns
        del listings[:]
        change()
        shown = tree.getattr("/folder").mtime_ns
        assert shown >= before
        assert not [folder for folder in listings if folder.endswith("/folder")], number
        time.sleep(0.01)
        (root / "folder" / ".hydrafs-passing").touch()
        (root / "folder" / ".hydrafs-passing").unlink()
        assert (root / "folder").stat().st_mtime_ns != shown
        assert tree.getattr("/folder").mtime_ns == shown
        assert [folder for folder in listings if folder.endswith("/folder")]
