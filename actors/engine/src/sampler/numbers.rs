//! The numbers of the sampler, made of +, −, ×, ÷ and bit shifts alone. These round in one way only, so every
//! machine draws the same tokens from the same logits; the `exp` and `ln` of system libraries differ in their last
//! bits between systems and versions. f32 is enough for `exp`: an error of 10⁻⁷ moves no probability by more than
//! that, and the compiler computes several at once.

/// The weight of the likeliest token. A token's weight is its probability relative to that one, as a whole number:
/// sums of whole numbers are exact in whatever order they are taken, so a draw has no rounding to make up for. What
/// is less than a billionth as likely weighs nothing.
pub const ONE: u32 = 1 << 30;

/// e to the power of `x`, for `x` ≤ 0. Whatever is below −87 (or is no number) counts as −87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 × 2²³: what is added to this has no fraction left, and is a whole number in its low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few enough bits that its products are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x > -87.0 { x } else { -87.0 };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits() - 127) << 23);
    let n = rounded - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    // Cephes' polynomial for |r| ≤ ln 2 / 2.
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    (p * (r * r) + r + 1.0) * power
}

/// The natural logarithm, for finite `x` ≥ 1.
pub fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh s; |s| < 0.172, so the terms left out are below 10⁻¹⁷.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..11).rev().fold(0.0, |sum, n| sum * (s * s) + 1.0 / f64::from(2 * n + 1));
    f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * s * series
}

/// 64 random bits from (seed, position): two rounds of SplitMix64's finalizer, which spreads every bit.
pub fn random(seed: u64, position: u32) -> u64 {
    mix(mix(seed) ^ (u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// One of 0..`below` for 64 random bits.
pub fn below(random: u64, below: u64) -> u64 {
    ((u128::from(random) * u128::from(below)) >> 64) as u64
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_ln_are_those_of_mathematics() {
        assert_eq!(exp(0.0), 1.0);
        for n in 0..87_000 {
            let x = -(n as f32) / 1_000.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "{x}");
        }
        for x in [f32::NEG_INFINITY, f32::NAN, -1e30, -88.0] {
            assert!(exp(x) < 1e-37 && exp(x) > 0.0, "{x}");
        }
        for n in 0..100_000 {
            let x = 1.0 + f64::from(n) * 2.7;
            assert!((ln(x) - x.ln()).abs() < 1e-14 * x.ln().max(1.0), "{x}");
        }
    }

    /// These bits are the same on every machine; a change of them is a change of every seeded answer.
    #[test]
    fn the_numbers_are_fixed() {
        let hash = |sum: u64, bits: u64| mix(sum ^ bits);
        let exps = (0..8_700).map(|n| u64::from(exp(-(n as f32) * 0.01).to_bits())).fold(0, hash);
        let lns = (1..10_000).map(|n| ln(f64::from(n)).to_bits()).fold(0, hash);
        let randoms = (0..1_000).map(|n| random(42, n)).fold(0, hash);
        assert_eq!((exps, lns, randoms), (3314289250588828073, 4391807255999260902, 7710792930003530762));
    }

    #[test]
    fn random_numbers_stay_below() {
        assert_eq!((below(u64::MAX, 7), below(0, 7), below(1 << 63, 7)), (6, 0, 3));
    }
}
