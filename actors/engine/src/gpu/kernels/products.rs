//! Products with packed weights. For a few rows of activations every weight is read once, by one thread; for many, a
//! tile of weights is unpacked into the memory that a workgroup shares, and met with a tile of activations.

use cubecl::prelude::*;

use super::unpack::unpack;
use crate::gpu::forms::Form;

/// More rows than this are many.
pub(crate) const FEW: usize = 16;
/// Sums of one workgroup of [`product`] at most: every thread keeps that many numbers.
const MOST_SUMS: u32 = 32;
/// Threads that add up one sum at most.
const MOST_PARTS: u32 = 16;
/// Outputs and rows of a tile, and inputs that it takes at once.
pub(crate) const TILE: usize = 64;
const DEEP: usize = 16;
/// Outputs and rows of one thread, and threads to a side.
const OWN: usize = 4;
const SIDE: usize = TILE / OWN;
pub(crate) const TILE_THREADS: u32 = (SIDE * SIDE) as u32;

/// How a workgroup of [`product`] is cut. The order of sums depends on it, so it is a part of the numerics class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Cut {
    pub threads: u32,
    /// Outputs that it computes, each for every column.
    pub outputs: u32,
}

impl Cut {
    /// Where nothing was measured.
    pub const fn usual(columns: usize) -> Self {
        Self { threads: 64, outputs: if columns <= 8 { 4 } else { 2 } }
    }

    /// Those that a card with so much memory of a workgroup and so many threads of one can run for so many columns.
    pub fn all(columns: usize, shared: usize, threads: u32) -> impl Iterator<Item = Self> {
        let cuts =
            [32, 64, 128, 256].into_iter().flat_map(|threads| [1, 2, 4, 8].map(|outputs| Self { threads, outputs }));
        cuts.filter(move |cut| {
            let sums = cut.outputs * columns as u32;
            sums <= MOST_SUMS.min(cut.threads) && cut.shared_bytes(columns) <= shared && cut.threads <= threads
        })
    }

    /// Bytes that a workgroup shares.
    const fn shared_bytes(self, columns: usize) -> usize {
        let sums = self.outputs as usize * columns;
        4 * (sums * (self.threads as usize + 1) + sums * parts(self.threads as usize, sums))
    }
}

/// Threads that add up one of so many sums.
const fn parts(threads: usize, sums: usize) -> usize {
    if threads / sums < MOST_PARTS as usize { threads / sums } else { MOST_PARTS as usize }
}

type Four = Vector<f32, Const<4>>;

/// What is done with a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ending {
    pub bias: bool,
    /// Adds to what is there.
    pub add: bool,
}

#[cube]
fn finish(out: &mut [f32], bias: &[f32], at: usize, output: usize, sum: f32, #[comptime] ending: Ending) {
    let mut value = sum;
    if comptime!(ending.bias) {
        value += bias[output];
    }
    if comptime!(ending.add) {
        value += out[at];
    }
    out[at] = value;
}

/// `out[column, first ..] = weights · x[column] (+ bias)` for few columns. `width`: of a row of `out`; `first`: the
/// first output's place in it, and in the bias.
#[cube(launch_unchecked)]
pub(crate) fn product(
    codes: &[u32],
    scales: &[u32],
    bias: &[f32],
    x: &[Four],
    out: &mut [f32],
    outputs: u32,
    chunks: u32,
    width: u32,
    first: u32,
    #[comptime] form: Form,
    #[comptime] columns: usize,
    #[comptime] ending: Ending,
    #[comptime] cut: Cut,
) {
    let rows = comptime!(cut.outputs as usize);
    let sums = comptime!(rows * columns);
    let threads = comptime!(cut.threads as usize);
    let (chunks, outputs) = (chunks as usize, outputs as usize);
    let unit = UNIT_POS as usize;
    let from = CUBE_POS * rows;
    let mut sum = Array::<f32>::new(sums);
    #[unroll]
    for n in 0..sums {
        sum[n] = 0.0f32;
    }
    let mut weights = Array::<f32>::new(comptime!(rows * 8));
    let mut chunk = unit;
    while chunk < chunks {
        #[unroll]
        for r in 0..rows {
            // Behind the last output stands nothing: the last is taken again, and not written.
            let row = min(from + r, outputs - 1usize);
            unpack(codes, scales, row, chunk, chunks, &mut weights, comptime!(r * 8), form);
        }
        #[unroll]
        for c in 0..columns {
            let at = (c * chunks + chunk) * 2usize;
            let (low, high) = (x[at], x[at + 1usize]);
            #[unroll]
            for r in 0..rows {
                let mut value = sum[comptime!(r * columns + c)];
                #[unroll]
                for i in 0..4usize {
                    value += weights[comptime!(r * 8 + i)] * low.extract(i);
                }
                #[unroll]
                for i in 0..4usize {
                    value += weights[comptime!(r * 8 + 4 + i)] * high.extract(i);
                }
                sum[comptime!(r * columns + c)] = value;
            }
        }
        chunk += threads;
    }
    // The threads' sums, first some of them for each of several threads, then those.
    let parts = comptime!(parts(threads, sums));
    let each = comptime!(threads / parts);
    let mut all = Shared::<[f32]>::new_slice(comptime!(sums * (threads + 1)));
    let mut some = Shared::<[f32]>::new_slice(comptime!(sums * parts));
    #[unroll]
    for n in 0..sums {
        all[comptime!(n * (threads + 1)) + unit] = sum[n];
    }
    sync_cube();
    if unit < comptime!(sums * parts) {
        let (n, part) = (unit / parts, unit % parts);
        let mut value = 0.0f32;
        for i in 0..each {
            value += all[n * comptime!(threads + 1) + part * each + i];
        }
        some[unit] = value;
    }
    sync_cube();
    if unit < sums {
        let mut value = 0.0f32;
        for i in 0..parts {
            value += some[unit * parts + i];
        }
        let output = from + unit / columns;
        if output < outputs {
            let at = (unit % columns) * width as usize + first as usize + output;
            finish(out, bias, at, first as usize + output, value, ending);
        }
    }
}

