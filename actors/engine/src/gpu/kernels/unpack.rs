//! Eight weights of a row, out of the words that [`super::super::forms`] describes.

use cubecl::prelude::*;

use crate::gpu::forms::{CHUNK, Form, SUPER, SUPER_WORDS, Scales};

/// A number of IEEE half precision. By hand, as not every adapter has the type; small ones are put together from
/// normal numbers, as adapters may take subnormal ones for zero.
#[cube]
pub(super) fn half(bits: u32) -> f32 {
    let magnitude = (bits & 0x7fffu32) << 13u32;
    let normal = f32::reinterpret(magnitude + 0x3800_0000u32);
    let small = f32::reinterpret(magnitude + 0x3880_0000u32) - f32::new(0.000_061_035_156f32);
    let value = select(magnitude < 0x0080_0000u32, small, normal);
    select((bits & 0x8000u32) != 0u32, -value, value)
}

/// The weights `8 · chunk ..` of `row` into `out[at ..]`. `chunks`: of a row.
#[cube]
pub(super) fn unpack(
    codes: &[u32],
    scales: &[u32],
    row: usize,
    chunk: usize,
    chunks: usize,
    out: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] form: Form,
) {
    if comptime!(form.scales == Scales::Single) {
        let from = (row * chunks + chunk) * CHUNK;
        #[unroll]
        for i in 0..8usize {
            out[at + i] = f32::reinterpret(codes[from + i]);
        }
    } else if comptime!(form.bits == 16) {
        let from = (row * chunks + chunk) * 4usize;
        #[unroll]
        for i in 0..4usize {
            let word = codes[from + i];
            if comptime!(form.scales == Scales::Brain) {
                out[at + 2 * i] = f32::reinterpret(word << 16u32);
                out[at + 2 * i + 1] = f32::reinterpret(word & 0xffff_0000u32);
            } else {
                out[at + 2 * i] = half(word & 0xffffu32);
                out[at + 2 * i + 1] = half(word >> 16u32);
            }
        }
    } else {
        let groups = chunks / 4usize;
        let group = chunk / 4usize;
        let quarter = chunk % 4usize;
        let mut line = Array::<f32>::new(2usize);
        scale(scales, row, groups, group, quarter, &mut line, form);
        let (factor, summand) = (line[0], line[1]);
        let each = comptime!(form.bits as usize);
        let from = (row * groups + group) * each;
        if comptime!(form.bits == 8) {
            #[unroll]
            for i in 0..8usize {
                let word = codes[from + quarter * 2usize + comptime!(i / 4)];
                let code = (word >> comptime!(8 * (i % 4) as u32)) & 255u32;
                out[at + i] = f32::cast_from(code) * factor + summand;
            }
        } else {
            let low = codes[from + quarter];
            let mut high = 0u32;
            if comptime!(form.bits == 5) {
                high = codes[from + 4usize] >> (quarter as u32 * 8u32);
            }
            if comptime!(form.bits == 6) {
                high = codes[from + 4usize + quarter / 2usize] >> ((quarter as u32 % 2u32) * 16u32);
            }
            #[unroll]
            for i in 0..8usize {
                let mut code = (low >> comptime!(4 * i as u32)) & 15u32;
                if comptime!(form.bits == 5) {
                    code |= ((high >> comptime!(i as u32)) & 1u32) << 4u32;
                }
                if comptime!(form.bits == 6) {
                    code |= ((high >> comptime!(2 * i as u32)) & 3u32) << 4u32;
                }
                out[at + i] = f32::cast_from(code) * factor + summand;
            }
        }
    }
}

/// What a code is multiplied with and what is added then.
#[cube]
fn scale(
    scales: &[u32],
    row: usize,
    groups: usize,
    group: usize,
    quarter: usize,
    line: &mut Array<f32>,
    #[comptime] form: Form,
) {
    match comptime!(form.scales) {
        Scales::Centred { offset } => {
            let factor = f32::reinterpret(scales[row * groups + group]);
            line[0] = factor;
            line[1] = factor * f32::new(comptime!(-(offset as f32)));
        }
        Scales::Pair => {
            let word = scales[row * groups + group];
            line[0] = half(word & 0xffffu32);
            line[1] = half(word >> 16u32);
        }
        Scales::Nested => {
            let from = (row * (groups / SUPER) + group / SUPER) * SUPER_WORDS;
            let both = scales[from];
            let word = scales[from + 1usize + group % SUPER / 2usize] >> ((group as u32 % 2u32) * 16u32);
            line[0] = half(both & 0xffffu32) * f32::cast_from(word & 255u32);
            line[1] = -(half(both >> 16u32) * f32::cast_from((word >> 8u32) & 255u32));
        }
        Scales::Signed => {
            let from = (row * (groups / SUPER) + group / SUPER) * SUPER_WORDS;
            let shift = (group as u32 % 2u32) * 16u32 + (quarter as u32 / 2u32) * 8u32;
            let byte = (scales[from + 1usize + group % SUPER / 2usize] >> shift) & 255u32;
            let factor = half(scales[from]) * (f32::cast_from(byte ^ 128u32) - 128.0f32);
            line[0] = factor;
            line[1] = factor * -32.0f32;
        }
        _ => {}
    }
}

/// All weights of some rows, for tests and for those who want them as they are.
#[cube(launch_unchecked)]
pub(crate) fn unpack_rows(
    codes: &[u32],
    scales: &[u32],
    out: &mut [f32],
    chunks: u32,
    count: u32,
    #[comptime] form: Form,
) {
    if ABSOLUTE_POS < count as usize {
        let chunks = chunks as usize;
        let mut weights = Array::<f32>::new(8usize);
        unpack(codes, scales, ABSOLUTE_POS / chunks, ABSOLUTE_POS % chunks, chunks, &mut weights, 0usize, form);
        #[unroll]
        for i in 0..8usize {
            out[ABSOLUTE_POS * 8usize + i] = weights[i];
        }
    }
}
