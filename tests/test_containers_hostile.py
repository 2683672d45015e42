"""Files made to harm a parser: nothing executes, only ``HydraError`` is raised, time and memory stay bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from hydrafs import containers
from hydrafs.containers import cursor, pickle_walk, safetensors, torch_zip
from hydrafs.errors import BadModel, Changing
from hydrafs.layout import BytesSource, FileSource, Layout

LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
# Mistakes of ours, and not a hostile file's doing, even where they end as a BadModel.
OURS = (TypeError, AttributeError, NameError, AssertionError, MemoryError)


def save(obj: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(40.0)
    return {"a": base, "view": base[3:9], "b": torch.ones(30).half(), "n": torch.tensor(7)}


MODELS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: save({"state_dict": tensors(), "epoch": 3}),
    "legacy": lambda: save({"state_dict": tensors(), "epoch": 3}, legacy=True),
    "safetensors": lambda: save_safetensors({k: v.clone() for k, v in tensors().items()}, {"format": "pt"}),
}


def survives(data: bytes) -> Layout:
    """Parse; the layout covers the file, and no mistake of ours hides behind a fallback."""
    try:
        layout = containers.parse_strict(BytesSource(data))
    except BadModel as error:
        cause = error.__cause__
        assert not isinstance(cause, OURS), repr(cause)
        assert not isinstance(cause, RecursionError) or "deserializing" in str(cause), "msgspec's own guard"
        layout = containers.parse(BytesSource(data))
        assert layout.container == "opaque"
    assert layout.size == len(data) == sum(span.nbytes for span in layout.spans)
    for span in layout.tensors:
        "".join((span.name, *span.aliases)).encode()
    return layout


def legacy(pickled: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    return LEGACY_HEAD + pickled + keys


def zipped(pickled: bytes, deflate: bool = False, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
        archive.writestr("archive/data.pkl", pickled, method)
        archive.writestr("archive/version", b"3\n")
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", MODELS)
def test_truncated_anywhere(kind: str) -> None:
    data = MODELS[kind]()
    for length in {*range(0, len(data), 97), *range(len(data) - 60, len(data)), *range(70)}:
        survives(data[:length])


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bits(kind: str, data: st.DataObject) -> None:
    model = bytearray(MODELS[kind]())
    for at in data.draw(st.lists(st.integers(0, len(model) * 8 - 1), min_size=1, max_size=12)):
        model[at // 8] ^= 1 << at % 8
    survives(bytes(model))


def test_each_byte_of_the_skeleton_changed() -> None:
    """Every byte outside the numbers, set to values that parsers trip over."""
    for make in MODELS.values():
        model = make()
        literal = [i for span in survives(model).spans if not span.dtype for i in range(span.offset, span.end)]
        for step, at in enumerate(literal[:: max(1, len(literal) // 600)]):
            wrong = bytearray(model)
            wrong[at] = (0x00, 0xFF, 0x80, 0x7F, 0x28, 0x2E)[step % 6]
            survives(bytes(wrong))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(pickle_walk._ACTIONS)) | st.binary(max_size=6), max_size=60))
def test_random_opcodes(pieces: list[bytes]) -> None:
    survives(legacy(b"\x80\x02" + b"".join(pieces) + b"."))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_junk_behind_each_signature(junk: bytes) -> None:
    for head in (
        b"PK\3\4",
        b"PK\5\6" + bytes(18),
        LEGACY_HEAD,
        struct.pack("<Q", len(junk)),
        b"\x02" + bytes(7) + b"{}",
    ):
        survives(head + junk)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_executes(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for protocol in range(6):
        evil = pickle.dumps({"w": Evil(marker), "v": eval}, protocol)
        for data in (zipped(evil), zipped(evil, deflate=True), legacy(evil), evil):
            survives(data)
    for opcode in (
        b"cos\nsystem\n(S'touch %s'\ntR.",
        b"(S'touch %s'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch %s'\no.",
    ):
        survives(legacy(opcode % str(marker).encode()))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the pickle would have run"


def test_parsing_imports_no_torch_and_no_named_module() -> None:
    code = """
