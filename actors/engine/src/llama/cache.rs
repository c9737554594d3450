//! Keys and values of one sequence in one layer.

use burn::tensor::{Device, Tensor};

/// The first allocation, in positions.
const LEAST: usize = 256;

/// Keys `[kv_heads, size, capacity]` (laid out as the product with the queries reads them) and values
/// `[kv_heads, capacity, size]`. Behind the last position they are zero.
#[derive(Debug, Default)]
pub(super) struct LayerCache {
    tensors: Option<(Tensor<3>, Tensor<3>)>,
}

impl LayerCache {
    /// Makes room for `span` positions, doubling what there is, up to `most`.
    pub fn reserve(&mut self, span: usize, most: usize, (heads, size): (usize, usize), device: &Device) {
        let capacity = self.tensors.as_ref().map_or(0, |(_, values)| values.dims()[1]);
        if capacity >= span {
            return;
        }
        let larger = span.max(LEAST).next_power_of_two().min(most).max(span);
        let keys = Tensor::zeros([heads, size, larger], device);
        let values = Tensor::zeros([heads, larger, size], device);
        self.tensors = Some(match self.tensors.take() {
            None => (keys, values),
            Some((old_keys, old_values)) => (
                keys.slice_assign([0..heads, 0..size, 0..capacity], old_keys),
                values.slice_assign([0..heads, 0..capacity, 0..size], old_values),
            ),
        });
    }

    /// Puts keys and values `[rows, kv_heads, size]` at `position`. Needs room made by [`LayerCache::reserve`].
    pub fn write(&mut self, position: usize, k: Tensor<3>, v: Tensor<3>) {
        let [rows, heads, size] = k.dims();
        let at = position..position + rows;
        // Taken out, so that each tensor is uniquely owned and is written in place.
        if let Some((keys, values)) = self.tensors.take() {
            let keys = keys.slice_assign([0..heads, 0..size, at.clone()], k.permute([1, 2, 0]));
            let values = values.slice_assign([0..heads, at, 0..size], v.permute([1, 0, 2]));
            self.tensors = Some((keys, values));
        }
    }

    /// The first `span` positions of keys and values.
    pub fn read(&self, span: usize) -> (Tensor<3>, Tensor<3>) {
        // Room was made before the step began.
        let (keys, values) = self.tensors.as_ref().expect("the slot was reserved");
        (keys.clone().slice_dim(2, 0..span), values.clone().slice_dim(1, 0..span))
    }
}
