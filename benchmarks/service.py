"""The table *service*: a daemon under a supervisor, with 1,000 diffs: its start, and what it costs when nobody reads.

The supervisor is a socket such as systemd has, with a watchdog of two minutes. Idle is measured after the whole store
was listed once: processor time and context switches of all threads from /proc, so nothing is attached to the daemon.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import ROOT, bench_folder, hydrafs_command, median, number, print_table, say, write_json
from benchmarks.listing import make_store, scan
from benchmarks.pairs import STEPS

WATCHDOG_SECONDS = 120
IMPORTS = "import hydrafs.cli.mount, hydrafs.vfs, hydrafs.allocator, hydrafs.libfuse as l; l.load_binding()"


@dataclass(frozen=True, slots=True)
class Measured:
    """One row, and what it should stay below."""

    what: str
    value: float
    unit: str
    below: float

    @property
    def met(self) -> str:
        """Whether it does."""
        return "met" if self.value <= self.below else "NOT met"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far: processor seconds, voluntary context switches, and its memory now in bytes."""

    cpu_seconds: float
    wakeups: int
    rss_nbytes: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_seconds + other.cpu_seconds, self.wakeups + other.wakeups, self.rss_nbytes + other.rss_nbytes
        )

    @staticmethod
    def of(pid: int) -> Usage:
        """Of all threads of a process."""
        wakeups = rss = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                name, _, text = line.partition(":")
                if name == "voluntary_ctxt_switches":
                    wakeups += int(text)
                elif name == "VmRSS":
                    rss = int(text.split()[0]) << 10
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return Usage((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), wakeups, rss)


def helpers_of(pid: int) -> list[int]:
    """The processes that a daemon has started and that are still there, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *helpers_of(int(child))]
    return found


def seconds_of_imports() -> float:
    """What a mount imports, in an interpreter of its own: without its start."""
    code = f"import time; t = time.perf_counter(); {IMPORTS}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def start(store: Path, mountpoint: Path, work: Path) -> tuple[subprocess.Popen[bytes], float]:
    """A daemon that has said that it is ready, and the seconds that it took, its interpreter's start included."""
    address = work / "notify"
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(address))
        supervisor.settimeout(60)
        environment = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": str(WATCHDOG_SECONDS * 1_000_000)}
        begun = time.perf_counter()
        daemon = subprocess.Popen(
            [*hydrafs_command(), "mount", store, mountpoint, "--foreground", "--log-format", "json"],
            env={**os.environ, **environment},
            cwd=ROOT,
        )
        while b"READY=1" not in supervisor.recv(1 << 16):
            pass
        return daemon, time.perf_counter() - begun


def measure(store: Path, mountpoint: Path, work: Path, *, repeat: int, idle_seconds: float) -> list[Measured]:
    """All rows."""
    starts = []
    for run in range(repeat):
        daemon, seconds = start(store, mountpoint, work)
        starts.append(seconds)
        if run < repeat - 1:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
    try:
        scan(mountpoint)
        time.sleep(5)  # until what follows a listing is done
        say(f"nobody reads for {idle_seconds:.0f} s")
        none, helpers = Usage(0, 0, 0), helpers_of(daemon.pid)
        before = sum(map(Usage.of, helpers), Usage.of(daemon.pid))
        time.sleep(idle_seconds)
        served, helping = Usage.of(daemon.pid), sum(map(Usage.of, helpers), none)
        after = served + helping
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    minutes = idle_seconds / 60
    return [
        Measured("imports", median([seconds_of_imports() for _ in range(repeat)]), "s", 0.4),
        Measured("start to readiness", median(starts), "s", 1.0),
        Measured("memory when idle", served.rss_nbytes / 1e6, "MB", 80),
        *([Measured("memory of its worker", helping.rss_nbytes / 1e6, "MB", 80)] if helpers else []),
        Measured("wakeups a minute when idle", (after.wakeups - before.wakeups) / minutes, "", 1),
        Measured(
            "processor time a minute when idle", 1000 * (after.cpu_seconds - before.cpu_seconds) / minutes, "ms", 10
        ),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--count", type=int, default=1000, help="how many diffs")
    parser.add_argument("--repeat", type=int, default=5, help="starts")
    parser.add_argument("--idle", type=float, default=180, metavar="SECONDS", help="how long nobody reads")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the fine-tune")
    parser.add_argument("--quick", action="store_true", help="200 diffs, idle for 5 s: a test of the benchmark")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (- for standard output)"
    )
    args = parser.parse_args()
    if args.quick:
        args.count, args.repeat, args.steps, args.idle = min(args.count, 200), 2, min(args.steps, 4), 5
    folder = bench_folder(args.folder)
    work = Path(tempfile.mkdtemp(prefix="service-", dir=folder))
    mountpoint = work / "mount"
    mountpoint.mkdir()
    try:
        store = work / "store"
        make_store(work, store, folder, count=args.count, steps=args.steps)
        rows = measure(store, mountpoint, work, repeat=args.repeat, idle_seconds=args.idle)
        print_table(
            f"A service with {args.count:,} diffs",
            ["", "", "", "at most", ""],
            [[r.what, number(r.value, 2), r.unit, number(r.below, 1), r.met] for r in rows],
        )
        write_json(args.json, {"count": args.count, "rows": [{**asdict(r), "met": r.met} for r in rows]})
    finally:
        if not mountpoint.is_mount():
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
