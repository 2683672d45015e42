"""Real mounts of a fake tree, through both bindings: what the adapter promises whatever the tree does.

The tree lives in the daemon, so the tests steer it by names (what a path is called says how it behaves) and by files
in a directory that both know, and read its diary of callbacks from a file there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from hydrafs import errors
from hydrafs.attributes import Attributes, Entry
from hydrafs.errors import Denied, HydraError, MountFailed, NotFound, ParentMissing, UsageError
from hydrafs.fuse import BINDINGS, errno_of
from hydrafs.libfuse import has_coherent_direct_writes, load_binding
from hydrafs.mounting import MountOptions, mount, mount_in_background, our_mounts, parse_options, unmount
from hydrafs.mountpoints import check_store_paths, clear_stale

fuse = pytest.mark.fuse

MTIME_NS = 1_234_567_890_123_456_789
BIG = bytes(range(251)) * 80_000  # 20 MB, and no power of two repeats in it
MANY = 3_000
ODD_NAME = os.fsdecode(b"\xff\xfe caf\xc3\xa9, [\\x]")
RAISED = {
    "interrupt": KeyboardInterrupt,
    "exit": SystemExit,
    "value": lambda: ValueError("a bug"),
    "bare": OSError,
    "negative": lambda: OSError(-5, "negative"),
    "nosys": lambda: OSError(errno.ENOSYS, "would switch the operation off for good"),
    "memory": MemoryError,
    "hydra": lambda: ParentMissing("a parent is missing", where="x", remedy="bring it back"),
}
OPERATIONS = ("getattr", "readdir", "readlink", "open", "read", "getxattr", "listxattr", "statfs", "close")


class FakeHandle:
    def __init__(self, tree: FakeTree, path: str, content: bytes, keep_cache: bool) -> None:
        self.tree, self.path, self.content, self.keep_cache = tree, path, memoryview(content), keep_cache

    def pread_into(self, offset: int, out: memoryview) -> int:
        self.tree.note("read", self.path)
        # Ragged: at most a prime number of bytes at a time, which the adapter must make whole.
        nbytes = min(len(out), 10_007) if self.path == "/ragged" else len(out)
        part = self.content[offset : offset + nbytes]
        out[: len(part)] = part
        return {"/too-many": len(out) + 1, "/negative": -7, "/nothing": None}.get(self.path, len(part))  # type: ignore[return-value]

    def attributes(self) -> Attributes:
        return self.tree.getattr(self.path)

    def close(self) -> None:
        self.tree.note("close", self.path)


class FakeTree:
    def __init__(self, control: str, fail: str = "") -> None:
        self.control = Path(control)
        self.fail = fail
        self.files = {
            "/big": BIG,
            "/ragged": BIG[:300_001],
            "/small": b"hello",
            "/empty": b"",
            "/keep": BIG[:100_000],
            "/drop": BIG[:100_000],
            "/too-many": bytes(9),
            "/negative": bytes(9),
            "/nothing": bytes(9),
            "/" + ODD_NAME: b"odd",
        }
        self.files.update({f"/many/file {i:05}": b"x" * (i % 7) for i in range(MANY)})
        self.inodes = {path: number for number, path in enumerate(self.files, 1000)}
        self.opened: dict[str, bytes] = {}

    def note(self, operation: str, path: str) -> None:
        with (self.control / "diary").open("ab") as diary:
            diary.write(f"{operation} {path}\n".encode(errors="surrogateescape"))
        if path.startswith(f"/raise-{operation}-"):
            raise RAISED[path.rsplit("-", 1)[1]]()

    def getattr(self, path: str) -> Attributes:
        if self.fail == "getattr":
            raise OSError(errno.EIO, "broken")
        if path.startswith("/raise-getattr-"):
            self.note("getattr", path)
        size, nlink, mode = 0, 1, stat.S_IFREG | 0o640
        if path in ("/", "/many") or path.startswith("/raise-readdir-"):
            nlink, mode = 2, stat.S_IFDIR | 0o755
        elif path == "/link" or path.startswith("/raise-readlink-"):
            mode = stat.S_IFLNK | 0o777
        elif path.startswith("/raise-"):
            size = 5
        elif path == "/replaced":
            size = 4096
        elif path == "/new" and (self.control / "new").exists():
            size = 3
        elif path in self.files:
            size = len(self.files[path])
        else:
            raise FileNotFoundError(errno.ENOENT, path)
        ino = self.inodes.get(path, 7)
        return Attributes(mode, nlink, 11, 22, size, ino, MTIME_NS + 1, MTIME_NS, MTIME_NS - 1, -(-size // 512) + 3)

    def readdir(self, path: str) -> list[Entry]:
        self.note("readdir", path)
        prefix = path.rstrip("/") + "/"
        names = [found[len(prefix) :] for found in self.files if found.startswith(prefix)]
        listed = [Entry(name, stat.S_IFREG, self.inodes[prefix + name]) for name in names if "/" not in name]
        return [*listed, Entry("many", stat.S_IFDIR, 7), Entry("link", stat.S_IFLNK, 7)] if path == "/" else listed

    def readlink(self, path: str) -> str:
        self.note("readlink", path)
        return "many/../" + ODD_NAME

    def open(self, path: str, flags: int) -> FakeHandle:
        self.note("open", path)
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, path)
        content = self.files.get(path, b"12345")
        if path == "/replaced":
            content = (self.control / "replaced").read_bytes()
        keep_cache = path not in ("/drop",) and self.opened.get(path, content) == content
        self.opened[path] = content
        return FakeHandle(self, path, content, keep_cache)

    def getxattr(self, path: str, name: str) -> bytes:
        self.note("getxattr", path)
        if name == "user.long":
            return b"v" * 5000
        if name == "user.empty":
            return b""
        raise OSError(errno.ENODATA, name)

    def listxattr(self, path: str) -> list[str]:
        self.note("listxattr", path)
        return [] if path == "/small" else ["user.long", "user.empty"]

    def statfs(self, path: str) -> os.statvfs_result:
        self.note("statfs", path)
        return os.statvfs_result((4096, 512, 1_000_003, 500_001, 400_007, 77, 55, 44, 0, 200, 0))

    def start(self) -> None:
        if self.fail == "start":
            raise NotFound("the store went away", where="here", remedy="bring it back")
        self.note("start", str(threading.active_count()))

    def stop(self) -> None:
        self.note("stop", "")


def make_tree(control: str, fail: str = "") -> FakeTree:
    # What the daemon logs goes where its stderr goes, and not to the handlers that pytest had before the fork.
    logging.basicConfig(force=True, level=logging.WARNING, stream=os.fdopen(2, "w", closefd=False))
    if fail == "hydra":
        raise NotFound("no such store", where="/nowhere", detail="looked twice", remedy="name another")
    if fail == "value":
        raise ValueError("a bug")
    if fail == "crash":
        os._exit(3)
    return FakeTree(control, fail)


def wait_for_end(pid: int) -> None:
    """Wait until a process that may not be our child is gone, or is only waiting to be reaped."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"the daemon {pid} did not end")


