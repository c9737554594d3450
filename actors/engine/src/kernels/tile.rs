//! One tile of packed weights times a few columns of activations: the innermost loops.
//!
//! For a block of 32 inputs, weight `d·(q − z) + m` and activation `s·x` (q, z, x whole numbers), an output's sum
//! grows by `d·s · Σ (q − z)·x`, then by `m · s·Σ x` where the format has an `m`; the sums of products are whole
//! and exact. Floats are summed one by one in parts of [`BLOCK`]. So an output's bits depend on its row of weights
//! and its column alone.

use crate::dequantize::Format;

use super::pack::{BLOCK, Shape, SpanLayout};
use super::simd::{LANES, Simd};

/// The most columns of a group.
pub(crate) const MOST_COLUMNS: usize = 8;
/// Results of one tile: a row of lanes for each column.
pub(crate) type TileOut = [[f32; LANES]; MOST_COLUMNS];

/// A group of `width` columns, laid out for the kernels: what belongs to one block of inputs (for floats: to one
/// input) stands together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    /// 1, 2, 4 or 8.
    pub width: usize,
    /// `[blocks][width][32]`.
    pub codes: *const i8,
    /// `[blocks][width]`.
    pub scales: *const f32,
    /// `[blocks][width]`: scale times the sum of the codes.
    pub scaled_sums: *const f32,
    /// `[blocks][width][2]`: sums of the codes of each half block.
    pub sums: *const i32,
    /// `[inputs][width]`, for weights that are floats.
    pub floats: *const f32,
}

/// Computes a tile for a group of columns.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd>(shape: Shape, tile: *const u8, group: &Group, out: &mut TileOut) {
    // SAFETY: the caller's tile and group have the sizes of the shape.
    unsafe {
        match group.width {
            1 => columns::<S, 1>(shape, tile, group, out),
            2 => columns::<S, 2>(shape, tile, group, out),
            4 => columns::<S, 4>(shape, tile, group, out),
            _ => columns::<S, 8>(shape, tile, group, out),
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, const N: usize>(shape: Shape, tile: *const u8, group: &Group, out: &mut TileOut) {
    // SAFETY: as the caller's.
    unsafe {
        let spans = shape.inputs / SpanLayout::of(shape.format).inputs;
        let mut sums = [S::splat(0.0); N];
        match shape.format {
            Format::Q4_0 => plain::<S, N, 4, false>(spans, tile, group, &mut sums),
            Format::Q4_1 => plain::<S, N, 4, true>(spans, tile, group, &mut sums),
            Format::Q5_0 => plain::<S, N, 5, false>(spans, tile, group, &mut sums),
            Format::Q5_1 => plain::<S, N, 5, true>(spans, tile, group, &mut sums),
            Format::Q8_0 => plain::<S, N, 8, false>(spans, tile, group, &mut sums),
            Format::Q4K => k_groups::<S, N, 4>(spans, tile, group, &mut sums),
            Format::Q5K => k_groups::<S, N, 5>(spans, tile, group, &mut sums),
            Format::Q6K => six_bits::<S, N>(spans, tile, group, &mut sums),
            Format::F16 => floats::<S, N, 0>(spans, tile, group, &mut sums),
            Format::Bf16 => floats::<S, N, 1>(spans, tile, group, &mut sums),
            Format::F32 => floats::<S, N, 2>(spans, tile, group, &mut sums),
        }
        for (sum, out) in sums.iter().zip(out) {
            S::store(out.as_mut_ptr(), *sum);
        }
    }
}

// No closures in what follows: the compiler may leave them out of line, where they lack the instructions.

/// Eight times sixteen rows of four weights of `BITS` bits.
#[inline(always)]
unsafe fn unpack<S: Simd, const BITS: u32>(codes: *const u8) -> [S::B; 8] {
    // SAFETY: as the caller's.
    unsafe {
        match BITS {
            4 => halves::<S>(codes),
            5 => {
                let (bits, w) = (S::load_bytes(codes), halves::<S>(codes.add(64)));
                [
                    S::with_fifth::<0>(w[0], bits),
                    S::with_fifth::<1>(w[1], bits),
                    S::with_fifth::<2>(w[2], bits),
                    S::with_fifth::<3>(w[3], bits),
                    S::with_fifth::<4>(w[4], bits),
                    S::with_fifth::<5>(w[5], bits),
                    S::with_fifth::<6>(w[6], bits),
                    S::with_fifth::<7>(w[7], bits),
                ]
            }
            6 => {
                let (first, second) = (S::load_bytes(codes), S::load_bytes(codes.add(64)));
                let w = halves::<S>(codes.add(128));
                [
                    S::with_upper_two::<0>(w[0], first),
                    S::with_upper_two::<2>(w[1], first),
                    S::with_upper_two::<4>(w[2], first),
                    S::with_upper_two::<6>(w[3], first),
                    S::with_upper_two::<0>(w[4], second),
                    S::with_upper_two::<2>(w[5], second),
                    S::with_upper_two::<4>(w[6], second),
                    S::with_upper_two::<6>(w[7], second),
                ]
            }
            _ => [
                S::load_bytes(codes),
                S::load_bytes(codes.add(64)),
                S::load_bytes(codes.add(128)),
                S::load_bytes(codes.add(192)),
                S::load_bytes(codes.add(256)),
                S::load_bytes(codes.add(320)),
                S::load_bytes(codes.add(384)),
                S::load_bytes(codes.add(448)),
            ],
        }
    }
}

/// The four bits of 256 bytes: first all lower halves, then all upper ones.
#[inline(always)]
unsafe fn halves<S: Simd>(codes: *const u8) -> [S::B; 8] {
    // SAFETY: as the caller's.
    unsafe {
        let (a, b) = (S::load_bytes(codes), S::load_bytes(codes.add(64)));
        let (c, d) = (S::load_bytes(codes.add(128)), S::load_bytes(codes.add(192)));
        [
            S::low_half(a),
            S::low_half(b),
            S::low_half(c),
            S::low_half(d),
            S::high_half(a),
            S::high_half(b),
            S::high_half(c),
            S::high_half(d),
        ]
    }
}

/// Adds the products of `weights` (inputs from `4·from` on) to `sums`.
#[inline(always)]
unsafe fn dots<S: Simd, const N: usize, const J: usize, const SIGNED: bool>(
    weights: &[S::B],
    from: usize,
    x: *const i8,
    sums: &mut [S::I; N],
) {
    // SAFETY: as the caller's.
    unsafe {
        for (j, weights) in weights.iter().take(J).enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                let x = x.add(c * BLOCK + 4 * (from + j)).cast::<i32>().read_unaligned();
                *sum = if SIGNED { S::dot_signed(*sum, *weights, x) } else { S::dot(*sum, *weights, x) };
            }
        }
    }
}

