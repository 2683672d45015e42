"""Writes tests/golden/rans.json: payloads of the codec rans that must decode to the same bytes for ever.

The encoder is hydrafs' own, so this pins the format of the day it was run; the tests decode the file with every kernel
and with the reference decoder, which is written from docs/RANS.md. Run it only for a new version of the format.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hydrafs.codecs.rans import RansCodec
from hydrafs.dtypes import DTYPES

WORDS = 1200
OUTPUT = Path(__file__).parent.parent / "tests" / "golden" / "rans.json"


def pairs() -> list[tuple[str, np.ndarray | None, np.ndarray]]:
    """Small steps on heavy-tailed weights in each float type, bytes, and both without a prediction."""
    rng = np.random.default_rng(7)
    found: list[tuple[str, np.ndarray | None, np.ndarray]] = []
    weights = (rng.standard_t(4, WORDS) * 0.03).astype(np.float32)
    steps = (rng.standard_t(3, WORDS) * 2e-5 * (rng.random(WORDS) < 0.7)).astype(np.float32)
    for name in ("F32", "F16", "BF16"):
        base, tuned = (_as(name, x) for x in (weights, weights + steps))
        special = _as(name, np.array([np.nan, -0.0, np.inf, -np.inf, 1e-41, 0.0], np.float32))
        tuned[: special.size] = special
        found += [(name, base, tuned), (name, None, tuned)]
    numbers = rng.integers(0, 256, WORDS).astype(np.uint8)
    found += [("U8", numbers, numbers + rng.integers(0, 3, WORDS).astype(np.uint8)), ("F8_E4M3", None, numbers)]
    return found


def _as(name: str, values: np.ndarray) -> np.ndarray:
    if name == "F16":
        return values.astype(np.float16).view(np.uint8).copy()
    if name == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).copy()
    return values.view(np.uint8).copy()


def main() -> None:
    codec = RansCodec()
    rows = []
    for name, prediction, target in pairs():
        params = codec.train([(prediction, target)], DTYPES[name])
        for kept in (params, b""):
            payload = codec.encode(prediction, target, DTYPES[name], kept)
            rows.append(
                {
                    "dtype": name,
                    "prediction": prediction.tobytes().hex() if prediction is not None else None,
                    "target": target.tobytes().hex(),
                    "params": kept.hex(),
                    "payload": payload.hex(),
                }
            )
    OUTPUT.write_text(json.dumps(rows, indent=0) + "\n")
    print(f"{OUTPUT}: {len(rows)} payloads, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
