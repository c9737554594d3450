//! Decoders: norms by root mean square, rotary positions, attention with shared keys, gated feed-forward parts. One
//! definition for all families ([`architecture::Family`]), on the CPU and on graphics cards.
//!
//! Weights keep the precision of their file in both places. On the CPU they are packed into a form that engines of a
//! host share, and the kernels of [`crate::kernels`] compute; a card has those of `crate::gpu`. The embedding table
//! stays in the mapped file, as a step needs only a few of its rows. Keys and values lie in blocks that the scheduler
//! hands out (see [`StepEngine::assign`]).
//!
//! **What one sequence gets does not depend on the others, nor on how its prompt was cut.** On the CPU this holds
//! bit for bit, because every sum is taken in an order that depends on the row alone, on every instruction set. So a
//! prompt that is read again with an answer's tokens behind it gives the state that decoding gave. GPUs promise no
//! such thing.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::dequantize::Format;
use crate::device::{Place, Placement};
use crate::gguf::Gguf;
use crate::kernels::{Activation, KV_BLOCK, Kernels, KvLayout, Row};
use crate::spec::ModelOptions;
use crate::{Capabilities, DeviceChoice, Draw, EngineError, Logits, Picked, StepEngine, StepEntry};

pub(crate) mod architecture;
mod attention;
mod kv;
mod linear;
mod need;
pub(crate) mod packed_file;
pub(crate) mod rotary;
pub(crate) mod weights;

#[cfg(test)]
mod tests;

use architecture::Family;
pub use architecture::Hyperparameters;
use kv::KvStore;
use linear::host;
use need::Lengths;
pub use need::{MemoryNeed, memory_need, memory_need_of_echo};
use rotary::{Angles, Rotary};
use weights::Weights;

/// Tokens of a prompt that are computed in one step.
const CHUNK: u32 = 256;

/// A loaded model with room for some sequences.
#[derive(Debug)]
pub struct Model {
    gguf: Arc<Gguf>,
    embedding: Format,
    hyperparameters: Hyperparameters,
    /// For layers that see everything, and for those with a window.
    rotary: (Rotary, Rotary),
    capabilities: Capabilities,
    slots: Vec<Slot>,
    compute: Compute,
}

/// What computes, with all that it needs for it.
#[derive(Debug)]
enum Compute {
    Cpu(Box<OnCpu>),
    #[cfg(feature = "gpu")]
    Gpu(Box<crate::gpu::Decoder>),
}

#[derive(Debug)]
struct OnCpu {
    weights: Weights,
    store: KvStore,
    kernels: Kernels,
}

#[derive(Debug, Default)]
struct Slot {
    /// Tokens whose keys and values are in its blocks.
    length: usize,
    blocks: Vec<u32>,
}

/// A step, checked: which slots take part, and each row's sequence and place.
struct Checked {
    slots: Vec<usize>,
    rows: Vec<Row>,
}

