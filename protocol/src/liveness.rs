//! Is a peer alive, suspect, failed or gone? A state machine without a clock: `now` is an argument.
//!
//! - **Alive**: connected, and pulses arrive.
//! - **Suspect**: still connected, but [`SUSPECT_AFTER_MISSED`] pulses in a row are missing.
//! - **Failed**: the connection is gone.
//! - **Left**: it said goodbye.
//!
//! And is an engine stuck? It is under suspicion while its process says nothing, and while it is busy and its step
//! counter stands still for far longer than such a step takes. Chunks of prompts count as steps and waiting is no
//! work, so neither a long prompt nor a queue looks like a hang.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::wire::v2::EnginePulse;

/// How often a node tells its peers how its engines are.
pub const PULSE_INTERVAL: Duration = Duration::from_millis(100);
/// After so many missing pulses a peer gets no new requests.
pub const SUSPECT_AFTER_MISSED: u32 = 5;

/// What is known of a peer's health, with why where there is a reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Health {
    /// Connected, pulses arrive.
    Alive,
    /// Connected but silent.
    Suspect {
        /// What is missing.
        why: String,
    },
    /// Not connected.
    Failed {
        /// How the connection ended, or why none came about.
        why: String,
    },
    /// The node said that it goes.
    Left {
        /// What it said.
        why: String,
    },
}

impl Health {
    /// The one word for tables.
    pub fn word(&self) -> &'static str {
        match self {
            Health::Alive => "alive",
            Health::Suspect { .. } => "suspect",
            Health::Failed { .. } => "failed",
            Health::Left { .. } => "left",
        }
    }

    /// Why it is not alive; empty when it is.
    pub fn why(&self) -> &str {
        match self {
            Health::Alive => "",
            Health::Suspect { why } | Health::Failed { why } | Health::Left { why } => why,
        }
    }
}

#[derive(Debug, Clone)]
enum Link {
    Up { last_pulse: Duration },
    Lost { why: String },
    Left { why: String },
}

/// Follows one peer. Times are durations since any fixed start, the same for every call.
#[derive(Debug, Clone)]
pub struct PeerWatch {
    link: Link,
    heard: Option<Duration>,
}

impl Default for PeerWatch {
    /// A peer that is known by name only.
    fn default() -> Self {
        Self { link: Link::Lost { why: "not reached yet".into() }, heard: None }
    }
}

impl PeerWatch {
    /// A connection stands; the first pulse is due from now on.
    pub fn connected(&mut self, now: Duration) {
        self.link = Link::Up { last_pulse: now };
        self.heard = Some(now);
    }

    /// A pulse, or anything else the peer said by itself, arrived.
    pub fn pulse(&mut self, now: Duration) {
        if let Link::Up { last_pulse } = &mut self.link {
            *last_pulse = now;
        }
        self.heard = Some(now);
    }

    /// The connection is gone. What was said on leaving is kept.
    pub fn lost(&mut self, why: impl Into<String>) {
        if !matches!(self.link, Link::Left { .. }) {
            self.link = Link::Lost { why: why.into() };
        }
    }

    /// The peer said goodbye.
    pub fn left(&mut self, why: impl Into<String>) {
        self.link = Link::Left { why: why.into() };
    }

    /// The peer's health at `now`.
    pub fn health(&self, now: Duration) -> Health {
        match &self.link {
            Link::Up { last_pulse } => {
                let silent = now.saturating_sub(*last_pulse);
                if silent >= PULSE_INTERVAL * SUSPECT_AFTER_MISSED {
                    Health::Suspect { why: format!("no pulse for {} ms", silent.as_millis()) }
                } else {
                    Health::Alive
                }
            }
            Link::Lost { why } => Health::Failed { why: why.clone() },
            Link::Left { why } => Health::Left { why: why.clone() },
        }
    }

    /// How old the newest word of this peer is, if there ever was one.
    pub fn age(&self, now: Duration) -> Option<Duration> {
        self.heard.map(|heard| now.saturating_sub(heard))
    }
}

/// An engine that is silent, or busy without a step, is under suspicion after this long at the earliest.
pub const STUCK_AFTER: Duration = Duration::from_millis(500);
/// And no sooner than after so many times the usual time of such a step.
pub const STUCK_AFTER_STEPS: u32 = 10;

/// Follows one engine by its pulses. Times as for [`PeerWatch`].
#[derive(Debug, Clone, Default)]
pub struct EngineWatch {
    last: Option<Observed>,
}

#[derive(Debug, Clone, Copy)]
struct Observed {
    generation: u32,
    step: u64,
    busy: bool,
    usual: Duration,
    silent: Duration,
    /// When it last made a step, or had nothing to do.
    moved_at: Duration,
}

impl EngineWatch {
    /// A pulse of the engine, new or the same again.
    pub fn observe(&mut self, pulse: &EnginePulse, now: Duration) {
        let generation = pulse.engine.generation;
        let stands = self
            .last
            .filter(|last| pulse.busy && last.busy && last.generation == generation && last.step == pulse.step);
        self.last = Some(Observed {
            generation,
            step: pulse.step,
            busy: pulse.busy,
            usual: Duration::from_millis(pulse.usual_step_ms.into()),
            silent: Duration::from_millis(pulse.silent_ms.into()),
            moved_at: stands.map_or(now, |last| last.moved_at),
        });
    }