def mounted_at(path: Path) -> bool:
    return any(found.mountpoint == path for found in our_mounts())


class Setup:
    """A mountpoint and a control directory; whatever is mounted is taken down at the end."""

    def __init__(self, base: Path, binding: str | None) -> None:
        self.binding = binding
        self.control, self.point = base / "control", base / "mount point"
        self.control.mkdir()
        self.point.mkdir()
        self.log = base / "daemon.log"
        self.pid = 0

    def mount(self, fail: str = "", options: MountOptions | None = None, **more: object) -> Path:
        self.pid = mount(
            partial(make_tree, str(self.control), fail), self.point, store_paths=[self.control],
            options=options or MountOptions(), binding=self.binding, log_path=self.log, **more,  # type: ignore[arg-type]
        )  # fmt: skip
        return self.point

    def diary(self, operation: str, path: str) -> int:
        return (self.control / "diary").read_text(errors="surrogateescape").splitlines().count(f"{operation} {path}")

    def end(self) -> None:
        while mounted_at(self.point):
            unmount(self.point, lazy=True)
        if self.pid:
            wait_for_end(self.pid)


@pytest.fixture(params=BINDINGS)
def setup(request, tmp_path):
    if os.environ.get("HYDRAFS_TESTS_WITHOUT_FUSE") == "1":
        pytest.skip("HYDRAFS_TESTS_WITHOUT_FUSE=1")
    made = Setup(tmp_path, request.param)
    yield made
    made.end()


