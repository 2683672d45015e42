"""A process of ours, whose Python finds the modules that this one finds: hydrafs may be a package of the system, in a
folder that no other Python looks into, a wheel, or a clone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["start"]

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
