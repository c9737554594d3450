//! Functions of single numbers, the same bits on every processor.

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
