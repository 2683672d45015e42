"""Layouts of real checkpoints, held against what torch and safetensors themselves say of the files."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hydrafs import containers
from hydrafs.containers import torch_zip
from hydrafs.dtypes import BY_TORCH_NAME, DTYPES
from hydrafs.layout import BytesSource, FileSource, Layout, Span

TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip
FORMATS = ["zip", "legacy"]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, nbytes, dtype=np.uint8)
    return (
        torch.frombuffer(bytearray(raw.tobytes()), dtype=dtype).reshape(shape)
        if nbytes
        else torch.empty(shape, dtype=dtype)
    )


def storage_bytes(tensor: torch.Tensor) -> bytes:
    storage = tensor.untyped_storage()
    return bytes(torch.tensor(storage, dtype=torch.uint8).numpy()) if storage.nbytes() else b""


def save(obj: object, file_format: str = "zip", **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=file_format == "zip", **options)
    return buffer.getvalue()


def parse(data: bytes) -> Layout:
    layout = containers.parse_strict(BytesSource(data))
    assert sum(span.nbytes for span in layout.spans) == len(data) == layout.size
    return layout


def by_name(layout: Layout) -> dict[str, Span]:
    named = [(name, span) for span in layout.tensors for name in (span.name, *span.aliases)]
    assert len(dict(named)) == len(named), "names are unique"
    return dict(named)


def check(data: bytes, tensors: dict[str, torch.Tensor], container: str | None = None) -> Layout:
    """Each tensor's span holds its storage's bytes, under its type, and no other tensor is there."""
    layout = parse(data)
    spans = by_name(layout)
    filled = {name: tensor for name, tensor in tensors.items() if tensor.untyped_storage().nbytes()}
    assert set(spans) == set(filled)
    for name, tensor in filled.items():
        span = spans[name]
        assert data[span.offset : span.end] == storage_bytes(tensor), name
        assert span.dtype == BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")].name, name
    assert container in (None, layout.container)
    return layout


def flatten(value: object, path: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {".".join(path): value}
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    return {k: t for key, item in items for k, t in flatten(item, (*path, str(key))).items()}


# --- torch, both formats ---


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_dtype(file_format: str) -> None:
    tensors = {f"w.{str(d)[6:]}": random_tensor(d, 3, 7, seed=i) for i, d in enumerate(TORCH_DTYPES)}
    layout = check(save(tensors, file_format), tensors, f"torch-{file_format}")
    assert all(span.shape == (3, 7) for span in layout.tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("file_format", FORMATS)
def test_every_pickle_protocol(file_format: str, protocol: int) -> None:
    tensors = {"a": torch.randn(4), "b": {"c": [torch.ones(2, 2), (torch.zeros(3),)]}, "h": torch.arange(5).half()}
    check(save(tensors, file_format, pickle_protocol=protocol), flatten(tensors))


class Callback:
    """Stands for what Lightning leaves in a checkpoint."""

    def __init__(self) -> None:
        self.best = torch.tensor([0.25, 0.5])
        self.history = [1.0, 2.0]


def trained() -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    checkpoint: dict[str, object] = {
        "epoch": 3,
        "global_step": 1 << 70,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {Callback: {"best_model_score": torch.tensor(0.5), "instance": Callback()}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_lr": [np.float64(0.1)], "array": np.arange(100.0), "bytes": b"x" * 300}],
        "state_dict": model.state_dict(),
        "when": {1, 2.5, None, frozenset([True])},
        "note": "é" * 5000,
    }
    names = flatten({k: v for k, v in checkpoint.items() if k not in ("callbacks", "state_dict")})
    return checkpoint, names | dict(model.state_dict())


@pytest.mark.parametrize("file_format", FORMATS)
def test_training_checkpoint_with_foreign_objects(file_format: str) -> None:
    checkpoint, expected = trained()
    data = save(checkpoint, file_format)
    spans = by_name(parse(data))
    for name, tensor in expected.items():
        assert data[spans[name].offset : spans[name].end] == storage_bytes(tensor), name
    assert spans["0.weight"].shape == (4, 3, 3, 3) and spans["0.weight"].dtype == "F32"
    assert spans["1.num_batches_tracked"].dtype == "I64" and spans["1.num_batches_tracked"].shape == ()
    others = {name for name in spans if name not in expected}
    assert {name.rpartition(".")[2] for name in others} == {"best_model_score", "best"}


def test_classes_that_cannot_be_imported(tmp_path: Path) -> None:
    """The class lives in the writing process only: a loader would fail, a walk does not mind."""
    path = tmp_path / "m.ckpt"
    code = """
