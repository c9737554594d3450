//! The CPU's own kernels: products with quantized weights and fused attention, on a pool of threads.
//!
//! Weights keep the precision of their file and are multiplied as whole numbers with activations of 8 bits; see
//! [`pack`] for their layout and [`tile`] for the arithmetic. Everything is written once against [`simd::Simd`] and
//! compiled for each instruction set that we have; which one runs is asked of the processor. All give the same
//! bits, whatever is computed beside a row and on however many threads.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
mod float;
mod heads;
mod limits;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod pool;
mod product;
mod rows;
mod scalar;
mod simd;
mod table;
mod tile;

#[cfg(test)]
mod same_bits;
#[cfg(test)]
mod tests;

pub use attention::KvType;
pub(crate) use attention::{KV_BLOCK, KvLayout, WIDEST_HEAD};
pub(crate) use columns::Norm;
pub(crate) use heads::{AttentionJob, HeadNorms, Row};
pub(crate) use pack::{ALIGNMENT, LAYOUT, Shape, pack_tile};
pub(crate) use product::{Activation, Kernels, Packed};
pub(crate) use simd::LANES;
pub use table::InstructionSet;
