//! Work on single rows: norms, and the activation between two products.

use cubecl::prelude::*;

use crate::kernels::Activation;

/// Threads for a row.
pub(crate) const ROW_THREADS: u32 = 128;

/// The sum of every thread's `value`, for each of them. All threads must come here.
#[cube]
pub(super) fn sum_of_all(value: f32, shared: &mut Shared<[f32]>, #[comptime] threads: u32) -> f32 {
    let unit = UNIT_POS as usize;
    // Whoever still reads the last sum goes first.
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut half = comptime!(threads as usize / 2).runtime();
    while half > 0usize {
        if unit < half {
            let other = shared[unit + half];
            shared[unit] += other;
        }
        sync_cube();
        half /= 2usize;
    }
    shared[0usize]
}

/// What becomes of a normed row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum NormInto {
    /// It is written.
    Place,
    /// It is added to what is there.
    Sum,
}

/// `x / √(mean(x²) + ε) · weight` of row `chosen[n]` of `x` into row `n` of `out`; a workgroup for each.
#[cube(launch_unchecked)]
pub(crate) fn norm(
    x: &[f32],
    weight: &[f32],
    chosen: &[u32],
    out: &mut [f32],
    width: u32,
    epsilon: f32,
    #[comptime] choose: bool,
    #[comptime] into: NormInto,
) {
    let threads = comptime!(ROW_THREADS as usize);
    let width = width as usize;
    let row = CUBE_POS_X as usize;
    let mut from = row;
    if comptime!(choose) {
        from = chosen[row] as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(threads);
    let mut squares = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = x[from * width + i];
        squares += value * value;
        i += threads;
    }
    let mean = sum_of_all(squares, &mut shared, ROW_THREADS) / f32::cast_from(width as u32);
    let factor = 1.0f32 / (mean + epsilon).sqrt();
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = x[from * width + i] * factor * weight[i];
        if comptime!(into == NormInto::Sum) {
            out[row * width + i] += value;
        } else {
            out[row * width + i] = value;
        }
        i += threads;
    }
}

/// Of rows `[gate, up]`, each `width` long, `activation(gate) · up`.
#[cube(launch_unchecked)]
pub(crate) fn activate(both: &[f32], out: &mut [f32], width: u32, count: u32, #[comptime] activation: Activation) {
    if ABSOLUTE_POS < count as usize {
        let width = width as usize;
        let (row, i) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let gate = both[row * 2usize * width + i];
        let up = both[row * 2usize * width + width + i];
        let active = if comptime!(activation == Activation::Silu) {
            gate / (1.0f32 + (-gate).exp())
        } else {
            // tanh(y) = 1 - 2 / (e^2y + 1), which no overflow turns into NaN.
            let inner = 0.797_884_6f32 * (gate + 0.044_715f32 * gate * gate * gate);
            let tanh = 1.0f32 - 2.0f32 / ((2.0f32 * inner).exp() + 1.0f32);
            0.5f32 * gate * (1.0f32 + tanh)
        };
        out[ABSOLUTE_POS] = active * up;
    }
}

/// Reads and writes every number once: what a device's memory can do.
#[cube(launch_unchecked)]
pub(crate) fn copy(from: &[Vector<f32, Const<4>>], to: &mut [Vector<f32, Const<4>>], count: u32) {
    if ABSOLUTE_POS < count as usize {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}
