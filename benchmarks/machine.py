"""The machine under a benchmark: caches dropped and filled, the disk's counter, a mount and its daemon."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import ROOT, hydrafs_command

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK_NBYTES = 512  # the unit of /proc/diskstats, whatever the disk's own
MOUNT_SECONDS = 60.0


def drop_caches(paths: Iterable[Path]) -> None:
    """Leaves nothing of ``paths`` in the page cache: all caches dropped as root, these files' pages otherwise."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_into_cache(path: Path) -> None:
    """Reads all of ``path``, so that its pages are in memory."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer):
            pass


def disk_nbytes_read(path: Path) -> int:
    """Bytes read so far from the disk that ``path`` lies on, or from all disks where that cannot be told."""
    device = path.stat().st_dev
    try:
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
        return int(fields[2]) * BLOCK_NBYTES
    except OSError:
        total = 0
        for line in Path("/proc/diskstats").read_text().splitlines():
            name, sectors = line.split()[2], line.split()[5]
            if Path(f"/sys/block/{name}/device").exists():  # whole disks; no partitions, loops or maps over them
                total += int(sectors) * BLOCK_NBYTES
        return total


class AnyFuse:
    """A folder passed through, as it is, by a FUSE filesystem written in C: what FUSE itself costs on this machine.

    Its pages stay in the page cache from one open to the next, as those of hydrafs do.
    """

    COMMAND = "bindfs"

    @classmethod
    def is_there(cls) -> bool:
        """Whether the program is installed."""
        return shutil.which(cls.COMMAND) is not None

    def __init__(self, folder: Path, mountpoint: Path, *, read_only: bool = True) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(parents=True, exist_ok=True)
        self._daemon = subprocess.Popen(
            [self.COMMAND, "-f", "-o", self._options(read_only), folder, mountpoint],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        _wait_for_mount(self._daemon, mountpoint, self.COMMAND)

    def _options(self, read_only: bool) -> str:
        if read_only:
            return "ro,kernel_cache"
        libraries = subprocess.run(
            ["ldd", shutil.which(self.COMMAND) or ""], capture_output=True, text=True, check=False
        )
        # libfuse 2 writes page by page where it is not asked for more; libfuse 3 does not know the option.
        return "kernel_cache" + (",big_writes" if "libfuse.so.2" in libraries.stdout else "")

    def __enter__(self) -> AnyFuse:
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.send_signal(signal.SIGTERM)
        try:
            self._daemon.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            subprocess.run(["fusermount3", "-u", "-z", self.mountpoint], check=False)
            self._daemon.kill()
            self._daemon.communicate()


def _wait_for_mount(daemon: subprocess.Popen[bytes], mountpoint: Path, name: str) -> None:
    start = time.perf_counter()
    while not mountpoint.is_mount():
        if daemon.poll() is not None or time.perf_counter() - start > MOUNT_SECONDS:
            daemon.kill()
            raise SystemExit(f"{name} failed: {daemon.communicate()[1].decode()}")
        time.sleep(0.002)


class Mount:
    """A store mounted, read-only by default, by a daemon of this benchmark's own, so that its process is known."""

    def __init__(self, store: Path, mountpoint: Path, *, cache_mib: int, read_only: bool = True) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(parents=True, exist_ok=True)
        command = [
            *hydrafs_command(),
            "mount",
            store,
            mountpoint,
            "--foreground",
            *(["--read-only"] if read_only else []),
        ]
        start = time.perf_counter()
        self._daemon = subprocess.Popen(
            [*command, "--cache-size", f"{cache_mib}M"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        _wait_for_mount(self._daemon, mountpoint, "hydrafs mount")
        self.seconds = time.perf_counter() - start
        """From the start of the program until the mount answers."""

    def _status(self, field: str) -> int:
        for line in Path(f"/proc/{self._daemon.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
        return 0

    def peak_rss_nbytes(self) -> int:
        """The most memory that the daemon has held so far, pages of mapped files included."""
        return self._status("VmHWM")

    def close(self) -> None:
        """Takes the mount down and waits for the daemon's end."""
        self._daemon.send_signal(signal.SIGTERM)
        try:
            self._daemon.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            subprocess.run(["fusermount3", "-u", "-z", self.mountpoint], check=False)
            self._daemon.kill()
            self._daemon.communicate()
            raise SystemExit("the daemon did not end within 30 s of SIGTERM") from None

    def __enter__(self) -> Mount:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
