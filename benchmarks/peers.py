"""Other ways to store a fine-tune, each as its author meant it, to compare with.

A peer packs a model into bytes on disk or in memory and unpacks it again; ``size.py`` times both and checks the result.
All run on one thread.
"""

from __future__ import annotations

import bz2
import json
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import zstandard

from benchmarks.common import hydrafs
from benchmarks.pairs import Pair
from hydrafs.codecs import registry
from hydrafs.dtypes import DTYPES, DType

Bytes = npt.NDArray[np.uint8]


class Peer(Protocol):
    """One method. ``folder`` is an empty one to work in, the same for ``pack`` and ``unpack``."""

    name: str

    def absent(self) -> str:
        """Why it cannot run here; empty where it can."""
        ...

    def pack(self, pair: Pair, folder: Path) -> int:
        """Packs ``pair.tuned`` and tells how many bytes that took."""
        ...

    def unpack(self, pair: Pair, folder: Path) -> None:
        """Unpacks what ``pack`` left."""
        ...

    def check(self, pair: Pair, folder: Path) -> int:
        """How many bytes of what was unpacked differ (values, for a method that keeps only those); 0: it is exact."""
        ...


class Command:
    """A program: ``{base}``, ``{tuned}``, ``{packed}`` and ``{out}`` in its arguments stand for the files."""

    def __init__(self, name: str, pack: str, unpack: str) -> None:
        self.name = name
        self._pack, self._unpack = pack.split(), unpack.split()

    def absent(self) -> str:
        program = self._pack[0]
        return "" if shutil.which(program) else f"no program {program} here"

    def _run(self, command: list[str], pair: Pair, folder: Path) -> None:
        names = {"base": pair.base, "tuned": pair.tuned, "packed": folder / "packed", "out": folder / "out"}
        subprocess.run([part.format(**names) for part in command], check=True, stdin=subprocess.DEVNULL)

    def pack(self, pair: Pair, folder: Path) -> int:
        self._run(self._pack, pair, folder)
        return (folder / "packed").stat().st_size

    def unpack(self, pair: Pair, folder: Path) -> None:
        self._run(self._unpack, pair, folder)

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes((folder / "out").read_bytes(), pair.tuned.read_bytes())


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors file: where it lies, and its element type."""

    start: int
    end: int
    dtype: str

    @property
    def word_nbytes(self) -> int:
        """The size of one element."""
        return DTYPES[self.dtype].nbytes


def read_safetensors(path: Path) -> tuple[Bytes, int, dict[str, Tensor]]:
    """The whole file, the offset where tensor data starts, and the tensors by name, at offsets into the file."""
    content = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            found[name] = Tensor(begin, end, entry["dtype"])
    return content, start, found


class XorPlanes:
    """XOR with the same-named tensor, byte planes, zstd -3 for each plane of a whole tensor (as BitX and TensorX do).

    Written as well as numpy and zstandard allow, since it is what hydrafs is held against.
    """

    name = "XOR + byte planes + zstd -3"

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._result: Bytes = np.empty(0, np.uint8)

    def absent(self) -> str:
        return ""

    def pack(self, pair: Pair, folder: Path) -> int:
        compress = zstandard.ZstdCompressor(level=3, write_checksum=False).compress
        base, _, base_tensors = read_safetensors(pair.base)
        tuned, start, tensors = read_safetensors(pair.tuned)
        self._frames = [compress(tuned[:start])]
        for name, tensor in tensors.items():
            words = _words(tuned, tensor)
            other = base_tensors.get(name)
            if other is not None and other.end - other.start == tensor.end - tensor.start:
                words = words ^ _words(base, other)
            planes = np.ascontiguousarray(words.view(np.uint8).reshape(-1, tensor.word_nbytes).T)
            self._frames += [compress(plane) for plane in planes]
        return sum(map(len, self._frames))

    def unpack(self, pair: Pair, folder: Path) -> None:
        decompress = zstandard.ZstdDecompressor().decompress
        base, _, base_tensors = read_safetensors(pair.base)
        frames = iter(self._frames)
        head = decompress(next(frames))
        start = len(head)
        entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
        out = np.empty(start + max(entry["data_offsets"][1] for entry in entries.values()), np.uint8)
        out[:start] = np.frombuffer(head, np.uint8)
        for name, entry in entries.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensor = Tensor(begin, end, entry["dtype"])
            words = np.empty((end - begin) // tensor.word_nbytes, f"<u{tensor.word_nbytes}")
            interleaved = words.view(np.uint8).reshape(-1, tensor.word_nbytes)
            for i in range(tensor.word_nbytes):
                interleaved[:, i] = np.frombuffer(decompress(next(frames)), np.uint8)
            other = base_tensors.get(name)
            if other is not None and other.end - other.start == end - begin:
                words ^= _words(base, other)
            out[begin:end] = words.view(np.uint8)
        self._result = out

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes(self._result, pair.tuned.read_bytes())


def _words(content: Bytes, tensor: Tensor) -> npt.NDArray[np.unsignedinteger]:
    words = content[tensor.start : tensor.end]
    if words.ctypes.data % tensor.word_nbytes:  # a header of odd length
        words = words.copy()
    return words.view(f"<u{tensor.word_nbytes}")


class SeedMethod:
    """What hydrafs grew from: subtract the base in the file's own dtype, leave equal tensors out, pickle, bz2.

    It keeps no container, so only the values can come back; those that do not come back exactly are counted.
    """

    name = "the seed: float subtract + bz2"

    def __init__(self) -> None:
        self._restored: dict[str, object] = {}

    def absent(self) -> str:
        return ""

    def pack(self, pair: Pair, folder: Path) -> int:
        import torch
        from safetensors.torch import load_file

        base, tuned = load_file(pair.base), load_file(pair.tuned)
        difference = {k: tuned[k] - base[k] for k in tuned if k in base and not torch.equal(tuned[k], base[k])}
        difference.update({k: v for k, v in tuned.items() if k not in base})
        with bz2.BZ2File(folder / "packed", "w") as file:
            pickle.dump(difference, file)
        return (folder / "packed").stat().st_size

    def unpack(self, pair: Pair, folder: Path) -> None:
        from safetensors.torch import load_file

        base = load_file(pair.base)
        with bz2.BZ2File(folder / "packed") as file:
            difference = pickle.load(file)  # its own, written a moment ago
        self._restored = {k: base[k] + difference[k] if k in difference else base[k] for k in base}

    def check(self, pair: Pair, folder: Path) -> int:
        from safetensors.torch import save

        original, _, tensors = read_safetensors(pair.tuned)
        restored = np.frombuffer(save(self._restored, metadata={"format": "pt"}), np.uint8)
        wrong = 0
        for tensor in tensors.values():
            mine = _words(restored, tensor)
            wrong += int(np.count_nonzero(mine != _words(original, tensor)))
        return wrong


class ZipNN:
    """The zipnn library on the tensors' bytes, alone or after XOR with the base."""

    def __init__(self, *, xor: bool) -> None:
        self.name = "zipnn on XOR" if xor else "zipnn, no delta"
        self._xor = xor
        self._packed = b""
        self._head = b""
        self._result = b""

    def absent(self) -> str:
        try:
            import zipnn  # noqa: F401
        except ImportError as error:
            return f"zipnn cannot be imported: {error}"
        return ""

    def _codec(self, pair: Pair) -> object:
        from zipnn import ZipNN as Library

        dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[pair.precision]
        return Library(input_format="byte", bytearray_dtype=dtype, threads=1)

    def pack(self, pair: Pair, folder: Path) -> int:
        tuned, start, _ = read_safetensors(pair.tuned)
        self._head = zstandard.ZstdCompressor(level=3).compress(tuned[:start])
        body = tuned[start:]
        if self._xor:
            base, base_start, _ = read_safetensors(pair.base)
            body = body ^ base[base_start:]
        self._packed = self._codec(pair).compress(body.tobytes())
        return len(self._head) + len(self._packed)

    def unpack(self, pair: Pair, folder: Path) -> None:
        body = np.frombuffer(self._codec(pair).decompress(self._packed), np.uint8)
        if self._xor:
            base, base_start, _ = read_safetensors(pair.base)
            body = body ^ base[base_start:]
        self._result = zstandard.ZstdDecompressor().decompress(self._head) + body.tobytes()

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes(self._result, pair.tuned.read_bytes())


