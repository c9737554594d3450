//! NEON with its dot product: four registers hold all lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::Simd;

/// Needs `neon`, `dotprod`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon;

/// Four lanes each.
#[derive(Clone, Copy)]
pub(crate) struct Four<T>(T, T, T, T);

impl<T: Copy> Four<T> {
    #[inline(always)]
    fn map<U>(self, map: impl Fn(T) -> U) -> Four<U> {
        Four(map(self.0), map(self.1), map(self.2), map(self.3))
    }

    #[inline(always)]
    fn with<U: Copy, V>(self, other: Four<U>, map: impl Fn(T, U) -> V) -> Four<V> {
        Four(map(self.0, other.0), map(self.1, other.1), map(self.2, other.2), map(self.3, other.3))
    }
}

// SAFETY (of each function): the trait's caller has made sure of the instructions; pointers as the trait says.
impl Simd for Neon {
    type F = Four<float32x4_t>;
    type I = Four<int32x4_t>;
    type B = Four<uint8x16_t>;

    const COLUMNS: usize = 4;
    // The instruction takes signed weights; those of `dot` are too small to have a sign.
    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        let one = unsafe { vdupq_n_f32(value) };
        Four(one, one, one, one)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { Four(vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12))) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe {
            vst1q_f32(to, value.0);
            vst1q_f32(to.add(4), value.1);
            vst1q_f32(to.add(8), value.2);
            vst1q_f32(to.add(12), value.3);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        unsafe { load_halves(from) }.map(|bits| unsafe { vcvt_f32_f16(vreinterpret_f16_u16(bits)) })
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: Self::F) {
        let bits = value.map(|value| unsafe { vreinterpret_u16_f16(vcvt_f16_f32(value)) });
        unsafe {
            vst1q_u16(to, vcombine_u16(bits.0, bits.1));
            vst1q_u16(to.add(8), vcombine_u16(bits.2, bits.3));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        unsafe { load_halves(from) }.map(|bits| unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(bits)) })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        unsafe {
            let bytes = vld1q_s8(from);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            let words = Four(vget_low_s16(low), vget_high_s16(low), vget_low_s16(high), vget_high_s16(high));
            words.map(|words| vcvtq_f32_s32(vmovl_s16(words)))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F {
        unsafe {
            let bytes = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            let words = Four(vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high));
            words.map(|words| vcvtq_f32_u32(vmovl_u16(words)))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::F) {
        unsafe {
            let words = value.map(|value| vqmovn_s32(vcvtnq_s32_f32(value)));
            let (low, high) = (vcombine_s16(words.0, words.1), vcombine_s16(words.2, words.3));
            vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    // ARM's own maximum and minimum give what is no number wherever it stands.
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { greater(a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        a.with(b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // The instruction adds to its first argument.
        unsafe {
            Four(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1), vfmaq_f32(c.2, a.2, b.2), vfmaq_f32(c.3, a.3, b.3))
        }
    }
    #[inline(always)]
    unsafe fn keep_from(x: Self::F, bound: Self::F, value: Self::F) -> Self::F {
        let mask = x.with(bound, |x, bound| unsafe { vcgeq_f32(x, bound) });
        value.with(mask, |value, mask| unsafe { vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(value), mask)) })
    }
    #[inline(always)]
    unsafe fn power_of_two(value: Self::F) -> Self::F {
        value.map(|value| unsafe {
            let shifted = vshlq_n_u32::<23>(vreinterpretq_u32_f32(value));
            vreinterpretq_f32_u32(vaddq_u32(shifted, vdupq_n_u32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    unsafe fn sum(value: Self::F) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(value.0, value.2), vaddq_f32(value.1, value.3));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
    #[inline(always)]
    unsafe fn sum_i8(from: *const i8) -> i32 {
        unsafe { i32::from(vaddlvq_s8(vld1q_s8(from))) }
    }
    #[inline(always)]
    unsafe fn greatest(value: Self::F) -> f32 {
        unsafe {
            let four = greater(greater(value.3, value.1), greater(value.2, value.0));
            let two = greater(vextq_f32::<2>(four, four), four);
            vgetq_lane_f32::<0>(greater(vextq_f32::<1>(two, two), two))
        }
    }
    #[inline(always)]
    unsafe fn splat_i32(value: i32) -> Self::I {
        let one = unsafe { vdupq_n_s32(value) };
        Four(one, one, one, one)
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        value.map(|value| unsafe { vcvtq_f32_s32(value) })
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe { Four(vld1q_u8(from), vld1q_u8(from.add(16)), vld1q_u8(from.add(32)), vld1q_u8(from.add(48))) }
    }
    #[inline(always)]
    unsafe fn low_half(bytes: Self::B) -> Self::B {
        bytes.map(|bytes| unsafe { vandq_u8(bytes, vdupq_n_u8(15)) })
    }
    #[inline(always)]
    unsafe fn high_half(bytes: Self::B) -> Self::B {
        bytes.map(|bytes| unsafe { vshrq_n_u8::<4>(bytes) })
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
        unsafe { Self::dot_signed(sum, weights, x) }
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            Four(
                four_products(sum.0, weights.0, x),
                four_products(sum.1, weights.1, x),
                four_products(sum.2, weights.2, x),
                four_products(sum.3, weights.3, x),
            )
        }
    }
}

/// Adds to each lane its four signed products. The compiler has no stable name for this instruction.
#[inline(always)]
unsafe fn four_products(mut sum: int32x4_t, weights: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: as the caller's; registers alone are touched. The directive lets the assembler take the instruction
    // where this function was not put into one that has it.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {weights:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            weights = in(vreg) weights,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Sixteen halves of words.
#[inline(always)]
unsafe fn load_halves(from: *const u16) -> Four<uint16x4_t> {
    // SAFETY: as the caller's.
    unsafe { Four(vld1_u16(from), vld1_u16(from.add(4)), vld1_u16(from.add(8)), vld1_u16(from.add(12))) }
}

/// `a` where it is greater, else `b`.
#[inline(always)]
unsafe fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: as the caller's.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// Bits from `N` on, moved to bit 4 on, under `mask`.
#[inline(always)]
unsafe fn merge<const N: u32>(bytes: uint8x16_t, bits: uint8x16_t, mask: u8) -> uint8x16_t {
    // SAFETY: as the caller's.
    unsafe {
        let moved = match N {
            0 => vshlq_n_u8::<4>(bits),
            1 => vshlq_n_u8::<3>(bits),
            2 => vshlq_n_u8::<2>(bits),
            3 => vshlq_n_u8::<1>(bits),
            4 => bits,
            5 => vshrq_n_u8::<1>(bits),
            6 => vshrq_n_u8::<2>(bits),
            _ => vshrq_n_u8::<3>(bits),
        };
        vbslq_u8(vdupq_n_u8(mask), moved, bytes)
    }
}
