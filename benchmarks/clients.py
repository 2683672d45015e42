"""The programs that read models, each as a function that times itself: what ``read.py`` runs on a plain file and on a
mount.

Each runs in a child process of its own, so that nothing stays mapped or allocated from one to the next.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PREAD_NBYTES = 2 << 20
PREAD_THREADS = 8
PAGE_NBYTES = 4096


def cat(path: Path) -> None:
    """`cat FILE > /dev/null`."""
    subprocess.run(["cat", path], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def sha256sum(path: Path) -> None:
    """`sha256sum FILE`."""
    subprocess.run(["sha256sum", path], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def first_byte(path: Path) -> None:
    """One byte from the middle of the file: what a loader waits before anything comes."""
    handle = os.open(path, os.O_RDONLY)
    os.pread(handle, 1, os.fstat(handle).st_size // 2)
    os.close(handle)


def load_file(path: Path) -> None:
    """``safetensors.torch.load_file``, every tensor then copied once: it maps the file, so bytes come with the copy."""
    import safetensors.torch

    for tensor in safetensors.torch.load_file(path).values():
        tensor.clone()


def touch_pages(path: Path) -> None:
    """The same load, then one byte of each page of every tensor, in the order of the file's names."""
    import safetensors.torch
    import torch

    for tensor in safetensors.torch.load_file(path).values():
        tensor.reshape(-1).view(torch.uint8)[::PAGE_NBYTES].sum()


def torch_load(path: Path) -> None:
    """``torch.load(weights_only=True)``: reads record by record."""
    import torch

    torch.load(path, weights_only=True, map_location="cpu")


def torch_load_mapped(path: Path) -> None:
    """``torch.load(mmap=True)``, then one byte of each page of every tensor."""
    import torch

    for tensor in torch.load(path, weights_only=True, map_location="cpu", mmap=True)["state_dict"].values():
        tensor.reshape(-1).view(torch.uint8)[::PAGE_NBYTES].sum()


def threaded_pread(path: Path) -> None:
    """Eight threads of 2 MiB ``pread``, as ComfyUI's loader reads."""
    handle = os.open(path, os.O_RDONLY)
    offsets = range(0, os.fstat(handle).st_size, PREAD_NBYTES)
    with ThreadPoolExecutor(PREAD_THREADS) as pool:
        for got in pool.map(lambda offset: len(os.pread(handle, PREAD_NBYTES, offset)), offsets):
            assert got
    os.close(handle)


def warm_imports() -> None:
    """Imports what the clients use, so that no child pays for it inside a measurement."""
    import safetensors.torch
    import torch

    # A pool of threads does not survive a fork; children compute on one.
    torch.set_num_threads(1)
    assert safetensors.torch


def timed_in_child(client: Callable[[Path], None], path: Path) -> float:
    """The seconds that ``client`` takes on ``path`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(client, path, sender))
    child.start()
    sender.close()
    try:
        seconds, error = receiver.recv()
    except EOFError:
        seconds, error = 0.0, "it died"
    child.join()
    if error:
        raise SystemExit(f"{client.__name__} of {path} failed: {error} (exit code {child.exitcode})")
    return seconds


def _run(client: Callable[[Path], None], path: Path, sender: Any) -> None:
    try:
        start = time.perf_counter()
        client(path)
        sender.send((time.perf_counter() - start, ""))
    except Exception as error:
        sender.send((0.0, repr(error)))
