//! What the kernels need from a processor: sixteen lanes of floats, of integers, and of four bytes each.
//!
//! Every operation gives the same bits on every processor (products are fused, sums go over lanes in one order), so
//! that kernels written against it do too: machines of one build are of one numerics class.

/// The lanes of a vector: rows of a tile of weights, positions of a block of keys, or elements of a head.
pub(crate) const LANES: usize = 16;

/// Added to and taken from a float of less than 2²², it leaves the nearest whole number (ties to even); in between,
/// the number stands in the lowest bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Sixteen lanes. An implementation's functions may run only where its instructions exist: whoever calls a kernel
/// has asked the processor. Pointers need no alignment.
pub(crate) trait Simd: Copy + 'static {
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32`.
    type I: Copy;
    /// Sixteen times four bytes.
    type B: Copy;

    /// Columns that a tile of weights takes at once: as the registers allow.
    const COLUMNS: usize;
    /// What [`Simd::dot_signed`] adds to each weight.
    const SIGNED_OFFSET: i32;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);
    /// From IEEE half precision.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// To IEEE half precision, to the nearest, ties to even.
    unsafe fn store_f16(to: *mut u16, value: Self::F);
    /// From the upper halves of `f32`s.
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn load_i8(from: *const i8) -> Self::F;
    /// Whole numbers from 0 to 255.
    unsafe fn load_u8(from: *const u8) -> Self::F;
    /// To the nearest whole number, ties to even; the values are within ±127.
    unsafe fn store_i8(to: *mut i8, value: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// The greater; where one is no number, `b`.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; where one is no number, `b`.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `value` where `x ≥ bound`, else 0.
    unsafe fn keep_from(x: Self::F, bound: Self::F, value: Self::F) -> Self::F;
    /// 2ⁿ for a value `n + ROUND`, −127 < n < 128.
    unsafe fn power_of_two(value: Self::F) -> Self::F;

    unsafe fn splat_i32(value: i32) -> Self::I;
    unsafe fn to_float(value: Self::I) -> Self::F;

    unsafe fn load_bytes(from: *const u8) -> Self::B;
    /// The lower four bits of each byte.
    unsafe fn low_half(bytes: Self::B) -> Self::B;
    /// The upper four bits of each byte.
    unsafe fn high_half(bytes: Self::B) -> Self::B;
    /// Sets bit 4 of each byte to bit `N` of the same byte of `bits`.
    unsafe fn with_fifth<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B;
    /// Sets bits 4 and 5 of each byte to the bits `N` and `N + 1` of the same byte of `bits`.
    unsafe fn with_upper_two<const N: u32>(bytes: Self::B, bits: Self::B) -> Self::B;
    /// Adds to each lane its four bytes of `weights` (below 64) times the four signed bytes of `x` (within ±127).
    unsafe fn dot(sum: Self::I, weights: Self::B, x: i32) -> Self::I;
    /// As [`Simd::dot`] for signed weights, to each of which [`Simd::SIGNED_OFFSET`] is added first.
    unsafe fn dot_signed(sum: Self::I, weights: Self::B, x: i32) -> Self::I;

    /// The sum of all lanes: upper and lower halves, then quarters, then eighths, then pairs.
    #[inline(always)]
    unsafe fn sum(value: Self::F) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: there are sixteen places.
        unsafe { Self::store(lanes.as_mut_ptr(), value) };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// The sum of sixteen codes.
    #[inline(always)]
    unsafe fn sum_i8(from: *const i8) -> i32 {
        // SAFETY: as the caller's.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.iter().map(|code| i32::from(*code)).sum()
    }

    /// The greatest of all lanes.
    #[inline(always)]
    unsafe fn greatest(value: Self::F) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: there are sixteen places.
        unsafe { Self::store(lanes.as_mut_ptr(), value) };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                if lanes[i + half] > lanes[i] {
                    lanes[i] = lanes[i + half];
                }
            }
            half /= 2;
        }
        lanes[0]
    }
}
