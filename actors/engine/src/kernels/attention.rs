//! Attention of some new tokens of one sequence over its blocks of keys and values.
//!
//! A block holds [`KV_BLOCK`] positions of one layer: for each head keys `[size][positions]`, so that a vector holds
//! the scores of sixteen positions, and values `[positions][size]`. A query goes through its blocks in order with a
//! running maximum and sum (Milakov and Gimelshein 2018), so what it gets depends on its position and on what lies
//! before it alone, not on how many queries are computed together.

use super::float::exp;
use super::simd::{LANES, Simd};

/// Positions of one block.
pub(crate) const KV_BLOCK: usize = 64;
/// Vectors of positions in a block.
const VECTORS: usize = KV_BLOCK / LANES;
/// The widest head; a multiple of [`LANES`].
pub(crate) const WIDEST_HEAD: usize = 256;
/// Below every score.
const LOWEST: f32 = -1e30;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// IEEE half precision.
    F16,
    /// 8 bits, with a scale for each position and head.
    Int8,
}

/// Where the parts of one head in one block lie, in bytes from the block's begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvLayout {
    pub kind: KvType,
    pub heads: usize,
    /// A multiple of [`LANES`].
    pub size: usize,
}

impl KvLayout {
    fn element(self) -> usize {
        match self.kind {
            KvType::F16 => 2,
            KvType::Int8 => 1,
        }
    }

    fn matrix(self) -> usize {
        self.size * KV_BLOCK * self.element()
    }

    /// Scales of keys or of values.
    fn scales(self) -> usize {
        if self.kind == KvType::Int8 { KV_BLOCK * 4 } else { 0 }
    }

    fn head(self) -> usize {
        2 * (self.matrix() + self.scales())
    }

    /// Bytes of a block of one layer.
    pub fn block_bytes(self) -> usize {
        self.heads * self.head()
    }
}

/// Writes one head's key and value (rotated, `size` numbers each) at `place` of a block.
#[inline(always)]
pub(crate) unsafe fn write<S: Simd>(
    layout: KvLayout,
    block: *mut u8,
    head: usize,
    place: usize,
    key: *const f32,
    value: *const f32,
) {
    // SAFETY: the caller's block has `block_bytes`, the head and the place are within it.
    unsafe {
        let size = layout.size;
        let keys = block.add(head * layout.head());
        let values = keys.add(layout.matrix());
        let mut piece = [0u16; LANES];
        let mut small = [0i8; LANES];
        let scale = |x: *const f32, to: *mut u8| {
            let mut most = S::splat(0.0);
            for n in (0..size).step_by(LANES) {
                let x = S::load(x.add(n));
                most = S::max(S::max(x, S::sub(S::splat(0.0), x)), most);
            }
            let most = S::greatest(most);
            to.cast::<f32>().add(place).write_unaligned(most / 127.0);
            S::splat(if most > 0.0 && (127.0 / most).is_finite() { 127.0 / most } else { 0.0 })
        };
        match layout.kind {
            KvType::F16 => {
                for n in (0..size).step_by(LANES) {
                    S::store_f16(piece.as_mut_ptr(), S::load(key.add(n)));
                    for (i, bits) in piece.iter().enumerate() {
                        keys.cast::<u16>().add((n + i) * KV_BLOCK + place).write_unaligned(*bits);
                    }
                    S::store_f16(values.cast::<u16>().add(place * size + n), S::load(value.add(n)));
                }
            }
            KvType::Int8 => {
                let scales = values.add(layout.matrix());
                let (of_key, of_value) = (scale(key, scales), scale(value, scales.add(layout.scales())));
                for n in (0..size).step_by(LANES) {
                    S::store_i8(small.as_mut_ptr(), S::mul(S::load(key.add(n)), of_key));
                    for (i, code) in small.iter().enumerate() {
                        keys.cast::<i8>().add((n + i) * KV_BLOCK + place).write(*code);
                    }
                    let codes = S::mul(S::load(value.add(n)), of_value);
                    S::store_i8(values.cast::<i8>().add(place * size + n), codes);
                }
            }
        }
    }
}

/// Some queries that share a head of keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queries {
    /// Scaled and rotated; `size` numbers each.
    pub queries: *const *const f32,
    /// Where results go; `size` numbers each.
    pub outputs: *const *mut f32,
    /// Each query's own position.
    pub positions: *const usize,
    pub count: usize,
}

/// The state of one query on its way through the blocks.
struct Running {
    greatest: f32,
    sum: f32,
    output: [f32; WIDEST_HEAD],
}

