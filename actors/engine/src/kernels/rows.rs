//! What encoders do with rows between products: norms with mean and bias, and GELU, shared among threads.

use super::float::gelu_erf;
use super::product::{Kernels, Shared};
use super::simd::{LANES, Simd};

/// Numbers that one unit takes, about: less is not worth a thread's while.
const UNIT: usize = 8 << 10;

impl Kernels {
    /// Norms each row of `x` `[rows, width]` in place: `(x − mean) / √(variance + ε) · weight + bias`, with `weight` and
    /// `bias` of `width` numbers.
    pub fn layer_norm(&mut self, x: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
        let width = weight.len();
        assert!(width > 0 && bias.len() == width && x.len().is_multiple_of(width));
        let layer_norm = self.table.layer_norm;
        self.in_parts(x, (UNIT / width).max(1) * width, |part| {
            let mut normed = vec![0.0; width];
            for row in part.chunks_exact_mut(width) {
                // SAFETY: the instruction set is there.
                unsafe { layer_norm(row, weight, bias, epsilon, &mut normed) };
                row.copy_from_slice(&normed);
            }
        });
    }

    /// `½x·(1 + erf(x/√2))` of each number, in place.
    pub fn gelu(&mut self, x: &mut [f32]) {
        let gelu = self.table.gelu;
        // SAFETY: the instruction set is there.
        self.in_parts(x, UNIT, |part| unsafe { gelu(part) });
    }

    /// Works on parts of `size` numbers (the last may have fewer) on all threads.
    fn in_parts(&mut self, x: &mut [f32], size: usize, work: impl Fn(&mut [f32]) + Sync) {
        let (length, start) = (x.len(), Shared(x.as_mut_ptr()));
        self.pool.run(length.div_ceil(size), |unit| {
            let from = unit * size;
            // SAFETY: within the slice, and each unit has a part of its own.
            work(unsafe { std::slice::from_raw_parts_mut(start.get().add(from), size.min(length - from)) });
        });
    }
}

/// As [`Kernels::gelu`].
#[inline(always)]
pub(crate) unsafe fn gelu<S: Simd>(x: &mut [f32]) {
    let mut parts = x.chunks_exact_mut(LANES);
    // SAFETY: each part has sixteen places, as has `lanes`; the caller has made sure of the instructions.
    unsafe {
        for part in parts.by_ref() {
            S::store(part.as_mut_ptr(), gelu_erf::<S>(S::load(part.as_ptr())));
        }
        let rest = parts.into_remainder();
        let mut lanes = [0.0f32; LANES];
        lanes[..rest.len()].copy_from_slice(rest);
        S::store(lanes.as_mut_ptr(), gelu_erf::<S>(S::load(lanes.as_ptr())));
        rest.copy_from_slice(&lanes[..rest.len()]);
    }
}

#[cfg(test)]
mod tests;
