//! The reference: plain Rust, for every processor.

use half::f16;

use super::simd::{LANES, Simd};

/// No special instructions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn each<T: Copy + Default, U: Copy>(a: [U; LANES], map: impl Fn(U) -> T) -> [T; LANES] {
    a.map(map)
}

#[inline(always)]
fn both(a: [f32; LANES], b: [f32; LANES], map: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| map(a[i], b[i]))
}

// SAFETY (of each function): pointers are read and written as the trait says, sixteen (or 64) elements of them.
impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 4 * LANES];

    const COLUMNS: usize = 4;
    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe { to.cast::<Self::F>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(bits, |bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: Self::F) {
        let bits = each(value, |value| f16::from_f32(value).to_bits());
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(bits, |bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        each(unsafe { from.cast::<[i8; LANES]>().read_unaligned() }, f32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F {
        each(unsafe { from.cast::<[u8; LANES]>().read_unaligned() }, f32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::F) {
        let codes: [i8; LANES] = each(value, |value| value.round_ties_even() as i8);
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(codes) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        both(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn keep_from(x: Self::F, bound: Self::F, value: Self::F) -> Self::F {
        std::array::from_fn(|i| if x[i] >= bound[i] { value[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn power_of_two(value: Self::F) -> Self::F {
        each(value, |value| f32::from_bits((value.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
    #[inline(always)]
    unsafe fn splat_i32(value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        each(value, |value| value as f32)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe { from.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_half(bytes: Self::B) -> Self::B {
        bytes.map(|byte| byte & 15)
    }
    #[inline(always)]
    unsafe fn high_half(bytes: Self::B) -> Self::B {
        bytes.map(|byte| byte >> 4)
    }
    #[inline(always)]
    unsafe fn with_fifth<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        std::array::from_fn(|i| bytes[i] | (bits[i] >> N & 1) << 4)
    }
    #[inline(always)]
    unsafe fn with_upper_two<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B {
        std::array::from_fn(|i| bytes[i] | (bits[i] >> N & 3) << 4)
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        unsafe { Self::dot_signed(sum, weights, x) }
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::I, weights: Self::B, x: i32) -> Self::I {
        let x = x.to_le_bytes();
        std::array::from_fn(|i| {
            let product = |n: usize| i32::from(weights[4 * i + n] as i8) * i32::from(x[n] as i8);
            sum[i] + product(0) + product(1) + product(2) + product(3)
        })
    }
}
