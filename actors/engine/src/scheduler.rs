//! Continuous batching. One thread drives the [`StepEngine`]: each step takes one token of every running sequence
//! and chunks of prompts ([`batch`]), so that neither new prompts nor running answers starve. Memory for keys and
//! values is handed out in [`blocks`]; what others computed of a prompt is not computed again.
//!
//! Bounds: at most `slots` sequences run and at most `queue` wait (one more is refused as busy); each answer's
//! channel is bounded by whoever made it. A full channel pauses its sequence alone; a closed one frees the slot
//! before the next step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use ingle_protocol::wire::v2::{FailureKind, Load, ModelState};

use crate::device::{self, Loaded};
use crate::sampler::Sampler;
use crate::snapshot::{Limits, Shared};
use crate::text::{Codec, ToolSupport};
use crate::{Draw, EngineError, EngineSpec, StepEngine};

mod batch;
mod blocks;
mod checks;
pub(crate) mod embedding;
mod heartbeat;
mod intake;
mod output;
mod sequence;
mod warm_up;

#[cfg(test)]
mod tests;

use batch::Batch;
use blocks::BlockPool;
pub(crate) use intake::{Place, Submission};
pub(crate) use output::LastWord;
use output::{Flushed, Lingering};
use sequence::{End, Sequence};

/// How often outputs are looked at while no sequence can be computed because its reader is slow.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What wakes the scheduler.
#[derive(Debug)]
pub(crate) enum Wake {
    /// A request that has been checked and tokenized.
    Sequence(Box<Sequence>),
    /// Something else has changed.
    Look,
}

/// The body of the engine's thread, from loading to the end.
pub(crate) fn run(
    spec: EngineSpec,
    shared: &Arc<Shared>,
    submitted: Receiver<Submission>,
    wake: Sender<Wake>,
    inbox: Receiver<Wake>,
) {
    let started = Instant::now();
    let failed = |why: String| {
        tracing::error!(why, "the engine has failed");
        shared.update(|facts| facts.state = ModelState::Failed { why });
    };
    let loaded = catch_unwind(AssertUnwindSafe(|| load(&spec, shared)));
    let Loaded { engine, codec } = match loaded {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(why)) => {
            // Before the state, so that whoever sees the failure sees what it is.
            shared.update(|facts| facts.missing_memory = why.missing_memory());
            return failed(why.to_string());
        }
        Err(panic) => return failed(format!("a panic while loading: {}", words_of(&*panic))),
    };
    tracing::info!(seconds = started.elapsed().as_secs_f32(), "the model is loaded and warm");
    let intake = intake::Intake::new(&spec, engine.capabilities(), Arc::clone(&codec), Arc::clone(shared));
    let hearts = intake.hearts();
    let threads = [
        std::thread::Builder::new().name("intake".into()).spawn(move || intake.run(&submitted, &wake)),
        std::thread::Builder::new().name("heartbeat".into()).spawn(move || heartbeat::run(&hearts)),
    ];
    if let Some(Err(why)) = threads.into_iter().find(Result::is_err) {
        return failed(format!("a thread does not start: {why}"));
    }
    shared.update(|facts| {
        if facts.state == ModelState::Warming {
            facts.state = ModelState::Ready;
        }
    });
    let capabilities = engine.capabilities();
    let pool = BlockPool::new(capabilities.blocks, capabilities.block_tokens);
    let mut scheduler = Scheduler {
        limits: Limits { threads: spec.options.threads(), ..shared.limits() },
        spec,
        shared: Arc::clone(shared),
        engine,
        sampler: Sampler::new(&*codec),
        codec,
        inbox,
        waiting: Vec::new(),
        running: Vec::new(),
        free: Vec::new(),
        pool,
        starved: false,
        lingering: Vec::new(),
    };
    scheduler.free = (0..scheduler.engine.capabilities().slots).rev().collect();
    let why = match catch_unwind(AssertUnwindSafe(|| scheduler.serve())) {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why.to_string()),
        Err(panic) => Some(format!("a panic in a step: {}", words_of(&*panic))),
    };
    if let Some(why) = &why {
        failed(why.clone());
    }
    scheduler.end_all(why);
}