@pytest.fixture
def point(setup):
    return setup.mount()


def errno_from(call, *arguments) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


@fuse
def test_a_mount_says_what_it_is(setup, point):
    (found,) = [found for found in our_mounts() if found.mountpoint == point]
    assert found.fstype == "fuse.hydrafs"
    assert found.source == "hydrafs:control"
    assert {"rw", "nosuid", "nodev"} <= set(found.options)
    wanted = 1 << 20 if load_binding(setup.binding).major >= 3 else 128 << 10
    assert f"max_read={wanted}" in found.options
    assert os.stat(point).st_dev != os.stat(point.parent).st_dev
    readahead = Path(f"/sys/class/bdi/{found.device}/read_ahead_kb")
    if os.access(readahead, os.W_OK):
        assert readahead.read_text().strip() == "1024"


@fuse
def test_stat_is_exact(point):
    found = os.stat(point / "big")
    assert (found.st_mode, found.st_nlink, found.st_uid, found.st_gid) == (stat.S_IFREG | 0o640, 1, 11, 22)
    assert (found.st_size, found.st_ino, found.st_blocks) == (len(BIG), 1000, -(-len(BIG) // 512) + 3)
    assert (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) == (MTIME_NS + 1, MTIME_NS, MTIME_NS - 1)
    with open(point / "big", "rb") as file:
        assert os.fstat(file.fileno()) == found
    assert os.stat(point).st_mode == stat.S_IFDIR | 0o755
    assert errno_from(os.stat, point / "absent") == errno.ENOENT


@fuse
def test_a_listing_has_every_name_with_its_type_and_inode(point):
    with os.scandir(point) as entries:
        top = {entry.name: entry for entry in entries}
    assert ODD_NAME in top
    assert top["many"].is_dir(follow_symlinks=False)
    assert top["link"].is_symlink()
    assert top["big"].inode() == os.stat(point / "big").st_ino == 1000
    assert (point / ODD_NAME).read_bytes() == b"odd"
    assert os.readlink(point / "link") == "many/../" + ODD_NAME
    assert (point / "link").read_bytes() == b"odd"


@fuse
def test_a_long_listing_is_complete_however_it_is_read(point):
    wanted = {f"file {i:05}": i % 7 for i in range(MANY)}
    # With a stat of each, the kernel takes names and attributes in one request where it can; without, only names.
    with os.scandir(point / "many") as entries:
        assert {entry.name: os.lstat(entry.path).st_size for entry in entries} == wanted
    assert sorted(os.listdir(point / "many")) == sorted(wanted)
    listing = subprocess.run(["ls", "-la", point / "many"], capture_output=True, text=True, check=True).stdout
    assert len(listing.splitlines()) == MANY + 3


@fuse
def test_what_is_new_appears_at_once_also_to_who_asked_before(setup, point):
    assert errno_from(os.stat, point / "new") == errno.ENOENT
    (setup.control / "new").touch()
    assert os.stat(point / "new").st_size == 3


@fuse
def test_any_read_equals_the_slice(point):
    with open(point / "big", "rb", buffering=0) as file:
        for offset, nbytes in ((0, 1), (0, 4096), (4095, 2), (1 << 20, 3 << 20), (len(BIG) - 5, 100), (len(BIG), 9)):
            assert os.pread(file.fileno(), nbytes, offset) == BIG[offset : offset + nbytes]
        assert file.read() == BIG
    assert (point / "small").read_bytes() == b"hello"
    assert (point / "empty").read_bytes() == b""


@fuse
def test_a_tree_that_reads_in_pieces_gives_no_short_read(point):
    assert (point / "ragged").read_bytes() == BIG[:300_001]


@fuse
@pytest.mark.parametrize("name", ["too-many", "negative", "nothing"])
def test_a_count_that_cannot_be_is_an_error(point, name):
    assert errno_from((point / name).read_bytes) == errno.EIO
    assert (point / "small").read_bytes() == b"hello"


@fuse
@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_COPY])
def test_maps_shared_and_private(point, access):
    with open(point / "big", "rb") as file, mmap.mmap(file.fileno(), 0, access=access) as mapped:
        assert mapped[3_000_000:3_100_000] == BIG[3_000_000:3_100_000]
        if access == mmap.ACCESS_COPY:
            mapped[0:4] = b"MINE"
            assert mapped[0:8] == b"MINE" + BIG[4:8]
        assert mapped[-1] == BIG[-1]
    assert (point / "big").read_bytes()[:4] == BIG[:4]


