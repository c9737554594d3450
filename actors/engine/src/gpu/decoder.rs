//! A decoder's weights, keys and values on a card, and a step of it.

use cubecl::prelude::*;
use half::f16;

use super::kernels::{self, HeadShape, NormInto, ROW_PLAN};
use super::matrix::{Matrix, bytes_of, grid};
use super::tokens::{check, choose};
use super::{Buffer, Card};
use crate::gguf::{Gguf, GgufError};
use crate::kernels::{Activation, KV_BLOCK, Row};
use crate::model::architecture::Family;
use crate::model::rotary::Angles;
use crate::model::weights::{Part, all_parts, bias_of, layer_parts, output_part, values};
use crate::model::{Hyperparameters, StepOfAll};
use crate::{Draw, EngineError, Logits, Picked};

/// Workgroups that keep a large card busy; with fewer, sequences are split.
const BUSY: usize = 256;
/// Positions that a workgroup takes at least.
const SPAN: usize = 256;

struct Layer {
    attention_norm: Buffer,
    query_key_value: Matrix,
    /// For queries, then for keys.
    head_norms: Buffer,
    attention_output: Matrix,
    post_attention_norm: Option<Buffer>,
    feed_forward_norm: Buffer,
    /// Gate, then up.
    gate_up: Matrix,
    down: Matrix,
    post_feed_forward_norm: Option<Buffer>,
    /// `[blocks · KV_BLOCK, kv_heads · size]`.
    keys: Buffer,
    values: Buffer,
}

/// Everything of a model that is on a card.
pub(crate) struct Decoder {
    card: Card,
    model: Hyperparameters,
    layers: Vec<Layer>,
    output_norm: Buffer,
    output: Matrix,
    /// Rows that [`Scratch`] has room for, and it.
    scratch: Option<(usize, Scratch)>,
}

/// What a step keeps between its kernels.
struct Scratch {
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    /// What a product adds to the residual stream, where it is normed before.
    product: Buffer,
    both: Buffer,
    inner: Buffer,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} layers on {:?}", self.layers.len(), self.card)
    }
}

impl Layer {
    fn load(card: &Card, gguf: &Gguf, model: &Hyperparameters, n: usize, blocks: usize) -> Result<Self, GgufError> {
        let name = |part: &str| format!("blk.{n}.{part}.weight");
        let norm = |part: &str| Ok(card.floats(&values(gguf, &name(part), &[model.embedding])?));
        let post = |part: &str| (model.family == Family::Gemma3).then(|| norm(part)).transpose();
        let matrix = |parts: &[Part]| Matrix::load(card, gguf, parts, bias_of(gguf, parts)?);
        let mut head_norms = Vec::new();
        if model.norms_heads() {
            head_norms = values(gguf, &name("attn_q_norm"), &[model.head_size])?;
            head_norms.extend(values(gguf, &name("attn_k_norm"), &[model.head_size])?);
        }
        let width = blocks * KV_BLOCK * model.kv_heads * model.head_size;
        let kv = || Buffer { handle: card.client.empty(width * card.kv_bytes()), count: width };
        let parts = layer_parts(model, n);
        Ok(Self {
            attention_norm: norm("attn_norm")?,
            query_key_value: matrix(&parts.query_key_value)?,
            head_norms: card.floats(&head_norms),
            attention_output: matrix(&[parts.attention_output])?,
            post_attention_norm: post("post_attention_norm")?,
            feed_forward_norm: norm("ffn_norm")?,
            gate_up: matrix(&[parts.gate, parts.up])?,
            down: matrix(&[parts.down])?,
            post_feed_forward_norm: post("post_ffw_norm")?,
            keys: kv(),
            values: kv(),
        })
    }
}

impl Decoder {
    /// Bytes that one block of keys and values takes in all layers. Sizes are still only the file's word here.
    pub fn block_bytes(card: &Card, model: &Hyperparameters) -> u64 {
        let width = (model.kv_heads as u64).saturating_mul(model.head_size as u64);
        width.saturating_mul((2 * KV_BLOCK * card.kv_bytes()) as u64).saturating_mul(model.layers as u64)
    }

