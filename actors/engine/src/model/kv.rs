//! Keys and values of all sequences, in blocks of [`KV_BLOCK`] positions that the scheduler hands out.

use burn::tensor::{Device, Tensor, TensorData};
use memmap2::MmapMut;

use crate::kernels::{KV_BLOCK, KvLayout};

/// Memory for blocks, one part for each layer.
#[derive(Debug)]
pub(super) enum KvStore {
    /// For the CPU's kernels. Pages that no block has used yet take no memory.
    Host { layout: KvLayout, layers: Vec<MmapMut> },
    /// For burn's devices: keys `[blocks, heads, size, KV_BLOCK]`, values `[blocks, heads, KV_BLOCK, size]`. Taken out while they are written, so that this happens in place.
    Device { layers: Vec<Option<(Tensor<4>, Tensor<4>)>> },
}

impl KvStore {
    pub fn new(layout: KvLayout, layers: usize, blocks: usize, device: &Device) -> std::io::Result<Self> {
        if *device == Device::flex() {
            let too_many = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            let bytes = blocks.checked_mul(layout.block_bytes()).ok_or_else(too_many)?;
            let layers = (0..layers).map(|_| MmapMut::map_anon(bytes)).collect::<std::io::Result<_>>()?;
            return Ok(Self::Host { layout, layers });
        }
        let (heads, size) = (layout.heads, layout.size);
        let layer = |_| {
            let keys = Tensor::zeros([blocks, heads, size, KV_BLOCK], device);
            Some((keys, Tensor::zeros([blocks, heads, KV_BLOCK, size], device)))
        };
        Ok(Self::Device { layers: (0..layers).map(layer).collect() })
    }

    /// On a device: puts keys and values `[rows, heads, size]` at places of one block, from `place` on.
    pub fn write(&mut self, layer: usize, block: u32, place: usize, k: Tensor<3>, v: Tensor<3>) {
        let Self::Device { layers } = self else { return };
        let [rows, heads, size] = k.dims();
        let (block, at) = (block as usize, place..place + rows);
        if let Some((keys, values)) = layers[layer].take() {
            let k = k.permute([1, 2, 0]).unsqueeze_dim::<4>(0);
            let v = v.permute([1, 0, 2]).unsqueeze_dim::<4>(0);
            let keys = keys.slice_assign([block..block + 1, 0..heads, 0..size, at.clone()], k);
            let values = values.slice_assign([block..block + 1, 0..heads, at, 0..size], v);
            layers[layer] = Some((keys, values));
        }
    }

    /// On a device: some blocks one after the other, as keys `[heads, size, positions]` and values
    /// `[heads, positions, size]`.
    pub fn read(&self, layer: usize, blocks: &[u32], device: &Device) -> Option<(Tensor<3>, Tensor<3>)> {
        let Self::Device { layers } = self else { return None };
        let (keys, values) = layers[layer].as_ref()?;
        let numbers: Vec<i32> = blocks.iter().map(|block| *block as i32).collect();
        let numbers = Tensor::<1, burn::tensor::Int>::from_data(TensorData::new(numbers, [blocks.len()]), device);
        let [_, heads, size, _] = keys.dims();
        let positions = blocks.len() * KV_BLOCK;
        let keys = keys.clone().select(0, numbers.clone()).permute([1, 2, 0, 3]).reshape([heads, size, positions]);
        let values = values.clone().select(0, numbers).permute([1, 0, 2, 3]).reshape([heads, positions, size]);
        Some((keys, values))
    }
}