impl Model {
    /// Loads the weights to where they will be computed.
    pub(crate) fn load(gguf: Arc<Gguf>, placement: Placement, options: &ModelOptions) -> Result<Self, EngineError> {
        let Placement { place, backend, numerics } = placement;
        let hyperparameters = Hyperparameters::from_gguf(&gguf)?;
        let Lengths { context: context_length, for_one, for_all } = Lengths::of(&hyperparameters, options);
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        weights::refuse_other_tensors(&gguf, &hyperparameters)?;
        let embedding = gguf.tensor("token_embd.weight").and_then(Format::of).map_err(damaged)?;
        let rotary = Rotary::pair(&gguf, &hyperparameters, context_length)?;
        // One sequence must always fit, or a full context could never be answered.
        let fitting = |affordable: u64| for_all.min(affordable).max(for_one.into()) as u32;
        let (compute, blocks, backend, numerics) = match place {
            Place::Cpu => {
                let (cpu, blocks) = OnCpu::load(&gguf, &hyperparameters, fitting, options)?;
                let backend = format!("{backend} {}", in_words(&cpu.kernels));
                let numerics = format!("{numerics}-{:?}", options.kv_type).to_lowercase();
                (Compute::Cpu(Box::new(cpu)), blocks, backend, numerics)
            }
            #[cfg(feature = "gpu")]
            Place::Gpu(card) => {
                let (decoder, blocks) = crate::gpu::load(card, &gguf, &hyperparameters, (for_one, fitting), options)?;
                let numerics = format!("{numerics}-{}", decoder.tuning());
                (Compute::Gpu(Box::new(decoder)), blocks, backend, numerics)
            }
        };
        let capabilities = Capabilities {
            slots: options.room(),
            context_length,
            vocabulary: hyperparameters.vocabulary as u32,
            chunk: options.chunk.unwrap_or(CHUNK).max(1),
            blocks,
            block_tokens: KV_BLOCK as u32,
            backend,
            numerics,
        };
        let slots = (0..options.room()).map(|_| Slot::default()).collect();
        Ok(Self { gguf, embedding, hyperparameters, rotary, capabilities, slots, compute })
    }

    /// Opens a model file and loads it onto a device of the wanted kind.
    pub fn open(path: &Path, device: DeviceChoice, options: &ModelOptions) -> Result<Self, EngineError> {
        let gguf = Arc::new(Gguf::open(path)?);
        Self::load(gguf, crate::device::choose(device)?, options)
    }

    /// The numbers that make it this model.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyperparameters
    }

    /// Bytes of weights that a step of decoding reads.
    pub(crate) fn weight_bytes(&self) -> u64 {
        match &self.compute {
            Compute::Cpu(cpu) => cpu.weights.bytes(),
            #[cfg(feature = "gpu")]
            Compute::Gpu(decoder) => decoder.weight_bytes(),
        }
    }

    /// Multiplications with weights for one token of a prompt.
    pub(crate) fn weights_per_token(&self) -> u64 {
        weights::multiplications(&self.hyperparameters)
    }

    /// The CPU's kernels, if they compute.
    pub(crate) fn kernels(&mut self) -> Option<&mut Kernels> {
        match &mut self.compute {
            Compute::Cpu(cpu) => Some(&mut cpu.kernels),
            #[cfg(feature = "gpu")]
            Compute::Gpu(_) => None,
        }
    }

    /// The card that computes, if one does.
    #[cfg(feature = "gpu")]
    pub(crate) fn card(&self) -> Option<&crate::gpu::Card> {
        match &self.compute {
            Compute::Cpu(_) => None,
            Compute::Gpu(decoder) => Some(decoder.card()),
        }
    }

    /// Checks the entries and sorts out whose they are.
    fn check(&self, entries: &[StepEntry]) -> Result<Checked, EngineError> {
        let impossible = |entry: &StepEntry| EngineError::Step(format!("an impossible entry: {entry:?}"));
        let mut checked = Checked { slots: Vec::new(), rows: Vec::with_capacity(entries.len()) };
        for entry in entries {
            let (slot, position) = (entry.slot as usize, entry.position as usize);
            let Some(state) = self.slots.get(slot) else { return Err(impossible(entry)) };
            let has_room = state.blocks.len() * KV_BLOCK > position;
            if entry.token >= self.capabilities.vocabulary
                || entry.position >= self.capabilities.context_length
                || !has_room
            {
                return Err(impossible(entry));
            }
            let goes_on = checked.slots.last() == Some(&slot);
            let expected = match checked.rows.last() {
                Some(last) if goes_on => last.position + 1,
                _ => state.length,
            };
            if position != expected || !goes_on && checked.slots.contains(&slot) {
                return Err(impossible(entry));
            }
            if !goes_on {
                checked.slots.push(slot);
            }
            let sequence = checked.slots.len() - 1;
            checked.rows.push(Row { sequence, position, sees: position });
        }
        Ok(checked)
    }

    /// The rows of the embedding table, straight from the file.
    fn embed(&self, tokens: impl ExactSizeIterator<Item = u32>) -> Result<Vec<f32>, EngineError> {
        let damaged = |why| EngineError::Gguf { path: self.gguf.path().into(), why };
        let table = self.gguf.tensor("token_embd.weight").map_err(damaged)?;
        let bytes = self.gguf.tensor_bytes(table).map_err(damaged)?;
        let width = self.hyperparameters.embedding;
        let row_bytes = width / self.embedding.block_weights() * self.embedding.block_bytes();
        let rows = tokens.len();
        let mut values = vec![0.0f32; rows * width];
        for (token, row) in tokens.zip(values.chunks_exact_mut(width)) {
            self.embedding.dequantize(&bytes[token as usize * row_bytes..][..row_bytes], row);
        }
        if self.hyperparameters.embedding_scale != 1.0 {
            values.iter_mut().for_each(|value| *value *= self.hyperparameters.embedding_scale);
        }
        Ok(values)
    }
}

