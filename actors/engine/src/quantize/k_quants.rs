//! Encoders of the formats with blocks of 256 weights. The search for scales is that of ggml's reference encoders
//! (`make_qkx2_quants`, `make_qx_quants`, `quantize_row_q{4,5,6}_K_ref` in `ggml-quants.c`), step by step and sum by
//! sum, so that the bytes are the same where the compiler contracts no products.

use half::f16;

use super::encode::put_half;

/// A group whose weights are all below this counts as zero.
const ZERO: f32 = 1e-15;

/// Rounds to the nearest whole number, halves to even, by adding 1.5 · 2²³ so that the fraction falls off. Faster
/// than `round_ties_even` where the processor's baseline has no instruction for it.
fn nearest(value: f32) -> i32 {
    const LIMIT: f32 = 4_194_303.0;
    let bits = (value.clamp(-LIMIT, LIMIT) + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// What `f16` makes of a number.
fn as_half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// Q4_K: 8 groups of 32, values 0 to 15.
pub(super) fn q4k(x: &[f32], out: &mut [u8]) {
    let values = groups::<15>(x, out, -1.0, 20);
    put_low_bits(&values, &mut out[16..]);
}

/// Q5_K: 8 groups of 32, values 0 to 31, their fifth bits apart.
pub(super) fn q5k(x: &[f32], out: &mut [u8]) {
    let values = groups::<31>(x, out, -0.5, 15);
    let (high, low) = out[16..].split_at_mut(32);
    high.fill(0);
    for (n, value) in values.iter().enumerate() {
        high[n % 32] |= (value >> 4) << (n / 32);
    }
    put_low_bits(&values, low);
}

/// Two groups share 32 bytes: one in the lower, one in the upper halves.
fn put_low_bits(values: &[u8; 256], out: &mut [u8]) {
    for (pair, out) in values.chunks_exact(64).zip(out.chunks_exact_mut(32)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = pair[i] & 15 | pair[i + 32] << 4;
        }
    }
}

/// Scales and minima of the 8 groups into the block's first 16 bytes; the values of all weights back.
fn groups<const MOST: u8>(x: &[f32], out: &mut [u8], first: f32, steps: u32) -> [u8; 256] {
    let mut values = [0u8; 256];
    let (mut scales, mut minima) = ([0.0f32; 8], [0.0f32; 8]);
    for (group, (x, values)) in x.chunks_exact(32).zip(values.chunks_exact_mut(32)).enumerate() {
        (scales[group], minima[group]) = scale_and_minimum::<MOST>(x, values, first, steps);
    }
    let greatest = |of: &[f32; 8]| of.iter().fold(0.0f32, |greatest, v| if *v > greatest { *v } else { greatest });
    let (max_scale, max_minimum) = (greatest(&scales), greatest(&minima));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let six_bits = |inverse: f32, value: f32| (nearest(inverse * value) as u8).min(63);
    put_half(out, 0, max_scale / 63.0);
    put_half(out, 2, max_minimum / 63.0);
    let (scale, minimum) = (as_half(max_scale / 63.0), as_half(max_minimum / 63.0));
    let packed = &mut out[4..16];
    packed.fill(0);
    for group in 0..8 {
        let s = six_bits(inverse(max_scale), scales[group]);
        let m = six_bits(inverse(max_minimum), minima[group]);
        if group < 4 {
            packed[group] = s;
            packed[group + 4] = m;
        } else {
            packed[group + 4] = s & 15 | m << 4;
            packed[group - 4] |= s >> 4 << 6;
            packed[group] |= m >> 4 << 6;
        }
        // The values again, for the scale that the group really gets.
        let (scale, minimum) = (scale * f32::from(s), minimum * f32::from(m));
        if scale == 0.0 {
            continue;
        }
        for (value, x) in values[group * 32..][..32].iter_mut().zip(&x[group * 32..]) {
            *value = nearest((x + minimum) / scale).clamp(0, i32::from(MOST)) as u8;
        }
    }
    values
}

/// The scale and minimum of one group that give the least weighted squared error: tried are the inverse scales
/// (`first` + 0.1 · n + `MOST`) / range for n up to `steps`, each with the least-squares fit for its values
/// (`make_qkx2_quants`). Returns (scale, −minimum).
fn scale_and_minimum<const MOST: u8>(x: &[f32], values: &mut [u8], first: f32, steps: u32) -> (f32, f32) {
    let most = i32::from(MOST);
    let square = x.iter().fold(0.0f32, |sum, x| sum + x * x);
    let average = (square / 32.0).sqrt();
    let mut weights = [0.0f32; 32];
    weights.iter_mut().zip(x).for_each(|(weight, x)| *weight = average + x.abs());

    let (mut least, mut greatest) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (x, w) in x.iter().zip(&weights).skip(1) {
        least = if *x < least { *x } else { least };
        greatest = if *x > greatest { *x } else { greatest };
        sum_w += w;
        sum_x += w * x;
    }
    if least > 0.0 {
        least = 0.0;
    }
    if greatest == least {
        values.fill(0);
        return (0.0, -least);
    }
    let mut inverse = f32::from(MOST) / (greatest - least);
    let mut scale = 1.0 / inverse;
    let mut best = 0.0f32;
    for ((value, x), w) in values.iter_mut().zip(x).zip(&weights) {
        let l = nearest(inverse * (x - least)).clamp(0, most);
        *value = l as u8;
        let off = scale * l as f32 + least - x;
        best += w * (off * off);
    }
    let mut tried = [0u8; 32];
    for step in 0..=steps {
        // As ggml does: the range is that from the best minimum so far.
        inverse = (first + 0.1 * step as f32 + f32::from(MOST)) / (greatest - least);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((tried, x), w) in tried.iter_mut().zip(x).zip(&weights) {
            let l = nearest(inverse * (x - least)).clamp(0, most);
            *tried = l as u8;
            let l = l as f32;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if this_least > 0.0 {
            this_least = 0.0;
            this_scale = sum_xl / sum_l2;
        }
        let error = tried.iter().zip(x).zip(&weights).fold(0.0f32, |sum, ((l, x), w)| {
            let off = this_scale * f32::from(*l) + this_least - x;
            sum + w * (off * off)
        });
        if error < best {
            values.copy_from_slice(&tried);
            (best, scale, least) = (error, this_scale, this_least);
        }
    }
    (scale, -least)
}

/// Q6_K: 16 groups of 16, values −32 to 31, 8-bit scales.
pub(super) fn q6k(x: &[f32], out: &mut [u8]) {
    let mut values = [0u8; 256];
    let mut scales = [0.0f32; 16];
    let (mut greatest, mut largest) = (0.0f32, 0.0f32);
    for (group, (x, values)) in x.chunks_exact(16).zip(values.chunks_exact_mut(16)).enumerate() {
        let scale = symmetric_scale(x, values);
        scales[group] = scale;
        if scale.abs() > largest {
            (largest, greatest) = (scale.abs(), scale);
        }
    }
    out.fill(0);
    if largest < ZERO {
        return;
    }
    let inverse = -128.0 / greatest;
    put_half(out, 208, 1.0 / inverse);
    let block_scale = as_half(1.0 / inverse);
    for group in 0..16 {
        let eight_bits = nearest(inverse * scales[group]).min(127) as i8;
        out[192 + group] = eight_bits as u8;
        let scale = block_scale * f32::from(eight_bits);
        if scale == 0.0 {
            continue;
        }
        for (value, x) in values[group * 16..][..16].iter_mut().zip(&x[group * 16..]) {
            *value = (nearest(x / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    for (n, value) in values.iter().enumerate() {
        let (half, quarter, i) = (n / 128, n % 128 / 32, n % 32);
        out[half * 64 + quarter % 2 * 32 + i] |= (value & 15) << (quarter / 2 * 4);
        out[128 + half * 32 + i] |= (value >> 4) << (quarter * 2);
    }
}

/// The scale of 16 weights that gives the least squared error, each weighted by its own square: tried are the
/// inverse scales −(32 + 0.1 · n) / largest for n from −9 to 9 (`make_qx_quants`, type 1).
fn symmetric_scale(x: &[f32], values: &mut [u8]) -> f32 {
    let (mut magnitude, mut largest) = (0.0f32, 0.0f32);
    for x in x {
        if x.abs() > magnitude {
            (magnitude, largest) = (x.abs(), *x);
        }
    }
    if magnitude < ZERO {
        values.fill(0);
        return 0.0;
    }
    let level = |inverse: f32, x: f32| nearest(inverse * x).clamp(-32, 31);
    let fit = |inverse: f32| {
        x.iter().fold((0.0f32, 0.0f32), |(sum_lx, sum_l2), x| {
            let (l, w) = (level(inverse, *x) as f32, x * x);
            (sum_lx + w * x * l, sum_l2 + w * l * l)
        })
    };
    let put = |inverse: f32, values: &mut [u8]| {
        values.iter_mut().zip(x).for_each(|(value, x)| *value = (level(inverse, *x) + 32) as u8);
    };
    let inverse = -32.0 / largest;
    put(inverse, values);
    let (sum_lx, sum_l2) = fit(inverse);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(32.0 + 0.1 * step as f32) / largest;
        let (sum_lx, sum_l2) = fit(inverse);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            put(inverse, values);
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}