/// What is added to a block's sum so that weights count from `zero` on.
#[inline(always)]
unsafe fn starts<S: Simd, const N: usize>(zero: i32, group: &Group, block: usize) -> [S::I; N] {
    // SAFETY: as the caller's.
    unsafe {
        let sums = group.sums.add(block * N * 2);
        let mut starts = [S::splat_i32(0); N];
        if zero != 0 {
            for (c, start) in starts.iter_mut().enumerate() {
                *start = S::splat_i32(-zero * (*sums.add(2 * c) + *sums.add(2 * c + 1)));
            }
        }
        starts
    }
}

#[inline(always)]
unsafe fn accumulate<S: Simd, const N: usize>(
    scale: S::F,
    offset: Option<S::F>,
    products: [S::I; N],
    group: &Group,
    block: usize,
    sums: &mut [S::F; N],
) {
    // SAFETY: as the caller's.
    unsafe {
        for c in 0..N {
            let both = S::mul(scale, S::splat(*group.scales.add(block * N + c)));
            sums[c] = S::fma(both, S::to_float(products[c]), sums[c]);
            if let Some(offset) = offset {
                sums[c] = S::fma(offset, S::splat(*group.scaled_sums.add(block * N + c)), sums[c]);
            }
        }
    }
}

/// Formats with a scale (and a least value) for each block of 32.
#[inline(always)]
unsafe fn plain<S: Simd, const N: usize, const BITS: u32, const LEAST: bool>(
    spans: usize,
    tile: *const u8,
    group: &Group,
    sums: &mut [S::F; N],
) {
    let scale_bytes = if LEAST { 64 } else { 32 };
    let bytes = scale_bytes + BITS as usize * 64;
    let zero = match (BITS, LEAST) {
        (_, true) => 0,
        (8, _) => S::SIGNED_OFFSET,
        _ => 1 << (BITS - 1),
    };
    // SAFETY: as the caller's.
    unsafe {
        for block in 0..spans {
            let scales = tile.add(block * bytes);
            let weights = unpack::<S, BITS>(scales.add(scale_bytes));
            let scales = scales.cast::<u16>();
            let mut products = starts::<S, N>(zero, group, block);
            let x = group.codes.add(block * N * BLOCK);
            if BITS == 8 {
                dots::<S, N, 8, true>(&weights, 0, x, &mut products);
            } else {
                dots::<S, N, 8, false>(&weights, 0, x, &mut products);
            }
            let offset = if LEAST { Some(S::load_f16(scales.add(LANES))) } else { None };
            accumulate::<S, N>(S::load_f16(scales), offset, products, group, block, sums);
        }
    }
}