import sys, types, torch
module = types.ModuleType("vanished_training_code"); sys.modules[module.__name__] = module
exec("class Monitor:\\n    pass\\nclass Table(dict):\\n    pass\\nclass Row(list):\\n    pass", module.__dict__)
m = module.Monitor(); m.score = torch.full((3,), 7.0); m.table = module.Table(x=module.Row([torch.full((2,), 9.0)]))
torch.save({"callbacks": m, "state_dict": {"w": torch.arange(10.0)}}, sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    data = path.read_bytes()
    spans = by_name(parse(data))
    assert set(spans) == {"w", "callbacks.score", "callbacks.table.x.0"}
    assert np.frombuffer(data[spans["w"].offset : spans["w"].end], "<f4").tolist() == list(range(10))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_whole_module_is_named_as_its_state_dict(file_format: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
    check(save(model, file_format), dict(model.state_dict()))


@pytest.mark.parametrize("file_format", FORMATS)
def test_views_share_one_span(file_format: str) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "part": base[2:4],
        "turned": base.t(),
        "whole": base,
        "strided": base[:, ::2],
        "other": torch.ones(3, 5).t(),
    }
    data = save(tensors, file_format)
    layout = check(data, tensors)
    assert len(layout.tensors) == 2
    shared, other = by_name(layout)["whole"], by_name(layout)["other"]
    assert (shared.name, shared.aliases, shared.shape) == ("part", ("turned", "whole", "strided"), (24,))
    assert other.shape == (15,), "not contiguous: flat"


@pytest.mark.parametrize("file_format", FORMATS)
def test_shapes_and_wrappers(file_format: str) -> None:
    tensors = {
        "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "one": torch.ones(1, 1, 5).transpose(0, 1),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)), "list": [torch.ones(2), [torch.zeros(1)]], 5: torch.ones(4),
    }  # fmt: skip
    data = save(tensors, file_format)
    layout = check(data, flatten(tensors))
    spans = by_name(layout)
    assert spans["scalar"].shape == () and spans["one"].shape == (1, 1, 5) and spans["parameter"].shape == (2, 3)


@pytest.mark.parametrize("file_format", FORMATS)
def test_sparse_and_quantized(file_format: str) -> None:
    coo = torch.eye(4).to_sparse()
    csr = torch.eye(3, dtype=torch.float64).to_sparse_csr()
    parts = {
        "coo.indices": coo.indices(), "coo.values": coo.values(),
        "csr.compressed_indices": csr.crow_indices(), "csr.plain_indices": csr.col_indices(),
        "csr.values": csr.values(),
    }  # fmt: skip
    check(save({"coo": coo, "csr": csr}, file_format), parts)
    quantized = torch.quantize_per_tensor(torch.randn(40), 0.1, 3, torch.qint8)
    (span,) = parse(save({"q": quantized}, file_format)).tensors
    assert (span.name, span.dtype, span.shape) == ("q", "QI8", (40,))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_bare_tensor_and_shared_names(file_format: str) -> None:
    check(save(torch.ones(5), file_format), {"tensor": torch.ones(5)})
    tied = torch.ones(7)
    (span,) = parse(save({"a": tied, "b": {"c": tied}}, file_format)).tensors
    assert (span.name, span.aliases, span.shape) == ("a", ("b.c",), (7,))


def test_names_stay_unique_when_state_dict_is_left_out() -> None:
    tensors = {"w": torch.zeros(2), "state_dict": {"w": torch.ones(2)}, 1: torch.ones(3), "1": torch.ones(4)}
    data = save(tensors)
    spans = by_name(parse(data))
    assert set(spans) == {"w", "w#2", "1", "1#2"}
    assert data[spans["w"].offset : spans["w"].end] == storage_bytes(torch.ones(2)), "state_dict comes first"
    assert set(by_name(parse(save({"model": {"w": torch.ones(2)}})))) == {"model.w"}


def test_storages_that_no_tensor_views() -> None:
    data = save({"typed": torch.ones(3).storage(), "bytes": torch.ones(2048).untyped_storage()})
    assert {(s.name, s.dtype, s.nbytes) for s in parse(data).tensors} == {
        ("storage/0", "F32", 12),
        ("storage/1", "U8", 8192),
    }


def test_offsets_agree_with_torch(tmp_path: Path) -> None:
    checkpoint, expected = trained()
    del checkpoint["callbacks"], checkpoint["lr_schedulers"], checkpoint["when"]
    path = tmp_path / "m.pt"
    torch.save(checkpoint, path)
    loaded = torch.load(path, map_location="meta", weights_only=True)
    with FileSource(path) as source:
        spans = by_name(containers.parse_strict(source))
    names = flatten({k: v for k, v in loaded.items() if k != "state_dict"}) | dict(loaded["state_dict"])
    assert set(names) == set(expected) == set(spans)
    for name, tensor in names.items():
        storage = tensor.untyped_storage()
        assert spans[name].offset == storage._checkpoint_offset, name
        assert spans[name].nbytes == storage.nbytes(), name


def test_torchscript_archive() -> None:
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    data = buffer.getvalue()
    spans = by_name(parse(data))
    for name, tensor in module.state_dict().items():
        assert data[spans[name].offset : spans[name].end] == storage_bytes(tensor), name


def test_legacy_python2_spelling() -> None:
    """Protocol 2 as Python 2 wrote it: byte strings, an OrderedDict from a list of lists, long numbers."""
    storage = b"(U\x07storageq\x01ctorch\nFloatStorage\nU\x0294U\x03cpuK\x03NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00(K\x03t(K\x01ttR"
    body = b"\x80\x02ccollections\nOrderedDict\n](](U\x01w" + tensor + b"eea\x85R."
    body = body.replace(b"](](", b"](]r\x01\x00\x00\x00(").replace(b"eea\x85R.", b"ee\x85R.")
    data = (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + b"\x80\x02}U\rlittle_endian\x88s." + body
    )
    data += b"\x80\x02]U\x0294a." + struct.pack("<q3f", 3, 1, 2, 3)
    (span,) = parse(data).tensors
    assert (span.name, span.dtype, span.shape, span.end) == ("w", "F32", (3,), len(data))


def test_legacy_stops_at_doubt() -> None:
    data = save({"a": torch.ones(8), "b": torch.ones(8)}, "legacy")
    first, second = parse(data).tensors
    wrong = bytearray(data)
    wrong[second.offset - 8] = 9  # a count that the pickle does not tell
    assert parse(bytes(wrong)).tensors == (first,)
    assert parse(data[:-1]).tensors == (first,)
    assert parse(data.replace(b"little_endian", b"little_ending", 1)).tensors == (first, second)
    swapped = bytearray(data)
    at = data.index(b"little_endian")
    swapped[data.index(b"\x88", at)] = 0x89
    assert parse(bytes(swapped)).tensors == (), "foreign byte order, too small for a section of its own"


# --- zips that torch would not write today ---


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


class Unseekable(io.BytesIO):
    """Makes zipfile write streamed members: sizes follow the data in a descriptor."""

    def seekable(self) -> bool:
        return False

    def seek(self, *args: object) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def write_zip(
    members: dict[str, bytes], deflate: tuple[str, ...] = (), stream: bool = False, zip64: bool = False
) -> bytes:
    file = Unseekable() if stream else io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if name in deflate else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(content)
    return file.getvalue()


TENSORS = {"a.weight": torch.arange(2000.0).reshape(40, 50), "a.bias": torch.arange(300).half(), "n": torch.arange(9)}


def zip_by_hand(
    members: dict[str, bytes], crc: bool = False, central_zip64: bool = False, descriptor: int = 0
) -> bytes:
    """A zip of stored members, field by field, to be odd in the ways that writers are."""
    out, directory = b"", b""
    for name, content in members.items():
        raw = name.encode()
        checksum = zlib.crc32(content) if crc else 0
        flags = 8 if descriptor else 0
        pad = b"FB" + struct.pack("<H", padding := -(len(out) + 34 + len(raw)) % 64) + b"Z" * padding
        local_size = 0 if descriptor else len(content)
        header = struct.pack(
            "<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, checksum, local_size, local_size, len(raw), len(pad)
        )
        offset = len(out)
        out += header + raw + pad + content
        if descriptor == 16:
            out += struct.pack("<4s3I", b"PK\7\x08", checksum, len(content), len(content))
        elif descriptor == 24:
            out += struct.pack("<4sI2Q", b"PK\7\x08", checksum, len(content), len(content))
        full = 0xFFFFFFFF
        extra = struct.pack("<2H3Q", 1, 24, len(content), len(content), offset) if central_zip64 else b""
        sizes = (full, full) if central_zip64 else (len(content), len(content))
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 45, 45, flags, 0, 0, 0, checksum, *sizes, len(raw), len(extra), 0, 0, 0, 0,
            full if central_zip64 else offset,
        ) + raw + extra  # fmt: skip
    start, count = len(out), len(members)
    tail = b""
    if central_zip64:
        tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
        start = count = -1
    tail += struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), start & 0xFFFFFFFF, 0
    )
    return out + directory + tail


