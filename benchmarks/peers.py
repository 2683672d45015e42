"""Other ways to store a fine-tune, each as its author meant it, to compare with.

A peer packs a model into bytes on disk or in memory and unpacks it again; ``size.py`` times both and checks the result.
All run on one thread.
"""

from __future__ import annotations

import bz2
import json
import math
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
from hydrafs.codecs.rans import MANTISSA_BITS
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


class OpenZL:
    """The openzl library on the tensors' words, alone or after XOR with the base.

    They go to its generic numeric graph at the default level; bf16 is first taken apart into exponents and the rest,
    which makes fp16 and fp32 larger.
    """

    def __init__(self, *, xor: bool) -> None:
        self.name = "OpenZL on XOR" if xor else "OpenZL, no delta"
        self._xor = xor
        self._packed = b""
        self._head = b""
        self._result = b""

    def absent(self) -> str:
        try:
            import openzl.ext  # noqa: F401
        except ImportError as error:
            return f"openzl: not installable here, or not installed: {error}"
        return ""

    def _compressor(self, pair: Pair) -> object:
        import openzl.ext as zl

        compressor = zl.Compressor()
        compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        graph = zl.graphs.Compress()(compressor)
        if pair.precision == "bf16":
            graph = zl.nodes.BFloat16Deconstruct()(compressor, graph, graph)
        compressor.select_starting_graph(graph)
        return compressor

    def pack(self, pair: Pair, folder: Path) -> int:
        import openzl.ext as zl

        tuned, start, _ = read_safetensors(pair.tuned)
        self._head = zstandard.ZstdCompressor(level=3).compress(tuned[:start])
        body = tuned[start:]
        if self._xor:
            base, base_start, _ = read_safetensors(pair.base)
            body = body ^ base[base_start:]
        words = np.frombuffer(body.tobytes(), "<u4" if pair.precision == "fp32" else "<u2")
        context = zl.CCtx()
        compressor = self._compressor(pair)
        context.ref_compressor(compressor)
        self._packed = context.compress([zl.Input(zl.Type.Numeric, words)])
        return len(self._head) + len(self._packed)

    def unpack(self, pair: Pair, folder: Path) -> None:
        import openzl.ext as zl

        (output,) = zl.DCtx().decompress(self._packed)
        body = np.frombuffer(output.content.as_bytes(), np.uint8)
        if self._xor:
            base, base_start, _ = read_safetensors(pair.base)
            body = body ^ base[base_start:]
        self._result = zstandard.ZstdDecompressor().decompress(self._head) + body.tobytes()

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes(self._result, pair.tuned.read_bytes())


class Computed:
    """A size that is computed from statistics: nothing is written, so there is no speed and nothing to give back."""

    def absent(self) -> str:
        return ""

    def unpack(self, pair: Pair, folder: Path) -> None:
        raise NotImplementedError

    def check(self, pair: Pair, folder: Path) -> int:
        return 0


class FMDelta(Computed):
    """The method of FM-Delta (NeurIPS 2024), written down for comparison.

    Floats are mapped to unsigned integers of the same order; of the difference, sign and position of the highest bit
    go to an adaptive range coder of order 0, the bits below are stored raw. What is computed is that coder's exact
    code length, with counts from one for each of the symbols, one model for each tensor.
    """

    name = "FM-Delta's method (code length)"

    def pack(self, pair: Pair, folder: Path) -> int:
        bits = 0.0
        for tensor in matched_tensors(pair):
            target, base = tensor.words()
            negative, magnitude = ordered_difference(
                target, np.zeros_like(target) if base is None else base, tensor.dtype
            )
            lengths = bit_lengths(magnitude)
            alphabet = 2 * 8 * tensor.dtype.word_nbytes + 1  # zero, and either sign of each length
            counts = np.bincount(2 * lengths - (negative & (lengths > 0)), minlength=alphabet)
            bits += adaptive_bits(counts, alphabet) + float(np.maximum(lengths - 1, 0).sum())
        return math.ceil(bits / 8) + _head_nbytes(pair)


