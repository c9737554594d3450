//! Attention of one layer for all rows of a step, on the CPU.

use burn::tensor::{Device, Tensor, TensorData};

use super::Hyperparameters;
use super::kv::KvStore;
use super::linear::host;
use super::rotary::Angles;
use super::weights::Layer;
use crate::kernels::{AttentionJob, HeadNorms, Kernels, Row};

/// What attention needs to know of a step.
pub(super) struct Step<'a> {
    pub rows: &'a [Row],
    /// For each sequence of the step, its blocks.
    pub tables: &'a [&'a [u32]],
    pub angles: &'a Angles,
    pub window: usize,
}

/// From queries, keys and values `[rows, (heads + 2 · kv_heads) · size]` to `[rows, heads · size]`.
pub(super) fn attend(
    model: &Hyperparameters,
    (number, layer): (usize, &Layer),
    qkv: Tensor<2>,
    step: &Step<'_>,
    store: &mut KvStore,
    kernels: &mut Kernels,
) -> Tensor<2> {
    let Hyperparameters { heads, head_size, attention_scale: scale, .. } = *model;
    let KvStore { layout, layers } = store;
    let bytes = layout.block_bytes();
    let memory = &mut layers[number];
    let mut pointer = |block: &u32| memory[*block as usize * bytes..][..bytes].as_mut_ptr();
    let blocks: Vec<Vec<*mut u8>> = step.tables.iter().map(|table| table.iter().map(&mut pointer).collect()).collect();
    let rows = step.rows.len();
    let mut qkv = host(qkv);
    let mut out = vec![0.0; rows * heads * head_size];
    let norms = layer.head_norms.as_ref().map(|(query, key)| HeadNorms {
        query: &query.values,
        key: &key.values,
        epsilon: query.epsilon,
    });
    kernels.attention(AttentionJob {
        layout: *layout,
        heads,
        rows: step.rows,
        blocks: &blocks,
        qkv: &mut qkv,
        cosines: &step.angles.cosines,
        sines: &step.angles.sines,
        norms,
        scale,
        window: step.window,
        out: &mut out,
    });
    Tensor::from_data(TensorData::new(out, [rows, heads * head_size]), &Device::flex())
}
