"""What the benchmarks share: their folder, the CPU clock, running `hydrafs`, tables."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    """A line of progress, apart from the tables."""
    print(f"# {text}", file=sys.stderr, flush=True)


def bench_folder(named: Path | None = None) -> Path:
    """Where models are kept between runs: ``named``, else ``HYDRAFS_BENCH``, else ``.bench`` in the checkout."""
    folder = named or Path(os.environ.get("HYDRAFS_BENCH") or ROOT / ".bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def hydrafs_command() -> list[str]:
    """The command line of the hydrafs that belongs to this Python."""
    script = Path(sys.executable).parent / "hydrafs"
    return (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "import sys; from hydrafs.cli import main; sys.exit(main())"]
    )


def hydrafs(*arguments: str | os.PathLike[str]) -> str:
    """What `hydrafs ARGUMENTS` prints; ends the benchmark where it fails, with what it said."""
    command = [*hydrafs_command(), *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"hydrafs {' '.join(command[-len(arguments) :])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Timed:
    """How long something took: by the wall clock, and in CPU seconds of this process and its finished children."""

    seconds: float
    cpu_seconds: float


@contextmanager
def timing() -> Iterator[Callable[[], Timed]]:
    """Times its block; the function it gives answers after the block's end."""
    result: list[Timed] = []
    wall, cpu = time.perf_counter(), _cpu()
    yield lambda: result[0]
    result.append(Timed(time.perf_counter() - wall, _cpu() - cpu))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def link_or_copy(source: Path, target: Path) -> None:
    """``target`` with the content of ``source``, at no cost where both are on one filesystem."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def number(value: float | None, digits: int = 1) -> str:
    """``value`` for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table: the first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def write_json(path: Path | None, table: object) -> None:
    """``table`` as JSON into ``path``, or to standard output for ``-``."""
    if path is None:
        return
    text = json.dumps(table, indent=2)
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n")
