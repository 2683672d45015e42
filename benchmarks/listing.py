"""The table *list*: a store of 10,000 diffs, mounted and listed.

The diffs are copies of one real fine-tune: a slice of all-MiniLM-L6-v2 in fp16, large enough that the 64 KiB at
0x100000, which A1111 reads of every model at every listing, lie inside a tensor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import bench_folder, hydrafs, median, number, print_table, say, write_json
from benchmarks.machine import Mount, drop_caches, read_into_cache
from benchmarks.pairs import STEPS, make_pairs

OLD_HASH_OFFSET = 0x100000
OLD_HASH_NBYTES = 64 << 10
MODEL_NBYTES = 1_400_000
CACHE_MIB = 1024
SAMPLE = 200
BOUND_COUNT = 10_000  # what the bounds are meant for


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: what was done to all the models, the median of its seconds, and what it should stay below."""

    what: str
    seconds: float
    below_seconds: float | None = None


def make_slice(pairs_folder: Path, folder: Path, steps: int) -> tuple[Path, Path]:
    """A small base and its fine-tune in ``folder``: the first tensors of the fp16 pair, up to ``MODEL_NBYTES``."""
    from safetensors.torch import load_file, save_file

    pair = next(p for p in make_pairs(pairs_folder, steps=steps) if p.name == "1e-6 fp16")
    base, tuned = load_file(pair.base), load_file(pair.tuned)
    chosen, nbytes = [], 0
    for name in sorted(base):
        size = base[name].numel() * base[name].element_size()
        if name.startswith("encoder.") and nbytes + size <= MODEL_NBYTES:
            chosen.append(name)
            nbytes += size
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for state, path in zip((base, tuned), paths, strict=True):
        save_file({name: state[name] for name in chosen}, path, metadata={"format": "pt"})
    return paths


def make_store(folder: Path, store: Path, pairs_folder: Path, *, count: int, steps: int) -> list[str]:
    """A store of ``count`` diffs in one folder, and the models' names."""
    store.mkdir()
    base, tuned = make_slice(pairs_folder, store, steps)
    tuned = tuned.rename(folder / tuned.name)
    hydrafs("dehydrate", tuned, "--store", store, "--base", base)
    diff = store / f"{tuned.name}.hydra"
    content = diff.read_bytes()
    diff.unlink()
    say(f"writing {count} diffs of {len(content) / 1e3:.0f} kB")
    names = [f"style-{i:05}.safetensors" for i in range(count)]
    for name in names:
        (store / f"{name}.hydra").write_bytes(content)
    return names


def read_header(path: Path) -> None:
    """A safetensors header, as a WebUI reads it for its metadata."""
    with path.open("rb") as file:
        file.read(int.from_bytes(file.read(8), "little"))


def read_old_hash(path: Path) -> None:
    """The 64 KiB that A1111's old eight-character hash is taken of."""
    with path.open("rb") as file:
        file.seek(OLD_HASH_OFFSET)
        got = len(file.read(OLD_HASH_NBYTES))
    assert got == OLD_HASH_NBYTES, f"{path} is too small: {got} bytes at {OLD_HASH_OFFSET:#x}"


def scan(folder: Path) -> None:
    """What programs do to find models: walk and stat."""
    for root, _, names in os.walk(folder, followlinks=True):
        for name in names:
            os.stat(os.path.join(root, name))