import sys
from hydrafs import containers
from hydrafs.layout import BytesSource
containers.parse(BytesSource(sys.stdin.buffer.read()))
assert "torch" not in sys.modules and "antigravity" not in sys.modules
"""
    model = save({"w": torch.ones(9)}) + b""
    named = legacy(b"cantigravity\nfly\n)R.")
    for data in (model, named):
        subprocess.run([sys.executable, "-c", code], input=data, check=True)


BOMBS: dict[str, Callable[[], bytes]] = {
    "unknown opcode": lambda: b"\xff.",
    "bytes of 2^60": lambda: b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "text of 2^60": lambda: b"\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytearray of 2^63": lambda: b"\x96" + struct.pack("<Q", 1 << 63) + b"x.",
    "long of 2^31": lambda: b"\x8b" + struct.pack("<I", 1 << 31) + b"x.",
    "digits": lambda: b"L" + b"9" * 1_000_000 + b"L\n.",
    "digits of an int": lambda: b"I" + b"9" * 4000 + b"\n.",
    "memo index of many digits": lambda: b"Np" + b"9" * 4000 + b"\n.",
    "endless line": lambda: b"c" + b"x" * 1_000_000,
    "stack underflow": lambda: b"0" * 10 + b".",
    "mark underflow": lambda: b"ttt.",
    "memo miss": lambda: b"h\x07.",
    "odd mapping": lambda: b"(Nd.",
    "deep lists": lambda: b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": lambda: b")" + b"\x85" * 300_000 + b".",
    "deep mappings": lambda: b"}" + b"}U\x01k" * 1 + b"}" * 300_000 + b".",
    "deep states": lambda: b"cos\nx\n)R" + b"cos\nx\n)R" * 100_000 + b"b" * 100_000 + b".",
    "marks": lambda: b"(" * 300_000 + b".",
    "laughs": lambda: b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(200)) + b".",
    "a list in itself": lambda: b"]q\x00h\x00a}q\x01K\x01h\x01s\x86.",
    "deep key": lambda: b"}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "one list for many mappings": lambda: (
        b"](" + b"NN\x86" * 50_000 + b"eq\x000ccollections\nOrderedDict\nq\x010(" + b"h\x01h\x00\x85R" * 50_000 + b"l."
    ),
    "one tuple for many calls": lambda: (
        b"((" + b"]" * 50_000 + b"tq\x000cos\nx\nq\x010" + b"h\x01h\x00R" * 50_000 + b"l."
    ),
    "one type chain for many calls": lambda: (
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\x01N)q\x02"
        + b"0(h\x01Nh\x02Ntq\x02" * 30_000
        + b"0("
        + b"h\x01h\x02R" * 30_000
        + b"l."
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs(name: str) -> None:
    """Also on a thread with a small stack: recursion in C would end the process."""
    bomb = BOMBS[name]()
    results: list[Layout] = []
    previous = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: results.append(survives(legacy(bomb))))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(previous)
    assert len(results) == 1
    survives(zipped(bomb, deflate=True))


def test_the_walk_counts_opcodes_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(data: bytes) -> object:
        return pickle_walk.walk(cursor.Cursor(iter([data]), 1 << 28), {})

    monkeypatch.setattr(pickle_walk, "MAX_OPCODES", 1000)
    monkeypatch.setattr(pickle_walk, "MAX_TEXT_NBYTES", 1000)
    assert walk(b"N" + b"N0" * 499 + b".") is None
    with pytest.raises(BadModel, match="too long"):
        walk(b"N" + b"N0" * 500 + b".")
    assert walk(b"U\xfa" + b"x" * 250 + b".") == "x" * 250
    with pytest.raises(BadModel, match="too much text"):
        walk((b"U\xfa" + b"x" * 250) * 5 + b".")


def test_many_deep_names_are_bounded() -> None:
    """Keys of 4 KB, 60 deep, over many tensors: names take a bounded amount of memory, and stay unique."""
    key = b"X" + struct.pack("<I", 4000) + b"k" * 4000
    tensor = b"ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x03NtQK\x00)(tR"
    tensor = tensor.replace(b"(tR", b")tR")
    pickled = (b"}" + key) * 60 + b"](" + tensor + b"q\x05" + b"h\x05" * 20_000 + b"e" + b"s" * 60 + b"."
    data = legacy(pickled, b"\x80\x02]U\x010a.") + struct.pack("<q3f", 3, 1, 2, 3)
    (span,) = survives(data).tensors
    names = (span.name, *span.aliases)
    assert len(set(names)) == len(names) > 100
    assert sum(map(len, names)) <= (1 << 25) + 4200


def test_lone_surrogates_and_slashes_in_names() -> None:
    storage = b"(U\x07storagectorch\nFloatStorage\nX\x09\0\0\0../../etcU\x03cpuK\x03NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00(K\x03t(K\x01ttR"
    for key in (b"X\x03\0\0\0\xed\xa0\x80", b"X\x05\0\0\0\0/../", b"V\\ud800\n", b"U\x02\xff\xfe"):
        data = legacy(b"}" + key + tensor + b"s.", b"\x80\x02]X\x09\0\0\0../../etca.") + struct.pack("<q3f", 3, 1, 2, 3)
        assert len(survives(data).tensors) == 1
    record = b"\0" * 12
    survives(zipped(b"}U\x01w" + tensor + b"s.", **{"archive/data/../../etc": record, "/abs/data.pkl": b"N."}))


def test_contradicting_storages_are_literal() -> None:
    def tensor(kind: bytes, numel: int) -> bytes:
        storage = b"(U\x07storagectorch\n" + kind + b"\nU\x010U\x03cpuK" + bytes([numel]) + b"tQ"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x03t(K\x01t\x89NtR"

    for other in ((b"HalfStorage", 3), (b"FloatStorage", 2)):
        pickled = b"](" + tensor(b"FloatStorage", 3) + tensor(*other) + b"e."
        assert survives(zipped(pickled, **{"archive/data/0": bytes(5000)})).tensors == ()
        assert survives(legacy(pickled, b"]U\x010a.") + struct.pack("<q", 3) + bytes(12)).tensors == ()


# --- zips ---


def test_overlapping_and_doubled_members() -> None:
    model = MODELS["zip"]()
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        first, second = [i for i in archive.infolist() if i.filename.endswith(("/data/0", "/data/1"))]
    at = [model.rindex(i.filename.encode()) - 46 for i in (first, second)]
    wrong = bytearray(model)
    wrong[at[1] + 42 : at[1] + 46] = struct.pack("<I", first.header_offset)  # names differ: literal
    assert len(survives(bytes(wrong)).tensors) == len(survives(model).tensors) - 1
    wrong = bytearray(model)
    wrong[at[1] + 46 + len(second.filename) - 1] = ord("0")  # two members of one name
    assert not {"a", "b"} & {s.name for s in survives(bytes(wrong)).tensors}
    wrong = bytearray(model)
    wrong[at[0] + 42 : at[0] + 46] = struct.pack("<I", 0xFFFFFFF0)
    assert "a" not in {s.name for s in survives(bytes(wrong)).tensors}


def test_declared_sizes_of_a_directory() -> None:
    model = MODELS["zip"]()
    end = model.rindex(b"PK\5\6")
    for at, value in (
        (8, b"\xff" * 4),
        (12, b"\xff\xff\xff\x7f"),
        (12, b"\xff" * 4),
        (16, b"\xff" * 4),
        (20, b"\xff\xff"),
    ):
        wrong = bytearray(model)
        wrong[end + at : end + at + len(value)] = value
        survives(bytes(wrong))
    for size, offset in ((1 << 60, 0), (0, 1 << 63), (1 << 63, 1 << 63), (100, 1 << 40)):
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 32, 1 << 32, size, offset)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        survives(model[:end] + record + locator + tail)


def test_a_directory_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 33)
        file.seek(1 << 33)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 0xF0000000, 0, 0))
    with FileSource(path) as source, pytest.raises(BadModel, match="too large"):
        containers.parse_strict(Counting(source))


def test_a_deflate_bomb_is_inflated_no_further_than_it_is_read() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    compressed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(50)) + bomb.flush()
    chunks = cursor.inflated(iter([compressed]))
    with pytest.raises(BadModel, match="unknown opcode"):
        pickle_walk.walk(cursor.Cursor(chunks, 1 << 28), {})
    assert len(next(chunks)) <= cursor.CHUNK_NBYTES
    reader = cursor.Cursor(cursor.inflated(iter([compressed])), 1 << 20)
    reader.skip(1 << 20)
    with pytest.raises(BadModel, match="ends early"):
        reader.read(1)


def test_a_small_record_that_is_a_bomb_is_not_inflated() -> None:
    """``byteorder`` says 6 bytes and inflates to 20 GB."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    model = zipped(pickle.dumps({}), **{"archive/byteorder": block * 1200})
    name = b"archive/byteorder"
    local, central = model.index(name) - 30, model.rindex(name) - 46
    wrong = bytearray(model)
    wrong[local + 8] = wrong[central + 10] = zipfile.ZIP_DEFLATED
    wrong[central + 24 : central + 28] = struct.pack("<I", 6)
    assert survives(bytes(wrong)).container == "torch-zip"


