"""Writes the golden diffs of format version 1 into tests/golden, from docs/FORMAT.md alone.

It imports nothing of hydrafs: a second writer, so that reader and writer cannot be wrong together. Each ``NAME.hydra``
comes with ``NAME.expected``, the bytes that it must decode to. Run it only when the format gets a new version; the
files of the old ones stay.

    python scripts/make_golden.py [FOLDER]
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

import blake3
import xxhash
import zstandard

CHUNK = 4096
RAW, ZSTD, PLANES = 1, 2, 3
NARROWED, UNPREDICTED = 1, 2
NOTHING, SAME, TENSOR = 0, 1, 2
SELF = -1
MTIME_NS = 1_700_000_000_123_456_789
MODE = 0o100640
SIZES = {"": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}


def msgpack(value: object) -> bytes:
    """The msgpack types that the format uses (https://github.com/msgpack/msgpack/blob/master/spec.md)."""
    if isinstance(value, int):
        if 0 <= value < 128:
            return struct.pack("B", value)
        if -32 <= value < 0:
            return struct.pack("b", value)
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, str):
        data = value.encode()
        return (struct.pack("B", 0xA0 | len(data)) if len(data) < 32 else struct.pack(">BH", 0xDA, len(data))) + data
    if isinstance(value, bytes):
        return struct.pack(">BB", 0xC4, len(value)) + value
    assert isinstance(value, (list, tuple))
    head = struct.pack("B", 0x90 | len(value)) if len(value) < 16 else struct.pack(">BH", 0xDC, len(value))
    return head + b"".join(msgpack(v) for v in value)


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19, write_content_size=True, write_checksum=False).compress(data)


def plane_frame(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True, write_checksum=False, write_dict_id=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def planes(prediction: bytes | None, target: bytes, width: int, stored: bool = False) -> bytes:
    """The payload of codec 3, one word at a time. ``stored`` writes planes plain where a frame would do."""
    count = len(target) // width
    words = [int.from_bytes(target[i * width : (i + 1) * width], "little") for i in range(count)]
    rows: list[list[int]] = [[] for _ in range(width)]
    for i, word in enumerate(words):
        if prediction is None:
            for k in range(width):
                rows[k].append(word >> (8 * k) & 0xFF)
            continue
        residual = word - int.from_bytes(prediction[i * width : (i + 1) * width], "little")
        for k in range(width):
            digit = ((residual & 0xFF) ^ 0x80) - 0x80
            rows[k].append(digit & 0xFF)
            residual = (residual - digit) >> 8
    header, bodies = b"", b""
    for row in map(bytes, rows):
        if len(set(row)) == 1:
            header += struct.pack("<I", row[0])
        elif stored:
            header += struct.pack("<I", 1 << 30 | len(row))
            bodies += row
        else:
            body = plane_frame(row)
            header += struct.pack("<I", 2 << 30 | len(body))
            bodies += body
    return header + bodies + target[count * width :]


@dataclass
class Span:
    nbytes: int
    section: int
    name: str = ""
    shape: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    prediction: int = NOTHING
    parent: int = 0
    origin: int = 0
    origin_dtype: str = ""

    def row(self) -> list[object]:
        return [
            self.nbytes, self.section, self.name, self.shape, self.aliases,
            self.prediction, self.parent, self.origin, self.origin_dtype,
        ]  # fmt: skip


@dataclass
class Diff:
    """``sections``: (dtype, codec, narrow). ``chunks``: payload, codec id, flags, by section and number in it."""

    name: str
    model: bytes
    sections: list[tuple[str, int, str]]
    spans: list[Span]
    parents: list[tuple[str, bytes]] = field(default_factory=list)
    chunks: dict[tuple[int, int], tuple[bytes, int, int]] = field(default_factory=dict)
    container: str = "opaque"
    hashes: list[tuple[str, bytes]] = field(default_factory=list)

    def section(self, number: int) -> bytes:
        """The bytes of a section: those of its spans, one after another."""
        out, offset = b"", 0
        for span in self.spans:
            if span.section == number:
                out += self.model[offset : offset + span.nbytes]
            offset += span.nbytes
        assert offset == len(self.model)
        return out

    def cut(self, number: int) -> list[bytes]:
        data = self.section(number)
        return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]

    def write(self, folder: Path) -> None:
        body = struct.pack("<8sII", b"\x89HYDRA\r\n", 1, 0)
        index = b""
        for number in range(len(self.sections)):
            for place, decoded in enumerate(self.cut(number)):
                payload, codec, flags = self.chunks.pop((number, place))
                index += struct.pack(
                    "<QQIBBH", len(body), xxhash.xxh3_64_intdigest(decoded), len(payload), codec, flags, 0
                )
                body += payload
        assert not self.chunks, "a payload of no chunk"
        digest = hashlib.sha256(self.model).digest()
        manifest = msgpack(
            [
                [],
                self.name,
                len(self.model),
                digest,
                MODE,
                MTIME_NS,
                self.container,
                CHUNK,
                [[hashlib.sha256(d).digest(), len(d), n, probe(d)] for n, d in self.parents],
                [[dtype, codec, narrow, b""] for dtype, codec, narrow in self.sections],
                [span.row() for span in self.spans],
                [["written by", "scripts/make_golden.py"]],
                "make_golden 1",
                *([[], self.hashes] if self.hashes else []),
            ]
        )
        packed = frame(manifest)
        start = len(body)
        trailer = struct.pack(
            "<QQQQQQQqII32sII",
            start, len(index), xxhash.xxh3_64_intdigest(index),
            start + len(index), len(packed), xxhash.xxh3_64_intdigest(packed),
            len(self.model), MTIME_NS, MODE, len(manifest), digest, 1, 0,
        )  # fmt: skip
        trailer += struct.pack("<Q8s", xxhash.xxh3_64_intdigest(trailer), b"\n\rARDYH\x89")
        assert len(trailer) == 128
        (folder / f"{self.name}.hydra").write_bytes(body + index + packed + trailer)
        (folder / f"{self.name}.expected").write_bytes(self.model)


