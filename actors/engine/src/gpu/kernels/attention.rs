//! Attention over keys and values in blocks: scores, softmax and the sum of values in one pass over the positions
//! (online softmax, Milakov & Gimelshein 2018), so that scores never lie in memory. A workgroup serves one row and one
//! head of keys with all queries that share it; where rows are few, a sequence's positions are split between several
//! workgroups (flash decoding), and [`join`] puts their results together.

#![allow(clippy::collapsible_if, reason = "the outer one of two is often decided when the kernel is built")]

use cubecl::prelude::*;

use super::rows::sum_of_all;
use crate::kernels::KV_BLOCK;

/// Threads of a workgroup, and positions that it takes at once.
pub(crate) const POSITIONS: u32 = 64;
/// Numbers of a row's plan: where its keys and values go, where its sequence's table starts, what it sees last.
pub(crate) const ROW_PLAN: usize = 3;
/// A score that no real one undercuts; not infinite, as differences of infinities are no numbers.
const NEVER: f32 = -1e30;
/// Threads that look for a head's largest score.
const LOOKERS: usize = 8;

/// Sizes of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct HeadShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
    pub rotated: usize,
    /// Heads of queries and keys are normed.
    pub normed: bool,
}

/// Queries, keys and values of a step, as a layer's product left them: norms of heads, rotary positions, and keys and
/// values to their places. Queries stay where they are. Workgroups `(heads + 2 · kv_heads, rows)`.
///
/// `norms`: the weights for queries, then those for keys. `angles`: for each row its cosines, then its sines.
#[cube(launch_unchecked)]
pub(crate) fn place<E: Float>(
    qkv: &mut [f32],
    norms: &[f32],
    angles: &[f32],
    plan: &[u32],
    keys: &mut [E],
    values: &mut [E],
    scale: f32,
    epsilon: f32,
    #[comptime] shape: HeadShape,
) {
    let threads = comptime!(POSITIONS as usize);
    let (size, pairs) = (comptime!(shape.size), comptime!(shape.rotated / 2));
    let (heads, kv_heads) = (comptime!(shape.heads), comptime!(shape.kv_heads));
    let (head, row, unit) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, UNIT_POS as usize);
    let from = (row * comptime!(heads + 2 * kv_heads) + head) * size;
    let to = plan[row * ROW_PLAN] as usize * comptime!(kv_heads * size);
    let mut numbers = Shared::<[f32]>::new_slice(size);
    let mut shared = Shared::<[f32]>::new_slice(threads);
    if head >= comptime!(heads + kv_heads) {
        let to = to + (head - comptime!(heads + kv_heads)) * size;
        let mut i = unit;
        while i < size {
            values[to + i] = E::cast_from(qkv[from + i]);
            i += threads;
        }
    } else {
        let mut i = unit;
        let mut squares = 0.0f32;
        while i < size {
            let value = qkv[from + i];
            numbers[i] = value;
            squares += value * value;
            i += threads;
        }
        if comptime!(shape.normed) {
            let mean = sum_of_all(squares, &mut shared, POSITIONS) / f32::new(comptime!(size as f32));
            let factor = 1.0f32 / (mean + epsilon).sqrt();
            let weights = select(head < heads, 0usize, size);
            let mut i = unit;
            while i < size {
                numbers[i] = numbers[i] * factor * norms[weights + i];
                i += threads;
            }
        }
        sync_cube();
        let mut i = unit;
        while i < size {
            let mut value = numbers[i];
            if i < comptime!(2 * pairs) {
                let pair = i % pairs;
                let cosine = angles[row * comptime!(2 * pairs) + pair];
                let sine = angles[row * comptime!(2 * pairs) + pairs + pair];
                let other = numbers[select(i < pairs, i + pairs, i - min(i, pairs))];
                value = value * cosine + select(i < pairs, -other, other) * sine;
            }
            if head < heads {
                qkv[from + i] = value * scale;
            } else {
                keys[to + (head - min(head, heads)) * size + i] = E::cast_from(value);
            }
            i += threads;
        }
    }
}

