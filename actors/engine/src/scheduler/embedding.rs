//! Embeddings for requests that come one by one: their inputs are computed together, in passes of so many tokens.
//!
//! Each request in turn gives an input to a pass, the highest priority first. So who asks for one embedding waits for
//! a pass, not for the two thousand inputs of somebody else. What an input becomes does not depend on its company
//! ([`crate::encoder`]), so neither does an answer.
//!
//! Bounds are those of [`super`]: at most `slots` requests are computed and at most `queue` wait; a request whose reader
//! does not keep up gives no inputs meanwhile, and is given up after the reader's deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use ingle_protocol::wire::v2::{EMBEDDINGS, FailureKind, ModelState};

use super::output::{Flushed, Lingering};
use super::{LOOK_AGAIN, Submission, Wake, heartbeat, words_of};
use crate::encoder::{MOST_TEXTS, PASS};
use crate::snapshot::{Limits, Shared};
use crate::{DeviceChoice, Encoder, EngineError, EngineSpec, device};

mod intake;
mod job;

#[cfg(test)]
mod tests;

use intake::Intake;
use job::{End, Job};

/// The body of the thread of an engine with an embedding model, from loading to the end.
pub(crate) fn run(
    spec: EngineSpec,
    path: &Path,
    shared: &Arc<Shared>,
    submitted: Receiver<Submission>,
    wake: Sender<Wake>,
    inbox: Receiver<Wake>,
) {
    let failed = |why: String| {
        tracing::error!(why, "the engine has failed");
        shared.update(|facts| facts.state = ModelState::Failed { why });
    };
    let encoder = match catch_unwind(AssertUnwindSafe(|| load(path, &spec, shared))) {
        Ok(Ok(encoder)) => encoder,
        Ok(Err(why)) => {
            // Before the state, so that whoever sees the failure sees what it is.
            shared.update(|facts| facts.missing_memory = why.missing_memory());
            return failed(why.to_string());
        }
        Err(panic) => return failed(format!("a panic while loading: {}", words_of(&*panic))),
    };
    // As many are on their way as there are places.
    let (jobs, arriving) = channel();
    let intake = Intake::new(&spec, &encoder, Arc::clone(shared));
    let hearts = intake.hearts();
    let threads = [
        std::thread::Builder::new().name("intake".into()).spawn(move || intake.run(&submitted, &jobs, &wake)),
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
    let limits = Limits { threads: spec.options.threads(), ..shared.limits() };
    let (waiting, running, lingering) = (Vec::new(), Vec::new(), Vec::new());
    let shared = Arc::clone(shared);
    let mut passes = Passes { spec, limits, shared, encoder, inbox, arriving, waiting, running, lingering };
    let why = match catch_unwind(AssertUnwindSafe(|| passes.serve())) {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why.to_string()),
        Err(panic) => Some(format!("a panic in a pass: {}", words_of(&*panic))),
    };
    if let Some(why) = &why {
        failed(why.clone());
    }
    passes.end_all(why);
}

fn load(path: &Path, spec: &EngineSpec, shared: &Shared) -> Result<Encoder, EngineError> {
    if spec.device == DeviceChoice::Gpu {
        // The choice is the node's, for all its models.
        tracing::warn!("an embedding model computes on the CPU, whatever is chosen");
    }
    let mut encoder = Encoder::open(path, &spec.options)?;
    shared.update(|facts| {
        facts.backend = encoder.backend();
        facts.numerics = device::encoder_numerics();
        facts.context_length = u32::try_from(encoder.context_length()).unwrap_or(u32::MAX);
        facts.features = vec![EMBEDDINGS.into()];
        if facts.state == ModelState::Loading {
            facts.state = ModelState::Warming;
        }
    });
    warm_up(&mut encoder, shared)?;
    Ok(encoder)
}

/// Fills caches and measures the speed that routing begins with.
fn warm_up(encoder: &mut Encoder, shared: &Shared) -> Result<(), EngineError> {
    let count = encoder.context_length().min(PASS);
    let tokens: Vec<u32> = (0..count).map(|n| (n % encoder.vocabulary()) as u32).collect();
    // The second counts: the first reads the weights from the disk.
    for _ in 0..2 {
        let started = Instant::now();
        let embeddings = encoder.compute(std::slice::from_ref(&tokens))?;
        if embeddings.iter().flatten().any(|x| !x.is_finite()) {
            return Err(EngineError::Step("the model computes no numbers; its file is damaged".into()));
        }
        shared.observe_prefill(count as f32 / started.elapsed().as_secs_f32());
    }
    Ok(())
}