def probe(data: bytes) -> int:
    assert len(data) <= 128 << 10
    return xxhash.xxh3_64_intdigest(struct.pack("<Q", len(data)) + data)


# Numbers: made and converted one at a time, with struct's own conversions and integers, not with numpy.


def singles(seed: int, count: int) -> list[float]:
    """Random float32 values, as exact Python floats; the first ones are those that conversions get wrong."""
    special = [
        0.0,
        -0.0,
        65519.0,
        65520.0,
        6.0e-8,
        -2.98023223876953125e-08,
        1.00048828125,
        1.0014648437500,
        1e-30,
        3e38,
    ]
    rng = random.Random(seed)
    values = [*special, *(rng.gauss(0, 1) * 10 ** rng.uniform(-6, 1) for _ in range(count - len(special)))]
    return [struct.unpack("<f", struct.pack("<f", v))[0] for v in values]


def f32(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def f16(values: list[float]) -> bytes:
    out = b""
    for v in values:
        try:
            out += struct.pack("<e", v)
        except OverflowError:
            out += struct.pack("<H", 0xFC00 if v < 0 else 0x7C00)
    return out


def bf16(values: list[float]) -> bytes:
    out = b""
    for v in values:
        word = struct.unpack("<I", struct.pack("<f", v))[0]
        low, word = word & 0xFFFF, word >> 16
        out += struct.pack("<H", word + (low > 0x8000 or (low == 0x8000 and word & 1)))
    return out


def from_f16(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 2}e", data))


def stepped(data: bytes, width: int, seed: int, reach: int = 3) -> bytes:
    """``data`` with a small whole number added to each word, wrapping."""
    rng = random.Random(seed)
    out = b""
    for i in range(0, len(data), width):
        word = int.from_bytes(data[i : i + width], "little") + rng.randint(-reach, reach)
        out += (word % (1 << (8 * width))).to_bytes(width, "little")
    return out


def noise(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def text(nbytes: int) -> bytes:
    return (b'{"weight":{"dtype":"F16","shape":[64,64],"data_offsets":[0,8192]}}' * (nbytes // 60 + 1))[:nbytes]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The parent: 100 bytes that are no numbers, 3000 float32, 3000 float16, 3000 bfloat16.
    values = singles(1, 3000)
    wide, half, brain = f32(values), f16(values), bf16(values)
    parent = noise(2, 100) + wide + half + brain
    at_wide, at_half, at_brain = 100, 100 + len(wide), 100 + len(wide) + len(half)
    name = "golden-parent.bin"
    (folder / name).write_bytes(parent)
    parents = [(name, parent)]

    diff = Diff("raw.bin", noise(3, 10_000), [("", RAW, "")], [Span(10_000, 0)])
    diff.chunks = {(0, i): (c, RAW, 0) for i, c in enumerate(diff.cut(0))}
    diff.write(folder)

    diff = Diff("zstd.bin", text(10_000), [("", ZSTD, "")], [Span(10_000, 0)])
    diff.chunks = {(0, i): (frame(c), ZSTD, 0) for i, c in enumerate(diff.cut(0))}
    diff.write(folder)

    # Planes without a prediction, of words of 1, 2, 4 and 8 bytes, and what is left behind the last whole word.
    whole = struct.pack("<700q", *(random.Random(4).randint(-(2**62), 1000) for _ in range(700)))
    diff = Diff(
        "planes-alone.bin",
        half + whole + wide + text(5000),
        [("F16", PLANES, ""), ("I64", PLANES, ""), ("F32", PLANES, ""), ("U8", PLANES, "")],
        [
            Span(len(half), 0, "half", (30, 100)),
            Span(len(whole), 1, "whole", (700,)),
            Span(len(wide), 2, "wide", (3000,), ("tied",)),
            Span(5000, 3, "bytes", (5000,)),
        ],
    )
    for number, width in enumerate((2, 8, 4, 1)):
        for i, c in enumerate(diff.cut(number)):
            diff.chunks[number, i] = (planes(None, c, width, stored=i == 1), PLANES, UNPREDICTED if i else 0)
    diff.write(folder)

    # Planes of the difference to a parent: small steps, wild steps, one chunk that is better without its prediction.
    near, far = stepped(half, 2, 5), stepped(wide, 4, 6, reach=2**31)
    diff = Diff(
        "planes-tensor.bin",
        near + far,
        [("F16", PLANES, ""), ("F32", PLANES, "")],
        [
            Span(len(near), 0, "near", (3000,), (), TENSOR, 0, at_half),
            Span(len(far), 1, "far", (3000,), (), TENSOR, 0, at_wide),
        ],
        parents,
    )
    for number, (width, origin) in enumerate(((2, half), (4, wide))):
        for i, c in enumerate(diff.cut(number)):
            known = origin[i * CHUNK : i * CHUNK + len(c)]
            diff.chunks[number, i] = (planes(known, c, width, stored=i == 1), PLANES, 0)
    diff.chunks[1, 2] = (planes(None, diff.cut(1)[2], 4), PLANES, UNPREDICTED)
    diff.chunks[0, 1] = (frame(diff.cut(0)[1]), ZSTD, UNPREDICTED)
    diff.write(folder)

    # float32 that holds float16 values: the chunks are narrowed, but the last one does not fit and is coded as it is.
    narrow = stepped(half, 2, 7, reach=1)
    # Words that became infinities or NaNs would still be exact, but struct would not give their payload back.
    finite = [v if abs(v) < 7e4 else 1.5 for v in from_f16(narrow)]
    wider = f32(finite[:2048]) + stepped(f32(finite[2048:]), 4, 8)
    diff = Diff(
        "narrow.bin",
        wider,
        [("F32", PLANES, "F16")],
        [Span(len(wider), 0, "narrow", (3000,), (), TENSOR, 0, at_half, "F16")],
        parents,
    )
    for i, c in enumerate(diff.cut(0)):
        known = half[i * CHUNK // 2 : i * CHUNK // 2 + len(c) // 2]
        if i < 2:
            small = f16(list(struct.unpack(f"<{len(c) // 4}f", c)))
            diff.chunks[0, i] = (planes(known, small, 2), PLANES, NARROWED)
        else:
            diff.chunks[0, i] = (planes(f32(from_f16(known)), c, 4), PLANES, 0)
    diff.write(folder)

    # The very bytes of a parent: nothing stored; beside literals that are.
    head = text(300)
    diff = Diff(
        "same.bin",
        head + brain + wide,
        [("", ZSTD, ""), ("BF16", PLANES, ""), ("F32", PLANES, "")],
        [
            Span(300, 0),
            Span(len(brain), 1, "frozen", (3000,), (), SAME, 0, at_brain),
            Span(len(wide), 2, "wide", (3000,), (), SAME, 0, at_wide),
        ],
        parents,
    )
    diff.chunks = {(0, 0): (frame(head), ZSTD, 0)}
    for number in (1, 2):
        diff.chunks.update({(number, i): (b"", 0, 0) for i in range(len(diff.cut(number)))})
    diff.write(folder)

    # A parent's tensor as another type: rounded down, rounded to bfloat16, and widened.
    upward = f32(from_f16(half[:8] + half[16:]))
    diff = Diff(
        "cast.bin",
        stepped(half, 2, 9) + brain + upward,
        [("F16", PLANES, ""), ("BF16", PLANES, ""), ("F32", PLANES, "")],
        [
            Span(len(half), 0, "down", (3000,), (), TENSOR, 0, at_wide, "F32"),
            Span(len(brain), 1, "brain", (3000,), (), TENSOR, 0, at_wide, "F32"),
            Span(16, 2, "up.head", (4,), (), TENSOR, 0, at_half, "F16"),
            Span(len(upward) - 16, 2, "up", (2992,), (), TENSOR, 0, at_half + 16, "F16"),
        ],
        parents,
    )
    for i, c in enumerate(diff.cut(0)):
        diff.chunks[0, i] = (planes(half[i * CHUNK : i * CHUNK + len(c)], c, 2), PLANES, 0)
    for number in (1, 2):  # the cast is exact: nothing is stored
        diff.chunks.update({(number, i): (b"", 0, 0) for i in range(len(diff.cut(number)))})
    diff.write(folder)

    # A copy that is predicted by the live weights of the same model, in another type.
    live = f32(singles(10, 2500))
    copy = stepped(f16(singles(10, 2500)), 2, 11)
    diff = Diff(
        "self.bin",
        copy + live,
        [("F16", PLANES, ""), ("F32", PLANES, "")],
        [
            Span(len(copy), 0, "model_ema.w", (2500,), (), TENSOR, SELF, len(copy), "F32"),
            Span(len(live), 1, "model.w", (2500,)),
        ],
    )
    rounded = f16(singles(10, 2500))
    for i, c in enumerate(diff.cut(0)):
        diff.chunks[0, i] = (planes(rounded[i * CHUNK : i * CHUNK + len(c)], c, 2), PLANES, 0)
    for i, c in enumerate(diff.cut(1)):
        diff.chunks[1, i] = (planes(None, c, 4), PLANES, 0)
    diff.write(folder)

    # Many small spans in turn: three sections, chunks that hold dozens of spans, some of them without a prediction.
    model, spans, known_half = b"", [], b""
    for i in range(60):
        literal = text(40 + i)
        part = stepped(half[100 * i :][:100], 2, 20 + i)
        predicted = i % 5 != 3
        known_half += half[100 * i :][:100] if predicted else bytes(len(part))
        odd = noise(100 + i, 13)
        model += literal + part + odd
        spans.append(Span(len(literal), 0))
        spans.append(
            Span(len(part), 1, f"block.{i}.bias", (len(part) // 2,), (), TENSOR, 0, at_half + 100 * i)
            if predicted
            else Span(len(part), 1, f"block.{i}.new", (len(part) // 2,))
        )
        spans.append(Span(13, 2, f"block.{i}.flags", (13,)))
    diff = Diff("group.bin", model, [("", ZSTD, ""), ("F16", PLANES, ""), ("U8", PLANES, "")], spans, parents)
    for i, c in enumerate(diff.cut(0)):
        diff.chunks[0, i] = (frame(c), ZSTD, 0)
    for i, c in enumerate(diff.cut(1)):
        diff.chunks[1, i] = (planes(known_half[i * CHUNK : i * CHUNK + len(c)], c, 2), PLANES, 0)
    for i, c in enumerate(diff.cut(2)):
        diff.chunks[2, i] = (c, RAW, UNPREDICTED)
    diff.write(folder)

    # Other hashes of the model. A file with something at 0x100000 would be large: what is hashed there is nothing. Then
    # a name that no reader knows, and a value of another size.
    header = b'{"w":{"dtype":"F16","shape":[3000],"data_offsets":[0,6000]}}'
    model = struct.pack("<Q", len(header)) + header + half
    diff = Diff(
        "hashes.safetensors",
        model,
        [("", ZSTD, ""), ("F16", PLANES, "")],
        [Span(8 + len(header), 0), Span(len(half), 1, "w", (3000,))],
        container="safetensors",
        hashes=[
            ("addnet_sha256", hashlib.sha256(half).digest()),
            ("blake3", blake3.blake3(model).digest()),
            ("md5", hashlib.md5(model, usedforsecurity=False).digest()),
            ("partial_sha256", hashlib.sha256(model[0x100000:0x110000]).digest()),
            ("partial_sha256", b"short"),
        ],
    )
    diff.chunks = {(0, i): (frame(c), ZSTD, 0) for i, c in enumerate(diff.cut(0))}
    diff.chunks |= {(1, i): (planes(None, c, 2), PLANES, 0) for i, c in enumerate(diff.cut(1))}
    diff.write(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests" / "golden")
