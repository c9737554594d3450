//! One set of kernels for each instruction set, and the choice among them.

use super::attention::{KvLayout, Queries};
use super::columns::{Norm, Sink};
use super::heads::Rotation;
use super::pack::Shape;
use super::product::Activation;
use super::simd::Simd;
use super::tile::{Group, TileOut};
use super::{attention, columns, heads, limits, product, rows, scalar, tile};

/// Instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionSet {
    /// Plain code, for every processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512 and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// 64-bit ARM with NEON and its dot product.
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
}

/// The kernels of one instruction set. They may be called only on a processor that has it.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::type_complexity)] // a kernel takes slices and numbers, and needs no type for each set of them
pub(crate) struct Table {
    pub columns: usize,
    pub tile: unsafe fn(Shape, *const u8, &Group, &mut TileOut),
    pub fill_row: unsafe fn(&Sink<'_>, usize, &[f32], Norm<'_>, &mut [f32]),
    pub rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub layer_norm: unsafe fn(&[f32], &[f32], &[f32], f32, &mut [f32]),
    pub gelu: unsafe fn(&mut [f32]),
    pub gate: unsafe fn(Activation, &mut TileOut, &TileOut, usize),
    pub prepare_head: unsafe fn(&mut [f32], Option<(&[f32], f32)>, &Rotation<'_>, f32),
    pub write: unsafe fn(KvLayout, *mut u8, usize, usize, *const f32, *const f32),
    pub attend: unsafe fn(KvLayout, &[*const u8], usize, usize, Queries),
    pub sweep: unsafe fn(&[u64]) -> f32,
    pub dots: unsafe fn(i32) -> f32,
}

macro_rules! kernels {
    ($set:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn tile_(shape: Shape, tile: *const u8, group: &Group, out: &mut TileOut) {
            // SAFETY: as the caller's, here and below.
            unsafe { tile::tile::<$set>(shape, tile, group, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn fill_row(sink: &Sink<'_>, row: usize, x: &[f32], norm: Norm<'_>, scratch: &mut [f32]) {
            unsafe { columns::fill_row::<$set>(sink, row, x, norm, scratch) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
            unsafe { columns::rms_norm::<$set>(x, weight, epsilon, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
            unsafe { columns::layer_norm::<$set>(x, weight, bias, epsilon, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn gelu(x: &mut [f32]) {
            unsafe { rows::gelu::<$set>(x) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn gate(activation: Activation, gate: &mut TileOut, up: &TileOut, width: usize) {
            unsafe { product::gate::<$set>(activation, gate, up, width) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn prepare_head(
            x: &mut [f32],
            norm: Option<(&[f32], f32)>,
            rotation: &Rotation<'_>,
            scale: f32,
        ) {
            unsafe { heads::prepare_head::<$set>(x, norm, rotation, scale) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn write(layout: KvLayout, block: *mut u8, head: usize, place: usize, k: *const f32, v: *const f32) {
            unsafe { attention::write::<$set>(layout, block, head, place, k, v) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn attend(layout: KvLayout, blocks: &[*const u8], head: usize, window: usize, queries: Queries) {
            unsafe { attention::attend::<$set>(layout, blocks, head, window, queries) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn sweep(part: &[u64]) -> f32 {
            unsafe { limits::sweep::<$set>(part) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn dots(seed: i32) -> f32 {
            unsafe { limits::dots::<$set>(seed) }
        }
        Table {
            columns: <$set as Simd>::COLUMNS,
            tile: tile_,
            fill_row,
            rms_norm,
            layer_norm,
            gelu,
            gate,
            prepare_head,
            write,
            attend,
            sweep,
            dots,
        }
    }};
}

impl InstructionSet {
    /// Those that this processor has, the best first. `Portable` is always there.
    pub fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                sets.push(Self::Avx512Vnni);
            }
            if avx2 {
                sets.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod") {
            sets.push(Self::NeonDotprod);
        }
        sets.push(Self::Portable);
        sets
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => "neon-dotprod",
        }
    }

    pub(super) fn table(self) -> Table {
        match self {
            Self::Portable => kernels!(scalar::Scalar),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => kernels!(super::avx2::Avx2, "avx2,fma,f16c"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => kernels!(super::avx512::Avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => kernels!(super::neon::Neon, "neon,dotprod"),
        }
    }
}
