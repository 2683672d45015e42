"""Random access to a diff: the right bytes whatever is asked, by whomever, and no more decoded than need be."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Filled, ModelMaker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydrafs import dehydrate as dehydrating
from hydrafs.cache import Chunk, ChunkCache
from hydrafs.errors import CorruptChunk, HydraError
from hydrafs.manifest import PREDICTION_SAME
from hydrafs.opening import Opener
from hydrafs.readahead import DecodePool, Reader
from hydrafs.rehydrate import Rehydrated
from hydrafs.restore import prove, read_all
from hydrafs.store import Store

CHUNK = 8 << 10
SECONDS = 30
"""How long a test waits for what must happen; it is never waited out when all is well."""


@pytest.fixture(scope="module")
def shared(models: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A fine-tune in bfloat16 with many chunks, which no test changes."""
    root = tmp_path_factory.mktemp("shared")
    base = models.save(root / "base.safetensors", models.base("bf16"))
    tuned = models.save(root / "tuned.ckpt", models.tuned("bf16"))
    filled = Filled(root, base, tuned, tuned.read_bytes(), dehydrating.Options(jobs=2, chunk_nbytes=CHUNK))
    assert filled.dehydrate().diff
    return filled


@pytest.fixture
def cache() -> ChunkCache:
    return ChunkCache(8 << 20)


@pytest.fixture
def model(shared: Filled, cache: ChunkCache) -> Iterator[Rehydrated]:
    with (
        contextlib.closing(Store(shared.root)) as store,
        contextlib.closing(Opener(store, cache)) as opener,
        opener.open_diff(shared.diff) as opened,
    ):
        yield opened


