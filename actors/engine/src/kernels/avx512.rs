//! AVX-512 with VNNI: one register holds all lanes.

use std::arch::x86_64::*;

use super::avx2::{greatest_of_eight, sum_of_bytes, sum_of_eight};
use super::simd::Simd;

/// Needs `avx512f`, `avx512bw`, `avx512vnni`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY (of each function): the trait's caller has made sure of the instructions; pointers as the trait says.
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    const COLUMNS: usize = 8;
    // The instruction takes unsigned weights.
    const SIGNED_OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: Self::F) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(value)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::F) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value))) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn keep_from(x: Self::F, bound: Self::F, value: Self::F) -> Self::F {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, bound), value) }
    }
    #[inline(always)]
    unsafe fn power_of_two(value: Self::F) -> Self::F {
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(value));
            _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f80_0000)))
        }
    }
    #[inline(always)]
    unsafe fn sum(value: Self::F) -> f32 {
        unsafe { sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(value), upper(value))) }
    }
    #[inline(always)]
    unsafe fn sum_i8(from: *const i8) -> i32 {
        unsafe { sum_of_bytes(from) }
    }
    #[inline(always)]
    unsafe fn greatest(value: Self::F) -> f32 {
        unsafe { greatest_of_eight(_mm256_max_ps(_mm512_castps512_ps256(value), upper(value))) }
    }
    #[inline(always)]
    unsafe fn splat_i32(value: i32) -> Self::I {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(value) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn low_half(bytes: Self::B) -> Self::B {
        unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_half(bytes: Self::B) -> Self::B {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn with_fifth<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        unsafe { merge(bytes, to_bit_four::<N>(bits), 0x10) }
    }
    #[inline(always)]
    unsafe fn with_upper_two<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        unsafe { merge(bytes, to_bit_four::<N>(bits), 0x30) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        unsafe { _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        unsafe { _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights, _mm512_set1_epi8(-128)), _mm512_set1_epi32(x)) }
    }
}

/// Shifts bit `N` of each byte to bit 4; other bits are left for a mask.
#[inline(always)]
unsafe fn to_bit_four<const N: u32>(bits: __m512i) -> __m512i {
    // SAFETY: as the caller's.
    unsafe {
        match N {
            0 => _mm512_slli_epi16::<4>(bits),
            1 => _mm512_slli_epi16::<3>(bits),
            2 => _mm512_slli_epi16::<2>(bits),
            3 => _mm512_slli_epi16::<1>(bits),
            4 => bits,
            5 => _mm512_srli_epi16::<1>(bits),
            6 => _mm512_srli_epi16::<2>(bits),
            _ => _mm512_srli_epi16::<3>(bits),
        }
    }
}

/// `bytes | (bits & mask)`.
#[inline(always)]
unsafe fn merge(bytes: __m512i, bits: __m512i, mask: i8) -> __m512i {
    // SAFETY: as the caller's. The table's number is `a | (b & c)`.
    unsafe { _mm512_ternarylogic_epi32::<0xf8>(bytes, bits, _mm512_set1_epi8(mask)) }
}

/// Lanes 8 to 15.
#[inline(always)]
unsafe fn upper(value: __m512) -> __m256 {
    // SAFETY: as the caller's.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(value))) }
}
