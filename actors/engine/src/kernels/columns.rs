//! Activations on their way into a product: normed, then as int8 with a scale for each block of 32, or as floats.
//!
//! Rows are grouped as the kernels take them, eight (or four) at once and the rest as 4, 2 and 1.

use super::pack::BLOCK;
use super::simd::{LANES, Simd};
use super::tile::Group;

/// Rows of activations as columns of a product. Reused from product to product.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    rows: usize,
    inputs: usize,
    most: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    scaled_sums: Vec<f32>,
    sums: Vec<i32>,
    floats: Vec<f32>,
}

/// What the weights will ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// int8 codes: weights are quantized.
    pub codes: bool,
    /// Floats: weights are floats.
    pub floats: bool,
}

/// How rows are normed on their way.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Norm<'a> {
    /// Not at all.
    None,
    /// Divided by the root of the mean square (plus epsilon), times a weight: Zhang and Sennrich 2019.
    Rms { weight: &'a [f32], epsilon: f32 },
}

impl Columns {
    /// Makes room for rows of `inputs`. `most`: columns that a kernel takes at once.
    pub fn reset(&mut self, rows: usize, inputs: usize, most: usize, needs: Needs) {
        (self.rows, self.inputs, self.most) = (rows, inputs, most);
        let room = |needed: bool, size: usize| if needed { size } else { 0 };
        let blocks = inputs.div_ceil(BLOCK);
        self.codes.resize(room(needs.codes, rows * inputs), 0);
        self.scales.resize(room(needs.codes, rows * blocks), 0.0);
        self.scaled_sums.resize(room(needs.codes, rows * blocks), 0.0);
        self.sums.resize(room(needs.codes, rows * blocks * 2), 0);
        self.floats.resize(room(needs.floats, rows * inputs), 0.0);
    }

    /// The first row and the width of the group that holds `row`.
    fn group_of(&self, row: usize) -> (usize, usize) {
        let whole = self.rows / self.most * self.most;
        if row < whole {
            return (row / self.most * self.most, self.most);
        }
        let (mut first, mut width) = (whole, self.most);
        loop {
            if width <= self.rows - first {
                if row < first + width {
                    return (first, width);
                }
                first += width;
            }
            width /= 2;
        }
    }

    /// All groups with their first rows.
    pub fn groups(&self) -> impl Iterator<Item = (usize, Group)> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            (next < self.rows).then(|| {
                let (first, width) = self.group_of(next);
                next = first + width;
                (first, self.group(first, width))
            })
        })
    }

    fn group(&self, first: usize, width: usize) -> Group {
        let blocks = self.inputs / BLOCK;
        let at = |size: usize, length: usize| (first * size).min(length);
        // SAFETY: each offset is at most the length of its vector.
        unsafe {
            Group {
                width,
                codes: self.codes.as_ptr().add(at(self.inputs, self.codes.len())),
                scales: self.scales.as_ptr().add(at(blocks, self.scales.len())),
                scaled_sums: self.scaled_sums.as_ptr().add(at(blocks, self.scaled_sums.len())),
                sums: self.sums.as_ptr().add(at(blocks * 2, self.sums.len())),
                floats: self.floats.as_ptr().add(at(self.inputs, self.floats.len())),
            }
        }
    }

    /// Pointers for [`fill_row`], which threads call for different rows.
    pub fn sink(&mut self) -> Sink<'_> {
        Sink {
            codes: self.codes.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            scaled_sums: self.scaled_sums.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            floats: self.floats.as_mut_ptr(),
            needs: Needs { codes: !self.codes.is_empty(), floats: !self.floats.is_empty() },
            columns: self,
        }
    }
}

/// Where rows go.
pub(crate) struct Sink<'a> {
    columns: &'a Columns,
    codes: *mut i8,
    scales: *mut f32,
    scaled_sums: *mut f32,
    sums: *mut i32,
    floats: *mut f32,
    needs: Needs,
}

// SAFETY: each row is written by one thread only, to places of its own.
unsafe impl Sync for Sink<'_> {}