# --- safetensors ---


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 1_000_000,
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e99]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"99999999999," * 5000 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[-8,-4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551615,18446744073709551619]}}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":[]}',
        b'{"a":null}',
        b"{\xff\xfe}",
        b"{}{}",
    ],
    ids=range(15),
)
def test_safetensors_headers(header: bytes) -> None:
    survives(struct.pack("<Q", len(header)) + header + bytes(16))


def test_a_safetensors_header_is_bounded() -> None:
    for nbytes in (1 << 60, (1 << 64) - 1, 100_000_001, 17):
        data = struct.pack("<Q", nbytes) + b'{"a":{}}' + b" " * 8
        assert containers.parse(BytesSource(data)).container == "opaque"
        with pytest.raises(BadModel, match="longer than it may be"):
            safetensors.parse(BytesSource(data))
    header = b"{" + b'"":0,' * (safetensors.MAX_COLONS + 1) + b'"":0}'
    with pytest.raises(BadModel, match="too many entries"):
        safetensors.parse(BytesSource(struct.pack("<Q", len(header)) + header))


# --- sources ---


class Counting:
    """A source that tells how much was read of it."""

    def __init__(self, inner: FileSource) -> None:
        self.inner = inner
        self.nbytes = 0
        self.calls = 0

    @property
    def size(self) -> int:
        return self.inner.size

    def pread(self, offset: int, nbytes: int) -> bytes:
        data = self.inner.pread(offset, nbytes)
        self.nbytes += len(data)
        self.calls += 1
        return data

    def pread_into(self, offset: int, out: memoryview) -> int:
        raise AssertionError("parsers read small pieces")

    def close(self) -> None:
        return None


