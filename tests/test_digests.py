"""The hashes that other programs use: what they are, that every diff has them, that nothing is read to tell them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from conftest import Filled, ModelMaker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydrafs import digests as digests_room
from hydrafs import encode
from hydrafs.cache import ChunkCache
from hydrafs.catalog import Catalog
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile, read_hashes
from hydrafs.digests import NBYTES, Digests, checked, twins_available
from hydrafs.errors import CorruptDiff
from hydrafs.hashing import KnownHashes, compute, missing
from hydrafs.manifest import decode_hashes, decode_manifest, encode_manifest
from hydrafs.opening import Opener
from hydrafs.restore import uncompress
from hydrafs.store import Store
from hydrafs.vfs import StoreTree


def wanted(data: bytes, *, safetensors: bool) -> dict[str, bytes]:
    """The hashes as the programs take them that use them."""
    hashes = {
        "sha256": hashlib.sha256(data).digest(),
        "blake3": blake3(data).digest(),
        "partial_sha256": hashlib.sha256(data[0x100000:0x110000]).digest(),
    }
    if safetensors:
        (nbytes,) = struct.unpack("<Q", data[:8])
        hashes["addnet_sha256"] = hashlib.sha256(data[8 + nbytes :]).digest()
    return hashes


@pytest.fixture(params=[True, False], ids=["twins", "apart"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extension, and as on a processor without SHA instructions."""
    if not request.param:
        monkeypatch.setattr(digests_room, "_native", None)
    elif not twins_available():
        pytest.skip("no SHA instructions here, or the extension is not built")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    header=st.integers(0, 300),
    size=st.integers(0, 0x120000),
    cuts=st.lists(st.integers(0, 0x120000), max_size=6),
    safetensors=st.booleans(),
)
def test_whatever_the_blocks_are(either: None, header: int, size: int, cuts: list[int], safetensors: bool) -> None:
    body = (b"0123456789abcdefg" * (size // 17 + 1))[:size]
    data = struct.pack("<Q", header) + bytes(header) + body
    with Digests(safetensors=safetensors) as digests:
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, stop in itertools.pairwise(edges):
            digests.update(data[start:stop])
        sha256, found = digests.finish()
    assert {"sha256": sha256, **dict(found)} == wanted(data, safetensors=safetensors)
    assert list(found) == sorted(found)


def test_a_file_cut_byte_by_byte(either: None) -> None:
    data = struct.pack("<Q", 2) + b"{}" + b"weights"
    with Digests(safetensors=True) as digests:
        for byte in data:
            digests.update(bytes([byte]))
        sha256, found = digests.finish()
    assert sha256 == hashlib.sha256(data).digest()
    assert dict(found)["addnet_sha256"] == hashlib.sha256(b"weights").digest()


@given(st.integers(0, 2**32), st.lists(st.integers(0, 300), max_size=9), st.integers(0, 600))
def test_the_extension_takes_two_sha256s(seed: int, sizes: list[int], skipped: int) -> None:
    """Blocks of any size, the second file beginning anywhere in the first one."""
    native = pytest.importorskip("hydrafs._twins")
    if not native.available():
        with pytest.raises(NotImplementedError):
            native.begin()
        return
    pair, data = native.begin(), b""
    for size in sizes:
        block = random.Random(seed + len(data)).randbytes(size)
        native.update(pair, block, min(size, max(0, skipped - len(data))))
        data += block
        assert native.finish(pair) == (hashlib.sha256(data).digest(), hashlib.sha256(data[skipped:]).digest())


def test_the_extension_refuses_what_is_not_there() -> None:
    native = pytest.importorskip("hydrafs._twins")
    if not native.available():
        pytest.skip("no SHA instructions here")
    pair = native.begin()
    for skipped in (4, -1):
        with pytest.raises(ValueError, match="skipped"):
            native.update(pair, b"123", skipped)
    for wrong in (b"", None, 7):
        with pytest.raises((TypeError, ValueError)):
            native.finish(wrong)
        with pytest.raises((TypeError, ValueError)):
            native.update(wrong, b"123", 0)
    with pytest.raises(TypeError):
        native.update(pair, "text", 0)
    assert native.finish(pair) == (hashlib.sha256().digest(),) * 2


def test_every_new_diff_has_them(filled: Filled) -> None:
    filled.dehydrate()
    expected = wanted(filled.data, safetensors=True)
    assert read_hashes(filled.diff) == expected
    with DiffFile(filled.diff) as diff:
        assert {"sha256": diff.manifest.sha256, **dict(diff.manifest.hashes)} == expected


def test_a_checkpoint_has_no_addnet_hash(models: ModelMaker, store: Path) -> None:
    models.save(store / "base.ckpt", models.base())
    tuned = models.save(store / "tuned.ckpt", models.tuned())
    data = tuned.read_bytes()
    assert len(data) > 0x110000, "the block of the old hash is in it"
    with contextlib.closing(Store(store, create=True)) as opened:
        outcome = dehydrate(opened, tuned, Options(jobs=2))
    assert outcome.diff
    assert read_hashes(outcome.diff) == wanted(data, safetensors=False)


def test_they_stay_when_a_diff_is_recoded(filled: Filled) -> None:
    filled.dehydrate()
    with contextlib.closing(Store(filled.root)) as store:
        uncompress(store, store.locate(filled.tuned), jobs=2)
    assert read_hashes(filled.diff) == wanted(filled.data, safetensors=True)


def test_the_model_is_read_once_for_all_of_them(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dehydrating reads of a model while it codes it is the model, each byte once."""
    reads: list[int] = []
    real = encode.encode_model

    class Counting:
        def __init__(self, source: object) -> None:
            self._source = source

        def pread(self, offset: int, nbytes: int) -> bytes:
            block: bytes = self._source.pread(offset, nbytes)  # type: ignore[attr-defined]
            reads.append(len(block))
            return block

        def pread_into(self, offset: int, out: memoryview) -> int:
            count: int = self._source.pread_into(offset, out)  # type: ignore[attr-defined]
            reads.append(count)
            return count

        def __getattr__(self, name: str) -> object:
            return getattr(self._source, name)

    def counting(source: object, *arguments: object, **options: object) -> object:
        return real(Counting(source), *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("hydrafs.dehydrate.encode_model", counting)
    filled.dehydrate()
    assert sum(reads) == len(filled.data)
    assert set(read_hashes(filled.diff)) == {"sha256", *NBYTES}


def test_an_old_diff_is_read_and_hashed_once_when_asked(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, make_old: Callable[[Path], None]
) -> None:
    filled.dehydrate()
    make_old(filled.diff)
    expected = wanted(filled.data, safetensors=True)
    with contextlib.closing(Store(filled.root)) as store:
        entry = store.locate(filled.tuned)

        def known() -> dict[str, bytes]:
            return KnownHashes(store).of(entry.path, entry.path.stat(), is_diff=True)

        assert known() == {"sha256": filled.sha256}
        assert missing(known(), "safetensors") == ["addnet_sha256", "blake3", "partial_sha256"]
        assert missing(known(), "torch-zip") == ["blake3", "partial_sha256"]
        assert compute(store, entry) == expected
        assert known() == expected
    with contextlib.closing(Store(filled.root)) as store:
        monkeypatch.setattr(Opener, "open_diff", None)
        assert KnownHashes(store).of(entry.path, entry.path.stat(), is_diff=True) == expected, "they were kept"


def test_a_plain_file_is_hashed_when_asked(filled: Filled) -> None:
    with contextlib.closing(Store(filled.root, create=True)) as store:
        entry = store.locate(filled.base)
        known = KnownHashes(store)
        assert known.of(entry.path, entry.path.stat(), is_diff=False) == {}
        expected = wanted(filled.base.read_bytes(), safetensors=True)
        assert compute(store, entry) == expected
        assert known.of(entry.path, entry.path.stat(), is_diff=False) == expected
        os.utime(filled.base)  # another identity: nothing is known of it
        assert known.of(entry.path, entry.path.stat(), is_diff=False) == {}


def test_attributes_of_the_mount(filled: Filled) -> None:
    filled.dehydrate()
    tree = StoreTree(filled.root)
    tree.start()
    try:
        path = "/tuned.safetensors"
        for name, value in wanted(filled.data, safetensors=True).items():
            assert f"user.hash.{name}" in tree.listxattr(path)
            assert tree.getxattr(path, f"user.hash.{name}") == value.hex().encode()
        assert tree.statistics().misses == 0, "nothing was decoded"
    finally:
        tree.stop()


def test_a_damaged_manifest_has_none(filled: Filled) -> None:
    filled.dehydrate()
    data = bytearray(filled.diff.read_bytes())
    with DiffFile(filled.diff) as diff:
        data[diff.trailer.manifest_offset + 9] ^= 0x40
    filled.diff.write_bytes(data)
    with pytest.raises(CorruptDiff, match="damaged"):
        read_hashes(filled.diff)
    with contextlib.closing(Store(filled.root)) as store:
        assert KnownHashes(store).of(filled.diff, filled.diff.stat(), is_diff=True) == {}


def test_hashes_of_another_size_or_name_are_passed_over(filled: Filled) -> None:
    filled.dehydrate()
    with DiffFile(filled.diff) as diff:
        manifest = diff.manifest
    strange = (("blake3", bytes(32)), ("md5", bytes(16)), ("partial_sha256", b"short"))
    data = encode_manifest(msgspec.structs.replace(manifest, hashes=strange))
    assert decode_manifest(data, "x").hashes == strange
    assert decode_hashes(data, "x") == checked(strange) == {"blake3": bytes(32)}
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(data)[:14])
    assert decode_hashes(old, "x") == {}
    assert decode_manifest(old, "x") == msgspec.structs.replace(manifest, hashes=())
    too_many = encode_manifest(msgspec.structs.replace(manifest, hashes=strange * 4000))
    for decode in (decode_hashes, decode_manifest):
        with pytest.raises(CorruptDiff, match="too large"):
            decode(too_many, "x")
        with pytest.raises(CorruptDiff):
            decode(msgspec.msgpack.encode([*msgspec.msgpack.decode(data)[:14], [["blake3", 7]]]), "x")


def test_a_catalog_of_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path)
    catalog.remember_directory(tmp_path, 5, 7)
    assert catalog._database
    catalog._database.execute("DROP TABLE hashes")
    catalog.close()
    catalog = Catalog(path)
    assert catalog.directory(tmp_path) == (5, 7)
    catalog.remember_hashes(bytes(32), [("blake3", b"1" * 32), ("unknown", b"2")])
    assert catalog.hashes(bytes(32)) == {"blake3": b"1" * 32}
    assert catalog.hashes(b"1" * 32) == {}
    catalog.close()


def test_a_failure_leaves_no_thread_behind(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "code_chunk", fail)
    with pytest.raises(Exception, match="space"):
        filled.dehydrate(dataclasses.replace(filled.options))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("hydrafs-")]
    assert ChunkCache(1).statistics().misses == 0
