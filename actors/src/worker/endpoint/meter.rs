//! What an endpoint does, counted and measured from here: it says little about itself.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::EngineId;
use ingle_protocol::wire::v2::{EnginePulse, Load};

/// How much a new observation counts: of gaps between tokens, of which there are many, and of first tokens.
const GAP_WEIGHT: f64 = 0.05;
const FIRST_TOKEN_WEIGHT: f64 = 0.3;
const SECOND: Duration = Duration::from_secs(1);

/// Counters of one endpoint.
#[derive(Debug, Default)]
pub struct Meter {
    /// Events that came from the far side.
    steps: AtomicU64,
    /// Requests before their first token.
    waiting: AtomicU32,
    /// Requests behind it.
    running: AtomicU32,
    rates: Mutex<Rates>,
}

#[derive(Debug, Default)]
struct Rates {
    /// Seconds for a token of prompt, until the first token comes; 0 until observed.
    prompt_token: f64,
    /// Seconds between two tokens of an answer; 0 until observed.
    gap: f64,
    /// When the present second began, and how many tokens it has.
    second: Option<Instant>,
    tokens: u64,
    tokens_per_second: f64,
    last_event: Option<Instant>,
}

fn average(average: &mut f64, observed: f64, weight: f64) {
    *average = if *average == 0.0 { observed } else { *average + weight * (observed - *average) };
}

impl Rates {
    fn turn(&mut self, now: Instant) {
        let second = *self.second.get_or_insert(now);
        let elapsed = now.saturating_duration_since(second);
        if elapsed >= SECOND {
            self.tokens_per_second = self.tokens as f64 / elapsed.as_secs_f64();
            (self.second, self.tokens) = (Some(now), 0);
        }
    }
}

impl Meter {
    fn rates(&self) -> std::sync::MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more request with an estimated length; `None` where `limit` of them are there already.
    pub fn begin(self: &Arc<Self>, limit: u32, prompt_tokens: u32, now: Instant) -> Option<Exchange> {
        let free = |waiting: u32| (waiting + self.running.load(Ordering::Acquire) < limit).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok()?;
        Some(Exchange { meter: self.clone(), prompt_tokens, began: now, last: None })
    }

    /// Requests that run, and that wait for their first token.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.load(Ordering::Acquire),
            waiting: self.waiting.load(Ordering::Acquire),
            backlog_tokens: 0,
        }
    }

    /// Something came from the far side within `time`.
    pub fn has_progress(&self, time: Duration, now: Instant) -> bool {
        self.rates().last_event.is_some_and(|last| now.saturating_duration_since(last) < time)
    }

    /// As pulses carry it.
    pub fn pulse(&self, engine: EngineId, now: Instant) -> EnginePulse {
        let mut rates = self.rates();
        rates.turn(now);
        let rate = |seconds: f64| if seconds > 0.0 { (1.0 / seconds) as f32 } else { 0.0 };
        EnginePulse {
            engine,
            step: self.steps.load(Ordering::Acquire),
            // It makes no steps of its own that could stand still: silence is judged for each exchange.
            busy: false,
            usual_step_ms: 0,
            silent_ms: 0,
            load: self.load(),
            tokens_per_second: rates.tokens_per_second as f32,
            prefill_rate: rate(rates.prompt_token),
            decode_rate: rate(rates.gap),
            full_decode_rate: 0.0,
        }
    }
}

/// One request, counted for as long as it lives.
#[derive(Debug)]
pub struct Exchange {
    meter: Arc<Meter>,
    prompt_tokens: u32,
    began: Instant,
    /// When its last token came; `None` before the first.
    last: Option<Instant>,
}

impl Exchange {
    /// Estimated: the far side says the truth at the end only.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// The endpoint's work, this request included.
    pub fn load(&self) -> Load {
        self.meter.load()
    }

    /// It is over. Returns what is left.
    pub fn end(self) -> Load {
        let meter = self.meter.clone();
        drop(self);
        meter.load()
    }

    /// An event came, which was a token or not.
    pub fn observe(&mut self, is_token: bool, now: Instant) {
        self.meter.steps.fetch_add(1, Ordering::AcqRel);
        let mut rates = self.meter.rates();
        rates.last_event = Some(now);
        if !is_token {
            return;
        }
        rates.turn(now);
        rates.tokens += 1;
        match self.last.replace(now) {
            Some(last) => {
                let gap = now.saturating_duration_since(last).as_secs_f64();
                // Several at once have no gap between them, but not none at all.
                average(&mut rates.gap, gap.max(1e-6), GAP_WEIGHT);
            }
            None => {
                let waited = now.saturating_duration_since(self.began).as_secs_f64();
                let time = waited / f64::from(self.prompt_tokens.max(1));
                average(&mut rates.prompt_token, time.max(1e-9), FIRST_TOKEN_WEIGHT);
                self.meter.running.fetch_add(1, Ordering::AcqRel);
                self.meter.waiting.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let counter = if self.last.is_some() { &self.meter.running } else { &self.meter.waiting };
        counter.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_and_measured_as_they_go() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let meter = Arc::new(Meter::default());
        let engine = EngineId { node: Default::default(), index: 1, generation: 1 };
        let counts = |ms| {
            let pulse = meter.pulse(engine, at(ms));
            (pulse.load.waiting, pulse.load.running, pulse.step)
        };
        assert_eq!(meter.pulse(engine, at(0)).decode_rate, 0.0);
        let mut one = meter.begin(2, 50, at(0)).unwrap();
        let two = meter.begin(2, 50, at(0)).unwrap();
        assert!(meter.begin(2, 50, at(0)).is_none(), "bounded");
        assert_eq!(counts(0), (2, 0, 0));
        one.observe(false, at(50));
        assert_eq!(counts(50), (2, 0, 1), "a role is no token");
        one.observe(true, at(500));
        assert_eq!(counts(500), (1, 1, 2));
        one.observe(true, at(600));
        let pulse = meter.pulse(engine, at(1_600));
        assert!((pulse.prefill_rate - 100.0).abs() < 0.1, "{pulse:?}");
        assert!((pulse.decode_rate - 10.0).abs() < 0.1, "{pulse:?}");
        assert!(pulse.tokens_per_second > 1.0, "{pulse:?}");
        assert!(meter.has_progress(SECOND, at(1_500)) && !meter.has_progress(SECOND, at(1_700)));
        drop((one, two));
        assert_eq!(counts(3_000), (0, 0, 3));
        assert_eq!(meter.pulse(engine, at(5_000)).tokens_per_second, 0.0);
    }
}