    /// Blocks that one buffer of keys or values can hold.
    pub fn most_blocks(card: &Card, model: &Hyperparameters) -> u64 {
        let width = (model.kv_heads as u64).saturating_mul(model.head_size as u64);
        // Places are counted with 32 bits.
        let bytes = card.largest_buffer().min(u64::from(u32::MAX));
        bytes / width.saturating_mul((KV_BLOCK * card.kv_bytes()) as u64).max(1)
    }

    /// Bytes of weights on a card.
    pub fn weight_bytes_of(gguf: &Gguf, model: &Hyperparameters) -> Result<u64, GgufError> {
        bytes_of(gguf, &all_parts(gguf, model))
    }

    pub fn load(card: Card, gguf: &Gguf, model: &Hyperparameters, blocks: usize) -> Result<Self, EngineError> {
        let share = model.heads / model.kv_heads;
        // A workgroup's own memory: queries, scores, and what adds up sums.
        let shared = 4 * (share * (model.head_size + 64 + 8) + 128);
        if !model.head_size.is_multiple_of(4) || shared > card.client.properties().hardware.max_shared_memory_size {
            return Err(EngineError::Unsupported {
                path: gguf.path().into(),
                what: format!("{share} queries of width {} to a key", model.head_size),
                hint: "on this GPU widths of 4, 8, 12 … are, and queries that its workgroups have memory for".into(),
            });
        }
        // They stay as long as the model, so they get memory of exactly their size.
        let load = |card: Card| Self::load_parts(card, gguf, model, blocks);
        card.client.clone().memory_persistent_allocation(card, load)
    }

