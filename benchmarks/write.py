"""The table *write*: writing into a mount, against the store's own filesystem."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import bench_folder, median, number, print_table, write_json
from benchmarks.machine import AnyFuse, Mount

BLOCK = 1 << 20
TO_REACH = 0.6


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: MB per second into the filesystem itself, through the mount, and through another FUSE filesystem where
    one is installed; the median of the runs."""

    what: str
    direct: float
    mounted: float
    any_fuse: float | None


def write(path: Path, nbytes: int, block: int, *, sync: bool) -> float:
    """Write a new file; megabytes per second. What it does not sync is on its way to the disk when this returns."""
    data = os.urandom(BLOCK)[:block]
    os.sync()
    start = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for _ in range(nbytes // block):
            os.write(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    seconds = time.perf_counter() - start
    path.unlink()
    return nbytes / 1e6 / seconds


def await_absence(path: Path) -> None:
    """A mount deletes a file up to 20 ms after it was told to, where libfuse has not heard of its closing yet."""
    while path.exists():
        time.sleep(0.01)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: .bench, HYDRAFS_BENCH)")
    parser.add_argument("--size", type=int, default=2000, metavar="MB", help="how much is written")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, taken in turns")
    parser.add_argument("--quick", action="store_true", help="20 MB once: a test of the benchmark")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (-: stdout)")
    args = parser.parse_args()
    if args.quick:
        args.size, args.repeat = 20, 1
    work = Path(tempfile.mkdtemp(prefix="write-", dir=bench_folder(args.folder)))
    cases = (
        ("blocks of 1 MiB", BLOCK, False),
        ("blocks of 1 MiB, synced", BLOCK, True),
        ("of 64 KiB", 64 << 10, False),
    )
    rows = []
    try:
        (work / "store").mkdir()
        with contextlib.ExitStack() as stack:
            mount = stack.enter_context(Mount(work / "store", work / "mount", cache_mib=64, read_only=False))
            folders = [work / "store", mount.mountpoint]
            if AnyFuse.is_there():
                other = stack.enter_context(AnyFuse(work / "store", work / "other", read_only=False))
                folders.append(other.mountpoint)
            for what, block, sync in cases:
                speeds: list[list[float]] = [[] for _ in folders]
                for _ in range(args.repeat):
                    for found, folder in zip(speeds, folders, strict=True):
                        found.append(write(folder / "written", args.size * 1_000_000, block, sync=sync))
                        await_absence(work / "store" / "written")
                direct, mounted, *others = map(median, speeds)
                rows.append(Measured(what, direct, mounted, others[0] if others else None))
        print_table(
            f"Writing {args.size:,} MB",
            [
                "", "filesystem, MB/s", "mount, MB/s", "ratio", f"to reach {TO_REACH}", f"{AnyFuse.COMMAND}, MB/s",
                f"mount/{AnyFuse.COMMAND}",
            ],
            [
                [
                    row.what, number(row.direct, 0), number(row.mounted, 0), number(row.mounted / row.direct, 2),
                    "met" if row.mounted >= TO_REACH * row.direct else "NOT met",
                    *(("-", "-") if row.any_fuse is None else
                      (number(row.any_fuse, 0), number(row.mounted / row.any_fuse, 2))),
                ]
                for row in rows
            ],
        )  # fmt: skip
        write_json(args.json, [asdict(row) for row in rows])
    finally:
        if not any((work / name).is_mount() for name in ("mount", "other")):
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
