//! The layout that the kernels read: tiles of sixteen outputs, the weights of four inputs of each side by side.
//!
//! A tile holds its spans one after the other, so that memory is read in one stream: of each span first the scales,
//! then the codes. A span is 32 inputs (256 for K formats, 1 for floats). In a span's codes, byte
//! `64·j + 4·row + i` belongs to input `4·j + i` of its block of 32; where codes have four bits, the lower half of
//! the byte is that of `j` and the upper half that of `j + 4`. A fifth and sixth bit stand in planes of 64 bytes in
//! front of the block's halves: bit `j` of byte `4·row + i` (two bits: `2·(j mod 4)` of plane `j / 4`).
//! Weights keep the precision of their file; only the 6-bit scales of K formats become bytes.

use crate::dequantize::Format;

use super::simd::LANES;

/// Of tiles and of matrices.
pub(crate) const ALIGNMENT: usize = 64;
/// Names this layout in the cache of packed files: to be raised with every change of it.
pub(crate) const LAYOUT: u32 = 2;
/// Inputs that share a scale of the activations.
pub(crate) const BLOCK: usize = 32;

/// How the weights of one format lie in a tile, in bytes for one span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpanLayout {
    /// Inputs.
    pub inputs: usize,
    /// Scales (and offsets) of all rows.
    pub scales: usize,
    /// Codes of all rows.
    pub codes: usize,
}

impl SpanLayout {
    pub const fn of(format: Format) -> Self {
        let (inputs, scales, codes) = match format {
            Format::F32 => (1, 0, 64),
            Format::F16 | Format::Bf16 => (1, 0, 32),
            Format::Q4_0 => (32, 32, 256),
            Format::Q4_1 => (32, 64, 256),
            Format::Q5_0 => (32, 32, 320),
            Format::Q5_1 => (32, 64, 320),
            Format::Q8_0 => (32, 32, 512),
            Format::Q4K => (256, 64 + 256, 2048),
            Format::Q5K => (256, 64 + 256, 2560),
            Format::Q6K => (256, 32 + 256, 3072),
        };
        Self { inputs, scales, codes }
    }

    pub const fn bytes(self) -> usize {
        self.scales + self.codes
    }
}

/// Sizes of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub format: Format,
    pub inputs: usize,
    pub outputs: usize,
}

impl Shape {
    pub fn tiles(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self) -> usize {
        let span = SpanLayout::of(self.format);
        (self.inputs / span.inputs * span.bytes()).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of the matrix; `None` where they are too many to count.
    pub fn bytes(&self) -> Option<usize> {
        self.tiles().checked_mul(self.tile_bytes())
    }
}

/// Packs one tile. `rows` are the stored rows of its outputs, at most sixteen; missing ones become zero.
pub(crate) fn pack_tile(shape: Shape, rows: &[&[u8]], tile: &mut [u8]) {
    let format = shape.format;
    let span = SpanLayout::of(format);
    let (stored, weights) = (format.block_bytes(), format.block_weights());
    for (lane, row) in rows.iter().enumerate() {
        for (number, block) in row.chunks_exact(stored).enumerate() {
            let mine = &mut tile[number * weights / span.inputs * span.bytes()..][..span.bytes()];
            if span.scales == 0 {
                mine[lane * stored..][..stored].copy_from_slice(block);
            } else {
                let (scales, codes) = mine.split_at_mut(span.scales);
                pack_scales(format, block, lane, scales);
                pack_codes(format, block, lane, codes);
            }
        }
    }
}

fn pack_scales(format: Format, block: &[u8], lane: usize, scales: &mut [u8]) {
    let mut half = |place: usize, at: usize| {
        scales[place * 32 + lane * 2..][..2].copy_from_slice(&block[at..at + 2]);
    };
    match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => half(0, 0),
        Format::Q6K => {
            half(0, 208);
            for (group, scale) in block[192..208].iter().enumerate() {
                scales[32 + group * LANES + lane] = *scale;
            }
        }
        _ => {
            half(0, 0);
            half(1, 2);
            if matches!(format, Format::Q4K | Format::Q5K) {
                for group in 0..8 {
                    let (scale, least) = crate::dequantize::k_scales(&block[4..16], group);
                    scales[64 + group * 2 * LANES + lane] = scale;
                    scales[64 + group * 2 * LANES + LANES + lane] = least;
                }
            }
        }
    }
}

fn pack_codes(format: Format, block: &[u8], lane: usize, span: &mut [u8]) {
    let blocks = format.block_weights() / BLOCK;
    let bytes = span.len() / blocks;
    for (number, out) in span.chunks_exact_mut(bytes).enumerate() {
        let codes = crate::dequantize::codes(format, block, number);
        for (input, code) in codes.into_iter().enumerate() {
            let (j, at) = (input / 4, lane * 4 + input % 4);
            let half = |out: &mut [u8]| out[j % 4 * 64 + at] |= (code & 15) << (j / 4 * 4);
            match format {
                Format::Q8_0 => out[j * 64 + at] = code,
                Format::Q4_0 | Format::Q4_1 | Format::Q4K => half(out),
                Format::Q5_0 | Format::Q5_1 | Format::Q5K => {
                    out[at] |= (code >> 4) << j;
                    half(&mut out[64..]);
                }
                _ => {
                    out[j / 4 * 64 + at] |= (code >> 4) << (j % 4 * 2);
                    half(&mut out[128..]);
                }
            }
        }
    }
}
