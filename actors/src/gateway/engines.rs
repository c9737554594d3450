//! What this router knows of each engine beyond what the engine says: its own requests there, whether it can be
//! trusted now, what it has read.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ingle_protocol::liveness::EngineWatch;
use ingle_protocol::prefix::PrefixMemory;
use ingle_protocol::recovery::{Circuit, CircuitBreaker};
use ingle_protocol::wire::v2::EnginePulse;
use ingle_protocol::{EngineId, NodeId};
use tokio::sync::watch;

/// One engine. Times are durations since the router's start.
#[derive(Debug)]
pub(super) struct Engine {
    in_flight: AtomicU32,
    /// Estimated tokens of prompts that were sent there and have no first token yet.
    unread: AtomicU32,
    known: Mutex<Known>,
    suspicion: watch::Sender<Option<String>>,
}

#[derive(Debug, Default)]
struct Known {
    watch: EngineWatch,
    breaker: CircuitBreaker,
    prefixes: PrefixMemory,
    generation: u32,
    /// Requests of this router there at the last looks, which its pulse may still count.
    lately: [u32; 6],
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            unread: AtomicU32::new(0),
            known: Mutex::default(),
            suspicion: watch::Sender::new(None),
        }
    }
}

impl Engine {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests of this router there.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Requests of others there, where its pulse counts `counted` in all. A pulse is a moment old: what it counts may
    /// be ours that have ended meanwhile.
    pub fn of_others(&self, counted: u32) -> u32 {
        let ours = self.known().lately.iter().copied().max().unwrap_or(0).max(self.in_flight());
        counted.saturating_sub(ours)
    }

    /// See the field.
    pub fn unread(&self) -> u32 {
        self.unread.load(Ordering::Acquire)
    }

    /// Why it gets no new requests and loses those that it has, while it is so.
    pub fn suspicion(&self) -> Option<String> {
        self.suspicion.borrow().clone()
    }

    /// Tells of every change of [`Self::suspicion`].
    pub fn watch_suspicion(&self) -> watch::Receiver<Option<String>> {
        self.suspicion.subscribe()
    }

    /// Looks at it: `peer` is what is wrong with its node, if anything is.
    pub fn look(&self, pulse: Option<&EnginePulse>, peer: Option<String>, now: Duration) {
        let suspicion = {
            let mut known = self.known();
            known.lately.rotate_right(1);
            known.lately[0] = self.in_flight();
            if let Some(pulse) = pulse {
                if pulse.engine.generation != known.generation {
                    // A new process knows nothing of what the old one had read, nor has it failed yet.
                    *known = Known { generation: pulse.engine.generation, ..Known::default() };
                }
                known.watch.observe(pulse, now);
            }
            peer.or_else(|| known.watch.suspicion(now))
        };
        self.suspicion.send_if_modified(|standing| {
            let changed = standing.is_some() != suspicion.is_some();
            if changed {
                *standing = suspicion;
            }
            changed
        });
    }

    /// Its circuit breaker lets a request through.
    pub fn is_allowed(&self, now: Duration) -> bool {
        self.known().breaker.allows(now)
    }

    /// Where its circuit breaker stands.
    pub fn circuit(&self, now: Duration) -> Circuit {
        self.known().breaker.circuit(now)
    }

    /// Bytes of this conversation's beginning that it has probably read.
    pub fn known_bytes(&self, beginnings: &[(u64, u32)]) -> u32 {
        self.known().prefixes.known_bytes(beginnings)
    }

    /// An answer goes well there.
    pub fn succeeded(&self, beginnings: &[(u64, u32)]) {
        let mut known = self.known();
        known.breaker.succeeded();
        known.prefixes.remember(beginnings);
    }

    /// An attempt broke there, by its fault.
    pub fn failed(&self, why: &str, now: Duration) {
        self.known().breaker.failed(why, now);
    }
}

/// A request at an engine, for as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    engine: Arc<Engine>,
    unread: u32,
}

impl Place {
    /// One more request there, whose prompt has about so many tokens that it has not read before.
    pub fn take(engine: &Arc<Engine>, unread: u32, now: Duration) -> Self {
        engine.in_flight.fetch_add(1, Ordering::AcqRel);
        engine.unread.fetch_add(unread, Ordering::AcqRel);
        engine.known().breaker.sent(now);
        Self { engine: engine.clone(), unread }
    }

    /// Its prompt has been read.
    pub fn is_read(&mut self) {
        self.engine.unread.fetch_sub(std::mem::take(&mut self.unread), Ordering::AcqRel);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.is_read();
        self.engine.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All engines, an engine being a node's n-th.
#[derive(Debug, Default)]
pub(super) struct Engines(Mutex<HashMap<(NodeId, u16), Arc<Engine>>>);

impl Engines {
    /// The engine, known or new.
    pub fn of(&self, id: EngineId) -> Arc<Engine> {
        let mut engines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        engines.entry((id.node, id.index)).or_default().clone()
    }

    /// Forgets those that nobody speaks of any more.
    pub fn keep(&self, ids: &HashSet<(NodeId, u16)>) {
        let mut engines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        engines.retain(|id, engine| ids.contains(id) || engine.in_flight() > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_while_it_lives_and_its_prompt_until_it_is_read() {
        let engine = Arc::new(Engine::default());
        let mut place = Place::take(&engine, 300, Duration::ZERO);
        let other = Place::take(&engine, 40, Duration::ZERO);
        assert_eq!((engine.in_flight(), engine.unread()), (2, 340));
        place.is_read();
        place.is_read();
        assert_eq!((engine.in_flight(), engine.unread()), (2, 40));
        drop((place, other));
        assert_eq!((engine.in_flight(), engine.unread()), (0, 0));
    }

    #[test]
    fn a_suspicion_is_told_when_it_comes_and_when_it_goes() {
        let engine = Engine::default();
        let mut told = engine.watch_suspicion();
        engine.look(None, None, Duration::ZERO);
        assert!(!told.has_changed().unwrap());
        engine.look(None, Some("no pulse".into()), Duration::ZERO);
        assert_eq!(told.borrow_and_update().as_deref(), Some("no pulse"));
        // The same once more is no news.
        engine.look(None, Some("no pulse for longer".into()), Duration::ZERO);
        assert!(!told.has_changed().unwrap());
        engine.look(None, None, Duration::ZERO);
        assert_eq!(*told.borrow_and_update(), None);
    }
}