/// Attention of `qkv`'s queries, `[rows, heads · size]`. Workgroups `(kv_heads, rows, parts)`; each part takes `span`
/// positions. With one part the result goes to `out`, with several each part's sum, largest score and weight go to
/// `parts`, for [`join`].
#[cube(launch_unchecked)]
pub(crate) fn attend<E: Float>(
    qkv: &[f32],
    keys: &[Vector<E, Const<4>>],
    values: &[E],
    plan: &[u32],
    out: &mut [f32],
    span: u32,
    window: u32,
    #[comptime] shape: HeadShape,
    #[comptime] several: bool,
) {
    let threads = comptime!(POSITIONS as usize);
    let (size, heads, kv_heads) = (comptime!(shape.size), comptime!(shape.heads), comptime!(shape.kv_heads));
    let share = comptime!(heads / kv_heads);
    // Numbers of the result that a thread computes for each query.
    let own = comptime!(size.div_ceil(threads));
    let (kv_head, row, part, unit) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize, UNIT_POS as usize);
    let table = plan[row * ROW_PLAN + 1usize] as usize;
    let end = plan[row * ROW_PLAN + 2usize] as usize + 1usize;
    let first = end - min(window as usize, end) + part * span as usize;
    let last = min(first + span as usize, end);

    let mut queries = Shared::<[f32]>::new_slice(comptime!(share * size));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(share * threads));
    let mut largest = Shared::<[f32]>::new_slice(comptime!(share * LOOKERS));
    let mut places = Shared::<[u32]>::new_slice(threads);
    let from = row * comptime!((heads + 2 * kv_heads) * size) + kv_head * comptime!(share * size);
    let mut i = unit;
    while i < comptime!(share * size) {
        queries[i] = qkv[from + i];
        i += threads;
    }
    let mut sum = Array::<f32>::new(comptime!(share * own));
    let mut most = Array::<f32>::new(share);
    let mut weight = Array::<f32>::new(share);
    #[unroll]
    for h in 0..share {
        most[h] = f32::new(NEVER);
        weight[h] = 0.0f32;
        #[unroll]
        for n in 0..own {
            sum[comptime!(h * own + n)] = 0.0f32;
        }
    }
    let mut tile = first;
    while tile < last {
        // Nobody still reads the last tile's scores.
        sync_cube();
        let position = tile + unit;
        let seen = position < last;
        let position = min(position, last - 1usize);
        let block = plan[table + position / KV_BLOCK] as usize;
        let place = (block * KV_BLOCK + position % KV_BLOCK) * comptime!(kv_heads * size) + kv_head * size;
        places[unit] = place as u32;
        let mut score = Array::<f32>::new(share);
        #[unroll]
        for h in 0..share {
            score[h] = 0.0f32;
        }
        for d in 0..comptime!(size / 4) {
            let key = keys[place / 4usize + d];
            #[unroll]
            for h in 0..share {
                let mut value = score[h];
                #[unroll]
                for i in 0..4usize {
                    value += queries[comptime!(h * size + i) + d * 4usize] * f32::cast_from(key.extract(i));
                }
                score[h] = value;
            }
        }
        #[unroll]
        for h in 0..share {
            scores[comptime!(h * threads) + unit] = select(seen, score[h], f32::new(NEVER));
        }
        sync_cube();
        let mut i = unit;
        while i < comptime!(share * LOOKERS) {
            let mut value = f32::new(NEVER);
            for n in 0..comptime!(threads / LOOKERS) {
                value = max(value, scores[i * comptime!(threads / LOOKERS) + n]);
            }
            largest[i] = value;
            i += threads;
        }
        sync_cube();
        let mut shrunk = Array::<f32>::new(share);
        #[unroll]
        for h in 0..share {
            let mut now = most[h];
            for n in 0..LOOKERS {
                now = max(now, largest[comptime!(h * LOOKERS) + n]);
            }
            shrunk[h] = (most[h] - now).exp();
            most[h] = now;
            let own_weight = select(seen, (score[h] - now).exp(), 0.0f32);
            weight[h] = weight[h] * shrunk[h] + own_weight;
            scores[comptime!(h * threads) + unit] = own_weight;
            #[unroll]
            for n in 0..own {
                sum[comptime!(h * own + n)] *= shrunk[h];
            }
        }
        sync_cube();
        let count = min(last - tile, threads);
        for p in 0..count {
            let place = places[p] as usize;
            #[unroll]
            for n in 0..own {
                let d = unit + comptime!(n * threads);
                if d < size {
                    let value = f32::cast_from(values[place + d]);
                    #[unroll]
                    for h in 0..share {
                        sum[comptime!(h * own + n)] += scores[comptime!(h * threads) + p] * value;
                    }
                }
            }
        }
        tile += threads;
    }
    let mut shared = Shared::<[f32]>::new_slice(threads);
    #[unroll]
    for h in 0..share {
        let whole = sum_of_all(weight[h], &mut shared, POSITIONS);
        let head = kv_head * share + h;
        #[unroll]
        for n in 0..own {
            let d = unit + comptime!(n * threads);
            if d < size {
                let value = sum[comptime!(h * own + n)];
                if comptime!(several) {
                    let to = ((row * heads + head) * CUBE_COUNT_Z as usize + part) * comptime!(size + 2);
                    out[to + d] = value;
                } else {
                    out[(row * heads + head) * size + d] = value / whole;
                }
            }
        }
        if comptime!(several) {
            if unit == 0usize {
                let to = ((row * heads + head) * CUBE_COUNT_Z as usize + part) * comptime!(size + 2);
                out[to + size] = most[h];
                out[to + size + 1usize] = whole;
            }
        }
    }
}

/// Puts together what the parts of a row and head came to. Workgroups `(heads, rows)`.
#[cube(launch_unchecked)]
pub(crate) fn join(results: &[f32], out: &mut [f32], parts: u32, #[comptime] shape: HeadShape) {
    let threads = comptime!(POSITIONS as usize);
    let (size, heads) = (comptime!(shape.size), comptime!(shape.heads));
    let parts = parts as usize;
    let at = CUBE_POS_Y as usize * heads + CUBE_POS_X as usize;
    let from = at * parts * comptime!(size + 2);
    let mut most = f32::new(NEVER);
    for part in 0..parts {
        most = max(most, results[from + part * comptime!(size + 2) + size]);
    }
    let mut whole = 0.0f32;
    for part in 0..parts {
        let part = from + part * comptime!(size + 2) + size;
        whole += results[part + 1usize] * (results[part] - most).exp();
    }
    let mut d = UNIT_POS as usize;
    while d < size {
        let mut sum = 0.0f32;
        for part in 0..parts {
            let part = from + part * comptime!(size + 2);
            sum += results[part + d] * (results[part + size] - most).exp();
        }
        out[at * size + d] = sum / whole;
        d += threads;
    }
}
