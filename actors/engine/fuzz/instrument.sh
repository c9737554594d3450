#!/usr/bin/env bash
# Cargo's RUSTC_WRAPPER: compiles with coverage counters what is fuzzed, and everything else as usual. Counters in
# all of burn would make each run scan megabytes of them.
set -euo pipefail
flags=(
  -Cpasses=sancov-module
  -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares
  -Ccodegen-units=1
)
case " $* " in
  *" --crate-name ingle_engine "* | *" --crate-name ingle_protocol "* | *" --crate-name minijinja "*) exec "$@" "${flags[@]}" ;;
  *) exec "$@" ;;
esac