/// Attends for some queries. `blocks` are those of their sequence, one for each [`KV_BLOCK`] positions; each query
/// sees the `window` positions up to its own (a window of `usize::MAX` is none).
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd>(
    layout: KvLayout,
    blocks: &[*const u8],
    head: usize,
    window: usize,
    queries: Queries,
) {
    // SAFETY: the caller's pointers are valid for the sizes of the layout.
    unsafe {
        let mut done = 0;
        while done < queries.count {
            let left = queries.count - done;
            let some = Queries {
                queries: queries.queries.add(done),
                outputs: queries.outputs.add(done),
                positions: queries.positions.add(done),
                count: left.min(TOGETHER),
            };
            match some.count {
                1 => together::<S, 1>(layout, blocks, head, window, some),
                2 => together::<S, 2>(layout, blocks, head, window, some),
                3 => together::<S, 3>(layout, blocks, head, window, some),
                _ => together::<S, TOGETHER>(layout, blocks, head, window, some),
            }
            done += some.count;
        }
    }
}

/// Queries whose scores are held in registers at once.
const TOGETHER: usize = 4;

#[inline(always)]
unsafe fn together<S: Simd, const N: usize>(
    layout: KvLayout,
    blocks: &[*const u8],
    head: usize,
    window: usize,
    queries: Queries,
) {
    // SAFETY: as the caller's; `N` is the number of queries.
    unsafe {
        let size = layout.size;
        let positions: [usize; N] = std::array::from_fn(|n| *queries.positions.add(n));
        let first: [usize; N] = std::array::from_fn(|n| (positions[n] + 1).saturating_sub(window));
        let last = positions.iter().copied().max().unwrap_or(0);
        let begin = first.iter().copied().min().unwrap_or(0) / KV_BLOCK;
        let mut running: [Running; N] =
            std::array::from_fn(|_| Running { greatest: LOWEST, sum: 0.0, output: [0.0; WIDEST_HEAD] });
        for (number, block) in blocks.iter().enumerate().take(last / KV_BLOCK + 1).skip(begin) {
            let start = number * KV_BLOCK;
            let places = (last + 1 - start).min(KV_BLOCK);
            let vectors = places.div_ceil(LANES);
            let keys = block.add(head * layout.head());
            let values = keys.add(layout.matrix());
            let scales = values.add(layout.matrix()).cast::<f32>();
            let mut scores = [[S::splat(0.0); VECTORS]; N];
            match layout.kind {
                KvType::F16 => products::<S, N, false>(size, vectors, queries.queries, &mut scores, keys),
                KvType::Int8 => {
                    products::<S, N, true>(size, vectors, queries.queries, &mut scores, keys);
                    for scores in &mut scores {
                        for (v, score) in scores.iter_mut().enumerate().take(vectors) {
                            *score = S::mul(*score, S::load(scales.add(v * LANES)));
                        }
                    }
                }
            }
            let mut weights = [[0.0f32; KV_BLOCK]; N];
            for n in 0..N {
                let seen = positions[n].saturating_add(1).saturating_sub(start).min(KV_BLOCK);
                let unseen = first[n].saturating_sub(start).min(KV_BLOCK);
                soften::<S>(&scores[n], unseen..seen, &mut weights[n], &mut running[n], size);
                if layout.kind == KvType::Int8 {
                    for v in 0..vectors {
                        let at = weights[n].as_mut_ptr().add(v * LANES);
                        S::store(at, S::mul(S::load(at), S::load(scales.add(KV_BLOCK + v * LANES))));
                    }
                }
            }
            match layout.kind {
                KvType::F16 => mix::<S, N, false>(size, places, &weights, &mut running, values),
                KvType::Int8 => mix::<S, N, true>(size, places, &weights, &mut running, values),
            }
        }
        for (n, running) in running.iter().enumerate() {
            let inverse = S::splat(1.0 / running.sum);
            let output = *queries.outputs.add(n);
            for i in (0..size).step_by(LANES) {
                S::store(output.add(i), S::mul(S::load(running.output.as_ptr().add(i)), inverse));
            }
        }
    }
}

// No closures in what follows: the compiler may leave them out of line, where they lack the instructions.

/// Sixteen elements from the `n`-th on.
#[inline(always)]
unsafe fn load<S: Simd, const INT8: bool>(from: *const u8, n: usize) -> S::F {
    // SAFETY: as the caller's.
    unsafe { if INT8 { S::load_i8(from.cast::<i8>().add(n)) } else { S::load_f16(from.cast::<u16>().add(n)) } }
}

