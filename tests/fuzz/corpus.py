"""Writes a corpus for the fuzz target into the folder named: real params and payloads of every format, short ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hydrafs.codecs.rans import RansCodec
from hydrafs.dtypes import DTYPES

FORMATS = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2", "U8", "U16", "U32")
"""In the order of ``formats`` in rans_fuzz.c."""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    codec = RansCodec()
    for number, name in enumerate(FORMATS):
        dtype = DTYPES[name]
        for count in (3, 128, 700, 1500):
            bits = rng.normal(0, 0.05, count).astype(np.float32).view(np.uint32) >> (32 - 8 * dtype.word_nbytes)
            steps = np.rint(rng.laplace(0, 2, count)).astype(np.int64) * (np.arange(count) // 128 % 3)
            known = bits.astype(dtype.word)
            target = (known + steps).astype(dtype.word)
            known, target = known.view(np.uint8), target.view(np.uint8)
            params = codec.train([(known, target), (None, target)], dtype)
            for prediction in (known, None):
                flags = int(prediction is not None)
                payload = codec.encode(prediction, target, dtype, params)
                head = bytes([number, flags]) + target.size.to_bytes(2, "big") + len(params).to_bytes(2, "big")
                (folder / f"{name}-{count}-{flags}").write_bytes(head + params + payload)
                own = codec.encode(prediction, target, dtype, b"")
                head = bytes([number, flags | 6]) + target.size.to_bytes(2, "big") + b"\0\0"
                (folder / f"{name}-{count}-{flags}-own").write_bytes(head + own)


if __name__ == "__main__":
    main()