fn load(spec: &EngineSpec, shared: &Shared) -> Result<Loaded, EngineError> {
    let mut loaded = device::load(spec)?;
    let capabilities = loaded.engine.capabilities();
    shared.update(|facts| {
        facts.backend.clone_from(&capabilities.backend);
        facts.numerics.clone_from(&capabilities.numerics);
        facts.context_length = capabilities.context_length;
        facts.features = match loaded.codec.tools() {
            ToolSupport::Known(format) => vec![format.feature()],
            ToolSupport::None | ToolSupport::Unknown => Vec::new(),
        };
        if facts.state == ModelState::Loading {
            facts.state = ModelState::Warming;
        }
    });
    warm_up::warm_up(&mut *loaded.engine, shared)?;
    Ok(loaded)
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

struct Scheduler {
    spec: EngineSpec,
    /// As this thread last saw them.
    limits: Limits,
    shared: Arc<Shared>,
    engine: Box<dyn StepEngine>,
    sampler: Sampler,
    codec: Arc<dyn Codec>,
    inbox: Receiver<Wake>,
    /// At most `spec.queue` that have not begun (each holds a [`Place`]), and as many as there are slots that wait for
    /// memory again.
    waiting: Vec<Sequence>,
    /// At most as many as there are slots.
    running: Vec<Sequence>,
    /// Slots.
    free: Vec<u32>,
    /// Memory for keys and values.
    pool: BlockPool,
    /// Who waits next does not fit into memory as it is.
    starved: bool,
    /// Ended, but the reader has not taken everything; each is bounded by the reader's deadline.
    lingering: Vec<Lingering>,
}

impl Scheduler {
    fn serve(&mut self) -> Result<(), EngineError> {
        loop {
            self.receive();
            if self.shared.stopped() {
                return Ok(());
            }
            let now = Instant::now();
            self.follow_limits();
            self.look_after_outputs(now);
            self.admit(now);
            self.step()?;
        }
    }

    /// Takes on what was changed since the last step.
    fn follow_limits(&mut self) {
        let limits = self.shared.limits();
        if limits.threads != self.limits.threads {
            self.engine.set_threads(limits.threads);
            let backend = self.engine.capabilities().backend.clone();
            self.shared.update(|facts| facts.backend = backend);
        }
        self.limits = limits;
    }

    /// One more sequence may run.
    fn has_place(&self) -> bool {
        !self.free.is_empty() && self.running.len() < self.limits.slots as usize
    }

    /// Takes what has come in. Waits only where there is nothing to compute.
    fn receive(&mut self) {
        // Somebody waits, and a slot and memory are free, or somebody has a slot and a reader: else there is nothing to do but wait.
        let admissible = !self.waiting.is_empty() && self.has_place() && !self.starved;
        let computable = self.running.iter().any(Sequence::is_computable) || admissible;
        self.shared.busy.store(computable, Ordering::Relaxed);
        if !computable && !self.shared.stopped() {
            let idle = self.running.is_empty() && self.lingering.is_empty();
            let woken = if idle {
                self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.inbox.recv_timeout(LOOK_AGAIN)
            };
            match woken {
                Ok(Wake::Sequence(sequence)) => self.waiting.push(*sequence),
                Ok(Wake::Look) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.shared.stop.store(true, Ordering::Release),
            }
            self.shared.busy.store(true, Ordering::Relaxed);
        }
        loop {
            match self.inbox.try_recv() {
                Ok(Wake::Sequence(sequence)) => self.waiting.push(*sequence),
                Ok(Wake::Look) => {}
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
    }

    /// Sends what could not be sent, and ends what nobody reads, reads too slowly or waits for any longer.
    fn look_after_outputs(&mut self, now: Instant) {
        let deadline = self.spec.reader_deadline;
        self.lingering.retain_mut(|lingering| lingering.flush(now, deadline));
        let mut ended = Vec::new();
        for (list, in_slot) in [(&mut self.waiting, false), (&mut self.running, true)] {
            let mut at = 0;
            while let Some(sequence) = list.get_mut(at) {
                let end = match sequence.output.flush() {
                    Flushed::Closed => Some(End::Cancelled),
                    Flushed::Stalled(since) if now.duration_since(since) >= deadline => {
                        let message = format!("nobody read the answer for {} s", deadline.as_secs_f32());
                        Some(End::Failed(FailureKind::ReaderTooSlow, message))
                    }
                    _ if now >= sequence.deadline => {
                        let message = if in_slot {
                            "the time was up before the answer was complete"
                        } else {
                            "the time was up before a place was free"
                        };
                        Some(End::Failed(FailureKind::DeadlineExceeded, message.into()))
                    }
                    _ => None,
                };
                match end {
                    Some(end) => ended.push((list.remove(at), end)),
                    None => at += 1,
                }
            }
        }
        for (sequence, end) in ended {
            self.end(sequence, end);
        }
    }

    /// Gives free slots and blocks to those who wait: the highest priority first, then the first come.
    fn admit(&mut self, now: Instant) {
        self.starved = false;
        while !self.waiting.is_empty() && self.has_place() {
            let priorities = self.waiting.iter().enumerate().rev();
            let Some((first, _)) = priorities.max_by_key(|(_, sequence)| sequence.priority) else { break };
            let tokens = &self.waiting[first].tokens;
            let mut table = self.pool.find(tokens);
            // Room for the whole prompt and a token: what is admitted gets to its first token.
            if !self.pool.is_empty() && !self.pool.extend(&mut table, tokens.len() + 1) {
                self.pool.release(&mut table);
                self.starved = true;
                break;
            }
            let Some(slot) = self.free.pop() else { break };
            let mut sequence = self.waiting.remove(first);
            sequence.computed = if self.pool.is_empty() { 0 } else { table.findable() * self.pool.size() };
            sequence.table = table;
            sequence.admit(slot, now);
            self.assign(&sequence);
            // Behind the prompts that have begun, or a stream of short ones would keep a long one from its end.
            sequence.last_chunk = self.shared.step.load(Ordering::Relaxed);
            self.running.push(sequence);
        }
        let mut order: Vec<&Sequence> = self.waiting.iter().collect();
        order.sort_by_key(|sequence| std::cmp::Reverse(sequence.priority));
        for (ahead, sequence) in (0u32..).zip(order) {
            sequence.output.queued(ahead);
        }
        self.shared.running.store(self.running.len() as u32, Ordering::Relaxed);
    }

    /// Tells the engine where a sequence's memory is.
    fn assign(&mut self, sequence: &Sequence) {
        if !self.pool.is_empty() {
            // Slots and blocks are the engine's own numbers, so this cannot fail.
            let _ = self.engine.assign(sequence.slot, &sequence.table.blocks, sequence.computed as u32);
        }
    }

    /// Makes room for the next token of every answer. Where blocks run out, the last come of the lowest priority
    /// waits again; it keeps its tokens and loses nothing but time.
    fn make_room(&mut self) {
        if self.pool.is_empty() {
            return;
        }
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let blocks = sequence.table.blocks.len();
            if self.pool.extend(&mut sequence.table, sequence.tokens.len()) {
                if sequence.table.blocks.len() > blocks {
                    let sequence = &self.running[index];
                    let _ = self.engine.assign(sequence.slot, &sequence.table.blocks, sequence.computed as u32);
                }
                index += 1;
                continue;
            }
            let last = self.running.iter().enumerate().rev().min_by_key(|(_, sequence)| sequence.priority);
            let Some((victim, _)) = last else { return };
            let mut sequence = self.running.remove(victim);
            tracing::debug!(tokens = sequence.tokens.len(), "a sequence waits for memory again");
            self.engine.release(sequence.slot);
            self.free.push(sequence.slot);
            self.pool.release(&mut sequence.table);
            self.starved = false;
            (sequence.computed, sequence.has_slot) = (0, false);
            // In front of those who came later.
            self.waiting.insert(0, sequence);
            if victim < index {
                index -= 1;
            }
        }
    }

    /// Says how many tokens of prompts are to be read.
    fn note_backlog(&self) {
        let unread = |sequence: &Sequence| if sequence.left() > 1 { sequence.left() as u32 } else { 0 };
        let backlog = self.running.iter().chain(&self.waiting).map(unread).fold(0, u32::saturating_add);
        self.shared.backlog_tokens.store(backlog, Ordering::Relaxed);
    }

    /// Says what is to be done, and how long the coming step should take.
    fn note_work(&self, batch: &Batch, prefill_rate: f32, step_rate: f32) {
        self.note_backlog();
        let seconds = |work: f32, rate: f32| if rate > 0.0 { work / rate } else { 0.0 };
        let usual = seconds(batch.prefilled as f32, prefill_rate) + seconds(1.0, step_rate);
        self.shared.usual_step_ms.store((usual * 1e3).ceil() as u32, Ordering::Relaxed);
    }

    /// One token of each sequence that has its prompt behind it, and chunks of prompts.
    fn step(&mut self) -> Result<(), EngineError> {
        self.make_room();
        let chunk = self.limits.chunk.unwrap_or(self.engine.capabilities().chunk).max(1) as usize;
        let decodes = self.running.iter().any(|sequence| sequence.is_computable() && sequence.left() == 1);
        let (prefill_rate, step_rate) = (self.shared.prefill_rate(), self.shared.step_rate());
        let batch = Batch::of(&self.running, batch::prefill_budget(chunk, decodes, prefill_rate, step_rate));
        self.note_work(&batch, prefill_rate, step_rate);
        if batch.entries.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let draws: Vec<Option<Draw>> = batch.wanting.iter().map(|index| self.running[*index].draw()).collect();
        let picked = self.engine.step_and_draw(&batch.entries, &batch.want, &draws)?;
        let now = Instant::now();
        let step = self.shared.step.fetch_add(1, Ordering::Relaxed) + 1;
        let (rows, seconds) = (batch.want.len() as u32, now.duration_since(started).as_secs_f32());
        // Beside prompts, what they did not take.
        let decoding = seconds - if prefill_rate > 0.0 { batch.prefilled as f32 / prefill_rate } else { seconds };
        let decoded = (batch.entries.len() - batch.prefilled) as u32;
        if decoded > 0 && (batch.prefilled == 0 || decoding > seconds / 2.0) {
            self.shared.observe_decode(decoding.max(0.0), decoded, self.engine.capabilities().slots);
        } else if batch.entries.len() == batch.prefilled && batch.prefilled * 2 >= chunk {
            self.shared.observe_prefill(batch.prefilled as f32 / seconds);
        }
        self.shared.count_tokens(now, rows);
        for entry in &batch.entries {
            // Slots are few: a linear search costs nothing beside the step.
            if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.slot == entry.slot) {
                sequence.computed += 1;
                sequence.last_chunk = step;
            }
        }
        self.note_backlog();
        if !self.pool.is_empty() {
            for sequence in &mut self.running {
                self.pool.publish(&mut sequence.table, &sequence.tokens, sequence.computed);
            }
        }
        let mut ended = Vec::new();
        let mut row = 0;
        for (index, token) in batch.wanting.into_iter().zip(picked.tokens) {
            let sequence = &mut self.running[index];
            let end = match token {
                Some(id) => sequence.accept(id, &*self.codec, now),
                None => {
                    row += 1;
                    sequence.advance(picked.logits.row(row - 1), &mut self.sampler, &*self.codec, now)
                }
            };
            if let Some(end) = end {
                ended.push((index, end));
            }
        }
        ended.sort_by_key(|(index, _)| *index);
        for (index, end) in ended.into_iter().rev() {
            let sequence = self.running.remove(index);
            self.end(sequence, end);
        }
        self.running.iter().for_each(Sequence::tell_progress);
        Ok(())
    }

    fn end(&mut self, mut sequence: Sequence, end: End) {
        if sequence.has_slot {
            self.engine.release(sequence.slot);
            self.free.push(sequence.slot);
            self.pool.release(&mut sequence.table);
            self.starved = false;
        }
        // Before the last frame goes out, so that whoever has it finds the slot free.
        self.shared.running.store(self.running.len() as u32, Ordering::Release);
        self.note_backlog();
        if let Some(lingering) = sequence.end(end, self.shared.load()) {
            self.lingering.push(lingering);
        }
    }

    /// The end of the thread: nothing is left without a last frame. After a failure late requests get theirs too,
    /// until the engine is dropped.
    fn end_all(mut self, why: Option<String>) {
        let kind = if why.is_some() { FailureKind::EngineError } else { FailureKind::ShuttingDown };
        let message = why.clone().unwrap_or_else(|| "the engine is shutting down".into());
        let end = |sequence: Sequence| drop(sequence.end(End::Failed(kind, message.clone()), Load::default()));
        self.running.drain(..).chain(self.waiting.drain(..)).for_each(end);
        self.shared.running.store(0, Ordering::Relaxed);
        // A device that was lost may panic again when its memory is given back; late requests need us still.
        let engine = self.engine;
        let _ = catch_unwind(AssertUnwindSafe(|| drop(engine)));
        while !self.shared.stopped() {
            match self.inbox.recv() {
                Ok(Wake::Sequence(sequence)) => end(*sequence),
                Ok(Wake::Look) => {}
                Err(_) => break,
            }
        }
        while let Ok(wake) = self.inbox.try_recv() {
            if let Wake::Sequence(sequence) = wake {
                end(*sequence);
            }
        }
    }
}
