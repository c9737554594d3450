//! Keys and values of all sequences, in blocks of [`KV_BLOCK`] positions that the scheduler hands out.

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor};
use memmap2::MmapMut;

use crate::kernels::{KV_BLOCK, KvLayout};

/// Memory for blocks, one part for each layer.
#[derive(Debug)]
pub(super) enum KvStore {
    /// For the CPU's kernels. Pages that no block has used yet take no memory.
    Host { layout: KvLayout, layers: Vec<MmapMut> },
    /// For burn's devices: keys and values `[blocks · KV_BLOCK, heads · size]`. Taken out while they are written, so
    /// that this happens in place.
    Device { layers: Vec<Option<(Tensor<2>, Tensor<2>)>> },
}

impl KvStore {
    pub fn new(layout: KvLayout, layers: usize, blocks: usize, device: &Device) -> std::io::Result<Self> {
        if *device == Device::flex() {
            let too_many = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            let bytes = blocks.checked_mul(layout.block_bytes()).ok_or_else(too_many)?;
            let layers = (0..layers).map(|_| MmapMut::map_anon(bytes)).collect::<std::io::Result<_>>()?;
            return Ok(Self::Host { layout, layers });
        }
        let shape = [blocks * KV_BLOCK, layout.heads * layout.size];
        let layer = |_| Some((Tensor::zeros(shape, device), Tensor::zeros(shape, device)));
        Ok(Self::Device { layers: (0..layers).map(layer).collect() })
    }

    /// Bytes that one block takes in all layers. Sizes are still only the file's word here, up to 2²⁴ each: no product
    /// of three of them may overflow.
    pub fn block_bytes(layout: KvLayout, layers: usize, device: &Device) -> u64 {
        let of_layer = if *device == Device::flex() {
            layout.block_bytes() as u64
        } else {
            (2 * KV_BLOCK * size_of::<f32>() * layout.heads * layout.size) as u64
        };
        of_layer.saturating_mul(layers as u64)
    }

    /// On a device: puts keys and values `[rows, heads · size]` at their places. What has the same place must be the
    /// same.
    pub fn write(&mut self, layer: usize, places: Tensor<1, Int>, k: Tensor<2>, v: Tensor<2>) {
        let Self::Device { layers } = self else { return };
        if let Some((keys, values)) = layers[layer].take() {
            let keys = keys.select_assign(0, places.clone(), k, IndexingUpdateOp::Assign);
            let values = values.select_assign(0, places, v, IndexingUpdateOp::Assign);
            layers[layer] = Some((keys, values));
        }
    }

    /// On a device: the blocks of some sequences, as many for each, as keys `[sequences, heads, size, positions]` and
    /// values `[sequences, heads, positions, size]`.
    pub fn read(
        &self,
        layer: usize,
        blocks: Tensor<1, Int>,
        [sequences, positions, heads, size]: [usize; 4],
    ) -> Option<(Tensor<4>, Tensor<4>)> {
        let Self::Device { layers } = self else { return None };
        let (keys, values) = layers[layer].as_ref()?;
        let of = |all: &Tensor<2>| {
            let [rows, width] = all.dims();
            let chosen = all.clone().reshape([rows / KV_BLOCK, KV_BLOCK * width]).select(0, blocks.clone());
            chosen.reshape([sequences, positions, heads, size])
        };
        Some((of(keys).permute([0, 2, 3, 1]), of(values).permute([0, 2, 1, 3])))
    }
}