struct Passes {
    spec: EngineSpec,
    /// As this thread last saw them.
    limits: Limits,
    shared: Arc<Shared>,
    encoder: Encoder,
    inbox: Receiver<Wake>,
    /// Requests that have been checked and cut into tokens; the inbox is told of each.
    arriving: Receiver<Box<Job>>,
    /// At most `spec.queue`: each holds a place.
    waiting: Vec<Job>,
    /// At most as many as there are slots.
    running: Vec<Job>,
    /// Ended, but the reader has not taken everything; each is bounded by the reader's deadline.
    lingering: Vec<Lingering>,
}

/// The inputs of one pass, and whose they are.
#[derive(Default)]
struct Pass {
    texts: Vec<Vec<u32>>,
    /// Indices of those that run.
    owners: Vec<usize>,
    tokens: usize,
}

impl Passes {
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
            self.compute()?;
        }
    }

    /// Takes what has come in. Waits only where there is nothing to compute.
    fn receive(&mut self) {
        let admissible = !self.waiting.is_empty() && self.running.len() < self.limits.slots as usize;
        let computable = self.running.iter().any(Job::is_computable) || admissible;
        self.shared.busy.store(computable, Ordering::Relaxed);
        if !computable && !self.shared.stopped() {
            let idle = self.running.is_empty() && self.waiting.is_empty() && self.lingering.is_empty();
            let woken = if idle {
                self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.inbox.recv_timeout(LOOK_AGAIN)
            };
            if matches!(woken, Err(RecvTimeoutError::Disconnected)) {
                self.shared.stop.store(true, Ordering::Release);
            }
            self.shared.busy.store(true, Ordering::Relaxed);
        }
        while let Ok(Wake::Look) = self.inbox.try_recv() {}
        while let Ok(job) = self.arriving.try_recv() {
            self.waiting.push(*job);
        }
    }

    /// Takes on what was changed since the last pass.
    fn follow_limits(&mut self) {
        let limits = self.shared.limits();
        if limits.threads != self.limits.threads {
            self.encoder.set_threads(limits.threads);
            let backend = self.encoder.backend();
            self.shared.update(|facts| facts.backend = backend);
        }
        self.limits = limits;
    }

    /// Sends what could not be sent, and ends what is complete, or what nobody reads, reads too slowly or waits for any
    /// longer.
    fn look_after_outputs(&mut self, now: Instant) {
        let deadline = self.spec.reader_deadline;
        self.lingering.retain_mut(|lingering| lingering.flush(now, deadline));
        let mut ended = Vec::new();
        for list in [&mut self.waiting, &mut self.running] {
            let mut at = 0;
            while let Some(job) = list.get_mut(at) {
                let end = match job.flush() {
                    Flushed::Closed => Some(End::Cancelled),
                    Flushed::Stalled(since) if now.duration_since(since) >= deadline => {
                        let message = format!("nobody read the answer for {} s", deadline.as_secs_f32());
                        Some(End::Failed(FailureKind::ReaderTooSlow, message))
                    }
                    _ if now >= job.deadline => {
                        let message = "the time was up before the answer was complete".into();
                        Some(End::Failed(FailureKind::DeadlineExceeded, message))
                    }
                    Flushed::Clear if job.is_complete() => Some(End::Finished),
                    _ => None,
                };
                match end {
                    Some(end) => ended.push((list.remove(at), end)),
                    None => at += 1,
                }
            }
        }
        for (job, end) in ended {
            self.end(job, end);
        }
    }

    /// Lets those who wait take part in passes: the highest priority first, then the first come.
    fn admit(&mut self, now: Instant) {
        while self.running.len() < self.limits.slots as usize {
            let priorities = self.waiting.iter().enumerate().rev();
            let Some((first, _)) = priorities.max_by_key(|(_, job)| job.priority) else { break };
            let mut job = self.waiting.remove(first);
            job.begin(now);
            self.running.push(job);
        }
        let mut order: Vec<&Job> = self.waiting.iter().collect();
        order.sort_by_key(|job| std::cmp::Reverse(job.priority));
        for (ahead, job) in (0u32..).zip(order) {
            job.output.queued(ahead);
        }
        self.note_work();
    }

    /// Says how much is to be done.
    fn note_work(&self) {
        let left = self.running.iter().chain(&self.waiting).map(Job::left).fold(0, u32::saturating_add);
        self.shared.backlog_tokens.store(left, Ordering::Relaxed);
        self.shared.running.store(self.running.len() as u32, Ordering::Release);
    }

    /// The inputs of the next pass: one of each request in turn, as long as there is room.
    fn gather(&mut self) -> Pass {
        let budget = self.limits.chunk.map_or(PASS, |tokens| tokens as usize).max(1);
        let number = self.shared.step.load(Ordering::Relaxed) + 1;
        let running = self.running.iter().enumerate();
        let mut order: Vec<usize> = running.filter(|(_, job)| job.is_computable()).map(|(index, _)| index).collect();
        // Among equals whoever was in a pass the longest ago.
        order.sort_by_key(|index| (std::cmp::Reverse(self.running[*index].priority), self.running[*index].last_pass));
        let mut pass = Pass::default();
        loop {
            let before = pass.texts.len();
            for index in &order {
                let job = &mut self.running[*index];
                let Some(next) = job.inputs.front() else { continue };
                let is_full = pass.tokens + next.len() > budget || pass.texts.len() >= MOST_TEXTS;
                if is_full && !pass.texts.is_empty() {
                    return pass;
                }
                pass.tokens += next.len();
                pass.texts.extend(job.inputs.pop_front());
                pass.owners.push(*index);
                job.last_pass = number;
            }
            if pass.texts.len() == before {
                return pass;
            }
        }
    }

    /// Computes one pass.
    fn compute(&mut self) -> Result<(), EngineError> {
        let pass = self.gather();
        if pass.texts.is_empty() {
            return Ok(());
        }
        let rate = self.shared.prefill_rate();
        let usual = if rate > 0.0 { pass.tokens as f32 / rate } else { 0.0 };
        self.shared.usual_step_ms.store((usual * 1e3).ceil() as u32, Ordering::Relaxed);
        let started = Instant::now();
        let embeddings = self.encoder.compute(&pass.texts)?;
        let now = Instant::now();
        self.shared.step.fetch_add(1, Ordering::Relaxed);
        self.shared.observe_prefill(pass.tokens as f32 / now.duration_since(started).as_secs_f32());
        self.shared.count_tokens(now, pass.tokens as u32);
        let mut damaged = Vec::new();
        for ((index, text), values) in pass.owners.iter().zip(&pass.texts).zip(embeddings) {
            if values.iter().any(|x| !x.is_finite()) {
                damaged.push(*index);
            }
            self.running[*index].take(text.len(), values);
        }
        // From behind, so that the indices of those before stay what they are.
        for index in (0..self.running.len()).rev() {
            let job = &mut self.running[index];
            if damaged.contains(&index) {
                let job = self.running.remove(index);
                self.end(job, End::Impossible("the model's numbers overflow; its file may be damaged".into()));
            } else if matches!(job.flush(), Flushed::Clear) && job.is_complete() {
                let job = self.running.remove(index);
                self.end(job, End::Finished);
            } else {
                // Whatever else the reader does is seen to before the next pass.
                job.tell_progress();
            }
        }
        self.note_work();
        Ok(())
    }

    fn end(&mut self, job: Job, end: End) {
        // Before the last frame goes out, so that whoever has it finds the slot free.
        self.note_work();
        self.lingering.extend(job.end(end, self.shared.load()));
    }

    /// The end of the thread: nothing is left without a last frame. After a failure late requests get theirs too,
    /// until the engine is dropped.
    fn end_all(mut self, why: Option<String>) {
        let kind = if why.is_some() { FailureKind::EngineError } else { FailureKind::ShuttingDown };
        let message = why.unwrap_or_else(|| "the engine is shutting down".into());
        let load = ingle_protocol::wire::v2::Load::default();
        let end = |job: Job| drop(job.end(End::Failed(kind, message.clone()), load));
        self.running.drain(..).chain(self.waiting.drain(..)).for_each(end);
        self.shared.running.store(0, Ordering::Relaxed);
        drop(self.encoder);
        loop {
            while let Ok(job) = self.arriving.try_recv() {
                end(*job);
            }
            if self.shared.stopped() || self.inbox.recv().is_err() {
                break;
            }
        }
    }
}
