"""The table *read*: loaders on a model in the mount, against the same model as a plain file.

Cold means that nothing is in the page cache and the daemon is new; the base is then in the page cache ("base warm") or
not. Warm means that the whole file was read before, by the clients of another FUSE filesystem too: what FUSE costs on
this kernel is no fault of hydrafs. The sides alternate; medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import clients
from benchmarks.common import (
    bench_folder,
    hydrafs,
    link_or_copy,
    median,
    number,
    print_table,
    say,
    timing,
    write_json,
)
from benchmarks.machine import AnyFuse, Mount, disk_nbytes_read, drop_caches, read_into_cache
from benchmarks.sdmodel import Models, make_models

CLIENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cat": (clients.cat, "safetensors"),
    "sha256sum": (clients.sha256sum, "safetensors"),
    "load_file": (clients.load_file, "safetensors"),
    "load_file, pages touched": (clients.touch_pages, "safetensors"),
    "8 threads of pread": (clients.threaded_pread, "safetensors"),
    "torch.load": (clients.torch_load, "ckpt"),
    "torch.load mmap, pages touched": (clients.torch_load_mapped, "ckpt"),
    "first byte": (clients.first_byte, "safetensors"),
}

STATES = ("cold, base warm", "cold, base cold", "warm")
COLD_GB_S = 0.7
FIRST_BYTE_SECONDS = 0.05
WARM_RATIO = {"cat": 0.4}
WARM_RATIO.update(
    dict.fromkeys(
        ("sha256sum", "load_file", "load_file, pages touched", "torch.load", "torch.load mmap, pages touched"), 0.9
    )
)
RSS_ABOVE_CACHE_NBYTES = 300_000_000
DEHYDRATE_MB_S = 150
BOUNDS = (
    f"to reach: cold cat, base warm >= {COLD_GB_S} GB/s; warm >= 0.9 x plain for sha256sum, load_file, torch.load and\n"
    f"mmap, >= 0.4 x for cat; first byte < {1000 * FIRST_BYTE_SECONDS:.0f} ms; dehydrate with proof >= "
    f"{DEHYDRATE_MB_S} MB/s; the daemon's RSS <= cache + {RSS_ABOVE_CACHE_NBYTES / 1e6:.0f} MB"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One client in one state: medians. Disk bytes and RSS are those of the mount's runs."""

    client: str
    state: str
    plain_seconds: float
    mount_seconds: float
    model_nbytes: int
    plain_disk_nbytes: float
    mount_disk_nbytes: float
    daemon_rss_nbytes: int
    any_fuse_seconds: float | None = None
    """The same client on the plain file, passed through by another FUSE filesystem."""

    @property
    def ratio(self) -> float:
        """How fast the mount is, relative to the plain file."""
        return self.plain_seconds / self.mount_seconds

    def bound(self) -> tuple[str, bool] | None:
        """What is to be reached here, and whether it is."""
        if self.client == "first byte":
            return f"< {1000 * FIRST_BYTE_SECONDS:.0f} ms", self.mount_seconds < FIRST_BYTE_SECONDS
        if self.state == "cold, base warm" and self.client == "cat":
            return f">= {COLD_GB_S} GB/s", self.model_nbytes / self.mount_seconds / 1e9 >= COLD_GB_S
        if self.state == "warm" and self.client in WARM_RATIO:
            return f">= {WARM_RATIO[self.client]} x", self.ratio >= WARM_RATIO[self.client]
        return None


@dataclass(frozen=True, slots=True)
class Dehydrated:
    """What dehydrating one model took, with the proof by reading back, and what it left: medians."""

    name: str
    state: str
    model_nbytes: int
    diff_nbytes: int
    seconds: float
    cpu_seconds: float


