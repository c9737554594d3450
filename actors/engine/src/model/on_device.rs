//! Attention on burn's devices. What the layers of a step share (where keys and values go and are read, masks,
//! angles) is made and sent once, as a [`Plan`]; a layer is then a fixed number of operations for each part of it,
//! however many sequences there are.
//!
//! Shapes are rounded up, because devices choose and compile their kernels by shape: the rows of a step and of a
//! part by [`padded_rows`], the positions that are read by [`padded_span`]. What is added repeats something that is
//! there, and nobody looks at its results.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::Hyperparameters;
use super::kv::KvStore;
use super::rotary::Angles;
use super::weights::Layer;
use crate::Logits;
use crate::kernels::{KV_BLOCK, Row};

/// Added to a score for each position that a token is away from those it sees. Not infinity, which some GPUs turn
/// into NaN; so large that one step is enough, so small that no context overflows.
const MASKED: f32 = 1e30;
/// From here on rows are rounded up to multiples of it.
const ROWS: usize = 64;
/// The same for positions.
const SPAN: usize = 256;

/// 1, 2, 4 … 64, 128, 192 …
pub(super) fn padded_rows(rows: usize) -> usize {
    if rows <= ROWS { rows.next_power_of_two() } else { rows.next_multiple_of(ROWS) }
}

/// Positions that are read where `positions` are seen: 64, 128, 256, 512, 768 …
fn padded_span(positions: usize) -> usize {
    let blocks = positions.div_ceil(KV_BLOCK) * KV_BLOCK;
    if blocks <= SPAN { blocks.next_power_of_two() } else { blocks.next_multiple_of(SPAN) }
}

/// Cosines and sines `[rows, 1, pairs]`.
type Turns = (Tensor<3>, Tensor<3>);

/// What all layers need to know of a step.
pub(super) struct Plan {
    /// Where in the store the rows' keys and values go.
    places: Tensor<1, Int>,
    global: Turns,
    local: Option<Turns>,
    parts: Vec<Part>,
    /// For each row its place among the parts' results; `None` where they are in order.
    order: Option<Tensor<1, Int>>,
}

/// Sequences of a step that are computed together: one with a chunk of its prompt, or some with one token each.
struct Part {
    /// Its rows of the step; `None` where it has all of them.
    rows: Option<Tensor<1, Int>>,
    sequences: usize,
    /// The blocks that it reads, as many for each sequence.
    blocks: Tensor<1, Int>,
    /// For each window that the model has, `[sequences, 1, rows of each, span]`.
    masks: Vec<(usize, Tensor<4>)>,
}

/// Some rows of one sequence.
struct Run {
    first: usize,
    rows: usize,
}

