//! How many requests a far side takes at once, learnt from its refusals: fewer after one, more as it goes well. Until
//! it refuses for lack of room, nothing holds requests back here: most servers have queues of their own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

/// What is left after a refusal of what was there.
const SHRINK: f64 = 0.7;
/// The longest pause that is kept; then one request tries it. Nobody's clock should shut a server out for a day.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The gate in front of one endpoint.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    /// Somebody may get in: a place is free, the limit grew, or a pause ended.
    opened: Notify,
    /// A pause began, or became longer.
    paused: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that are at the far side.
    inside: u32,
    /// How many may be; `None` until it refused one.
    limit: Option<f64>,
    /// When the limit was last made smaller: refusals of what was sent before are about the limit before.
    shrunk: Option<Instant>,
    closed_until: Option<Instant>,
}

impl State {
    fn pause_end(&self, now: Instant) -> Option<Instant> {
        self.closed_until.filter(|until| *until > now)
    }

    /// As a whole number, at least one.
    fn whole(&self) -> Option<u32> {
        self.limit.map(|limit| limit.max(1.0) as u32)
    }

    fn has_room(&self, now: Instant) -> bool {
        self.pause_end(now).is_none() && self.whole().is_none_or(|limit| self.inside < limit)
    }
}

/// A request that is at the far side, for as long as it lives.
#[derive(Debug)]
pub struct Inside {
    gate: Arc<Gate>,
    since: Instant,
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.inside -= 1;
        drop(state);
        self.gate.opened.notify_one();
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_enter(self: &Arc<Self>, now: Instant) -> Result<Inside, Option<Instant>> {
        let mut state = self.state();
        if !state.has_room(now) {
            return Err(state.pause_end(now));
        }
        state.inside += 1;
        let more = state.has_room(now);
        drop(state);
        if more {
            // One word may have come for several free places.
            self.opened.notify_one();
        }
        Ok(Inside { gate: self.clone(), since: now })
    }

    /// Waits for its turn. Whoever waits here has a deadline of its own.
    pub async fn enter(self: &Arc<Self>) -> Inside {
        loop {
            let opened = self.opened.notified();
            match self.try_enter(Instant::now()) {
                Ok(inside) => return inside,
                Err(None) => opened.await,
                Err(Some(end)) => tokio::select! {
                    () = opened => {}
                    () = sleep_until(end.into()) => {}
                },
            }
        }
    }

    /// The far side had no room for this request; `pause` is what it asks to be left alone for. True where the limit
    /// or the pause changed.
    pub fn refused(&self, request: &Inside, pause: Option<Duration>, now: Instant) -> bool {
        let mut state = self.state();
        let before = (state.whole(), state.closed_until);
        if state.shrunk.is_none_or(|shrunk| request.since > shrunk) {
            let there = f64::from(state.inside).min(state.limit.unwrap_or(f64::MAX));
            state.limit = Some((there * SHRINK).max(1.0));
            state.shrunk = Some(now);
        }
        if let Some(pause) = pause.filter(|pause| !pause.is_zero()) {
            let until = now + pause.min(LONGEST_PAUSE);
            state.closed_until = state.closed_until.max(Some(until));
            self.paused.notify_one();
        }
        (state.whole(), state.closed_until) != before
    }

    /// A request was answered to its end. True where one more fits from now on.
    pub fn went_well(&self) -> bool {
        let mut state = self.state();
        let (Some(limit), Some(before)) = (state.limit, state.whole()) else { return false };
        // Who never has as many has learnt nothing about more.
        if state.inside < before {
            return false;
        }
        state.limit = Some(limit + 1.0 / limit);
        let grown = state.whole() != Some(before);
        drop(state);
        if grown {
            self.opened.notify_one();
        }
        grown
    }

    /// More than one request is there.
    pub fn has_others(&self) -> bool {
        self.state().inside > 1
    }

    /// Requests that it takes at once, as far as was learnt.
    pub fn limit(&self) -> Option<u32> {
        self.state().whole()
    }

    /// For how long it is to be left alone.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        self.state().pause_end(now).map(|until| until - now)
    }

    /// Waits until a pause has begun and ended.
    pub async fn reopened(&self) {
        loop {
            let paused = self.paused.notified();
            let end = self.state().pause_end(Instant::now());
            match end {
                None => paused.await,
                Some(end) => {
                    sleep_until(end.into()).await;
                    if self.pause(Instant::now()).is_none() {
                        self.opened.notify_one();
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(gate: &Arc<Gate>, now: Instant) -> Option<Inside> {
        gate.try_enter(now).ok()
    }

    #[test]
    fn a_refusal_makes_it_smaller_once_and_success_larger_again() {
        let (gate, start) = (Arc::new(Gate::default()), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let mut inside: Vec<Inside> = (0..10).filter_map(|_| enter(&gate, at(0))).collect();
        assert_eq!((inside.len(), gate.limit()), (10, None), "nothing is held back before a refusal");
        assert!(gate.refused(&inside[9], None, at(5)));
        assert_eq!(gate.limit(), Some(7));
        assert!(!gate.refused(&inside[8], None, at(6)), "sent before the limit was made smaller");
        inside.truncate(7);
        assert!(enter(&gate, at(7)).is_none());
        // As many as there may be go well: about one more for each round of them.
        let grown = (0..8).filter(|_| gate.went_well()).count();
        assert_eq!((grown, gate.limit()), (1, Some(8)));
        let eighth = enter(&gate, at(8)).unwrap();
        assert!(enter(&gate, at(8)).is_none());
        drop(inside);
        assert!(!gate.went_well(), "few at once say nothing about many");
        // Again and again: one always gets in.
        drop(eighth);
        for ms in (10..40).step_by(2) {
            let one = enter(&gate, at(ms)).unwrap();
            gate.refused(&one, None, at(ms + 1));
        }
        assert_eq!(gate.limit(), Some(1));
    }

    #[test]
    fn nobody_gets_in_while_it_asks_to_be_left_alone() {
        let (gate, start) = (Arc::new(Gate::default()), Instant::now());
        let one = enter(&gate, start).unwrap();
        assert!(gate.refused(&one, Some(Duration::from_secs(7)), start));
        drop(one);
        assert!(enter(&gate, start + Duration::from_secs(6)).is_none());
        assert_eq!(gate.pause(start + Duration::from_secs(6)), Some(Duration::from_secs(1)));
        let one = enter(&gate, start + Duration::from_secs(7)).unwrap();
        // A shorter pause does not end a longer one, and none lasts for ever.
        assert!(gate.refused(&one, Some(Duration::from_secs(9_999)), start + Duration::from_secs(7)));
        assert!(gate.pause(start + Duration::from_secs(7)).unwrap() <= LONGEST_PAUSE);
    }

    #[tokio::test]
    async fn who_waits_gets_in_when_a_place_or_the_pause_is_over() {
        let gate = Arc::new(Gate::default());
        let one = gate.enter().await;
        gate.refused(&one, Some(Duration::from_millis(50)), Instant::now());
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await }
        });
        gate.reopened().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished(), "the only place is taken");
        drop(one);
        let two = tokio::time::timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap();
        drop(two);
        assert_eq!(gate.state().inside, 0);
    }
}
