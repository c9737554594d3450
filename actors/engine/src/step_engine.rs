//! The floor under the scheduler: something that computes logits, one step at a time.

use crate::EngineError;

/// One token to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepEntry {
    /// The token.
    pub token: u32,
    /// The sequence's place in the batch, below [`Capabilities::slots`].
    pub slot: u32,
    /// The token's place in its sequence, from 0, below [`Capabilities::context_length`].
    pub position: u32,
}

/// What an engine can do and what it runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Sequences at once.
    pub slots: u32,
    /// Tokens of one sequence, prompt and answer together.
    pub context_length: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// How many tokens of prompts it likes to take in one step.
    pub chunk: u32,
    /// Blocks of memory for keys and values, to be handed out by [`StepEngine::assign`]; 0 where each slot has
    /// memory of its own.
    pub blocks: u32,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// What it runs on, in words: `cpu (burn flex, f32)`.
    pub backend: String,
    /// Engines of the same class give the same answer bit for bit.
    pub numerics: String,
}

/// One row of scores, one score a token of the vocabulary, for each entry that asked for them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logits {
    values: Vec<f32>,
    width: usize,
}

impl Logits {
    /// Rows of `width` scores each, one after the other.
    pub fn new(values: Vec<f32>, width: usize) -> Self {
        debug_assert!(width > 0 && values.len().is_multiple_of(width));
        Self { values, width }
    }

    /// The scores for the `n`-th entry that asked for some.
    pub fn row(&self, n: usize) -> &[f32] {
        &self.values[n * self.width..(n + 1) * self.width]
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
}

/// How the next token is drawn where nothing but its scores has a say, in the sampler's terms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 1 ÷ temperature; 0 takes the likeliest token, and nothing below applies.
    pub inverse_temperature: f32,
    /// Only so many of the likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 is off.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Random bits.
    pub random: u64,
}

/// What a step came to for the entries that asked for something.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Picked {
    /// For each of them the token, where the engine chose one.
    pub tokens: Vec<Option<u32>>,
    /// The scores of the others, in their order.
    pub logits: Logits,
}

/// A model on a device, with room for the state of some sequences. Driven by one thread.
pub trait StepEngine {
    /// What it can do.
    fn capabilities(&self) -> &Capabilities;

    /// Gives a slot its blocks, in the order of its tokens, the first `length` of which are computed already. Blocks
    /// may be shared by slots as far as they are computed. Engines without blocks have nothing to do.
    fn assign(&mut self, _slot: u32, _blocks: &[u32], _length: u32) -> Result<(), EngineError> {
        Ok(())
    }

    /// Gives a slot an equal share of all blocks, for those who drive an engine without a scheduler.
    fn assign_share(&mut self, slot: u32) -> Result<(), EngineError> {
        let each = self.capabilities().blocks / self.capabilities().slots.max(1);
        self.assign(slot, &(slot * each..(slot + 1) * each).collect::<Vec<_>>(), 0)
    }

    /// Computes `entries` and returns a row of logits for each index in `want_logits` (indices into `entries`,
    /// rising). Entries of one slot stand together and their positions rise by one from where the slot is; a
    /// released slot is at 0. What one sequence gets does not depend on which others are in the step.
    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError>;

    /// As [`StepEngine::step`]; for each index in `want`, `draws` says how its token may be chosen without the scheduler
    /// seeing its scores, if so. An engine may choose none of them, as this does.
    fn step_and_draw(
        &mut self,
        entries: &[StepEntry],
        want: &[usize],
        draws: &[Option<Draw>],
    ) -> Result<Picked, EngineError> {
        Ok(Picked { tokens: vec![None; draws.len()], logits: self.step(entries, want)? })
    }

    /// Numbers of entries for which it has programs of their own, to be compiled before anybody waits for them.
    fn shapes(&self) -> &[u32] {
        &[]
    }

    /// Forgets the slot's sequence.
    fn release(&mut self, slot: u32);

    /// Computes on so many threads from the next step on. Engines without threads of their own have nothing to do.
    fn set_threads(&mut self, _threads: usize) {}
}
