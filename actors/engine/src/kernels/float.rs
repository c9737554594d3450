//! Functions of single numbers, the same bits on every processor.

#![allow(clippy::excessive_precision)] // coefficients with the digits of their sources

use super::simd::{ROUND, Simd};

/// Smaller arguments give 0.
const LEAST: f32 = -87.0;
const MOST: f32 = 88.0;

/// eˣ with an error of some 10⁻⁷ of the result: 2ⁿ times a polynomial (Cephes' `expf`). Below −87 it is 0; above 88
/// it stays at e⁸⁸.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: no memory is touched; the caller has made sure of the instructions.
    unsafe {
        let bounded = S::min(S::max(x, S::splat(LEAST)), S::splat(MOST));
        let shifted = S::fma(bounded, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND));
        let n = S::sub(shifted, S::splat(ROUND));
        let r = S::fma(n, S::splat(-0.693_359_375), bounded);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1] {
            p = S::fma(p, r, S::splat(coefficient));
        }
        let p = S::add(S::fma(S::mul(r, r), p, r), S::splat(1.0));
        S::keep_from(x, S::splat(LEAST), S::mul(p, S::power_of_two(shifted)))
    }
}

/// x · σ(x).
#[inline(always)]
pub(crate) unsafe fn silu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as above.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), x));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// The approximation of GELU by tanh: ½x·(1 + tanh(√(2/π)·(x + 0.044715x³))) = x · σ(2√(2/π)·(x + 0.044715x³)).
#[inline(always)]
pub(crate) unsafe fn gelu_tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as above.
    unsafe {
        let inner = S::fma(S::mul(S::mul(x, x), S::splat(0.044_715)), x, x);
        let e = exp::<S>(S::mul(inner, S::splat(-1.595_769_1)));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// Coefficients of Abramowitz and Stegun's formula 7.1.26, the highest first.
const ERFC: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];

/// GELU with the error function (Hendrycks and Gimpel 2016), ½x·(1 + erf(x/√2)), with an error below 10⁻⁶.
///
/// For y = |x|/√2, erfc(y) is e^(−y²) times a polynomial of 1/(1 + 0.3275911·y) (Abramowitz and Stegun 7.1.26, error
/// 1.5·10⁻⁷). With it GELU is max(x, 0) − ½|x|·erfc(y), where nothing cancels for negative x.
#[inline(always)]
pub(crate) unsafe fn gelu_erf<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as above.
    unsafe {
        let size = S::max(x, S::sub(S::splat(0.0), x));
        let y = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::div(S::splat(1.0), S::fma(y, S::splat(0.327_591_1), S::splat(1.0)));
        let mut p = S::splat(0.0);
        for coefficient in ERFC {
            p = S::fma(p, t, S::splat(coefficient));
        }
        let e = exp::<S>(S::sub(S::splat(0.0), S::mul(y, y)));
        let outside = S::mul(S::mul(p, t), e);
        S::sub(S::max(x, S::splat(0.0)), S::mul(S::mul(size, S::splat(0.5)), outside))
    }
}
