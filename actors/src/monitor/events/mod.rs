//! What happens in the cluster, as this node sees it: the last events, and whoever follows them.
//!
//! Nothing is sent for it: each node watches what all nodes tell of themselves anyway ([`look`]), so any of them tells of
//! all. A follower has a place in the list and nothing else, so one that reads slowly costs nothing. One that has fallen
//! behind the oldest event that is kept loses its place to others at once, and is told so when it reads on.

mod look;
#[cfg(test)]
mod tests;
mod watching;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

pub(crate) use watching::EventWatcher;

/// Events that are kept.
const KEPT: usize = 1_024;
/// Whoever follows at a time. Fewer than commands may run at a time: following must not keep others out.
pub const MOST_FOLLOWERS: usize = 32;
/// Events that a follower gets at once.
const BATCH: usize = 64;
/// The longest text in an event, in characters: most come from other machines.
const LONGEST: usize = 500;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A node came, went, or fell silent.
    Node,
    /// A model on a node is in another state.
    Model,
    /// The registry of models changed.
    Registry,
    /// The default model is another one.
    Default,
    /// Answers went on elsewhere that entered at the node that tells this.
    Moved,
    /// What was here was dropped, because it became too much.
    Gap,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Greater than that of every event before it, those before the node's last start included.
    pub number: u64,
    /// When this node saw it: milliseconds since 1970.
    pub at_ms: u64,
    /// What it is about.
    pub kind: EventKind,
    /// The node that it happened on; of the registry the node that changed it.
    pub node: Option<String>,
    /// The model.
    pub model: Option<String>,
    /// What was before; missing where nothing was.
    pub from: Option<String>,
    /// What is now; missing where nothing is.
    pub to: Option<String>,
    /// Why, where somebody said so.
    pub why: Option<String>,
}

impl Event {
    /// An event that has not been told yet.
    fn new(kind: EventKind) -> Self {
        Self { number: 0, at_ms: 0, kind, node: None, model: None, from: None, to: None, why: None }
    }

    /// That there was more than is here; what follows has higher numbers.
    fn gap(number: u64, at_ms: u64) -> Self {
        let why = "events before this are no longer kept, or happened before this node was started".to_owned();
        Self { number, at_ms, why: Some(why), ..Self::new(EventKind::Gap) }
    }
}

/// Why a follower gets no more events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfollowed {
    /// It read too slowly.
    #[error("you read too slowly: {0} events are gone. Follow again with the last number that you have")]
    TooSlow(u64),
    /// The node ends.
    #[error("the node ends")]
    Ending,
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Event>,
    next: u64,
    followers: Vec<Weak<Place>>,
}

/// Where a follower is.
#[derive(Debug)]
struct Place {
    read: AtomicU64,
    /// `None` once it has fallen behind.
    held: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Kept {
    fn oldest(&self) -> u64 {
        self.events.front().map_or(self.next, |event| event.number)
    }

    /// The first events behind `number`.
    fn behind(&self, number: u64) -> Vec<Event> {
        let skipped = usize::try_from((number + 1).saturating_sub(self.oldest())).unwrap_or(usize::MAX);
        self.events.iter().skip(skipped).take(BATCH).cloned().collect()
    }
}

/// The last events of this node.
#[derive(Debug)]
pub struct EventLog {
    kept: Mutex<Kept>,
    changed: watch::Sender<u64>,
    places: Arc<Semaphore>,
    ended: CancellationToken,
}

impl EventLog {
    /// An empty log of a node that starts at `now_ms`: its numbers begin there, and so go on behind those of a run
    /// before it.
    pub(crate) fn new(now_ms: u64) -> Arc<Self> {
        Arc::new(Self {
            kept: Mutex::new(Kept { events: VecDeque::new(), next: now_ms.max(1), followers: Vec::new() }),
            changed: watch::Sender::new(0),
            places: Arc::new(Semaphore::new(MOST_FOLLOWERS)),
            ended: CancellationToken::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These happened.
    fn tell(&self, events: Vec<Event>, now_ms: u64) {
        if events.is_empty() {
            return;
        }
        let last = {
            let mut kept = self.lock();
            for mut event in events {
                if kept.events.len() >= KEPT {
                    kept.events.pop_front();
                }
                (event.number, event.at_ms) = (kept.next, now_ms);
                for text in [&mut event.node, &mut event.model, &mut event.from, &mut event.to, &mut event.why] {
                    *text = text.take().map(|text| text.chars().take(LONGEST).collect());
                }
                kept.next += 1;
                kept.events.push_back(event);
            }
            let oldest = kept.oldest();
            for place in kept.followers.iter().filter_map(Weak::upgrade) {
                if place.read.load(Ordering::Acquire) + 1 < oldest {
                    place.held.lock().unwrap_or_else(PoisonError::into_inner).take();
                }
            }
            kept.next
        };
        self.changed.send_replace(last);
    }

    /// Begins behind the event `since`, or with the oldest one. `None` where too many follow already.
    pub fn follow(self: &Arc<Self>, since: Option<u64>) -> Option<Follower> {
        let held = self.places.clone().try_acquire_owned().ok()?;
        let mut kept = self.lock();
        let read = AtomicU64::new(kept.oldest() - 1);
        let place = Arc::new(Place { read, held: Mutex::new(Some(held)) });
        kept.followers.retain(|place| place.strong_count() > 0);
        kept.followers.push(Arc::downgrade(&place));
        Some(Follower { log: self.clone(), changes: self.changed.subscribe(), since, read: None, place })
    }

    /// The node ends: so does following.
    pub(crate) fn end(&self) {
        self.ended.cancel();
    }
}

/// Somebody who follows what happens.
#[derive(Debug)]
pub struct Follower {
    log: Arc<EventLog>,
    changes: watch::Receiver<u64>,
    since: Option<u64>,
    /// The number of the last event that it has; `None` before the first.
    read: Option<u64>,
    place: Arc<Place>,
}

impl Follower {
    /// Some of the events that are there and that it does not have; none where it has all.
    pub fn ready(&mut self) -> Result<Vec<Event>, Unfollowed> {
        let kept = self.log.lock();
        let oldest = kept.oldest();
        let mut events = Vec::new();
        let read = match (self.read, self.since) {
            (Some(read), _) if read + 1 < oldest => return Err(Unfollowed::TooSlow(oldest - read - 1)),
            (Some(read), _) => read,
            // A number that was not given yet is one of before the clock was put back.
            (None, Some(since)) if since >= kept.next || since + 1 < oldest => {
                let at_ms = kept.events.front().map_or(0, |event| event.at_ms);
                events.push(Event::gap(oldest - 1, at_ms));
                oldest - 1
            }
            (None, Some(since)) => since,
            (None, None) => oldest - 1,
        };
        events.extend(kept.behind(read));
        let last = events.last().map_or(read, |event| event.number);
        self.place.read.store(last, Ordering::Release);
        self.read = Some(last);
        Ok(events)
    }

    /// The next events. Loses nothing where it is dropped before its end.
    pub async fn next(&mut self) -> Result<Vec<Event>, Unfollowed> {
        loop {
            self.changes.mark_unchanged();
            let events = self.ready()?;
            if !events.is_empty() {
                return Ok(events);
            }
            let ended = self.log.ended.clone();
            tokio::select! {
                () = ended.cancelled() => return Err(Unfollowed::Ending),
                changed = self.changes.changed() => changed.map_err(|_| Unfollowed::Ending)?,
            }
        }
    }
}