@pytest.mark.parametrize(
    "options",
    [{}, {"crc": True}, {"central_zip64": True}, {"descriptor": 16}, {"descriptor": 24, "central_zip64": True}],
    ids=str,
)
@pytest.mark.parametrize("order", ["torch", "reversed", "data first"])
def test_zip_by_hand(options: dict[str, int], order: str) -> None:
    members = members_of(save(TENSORS))
    names = sorted(members, key=lambda n: "/data/" not in n) if order == "data first" else list(members)
    if order == "reversed":
        names.reverse()
    members = {name.replace("archive/", "sub folder/é/"): members[name] for name in names}
    data = zip_by_hand(members, **options)  # type: ignore[arg-type]
    if "descriptor" not in options:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert len(archive.infolist()) == len(members)
    check(data, TENSORS, "torch-zip")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("zip64", [False, True])
def test_zipfile_as_the_writer(stream: bool, zip64: bool) -> None:
    check(write_zip(members_of(save(TENSORS)), stream=stream, zip64=zip64), TENSORS, "torch-zip")


def test_deflated_members_are_literal() -> None:
    members = members_of(save(TENSORS))
    pickle_name = next(n for n in members if n.endswith("data.pkl"))
    check(write_zip(members, deflate=(pickle_name,)), TENSORS)
    deflated = next(n for n in members if n.endswith("/data/0"))
    spans = by_name(parse(write_zip(members, deflate=(pickle_name, deflated))))
    assert set(spans) == set(TENSORS) - {"a.weight"}
    assert parse(write_zip(members, deflate=tuple(members))).tensors == ()