@fuse
def test_eight_threads_that_drop_what_they_read(point):
    step = 2 << 20
    with open(point / "big", "rb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            parts = pool.map(lambda offset: os.pread(file.fileno(), step, offset), range(0, len(BIG), step))
            assert b"".join(parts) == BIG
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@fuse
@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_tree_raises_is_an_answer_and_the_mount_lives_on(setup, point, kind):
    def path(operation: str) -> Path:
        return point / f"raise-{operation}-{kind}"

    found = {
        "getattr": errno_from(os.stat, path("getattr")),
        "readdir": errno_from(os.listdir, path("readdir")),
        "readlink": errno_from(os.readlink, path("readlink")),
        "open": errno_from(path("open").read_bytes),
        "read": errno_from(path("read").read_bytes),
        "getxattr": errno_from(os.getxattr, path("getxattr"), "user.x"),
        "listxattr": errno_from(os.listxattr, path("listxattr")),
        "statfs": errno_from(os.statvfs, path("statfs")),
    }
    assert found == dict.fromkeys(found, errno.EIO)
    assert path("close").read_bytes() == b"12345"
    assert (point / "small").read_bytes() == b"hello"
    assert os.getxattr(point / "big", "user.empty") == b""
    daemon_log = setup.log.read_text()
    assert "bring it back" in daemon_log if kind == "hydra" else "Traceback" in daemon_log or kind == "nosys"


@fuse
def test_a_file_is_closed_once(setup, point):
    with open(point / "small", "rb") as file:
        copy = os.dup(file.fileno())
        file.read()
    os.close(copy)
    deadline = time.monotonic() + 10  # close(2) does not wait for the release
    while setup.diary("close", "/small") == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    unmount(point)
    wait_for_end(setup.pid)
    assert setup.diary("open", "/small") == setup.diary("close", "/small") == 1
    assert setup.diary("stop", "") == 1


WRITES = {
    "create": lambda point: (point / "made").touch(),
    "write": lambda point: os.open(point / "small", os.O_RDWR),
    "append": lambda point: os.open(point / "small", os.O_WRONLY | os.O_APPEND),
    "truncate": lambda point: os.truncate(point / "small", 1),
    "mkdir": lambda point: os.mkdir(point / "made"),
    "rmdir": lambda point: os.rmdir(point / "many"),
    "unlink": lambda point: os.unlink(point / "small"),
    "rename": lambda point: os.rename(point / "small", point / "made"),
    "link": lambda point: os.link(point / "small", point / "made"),
    "symlink": lambda point: os.symlink("small", point / "made"),
    "mknod": lambda point: os.mknod(point / "made", stat.S_IFREG | 0o600),
    "chmod": lambda point: os.chmod(point / "small", 0o600),
    "chown": lambda point: os.chown(point / "small", 1, 1),
    "utime": lambda point: os.utime(point / "small", (1, 1)),
    "setxattr": lambda point: os.setxattr(point / "small", "user.x", b"v"),
    "removexattr": lambda point: os.removexattr(point / "small", "user.x"),
}


@fuse
@pytest.mark.parametrize("writable", [False, True], ids=["ro", "remounted rw"])
def test_every_write_is_refused(setup, writable):
    point = setup.mount(options=MountOptions(read_only=True))
    if writable:
        # The kernel answers for a read-only mount; what the adapter answers shows without that.
        libc = ctypes.CDLL(None, use_errno=True)
        ms_remount, kept = 32, 2 | 4
        assert libc.mount(None, os.fsencode(point), None, ms_remount | kept, None) == 0, os.strerror(ctypes.get_errno())
    found = {name: errno_from(write, point) for name, write in WRITES.items()}
    assert found == dict.fromkeys(WRITES, errno.EROFS)
    assert not os.access(point / "small", os.W_OK)
    assert os.access(point / "small", os.R_OK)
    assert not os.access(point / "small", os.X_OK)
    assert (point / "small").read_bytes() == b"hello"


@fuse
def test_xattrs(point):
    assert os.getxattr(point / "big", "user.long") == b"v" * 5000
    assert os.getxattr(point / "big", "user.empty") == b""
    assert os.listxattr(point / "big") == ["user.long", "user.empty"]
    assert os.listxattr(point / "small") == []
    for name in ("user.absent", "security.selinux"):
        assert errno_from(os.getxattr, point / "big", name) == errno.ENODATA


@fuse
def test_statfs(point):
    found = os.statvfs(point / "big")
    assert (found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree) == (4096, 512, 1_000_003, 500_001)
    assert (found.f_bavail, found.f_files, found.f_ffree, found.f_namemax) == (400_007, 77, 55, 200)


@fuse
@pytest.mark.parametrize(("name", "kept"), [("keep", True), ("drop", False)])
def test_pages_stay_only_where_the_tree_says_so(setup, point, name, kept):
    assert (point / name).read_bytes() == BIG[:100_000]
    before = setup.diary("read", f"/{name}")
    assert before
    assert (point / name).read_bytes() == BIG[:100_000]
    assert (setup.diary("read", f"/{name}") == before) is kept


@fuse
def test_a_name_given_to_another_file_of_the_same_size_and_mtime(setup, point):
    (setup.control / "replaced").write_bytes(b"a" * 4096)
    assert (point / "replaced").read_bytes() == b"a" * 4096
    (setup.control / "replaced").write_bytes(b"b" * 4096)
    assert (point / "replaced").read_bytes() == b"b" * 4096
    with open(point / "replaced", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == b"b" * 4096


@contextlib.contextmanager
def left_open(path):
    """A descriptor that outlives its mount: its close(2) then says that nobody is connected."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


FOREGROUND = """
import sys
sys.path[:] = {path!r}
from functools import partial
from hydrafs.mounting import mount
from {module} import make_tree
mount(partial(make_tree, {control!r}), {point!r}, store_paths=[{control!r}], foreground=True, binding={binding!r},
      on_ready=lambda found: print("ready", found.mountpoint, flush=True))
print("ended", flush=True)
"""


@fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None], ids=str)
def test_the_foreground_ends_cleanly(setup, number):
    script = FOREGROUND.format(
        path=sys.path, module=__name__, control=str(setup.control), point=str(setup.point), binding=setup.binding
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == f"ready {setup.point}\n"
        with left_open(setup.point / "big") as descriptor:
            assert os.read(descriptor, 10) == BIG[:10]
            if number is not None:
                child.send_signal(number)
                output, complaint = child.communicate(timeout=20)
        if number is None:
            unmount(setup.point)
            output, complaint = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, output, complaint) == (0, "ended\n", "")
    assert not mounted_at(setup.point)
    assert list(setup.point.iterdir()) == []
    assert setup.diary("stop", "") == 1


@fuse
def test_the_daemon_ends_cleanly_by_a_signal(setup, point):
    with left_open(point / "big"):
        os.kill(setup.pid, signal.SIGTERM)
        wait_for_end(setup.pid)
    assert not mounted_at(point)
    assert setup.diary("open", "/big") == setup.diary("close", "/big") == 1
    assert setup.diary("stop", "") == 1


@fuse
def test_the_daemon_is_detached_and_starts_its_tree_after_the_fork(setup, point):
    assert os.getsid(setup.pid) != os.getsid(0)
    assert os.readlink(f"/proc/{setup.pid}/cwd") == "/"
    assert os.readlink(f"/proc/{setup.pid}/fd/2") == str(setup.log)
    assert setup.diary("start", "1") + setup.diary("start", "2") == 1
    assert setup.log.read_text() == ""


@fuse
def test_unmounting_what_is_in_use(setup, point):
    with open(point / "big", "rb") as file:
        with pytest.raises(MountFailed, match="--lazy"):
            unmount(point)
        unmount(point, lazy=True)
        assert not mounted_at(point)
        assert os.pread(file.fileno(), 100, 5_000_000) == BIG[5_000_000:5_000_100]
    wait_for_end(setup.pid)


@fuse
def test_unmounting_what_is_not_ours(setup):
    with pytest.raises(NotFound, match="nothing is mounted"):
        unmount(setup.point)
    with pytest.raises(MountFailed, match="not a hydrafs mount"):
        unmount("/proc")


@fuse
@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        ("hydra", NotFound, "no such store, /nowhere: looked twice; name another"),
        ("value", MountFailed, "ValueError: a bug"),
        ("crash", MountFailed, "the daemon died"),
        ("start", NotFound, "the store went away, here; bring it back"),
        ("getattr", MountFailed, "the mount does not work"),
    ],
)
def test_the_parent_is_told_why_there_is_no_mount(setup, fail, kind, message):
    with pytest.raises(kind, match=message):
        setup.mount(fail)
    assert not mounted_at(setup.point)
    assert setup.mount() == setup.point


@fuse
def test_what_libfuse_says_reaches_the_parent(setup):
    with pytest.raises(UsageError, match=r"unknown option.*no_such_option"):
        setup.mount(options=MountOptions(flags=("no_such_option",)))
    assert not mounted_at(setup.point)


@fuse
def test_bad_mountpoints(setup):
    def refused(kind: type[HydraError], message: str, **more: object) -> None:
        with pytest.raises(kind, match=message):
            setup.mount(**more)  # type: ignore[arg-type]

    (setup.point / "file").touch()
    refused(MountFailed, "not empty.*-o nonempty")
    setup.mount(options=MountOptions(nonempty=True))
    assert not (setup.point / "file").exists()
    refused(MountFailed, "in use.*hydrafs umount")
    unmount(setup.point)
    wait_for_end(setup.pid)
    setup.point = setup.point / "file"
    refused(NotFound, "no directory")
    setup.point = setup.point.with_name("absent")
    refused(NotFound, "mkdir -p")


@fuse
@pytest.mark.logs("the daemon of this mount is dead")
def test_a_stale_mount_of_ours_is_cleaned_up(setup, point):
    os.kill(setup.pid, signal.SIGKILL)
    wait_for_end(setup.pid)
    assert errno_from(os.statvfs, point) in (
        errno.ENOTCONN,
        errno.ECONNABORTED,
    )  # dead, and not an empty folder that a sync would mirror
    assert mounted_at(point)
    setup.mount()
    assert (point / "small").read_bytes() == b"hello"
    assert [found.mountpoint for found in our_mounts()].count(point) == 1
    assert clear_stale(point) == 0
    assert (point / "small").read_bytes() == b"hello"


@fuse
def test_a_mount_for_the_length_of_a_block(setup):
    control = {"control": str(setup.control)}
    more = {"store_paths": [setup.control], "binding": setup.binding}
    with mount_in_background(f"{__name__}:make_tree", control, setup.point, **more) as path:
        assert path == setup.point
        assert (path / "big").read_bytes() == BIG
    assert not mounted_at(setup.point)
    assert setup.diary("stop", "") == 1
    with (
        pytest.raises(NotFound, match="no such store"),
        mount_in_background(f"{__name__}:make_tree", {**control, "fail": "hydra"}, setup.point, **more),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="mine"),
        mount_in_background(f"{__name__}:make_tree", control, setup.point, **more),
    ):
        raise RuntimeError("mine")
    assert not mounted_at(setup.point)


@fuse
def test_a_program_that_dies_takes_its_mount_along(setup):
    script = f"""
import os, sys
sys.path[:] = {sys.path!r}
from hydrafs.mounting import mount_in_background
with mount_in_background("{__name__}:make_tree", {{"control": {str(setup.control)!r}}}, {str(setup.point)!r},
                         store_paths=[{str(setup.control)!r}], binding={setup.binding!r}):
    os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7
    deadline = time.monotonic() + 20
    while mounted_at(setup.point) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mounted_at(setup.point)


@fuse
def test_who_may_look_is_decided_by_the_modes_once_others_are_let_in(setup):
    point = setup.mount(options=parse_options("allow_other,umask=077,uid=33"))
    found = os.stat(point / "big")
    assert (found.st_mode, found.st_uid) == (stat.S_IFREG | 0o700, 33)
    (mounted,) = [found for found in our_mounts() if found.mountpoint == point]
    assert {"allow_other", "default_permissions"} <= set(mounted.options)


def test_paths_that_a_mount_would_hide(tmp_path):
    store, point = tmp_path / "store", tmp_path / "store" / "point"
    point.mkdir(parents=True)
    (tmp_path / "link").symlink_to(store)
    check_store_paths(tmp_path / "elsewhere", [store], over_store=False)
    with pytest.raises(UsageError, match="hide"):
        check_store_paths(store, [point], over_store=False)
    with pytest.raises(UsageError, match="hide"):
        check_store_paths(store, [tmp_path / "link"], over_store=False)
    with pytest.raises(UsageError, match="inside"):
        check_store_paths(point, [store], over_store=False)
    check_store_paths(store, [store], over_store=True)
    with pytest.raises(UsageError, match="hide"):
        check_store_paths(store, [store, point], over_store=True)


@pytest.mark.parametrize(
    ("release", "coherent"),
    [("6.18.2", False), ("6.18.3-arch1-1", True), ("6.18", False), ("6.19.0-rc4", True), ("7.0", True),
     ("5.15.0-91-generic", False), ("6.8.0-45-generic", False), ("", False), ("unknown", False)],
)  # fmt: skip
def test_kernels_that_may_write_past_their_pages(release: str, coherent: bool) -> None:
    assert has_coherent_direct_writes(release) is coherent


def test_the_binding_is_named_or_found():
    assert [load_binding(name).name for name in BINDINGS] == ["mfusepy", "fusepy"]
    assert load_binding(None).name == "mfusepy"
    assert "FUSE_LIBRARY_PATH" not in os.environ
    with pytest.raises(MountFailed, match="HYDRAFS_FUSE"):
        load_binding("macfuse")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOENT, "x"), errno.ENOENT),
        (Denied("x"), errno.EACCES),
        (ParentMissing("x"), errno.EIO),
        (OSError(), errno.EIO),
        (OSError("text alone"), errno.EIO),
        (OSError(0, "zero"), errno.EIO),
        (OSError(100_000, "too high for the kernel"), errno.EIO),
        (KeyError("x"), errno.EIO),
        (KeyboardInterrupt(), errno.EIO),
    ],
)
def test_the_errno_table(error, number):
    assert errno_of(error) == number