/// `Q4_K` and `Q5_K`: for each block of 32 a 6-bit scale and a 6-bit least value, times those of the span.
#[inline(always)]
unsafe fn k_groups<S: Simd, const N: usize, const BITS: u32>(
    spans: usize,
    tile: *const u8,
    group: &Group,
    sums: &mut [S::F; N],
) {
    let layout = BITS as usize * 64;
    // SAFETY: as the caller's.
    unsafe {
        for span in 0..spans {
            let scales = tile.add(span * (320 + 8 * layout));
            let codes = scales.add(320);
            let scale = S::load_f16(scales.cast());
            let least = S::sub(S::splat(0.0), S::load_f16(scales.cast::<u16>().add(LANES)));
            for n in 0..8 {
                let block = span * 8 + n;
                let weights = unpack::<S, BITS>(codes.add(n * layout));
                let mut products = [S::splat_i32(0); N];
                dots::<S, N, 8, false>(&weights, 0, group.codes.add(block * N * BLOCK), &mut products);
                let fine = scales.add(64 + n * 2 * LANES);
                let scale = S::mul(scale, S::load_u8(fine));
                let least = S::mul(least, S::load_u8(fine.add(LANES)));
                accumulate::<S, N>(scale, Some(least), products, group, block, sums);
            }
        }
    }
}

/// `Q6_K`: for each 16 inputs a signed 8-bit scale, times that of the span.
#[inline(always)]
unsafe fn six_bits<S: Simd, const N: usize>(spans: usize, tile: *const u8, group: &Group, sums: &mut [S::F; N]) {
    // SAFETY: as the caller's.
    unsafe {
        for span in 0..spans {
            let scales = tile.add(span * (288 + 8 * 384));
            let codes = scales.add(288);
            let scale = S::load_f16(scales.cast());
            for n in 0..8 {
                let block = span * 8 + n;
                let weights = unpack::<S, 6>(codes.add(n * 384));
                for half in 0..2 {
                    let mut products = [S::splat_i32(0); N];
                    for (c, start) in products.iter_mut().enumerate() {
                        *start = S::splat_i32(-32 * *group.sums.add((block * N + c) * 2 + half));
                    }
                    let x = group.codes.add(block * N * BLOCK);
                    dots::<S, N, 4, false>(&weights[half * 4..], half * 4, x, &mut products);
                    let fine = S::load_i8(scales.add(32 + (2 * n + half) * LANES).cast());
                    accumulate::<S, N>(S::mul(scale, fine), None, products, group, block, sums);
                }
            }
        }
    }
}

/// `KIND`: 0 for F16, 1 for BF16, 2 for F32.
#[inline(always)]
unsafe fn floats<S: Simd, const N: usize, const KIND: u32>(
    inputs: usize,
    weights: *const u8,
    group: &Group,
    sums: &mut [S::F; N],
) {
    // SAFETY: as the caller's.
    unsafe {
        for part in (0..inputs).step_by(BLOCK) {
            let mut parts = [S::splat(0.0); N];
            for n in part..(part + BLOCK).min(inputs) {
                let weights = match KIND {
                    0 => S::load_f16(weights.cast::<u16>().add(n * LANES)),
                    1 => S::load_bf16(weights.cast::<u16>().add(n * LANES)),
                    _ => S::load(weights.cast::<f32>().add(n * LANES)),
                };
                for (c, part) in parts.iter_mut().enumerate() {
                    *part = S::fma(weights, S::splat(*group.floats.add(n * N + c)), *part);
                }
            }
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = S::add(*sum, part);
            }
        }
    }
}