/// Scores of the block's positions, each summed over the head's elements in order.
#[inline(always)]
unsafe fn products<S: Simd, const N: usize, const INT8: bool>(
    size: usize,
    vectors: usize,
    queries: *const *const f32,
    scores: &mut [[S::F; VECTORS]; N],
    keys: *const u8,
) {
    // SAFETY: as the caller's.
    unsafe {
        if vectors == VECTORS {
            let mut sums = [[S::splat(0.0); VECTORS]; N];
            for i in 0..size {
                for v in 0..VECTORS {
                    let keys = load::<S, INT8>(keys, i * KV_BLOCK + v * LANES);
                    for (n, sums) in sums.iter_mut().enumerate() {
                        sums[v] = S::fma(S::splat(*(*queries.add(n)).add(i)), keys, sums[v]);
                    }
                }
            }
            *scores = sums;
        } else {
            for v in 0..vectors {
                let mut sums: [S::F; N] = [S::splat(0.0); N];
                for i in 0..size {
                    let keys = load::<S, INT8>(keys, i * KV_BLOCK + v * LANES);
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(S::splat(*(*queries.add(n)).add(i)), keys, *sum);
                    }
                }
                for (scores, sum) in scores.iter_mut().zip(sums) {
                    scores[v] = sum;
                }
            }
        }
    }
}

/// One query's weights from its scores, relative to the greatest score so far; what was summed up before is scaled
/// accordingly. Only the positions in `seen` count.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &[S::F; VECTORS],
    seen: std::ops::Range<usize>,
    weights: &mut [f32; KV_BLOCK],
    running: &mut Running,
    size: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        for (v, score) in scores.iter().enumerate() {
            S::store(weights.as_mut_ptr().add(v * LANES), *score);
        }
        weights[..seen.start.min(KV_BLOCK)].fill(f32::NEG_INFINITY);
        weights[seen.end..].fill(f32::NEG_INFINITY);
        let at = |v: usize| weights.as_ptr().add(v * LANES);
        let most = S::max(S::max(S::load(at(0)), S::load(at(1))), S::max(S::load(at(2)), S::load(at(3))));
        let greatest = S::greatest(most).max(running.greatest);
        let mut total = S::splat(0.0);
        for v in 0..VECTORS {
            let weight = exp::<S>(S::sub(S::load(weights.as_ptr().add(v * LANES)), S::splat(greatest)));
            total = S::add(total, weight);
            S::store(weights.as_mut_ptr().add(v * LANES), weight);
        }
        if greatest > running.greatest {
            // All sixteen lanes do the same, which is what makes it the same on every processor.
            let fade = exp::<S>(S::splat(running.greatest - greatest));
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), fade);
            running.sum *= lanes[0];
            for i in (0..size).step_by(LANES) {
                let at = running.output.as_mut_ptr().add(i);
                S::store(at, S::mul(S::load(at), fade));
            }
            running.greatest = greatest;
        }
        running.sum += S::sum(total);
    }
}

/// Adds the values of the block's positions, in order, each times its weight.
#[inline(always)]
unsafe fn mix<S: Simd, const N: usize, const INT8: bool>(
    size: usize,
    places: usize,
    weights: &[[f32; KV_BLOCK]; N],
    running: &mut [Running; N],
    values: *const u8,
) {
    // SAFETY: as the caller's.
    unsafe {
        let mut from = 0;
        while from < size {
            if from + 4 * LANES <= size {
                mix_vectors::<S, N, INT8, 4>(size, places, weights, running, values, from);
                from += 4 * LANES;
            } else {
                mix_vectors::<S, N, INT8, 1>(size, places, weights, running, values, from);
                from += LANES;
            }
        }
    }
}

/// As [`mix`], for `V` vectors of the head's elements from `from` on.
#[inline(always)]
unsafe fn mix_vectors<S: Simd, const N: usize, const INT8: bool, const V: usize>(
    size: usize,
    places: usize,
    weights: &[[f32; KV_BLOCK]; N],
    running: &mut [Running; N],
    values: *const u8,
    from: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; N];
        for (sums, running) in sums.iter_mut().zip(running.iter()) {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(running.output.as_ptr().add(from + v * LANES));
            }
        }
        for place in 0..places {
            for v in 0..V {
                let value = load::<S, INT8>(values, place * size + from + v * LANES);
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    sums[v] = S::fma(S::splat(weights[place]), value, sums[v]);
                }
            }
        }
        for (sums, running) in sums.iter().zip(running.iter_mut()) {
            for (v, sum) in sums.iter().enumerate() {
                S::store(running.output.as_mut_ptr().add(from + v * LANES), *sum);
            }
        }
    }
}