/// Norms `x` and writes it as row `row`. `scratch` has room for one row.
#[inline(always)]
pub(crate) unsafe fn fill_row<S: Simd>(sink: &Sink<'_>, row: usize, x: &[f32], norm: Norm<'_>, scratch: &mut [f32]) {
    let x = match norm {
        Norm::None => x,
        Norm::Rms { weight, epsilon } => {
            // SAFETY: the caller has made sure of the instructions.
            unsafe { rms_norm::<S>(x, weight, epsilon, scratch) };
            &*scratch
        }
    };
    let inputs = sink.columns.inputs;
    let (first, width) = sink.columns.group_of(row);
    let column = row - first;
    if sink.needs.floats {
        for (n, value) in x.iter().enumerate() {
            // SAFETY: the group's part begins at `first · inputs` and has `width · inputs` places.
            unsafe { sink.floats.add(first * inputs + n * width + column).write(*value) };
        }
    }
    if sink.needs.codes {
        let blocks = inputs / BLOCK;
        for (block, x) in x.chunks_exact(BLOCK).enumerate() {
            // SAFETY: likewise, with `width` blocks (of 32 codes, one scale, two sums) for each of `blocks`.
            unsafe {
                let codes = sink.codes.add(first * inputs + (block * width + column) * BLOCK);
                let scale = quantize::<S>(x.as_ptr(), codes);
                let (low, high) = (S::sum_i8(codes), S::sum_i8(codes.add(LANES)));
                let place = first * blocks + block * width + column;
                sink.scales.add(place).write(scale);
                sink.scaled_sums.add(place).write(scale * (low + high) as f32);
                sink.sums.add(place * 2).write(low);
                sink.sums.add(place * 2 + 1).write(high);
            }
        }
    }
}

/// 32 numbers to codes within ±127; returns what one is worth.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: *const f32, codes: *mut i8) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let (a, b) = (S::load(x), S::load(x.add(LANES)));
        let zero = S::splat(0.0);
        let magnitude = S::max(S::max(a, S::sub(zero, a)), S::max(b, S::sub(zero, b)));
        let greatest = S::greatest(magnitude);
        // A row with a number that is none, or too large, gives numbers that are none; the sampler says so.
        if !greatest.is_finite() || greatest == 0.0 {
            S::store_i8(codes, zero);
            S::store_i8(codes.add(LANES), zero);
            return if greatest == 0.0 { 0.0 } else { f32::NAN };
        }
        let inverse = 127.0 / greatest;
        if inverse.is_infinite() {
            S::store_i8(codes, zero);
            S::store_i8(codes.add(LANES), zero);
            return 0.0;
        }
        let inverse = S::splat(inverse);
        S::store_i8(codes, S::mul(a, inverse));
        S::store_i8(codes.add(LANES), S::mul(b, inverse));
        greatest / 127.0
    }
}

/// `out = x / √(mean(x²) + ε) · weight`.
#[inline(always)]
pub(crate) unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    // SAFETY: whole vectors are loaded and stored within slices of the same length.
    unsafe {
        let whole = x.len() / LANES * LANES;
        let mut squares = S::splat(0.0);
        for n in (0..whole).step_by(LANES) {
            let x = S::load(x.as_ptr().add(n));
            squares = S::fma(x, x, squares);
        }
        let mut sum = S::sum(squares);
        for x in &x[whole..] {
            sum = x.mul_add(*x, sum);
        }
        let scale = 1.0 / (sum / x.len() as f32 + epsilon).sqrt();
        let scales = S::splat(scale);
        assert!(weight.len() >= x.len() && out.len() >= x.len());
        for n in (0..whole).step_by(LANES) {
            let normed = S::mul(S::mul(S::load(x.as_ptr().add(n)), scales), S::load(weight.as_ptr().add(n)));
            S::store(out.as_mut_ptr().add(n), normed);
        }
        for n in whole..x.len() {
            out[n] = x[n] * scale * weight[n];
        }
    }
}

/// `out = (x − mean(x)) / √(mean((x − mean(x))²) + ε) · weight + bias`: Ba, Kiros and Hinton 2016. All four slices have
/// one row's numbers.
#[inline(always)]
pub(crate) unsafe fn layer_norm<S: Simd>(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
    assert!(weight.len() >= x.len() && bias.len() >= x.len() && out.len() >= x.len());
    // SAFETY: whole vectors are loaded and stored within slices that are at least as long as `x`.
    unsafe {
        let whole = x.len() / LANES * LANES;
        let mut sums = S::splat(0.0);
        for n in (0..whole).step_by(LANES) {
            sums = S::add(sums, S::load(x.as_ptr().add(n)));
        }
        let mean = x[whole..].iter().fold(S::sum(sums), |sum, x| sum + x) / x.len() as f32;
        let means = S::splat(mean);
        let mut squares = S::splat(0.0);
        for n in (0..whole).step_by(LANES) {
            let centred = S::sub(S::load(x.as_ptr().add(n)), means);
            squares = S::fma(centred, centred, squares);
        }
        let sum = x[whole..].iter().fold(S::sum(squares), |sum, x| (x - mean).mul_add(x - mean, sum));
        let scale = 1.0 / (sum / x.len() as f32 + epsilon).sqrt();
        let scales = S::splat(scale);
        for n in (0..whole).step_by(LANES) {
            let centred = S::mul(S::sub(S::load(x.as_ptr().add(n)), means), scales);
            let normed = S::fma(centred, S::load(weight.as_ptr().add(n)), S::load(bias.as_ptr().add(n)));
            S::store(out.as_mut_ptr().add(n), normed);
        }
        for n in whole..x.len() {
            out[n] = ((x[n] - mean) * scale).mul_add(weight[n], bias[n]);
        }
    }
}