impl OnCpu {
    /// With as many blocks as `fitting` says where so many are affordable.
    fn load(
        gguf: &Gguf,
        model: &Hyperparameters,
        fitting: impl Fn(u64) -> u32,
        options: &ModelOptions,
    ) -> Result<(Self, u32), EngineError> {
        let layout = KvLayout { kind: options.kv_type, heads: model.kv_heads, size: model.head_size };
        let block_bytes = KvStore::block_bytes(layout, model.layers);
        let budget = options.kv_memory.or_else(|| Some(crate::memory::available()? / 4));
        let blocks = fitting(budget.map_or(u64::MAX, |bytes| bytes / block_bytes.max(1)));
        crate::memory::refuse_too_large(gguf, block_bytes.saturating_mul(blocks.into()))?;
        let weights = Weights::load(gguf, model, options.packed_cache.as_ref())?;
        let store = KvStore::new(layout, model.layers, blocks as usize)
            .map_err(|why| EngineError::Step(format!("no memory for keys and values: {why}")))?;
        let kernels = Kernels::new(options.instruction_set(), options.threads());
        Ok((Self { weights, store, kernels }, blocks))
    }

    /// The logits of the `wanted` rows of a step, whose residual stream is `x`.
    fn step(&mut self, model: &Hyperparameters, x: Vec<f32>, step: &StepOfAll<'_>, wanted: &[usize]) -> Logits {
        let Self { weights, store, kernels } = self;
        let mut x = Tensor::from_data(TensorData::new(x, [step.rows.len(), model.embedding]), &Device::flex());
        let activation = if model.family == Family::Gemma3 { Activation::GeluTanh } else { Activation::Silu };
        let (global, local) = step.angles;
        for (number, layer) in weights.layers.iter().enumerate() {
            let step = attention::Step {
                rows: step.rows,
                tables: step.tables,
                angles: local.filter(|_| !model.is_global(number)).unwrap_or(global),
                window: model.window_of(number),
            };
            let qkv = layer.query_key_value.apply(&mut x, Some(&layer.attention_norm), kernels);
            let attended = attention::attend(model, (number, layer), qkv, &step, store, kernels);
            layer.attention_output.add_to(&mut x, attended, layer.post_attention_norm.as_ref(), kernels);
            let inner = layer.gate_up.apply(&mut x, &layer.feed_forward_norm, activation, kernels);
            layer.down.add_to(&mut x, inner, layer.post_feed_forward_norm.as_ref(), kernels);
        }
        if wanted.is_empty() {
            return Logits::new(Vec::new(), model.vocabulary);
        }
        let rows = wanted.iter().map(|index| x.clone().slice_dim(0, *index..*index + 1)).collect();
        let logits = weights.output.apply(&mut Tensor::cat(rows, 0), Some(&weights.output_norm), kernels);
        Logits::new(host(logits), model.vocabulary)
    }
}

