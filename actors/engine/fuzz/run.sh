#!/usr/bin/env bash
# Builds and runs the fuzz targets: actors/engine/fuzz/run.sh [runs of each, 10000000] [target...]
# Needs a C++ compiler (libFuzzer is built from source) and no nightly. What is found is kept in found/ and belongs,
# once it is mended, into corpus/<target>/, where the tests of the engine look at it for ever.
set -euo pipefail
cd "$(dirname "$0")"
runs=${1:-10000000}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then targets=(gguf model safetensors folder tokenizer template wire); fi

export RUSTC_WRAPPER=$PWD/instrument.sh
unset RUSTC_WORKSPACE_WRAPPER
cargo build --release --locked --target-dir target
# Templates are rendered on threads with 2 MiB of stack; deep recursion must end within it.
ulimit -s 2048
# One target writes a model folder for each run.
if [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
mkdir -p found
failed=0
for target in "${targets[@]}"; do
  # New inputs go to a folder of their own: the seeds stay what their generator wrote.
  mkdir -p "target/corpus/$target"
  begin=$SECONDS
  echo "== $target: $runs runs"
  INGLE_FUZZ_TARGET=$target target/release/ingle-fuzz -runs="$runs" -max_len=4096 -timeout=30 -rss_limit_mb=4096 \
    -print_final_stats=1 -verbosity="${VERBOSITY:-0}" -artifact_prefix="found/$target-" ${FUZZ_FLAGS:-} \
    "target/corpus/$target" "corpus/$target" || failed=1
  echo "== $target: $((SECONDS - begin)) s"
done
exit $failed
