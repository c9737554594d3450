//! AVX2 with FMA and F16C: two registers hold all lanes.

use std::arch::x86_64::*;

use super::simd::Simd;

/// Needs `avx2`, `fma`, `f16c`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

/// Lower and upper eight lanes.
#[derive(Clone, Copy)]
pub(crate) struct Pair<T>(T, T);

impl<T: Copy> Pair<T> {
    #[inline(always)]
    fn map<U>(self, map: impl Fn(T) -> U) -> Pair<U> {
        Pair(map(self.0), map(self.1))
    }

    #[inline(always)]
    fn with<U>(self, other: Self, map: impl Fn(T, T) -> U) -> Pair<U> {
        Pair(map(self.0, other.0), map(self.1, other.1))
    }
}

// SAFETY (of each function): the trait's caller has made sure of the instructions; pointers as the trait says.
impl Simd for Avx2 {
    type F = Pair<__m256>;
    type I = Pair<__m256i>;
    type B = Pair<__m256i>;

    const COLUMNS: usize = 4;
    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { Pair(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        let half = |from: *const u16| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) };
        Pair(half(from), half(unsafe { from.add(8) }))
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: Self::F) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(value.0));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(value.1));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        let half = |from: *const u16| unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        };
        Pair(half(from), half(unsafe { from.add(8) }))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        let half = |from: *const i8| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) };
        Pair(half(from), half(unsafe { from.add(8) }))
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F {
        let half = |from: *const u8| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) };
        Pair(half(from), half(unsafe { from.add(8) }))
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::F) {
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(value.0), _mm256_cvtps_epi32(value.1));
            // Lanes stand as 0-3, 8-11, 4-7, 12-15.
            let words = _mm256_permute4x64_epi64::<0b1101_1000>(words);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), _mm_packs_epi16(low, high));
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_add_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_sub_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_mul_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_div_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_max_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { _mm256_min_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn keep_from(x: Self::F, bound: Self::F, value: Self::F) -> Self::F {
        let mask = x.with(bound, |x, bound| unsafe { _mm256_cmp_ps::<_CMP_GE_OQ>(x, bound) });
        value.with(mask, |value, mask| unsafe { _mm256_and_ps(value, mask) })
    }
    #[inline(always)]
    unsafe fn power_of_two(value: Self::F) -> Self::F {
        value.map(|value| unsafe {
            let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(value));
            _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    unsafe fn sum(value: Self::F) -> f32 {
        unsafe { sum_of_eight(_mm256_add_ps(value.0, value.1)) }
    }
    #[inline(always)]
    unsafe fn sum_i8(from: *const i8) -> i32 {
        unsafe { sum_of_bytes(from) }
    }
    #[inline(always)]
    unsafe fn greatest(value: Self::F) -> f32 {
        unsafe { greatest_of_eight(_mm256_max_ps(value.0, value.1)) }
    }
    #[inline(always)]
    unsafe fn splat_i32(value: i32) -> Self::I {
        unsafe { Pair(_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        value.map(|value| unsafe { _mm256_cvtepi32_ps(value) })
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe { Pair(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn low_half(bytes: Self::B) -> Self::B {
        bytes.map(|bytes| unsafe { _mm256_and_si256(bytes, _mm256_set1_epi8(15)) })
    }
    #[inline(always)]
    unsafe fn high_half(bytes: Self::B) -> Self::B {
        bytes.map(|bytes| unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(15)) })
    }
    #[inline(always)]
    unsafe fn with_fifth<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        bytes.with(bits, |bytes, bits| unsafe { merge::<N>(bytes, bits, 0x10) })
    }
    #[inline(always)]
    unsafe fn with_upper_two<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        bytes.with(bits, |bytes, bits| unsafe { merge::<N>(bytes, bits, 0x30) })
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        // Two products of at most 63 · 127 do not overflow 16 bits.
        let one = |sum, weights| unsafe {
            let pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(x));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        Pair(one(sum.0, weights.0), one(sum.1, weights.1))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        // The sign moves from the weight to `x`; two products of at most 128 · 127 do not overflow 16 bits.
        let one = |sum, weights| unsafe {
            let x = _mm256_sign_epi8(_mm256_set1_epi32(x), weights);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), x);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        Pair(one(sum.0, weights.0), one(sum.1, weights.1))
    }
}

/// Bits from `N` on, moved to bit 4 on, under `mask`.
#[inline(always)]
unsafe fn merge<const N: u32>(bytes: __m256i, bits: __m256i, mask: i8) -> __m256i {
    // SAFETY: as the caller's.
    unsafe {
        let moved = match N {
            0 => _mm256_slli_epi16::<4>(bits),
            1 => _mm256_slli_epi16::<3>(bits),
            2 => _mm256_slli_epi16::<2>(bits),
            3 => _mm256_slli_epi16::<1>(bits),
            4 => bits,
            5 => _mm256_srli_epi16::<1>(bits),
            6 => _mm256_srli_epi16::<2>(bits),
            _ => _mm256_srli_epi16::<3>(bits),
        };
        _mm256_or_si256(bytes, _mm256_and_si256(moved, _mm256_set1_epi8(mask)))
    }
}

/// Lanes 0 and 4, 1 and 5, …; then two apart, then neighbours.
#[inline(always)]
pub(super) unsafe fn sum_of_eight(value: __m256) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

#[inline(always)]
pub(super) unsafe fn greatest_of_eight(value: __m256) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// The sum of sixteen signed bytes: the instruction takes unsigned ones, so 128 is added to each and taken off again.
#[inline(always)]
pub(super) unsafe fn sum_of_bytes(from: *const i8) -> i32 {
    // SAFETY: as the caller's.
    unsafe {
        let bytes = _mm_xor_si128(_mm_loadu_si128(from.cast()), _mm_set1_epi8(-128));
        let halves = _mm_sad_epu8(bytes, _mm_setzero_si128());
        _mm_cvtsi128_si32(_mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves))) - 16 * 128
    }
}
