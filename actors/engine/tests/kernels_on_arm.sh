#!/usr/bin/env bash
# Runs the tests of the CPU kernels as a 64-bit ARM program in an emulator: once on a processor with the dot product,
# once on one without, where only the portable kernels are left. Then compares a digest of results between those two
# and this machine: it must be the same everywhere.
#
# Needs: an aarch64 linker (Debian: gcc-aarch64-linux-gnu), qemu-aarch64 (qemu-user), and a rustc that has the
# standard library of aarch64-unknown-linux-gnu: `rustup target add aarch64-unknown-linux-gnu`, or another compiler
# in RUSTC (Debian: rustc-web with libstd-rust-web-dev:arm64). Only the kernels are built, not the rest of the engine.
#
# Exits with 0 if all is well, 1 if a test failed, 3 if a tool is missing.
# Settings: RUSTC, ARM_LINKER, ARM_QEMU, ARM_LIBRARIES (the root of ARM's C library), ARM_WORK (where to build).
set -euo pipefail

target=aarch64-unknown-linux-gnu
rustc=${RUSTC:-rustc}
linker=${ARM_LINKER:-aarch64-linux-gnu-gcc}
qemu=${ARM_QEMU:-qemu-aarch64}
libraries=${ARM_LIBRARIES:-/usr/aarch64-linux-gnu}
engine=$(cd "$(dirname "$0")/.." && pwd)
work=${ARM_WORK:-${TMPDIR:-/tmp}/ingle-kernels-on-arm}

missing() {
    echo "kernels_on_arm: missing: $1" >&2
    exit 3
}
command -v cargo >/dev/null || missing "cargo"
command -v "$rustc" >/dev/null || missing "rustc ($rustc)"
command -v "$linker" >/dev/null || missing "a linker for aarch64 ($linker)"
command -v "$qemu" >/dev/null || missing "the emulator ($qemu)"
[ -e "$libraries/lib/ld-linux-aarch64.so.1" ] || missing "a C library for aarch64 ($libraries)"
ls "$("$rustc" --print sysroot)/lib/rustlib/$target/lib/"libstd-*.rlib >/dev/null 2>&1 ||
    missing "the standard library of $target for $("$rustc" --version)"

# The kernels as a crate of their own, with the little of the engine that they know.
mkdir -p "$work/src/dequantize"
for source in kernels kernels.rs dequantize.rs; do
    ln -sfn "$engine/src/$source" "$work/src/$source"
done
: >"$work/src/dequantize/tests.rs" # These need a file of the engine's.
cp "$engine/../../Cargo.lock" "$work/Cargo.lock"
cat >"$work/Cargo.toml" <<'END'
[package]
name = "kernels-on-arm"
version = "0.1.0"
edition = "2024"
[dependencies]
half = "2"
rayon = "1"
[dev-dependencies]
proptest = "1"
[workspace]
END
cat >"$work/src/lib.rs" <<'END'
#![allow(dead_code, unused_imports)]
pub mod dequantize;
pub mod kernels;
pub mod gguf {
    #[derive(Debug)]
    pub enum GgufError {
        Format { tensor: String, format: String, supported: String },
        Invalid { what: String, why: String },
    }
    pub struct TensorInfo {
        pub name: String,
        pub format: u32,
        pub elements: u64,
        pub dimensions: Vec<u64>,
    }
}
#[cfg(all(test, target_arch = "aarch64"))]
#[test]
fn the_best_set_is_the_expected_one() {
    let best = kernels::InstructionSet::available()[0].name();
    assert_eq!(best, std::env::var("EXPECTED_SET").unwrap());
}
END
cd "$work"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker
on_arm() { # processor, expected instruction set, arguments of the tests
    echo "== $1, $2" >&2
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -cpu $1 -L $libraries" EXPECTED_SET=$2 \
        cargo test --release --lib --target $target -- "${@:3}"
}
"$rustc" --version
"$qemu" --version | head -n 1
on_arm max neon-dotprod
on_arm cortex-a72 portable

digest=(--ignored --nocapture digest_of_results)
digests=$(
    on_arm max neon-dotprod "${digest[@]}" | grep -o 'digest .*'
    on_arm cortex-a72 portable "${digest[@]}" | grep -o 'digest .*'
    cargo test --release --lib -- "${digest[@]}" | grep -o 'digest .*'
)
echo "$digests"
if [ "$(echo "$digests" | cut -d ' ' -f 2 | sort -u | wc -l)" != 1 ]; then
    echo "kernels_on_arm: the digests differ" >&2
    exit 1
fi
echo "kernels_on_arm: all well"