def decoded_chunks(store: Path, names: list[str]) -> tuple[float, float] | None:
    """Chunks decoded for each model's header and for its old hash, counted on the tree of a mount, without FUSE."""
    try:
        from hydrafs.vfs import StoreTree
    except ImportError:
        return None
    tree = StoreTree(store, cache_nbytes=64 << 20)
    tree.start()
    try:
        counts = []
        for offset, nbytes in ((0, 4096), (OLD_HASH_OFFSET, OLD_HASH_NBYTES)):
            before = tree.statistics().misses
            for name in names:
                file = tree.open(f"/{name}", os.O_RDONLY)
                file.pread_into(offset, memoryview(bytearray(nbytes)))
                file.close()
            counts.append((tree.statistics().misses - before) / len(names))
    finally:
        tree.stop()
    return counts[0], counts[1]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(store: Path, mountpoint: Path, names: list[str], repeat: int) -> tuple[list[Measured], int]:
    """All rows, and the daemon's peak RSS in bytes. Each repetition has a new daemon, the first one cold caches."""
    rows: dict[str, list[float]] = {}
    rss = 0

    def row(what: str, seconds: float) -> None:
        rows.setdefault(what, []).append(seconds)

    paths = [mountpoint / name for name in names]

    def list_all() -> None:
        subprocess.run(["ls", "-l", mountpoint], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

    def read_all(*readers: Callable[[Path], None]) -> float:
        return _seconds(lambda: [reader(path) for path in paths for reader in readers])

    for run in range(repeat):
        if run == 0:
            drop_caches([store / f"{name}.hydra" for name in names])
        with Mount(store, mountpoint, cache_mib=CACHE_MIB) as mount:
            row("mount, first time, caches cold" if run == 0 else "mount", mount.seconds)
            suffix = ", caches cold" if run == 0 else ""
            row(f"ls -l{suffix}", _seconds(list_all))
            row("ls -l again", _seconds(list_all))
            row("walk and stat", _seconds(lambda: scan(mountpoint)))
            if run == 0:
                for name in names:
                    read_into_cache(store / f"{name}.hydra")
            row("header of each", read_all(read_header))
            row("64 KiB at 0x100000 of each", read_all(read_old_hash))
            row("both again", read_all(read_header, read_old_hash))
            rss = max(rss, mount.peak_rss_nbytes())
    webui = store.parent / "webui"
    webui.mkdir()
    row("hashes --webui", _seconds(lambda: hydrafs("hashes", store, "--webui", webui, "--checkpoints", store)))
    with Mount(store, mountpoint, cache_mib=CACHE_MIB) as mount:
        row("64 KiB at 0x100000 of each, after it", read_all(read_old_hash))
        row("the same again", read_all(read_old_hash))
    bounds = {"mount": 2.0, "ls -l": 2.5} if len(names) >= BOUND_COUNT else {}
    return [
        Measured(what, median(seconds), next((b for word, b in bounds.items() if what.startswith(word)), None))
        for what, seconds in rows.items()
    ], rss


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--count", type=int, default=10_000, help="how many diffs")
    parser.add_argument("--repeat", type=int, default=4, help="mounts; the first has cold caches")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the fine-tune")
    parser.add_argument("--quick", action="store_true", help="200 diffs of a short fine-tune: a test of the benchmark")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (- for standard output)"
    )
    args = parser.parse_args()
    if args.quick:
        args.count, args.repeat, args.steps = min(args.count, 200), 2, min(args.steps, 4)
    folder = bench_folder(args.folder)
    work = Path(tempfile.mkdtemp(prefix="list-", dir=folder))
    try:
        store = work / "store"
        names = make_store(work, store, folder, count=args.count, steps=args.steps)
        rows, rss = measure(store, work / "mount", names, args.repeat)
        print_table(
            f"Listing {args.count:,} diffs",
            ["", "seconds", "for each, ms", "to stay below", ""],
            [
                [
                    row.what,
                    number(row.seconds, 3),
                    "" if row.what.startswith("mount") else number(1000 * row.seconds / args.count, 3),
                    "" if row.below_seconds is None else f"{row.below_seconds:.2f} s",
                    "" if row.below_seconds is None else "met" if row.seconds < row.below_seconds else "NOT met",
                ]
                for row in rows
            ],
        )
        print(f"\nthe daemon's peak RSS: {rss / 1e6:,.0f} MB with a cache of {CACHE_MIB} MiB")
        told = decoded_chunks(store, names)
        shutil.rmtree(store / ".hydrafs")
        decoded = decoded_chunks(store, names[:SAMPLE])
        if decoded and told:
            print(
                f"chunks decoded for each model: {decoded[0]:.2f} for the header, "
                f"{decoded[1]:.2f} for the 64 KiB at {OLD_HASH_OFFSET:#x}, {told[1]:.2f} after hashes --webui"
            )
        write_json(
            args.json,
            {"count": args.count, "rows": [asdict(r) for r in rows], "rss": rss, "decoded": decoded, "told": told},
        )
    finally:
        if not (work / "mount").is_mount():
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
