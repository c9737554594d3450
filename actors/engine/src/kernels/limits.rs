//! What a machine can do at most, measured with the kernels' own instructions and threads.

use std::time::Instant;

use super::product::Kernels;
use super::simd::{LANES, Simd};

/// Numbers that one unit reads.
const PART: usize = 1 << 16;
/// Chains of products that do not wait for each other.
const CHAINS: usize = 8;
/// Products of one chain in one unit.
const LENGTH: usize = 1 << 16;

impl Kernels {
    /// Reads everything once, on all threads.
    pub fn sweep(&mut self, memory: &[u64]) {
        let sweep = self.table.sweep;
        self.pool.run(memory.len().div_ceil(PART), |unit| {
            let part = &memory[unit * PART..memory.len().min((unit + 1) * PART)];
            // SAFETY: the instruction set is there.
            std::hint::black_box(unsafe { sweep(part) });
        });
    }

    /// Multiplications of 8-bit numbers a second, all of them in registers.
    pub fn multiplication_rate(&mut self) -> f64 {
        let dots = self.table.dots;
        let units = self.pool.threads() * 16;
        let mut best = f64::MAX;
        for _ in 0..4 {
            let started = Instant::now();
            self.pool.run(units, |unit| {
                // SAFETY: the instruction set is there.
                std::hint::black_box(unsafe { dots(unit as i32) });
            });
            best = best.min(started.elapsed().as_secs_f64());
        }
        (units * CHAINS * LENGTH * LANES * 4) as f64 / best
    }
}

/// The sum of all numbers, so that they must be read.
#[inline(always)]
pub(crate) unsafe fn sweep<S: Simd>(part: &[u64]) -> f32 {
    // SAFETY: whole vectors within the slice.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        let values = part.as_ptr().cast::<f32>();
        for n in (0..part.len() * 2 / (4 * LANES)).map(|n| n * 4 * LANES) {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, S::load(values.add(n + v * LANES)));
            }
        }
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    }
}

/// `CHAINS · LENGTH` times 64 products.
#[inline(always)]
pub(crate) unsafe fn dots<S: Simd>(seed: i32) -> f32 {
    let bytes = [7u8; 4 * LANES];
    // SAFETY: the caller has made sure of the instructions.
    unsafe {
        let weights = S::load_bytes(bytes.as_ptr());
        let mut sums = [S::splat_i32(0); CHAINS];
        let mut x = seed & 0x0101_0101;
        for _ in 0..LENGTH {
            x = std::hint::black_box(x);
            for sum in &mut sums {
                *sum = S::dot(*sum, weights, x);
            }
        }
        let mut all = S::splat(0.0);
        for sum in sums {
            all = S::add(all, S::to_float(sum));
        }
        S::sum(all)
    }
}
