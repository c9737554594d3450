//! Weight formats of GGUF files, turned into `f32`. Each follows ggml's definition to the bit.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::gguf::{GgufError, TensorInfo};

/// A weight format that this engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floating point.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// Blocks of 32: scale, 4-bit values.
    Q4_0,
    /// Blocks of 32: scale, minimum, 4-bit values.
    Q4_1,
    /// Blocks of 32: scale, 5-bit values.
    Q5_0,
    /// Blocks of 32: scale, minimum, 5-bit values.
    Q5_1,
    /// Blocks of 32: scale, 8-bit values.
    Q8_0,
    /// Blocks of 256: 8 groups with 6-bit scales and minima, 4-bit values.
    Q4K,
    /// Blocks of 256: 8 groups with 6-bit scales and minima, 5-bit values.
    Q5K,
    /// Blocks of 256: 16 groups with 8-bit scales, 6-bit values.
    Q6K,
}

const ALL: [Format; 11] = [
    Format::F32,
    Format::F16,
    Format::Bf16,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q4K,
    Format::Q5K,
    Format::Q6K,
];

/// ggml's names, for messages; the index is ggml's number.
const GGML_NAMES: [&str; 40] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

/// ggml's name of a format number.
pub fn format_name(number: u32) -> String {
    GGML_NAMES.get(number as usize).map_or_else(|| format!("of the unknown format {number}"), ToString::to_string)
}

impl Format {
    /// The format of a tensor; refused by name where it is none of ours.
    pub fn of(info: &TensorInfo) -> Result<Self, GgufError> {
        ALL.into_iter().find(|format| format.number() == info.format).ok_or_else(|| GgufError::Format {
            tensor: info.name.clone(),
            format: format_name(info.format),
            supported: ALL.map(|format| format_name(format.number())).join(", "),
        })
    }

    /// ggml's number of the format.
    pub const fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    /// ggml's name of the format: `Q4_1` and the like.
    pub fn name(self) -> String {
        format_name(self.number())
    }

    /// False for plain numbers, true where weights share scales.
    pub const fn is_quantized(self) -> bool {
        self.block_weights() > 1
    }

    /// Weights of one block.
    pub const fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a whole tensor; refused where its rows are not made of whole blocks.
    pub fn bytes_for(self, info: &TensorInfo) -> Result<u64, GgufError> {
        let row = info.dimensions.first().copied().unwrap_or(0);
        let weights = self.block_weights() as u64;
        if !row.is_multiple_of(weights) {
            let why = format!("its rows of {row} weights are not whole blocks of {weights}");
            return Err(GgufError::Invalid { what: format!("tensor {}", info.name), why });
        }
        // `elements` is at most 2^48 (checked when it was read), so this does not overflow.
        Ok(info.elements / weights * self.block_bytes() as u64)
    }

    /// Turns whole blocks into `f32`. `bytes` and `out` hold the same number of blocks.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_weights()));
        match self {
            Self::F32 => blocks.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => blocks.for_each(|(b, out)| out[0] = half_at(b, 0)),
            Self::Bf16 => blocks.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q4_0 => blocks.for_each(|(b, out)| {
                let scale = half_at(b, 0);
                nibbles(&b[2..], out, |value| (f32::from(value) - 8.0) * scale);
            }),
            Self::Q4_1 => blocks.for_each(|(b, out)| {
                let (scale, least) = (half_at(b, 0), half_at(b, 2));
                nibbles(&b[4..], out, |value| f32::from(value) * scale + least);
            }),
            Self::Q5_0 => blocks.for_each(|(b, out)| {
                let scale = half_at(b, 0);
                five_bits(&b[2..], out, |value| (f32::from(value) - 16.0) * scale);
            }),
            Self::Q5_1 => blocks.for_each(|(b, out)| {
                let (scale, least) = (half_at(b, 0), half_at(b, 2));
                five_bits(&b[4..], out, |value| f32::from(value) * scale + least);
            }),
            Self::Q8_0 => blocks.for_each(|(b, out)| {
                let scale = half_at(b, 0);
                out.iter_mut().zip(&b[2..]).for_each(|(out, value)| *out = f32::from(*value as i8) * scale);
            }),
            Self::Q4K => blocks.for_each(|(b, out)| k_groups(b, out, |group, i| nibble(&b[16..], group, i))),
            Self::Q5K => blocks.for_each(|(b, out)| {
                let (high, low) = (&b[16..48], &b[48..]);
                k_groups(b, out, |group, i| nibble(low, group, i) | (high[i] >> group & 1) << 4);
            }),
            Self::Q6K => blocks.for_each(|(b, out)| q6k(b, out)),
        }
    }
}

