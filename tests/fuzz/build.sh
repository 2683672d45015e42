#!/bin/sh
# Builds the fuzz target with AddressSanitizer and UBSan, into the folder named (default: build/fuzz).
#   tests/fuzz/build.sh OUT && python tests/fuzz/corpus.py OUT/corpus && OUT/rans_fuzz -max_len=8192 OUT/corpus
# With clang it is a libFuzzer program; without, one that runs the files it is given, for AFL++ or a plain replay.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../build/fuzz}
mkdir -p "$out"
native=$here/../../hydrafs/native
sources="$here/rans_fuzz.c $native/rans_core.c $native/rans_encode.c"
sources="$sources $native/rans_train.c $native/rans_tables.c $native/rans_simd.c"
flags="-std=c11 -D_GNU_SOURCE -O2 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"
if command -v clang > /dev/null 2>&1; then
  # shellcheck disable=SC2086
  clang $flags -fsanitize=fuzzer,address,undefined $sources -lm -o "$out/rans_fuzz"
else
  # shellcheck disable=SC2086
  ${CC:-gcc} $flags -DRANS_FUZZ_MAIN -fsanitize=address,undefined $sources -lm -o "$out/rans_fuzz"
fi
echo "$out/rans_fuzz"
