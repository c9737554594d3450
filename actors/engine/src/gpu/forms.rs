//! Weights as they lie on a device: the whole numbers of the file's blocks in words of 32 bits, and their scales in
//! others. **Nothing is rounded**: a device's weight is the number that [`Format::dequantize`] gives, bit for bit.
//!
//! Eight weights that stand behind each other (a *chunk*) are what one thread unpacks at once; four chunks are a
//! *group*, which has one scale (but for Q6_K, where half a group has). Low bits are packed four to a weight; a fifth
//! and a sixth lie in words of their own behind those of the group.
//!
//! | format | form | words of 32 bits for 32 weights | the file's |
//! |---|---|---|---|
//! | Q4_0, Q5_0, Q8_0 | 4, 5, 8 bits, `f32` scale | 5, 6, 9 | 4.5, 5.5, 8.5 |
//! | Q4_1, Q5_1 | 4, 5 bits, `f16` scale and minimum | 5, 6 | 5, 6 |
//! | Q4_K, Q5_K | 4, 5 bits, two `f16` for 256 weights and two bytes a group | 4.625, 5.625 | 4.5, 5.5 |
//! | Q6_K | 6 bits, an `f16` for 256 weights and two bytes a group | 6.625 | 6.5625 |
//! | F16, BF16, F32 | as they are | 16, 16, 32 | the same |

use crate::dequantize::{Format, codes, k_scales};

/// Weights of a chunk.
pub(crate) const CHUNK: usize = 8;
/// Weights of a group.
pub(crate) const GROUP: usize = 32;
/// Groups that share a block of scales in the K formats, and the words of that block.
pub(crate) const SUPER: usize = 8;
pub(crate) const SUPER_WORDS: usize = 5;

/// How weights get their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scales {
    /// They are numbers of 32 bits.
    Single,
    /// They are numbers of IEEE half precision,
    Half,
    /// or the upper halves of `f32`.
    Brain,
    /// `(code - offset) · scale`, the scale an `f32`.
    Centred { offset: u32 },
    /// `code · scale + minimum`, both `f16`.
    Pair,
    /// `code · (d · s) - m · n`: `d` and `m` are `f16` for 256 weights, `s` and `n` bytes for 32.
    Nested,
    /// `(code - 32) · (d · s)`: `d` is `f16` for 256 weights, `s` a signed byte for 16.
    Signed,
}

/// The form of a matrix on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Of a weight.
    pub bits: u32,
    pub scales: Scales,
}

impl Form {
    pub const fn of(format: Format) -> Self {
        let (bits, scales) = match format {
            Format::F32 => (32, Scales::Single),
            Format::F16 => (16, Scales::Half),
            Format::Bf16 => (16, Scales::Brain),
            Format::Q4_0 => (4, Scales::Centred { offset: 8 }),
            Format::Q5_0 => (5, Scales::Centred { offset: 16 }),
            Format::Q8_0 => (8, Scales::Centred { offset: 128 }),
            Format::Q4_1 => (4, Scales::Pair),
            Format::Q5_1 => (5, Scales::Pair),
            Format::Q4K => (4, Scales::Nested),
            Format::Q5K => (5, Scales::Nested),
            Format::Q6K => (6, Scales::Signed),
        };
        Self { bits, scales }
    }

    /// A word for it, which no other form has.
    pub fn name(self) -> String {
        let scales = match self.scales {
            Scales::Single | Scales::Half => "float",
            Scales::Brain => "brain",
            Scales::Centred { .. } => "centred",
            Scales::Pair => "pair",
            Scales::Nested => "nested",
            Scales::Signed => "signed",
        };
        format!("{scales}-{}", self.bits)
    }

    /// Words of the weights of a row, and of its scales.
    pub const fn words(self, inputs: usize) -> (usize, usize) {
        let scales = match self.scales {
            Scales::Single | Scales::Half | Scales::Brain => 0,
            Scales::Centred { .. } | Scales::Pair => inputs / GROUP,
            Scales::Nested | Scales::Signed => inputs / GROUP / SUPER * SUPER_WORDS,
        };
        (inputs * self.bits as usize / 32, scales)
    }

    /// Puts one stored row into words of its form.
    pub fn pack(self, format: Format, stored: &[u8], words: &mut [u32], scales: &mut [u32]) {
        if !format.is_quantized() {
            let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            words.iter_mut().zip(stored.chunks_exact(4)).for_each(|(to, from)| *to = word(from));
            return;
        }
        let each = self.bits as usize; // words of a group: 32 weights of so many bits
        for (number, block) in stored.chunks_exact(format.block_bytes()).enumerate() {
            let groups = format.block_weights() / GROUP;
            for group in 0..groups {
                let codes = codes(format, block, group);
                pack_group(self.bits, &codes, &mut words[(number * groups + group) * each..][..each]);
            }
            let half = |at: usize| u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
            match self.scales {
                Scales::Centred { .. } => scales[number] = half::f16::from_bits(half(0) as u16).to_f32().to_bits(),
                Scales::Pair => scales[number] = half(0) | half(2) << 16,
                Scales::Nested => {
                    let scales = &mut scales[number * SUPER_WORDS..][..SUPER_WORDS];
                    scales.fill(0);
                    scales[0] = half(0) | half(2) << 16;
                    for group in 0..SUPER {
                        let (scale, least) = k_scales(&block[4..16], group);
                        let both = u32::from(scale) | u32::from(least) << 8;
                        scales[1 + group / 2] |= both << (16 * (group % 2));
                    }
                }
                Scales::Signed => {
                    let scales = &mut scales[number * SUPER_WORDS..][..SUPER_WORDS];
                    scales[0] = half(208);
                    for (word, bytes) in scales[1..].iter_mut().zip(block[192..208].chunks_exact(4)) {
                        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
                Scales::Single | Scales::Half | Scales::Brain => {}
            }
        }
    }
}

/// 32 codes into `bits` words.
fn pack_group(bits: u32, codes: &[u8; 32], words: &mut [u32]) {
    words.fill(0);
    for (n, code) in codes.iter().enumerate() {
        let (chunk, i, code) = (n / CHUNK, n % CHUNK, u32::from(*code));
        if bits == 8 {
            // Two's complement; with the upper bit turned they rise from 0.
            words[chunk * 2 + i / 4] |= (code ^ 128) << (8 * (i % 4));
            continue;
        }
        words[chunk] |= (code & 15) << (4 * i);
        match bits {
            5 => words[4] |= (code >> 4) << n,
            6 => words[4 + chunk / 2] |= (code >> 4) << (16 * (chunk % 2) + 2 * i),
            _ => {}
        }
    }
}