/// What all layers of a step need to know.
pub(crate) struct StepOfAll<'a> {
    pub rows: &'a [Row],
    /// For each sequence of the step, its blocks.
    pub tables: &'a [&'a [u32]],
    /// For layers that see everything, and for those with a window where they have others.
    pub angles: (&'a Angles, Option<&'a Angles>),
}

impl StepEngine for Model {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn assign(&mut self, slot: u32, blocks: &[u32], length: u32) -> Result<(), EngineError> {
        let known = blocks.iter().all(|block| *block < self.capabilities.blocks);
        let wide_enough = blocks.len() * KV_BLOCK >= length as usize;
        match self.slots.get_mut(slot as usize) {
            Some(slot) if known && wide_enough => {
                slot.blocks.clear();
                slot.blocks.extend_from_slice(blocks);
                slot.length = length as usize;
                Ok(())
            }
            _ => Err(EngineError::Step(format!("slot {slot} cannot have {length} tokens in the blocks {blocks:?}"))),
        }
    }

    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError> {
        Ok(self.step_and_draw(entries, want_logits, &[])?.logits)
    }

    fn step_and_draw(
        &mut self,
        entries: &[StepEntry],
        want_logits: &[usize],
        draws: &[Option<Draw>],
    ) -> Result<Picked, EngineError> {
        let checked = self.check(entries)?;
        if let Some(index) = want_logits.iter().find(|index| **index >= entries.len()) {
            return Err(EngineError::Step(format!("logits of entry {index}, of {}", entries.len())));
        }
        if entries.is_empty() {
            return Ok(Picked { tokens: Vec::new(), logits: Logits::new(Vec::new(), self.hyperparameters.vocabulary) });
        }
        let x = self.embed(entries.iter().map(|entry| entry.token))?;
        let positions = || checked.rows.iter().map(|row| row.position as u32);
        let global = self.rotary.0.at(positions());
        let local = self.hyperparameters.local_rope_base.map(|_| self.rotary.1.at(positions()));
        let tables: Vec<&[u32]> = checked.slots.iter().map(|slot| self.slots[*slot].blocks.as_slice()).collect();
        let step = StepOfAll { rows: &checked.rows, tables: &tables, angles: (&global, local.as_ref()) };
        let picked = match &mut self.compute {
            Compute::Cpu(cpu) => {
                let logits = cpu.step(&self.hyperparameters, x, &step, want_logits);
                Picked { tokens: vec![None; draws.len()], logits }
            }
            #[cfg(feature = "gpu")]
            Compute::Gpu(decoder) => decoder
                .step(x, &step, want_logits, draws)
                .map_err(|why| EngineError::Step(format!("the device: {why}")))?,
        };
        for (slot, row) in checked.rows.iter().map(|row| (checked.slots[row.sequence], row)) {
            self.slots[slot].length = row.position + 1;
        }
        Ok(picked)
    }

    fn shapes(&self) -> &[u32] {
        match &self.compute {
            Compute::Cpu(_) => &[],
            #[cfg(feature = "gpu")]
            Compute::Gpu(_) => &crate::gpu::SHAPES,
        }
    }

    fn release(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            *slot = Slot::default();
        }
    }

    fn set_threads(&mut self, threads: usize) {
        match &mut self.compute {
            Compute::Cpu(cpu) => {
                cpu.kernels.set_threads(threads);
                self.capabilities.backend = format!("cpu {}", in_words(&cpu.kernels));
            }
            #[cfg(feature = "gpu")]
            Compute::Gpu(_) => {}
        }
    }
}

/// What the CPU's kernels compute with.
fn in_words(kernels: &Kernels) -> String {
    format!("({}, {} threads)", kernels.instruction_set().name(), kernels.threads())
}