class Reading:
    """The benchmark's store, its models, and the ways to bring the machine into a state."""

    def __init__(self, models: Models, work: Path, cache_mib: int) -> None:
        self.models = models
        self.store = work / "store"
        self.mountpoint = work / "mount"
        self.cache_mib = cache_mib
        self.base = self.store / models.base.name
        link_or_copy(models.base, self.base)

    def dehydrate(self, state: str, repeat: int) -> list[Dehydrated]:
        """Makes the diffs, originals kept. ``state`` is what the page cache holds of model and base: all, or nothing.
        Each time the base is new to the store, so its SHA-256 has to be taken too."""
        done = []
        for model in (self.models.tuned, self.models.checkpoint):
            diff = self.store / f"{model.name}.hydra"
            runs = []
            for _ in range(repeat):
                say(f"dehydrating {model.name}, {state}")
                diff.unlink(missing_ok=True)
                shutil.rmtree(self.store / ".hydrafs", ignore_errors=True)
                if state == "cold":
                    self.drop()
                else:
                    read_into_cache(model)
                    read_into_cache(self.base)
                with timing() as timed:
                    hydrafs("dehydrate", model, "--store", self.store, "--base", self.base, "--keep")
                runs.append((timed().seconds, timed().cpu_seconds))
            seconds, cpu_seconds = (median(column) for column in zip(*runs, strict=True))
            sizes = model.stat().st_size, diff.stat().st_size
            done.append(Dehydrated(model.name, state, *sizes, seconds, cpu_seconds))
        return done

    def mount(self) -> Mount:
        """A new daemon."""
        return Mount(self.store, self.mountpoint, cache_mib=self.cache_mib)

    def pair(self, container: str) -> tuple[Path, Path]:
        """The plain model and the one in the mount."""
        plain = self.models.tuned if container == "safetensors" else self.models.checkpoint
        return plain, self.mountpoint / plain.name

    def drop(self) -> None:
        """Nothing of any file in the page cache."""
        drop_caches([self.models.tuned, self.models.checkpoint, *(p for p in self.store.iterdir() if p.is_file())])

    def cold(self, name: str, *, base_warm: bool, repeat: int) -> Measured:
        """``repeat`` runs of a client on each side, every one with dropped caches and a new daemon."""
        client, container = CLIENTS[name]
        plain, mounted = self.pair(container)
        runs: list[tuple[float, int, float, int, int]] = []
        for _ in range(repeat):
            self.drop()
            plain_seconds, plain_disk = self._timed(client, plain)
            self.drop()
            with self.mount() as mount:
                if base_warm:
                    read_into_cache(self.base)
                seconds, disk = self._timed(client, mounted)
                rss = mount.peak_rss_nbytes()
            runs.append((plain_seconds, plain_disk, seconds, disk, rss))
        return self._measured(name, f"cold, base {'warm' if base_warm else 'cold'}", plain, runs)

    def warm(self, name: str, mount: Mount, any_fuse: AnyFuse | None, *, repeat: int) -> Measured:
        """``repeat`` runs of a client on each side, after one that is not counted."""
        client, container = CLIENTS[name]
        plain, mounted = self.pair(container)
        passed = [any_fuse.mountpoint / plain.name] if any_fuse else []
        for path in (plain, mounted, *passed):
            read_into_cache(path)
            clients.timed_in_child(client, path)
        runs = []
        others = []
        for _ in range(repeat):
            sides = (*self._timed(client, plain), *self._timed(client, mounted))
            runs.append((*sides, mount.peak_rss_nbytes()))
            others += [self._timed(client, path)[0] for path in passed]
        measured = self._measured(name, "warm", plain, runs)
        return replace(measured, any_fuse_seconds=median(others)) if others else measured

    def any_fuse(self, mountpoint: Path) -> contextlib.AbstractContextManager[AnyFuse | None]:
        """The plain models through another FUSE filesystem, where there is one."""
        if AnyFuse.is_there():
            return AnyFuse(self.models.tuned.parent, mountpoint)
        say(f"{AnyFuse.COMMAND} is not installed: the warm table goes without it")
        return contextlib.nullcontext()

    def _timed(self, client: Callable[[Path], None], path: Path) -> tuple[float, int]:
        before = disk_nbytes_read(self.base)
        seconds = clients.timed_in_child(client, path)
        return seconds, disk_nbytes_read(self.base) - before

    @staticmethod
    def _measured(name: str, state: str, plain: Path, runs: list[tuple[float, int, float, int, int]]) -> Measured:
        plain_seconds, plain_disk, seconds, disk, _ = (median(column) for column in zip(*runs, strict=True))
        rss = max(run[4] for run in runs)
        return Measured(name, state, plain_seconds, seconds, plain.stat().st_size, plain_disk, disk, rss)