def test_members_in_doubt_are_literal() -> None:
    data = zip_by_hand(members_of(save(TENSORS)))
    whole = by_name(parse(data))
    weight = whole["a.weight"]
    header = data.rindex(b"PK\3\4", 0, weight.offset)
    for at, value in (
        (0, 0x51),
        (6, 1),
        (8, 8),
        (26, 1),
        (30, 0x20),
    ):  # signature, encrypted, method, name length, name
        wrong = bytearray(data)
        wrong[header + at] = value
        assert set(by_name(parse(bytes(wrong)))) == set(TENSORS) - {"a.weight"}, at
    central = data.index(b"PK\1\2", data.index(b"archive/data/0", weight.end) - 46)
    for at, value in ((8, 1), (10, 8), (20, 1)):  # encrypted, method, compressed size
        wrong = bytearray(data)
        wrong[central + at] = value
        assert set(by_name(parse(bytes(wrong)))) == set(TENSORS) - {"a.weight"}, at


def test_a_record_longer_or_shorter_than_its_storage() -> None:
    members = members_of(save(TENSORS))
    name = next(n for n in members if n.endswith("/data/0"))
    longer = parse(zip_by_hand(members | {name: members[name] + b"tail"}))
    assert by_name(longer)["a.weight"].nbytes == 8000
    shorter = parse(zip_by_hand(members | {name: members[name][:-1]}))
    assert set(by_name(shorter)) == set(TENSORS) - {"a.weight"}


def test_big_endian_numbers_are_bytes() -> None:
    members = members_of(save(TENSORS))
    name = next(n for n in members if n.endswith("byteorder"))
    assert members[name] == b"little"
    assert {(s.name, s.dtype, s.shape) for s in parse(zip_by_hand(members | {name: b"big"})).tensors} == {
        ("a.weight", "U8", (8000,))
    }
    check(zip_by_hand({n: m for n, m in members.items() if n != name}), TENSORS)


def test_records_that_the_pickle_does_not_tell_of() -> None:
    members = members_of(save(TENSORS))
    folder = next(n for n in members if n.endswith("/data/0"))[:-1]
    layout = parse(zip_by_hand(members | {folder + "large": b"x" * 4096, folder + "small": b"x" * 4095}))
    assert [(s.name, s.dtype) for s in layout.tensors if s.name not in TENSORS] == [("storage/large", "U8")]


def test_the_checkpoint_among_several_pickles() -> None:
    members = {"extra/data.pkl": pickle.dumps({"no": "tensors"})} | members_of(save(TENSORS))
    check(zip_by_hand(members), TENSORS)


def test_a_zip_that_is_no_checkpoint() -> None:
    data = zip_by_hand({"a/b.txt": b"text"})
    assert containers.parse(BytesSource(data)).container == "opaque"
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(10))
    assert containers.parse(BytesSource(buffer.getvalue())).container == "opaque"


# --- safetensors ---