impl Format {
    /// [`Format::dequantize`] on all cores.
    pub fn dequantize_in_parallel(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = 16_384 / self.block_weights();
        bytes
            .par_chunks(blocks * self.block_bytes())
            .zip(out.par_chunks_mut(blocks * self.block_weights()))
            .for_each(|(bytes, out)| self.dequantize(bytes, out));
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// 16 bytes: the first 16 weights are their lower halves, the others their upper halves.
fn nibbles(bytes: &[u8], out: &mut [f32], weight: impl Fn(u8) -> f32) {
    let (first, second) = out.split_at_mut(16);
    for ((byte, first), second) in bytes.iter().zip(first).zip(second) {
        *first = weight(byte & 15);
        *second = weight(byte >> 4);
    }
}

/// 4 bytes with the fifth bits, then as [`nibbles`].
fn five_bits(bytes: &[u8], out: &mut [f32], weight: impl Fn(u8) -> f32) {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let bit = |i: usize| ((fifth >> i & 1) << 4) as u8;
    for (i, byte) in bytes[4..20].iter().enumerate() {
        out[i] = weight(byte & 15 | bit(i));
        out[i + 16] = weight(byte >> 4 | bit(i + 16));
    }
}

/// The 4-bit value `i` of group `group`: two groups share 32 bytes.
fn nibble(bytes: &[u8], group: usize, i: usize) -> u8 {
    bytes[group / 2 * 32 + i] >> (group % 2 * 4) & 15
}

/// Q4_K and Q5_K: scale and minimum of each group of 32 are 6 bits of the block's.
fn k_groups(block: &[u8], out: &mut [f32], value: impl Fn(usize, usize) -> u8) {
    let (scale, least) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_least) = k_scales(packed, group);
        let (scale, least) = (scale * f32::from(group_scale), least * f32::from(group_least));
        out.iter_mut().enumerate().for_each(|(i, out)| *out = scale * f32::from(value(group, i)) - least);
    }
}

/// Scale and minimum, 6 bits each, of one of the eight groups whose scales share twelve bytes.
pub(crate) fn k_scales(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    }
}

/// The whole numbers that stand for the weights `32·number ..` of a stored block, as they are stored: unsigned,
/// but for `Q8_0` (two's complement). Formats without scales have none.
pub(crate) fn codes(format: Format, block: &[u8], number: usize) -> [u8; 32] {
    let fifth = |bytes: &[u8], i: usize| (bytes[i / 8] >> (i % 8) & 1) << 4;
    let legacy = |bytes: &[u8], i: usize| bytes[i % 16] >> (i / 16 * 4) & 15;
    std::array::from_fn(|i| match format {
        Format::Q4_0 => legacy(&block[2..], i),
        Format::Q4_1 => legacy(&block[4..], i),
        Format::Q5_0 => legacy(&block[6..], i) | fifth(&block[2..6], i),
        Format::Q5_1 => legacy(&block[8..], i) | fifth(&block[4..8], i),
        Format::Q8_0 => block[2 + i],
        Format::Q4K => nibble(&block[16..], number, i),
        Format::Q5K => nibble(&block[48..], number, i) | (block[16 + i] >> number & 1) << 4,
        Format::Q6K => q6k_code(block, 32 * number + i),
        Format::F32 | Format::F16 | Format::Bf16 => 0,
    })
}

/// The 6-bit value of weight `n`.
fn q6k_code(block: &[u8], n: usize) -> u8 {
    let (low, high) = (&block[..128], &block[128..192]);
    let (half, quarter, i) = (n / 128, n % 128 / 32, n % 32);
    let four = low[half * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
    four | (high[half * 32 + i] >> (quarter * 2) & 3) << 4
}

fn q6k(block: &[u8], out: &mut [f32]) {
    let scales = &block[192..208];
    let scale = half_at(block, 208);
    for (n, out) in out.iter_mut().enumerate() {
        let value = f32::from(q6k_code(block, n)) - 32.0;
        *out = scale * f32::from(scales[n / 16] as i8) * value;
    }
}

#[cfg(test)]
mod tests;
