//! `f32` weights into ggml's block formats. Blocks of 32 and plain numbers are here, blocks of 256 in
//! [`super::k_quants`]. Each follows the reference encoder of ggml (`quantize_row_*_ref` in `ggml-quants.c`) byte
//! for byte, down to the order in which it rounds.

use half::{bf16, f16};
use rayon::prelude::*;

use super::k_quants;
use crate::dequantize::Format;

/// Blocks that one task encodes: enough work to be worth a task, few enough that all cores get some.
const BLOCKS_PER_TASK: usize = 64;

impl Format {
    /// The largest magnitude of a weight that the format holds for sure: scales are half-precision numbers.
    pub const fn largest(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            // What is larger would round to infinity.
            Self::Bf16 => 3.389_531_4e38,
            _ => 65504.0,
        }
    }

    /// Encodes whole blocks on all cores: `values` are [`block_weights`](Self::block_weights) for every
    /// [`block_bytes`](Self::block_bytes) of `out`. Each block depends on its own weights only, so the result is the
    /// same for any number of threads. Weights must be finite and at most [`largest`](Self::largest).
    pub fn quantize(self, values: &[f32], out: &mut [u8]) {
        debug_assert_eq!(values.len() / self.block_weights() * self.block_bytes(), out.len());
        // Formats of single numbers have tiny blocks.
        let blocks = BLOCKS_PER_TASK * (256 / self.block_weights());
        values
            .par_chunks(blocks * self.block_weights())
            .zip(out.par_chunks_mut(blocks * self.block_bytes()))
            .for_each(|(values, out)| self.quantize_here(values, out));
    }

    fn quantize_here(self, values: &[f32], out: &mut [u8]) {
        let blocks = values.chunks_exact(self.block_weights()).zip(out.chunks_exact_mut(self.block_bytes()));
        match self {
            Self::F32 => blocks.for_each(|(x, out)| out.copy_from_slice(&x[0].to_le_bytes())),
            Self::F16 => blocks.for_each(|(x, out)| out.copy_from_slice(&f16::from_f32(x[0]).to_le_bytes())),
            Self::Bf16 => blocks.for_each(|(x, out)| out.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes())),
            Self::Q8_0 => blocks.for_each(|(x, out)| q8_0(x, out)),
            Self::Q4_0 => blocks.for_each(|(x, out)| {
                let values = symmetric::<8>(x, out);
                pack_nibbles(&values, &mut out[2..]);
            }),
            Self::Q4_1 => blocks.for_each(|(x, out)| {
                let values = with_minimum::<15>(x, out);
                pack_nibbles(&values, &mut out[4..]);
            }),
            Self::Q5_0 => blocks.for_each(|(x, out)| {
                let values = symmetric::<16>(x, out);
                pack_five_bits(&values, &mut out[2..]);
            }),
            Self::Q5_1 => blocks.for_each(|(x, out)| {
                let values = with_minimum::<31>(x, out);
                pack_five_bits(&values, &mut out[4..]);
            }),
            Self::Q4K => blocks.for_each(|(x, out)| k_quants::q4k(x, out)),
            Self::Q5K => blocks.for_each(|(x, out)| k_quants::q5k(x, out)),
            Self::Q6K => blocks.for_each(|(x, out)| k_quants::q6k(x, out)),
        }
    }
}

/// Writes a half-precision number.
pub(super) fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// 1 / `scale`, or 0 for a block of zeros.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// scale = largest magnitude / 127; values −127 to 127, rounded half away from zero.
fn q8_0(x: &[f32], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = inverse(scale);
    put_half(out, 0, scale);
    for (x, out) in x.iter().zip(&mut out[2..]) {
        *out = (x * inverse).round() as i8 as u8;
    }
}

/// Q4_0 and Q5_0: values 0 to 2·`HALF` − 1 stand for −`HALF` to `HALF` − 1. The weight of the largest magnitude
/// (the first of equals) becomes −`HALF`, so the scale may be negative.
fn symmetric<const HALF: u8>(x: &[f32], out: &mut [u8]) -> [u8; 32] {
    let (mut largest, mut signed) = (0.0f32, 0.0f32);
    for x in x {
        if largest < x.abs() {
            (largest, signed) = (x.abs(), *x);
        }
    }
    let half = f32::from(HALF);
    let scale = signed / -half;
    let inverse = inverse(scale);
    put_half(out, 0, scale);
    let mut values = [0; 32];
    for (value, x) in values.iter_mut().zip(x) {
        *value = ((x * inverse + (half + 0.5)) as u8).min(2 * HALF - 1);
    }
    values
}

/// Q4_1 and Q5_1: values 0 to `MOST` over what is between the least and the greatest weight.
fn with_minimum<const MOST: u8>(x: &[f32], out: &mut [u8]) -> [u8; 32] {
    let (mut least, mut greatest) = (f32::MAX, -f32::MAX);
    for x in x {
        least = if *x < least { *x } else { least };
        greatest = if *x > greatest { *x } else { greatest };
    }
    let scale = (greatest - least) / f32::from(MOST);
    let inverse = inverse(scale);
    put_half(out, 0, scale);
    put_half(out, 2, least);
    let mut values = [0; 32];
    for (value, x) in values.iter_mut().zip(x) {
        *value = (((x - least) * inverse + 0.5) as u8).min(MOST);
    }
    values
}

/// 16 bytes: the first 16 values in the lower halves, the others in the upper ones.
fn pack_nibbles(values: &[u8; 32], out: &mut [u8]) {
    for (i, out) in out[..16].iter_mut().enumerate() {
        *out = values[i] & 15 | values[i + 16] << 4;
    }
}

/// 4 bytes with the fifth bits, then as [`pack_nibbles`].
fn pack_five_bits(values: &[u8; 32], out: &mut [u8]) {
    let fifth = values.iter().enumerate().fold(0u32, |bits, (i, value)| bits | u32::from(value >> 4 & 1) << i);
    out[..4].copy_from_slice(&fifth.to_le_bytes());
    pack_nibbles(values, &mut out[4..]);
}
