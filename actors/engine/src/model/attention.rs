//! Attention of one layer for all rows of a step: fused kernels on the CPU, burn's operations elsewhere.

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor, TensorData};

use super::kv::KvStore;
use super::linear::{Cpu, host};
use super::rotary::Angles;
use super::weights::Layer;
use super::{Group, Hyperparameters};
use crate::kernels::{AttentionJob, HeadNorms, KV_BLOCK, Row};

/// Added to a score that must not count. Not infinity, which some GPUs turn into NaN.
const MASKED: f32 = -1e30;

/// What attention needs to know of a step.
pub(super) struct Step<'a> {
    pub rows: &'a [Row],
    /// For each sequence of the step, its blocks.
    pub tables: &'a [&'a [u32]],
    /// The rows cut at the ends of blocks, for burn's devices.
    pub groups: &'a [Group],
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
    cpu: &mut Cpu,
) -> Tensor<2> {
    let Hyperparameters { heads, head_size, attention_scale: scale, .. } = *model;
    match (&mut *store, cpu) {
        (KvStore::Host { layout, layers }, Some(kernels)) => {
            let bytes = layout.block_bytes();
            let memory = &mut layers[number];
            let pointer = |block: &u32| memory[*block as usize * bytes..][..bytes].as_mut_ptr();
            let mut pointer = pointer;
            let blocks: Vec<Vec<*mut u8>> =
                step.tables.iter().map(|table| table.iter().map(&mut pointer).collect()).collect();
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
        _ => on_device(model, (number, layer), qkv, step, store),
    }
}

fn on_device(
    model: &Hyperparameters,
    (number, layer): (usize, &Layer),
    qkv: Tensor<2>,
    step: &Step<'_>,
    store: &mut KvStore,
) -> Tensor<2> {
    let Hyperparameters { heads, kv_heads, head_size, rotated, attention_scale, .. } = *model;
    let (rows, device) = (qkv.dims()[0], qkv.device());
    let part = |from: usize, count: usize| {
        qkv.clone().slice([0..rows, from * head_size..(from + count) * head_size]).reshape([rows, count, head_size])
    };
    let (mut q, mut k, v) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
    if let Some((query, key)) = &layer.head_norms {
        (q, k) = (query.apply(q), key.apply(k));
    }
    let angles =
        |values: &Vec<f32>| Tensor::<3>::from_data(TensorData::new(values.clone(), [rows, 1, rotated / 2]), &device);
    let (cosines, sines) = (angles(&step.angles.cosines), angles(&step.angles.sines));
    let q = rotate(q, &cosines, &sines, rotated) * attention_scale;
    let k = rotate(k, &cosines, &sines, rotated);
    let mut outputs = Vec::with_capacity(step.groups.len());
    for group in step.groups {
        let of_group = group.row..group.row + group.rows;
        let table = step.tables[group.sequence];
        let block = table[group.position / KV_BLOCK];
        let place = group.position % KV_BLOCK;
        store.write(number, block, place, k.clone().slice([of_group.clone()]), v.clone().slice([of_group.clone()]));
        let blocks = &table[..(group.position + group.rows).div_ceil(KV_BLOCK)];
        if let Some((keys, values)) = store.read(number, blocks, &device) {
            let mask = mask(group, step.window, &device);
            outputs.push(products(q.clone().slice([of_group]), keys, values, mask, kv_heads));
        }
    }
    if outputs.len() == 1 { outputs.swap_remove(0) } else { Tensor::cat(outputs, 0) }
}

/// `[1, 1, rows, span]`: each token sees those of the window up to itself.
fn mask(group: &Group, window: usize, device: &Device) -> Tensor<4> {
    let span = (group.position + group.rows).next_multiple_of(KV_BLOCK);
    let mut mask = vec![0.0f32; group.rows * span];
    for (row, mask) in mask.chunks_exact_mut(span).enumerate() {
        let seen = group.position + row + 1;
        mask[seen..].fill(MASKED);
        mask[..seen.saturating_sub(window)].fill(MASKED);
    }
    Tensor::from_data(TensorData::new(mask, [1, 1, group.rows, span]), device)
}

/// Turns each pair `(i, i + half)` of the first `rotated` elements of `[rows, heads, size]`.
fn rotate(x: Tensor<3>, cosines: &Tensor<3>, sines: &Tensor<3>, rotated: usize) -> Tensor<3> {
    let (half, size) = (rotated / 2, x.dims()[2]);
    let first = x.clone().slice_dim(2, 0..half);
    let second = x.clone().slice_dim(2, half..rotated);
    let mut parts = vec![
        first.clone() * cosines.clone() - second.clone() * sines.clone(),
        second * cosines.clone() + first * sines.clone(),
    ];
    if rotated < size {
        parts.push(x.slice_dim(2, rotated..size));
    }
    Tensor::cat(parts, 2)
}

/// One group's queries `[rows, heads, size]` over its keys `[kv_heads, size, span]` and values
/// `[kv_heads, span, size]`, to `[rows, heads · size]`.
fn products(q: Tensor<3>, keys: Tensor<3>, values: Tensor<3>, mask: Tensor<4>, kv_heads: usize) -> Tensor<2> {
    let [rows, heads, size] = q.dims();
    let share = heads / kv_heads;
    let (keys, values) = (keys.unsqueeze_dim::<4>(1), values.unsqueeze_dim::<4>(1));
    // The heads that share keys are the rows of one product if there is only one token, else a batch of products.
    let q = if rows == 1 {
        q.reshape([kv_heads, 1, share, size])
    } else {
        q.reshape([rows, kv_heads, share, size]).permute([1, 2, 0, 3])
    };
    let out = softmax(q.matmul(keys) + mask, 3).matmul(values);
    let out = if rows == 1 { out } else { out.permute([2, 0, 1, 3]) };
    out.reshape([rows, heads * size])
}