def print_results(results: list[Measured], dehydrated: list[Dehydrated], cache_mib: int) -> None:
    """The tables, each with its bounds."""
    print(BOUNDS)
    if dehydrated:
        print_dehydrated(dehydrated)
    for state in dict.fromkeys(r.state for r in results):
        rows = []
        with_other = any(r.any_fuse_seconds for r in results if r.state == state)
        for r in (r for r in results if r.state == state):
            times = [r.plain_seconds, r.mount_seconds, *([r.any_fuse_seconds or 0.0] if with_other else [])]
            if r.client == "first byte":
                speeds = [f"{1000 * s:.2f} ms" for s in times]
            else:
                speeds = [f"{r.model_nbytes / s / 1e9:.2f} GB/s" for s in times]
            disk = [number(nbytes / 1e6, 0) for nbytes in (r.plain_disk_nbytes, r.mount_disk_nbytes)]
            wanted, met = r.bound() or ("", None)
            rows.append(
                [
                    r.client,
                    *speeds,
                    f"{r.ratio:.2f} x",
                    *([f"{times[2] / r.mount_seconds:.2f} x"] if with_other else []),
                    *disk,
                    number(r.daemon_rss_nbytes / 1e6, 0),
                    wanted,
                    _verdict(met),
                ]
            )
        other = [AnyFuse.COMMAND] if with_other else []
        ratios = ["mount/plain", *(f"mount/{name}" for name in other)]
        header = ["", "plain", "mount", *other, *ratios, "plain disk MB", "mount disk MB", "daemon MB", "to reach", ""]
        print_table(f"Reading, {state}", header, rows)
    if results:
        peak, limit = max(r.daemon_rss_nbytes for r in results), (cache_mib << 20) + RSS_ABOVE_CACHE_NBYTES
        print(
            f"\nthe daemon's peak RSS: {peak / 1e6:,.0f} MB with a cache of {cache_mib} MiB; "
            f"to reach <= {limit / 1e6:,.0f} MB: {_verdict(peak <= limit)}"
        )


def print_dehydrated(dehydrated: list[Dehydrated]) -> None:
    """The table of dehydrating."""
    print_table(
        "Dehydrate, with the SHA-256 of the base and the proof by reading back",
        ["", "page cache", "model MB", "diff MB", "stored %", "seconds", "CPU s", "MB/s", "to reach", ""],
        [
            [
                d.name,
                d.state,
                number(d.model_nbytes / 1e6),
                number(d.diff_nbytes / 1e6),
                number(100 * d.diff_nbytes / d.model_nbytes, 2),
                number(d.seconds, 2),
                number(d.cpu_seconds, 2),
                number(d.model_nbytes / 1e6 / d.seconds, 0),
                f">= {DEHYDRATE_MB_S} MB/s",
                _verdict(d.model_nbytes / 1e6 / d.seconds >= DEHYDRATE_MB_S),
            ]
            for d in dehydrated
        ],
    )


def _verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "NOT met"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians count")
    parser.add_argument("--cache-mib", type=int, default=1024, help="the daemon's cache")
    parser.add_argument(
        "--shrink", type=int, default=1, choices=(1, 2, 4, 8), help="a model with all widths divided by this"
    )
    parser.add_argument(
        "--client", action="append", default=[], metavar="TEXT", help="only clients with this in their name"
    )
    parser.add_argument(
        "--state",
        action="append",
        default=[],
        metavar="TEXT",
        help="only states with this in their name, or of this name",
    )
    parser.add_argument(
        "--only", choices=("dehydrate", "read"), help="measure one of both; reading dehydrates once beforehand"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model and one run of each: a test of the benchmark"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (- for standard output)"
    )
    args = parser.parse_args()
    if args.quick:
        args.repeat, args.shrink, args.cache_mib = 1, 8, 64
    folder = bench_folder(args.folder)
    models = make_models(folder, shrink=args.shrink)
    clients.warm_imports()
    chosen = [c for c in CLIENTS if not args.client or any(text in c for text in args.client)]
    wanted = args.state or [""]
    states = [s for s in STATES if any(text == s or (text in s and text not in STATES) for text in wanted)]
    if args.only == "dehydrate":
        states = []
    work = Path(tempfile.mkdtemp(prefix="read-", dir=folder))
    try:
        reading = Reading(models, work, args.cache_mib)
        if args.only == "read":
            reading.dehydrate("warm", 1)
            dehydrated = []
        else:
            dehydrated = [d for state in ("cold", "warm") for d in reading.dehydrate(state, args.repeat)]
        results = []
        for state in states:
            if state == "warm":
                with reading.mount() as mount, reading.any_fuse(work / "any-fuse") as other:
                    for name in chosen:
                        say(f"{state}: {name}")
                        results.append(reading.warm(name, mount, other, repeat=args.repeat))
                continue
            for name in chosen:
                say(f"{state}: {name}")
                results.append(reading.cold(name, base_warm=state.endswith("warm"), repeat=args.repeat))
        print_results(results, dehydrated, args.cache_mib)
        if args.shrink != 1:
            print("this was a small model: whether a number is reached says nothing")
        facts = {"cache_mib": args.cache_mib, "dehydrate": [asdict(d) for d in dehydrated]}
        write_json(args.json, {**facts, "read": [asdict(r) for r in results]})
    finally:
        if not any((work / name).is_mount() for name in ("mount", "any-fuse")):
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
