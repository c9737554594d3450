//! What an engine says about itself, written by its threads and read by anybody at any time.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ingle_protocol::wire::v2::{Load, ModelState};
use tokio::sync::watch;

/// State and counters of an engine at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineSnapshot {
    /// Where the model stands.
    pub state: ModelState,
    /// What it runs on, in words; empty until it is loaded.
    pub backend: String,
    /// Engines of the same class give the same answer bit for bit; empty until it is loaded.
    pub numerics: String,
    /// Tokens of one sequence, prompt and answer together; 0 until it is loaded.
    pub context_length: u32,
    /// Sequences decoded together.
    pub slots: u32,
    /// Request fields beyond the common ones that it honours.
    pub features: Vec<String>,
    /// Bytes of memory that were missing where the state is a failure for lack of it, else 0.
    pub missing_memory: u64,
    /// Counts steps (chunks of prompts count).
    pub step: u64,
    /// It is in a step, or should be: standing still now would be a hang.
    pub busy: bool,
    /// How long a step like the present one usually takes, in milliseconds; 0 where not known.
    pub usual_step_ms: u32,
    /// Its work: sequences that have a slot, requests that wait for one, tokens of prompts that are not read.
    pub load: Load,
    /// Tokens generated in the last second.
    pub tokens_per_second: f32,
    /// Tokens of prompt a second while it reads one; 0 until measured.
    pub prefill_rate: f32,
    /// Tokens a second of a sequence that is alone; 0 until measured.
    pub decode_rate: f32,
    /// Tokens a second of each sequence when all slots are taken; 0 until measured.
    pub full_decode_rate: f32,
}

#[derive(Debug)]
pub(crate) struct Facts {
    pub state: ModelState,
    pub backend: String,
    pub numerics: String,
    pub context_length: u32,
    pub slots: u32,
    pub features: Vec<String>,
    /// Bytes of memory that were missing where the state is a failure for lack of it.
    pub missing_memory: u64,
}

/// What can change between two steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences decoded together.
    pub slots: u32,
    /// Tokens of an answer at most.
    pub max_tokens: Option<u32>,
    /// Tokens of prompts in a step; `None`: what the engine likes.
    pub chunk: Option<u32>,
    /// Threads that compute.
    pub threads: usize,
}

/// The part that all threads of an engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    facts: Mutex<Facts>,
    limits: Mutex<Limits>,
    version: watch::Sender<u64>,
    pub step: AtomicU64,
    pub running: AtomicU32,
    pub waiting: AtomicU32,
    pub backlog_tokens: AtomicU32,
    pub busy: AtomicBool,
    pub usual_step_ms: AtomicU32,
    pub stop: AtomicBool,
    prefill_rate: AtomicU32,
    /// Seconds of a step of decoding, with as many sequences as there usually are.
    step_time: AtomicU32,
    /// With one sequence, and with all slots taken.
    time_alone: AtomicU32,
    time_full: AtomicU32,
    recent: Mutex<RecentTokens>,
}

/// A lock whose holder panicked guards plain data that is whole at every moment: go on with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(limits: Limits) -> Self {
        let facts = Facts {
            state: ModelState::Loading,
            backend: String::new(),
            numerics: String::new(),
            context_length: 0,
            slots: limits.slots,
            features: Vec::new(),
            missing_memory: 0,
        };
        Self {
            facts: Mutex::new(facts),
            limits: Mutex::new(limits),
            version: watch::Sender::new(0),
            step: AtomicU64::new(0),
            running: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            backlog_tokens: AtomicU32::new(0),
            busy: AtomicBool::new(false),
            usual_step_ms: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            prefill_rate: AtomicU32::new(0),
            step_time: AtomicU32::new(0),
            time_alone: AtomicU32::new(0),
            time_full: AtomicU32::new(0),
            recent: Mutex::new(RecentTokens::new(Instant::now())),
        }
    }

    /// Changes the slow facts and tells whoever waits for a change.
    pub fn update(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut lock(&self.facts));
        self.version.send_modify(|version| *version += 1);
    }

    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
        self.update(|facts| facts.slots = limits.slots);
    }

    pub fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    pub fn state(&self) -> ModelState {
        lock(&self.facts).state.clone()
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    pub fn count_tokens(&self, now: Instant, tokens: u32) {
        lock(&self.recent).add(now, tokens);
    }

    /// Rates are exponentially weighted means; the first measurement is taken as it is.
    pub fn observe_prefill(&self, tokens_per_second: f32) {
        observe(&self.prefill_rate, tokens_per_second);
    }

    /// Decoding a token of `together` of `slots` sequences took so long. Times are averaged, not rates: one fast step
    /// must not outweigh many slow ones. The time grows evenly from one sequence to all slots; what is observed in
    /// between moves both ends (normalized least mean squares).
    pub fn observe_decode(&self, seconds: f32, together: u32, slots: u32) {
        if !(seconds.is_finite() && seconds > 0.0) {
            return;
        }
        observe(&self.step_time, seconds);
        let load = |time: &AtomicU32| f32::from_bits(time.load(Ordering::Relaxed));
        let (mut alone, mut full) = (load(&self.time_alone), load(&self.time_full));
        if alone == 0.0 {
            (alone, full) = (seconds, seconds);
        } else {
            let share = (together.clamp(1, slots.max(1)) - 1) as f32 / (slots.max(2) - 1) as f32;
            let error = seconds - (alone + (full - alone) * share);
            let step = RATE_WEIGHT * error / ((1.0 - share).powi(2) + share.powi(2));
            alone = (alone + step * (1.0 - share)).max(seconds.min(alone) * 0.5);
            full = (full + step * share).max(alone);
        }
        self.time_alone.store(alone.to_bits(), Ordering::Relaxed);
        self.time_full.store(full.to_bits(), Ordering::Relaxed);
    }

    pub fn prefill_rate(&self) -> f32 {
        f32::from_bits(self.prefill_rate.load(Ordering::Relaxed))
    }

    /// Steps of decoding a second, with as many sequences as there usually are; 0 until measured.
    pub fn step_rate(&self) -> f32 {
        rate_of(&self.step_time)
    }

    /// The engine's work.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            backlog_tokens: self.backlog_tokens.load(Ordering::Relaxed),
        }
    }

    pub fn snapshot(&self) -> EngineSnapshot {
        let facts = lock(&self.facts);
        EngineSnapshot {
            state: facts.state.clone(),
            backend: facts.backend.clone(),
            numerics: facts.numerics.clone(),
            context_length: facts.context_length,
            slots: facts.slots,
            features: facts.features.clone(),
            missing_memory: facts.missing_memory,
            step: self.step.load(Ordering::Relaxed),
            busy: self.busy.load(Ordering::Relaxed),
            usual_step_ms: self.usual_step_ms.load(Ordering::Relaxed),
            load: self.load(),
            tokens_per_second: lock(&self.recent).per_second(Instant::now()),
            prefill_rate: self.prefill_rate(),
            decode_rate: rate_of(&self.time_alone),
            full_decode_rate: rate_of(&self.time_full),
        }
    }
}