def test_safetensors(tmp_path: Path) -> None:
    dtypes = [
        d
        for d in TORCH_DTYPES
        if d not in (torch.complex32, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    ]
    tensors = {f"é.{i}": random_tensor(d, 5, 3, seed=i) for i, d in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(3, 0)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "long": "y" * 100_000})
    layout = check(path.read_bytes(), tensors, "safetensors")
    assert layout.spans[0].dtype == "" and by_name(layout)["é.0"].shape == (5, 3)
    assert dict(layout.metadata) == {"format": "pt", "long": "y" * 65536}


def safetensors_bytes(header: dict[str, object] | bytes, nbytes: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(i % 251 for i in range(nbytes))


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_in_doubt() -> None:
    header = {
        "ok": entry("F32", [2, 2], 0, 16),
        "overlap": entry("U8", [4], 12, 16),
        "hole before": entry("F16", [2], 20, 24),
        "wrong shape": entry("F32", [2], 24, 28),
        "future": entry("F4", [2, 8], 28, 36),
        "backwards": entry("U8", [4], 40, 36),
        "outside": entry("U8", [100], 36, 136),
        "huge": entry("U8", [1 << 40, 1 << 40], 36, 37),
        "no numbers": entry("F32", [0], 3, 3),
    }
    data = safetensors_bytes(header, 50)
    layout = parse(data)
    start = len(data) - 50
    assert [(s.name, s.offset - start, s.nbytes, s.dtype, s.shape) for s in layout.tensors] == [
        ("ok", 0, 16, "F32", (2, 2)),
        ("hole before", 20, 4, "F16", (2,)),
        ("future", 28, 8, "U8", (8,)),
    ]


def test_safetensors_metadata_is_bounded() -> None:
    layout = parse(safetensors_bytes({"__metadata__": {f"k{i}": "é" * 40_000 for i in range(100)}}, 0))
    assert len(layout.metadata) == 64
    assert all(len(value.encode()) <= 65536 and set(value) == {"é"} for _, value in layout.metadata)


def test_other_files_are_opaque() -> None:
    for data in (b"", b"x", b"GGUF" + bytes(100), b"PK\3\4", bytes(1000), pickle.dumps({"a": 1})):
        layout = containers.parse(BytesSource(data), "m.safetensors")
        assert (layout.container, layout.tensors, layout.size) == ("opaque", (), len(data))


def test_unknown_types_are_never_given_a_span_type() -> None:
    """Whatever torch can save is either in the table or bytes."""
    for span in parse(save({"q": torch.quantize_per_tensor(torch.randn(9000), 0.1, 3, torch.quint4x2)})).tensors:
        assert span.dtype in DTYPES


def test_order_of_state_dict_metadata_does_not_disturb() -> None:
    state = OrderedDict(w=torch.ones(3))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    check(save(state), {"w": torch.ones(3)})
    assert parse(save(state)).container == torch_zip.CONTAINER


def assert_views(layout: Layout, data: bytes, tensors: dict[str, torch.Tensor]) -> None:
    """Each view holds its tensor's elements as a program that loads the model gets them, in the model's order."""
    assert [view.name for view in layout.views] == list(tensors)
    for view in layout.views:
        tensor = tensors[view.name]
        assert (view.shape, view.elements) == (tuple(tensor.shape), tensor.numel())
        assert view.dtype == BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")].name
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert data[view.offset : view.offset + view.nbytes] == raw, view.name


@pytest.mark.parametrize("file_format", FORMATS)
def test_views_of_torch_tensors(file_format: str) -> None:
    whole = torch.randn(60, 40)
    tensors = {
        "z last by name, first in the file": torch.arange(5),
        "whole": whole,
        "tied": whole,
        "rows": whole[10:20],
        "scalar": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
    }
    strided = {"columns": whole[:, :7], "transposed": whole.t(), "expanded": torch.ones(1).expand(4)}
    data = save({"state_dict": {**tensors, **strided}}, file_format)
    layout = parse(data)
    assert_views(layout, data, tensors)
    assert set(layout.strided) == set(strided)


def test_views_of_tensors_without_elements() -> None:
    tensors = {"none": torch.zeros(0, 5), "some": torch.ones(3)}
    data = save(tensors)
    assert_views(parse(data), data, tensors)


def test_views_of_safetensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(6), "none": torch.zeros(2, 0)}
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    layout = parse(data)
    assert_views(layout, data, {view.name: tensors[view.name] for view in layout.views})
    assert {view.name for view in layout.views} == set(tensors)
    header = json.dumps({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    layout = parse(struct.pack("<Q", len(header)) + header + bytes(4))
    assert (layout.views, layout.strided) == ((), ("x",))