    /// Why the engine is under suspicion at `now`, if it is.
    pub fn suspicion(&self, now: Duration) -> Option<String> {
        let last = self.last?;
        if last.silent >= STUCK_AFTER {
            return Some(format!("its engine process has said nothing for {} ms", last.silent.as_millis()));
        }
        let still = now.saturating_sub(last.moved_at);
        let limit = STUCK_AFTER.max(last.usual * STUCK_AFTER_STEPS);
        (last.busy && still >= limit).then(|| {
            let (still, usual) = (still.as_millis(), last.usual.as_millis());
            format!("its engine has been in one step for {still} ms, which usually takes {usual} ms")
        })
    }

    /// For how long it has been in one step.
    pub fn in_step_for(&self, now: Duration) -> Duration {
        self.last.filter(|last| last.busy).map_or(Duration::ZERO, |last| now.saturating_sub(last.moved_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn five_missing_pulses_make_a_suspect_and_one_pulse_heals_it() {
        let mut peer = PeerWatch::default();
        assert_eq!(peer.health(ms(0)).word(), "failed");
        peer.connected(ms(0));
        assert_eq!(peer.health(ms(499)), Health::Alive);
        assert_eq!(peer.health(ms(500)).word(), "suspect");
        peer.pulse(ms(700));
        assert_eq!(peer.health(ms(1_100)), Health::Alive);
        assert_eq!(peer.age(ms(1_100)), Some(ms(400)));
    }

    #[test]
    fn a_goodbye_outlives_the_connection_that_carried_it() {
        let mut peer = PeerWatch::default();
        peer.connected(ms(0));
        peer.left("shutting down");
        peer.lost("connection closed");
        assert_eq!(peer.health(ms(10)), Health::Left { why: "shutting down".into() });
        peer.connected(ms(20));
        assert_eq!(peer.health(ms(20)), Health::Alive);
        peer.lost("timed out");
        assert_eq!(peer.health(ms(21)), Health::Failed { why: "timed out".into() });
        // Late pulses of a lost connection do not bring it back.
        peer.pulse(ms(22));
        assert_eq!(peer.health(ms(22)).word(), "failed");
    }

    fn engine(step: u64, busy: bool, usual_step_ms: u32, silent_ms: u32) -> EnginePulse {
        let engine = crate::EngineId { node: crate::NodeId([1; 16]), index: 0, generation: 1 };
        let load = crate::wire::v2::Load { running: 3, waiting: 9, backlog_tokens: 0 };
        let (tokens_per_second, prefill_rate, decode_rate, full_decode_rate) = (0.0, 0.0, 0.0, 0.0);
        EnginePulse {
            engine,
            step,
            busy,
            usual_step_ms,
            silent_ms,
            load,
            tokens_per_second,
            prefill_rate,
            decode_rate,
            full_decode_rate,
        }
    }

    #[test]
    fn a_busy_engine_whose_counter_stands_still_is_stuck_and_a_step_heals_it() {
        let mut watch = EngineWatch::default();
        assert_eq!(watch.suspicion(ms(0)), None);
        watch.observe(&engine(5, true, 20, 0), ms(0));
        watch.observe(&engine(5, true, 20, 0), ms(400));
        assert_eq!(watch.suspicion(ms(499)), None);
        assert!(watch.suspicion(ms(500)).unwrap().contains("in one step for 500 ms"));
        watch.observe(&engine(6, true, 20, 0), ms(600));
        assert_eq!(watch.suspicion(ms(1_000)), None);
    }

    #[test]
    fn a_long_chunk_a_queue_and_idleness_are_no_hang() {
        let mut watch = EngineWatch::default();
        for now in (0..3_000).step_by(100) {
            watch.observe(&engine(5, true, 300, 0), ms(now));
            assert_eq!(watch.suspicion(ms(now)), None, "ten times 300 ms are not over at {now} ms");
        }
        watch.observe(&engine(5, true, 300, 0), ms(3_000));
        assert!(watch.suspicion(ms(3_000)).is_some());
        let mut idle = EngineWatch::default();
        for now in (0..60_000).step_by(100) {
            idle.observe(&engine(5, false, 20, 0), ms(now));
            assert_eq!(idle.suspicion(ms(now)), None);
        }
        // The time in which it had nothing to do does not count when it begins to work.
        idle.observe(&engine(5, true, 20, 0), ms(60_000));
        assert_eq!(idle.suspicion(ms(60_400)), None);
    }

    #[test]
    fn a_process_that_says_nothing_is_under_suspicion_also_when_it_was_idle() {
        let mut watch = EngineWatch::default();
        watch.observe(&engine(5, false, 20, 499), ms(0));
        assert_eq!(watch.suspicion(ms(0)), None);
        watch.observe(&engine(5, false, 20, 600), ms(100));
        assert!(watch.suspicion(ms(100)).unwrap().contains("said nothing"));
        // A process that was started again begins anew.
        let mut pulse = engine(5, true, 20, 0);
        pulse.engine.generation = 2;
        watch.observe(&pulse, ms(200));
        assert_eq!(watch.suspicion(ms(600)), None);
    }
}
