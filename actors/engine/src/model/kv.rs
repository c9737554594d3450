//! Keys and values of all sequences, in blocks that the scheduler hands out, for the CPU's kernels.

use memmap2::MmapMut;

use crate::kernels::KvLayout;

/// Memory for blocks, one part for each layer. Pages that no block has used yet take no memory.
#[derive(Debug)]
pub(super) struct KvStore {
    pub layout: KvLayout,
    pub layers: Vec<MmapMut>,
}

impl KvStore {
    pub fn new(layout: KvLayout, layers: usize, blocks: usize) -> std::io::Result<Self> {
        let too_many = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let bytes = blocks.checked_mul(layout.block_bytes()).ok_or_else(too_many)?;
        let layers = (0..layers).map(|_| MmapMut::map_anon(bytes)).collect::<std::io::Result<_>>()?;
        Ok(Self { layout, layers })
    }

    /// Bytes that one block takes in all layers.
    pub fn block_bytes(layout: KvLayout, layers: usize) -> u64 {
        (layout.block_bytes() as u64).saturating_mul(layers as u64)
    }
}