class Watch:
    """The decodes of one model: which chunks, by which thread; any of them can be held."""

    def __init__(self, model: Rehydrated, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: list[int] = []
        self.threads: set[str] = set()
        self.held: dict[int, threading.Event] = {}
        self.begun: dict[int, threading.Event] = {}
        decode: Callable[[int], Chunk] = model._decode

        def watched(number: int) -> Chunk:
            self.decoded.append(number)
            self.threads.add(threading.current_thread().name)
            if number in self.held:
                self.begun[number].set()
                assert self.held[number].wait(SECONDS)
            return decode(number)

        monkeypatch.setattr(model, "_decode", watched)

    def hold(self, number: int) -> threading.Event:
        """Let the decode of a chunk wait for the event that is returned."""
        self.begun[number] = threading.Event()
        self.held[number] = threading.Event()
        return self.held[number]


@pytest.fixture
def watch(model: Rehydrated, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(model, monkeypatch)


def tensor(model: Rehydrated, *, chunks: int) -> tuple[int, int]:
    """The range of a tensor that takes at least so many chunks of its own, and does not stand in a parent as it is."""
    table = model.diff.table
    for number, span in enumerate(model.manifest.spans):
        if span.nbytes >= chunks * CHUNK and span.prediction != PREDICTION_SAME:
            assert table.in_section[number] == 0
            return int(table.offsets[number]), int(table.offsets[number]) + span.nbytes
    raise AssertionError("no such tensor")


# The bytes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pread_is_the_slice(shared: Filled, model: Rehydrated, data: st.DataObject) -> None:
    size = len(shared.data)
    edges = [int(o) for o in model.diff.table.offsets] + [size]
    near = st.builds(lambda edge, by: max(0, edge + by), st.sampled_from(edges), st.integers(-9, 9))
    offset = data.draw(st.integers(0, size + 10) | near)
    nbytes = data.draw(st.integers(0, 100) | st.integers(0, size) | st.sampled_from([CHUNK, 1 << 20, 1 << 40]))
    expected = shared.data[offset : offset + nbytes]
    assert model.pread(offset, nbytes) == expected
    out = bytearray(b"\xaa" * min(nbytes, size + 10))
    assert model.pread_into(offset, memoryview(out)) == len(expected)
    assert out[: len(expected)] == expected
    assert set(out[len(expected) :]) <= {0xAA}


def test_reads_through_a_reader_are_the_slice(shared: Filled, model: Rehydrated) -> None:
    rng = random.Random(0)
    with contextlib.closing(DecodePool(2, 64 << 10)) as pool:
        reader = Reader(model, pool)
        for _ in range(300):
            offset, nbytes = rng.randrange(len(shared.data)), rng.randrange(1, 60_000)
            out = bytearray(nbytes)
            count = reader.pread_into(offset, memoryview(out))
            assert out[:count] == shared.data[offset : offset + nbytes]


def test_eight_threads_read_at_once(shared: Filled, model: Rehydrated, watch: Watch) -> None:
    barrier = threading.Barrier(8)

    def one(seed: int) -> None:
        rng = random.Random(seed)
        barrier.wait(SECONDS)
        for _ in range(60):
            offset, nbytes = rng.randrange(len(shared.data)), rng.randrange(1, 80_000)
            assert model.pread(offset, nbytes) == shared.data[offset : offset + nbytes]

    with ThreadPoolExecutor(8) as pool:
        for task in [pool.submit(one, seed) for seed in range(8)]:
            task.result(SECONDS)
    assert max(Counter(watch.decoded).values()) == 1, "a chunk was decoded twice though all of them fit the cache"


def test_the_empty_range_and_beyond_the_end(model: Rehydrated) -> None:
    assert model.pread(0, 0) == b""
    assert model.pread(model.size, 10) == b""
    assert model.pread(model.size + 1000, 10) == b""
    assert model.pread(5, -1) == b""


# The cache


def test_what_is_kept_stays_within_the_budget(shared: Filled) -> None:
    budget = 5 * CHUNK + 100
    cache = ChunkCache(budget)
    with contextlib.closing(Store(shared.root)) as store, Opener(store, cache).open_diff(shared.diff) as model:
        for offset in range(0, model.size, 5000):
            assert model.pread(offset, 5000) == shared.data[offset : offset + 5000]
            assert cache.statistics().nbytes <= budget
    assert cache.statistics().chunks > 0


@pytest.mark.parametrize("budget", [0, 1, CHUNK - 1])
def test_a_cache_that_holds_no_chunk_still_serves(shared: Filled, budget: int) -> None:
    cache = ChunkCache(budget)
    with contextlib.closing(Store(shared.root)) as store, Opener(store, cache).open_diff(shared.diff) as model:
        assert model.pread(0, model.size) == shared.data
    assert cache.statistics().nbytes <= max(1, budget)


def test_the_least_recently_used_chunk_leaves_first() -> None:
    cache = ChunkCache(3 * 100)
    made: list[int] = []

    def get(number: int) -> None:
        def decode() -> Chunk:
            made.append(number)
            return np.zeros(100, np.uint8)

        cache.get(("model", number), decode)

    for number in (1, 2, 3, 1, 4, 1, 3, 2):
        get(number)
    assert made == [1, 2, 3, 4, 2]
    assert cache.statistics().hits == 3


def test_one_decode_per_chunk_under_contention(model: Rehydrated, watch: Watch, cache: ChunkCache) -> None:
    offset, _ = tensor(model, chunks=2)
    chunk = model.chunks_between(offset, offset + 1)[0]
    go = watch.hold(chunk)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(model.pread, offset, 100)
        assert watch.begun[chunk].wait(SECONDS)
        others = [pool.submit(model.pread, offset, 100) for _ in range(7)]
        while cache.statistics().waits < 7:  # all of them have found the decode that runs
            pass
        go.set()
        assert {task.result(SECONDS) for task in [first, *others]} == {model.pread(offset, 100)}
    assert watch.decoded.count(chunk) == 1


def test_no_lock_is_held_while_decoding(shared: Filled, model: Rehydrated, watch: Watch) -> None:
    offset, end = tensor(model, chunks=4)
    chunk = model.chunks_between(offset, offset + 1)[0]
    go = watch.hold(chunk)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(model.pread, offset, 100)
        assert watch.begun[chunk].wait(SECONDS)
        # The decode of the first chunk stands still; all the rest of the model can be read meanwhile, and stat'ed.
        assert model.pread(offset + CHUNK, end - offset - CHUNK) == shared.data[offset + CHUNK : end]
        assert model.pread(0, 100) == shared.data[:100]
        assert model.is_cached(chunk)
        assert not held.done()
        go.set()
        assert held.result(SECONDS) == shared.data[offset : offset + 100]


def test_a_decode_that_fails_fails_all_who_wait_and_is_tried_again(
    model: Rehydrated, cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, calls = threading.Event(), []
    decode = model._decode

    def failing(number: int) -> Chunk:
        calls.append(number)
        assert go.wait(SECONDS)
        raise CorruptChunk("on purpose")

    monkeypatch.setattr(model, "_decode", failing)
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(model.chunk, 0) for _ in range(4)]
        while cache.statistics().waits < 3:
            pass
        go.set()
        for task in tasks:
            with pytest.raises(CorruptChunk):
                task.result(SECONDS)
    assert calls == [0]
    assert not model.is_cached(0)
    monkeypatch.setattr(model, "_decode", decode)
    assert model.chunk(0).nbytes


def test_a_chunk_cannot_be_written_to(model: Rehydrated) -> None:
    with pytest.raises(ValueError, match="read-only"):
        model.chunk(0)[0] = 1


# How much is decoded


def test_a_first_touch_decodes_only_the_chunk_asked_for(model: Rehydrated, watch: Watch) -> None:
    with contextlib.closing(DecodePool()) as pool:
        reader = Reader(model, pool)
        _, end = tensor(model, chunks=4)
        middle = end - 2 * CHUNK
        reader.pread_into(middle, memoryview(bytearray(50)))
    assert watch.decoded == model.chunks_between(middle, middle + 50)
    assert len(watch.decoded) == 1


def test_a_listing_decodes_only_what_it_reads(model: Rehydrated, watch: Watch) -> None:
    """The head of a model and 64 KiB in its middle, as WebUIs read them for their own hash."""
    with contextlib.closing(DecodePool()) as pool:
        reader = Reader(model, pool)
        places = [(0, 8), (8, 4000), (300_000, 64 << 10)]
        for offset, nbytes in places:
            reader.pread_into(offset, memoryview(bytearray(nbytes)))
    expected = {chunk for o, n in places for chunk in model.chunks_between(o, o + n)}
    assert set(watch.decoded) == expected


def test_metadata_decodes_nothing(shared: Filled, model: Rehydrated, watch: Watch) -> None:
    assert model.size == len(shared.data)
    model.tensor_range(model.size // 2)
    model.chunks_between(0, model.size)
    assert not watch.decoded


def test_same_spans_are_read_from_the_parent_without_the_cache(
    shared: Filled, model: Rehydrated, watch: Watch, cache: ChunkCache
) -> None:
    table = model.diff.table
    count = 0
    for number, span in enumerate(model.manifest.spans):
        if span.prediction == PREDICTION_SAME:
            offset = int(table.offsets[number])
            assert model.pread(offset, span.nbytes) == shared.data[offset : offset + span.nbytes]
            count += span.nbytes
    assert count > 90_000, "the frozen layer of the fine-tune is not kept as the base's own bytes"
    assert not watch.decoded
    assert cache.statistics().nbytes == 0


def test_a_sequential_reader_is_decoded_ahead_of(shared: Filled, model: Rehydrated, watch: Watch) -> None:
    with contextlib.closing(DecodePool(2, 256 << 10)) as pool:
        reader = Reader(model, pool)
        out = bytearray(64 << 10)
        position = 0
        while position < model.size:
            count = reader.pread_into(position, memoryview(out))
            assert out[:count] == shared.data[position : position + count]
            position += count
    assert any(name.startswith("hydrafs-ahead") for name in watch.threads)
    assert max(Counter(watch.decoded).values()) == 1


def test_read_ahead_goes_on_while_the_reader_waits(model: Rehydrated, watch: Watch) -> None:
    """The chunk that the reader waits for is being decoded; others ahead of it are decoded meanwhile."""
    begin, end = tensor(model, chunks=20)
    with contextlib.closing(DecodePool(2, 512 << 10)) as pool:
        reader = Reader(model, pool)
        out = memoryview(bytearray(600 << 10))
        chunks = model.chunks_between(begin, end)
        go = watch.hold(chunks[0])
        with ThreadPoolExecutor(1) as thread:
            task = thread.submit(reader.pread_into, 0, out)
            assert watch.begun[chunks[0]].wait(SECONDS)
            deadline = threading.Event()
            while len(set(watch.decoded) & set(chunks)) < 5 and not deadline.wait(0.001):
                pass
            assert not task.done()
            go.set()
            task.result(SECONDS)


def test_jumping_inside_a_tensor_completes_it(model: Rehydrated, watch: Watch) -> None:
    begin, end = tensor(model, chunks=8)
    with contextlib.closing(DecodePool(2)) as pool:
        reader = Reader(model, pool)
        # Far from where a read would go on: SLACK_NBYTES is more than this model, so each jump is made from a reader
        # that has read nothing near.
        reader._frontier = 0
        for offset in (end - CHUNK, begin + 2 * CHUNK):
            reader._frontier = 0
            reader.pread_into(offset, memoryview(bytearray(10)))
        pool._complete.shutdown(wait=True)  # what is queued is done
    assert set(model.chunks_between(begin, end)) <= set(watch.decoded)
    assert max(Counter(watch.decoded).values()) == 1


def test_an_error_ahead_is_nobodys_until_it_is_read(
    shared: Filled, model: Rehydrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = model._decode
    bad = model.chunks_between(0, model.size)[-1]

    def failing(number: int) -> Chunk:
        if number == bad:
            raise CorruptChunk("on purpose")
        return decode(number)

    monkeypatch.setattr(model, "_decode", failing)
    with contextlib.closing(DecodePool(2)) as pool:
        reader = Reader(model, pool)
        good = model.chunks_between(0, model.size - 1)
        assert good
        out = bytearray(model.size // 2)
        assert reader.pread_into(0, memoryview(out)) == len(out)
        assert out == shared.data[: len(out)]
        with pytest.raises(HydraError):
            reader.pread_into(0, memoryview(bytearray(model.size)))


# What stays open


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_proving_leaves_no_file_open(shared: Filled) -> None:
    store = Store(shared.root)
    prove(store, shared.diff)
    before = open_files()
    for _ in range(10):
        prove(store, shared.diff)
    assert open_files() == before
    store.close()


def test_a_pool_that_is_closed_early_leaves_no_file_open(shared: Filled) -> None:
    """Tasks that are thrown away give back their share of the model."""
    before = open_files()
    for _ in range(5):
        store = Store(shared.root)
        model = Opener(store, ChunkCache(1 << 20)).open_diff(shared.diff)
        pool = DecodePool(1, 1 << 20)
        for chunk in model.chunks_between(0, model.size):
            pool.ahead(model, chunk)
        model.close()
        pool.close()
        store.close()
    assert open_files() == before


def test_a_model_stays_open_for_whoever_still_reads(shared: Filled, model: Rehydrated) -> None:
    model.retain()
    model.close()
    assert model.pread(0, model.size) == shared.data


def test_a_model_that_cannot_be_opened_leaves_no_file_open(shared: Filled, tmp_path: Path) -> None:
    before = open_files()
    diff = tmp_path / "tuned.ckpt.hydra"
    diff.write_bytes(shared.diff.read_bytes())
    with contextlib.closing(Store(tmp_path)) as store, pytest.raises(HydraError):
        Opener(store, ChunkCache(1 << 20)).open_diff(diff)
    assert open_files() == before


def test_reading_all_tells_its_progress(shared: Filled, model: Rehydrated) -> None:
    told: list[int] = []
    out = bytearray()
    assert read_all(model, out.extend, told.append) == shared.sha256
    assert out == shared.data
    assert sum(told) == model.size
