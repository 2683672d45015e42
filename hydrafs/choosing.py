"""Which codec stores which section: measured on samples of it, before the pass over the model.

Plan: a few chunks of each section are coded by every codec that may be used; the smallest sum wins, tables included,
and the codec's tables for the section come from the same samples. Where two codecs are close, each chunk is coded by
both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from hydrafs import predictors
from hydrafs.codecs import Words, rans, registry
from hydrafs.dtypes import DTYPES
from hydrafs.errors import UsageError
from hydrafs.layout import ByteSource
from hydrafs.manifest import FORMULA_FEATURE, PREDICTION_FORMULA, Manifest, Section
from hydrafs.plan import Plan
from hydrafs.prediction import Predictor

SAMPLES = 4
"""Chunks of a section that the choice and the tables rest on."""
SAMPLE_NBYTES = 1 << 20
"""How much of these chunks is coded, all together: as much as the tables can use, and a few milliseconds' work."""
CLOSE = 1.1
"""Codecs whose samples differ by less than this are both tried on each chunk."""
AUTOMATIC = "auto"
"""The name under which a user asks for the smallest codec for each tensor."""


def codecs_for(name: str) -> tuple[str, ...]:
    """The codecs that a user's choice allows: one by its name, or for ``auto`` all that can code here.

    Raises:
        UsageError: no such codec, or one that needs the extension where it is not built.
    """
    native = not rans.level().startswith("none")
    if name == AUTOMATIC:
        return ("rans", "planes") if native else ("planes",)
    if registry.by_name(name).name == "rans" and not native:
        raise UsageError(
            "the codec cannot encode here",
            where=name,
            detail=rans.level(),
            remedy="install a C compiler and hydrafs anew",
        )
    return (name,)


def features_of(plan: Plan | Manifest) -> tuple[str, ...]:
    """What a reader must know to decode a model that is stored so."""
    features = {registry.feature(section.codec) for section in plan.sections}
    if any(span.prediction == PREDICTION_FORMULA for span in plan.spans):
        features.add(FORMULA_FEATURE)
    return tuple(sorted(features - {""}))


def choose_codecs(source: ByteSource, plan: Plan, predictor: Predictor, names: Sequence[str], *, jobs: int) -> Plan:
    """The plan with a codec and its tables for each section of numbers; literals keep theirs.

    Args:
        predictor: of this plan; reads the parents.
        names: codecs to choose among, in order of preference where they are equal.
        jobs: threads.

    Raises:
        HydraError: the model or a parent cannot be read.
    """
    with ThreadPoolExecutor(jobs, "hydrafs-choose") as pool:
        futures = [
            pool.submit(_choose, source, plan, predictor, number, names) if section.dtype else None
            for number, section in enumerate(plan.sections)
        ]
        chosen = [f.result() if f else (plan.sections[i], ()) for i, f in enumerate(futures)]
    return dataclasses.replace(
        plan, sections=tuple(section for section, _ in chosen), others=tuple(others for _, others in chosen)
    )


def _choose(
    source: ByteSource, plan: Plan, predictor: Predictor, number: int, names: Sequence[str]
) -> tuple[Section, tuple[int, ...]]:
    section = plan.sections[number]
    dtype = predictor.dtype(number)
    whole = int(predictor.table.section_nbytes[number])
    chunks = -(-whole // plan.chunk_nbytes)
    places = sorted({(chunks - 1) * i // max(1, SAMPLES - 1) for i in range(SAMPLES)})
    piece = SAMPLE_NBYTES // len(places) // 16 * 16
    samples: list[tuple[Words | None, Words]] = []
    coded = dtype
    for place in places:
        begin = place * plan.chunk_nbytes
        nbytes = min(plan.chunk_nbytes, whole - begin, piece)
        target = read_chunk(source, predictor, number, begin, nbytes)
        small = predictors.narrow(target, DTYPES[section.narrow]) if section.narrow else None
        if small is not None:
            coded, target = DTYPES[section.narrow], small
        prediction = predictor.predict(number, begin, nbytes, coded if small is not None else dtype)
        if prediction is None or not np.array_equal(prediction, target):
            samples.append((prediction, target))
    if not samples:
        return msgspec.structs.replace(section, codec=registry.by_name(names[-1]).id), ()
    share = whole / sum(t.nbytes for _, t in samples)
    costs = []
    for name in names:
        codec = registry.by_name(name)
        params = codec.train(samples, coded)
        stored = sum(len(codec.encode(p, t, coded, params)) for p, t in samples)
        costs.append((stored * share * len(samples) / len(places) + len(params), codec.id, params))
    least = min(cost for cost, *_ in costs)
    best = next(c for c in costs if c[0] == least)
    others = tuple(codec for cost, codec, params in costs if codec != best[1] and not params and cost < CLOSE * least)
    return msgspec.structs.replace(section, codec=best[1], params=best[2]), others


def read_chunk(source: ByteSource, predictor: Predictor, section: int, begin: int, nbytes: int) -> Words:
    """``[begin, begin + nbytes)`` of a section of the model."""
    offsets = predictor.table.offsets
    parts = predictor.pieces(section, begin, nbytes)
    return np.frombuffer(b"".join(source.pread(int(offsets[p.span]) + p.inside, p.nbytes) for p in parts), np.uint8)
