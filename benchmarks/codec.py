"""The table *codec*: how fast one core decodes and encodes with ``rans``, by each decoder that works here.

Everything runs in this thread on tensors in memory; speed is bytes of model per second of this thread's CPU time, so
that other work on the machine shows as little as it can. The middle of several runs counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import bench_folder, median, number, print_table, say, write_json
from benchmarks.pairs import STEPS, Pair, make_pairs
from benchmarks.peers import Matched, ZipNN, matched_tensors
from hydrafs.codecs import rans, registry

CASE = "2e-5 fp16"
NO_PREDICTION = ("2e-5 fp16", "2e-5 bf16", "2e-5 fp32")
CHUNKS = (256 << 10, 1 << 20)
LARGE_NBYTES = 256 << 10
"""Tensors from here on are measured: a full chunk and more."""

DECODE_BOUNDS = {"avx512": 1.5, "avx2": 0.9, "portable": 0.4}
ENCODE_BOUND = 0.3
NO_PREDICTION_BOUND = 1.5


@dataclass(frozen=True, slots=True)
class Measured:
    """One decoder with one size of chunks. Speeds are in GB of model per CPU second; 0 where not timed.

    ``encode_gb_s`` has the tables at hand, ``train_encode_gb_s`` makes them from the whole tensor first.
    """

    case: str
    level: str
    chunk_nbytes: int
    nbytes: int
    stored_nbytes: int
    decode_gb_s: float
    encode_gb_s: float
    train_encode_gb_s: float
    exact: bool

    @property
    def label(self) -> str:
        """Its name in a table."""
        return f"{self.level}, {self.chunk_nbytes >> 10} KiB"


def cpu_seconds(work: Callable[[], object], repeat: int) -> float:
    """The median CPU time of this thread in ``work``, after one run that does not count."""
    work()
    taken = []
    for _ in range(repeat):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return max(median(taken), 1e-9)


def measure(
    case: str, tensors: Sequence[Matched], level: str, chunk_nbytes: int, repeat: int, *, encoding: bool
) -> Measured:
    """Trains on, encodes and decodes ``tensors`` with the decoder ``level``; without ``encoding`` that is not timed."""
    codec = registry.by_name("rans")
    rans.force(level)
    work = []  # of each tensor: its element type; of its chunks the prediction, the target, where it is decoded to
    for tensor in tensors:
        out = np.empty_like(tensor.target)
        chunks = [(tensor.prediction(at), tensor.target[at], out[at]) for at in tensor.chunks(chunk_nbytes)]
        work.append((tensor.dtype, chunks))

    def train() -> list[bytes]:
        return [codec.train([(known, target) for known, target, _ in chunks], dtype) for dtype, chunks in work]

    def encode(tables: list[bytes]) -> list[list[bytes]]:
        return [
            [codec.encode(known, target, dtype, params) for known, target, _ in chunks]
            for params, (dtype, chunks) in zip(tables, work, strict=True)
        ]

    def decode() -> None:
        for params, (dtype, chunks), coded in zip(tables, work, payloads, strict=True):
            for (known, _, out), payload in zip(chunks, coded, strict=True):
                codec.decode_into(known, payload, out, dtype, params)

    tables = train()
    payloads = encode(tables)
    gigabytes = sum(tensor.target.size for tensor in tensors) / 1e9
    decode_gb_s = gigabytes / cpu_seconds(decode, repeat)
    few = max(1, repeat // 2)
    return Measured(
        case,
        level,
        chunk_nbytes,
        round(gigabytes * 1e9),
        sum(map(len, tables)) + sum(len(payload) for coded in payloads for payload in coded),
        decode_gb_s,
        gigabytes / cpu_seconds(lambda: encode(tables), few) if encoding else 0.0,
        gigabytes / cpu_seconds(lambda: encode(train()), few) if encoding else 0.0,
        all(np.array_equal(out, target) for _, chunks in work for _, target, out in chunks),
    )


def large_tensors(pair: Pair, *, predicted: bool, quick: bool) -> list[Matched]:
    """The tensors to measure; only a few small ones for a test of the benchmark."""
    found = [
        t
        for t in matched_tensors(pair)
        if t.target.size >= LARGE_NBYTES and t.dtype.kind == "float" and t.base is not None
    ]
    if quick:
        found = sorted(found, key=lambda tensor: tensor.target.size)[:3]
    return found if predicted else [replace(tensor, base=None) for tensor in found]


def whole_percent(pair: Pair) -> float:
    """What rans stores of the whole file with no prediction; a tensor that it cannot shrink stays as it is."""
    codec = registry.by_name("rans")
    stored = pair.tuned.stat().st_size
    for tensor in matched_tensors(pair):
        chunks = [(None, tensor.target[at]) for at in tensor.chunks(CHUNKS[-1])]
        params = codec.train(chunks, tensor.dtype)
        coded = len(params) + sum(len(codec.encode(*chunk, tensor.dtype, params)) for chunk in chunks)
        stored -= max(tensor.target.size - coded, 0)
    return 100 * stored / pair.tuned.stat().st_size


def zipnn_percent(pair: Pair, folder: Path) -> float | str:
    """What zipnn stores of the whole file, or why that is not known."""
    peer = ZipNN(xor=False)
    return peer.absent() or 100 * peer.pack(pair, folder) / pair.tuned.stat().st_size


def verdict(what: str, value: float, bound: float) -> None:
    """Prints one line: a speed, what it is to reach, and whether it does."""
    print(f"{what}: {value:.2f} GB/s, to reach {bound}: {'met' if value >= bound else 'NOT met'}")


def print_predicted(results: Sequence[Measured]) -> None:
    """The table of the predicted case, and its bounds."""
    rows = [
        [r.label, *(number(v, 2) for v in (r.decode_gb_s, r.encode_gb_s, r.train_encode_gb_s)), _percent(r)]
        for r in results
    ]
    header = ["", "decode", "encode", "train + encode", "stored %"]
    print_table(f"rans, {CASE}, prediction included, GB/s per core", header, rows)
    print()
    for r in results:
        if r.level in DECODE_BOUNDS:
            verdict(f"decode {r.label}", r.decode_gb_s, DECODE_BOUNDS[r.level])
        verdict(f"encode {r.label}, tables at hand", r.encode_gb_s, ENCODE_BOUND)
        verdict(f"encode {r.label}, training included", r.train_encode_gb_s, ENCODE_BOUND)


def print_unpredicted(results: Sequence[Measured], sizes: dict[str, tuple[float, float | str]]) -> None:
    """The table of tensors with nothing to predict from, and its bounds."""
    rows = [[f"{r.case}, {r.label}", number(r.decode_gb_s, 2), _percent(r)] for r in results]
    print_table("rans, no prediction, GB/s per core", ["", "decode", "stored %"], rows)
    print()
    for r in results:
        if r.level == results[0].level:  # the fastest
            verdict(f"decode {r.case}, no prediction, {r.label}", r.decode_gb_s, NO_PREDICTION_BOUND)
    for case, (ours, other) in sizes.items():
        if isinstance(other, str):
            print(f"{case}: rans stores {ours:.2f} % of the file with no prediction; not compared: {other}")
        else:
            met = "met" if ours <= other else "NOT met"
            print(f"{case}: rans stores {ours:.2f} % of the file with no prediction, zipnn {other:.2f} %: {met}")


def _percent(result: Measured) -> str:
    return number(100 * result.stored_nbytes / result.nbytes, 2)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where models are kept (default: .bench, HYDRAFS_BENCH)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the fine-tunes")
    parser.add_argument("--repeat", type=int, default=9, help="timed runs; the median counts")
    parser.add_argument("--quick", action="store_true", help="few tensors, one run each: a test of the benchmark")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the numbers to FILE (- for standard output)"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeat = min(args.steps, 4), 1
    levels = [level for level in rans.levels() if level != rans.REFERENCE]
    if not levels:
        raise SystemExit(f"nothing to measure: {rans.level()}; install a C compiler, then hydrafs anew")
    folder = bench_folder(args.folder)
    pairs = {pair.name: pair for pair in make_pairs(folder, steps=args.steps)}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    def run(case: str, *, predicted: bool) -> list[Measured]:
        tensors = large_tensors(pairs[case], predicted=predicted, quick=args.quick)
        results = []
        for level in levels:
            say(f"{case}: {level}{'' if predicted else ', no prediction'}")
            results += [measure(case, tensors, level, size, args.repeat, encoding=predicted) for size in CHUNKS]
        rans.force("")
        return results

    predicted = run(CASE, predicted=True)
    unpredicted = [result for case in NO_PREDICTION for result in run(case, predicted=False)]
    with tempfile.TemporaryDirectory(prefix="codec-", dir=folder) as work:
        sizes = {c: (whole_percent(pairs[c]), zipnn_percent(pairs[c], Path(work))) for c in NO_PREDICTION}
    print_predicted(predicted)
    print_unpredicted(unpredicted, sizes)
    wrong = [f"{r.case} {r.label}" for r in (*predicted, *unpredicted) if not r.exact]
    print(f"\nNOT exact: {', '.join(wrong)}" if wrong else "\nEverything came back unchanged.")
    write_json(
        args.json,
        {"predicted": [asdict(r) for r in predicted], "unpredicted": [asdict(r) for r in unpredicted], "sizes": sizes},
    )


if __name__ == "__main__":
    main()