RECORDS = 1200
RECORD_NBYTES = 7_000_064


def storage_opcodes(key: int) -> bytes:
    name = str(key).encode()
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX%s%sX\3\0\0\0cpuJ%stQ" % (
        struct.pack("<I", len(name)), name, struct.pack("<I", RECORD_NBYTES // 4),
    )  # fmt: skip
    count = struct.pack("<I", RECORD_NBYTES // 4)
    return (
        b"X\4\0\0\0w%03x" % (key % 4096)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("[:-1]
        + storage
        + b"K\0J"
        + count
        + b"\x85K\1\x85\x89NtR"
    )


def sparse_zip(path: Path) -> None:
    """Above 8 GB in holes: written by the standard library's writer, whose data is skipped over."""
    pickled = b"\x80\x02}(" + b"".join(storage_opcodes(i) for i in range(RECORDS)) + b"u."
    directory = []
    with path.open("wb") as file:

        def member(name: bytes, content: bytes, nbytes: int) -> None:
            at = file.tell()
            extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes)
            padding = -(at + 30 + len(name) + len(extra) + 4) % 64
            extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
            full = 0xFFFFFFFF
            file.write(
                struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, full, full, len(name), len(extra)) + name + extra
            )
            file.write(content)
            file.seek(nbytes - len(content), os.SEEK_CUR)
            z64 = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, at)
            directory.append(
                struct.pack("<4s6H3I", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, full, full)
                + struct.pack("<5H2I", len(name), 28, 0, 0, 0, 0, full)
                + name
                + z64
            )

        member(b"m/data.pkl", pickled, len(pickled))
        for i in range(RECORDS):
            member(b"m/data/%d" % i, b"", RECORD_NBYTES)
        member(b"m/version", b"3\n", 2)
        start, entries, count = file.tell(), b"".join(directory), len(directory)
        file.write(entries)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + len(entries), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), 0xFFFFFFFF, 0))