class Floor(Computed):
    """What order 0 can do at best: each tensor by the cheaper of an ideal coder and the codec ``planes``.

    The ideal coder knows the base's exponent and each symbol's frequency given it, which costs it nothing: the
    entropy of the symbols, plus the bits below them. The header is compressed by zstd.
    """

    name = "floor (entropy, not a file)"

    def pack(self, pair: Pair, folder: Path) -> int:
        planes = registry.by_name("planes")
        bits = 0.0
        for tensor in matched_tensors(pair):
            chunks = tensor.chunks(Codec.CHUNK_NBYTES)
            coded = [planes.encode(tensor.prediction(c), tensor.target[c], tensor.dtype, b"") for c in chunks]
            best = 8.0 * sum(map(len, coded))
            target, base = tensor.words()
            if base is not None:
                best = min(best, conditional_bits(target, base, tensor.dtype))
            bits += best
        return math.ceil(bits / 8) + _head_nbytes(pair)


Words = npt.NDArray[np.unsignedinteger]


def _head_nbytes(pair: Pair) -> int:
    tuned, start, _ = read_safetensors(pair.tuned)
    return len(zstandard.ZstdCompressor(level=3, write_checksum=False).compress(tuned[:start]))


def ordered_difference(target: Words, base: Words, dtype: DType) -> tuple[npt.NDArray[np.bool_], Words]:
    """Where target lies below base, and how many values of the type apart they are, by their order as numbers."""
    word = dtype.word.type
    top = word(1 << (8 * dtype.word_nbytes - 1))

    def ordered(words: Words) -> Words:
        if dtype.kind == "unsigned":
            return words
        if dtype.kind == "signed":
            return words ^ top
        return np.where(words & top, ~words, words | top)

    a, b = ordered(target), ordered(base)
    negative = a < b
    return negative, np.where(negative, b - a, a - b)


def bit_lengths(words: Words) -> npt.NDArray[np.int64]:
    """The position of the highest bit that is set, counted from one; 0 for zero."""
    lengths = np.zeros(words.shape, np.int64)
    left = words.copy()
    for step in (32, 16, 8, 4, 2, 1):
        if step < 8 * words.itemsize:
            large = left >> words.dtype.type(step) != 0
            lengths += step * large
            left = np.where(large, left >> words.dtype.type(step), left)
    return lengths + (left != 0)


def adaptive_bits(counts: npt.NDArray[np.int64], alphabet: int) -> float:
    """The code length of a sequence with these counts, under a model that starts with one for each symbol.

    A symbol's cost is the logarithm of its count until then over their sum, so the order of symbols does not matter:
    log2((n + alphabet - 1)! / (alphabet - 1)! / product of counts!).
    """
    factorials = sum(math.lgamma(count + 1) for count in counts.tolist())
    return (math.lgamma(int(counts.sum()) + alphabet) - math.lgamma(alphabet) - factorials) / math.log(2)


def conditional_bits(target: Words, base: Words, dtype: DType) -> float:
    """The entropy of the difference's symbols given the base's exponent, plus the raw bits below them.

    A symbol is the zigzag difference where that is under 16, else 16 + 4 (bit length - 5) + its next two bits.
    """
    negative, magnitude = ordered_difference(target, base, dtype)
    # Zigzag has one bit more than the word, which float64 and uint64 differences of models do not use.
    wide = magnitude.astype(np.uint64)
    zigzag = (wide << np.uint64(1)) - negative
    lengths = bit_lengths(zigzag)
    raw = np.maximum(lengths - 3, 0) * (zigzag >= 16)
    next_bits = (zigzag >> raw.astype(np.uint64)) & np.uint64(3)
    symbols = np.where(zigzag < 16, zigzag.astype(np.int64), 16 + 4 * (lengths - 5) + next_bits.astype(np.int64))
    context = np.zeros(target.shape, np.int64)
    if dtype.kind == "float":
        mantissa = MANTISSA_BITS[dtype.name]
        exponents = (1 << (8 * dtype.word_nbytes - 1 - mantissa)) - 1
        context = (base >> dtype.word.type(mantissa)).astype(np.int64) & exponents
    wide_alphabet = 16 + 4 * 60
    _, pairs = np.unique(context * wide_alphabet + symbols, return_counts=True)
    _, contexts = np.unique(context, return_counts=True)
    entropy = float((contexts * np.log2(contexts)).sum() - (pairs * np.log2(pairs)).sum())
    return entropy + float(raw.sum())


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
        (folder / "out").unlink(missing_ok=True)  # nothing is ever written over
        hydrafs("rehydrate", folder / "store" / f"{pair.tuned.name}.hydra", "--output", folder / "out")

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes((folder / "out").read_bytes(), pair.tuned.read_bytes())


