#!/usr/bin/env bash
# Measures Ingle on this machine's graphics card, in one command:
#
#   tests/gpu_bench.sh [--ingle BINARY] [--work-dir FOLDER] [--model GGUF] [--layers N] [--device gpu]
#
# Builds a release binary with GPU support (or takes --ingle), measures the default model (or --model) and a random model
# of the shape of Llama 3.2 1B: prompt speed, tokens a second of 1, 4 and 16 sequences, and the share of the card's memory
# bandwidth, which `ingle bench` measures on the card itself. Puts llama.cpp (`llama-bench` on the PATH, built for the
# GPU) and PyTorch (`python3`, or $PYTHON, with torch and transformers) beside it where they are there, and says so where
# they are not. --layers makes the random model smaller, for a first try; 0 leaves it out, and PyTorch with it. Needs
# Rust, Python 3.9 and 8 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/.."

ingle='' work='' model=default layers=16 device=gpu python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
    --ingle) ingle=$2 ;;
    --work-dir) work=$2 ;;
    --model) model=$2 ;;
    --layers) layers=$2 ;;
    --device) device=$2 ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
say() { printf '\n== %s\n' "$*"; }

if [ -z "$ingle" ]; then
    say 'building with GPU support (some minutes)'
    cargo build --release --package ingle --features gpu
    ingle=${CARGO_TARGET_DIR:-target}/release/ingle
fi
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"

say 'this machine'
uname -sm
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
    echo 'no nvidia-smi: the card is named below, by its driver'
fi

say "the model: $model"
"$ingle" bench --device "$device" --model "$model" --json >"$work/model.json"
# Where the model lies, for those that measure it beside.
path=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["model"])' "$work/model.json")
reports=("$work/model.json") files=("$path")

if [ "$layers" -gt 0 ]; then
    say 'a random Llama'
    random=$work/random-llama-$layers.gguf
    [ -f "$random" ] || "$python" tests/make_random_llama.py --tokenizer-from "$path" --out "$random" --layers "$layers"
    "$ingle" bench --device "$device" --model "$random" --json >"$work/random.json"
    reports+=("$work/random.json") files+=("$random")
fi

say 'Ingle'
"$python" - "${reports[@]}" <<'PYTHON'
import json
import sys
for path in sys.argv[1:]:
    report = json.load(open(path))
    print(f"\n{report['model'].rsplit('/', 1)[-1]}\non {report['backend']}")
    if not report["backend"].startswith("gpu") or "llvmpipe" in report["backend"]:
        print("  THE CPU COMPUTED THIS: it says nothing about a card")
    print(f"  prompt, 512 tokens     {report['prompt_tokens_per_second']:>10.1f} tok/s")
    for batch, rate in report["decode_tokens_per_second"].items():
        print(f"  decode, {batch:>2} at once     {rate:>10.1f} tok/s")
    print(f"  first token            {report['first_token_seconds']:>10.2f} s after the start")
    if (bandwidth := report["memory_bandwidth_bytes_per_second"]) is not None:
        print(f"  memory bandwidth       {bandwidth / 1e9:>10.1f} GB/s, measured on the device that computed")
        share, limit = report["decode_share_of_limit"], report["decode_limit_tokens_per_second"]
        print(f"  one sequence uses      {share * 100:>10.1f} % of it: {report['weight_bytes'] / 1e9:.2f} GB of "
              f"weights a step, at most {limit:.1f} tok/s")
PYTHON

beside=0
if command -v llama-bench >/dev/null; then
    say 'llama.cpp, the same files (both keep the weights in the precision of the file)'
    for file in "${files[@]}"; do
        llama-bench -m "$file" -p 512 -n 128 -ngl 99 && beside=1
    done
fi
if [ "$layers" -gt 0 ]; then
    say 'PyTorch, the random Llama'
    for dtype in float32 float16; do
        "$python" tests/torch_llama_bench.py --dtype "$dtype" --layers "$layers" && beside=1 || true
    done
fi
if [ "$beside" = 0 ]; then
    say 'Nothing stands beside these numbers: neither llama-bench nor a PyTorch that sees the GPU is here'
fi
