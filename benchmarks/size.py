"""The table *size*: what each method stores of a real fine-tune, and how fast one core does it.

Everything runs on one core. Speed is the size of the model per CPU second, so that other work on the machine does not
show; the best of a few runs for what is quick.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import bench_folder, number, print_table, say, timing, write_json
from benchmarks.pairs import STEPS, Pair, make_pairs
from benchmarks.peers import Computed, Floor, Hydrafs, Peer, XorPlanes, all_peers

BOUNDS = {
    "1e-6 fp16": 0.61,
    "2e-5 fp16": 0.76,
    "1e-6 bf16": 0.45,
    "2e-5 bf16": 0.68,
    "1e-6 fp32": 0.89,
    "2e-5 fp32": 0.82,
}
"""What part hydrafs must store, at most, of what XOR + byte planes + zstd does."""

FLOOR_BOUND = 1.015
"""How far above the floor hydrafs may store."""

QUICK_SECONDS = 3.0
"""What takes less than this is run again, up to ``--repeat`` times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One method on one pair. Speeds are in MB of model per CPU second, none for computed sizes; ``wrong`` counts what
    came back changed."""

    method: str
    case: str
    stored_nbytes: int
    stored_percent: float
    encode_mb_s: float | None
    decode_mb_s: float | None
    wrong: int


def measure(peer: Peer, pair: Pair, folder: Path, repeat: int) -> Measured:
    """Packs and unpacks ``pair`` with ``peer``, and checks what came out."""
    size = pair.tuned.stat().st_size
    if isinstance(peer, Computed):
        stored = peer.pack(pair, folder)
        return Measured(peer.name, pair.name, stored, 100 * stored / size, None, None, 0)
    stored = 0

    def pack() -> None:
        nonlocal stored
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        stored = peer.pack(pair, folder)

    encode = _best(pack, repeat)
    decode = _best(lambda: peer.unpack(pair, folder), repeat)
    wrong = peer.check(pair, folder)
    return Measured(peer.name, pair.name, stored, 100 * stored / size, size / 1e6 / encode, size / 1e6 / decode, wrong)


def _best(work: Callable[[], object], repeat: int) -> float:
    """The least CPU seconds that ``work`` took."""
    taken: list[float] = []
    while not taken or (len(taken) < repeat and sum(taken) < QUICK_SECONDS):
        with timing() as timed:
            work()
        taken.append(timed().cpu_seconds)
    return max(min(taken), 1e-6)


def print_results(results: list[Measured], absent: dict[str, str]) -> None:
    """The tables, the ratios, and what could not run."""
    methods = list(dict.fromkeys(r.method for r in results))
    cases = list(dict.fromkeys(r.case for r in results))
    found = {(r.method, r.case): r for r in results}

    def table(title: str, cell: Callable[[Measured], str]) -> None:
        rows = [[m, *(cell(found[m, c]) if (m, c) in found else "-" for c in cases)] for m in methods]
        print_table(title, ["", *cases], rows)

    table("Stored bytes, % of the whole file (less is better)", lambda r: number(r.stored_percent, 2))
    table(f"Stored bytes, relative to {XorPlanes.name}", lambda r: _relative(found, r))
    table("Encode, MB/s per core", lambda r: number(r.encode_mb_s, 0))
    table("Decode, MB/s per core", lambda r: number(r.decode_mb_s, 0))
    inexact = [m for m in methods if any(found[m, c].wrong for c in cases if (m, c) in found)]
    if inexact:
        rows = [[m, *(f"{found[m, c].wrong:,}" if (m, c) in found else "-" for c in cases)] for m in inexact]
        print_table("Values that came back changed (all other methods: none)", ["", *cases], rows)
    else:
        print("\nEvery method gave back every value unchanged.")
    for name, reason in absent.items():
        print(f"not measured: {name} ({reason})")
    print()
    for case in cases:
        ours = found.get((Hydrafs.name, case))
        for name, bound in ((XorPlanes.name, BOUNDS.get(case)), (Floor.name, FLOOR_BOUND)):
            other = found.get((name, case))
            if ours and other and bound:
                ratio = ours.stored_nbytes / other.stored_nbytes
                met = "met" if ratio <= bound else "NOT met"
                print(f"{case}: {ratio:.3f} x {name}, to reach {bound}: {met}")


def _relative(found: dict[tuple[str, str], Measured], result: Measured) -> str:
    reference = found.get((XorPlanes.name, result.case))
    return number(result.stored_nbytes / reference.stored_nbytes, 3) if reference else "-"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the fine-tunes")
    parser.add_argument("--repeat", type=int, default=3, help="runs of what is quick; the best counts")
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help="only cases with this in their name"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="TEXT", help="only methods with this in their name"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two cases, one run each, no slow methods: a test of the benchmark"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (- for standard output)"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeat, args.case = min(args.steps, 4), 1, args.case or ["1e-6 fp16", "2e-5 bf16"]
    folder = bench_folder(args.folder)
    pairs = [p for p in make_pairs(folder, steps=args.steps) if not args.case or any(c in p.name for c in args.case)]
    # One core for this process and all it starts; torch and the codecs follow.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    absent: dict[str, str] = {}
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="size-", dir=folder) as work:
        for peer in all_peers():
            if args.method and not any(m.lower() in peer.name.lower() for m in args.method):
                continue
            if args.quick and peer.name == "xdelta3":
                absent[peer.name] = "slow"
            elif reason := peer.absent():
                absent[peer.name] = reason
            if peer.name in absent:
                continue
            for pair in pairs:
                say(f"{peer.name}: {pair.name}")
                results.append(measure(peer, pair, Path(work) / "work", args.repeat))
    print_results(results, absent)
    write_json(args.json, {"results": [asdict(r) for r in results], "absent": absent})


if __name__ == "__main__":
    main()
