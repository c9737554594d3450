//! Is a peer alive, suspect, failed or gone? A state machine without a clock: `now` is an argument.
//!
//! - **Alive**: connected, and pulses arrive.
//! - **Suspect**: still connected, but [`SUSPECT_AFTER_MISSED`] pulses in a row are missing.
//! - **Failed**: the connection is gone.
//! - **Left**: it said goodbye.

use std::time::Duration;

use serde::{Deserialize, Serialize};

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
}
