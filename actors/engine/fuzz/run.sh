#!/usr/bin/env bash
# Builds and runs the fuzz targets: actors/engine/fuzz/run.sh [--json] [runs of each, 10000000] [target...]
# Needs a C++ compiler (libFuzzer is built from source) and no nightly. At the end a table (with --json: JSON) says
# what ran. What is found is kept in found/ and belongs, once it is mended, into corpus/<target>/, where the tests of
# the engine look at it for ever.
set -euo pipefail
cd "$(dirname "$0")"
json=false
if [ "${1:-}" = --json ]; then json=true; shift; fi
runs=${1:-10000000}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then targets=(gguf safetensors tokenizer wire registry model folder template); fi

RUSTC_WRAPPER=$PWD/instrument.sh RUSTC_WORKSPACE_WRAPPER= cargo build --release --locked --target-dir target >&2
# Templates are rendered on threads with 2 MiB of stack; deep recursion must end within it.
ulimit -s 2048
mkdir -p found target/logs
rows=()
for target in "${targets[@]}"; do
  # New inputs go to a folder of their own: the seeds stay what their generator wrote.
  mkdir -p "target/corpus/$target"
  log=target/logs/$target.log
  echo "$target: $runs runs (see $PWD/$log)" >&2
  before=$(find found -name "$target-*" | wc -l)
  begin=$(date +%s%3N)
  INGLE_FUZZ_TARGET=$target target/release/ingle-fuzz -runs="$runs" -max_len=4096 -timeout=30 -rss_limit_mb=4096 \
    -print_final_stats=1 -artifact_prefix="found/$target-" ${FUZZ_FLAGS:-} \
    "target/corpus/$target" "corpus/$target" >"$log" 2>&1 || tail -n 30 "$log" >&2
  milliseconds=$(($(date +%s%3N) - begin))
  # A run that ends in a crash prints no statistics; its last line of progress says how far it came.
  executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
  if [ -z "$executed" ]; then executed=$(sed -n 's/^#\([0-9]*\).*/\1/p' "$log" | tail -n 1); fi
  executed=${executed:-0}
  corpus=$(find "target/corpus/$target" "corpus/$target" -type f | wc -l)
  crashes=$(($(find found -name "$target-*" | wc -l) - before))
  rows+=("$target $executed $((executed * 1000 / (milliseconds > 0 ? milliseconds : 1))) $corpus $crashes")
done

if $json; then
  separator=
  printf '['
  for row in "${rows[@]}"; do
    read -r target executed speed corpus crashes <<<"$row"
    printf '%s{"target":"%s","runs":%d,"runs_per_second":%d,"corpus":%d,"crashes":%d}' \
      "$separator" "$target" "$executed" "$speed" "$corpus" "$crashes"
    separator=,
  done
  printf ']\n'
else
  printf '%-12s %10s %8s %8s %8s\n' target runs runs/s corpus crashes
  printf '%-12s %10d %8d %8d %8d\n' ${rows[*]}
fi
# Also where a run ended early without a file, as when it was killed.
for row in "${rows[@]}"; do
  read -r target executed _ _ crashes <<<"$row"
  if [ "$crashes" -gt 0 ] || [ "$executed" -lt "$runs" ]; then exit 1; fi
done