class Hydrafs:
    """hydrafs' own commands, start of the program, SHA-256 and proof by reading back included."""

    name = "hydrafs (whole commands)"

    def absent(self) -> str:
        return ""

    def pack(self, pair: Pair, folder: Path) -> int:
        (folder / "store").mkdir()
        hydrafs("dehydrate", pair.tuned, "--store", folder / "store", "--base", pair.base, "--keep")
        return (folder / "store" / f"{pair.tuned.name}.hydra").stat().st_size

    def unpack(self, pair: Pair, folder: Path) -> None:
        hydrafs("rehydrate", folder / "store" / f"{pair.tuned.name}.hydra", "--output", folder / "out")

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes((folder / "out").read_bytes(), pair.tuned.read_bytes())


class Codec:
    """One of hydrafs' codecs alone, in this process: tensor against same-named tensor, in chunks of 1 MiB.

    No hashing, no file, no proof: what the codec itself costs and gives.
    """

    CHUNK_NBYTES = 1 << 20
    NO_DELTA = ("raw", "zstd")

    def __init__(self, codec_name: str) -> None:
        self.name = f"hydrafs codec {codec_name} alone"
        self._codec = registry.by_name(codec_name)
        self._payloads: list[bytes] = []
        self._result: Bytes = np.empty(0, np.uint8)

    def absent(self) -> str:
        return ""

    def _chunks(self, pair: Pair) -> Iterator[tuple[Bytes | None, slice, Bytes, DType]]:
        """Of every chunk: the prediction, where it lies in the file, the whole file, the element type."""
        base, _, base_tensors = read_safetensors(pair.base)
        tuned, start, tensors = read_safetensors(pair.tuned)
        self._result = np.empty_like(tuned)
        self._result[:start] = tuned[:start]
        for name, tensor in tensors.items():
            other = base_tensors.get(name)
            same = other is not None and other.end - other.start == tensor.end - tensor.start
            for at in range(0, tensor.end - tensor.start, self.CHUNK_NBYTES):
                end = min(at + self.CHUNK_NBYTES, tensor.end - tensor.start)
                prediction = base[other.start + at : other.start + end] if other and same else None
                yield prediction, slice(tensor.start + at, tensor.start + end), tuned, DTYPES[tensor.dtype]

    def pack(self, pair: Pair, folder: Path) -> int:
        self._payloads = []
        for prediction, where, tuned, dtype in self._chunks(pair):
            self._payloads.append(self._codec.encode(prediction, tuned[where], dtype, b""))
        return sum(map(len, self._payloads))

    def unpack(self, pair: Pair, folder: Path) -> None:
        for payload, (prediction, where, _, dtype) in zip(self._payloads, self._chunks(pair), strict=True):
            self._codec.decode_into(prediction, payload, self._result[where], dtype, b"")

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes(self._result, pair.tuned.read_bytes())


