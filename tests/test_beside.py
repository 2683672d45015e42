"""What runs beside the coding of a model: the SHA-256 of a new base, and reading ahead. None of it may cost a model."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Filled, ModelMaker
from test_dehydrate import check_nothing_lost, leftovers

from hydrafs import basehash
from hydrafs import dehydrate as dehydrating
from hydrafs.basehash import BaseHashes
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.encode import same_bytes
from hydrafs.errors import Changing, HydraError
from hydrafs.identity import FileIdentity, sha256
from hydrafs.layout import ByteSource, FileSource
from hydrafs.manifest import PREDICTION_TENSOR, Section, SpanRecord
from hydrafs.prefetch import STEP_NBYTES, Prefetch, Range, for_coding, in_order
from hydrafs.store import Store

Read = Callable[[int], None]


def while_hashing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> threading.Event:
    """``act`` happens on the hashing thread when the base has been read, and not before all of the model was coded."""
    coded, happened = threading.Event(), threading.Event()
    encode = dehydrating.encode_model

    def encode_model(*args: object, last: Callable[[], object], **kwargs: object) -> object:
        def coded_now() -> object:
            coded.set()
            return last()

        return encode(*args, last=coded_now, **kwargs)  # type: ignore[arg-type]

    def late(source: ByteSource, progress: Read | None = None) -> bytes:
        digest = sha256(source, progress)
        assert coded.wait(30)
        happened.set()
        act()
        return digest

    monkeypatch.setattr(dehydrating, "encode_model", encode_model)
    monkeypatch.setattr(basehash, "sha256", late)
    return happened


def check_untouched(filled: Filled) -> None:
    assert filled.tuned.read_bytes() == filled.data
    assert not filled.diff.exists()
    assert not leftovers(filled.root)
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("hydrafs-basehash", "hydrafs-prefetch"))]


@pytest.mark.parametrize("how", ["in place", "replaced", "removed", "grown"])
def test_a_base_that_changes_while_it_is_hashed(filled: Filled, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def change() -> None:
        if how in ("in place", "grown"):
            with filled.base.open("r+b") as file:
                file.seek(-1 if how == "in place" else 0, os.SEEK_END)
                file.write(b"\x00\xff")
        else:
            content = filled.base.read_bytes()
            filled.base.unlink()
            if how == "replaced":
                filled.base.write_bytes(content[::-1])

    happened = while_hashing(monkeypatch, change)
    with pytest.raises(Changing):
        filled.dehydrate()
    assert happened.is_set()
    check_untouched(filled)
    with contextlib.closing(Store(filled.root)) as store:
        for path in filled.base, filled.base.resolve():
            if path.exists():
                assert store.catalog.sha256(path, FileIdentity.of(path.stat())) is None


def test_a_base_that_cannot_be_read_to_its_end(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise HydraError("cannot read", where=filled.base, detail=os.strerror(errno.EIO))

    happened = while_hashing(monkeypatch, fail)
    with pytest.raises(HydraError, match="cannot read"):
        filled.dehydrate()
    assert happened.is_set()
    check_untouched(filled)


def test_a_model_that_fails_does_not_wait_for_its_base(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def endless(source: ByteSource, progress: Read) -> bytes:
        while True:
            started.set()
            progress(1)
            time.sleep(0.001)

    def broken(*args: object, **kwargs: object) -> None:
        assert started.wait(30)
        raise HydraError("no")

    monkeypatch.setattr(basehash, "sha256", endless)
    monkeypatch.setattr(dehydrating, "encode_model", broken)
    with pytest.raises(HydraError, match="no"):
        filled.dehydrate()
    check_untouched(filled)


_KILLED = """
import os, signal, sys
from pathlib import Path
from hydrafs import basehash
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.store import Store
take = basehash.sha256
basehash.sha256 = lambda source, progress: (take(source, progress), os.kill(os.getpid(), signal.SIGKILL))
dehydrate(Store(sys.argv[1], create=True), Path(sys.argv[2]), Options(jobs=2, chunk_nbytes=32 << 10))
"""


def test_killed_while_the_base_is_hashed(filled: Filled) -> None:
    command = [sys.executable, "-c", _KILLED, filled.root, filled.tuned]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert filled.tuned.exists()
    check_nothing_lost(filled)


def test_the_hash_is_told_in_full_by_the_thread_that_dehydrates_and_once(filled: Filled) -> None:
    told: dict[str, int] = {}
    totals: set[tuple[str, int]] = set()
    caller = threading.current_thread()

    def progress(stage: str, nbytes: int, total: int) -> None:
        assert threading.current_thread() is caller
        told[stage] = told.get(stage, 0) + nbytes
        totals.add((stage, total))

    size = filled.base.stat().st_size
    keep = Options(jobs=2, chunk_nbytes=32 << 10, keep=True)
    with contextlib.closing(Store(filled.root, create=True)) as store:
        dehydrate(store, filled.tuned, keep, progress=progress)
        assert told == {"hash": size, "encode": len(filled.data), "prove": len(filled.data)}
        assert totals == {("hash", size), ("encode", len(filled.data)), ("prove", len(filled.data))}
        told.clear()
        dehydrate(store, filled.tuned, keep, progress=progress)
    assert "hash" not in told


def test_links_and_several_bases(models: ModelMaker, store: Path, tmp_path: Path) -> None:
    one = models.save(store / "one.safetensors", models.base("fp16"))
    two = models.save(tmp_path / "two.safetensors", models.tuned("fp16"))
    link = store / "two.safetensors"
    link.symlink_to(two)
    with contextlib.closing(Store(store, create=True)) as opened:
        hashes = BaseHashes(opened, [opened.locate(one), opened.locate(link)])
        assert len({p.sha256 for p in hashes.parents}) == 2
        told: list[tuple[int, int]] = []
        parents = hashes.complete(lambda nbytes, total: told.append((nbytes, total)))
        hashes.close()
        expected = [hashlib.sha256(path.read_bytes()).digest() for path in (one, two)]
        assert [p.sha256 for p in parents] == expected
        total = one.stat().st_size + two.stat().st_size
        assert (sum(n for n, _ in told), {t for _, t in told}) == (total, {total})
        for path, digest in zip((one, two, link), (*expected, expected[1]), strict=True):
            assert opened.catalog.sha256(path, FileIdentity.of(path.stat())) == digest
        again = BaseHashes(opened, [opened.locate(one), opened.locate(link)])
        assert [p.sha256 for p in again.parents] == expected
        assert again.complete(lambda nbytes, total: pytest.fail("read again")) == parents
        again.close()


# Reading ahead


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, advice: calls.append((fd, at, n)))
    return calls


def settled(calls: list[tuple[int, int, int]], count: int) -> int:
    deadline = time.monotonic() + 10
    while len(calls) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(calls)


def test_no_further_ahead_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch)
    ahead = Prefetch((Range(i * 10, 5, i * 10, 10) for i in range(100)), window_nbytes=50)
    assert settled(calls, 5) == 5
    ahead.advance(20)
    assert settled(calls, 7) == 7
    ahead.advance(500)  # what the reader has passed is not asked for
    assert settled(calls, 12) == 12
    assert calls[7] == (5, 520, 10)
    ahead.close()
    assert len(calls) == 12


def test_advice_that_is_refused_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> None:
        raise OSError(errno.ESPIPE, "no")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    ahead = Prefetch(in_order(3, 100, 100))
    ahead.advance(10)
    ahead.close()


def test_what_a_pass_reads_is_asked_for(tmp_path: Path) -> None:
    """The whole model, and each large tensor of the base, when its turn comes; neighbours in one request."""
    big, small = 3 * STEP_NBYTES + 1000, 64
    for name, size in (("model", big + small + big // 2), ("base", big * 2)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    spans = [
        SpanRecord(big, 0, "a", prediction=PREDICTION_TENSOR, parent=0, origin=500),
        SpanRecord(small, 0),
        SpanRecord(big // 2, 1, "b", prediction=PREDICTION_TENSOR, parent=0, origin=big + 500, origin_dtype="F32"),
    ]
    sections = [Section("F16", 0), Section("F16", 0)]
    with FileSource(tmp_path / "model") as model, FileSource(tmp_path / "base") as base:
        ranges = list(for_coding(model, spans, sections, [base]))
        assert [r.position for r in ranges] == sorted(r.position for r in ranges)
        for fd, begin, end in ((model.fd, 0, model.size), (base.fd, 500, 500 + big + big // 2 * 2)):
            at = begin
            for r in (r for r in ranges if r.fd == fd):
                assert r.offset == at
                assert r.nbytes < 1.1 * STEP_NBYTES
                at += r.nbytes
            assert at == end
        assert next(r for r in ranges if r.fd == base.fd and r.offset > big).position >= big


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 4095, 4097, 10_001])
def test_bytes_are_compared_to_the_last(nbytes: int) -> None:
    one = np.arange(nbytes + 1, dtype=np.uint8)[1:]
    assert same_bytes(one, one.copy())
    for place in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        other = one.copy()
        other[place] ^= 1
        assert not same_bytes(one, other)
