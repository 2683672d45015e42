"""A process of ours, whose Python finds the modules that this one finds: hydrafs may be a package of the system, in a
folder that no other Python looks into, a wheel, or a clone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["ask_filesystems", "start"]

_CODE = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
sys_path, order = json.loads(sys.stdin.buffer.readline())
sys.path[:] = sys_path
sys.exit(getattr(importlib.import_module(module), name)(order))
"""


def start(function: str, order: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python that calls ``function`` and exits with what it returns.

    Args:
        function: ``module:name``, of this installation; seen in lists of processes.
        order: its only argument, of what JSON can say.
        options: of ``subprocess.Popen``. stdin is a pipe, which the caller closes: children mind it, to end with it.
    """
    line = json.dumps([[os.fspath(Path(entry).absolute()) for entry in sys.path], order])
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, function], stdin=subprocess.PIPE, start_new_session=True, **options
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    return process


_QUESTION = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(error.errno)
"""


def ask_filesystems(paths: Sequence[str | os.PathLike[str]], seconds: float) -> list[int | None]:
    """What statvfs(2) says of each path: an errno, 0 where it is answered, None where it is not within ``seconds``.

    Each is asked in a process of its own, all at a time: who waits for a filesystem that does not answer may be beyond
    the reach of any signal, a thread's whole process with it. Such a process is left behind, and holds nothing open.
    """
    nothing = subprocess.DEVNULL
    asked = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _QUESTION, os.fspath(path)],
            stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True,
        )
        for path in paths
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    answers: list[int | None] = []
    for process in asked:
        try:
            answers.append(process.wait(max(0.01, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            answers.append(None)
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
            if process.returncode is None:
                process.returncode = -9  # nobody waits for it any more
    return answers


def yield_to_others() -> None:
    """This process gets the processor and the disk when nobody else wants them."""
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError):  # who runs out of memory ends this first: it loses nothing by it
        Path("/proc/self/oom_score_adj").write_text("500")
    number = {"x86_64": 251, "aarch64": 30}.get(platform.machine())  # ioprio_set(2); the C library has no name for it
    if number is not None:
        with contextlib.suppress(OSError):
            ctypes.CDLL(None, use_errno=True).syscall(number, 1, 0, 3 << 13)