/// How much a new measurement counts against all earlier ones.
const RATE_WEIGHT: f32 = 0.2;

fn rate_of(time: &AtomicU32) -> f32 {
    let seconds = f32::from_bits(time.load(Ordering::Relaxed));
    if seconds > 0.0 { 1.0 / seconds } else { 0.0 }
}

fn observe(rate: &AtomicU32, measured: f32) {
    if measured.is_finite() && measured > 0.0 {
        let old = f32::from_bits(rate.load(Ordering::Relaxed));
        let new = if old == 0.0 { measured } else { old + RATE_WEIGHT * (measured - old) };
        rate.store(new.to_bits(), Ordering::Relaxed);
    }
}

/// Tokens of the last second, in tenths.
#[derive(Debug)]
struct RecentTokens {
    start: Instant,
    tenths: [(u64, u32); 10],
}

impl RecentTokens {
    fn new(start: Instant) -> Self {
        Self { start, tenths: [(0, 0); 10] }
    }

    fn tenth(&self, now: Instant) -> u64 {
        // From 10 on, so that no tenth of the first second is taken for the zeroed ones.
        u64::try_from(now.saturating_duration_since(self.start).as_millis() / 100).unwrap_or(u64::MAX - 10) + 10
    }

    fn add(&mut self, now: Instant, tokens: u32) {
        let tenth = self.tenth(now);
        let place = &mut self.tenths[(tenth % 10) as usize];
        if place.0 != tenth {
            *place = (tenth, 0);
        }
        place.1 = place.1.saturating_add(tokens);
    }

    fn per_second(&self, now: Instant) -> f32 {
        let tenth = self.tenth(now);
        let tokens: u64 =
            self.tenths.iter().filter(|(at, _)| *at + 10 > tenth).map(|(_, tokens)| u64::from(*tokens)).sum();
        tokens as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_the_last_second_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut recent = RecentTokens::new(start);
        assert_eq!(recent.per_second(at(0)), 0.0);
        recent.add(at(0), 3);
        recent.add(at(850), 4);
        assert_eq!(recent.per_second(at(900)), 7.0);
        assert_eq!(recent.per_second(at(1100)), 4.0);
        recent.add(at(1850), 1);
        assert_eq!(recent.per_second(at(1850)), 1.0);
        assert_eq!(recent.per_second(at(100_000)), 0.0);
    }

    #[test]
    fn rates_follow_slowly_and_ignore_nonsense() {
        let shared = Shared::new(Limits::default());
        shared.observe_decode(0.0, 1, 4);
        assert_eq!((shared.step_rate(), shared.snapshot().decode_rate), (0.0, 0.0));
        shared.observe_decode(0.1, 1, 4);
        assert_eq!((shared.step_rate(), shared.snapshot().full_decode_rate), (10.0, 10.0));
        // A warm-up of a microsecond is forgotten within some steps of the truth, at whatever number of sequences.
        let learnt = Shared::new(Limits::default());
        learnt.observe_decode(1e-6, 1, 16);
        (0..60).for_each(|_| learnt.observe_decode(0.05, 9, 16));
        let snapshot = learnt.snapshot();
        assert!(snapshot.full_decode_rate < 30.0 && snapshot.decode_rate < 60.0, "{snapshot:?}");
        (0..60).for_each(|_| learnt.observe_decode(0.01, 1, 16));
        assert!((learnt.snapshot().decode_rate / 100.0 - 1.0).abs() < 0.05);
    }
}