def all_peers() -> list[Peer]:
    """Every method of the table, hydrafs last."""
    return [
        Command("zstd -3", "zstd -q -f -3 --single-thread {tuned} -o {packed}", "zstd -q -f -d {packed} -o {out}"),
        Command(
            "zstd -3 --patch-from",
            "zstd -q -f -3 --single-thread --long=27 --patch-from={base} {tuned} -o {packed}",
            "zstd -q -f -d --long=27 --patch-from={base} {packed} -o {out}",
        ),
        # A source window as large as the largest base: with the default one of 64 MiB it would not see all of it.
        Command(
            "xdelta3",
            "xdelta3 -q -f -e -B 134217728 -s {base} {tuned} {packed}",
            "xdelta3 -q -f -d -B 134217728 -s {base} {packed} {out}",
        ),
        ZipNN(xor=False),
        ZipNN(xor=True),
        SeedMethod(),
        XorPlanes(),
        *(Codec(name) for name in registry.names() if name not in Codec.NO_DELTA),
        Hydrafs(),
    ]


def _wrong_bytes(mine: bytes | Bytes, original: bytes) -> int:
    a, b = np.frombuffer(mine, np.uint8), np.frombuffer(original, np.uint8)
    return max(a.size, b.size) if a.size != b.size else int(np.count_nonzero(a != b))