def test_every_error_of_ours_has_an_errno_that_the_kernel_takes():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HydraError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert errno_of(kind("x")) == kind.errno


def test_options():
    assert parse_options("") == parse_options("defaults,rw,_netdev,x-systemd.automount,nofail,user") == MountOptions()
    found = parse_options("allow_other,ro,noatime,uid=7,gid=8,umask=022,fsname=mine,cache_size=4G,nonempty")
    assert found == MountOptions(
        allow_other=True, read_only=True, nonempty=True, uid=7, gid=8, umask=0o22, fsname="mine",
        cache_nbytes=4 << 30, flags=("noatime",),
    )  # fmt: skip
    assert {"nosuid", "nodev", "default_permissions", "umask=22"} <= set(found.arguments())
    assert {"nosuid", "nodev"} <= set(parse_options("suid,dev,rw").arguments())
    assert "ro" in found.arguments()
    assert "ro" not in parse_options("rw").arguments()
    assert "default_permissions" not in MountOptions().arguments()
    assert not parse_options("ro,rw").read_only


@pytest.mark.parametrize(
    "text",
    ["bogus", "allow_others", "uid=me", "uid=-1", "uid", "umask=9", "umask=1777", "cache_size=4X", "cache_size=",
     "fsname=/dev/sda1", "fsname=", "allow_other,allow_root", "uid=4294967295", "max_read=5"],
)  # fmt: skip
def test_options_that_cannot_be_meant(text):
    with pytest.raises(UsageError, match=text.split(",")[0].split("=")[0]):
        parse_options(text)