    fn load_parts(card: Card, gguf: &Gguf, model: &Hyperparameters, blocks: usize) -> Result<Self, EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        // What does not fit is refused now, not in the first answer; and no more of the file waits in memory than what
        // a layer has.
        let arrived = || {
            let refused = |why| EngineError::Device(format!("{card:?} did not take the model: {why}"));
            card.sync().map_err(refused)
        };
        let mut layers = Vec::new();
        for number in 0..model.layers {
            layers.push(Layer::load(&card, gguf, model, number, blocks).map_err(damaged)?);
            arrived()?;
        }
        let weight = values(gguf, "output_norm.weight", &[model.embedding]).map_err(damaged)?;
        let output = Matrix::load(&card, gguf, &[output_part(gguf, model)], None).map_err(damaged)?;
        arrived()?;
        Ok(Self { model: model.clone(), output_norm: card.floats(&weight), card, layers, output, scratch: None })
    }

    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Bytes of matrices that a step of decoding reads.
    pub fn weight_bytes(&self) -> u64 {
        self.matrices().map(Matrix::bytes).sum()
    }

    /// All that a step multiplies with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let of_layers = self.layers.iter().flat_map(|layer| {
            let Layer { query_key_value, attention_output, gate_up, down, .. } = layer;
            [query_key_value, attention_output, gate_up, down]
        });
        of_layers.chain([&self.output])
    }

    pub(super) fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Matrix> {
        let of_layers = self.layers.iter_mut().flat_map(|layer| {
            let Layer { query_key_value, attention_output, gate_up, down, .. } = layer;
            [query_key_value, attention_output, gate_up, down]
        });
        of_layers.chain([&mut self.output])
    }

    /// Room for `rows` rows, which are a power of two where they are few.
    fn scratch(&mut self, rows: usize) -> &Scratch {
        if self.scratch.as_ref().is_none_or(|(room, _)| *room < rows) {
            let Hyperparameters { embedding, feed_forward, heads, kv_heads, head_size, .. } = self.model;
            let room = |width: usize| self.card.room(rows * width);
            let scratch = Scratch {
                normed: room(embedding),
                qkv: room((heads + 2 * kv_heads) * head_size),
                attended: room(heads * head_size),
                product: room(embedding),
                both: room(2 * feed_forward),
                inner: room(feed_forward),
            };
            return &self.scratch.insert((rows, scratch)).1;
        }
        &self.scratch.as_ref().expect("it was made, or was there").1
    }

    /// A step, whose residual stream is `x`: for each `wanted` row its token, where `draws` says how that is chosen, or
    /// its logits.
    pub fn step(
        &mut self,
        x: Vec<f32>,
        step: &StepOfAll<'_>,
        wanted: &[usize],
        draws: &[Option<Draw>],
    ) -> Result<Picked, String> {
        let rows = step.rows.len();
        let width = self.model.vocabulary;
        let x = self.layers(x, step);
        if wanted.is_empty() {
            // What a card is told to do it does later: without this, steps would seem to take no time, and pile up.
            self.card.sync()?;
            return Ok(Picked { tokens: Vec::new(), logits: Logits::new(Vec::new(), width) });
        }
        let scores = self.scores(&x, rows, wanted);
        let tokens = if draws.iter().any(Option::is_some) {
            choose(&self.card, &scores, width, draws)?
        } else {
            vec![None; wanted.len()]
        };
        let mut values = Vec::new();
        if tokens.iter().all(Option::is_none) {
            values = self.card.read(&scores)?;
            values.truncate(wanted.len() * width);
        } else {
            for row in tokens.iter().enumerate().filter(|(_, token)| token.is_none()).map(|(row, _)| row) {
                values.extend(self.card.read(&scores.part(row * width, width))?);
            }
        }
        check(&values, width)?;
        Ok(Picked { tokens, logits: Logits::new(values, width) })
    }

    /// Logits of the `wanted` rows of the residual stream, with room for the next power of two.
    fn scores(&mut self, x: &Buffer, rows: usize, wanted: &[usize]) -> Buffer {
        let Hyperparameters { embedding, norm_epsilon, vocabulary, .. } = self.model;
        debug_assert!(wanted.iter().all(|row| *row < rows));
        let room = room_for(wanted.len());
        let normed = self.card.room(room * embedding);
        let chosen = self.card.words(&wanted.iter().map(|row| *row as u32).collect::<Vec<_>>());
        self.norm(x, &self.output_norm, (wanted.len(), norm_epsilon), Some(&chosen), &normed, NormInto::Place);
        let scores = self.card.room(room * vocabulary);
        self.output.apply(&self.card, &normed, wanted.len(), &scores, false);
        scores
    }

    /// The residual stream behind the last layer.
    fn layers(&mut self, mut x: Vec<f32>, step: &StepOfAll<'_>) -> Buffer {
        let rows = step.rows.len();
        let room = room_for(rows);
        self.scratch(room);
        let Self { card, model, layers, scratch: Some((_, scratch)), .. } = &*self else { unreachable!() };
        let Hyperparameters { embedding, feed_forward, norm_epsilon: epsilon, .. } = *model;
        x.resize(room * embedding, 0.0);
        let x = card.floats(&x);
        let angles = |angles: &Angles| {
            let pairs = model.rotated / 2;
            let rows = angles.cosines.chunks(pairs).zip(angles.sines.chunks(pairs));
            card.floats(&rows.flat_map(|(cosines, sines)| [cosines, sines]).flatten().copied().collect::<Vec<_>>())
        };
        let (global, local) = (angles(step.angles.0), step.angles.1.map(angles));
        let plan = card.words(&plan(step.rows, step.tables));
        let seen = step.rows.iter().map(|row| row.sees + 1).max().unwrap_or(1);
        let activation = if model.family == Family::Gemma3 { Activation::GeluTanh } else { Activation::Silu };
        let Scratch { normed, qkv, attended, product, both, inner } = scratch;
        let sub = |matrix: &Matrix, input: &Buffer, post: Option<&Buffer>| match post {
            None => matrix.apply(card, input, rows, &x, true),
            Some(weight) => {
                matrix.apply(card, input, rows, product, false);
                self.norm(product, weight, (rows, epsilon), None, &x, NormInto::Sum);
            }
        };
        for (number, layer) in layers.iter().enumerate() {
            self.norm(&x, &layer.attention_norm, (rows, epsilon), None, normed, NormInto::Place);
            layer.query_key_value.apply(card, normed, rows, qkv, false);
            let angles = local.as_ref().filter(|_| !model.is_global(number)).unwrap_or(&global);
            let window = model.window_of(number);
            match card.halves {
                true => self.attend::<f16>(layer, (rows, seen, window), qkv, angles, &plan, attended),
                false => self.attend::<f32>(layer, (rows, seen, window), qkv, angles, &plan, attended),
            }
            sub(&layer.attention_output, attended, layer.post_attention_norm.as_ref());
            self.norm(&x, &layer.feed_forward_norm, (rows, epsilon), None, normed, NormInto::Place);
            layer.gate_up.apply(card, normed, rows, both, false);
            let count = rows * feed_forward;
            // SAFETY: both buffers have so many rows.
            unsafe {
                kernels::activate::launch_unchecked(
                    &card.client,
                    grid(count.div_ceil(256)),
                    CubeDim::new_1d(256),
                    both.arg(),
                    inner.arg(),
                    feed_forward as u32,
                    count as u32,
                    activation,
                );
            }
            sub(&layer.down, inner, layer.post_feed_forward_norm.as_ref());
        }
        x
    }

    fn norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        (rows, epsilon): (usize, f32),
        chosen: Option<&Buffer>,
        out: &Buffer,
        into: NormInto,
    ) {
        // SAFETY: rows are as wide as the weights, and there are so many, or as many as are chosen.
        unsafe {
            kernels::norm::launch_unchecked(
                &self.card.client,
                CubeCount::Static(rows as u32, 1, 1),
                CubeDim::new_1d(kernels::ROW_THREADS),
                x.arg(),
                weight.arg(),
                chosen.unwrap_or(weight).arg(),
                out.arg(),
                weight.count as u32,
                epsilon,
                chosen.is_some(),
                into,
            );
        }
    }

    fn attend<E: Float + CubeElement>(
        &self,
        layer: &Layer,
        (rows, seen, window): (usize, usize, usize),
        qkv: &Buffer,
        angles: &Buffer,
        plan: &Buffer,
        out: &Buffer,
    ) {
        let Hyperparameters { heads, kv_heads, head_size: size, rotated, attention_scale, norm_epsilon, .. } =
            self.model;
        let client = &self.card.client;
        let shape = HeadShape { heads, kv_heads, size, rotated, normed: self.model.norms_heads() };
        let threads = CubeDim::new_1d(kernels::POSITIONS);
        let seen = seen.min(window);
        let parts = (BUSY / (rows * kv_heads)).clamp(1, seen.div_ceil(SPAN));
        let span = seen.div_ceil(parts);
        let window = window.min(u32::MAX as usize) as u32;
        // SAFETY: the plan names places and tables within the buffers; the others have `rows` rows.
        unsafe {
            kernels::place::launch_unchecked::<E>(
                client,
                CubeCount::Static((heads + 2 * kv_heads) as u32, rows as u32, 1),
                threads,
                qkv.arg(),
                layer.head_norms.arg(),
                angles.arg(),
                plan.arg(),
                layer.keys.arg(),
                layer.values.arg(),
                attention_scale,
                norm_epsilon,
                shape,
            );
            let several = parts > 1;
            let results = if several { self.card.room(rows * heads * parts * (size + 2)) } else { out.clone() };
            kernels::attend::launch_unchecked::<E>(
                client,
                CubeCount::Static(kv_heads as u32, rows as u32, parts as u32),
                threads,
                qkv.arg(),
                layer.keys.arg(),
                layer.values.arg(),
                plan.arg(),
                results.arg(),
                span as u32,
                window,
                shape,
                several,
            );
            if several {
                kernels::join::launch_unchecked(
                    client,
                    CubeCount::Static(heads as u32, rows as u32, 1),
                    threads,
                    results.arg(),
                    out.arg(),
                    parts as u32,
                    shape,
                );
            }
        }
    }
}

/// Rows that buffers have room for: few ones are computed in powers of two.
fn room_for(rows: usize) -> usize {
    if rows <= kernels::FEW { rows.next_power_of_two() } else { rows.next_multiple_of(kernels::TILE) }
}

/// For each row [`ROW_PLAN`] numbers, then the tables.
fn plan(rows: &[Row], tables: &[&[u32]]) -> Vec<u32> {
    let mut starts = Vec::new();
    let mut next = rows.len() * ROW_PLAN;
    for table in tables {
        starts.push(next as u32);
        next += table.len();
    }
    let of_row = |row: &Row| {
        let place = tables[row.sequence][row.position / KV_BLOCK] as usize * KV_BLOCK + row.position % KV_BLOCK;
        [place as u32, starts[row.sequence], row.sees as u32]
    };
    rows.iter().flat_map(of_row).chain(tables.iter().copied().flatten().copied()).collect()
}