class Codec:
    """One of hydrafs' codecs alone, in this process: tensor against same-named tensor, in chunks of 1 MiB.

    Tables are trained on all chunks of a tensor and counted. No hashing, no file, no proof: what the codec itself
    costs and gives.
    """

    CHUNK_NBYTES = 1 << 20
    NO_DELTA = ("raw", "zstd")

    def __init__(self, codec_name: str) -> None:
        self.name = f"hydrafs codec {codec_name} alone"
        self._codec = registry.by_name(codec_name)
        self._payloads: list[tuple[bytes, list[bytes]]] = []
        self._result: Bytes = np.empty(0, np.uint8)

    def absent(self) -> str:
        return ""

    def pack(self, pair: Pair, folder: Path) -> int:
        self._payloads = []
        for tensor in matched_tensors(pair):
            chunks = [(tensor.prediction(at), tensor.target[at]) for at in tensor.chunks(self.CHUNK_NBYTES)]
            params = self._codec.train(chunks, tensor.dtype)
            payloads = [self._codec.encode(*chunk, tensor.dtype, params) for chunk in chunks]
            self._payloads.append((params, payloads))
        return sum(len(params) + sum(map(len, payloads)) for params, payloads in self._payloads)

    def unpack(self, pair: Pair, folder: Path) -> None:
        tuned, start, _ = read_safetensors(pair.tuned)
        self._result = np.empty_like(tuned)
        self._result[:start] = tuned[:start]
        for (params, payloads), tensor in zip(self._payloads, matched_tensors(pair), strict=True):
            out = self._result[tensor.start : tensor.start + tensor.target.size]
            for payload, at in zip(payloads, tensor.chunks(self.CHUNK_NBYTES), strict=True):
                self._codec.decode_into(tensor.prediction(at), payload, out[at], tensor.dtype, params)

    def check(self, pair: Pair, folder: Path) -> int:
        return _wrong_bytes(self._result, pair.tuned.read_bytes())


@dataclass(frozen=True, slots=True)
class Matched:
    """A tensor of a fine-tune, and the bytes of the same-named one of its base where that is as large."""

    start: int
    target: Bytes
    base: Bytes | None
    dtype: DType

    def chunks(self, nbytes: int) -> list[slice]:
        """Where the tensor's chunks lie in it."""
        return [slice(at, min(at + nbytes, self.target.size)) for at in range(0, self.target.size, nbytes)]

    def prediction(self, at: slice) -> Bytes | None:
        """The base's bytes there."""
        return None if self.base is None else self.base[at]

    def words(self) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.unsignedinteger] | None]:
        """Target and base as words, copied where they lie oddly."""
        whole = Tensor(0, self.target.size, self.dtype.name)
        return _words(self.target, whole), None if self.base is None else _words(self.base, whole)


def matched_tensors(pair: Pair) -> Iterator[Matched]:
    """The tensors of the fine-tune that hold anything, as they lie in the file."""
    base, _, base_tensors = read_safetensors(pair.base)
    tuned, _, tensors = read_safetensors(pair.tuned)
    for name, tensor in tensors.items():
        if tensor.end == tensor.start:
            continue
        other = base_tensors.get(name)
        same = other is not None and (other.end - other.start, other.dtype) == (tensor.end - tensor.start, tensor.dtype)
        known = base[other.start : other.end] if other and same else None
        yield Matched(tensor.start, tuned[tensor.start : tensor.end], known, DTYPES[tensor.dtype])


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
        OpenZL(xor=False),
        OpenZL(xor=True),
        SeedMethod(),
        FMDelta(),
        XorPlanes(),
        *(Codec(name) for name in registry.names() if name not in Codec.NO_DELTA),
        Floor(),
        Hydrafs(),
    ]


def _wrong_bytes(mine: bytes | Bytes, original: bytes) -> int:
    a, b = np.frombuffer(mine, np.uint8), np.frombuffer(original, np.uint8)
    return max(a.size, b.size) if a.size != b.size else int(np.count_nonzero(a != b))