/// The same for many rows, in tiles: workgroups `(outputs, rows)`.
#[cube(launch_unchecked)]
pub(crate) fn tiled_product(
    codes: &[u32],
    scales: &[u32],
    bias: &[f32],
    x: &[f32],
    out: &mut [f32],
    outputs: u32,
    chunks: u32,
    rows: u32,
    width: u32,
    first: u32,
    #[comptime] form: Form,
    #[comptime] ending: Ending,
) {
    let (chunks, outputs, rows) = (chunks as usize, outputs as usize, rows as usize);
    let inputs = chunks * 8usize;
    let unit = UNIT_POS as usize;
    let (left, top) = (CUBE_POS_X as usize * TILE, CUBE_POS_Y as usize * TILE);
    let (across, down) = (unit % SIDE, unit / SIDE);
    let mut w = Shared::<[f32]>::new_slice(comptime!(DEEP * TILE));
    let mut a = Shared::<[f32]>::new_slice(comptime!(DEEP * TILE));
    let mut sum = Array::<f32>::new(comptime!(OWN * OWN));
    #[unroll]
    for n in 0..comptime!(OWN * OWN) {
        sum[n] = 0.0f32;
    }
    let mut weights = Array::<f32>::new(8usize);
    let (line, part) = (unit % TILE, unit / TILE);
    let mut deep = 0usize;
    while deep < inputs {
        // Half of the threads unpack a chunk each; behind the last input weights count as zero.
        if part < 2usize {
            let chunk = deep / 8usize + part;
            let row = min(left + line, outputs - 1usize);
            unpack(codes, scales, row, min(chunk, chunks - 1usize), chunks, &mut weights, 0usize, form);
            #[unroll]
            for i in 0..8usize {
                w[(part * 8usize + i) * TILE + line] = select(chunk < chunks, weights[i], 0.0f32);
            }
        }
        let row = min(top + line, rows - 1usize);
        #[unroll]
        for i in 0..4usize {
            let input = deep + part * 4usize + i;
            a[(part * 4usize + i) * TILE + line] =
                select(input < inputs, x[row * inputs + min(input, inputs - 1usize)], 0.0f32);
        }
        sync_cube();
        for k in 0..DEEP {
            let mut own = Array::<f32>::new(OWN);
            #[unroll]
            for i in 0..OWN {
                own[i] = w[k * TILE + across + comptime!(i * SIDE)];
            }
            #[unroll]
            for j in 0..OWN {
                let value = a[k * TILE + down + comptime!(j * SIDE)];
                #[unroll]
                for i in 0..OWN {
                    sum[comptime!(j * OWN + i)] += own[i] * value;
                }
            }
        }
        sync_cube();
        deep += DEEP;
    }
    #[unroll]
    for j in 0..OWN {
        #[unroll]
        for i in 0..OWN {
            let (output, row) = (left + across + comptime!(i * SIDE), top + down + comptime!(j * SIDE));
            if output < outputs && row < rows {
                let at = row * width as usize + first as usize + output;
                finish(out, bias, at, first as usize + output, sum[comptime!(j * OWN + i)], ending);
            }
        }
    }
}