def test_eight_gigabytes_of_zip(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    sparse_zip(path)
    with FileSource(path) as file:
        source = Counting(file)
        layout = containers.parse_strict(source)
    assert layout.size > 8_000_000_000 and layout.container == "torch-zip"
    assert len(layout.tensors) == RECORDS
    assert {(s.dtype, s.nbytes, s.offset % 64) for s in layout.tensors} == {("F32", RECORD_NBYTES, 0)}
    assert layout.tensors[1].shape == (RECORD_NBYTES // 4,) and layout.tensors[1].name == "w001"
    assert source.nbytes < 2 << 20
    assert source.calls < RECORDS + 30


def test_eight_gigabytes_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    step = RECORD_NBYTES
    header = json.dumps(
        {
            f"w{i}": {"dtype": "BF16", "shape": [step // 2], "data_offsets": [i * step, (i + 1) * step]}
            for i in range(RECORDS)
        }
    ).encode()
    with path.open("wb") as file_out:
        file_out.write(struct.pack("<Q", len(header)) + header)
        file_out.truncate(8 + len(header) + RECORDS * RECORD_NBYTES)
    with FileSource(path) as file:
        source = Counting(file)
        layout = containers.parse_strict(source)
    assert layout.size > 8_000_000_000 and len(layout.tensors) == RECORDS
    assert source.nbytes < len(header) + 4096 and source.calls <= 3


def test_eight_gigabytes_of_legacy(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    pickled = b"\x80\x02}(" + b"".join(storage_opcodes(i).replace(b"tQ", b"NtQ") for i in range(RECORDS)) + b"u."
    keys = pickle.dumps([str(i) for i in range(RECORDS)], 2)
    with path.open("wb") as file_out:
        file_out.write(LEGACY_HEAD + pickled + keys)
        for _ in range(RECORDS):
            file_out.write(struct.pack("<q", RECORD_NBYTES // 4))
            file_out.seek(RECORD_NBYTES, os.SEEK_CUR)
        file_out.truncate(file_out.tell())
    with FileSource(path) as file:
        source = Counting(file)
        layout = containers.parse_strict(source)
    assert layout.size > 8_000_000_000 and len(layout.tensors) == RECORDS
    assert source.nbytes < 2 << 20


def test_a_failing_source_is_no_bad_model(tmp_path: Path) -> None:
    for kind, make in MODELS.items():
        path = tmp_path / kind
        path.write_bytes(make())
        with FileSource(path) as source:
            os.truncate(path, 0)
            with pytest.raises(Changing):
                containers.parse(source)


def test_memory_of_the_worst_directory_is_bounded() -> None:
    """A directory at the limit, of the shortest entries there are, in a process that may take 1 GB."""
    code = """
import resource, struct, sys
resource.setrlimit(resource.RLIMIT_AS, (1_000_000_000, 1_000_000_000))
from hydrafs import containers
from hydrafs.containers import torch_zip
from hydrafs.layout import BytesSource
entry = struct.pack("<4s6H3I5H2I", b"PK\\1\\2", *[0] * 16)
count = torch_zip.MAX_DIRECTORY_NBYTES // len(entry)
end = struct.pack("<4s4H2IH", b"PK\\5\\6", 0, 0, 0, 0, len(entry) * count, 4, 0)
data = b"PK\\3\\4" + entry * count + end
try:
    containers.parse_strict(BytesSource(data))
except containers.BadModel as error:
    assert "no data.pkl" in str(error), error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.endswith("MiB\n"), out


def test_limits_are_what_the_texts_say() -> None:
    assert torch_zip.MAX_PICKLE_NBYTES == 256 << 20
    assert safetensors.MAX_HEADER_NBYTES == 100_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < 4096, "MiB, of all the tests in here"
