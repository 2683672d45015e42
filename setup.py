"""The part of the build that pyproject.toml cannot say: the C extension, which an install can do without."""

import sys

from setuptools import Extension, setup

# The stable ABI has the buffer protocol from 3.11 on; 3.10 gets a build of its own.
STABLE = sys.version_info >= (3, 11) and sys.implementation.name == "cpython"
UNIX_FLAGS = [] if sys.platform == "win32" else ["-std=c11", "-O3", "-Wall", "-Wextra"]
# Formulas must give the same bits everywhere: no multiplication is fused with an addition, and none is reordered.
# Floating-point traps and errno, which nobody looks at, would keep the loops from being vectorised.
PINNED_FLAGS = ["-ffp-contract=off", "-fno-fast-math", "-fno-trapping-math", "-fno-math-errno"]

setup(
    ext_modules=[
        Extension(
            "hydrafs._rans",
            sources=[
                f"hydrafs/native/rans_{part}.c" for part in ("core", "encode", "train", "tables", "simd", "module")
            ],
            depends=[f"hydrafs/native/rans_{part}.h" for part in ("core", "blocks", "train")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            extra_compile_args=UNIX_FLAGS,
            libraries=[] if sys.platform == "win32" else ["m"],
            py_limited_api=STABLE,
            optional=True,  # no compiler: the codec decodes slowly and encodes nothing; `hydrafs doctor` says so
        ),
        Extension(
            "hydrafs._formulas",
            sources=["hydrafs/native/formulas.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            extra_compile_args=[] if sys.platform == "win32" else UNIX_FLAGS + PINNED_FLAGS,
            libraries=[] if sys.platform == "win32" else ["m"],
            py_limited_api=STABLE,
            optional=True,  # no compiler: numpy computes the same
        ),
        Extension(
            "hydrafs._twins",
            sources=["hydrafs/native/twins.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            extra_compile_args=UNIX_FLAGS,
            py_limited_api=STABLE,
            optional=True,  # no compiler: each hash is taken by itself
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
