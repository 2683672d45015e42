"""The table *virtual*: making a merge that is only a recipe, and reading it through the mount.

The models are those of the table *read*: 2.1 GB in fp16 with the tensors of Stable Diffusion 1.5. What a merge is made
from is in the page cache; the merge itself is read with a new daemon and nothing cached, then once more.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import clients
from benchmarks.common import bench_folder, hydrafs, link_or_copy, median, number, print_table, say, timing, write_json
from benchmarks.machine import Mount, drop_caches, read_into_cache
from benchmarks.sdmodel import make_models

COLD_GB_S = 0.4


@dataclass(frozen=True, slots=True)
class Measured:
    """One recipe: seconds to make it, as a diff and as a real file; seconds to read it through the mount."""

    name: str
    parents: int
    size: int
    stored_nbytes: int
    virtual_seconds: float
    real_seconds: float
    cold_seconds: float
    warm_seconds: float
    plain_seconds: float


def measure(name: str, arguments: list[str], parents: list[Path], store: Path, ending: str, repeat: int) -> Measured:
    """Makes the model both ways, then reads the virtual one through a mount and the real one as it is."""
    virtual, real = store / f"virtual{ending}", store / f"real{ending}"
    for path in parents:
        read_into_cache(path)
    say(f"{name}: making it")
    with timing() as making:
        hydrafs(*arguments, "--virtual", virtual)
    with timing() as writing:
        hydrafs(*arguments, "--output", real)
    diff = virtual.with_name(virtual.name + ".hydra")
    mountpoint = store.parent / "mount"
    cold, warm, plain = [], [], []
    for _ in range(repeat):
        say(f"{name}: reading it")
        drop_caches([diff, real])
        for path in parents:
            read_into_cache(path)
        with Mount(store, mountpoint, cache_mib=1024):
            cold.append(clients.timed_in_child(clients.cat, mountpoint / virtual.name))
            warm.append(clients.timed_in_child(clients.cat, mountpoint / virtual.name))
        read_into_cache(real)
        plain.append(clients.timed_in_child(clients.cat, real))
    size, stored = real.stat().st_size, diff.stat().st_size
    diff.unlink()
    real.unlink()
    seconds = [making().seconds, writing().seconds, median(cold), median(warm), median(plain)]
    return Measured(name, len(parents), size, stored, *seconds)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians count")
    parser.add_argument("--quick", action="store_true", help="a small model, one run: a test of the benchmark")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    folder = bench_folder(args.folder)
    models = make_models(folder, shrink=8 if args.quick else 1)
    repeat = 1 if args.quick else args.repeat
    clients.warm_imports()
    work = Path(tempfile.mkdtemp(prefix="virtual-", dir=folder))
    try:
        store = work / "store"
        store.mkdir()
        a, b, c = (store / path.name for path in (models.tuned, models.base, models.checkpoint))
        for path, original in zip((a, b, c), (models.tuned, models.base, models.checkpoint), strict=True):
            link_or_copy(original, path)
        two, three = ["merge", str(a), str(b), "--alpha", "0.3"], ["merge", str(a), str(b), "--add-difference", str(c)]
        results = [
            measure("weighted sum", two, [a, b], store, ".safetensors", repeat),
            measure("weighted sum, ckpt", two, [a, b], store, ".ckpt", repeat),
            measure("add difference", three, [a, b, c], store, ".safetensors", repeat),
        ]
    finally:
        if not (work / "mount").is_mount():
            shutil.rmtree(work, ignore_errors=True)
    rows = []
    for r in results:
        speed = [r.size / s / 1e9 for s in (r.cold_seconds, r.warm_seconds, r.plain_seconds)]
        rows.append(
            [
                r.name,
                number(r.stored_nbytes / 1e3, 0),
                number(100 * r.stored_nbytes / r.size, 4),
                number(r.virtual_seconds, 1),
                number(r.real_seconds, 1),
                number(speed[0], 2),
                number(speed[0] * r.parents, 2),
                number(speed[1], 2),
                f"{r.plain_seconds / r.warm_seconds:.2f} x",
                "met" if speed[0] >= COLD_GB_S else "NOT met",
            ]
        )
    print(f"to reach: cold cat >= {COLD_GB_S} GB/s, parents in the page cache")
    header = ["", "kB", "%", "s virtual", "s real", "cold GB/s", "of parents", "warm GB/s", "warm/plain", ""]
    print_table("Virtual merges, 2.1 GB", header, rows)
    write_json(args.json, [asdict(r) for r in results])


if __name__ == "__main__":
    main()