fn numbers(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// `values` and its last one again until there are `count`.
fn repeat_last<T: Clone>(values: &mut Vec<T>, count: usize) {
    if let Some(last) = values.last().cloned() {
        values.resize(count.max(values.len()), last);
    }
}

impl Plan {
    /// `rows`: the step's, of which those from `real` on repeat the last. `tables`: each sequence's blocks.
    pub fn new(
        model: &Hyperparameters,
        (rows, real): (&[Row], usize),
        tables: &[&[u32]],
        (global, local): (&Angles, Option<&Angles>),
        device: &Device,
    ) -> Self {
        let pairs = model.rotated / 2;
        let turns = |angles: &Angles| -> Turns {
            let tensor =
                |values: &Vec<f32>| Tensor::from_data(TensorData::new(values.clone(), [rows.len(), 1, pairs]), device);
            (tensor(&angles.cosines), tensor(&angles.sines))
        };
        let place =
            |row: &Row| tables[row.sequence][row.position / KV_BLOCK] as usize * KV_BLOCK + row.position % KV_BLOCK;
        let windows: BTreeSet<usize> = (0..model.layers).map(|number| model.window_of(number)).collect();
        let mut parts = Vec::new();
        let mut order = vec![0; real];
        let mut results = 0;
        for (runs, each) in together(&rows[..real]) {
            for (number, run) in runs.iter().enumerate() {
                for row in 0..run.rows {
                    order[run.first + row] = results + number * each + row;
                }
            }
            let part = Part::new(rows, (&runs, each), tables, &windows, device);
            results += part.sequences * each;
            parts.push(part);
        }
        repeat_last(&mut order, rows.len());
        // One part in the order of the step: what it repeats is what the step repeats.
        let in_order = order[..real].iter().copied().eq(0..real) && results == rows.len();
        if let (true, [part]) = (in_order, parts.as_mut_slice()) {
            part.rows = None;
        }
        Self {
            places: numbers(rows.iter().map(place).collect(), device),
            global: turns(global),
            local: local.map(turns),
            parts,
            order: (!in_order).then(|| numbers(order, device)),
        }
    }

    /// From queries, keys and values `[rows, (heads + 2 · kv_heads) · size]` to `[rows, heads · size]`.
    pub fn attend(
        &self,
        model: &Hyperparameters,
        (number, layer): (usize, &Layer),
        qkv: Tensor<2>,
        store: &mut KvStore,
    ) -> Tensor<2> {
        let Hyperparameters { heads, kv_heads, head_size, rotated, attention_scale, .. } = *model;
        let rows = qkv.dims()[0];
        let part =
            |from: usize, count: usize| qkv.clone().slice([0..rows, from * head_size..(from + count) * head_size]);
        let by_heads = |x: Tensor<2>, count: usize| x.reshape([rows, count, head_size]);
        let (mut q, mut k) = (by_heads(part(0, heads), heads), by_heads(part(heads, kv_heads), kv_heads));
        if let Some((query, key)) = &layer.head_norms {
            (q, k) = (query.apply(q), key.apply(k));
        }
        let (cosines, sines) = match &self.local {
            Some(local) if !model.is_global(number) => local,
            _ => &self.global,
        };
        let q = rotate(q, cosines, sines, rotated) * attention_scale;
        let k = rotate(k, cosines, sines, rotated).reshape([rows, kv_heads * head_size]);
        store.write(number, self.places.clone(), k, part(heads + kv_heads, kv_heads));
        let results = self.parts.iter().filter_map(|part| part.attend(model, number, q.clone(), store));
        let mut results: Vec<Tensor<2>> = results.collect();
        let all = if results.len() == 1 { results.swap_remove(0) } else { Tensor::cat(results, 0) };
        match &self.order {
            Some(order) => all.select(0, order.clone()),
            None => all,
        }
    }
}

/// The runs that are computed together, with the rows that each of them takes. Single tokens go together where they
/// see about as much, so that a long sequence does not make the short ones read as much as it does.
fn together(rows: &[Row]) -> Vec<(Vec<Run>, usize)> {
    let mut chunks = Vec::new();
    let mut singles: BTreeMap<usize, Vec<Run>> = BTreeMap::new();
    let mut first = 0;
    for run in rows.chunk_by(|a, b| a.sequence == b.sequence) {
        let whole = Run { first, rows: run.len() };
        match run {
            [row] => singles.entry((row.sees + 1).next_power_of_two().max(SPAN)).or_default().push(whole),
            _ => chunks.push((vec![whole], padded_rows(run.len()))),
        }
        first += run.len();
    }
    singles.into_values().map(|runs| (runs, 1)).chain(chunks).collect()
}

impl Part {
    fn new(
        rows: &[Row],
        (runs, each): (&[Run], usize),
        tables: &[&[u32]],
        windows: &BTreeSet<usize>,
        device: &Device,
    ) -> Self {
        let sequences = padded_rows(runs.len());
        let mut own: Vec<usize> = Vec::new();
        for (number, run) in runs.iter().enumerate() {
            own.extend(run.first..run.first + run.rows);
            repeat_last(&mut own, (number + 1) * each);
        }
        repeat_last(&mut own, sequences * each);
        let seen = own.iter().map(|row| rows[*row].sees + 1).max().unwrap_or(1);
        let span = padded_span(seen);
        let mut blocks = Vec::new();
        for row in own.iter().step_by(each) {
            let table = tables[rows[*row].sequence];
            // Behind the sequence's end any block will do, as the mask hides it.
            blocks.extend((0..span / KV_BLOCK).map(|n| table.get(n).copied().unwrap_or(table[0]) as usize));
        }
        let column = |of: &dyn Fn(&Row) -> usize| {
            let values: Vec<f32> = own.iter().map(|row| of(&rows[*row]) as f32).collect();
            Tensor::<4>::from_data(TensorData::new(values, [sequences, 1, each, 1]), device)
        };
        let places: Vec<f32> = (0..span).map(|place| place as f32).collect();
        let places = Tensor::<4>::from_data(TensorData::new(places, [1, 1, 1, span]), device);
        // By how much a place lies behind what a row sees, or in front of its window: 0 where it is seen.
        let behind = (column(&|row| row.sees) - places.clone()).clamp_max(0.0);
        let age = column(&|row| row.position) - places;
        let mask = |window: &usize| {
            let hidden = if *window > seen {
                behind.clone()
            } else {
                behind.clone() + (age.clone() * -1.0 + (*window as f32 - 1.0)).clamp_max(0.0)
            };
            (*window, hidden * MASKED)
        };
        let masks = windows.iter().map(mask).collect();
        Self { rows: Some(numbers(own, device)), sequences, blocks: numbers(blocks, device), masks }
    }

    /// `q`: `[rows of the step, heads, size]`. Returns `[rows of the part, heads · size]`.
    fn attend(&self, model: &Hyperparameters, number: usize, q: Tensor<3>, store: &KvStore) -> Option<Tensor<2>> {
        let window = model.window_of(number);
        let (_, mask) = self.masks.iter().find(|(of, _)| *of == window)?;
        let q = match &self.rows {
            Some(rows) => q.select(0, rows.clone()),
            None => q,
        };
        let (heads, kv_heads, size) = (model.heads, model.kv_heads, model.head_size);
        let [sequences, _, each, span] = mask.dims();
        let share = heads / kv_heads;
        let (keys, values) = store.read(number, self.blocks.clone(), [sequences, span, kv_heads, size])?;
        // All queries that meet the same keys are the rows of one product.
        let q = q.reshape([sequences, each, kv_heads, share, size]).permute([0, 2, 3, 1, 4]);
        let scores = q.reshape([sequences, kv_heads, share * each, size]).matmul(keys);
        let weights = softmax(scores.reshape([sequences, heads, each, span]) + mask.clone(), 3);
        let out = weights.reshape([sequences, kv_heads, share * each, span]).matmul(values);
        let out = out.reshape([sequences, kv_heads, share, each, size]).permute([0, 3, 1, 2, 4]);
        Some(out.reshape([sequences * each, heads * size]))
    }
}

/// Some rows, as many as [`padded_rows`] says.
pub(super) fn chosen(x: Tensor<2>, rows: &[usize]) -> Tensor<2> {
    let mut wanted = rows.to_vec();
    repeat_last(&mut wanted, padded_rows(rows.len()));
    let device = x.device();
    if wanted.iter().copied().eq(0..x.dims()[0]) { x } else { x.select(0, numbers(wanted, &device)) }
}

/// The first `rows` rows of scores, from the device; or what is wrong with it.
///
/// A kernel that fails on the device's own thread can leave memory untouched and say nothing. Such rows are all of one
/// number, or no numbers, and must not become an answer.
pub(super) fn logits(scores: Tensor<2>, rows: usize) -> Result<Logits, String> {
    let [padded, width] = scores.dims();
    let scores = if padded == rows { scores } else { scores.slice([0..rows, 0..width]) };
    let data = scores.try_into_data().map_err(|why| format!("the device: {why}"))?;
    let values: Vec<f32> = data.try_into_vec().map_err(|why| format!("the device gave no f32: {why:?}"))?;
    check(&values, width)?;
    Ok(Logits::new(values, width))
}

fn check(values: &[f32], width: usize) -> Result<(), String> {
    let nothing = |row: &[f32]| row.iter().all(|x| *x == row[0]) || row.iter().all(|x| x.is_nan());
    match values.chunks_exact(width).any(nothing) {
        true => Err("the device computed nothing: it was lost, or its driver failed".into()),
        false => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_few() {
        let rows: Vec<usize> = [1, 2, 3, 5, 16, 17, 64, 65, 272].into_iter().map(padded_rows).collect();
        assert_eq!(rows, [1, 2, 4, 8, 16, 32, 64, 128, 320]);
        let spans: Vec<usize> = [1, 64, 65, 129, 256, 257, 513, 1000].into_iter().map(padded_span).collect();
        assert_eq!(spans, [64, 64, 128, 256, 256, 512, 768, 1024]);
    }

    #[test]
    fn what_a_lost_device_leaves_is_no_answer() {
        assert!(check(&[0.0, 1.0, 0.5, -1.0], 2).is_ok());
        assert!(check(&[0.0, 1.0, 0.0, 0.0], 2).is_err());
        assert!(check(&[f32::NAN, f32::NAN], 2).is_err());
    }

    #[test]
    fn single_tokens_go_together_and_chunks_alone() {
        let row = |sequence, position| Row { sequence, position, sees: position };
        let rows = [row(0, 5), row(1, 7), row(1, 8), row(1, 9), row(2, 2000), row(3, 100)];
        let parts: Vec<(Vec<usize>, usize)> = together(&rows)
            .into_iter()
            .map(|(runs, each)| (runs.iter().map(|run| run.first).collect(), each))
            .collect();
        assert_eq!(parts, [(vec![0, 5], 1), (vec![4], 1), (vec![1], 4)]);
    }
}
