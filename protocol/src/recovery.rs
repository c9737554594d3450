//! When a request breaks: may it be tried again, may its answer go on elsewhere, and who is left alone for a while?
//! State machines without a clock: `now` is a time since any fixed start.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::wire::v2::{Failed, FailureKind, Refused};

/// Tries of one request on other nodes while nothing of its answer was delivered.
pub const MOST_RETRIES: u32 = 2;
/// Moves of one answer that has begun. Each needs another worker, so that this bounds a bad day, not a household.
pub const MOST_MIGRATIONS: u32 = 8;

/// Engines that may die with a request on them before it is suspected to be the reason.
pub const MOST_DEATHS: u32 = 2;

/// What becomes of a request whose attempt broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextMove {
    /// Try the whole request on another node.
    Retry,
    /// Go on behind the delivered tokens on another node.
    Migrate,
    /// Tell the client.
    GiveUp,
}

/// Where a request stands when an attempt breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Tokens that the client has.
    pub delivered: u32,
    /// Tries so far beyond the first.
    pub retries: u32,
    /// Moves so far.
    pub migrations: u32,
    /// Engines that died with it. What kills one engine after the other must not go through the whole house.
    pub deaths: u32,
}

impl Standing {
    fn next(self) -> NextMove {
        match self.delivered {
            _ if self.deaths >= MOST_DEATHS => NextMove::GiveUp,
            0 if self.retries < MOST_RETRIES => NextMove::Retry,
            1.. if self.migrations < MOST_MIGRATIONS => NextMove::Migrate,
            _ => NextMove::GiveUp,
        }
    }

    /// After a refusal. What is wrong with the request itself is wrong everywhere.
    pub fn after_refusal(self, refused: &Refused) -> NextMove {
        if refused.kind.is_retryable() { self.next() } else { NextMove::GiveUp }
    }

    /// After a failure.
    pub fn after_failure(self, failed: &Failed) -> NextMove {
        let possible = if self.delivered == 0 { failed.retryable || failed.migratable } else { failed.migratable };
        if possible { self.next() } else { NextMove::GiveUp }
    }
}

/// Does this failure speak against the worker?
pub fn is_fault_of_worker(kind: FailureKind) -> bool {
    match kind {
        FailureKind::EngineDied
        | FailureKind::EngineError
        | FailureKind::ConnectionLost
        | FailureKind::WorkerSilent
        | FailureKind::Protocol => true,
        FailureKind::DeadlineExceeded | FailureKind::ReaderTooSlow | FailureKind::ShuttingDown => false,
    }
}

/// How many requests may be tried again: [`Self::RESERVE`], and a tenth of the requests of the last ten seconds. When
/// everything breaks at once, retries must not double the load.
#[derive(Debug, Clone, Default)]
pub struct RetryBudget {
    requests: VecDeque<(u64, u32)>,
    retries: VecDeque<(u64, u32)>,
}

impl RetryBudget {
    /// Retries that are always there.
    pub const RESERVE: u32 = 10;
    /// Seconds that count.
    const WINDOW: u64 = 10;

    fn count(list: &mut VecDeque<(u64, u32)>, second: u64) {
        match list.back_mut() {
            Some((at, count)) if *at == second => *count = count.saturating_add(1),
            _ => list.push_back((second, 1)),
        }
    }

    fn sum(list: &mut VecDeque<(u64, u32)>, second: u64) -> u32 {
        while list.front().is_some_and(|(at, _)| at + Self::WINDOW <= second) {
            list.pop_front();
        }
        list.iter().map(|(_, count)| *count).fold(0, u32::saturating_add)
    }

    /// A request has come.
    pub fn request(&mut self, now: Duration) {
        Self::sum(&mut self.requests, now.as_secs());
        Self::count(&mut self.requests, now.as_secs());
    }

    /// Spends a retry, if there is one.
    pub fn try_retry(&mut self, now: Duration) -> bool {
        let second = now.as_secs();
        let most = Self::RESERVE.saturating_add(Self::sum(&mut self.requests, second) / 10);
        let allowed = Self::sum(&mut self.retries, second) < most;
        if allowed {
            Self::count(&mut self.retries, second);
        }
        allowed
    }
}

/// Leaves a model on a node alone that failed several times in a row, longer each time, and then tries it with one
/// request.
#[derive(Debug, Clone, Default)]
pub struct CircuitBreaker {
    failures: u32,
    /// Times it opened without a success in between.
    openings: u32,
    open_until: Option<Duration>,
    /// The one request that tries it, since when.
    probing: Option<Duration>,
    why: String,
}

/// Where a circuit breaker stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Circuit {
    /// Requests go there.
    Closed,
    /// No requests go there.
    Open {
        /// The last failure.
        why: String,
        /// For how long still, in milliseconds.
        for_ms: u64,
    },
    /// One request tries it.
    HalfOpen {
        /// The last failure.
        why: String,
    },
}

impl CircuitBreaker {
    /// Failures in a row that open it.
    pub const FAILURES: u32 = 5;
    const SHORTEST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);
    /// A request that tries it and says nothing for so long counts no more.
    const PROBE_LIMIT: Duration = Duration::from_secs(30);

    /// A request may go there now.
    pub fn allows(&self, now: Duration) -> bool {
        match self.open_until {
            None => true,
            Some(until) => {
                let probing = self.probing.is_some_and(|since| now.saturating_sub(since) < Self::PROBE_LIMIT);
                now >= until && !probing
            }
        }
    }

    /// A request goes there.
    pub fn sent(&mut self, now: Duration) {
        if self.open_until.is_some() {
            self.probing = Some(now);
        }
    }

    /// An answer came: a token, an end, or a refusal that shows that somebody is there.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// An attempt broke there.
    pub fn failed(&mut self, why: &str, now: Duration) {
        self.why = why.chars().take(200).collect();
        self.failures = self.failures.saturating_add(1);
        let was_probe = self.probing.take().is_some();
        if self.failures < Self::FAILURES && !was_probe {
            return;
        }
        if self.open_until.is_some_and(|until| now < until) {
            // Those that were under way when it opened say nothing new.
            return;
        }
        let pause = (Self::SHORTEST * (1 << self.openings.min(5))).min(Self::LONGEST);
        self.openings = self.openings.saturating_add(1);
        self.open_until = Some(now + pause);
    }

    /// Where it stands.
    pub fn circuit(&self, now: Duration) -> Circuit {
        match self.open_until {
            None => Circuit::Closed,
            Some(until) if now < until => {
                let for_ms = u64::try_from((until - now).as_millis()).unwrap_or(u64::MAX);
                Circuit::Open { why: self.why.clone(), for_ms }
            }
            Some(_) => Circuit::HalfOpen { why: self.why.clone() },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::v2::RefusalKind;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn failed(retryable: bool, migratable: bool) -> Failed {
        Failed { kind: FailureKind::EngineDied, message: String::new(), retryable, migratable }
    }

    #[test]
    fn before_the_first_token_it_is_tried_again_and_after_it_moved() {
        let fresh = Standing { delivered: 0, retries: 0, migrations: 0, deaths: 0 };
        let begun = Standing { delivered: 1, ..fresh };
        assert_eq!(fresh.after_failure(&failed(true, true)), NextMove::Retry);
        assert_eq!(begun.after_failure(&failed(false, true)), NextMove::Migrate);
        assert_eq!(begun.after_failure(&failed(true, false)), NextMove::GiveUp, "what was delivered is not said twice");
        assert_eq!(Standing { deaths: 2, ..begun }.after_failure(&failed(true, true)), NextMove::GiveUp);
        assert_eq!(Standing { retries: 2, ..fresh }.after_failure(&failed(true, true)), NextMove::GiveUp);
        let refused = |kind| Refused { kind, message: String::new(), param: None, retry_after_ms: None };
        assert_eq!(fresh.after_refusal(&refused(RefusalKind::Busy)), NextMove::Retry);
        assert_eq!(fresh.after_refusal(&refused(RefusalKind::InvalidField)), NextMove::GiveUp);
        assert_eq!(begun.after_refusal(&refused(RefusalKind::Draining)), NextMove::Migrate);
    }

    #[test]
    fn the_reserve_and_a_tenth_of_the_last_ten_seconds() {
        let mut budget = RetryBudget::default();
        assert_eq!((0..20).filter(|_| budget.try_retry(s(0))).count(), 10);
        (0..100).for_each(|_| budget.request(s(5)));
        assert_eq!((0..20).filter(|_| budget.try_retry(s(5))).count(), 10, "a tenth of a hundred");
        // The first ones are forgotten, the requests still count.
        assert_eq!((0..40).filter(|_| budget.try_retry(s(10))).count(), 10);
        assert_eq!((0..40).filter(|_| budget.try_retry(s(60))).count(), 10);
    }

    #[test]
    fn a_circuit_opens_after_failures_in_a_row_and_one_request_tries_it() {
        let mut breaker = CircuitBreaker::default();
        for _ in 0..CircuitBreaker::FAILURES - 1 {
            breaker.failed("it died", s(0));
        }
        assert!(breaker.allows(s(0)));
        breaker.failed("it died", s(0));
        assert!(!breaker.allows(s(0)));
        assert!(matches!(breaker.circuit(s(0)), Circuit::Open { for_ms: 1_000, .. }));
        // One that was under way when it opened does not make it longer.
        breaker.failed("it died", s(0));
        assert!(breaker.allows(s(1)));
        breaker.sent(s(1));
        assert!(!breaker.allows(s(1)), "one at a time");
        breaker.failed("still dead", s(1));
        assert!(!breaker.allows(s(2)) && breaker.allows(s(3)), "twice as long the second time");
        breaker.sent(s(3));
        breaker.succeeded();
        assert!(breaker.allows(s(3)));
        assert_eq!(breaker.circuit(s(3)), Circuit::Closed);
        breaker.failed("once", s(4));
        assert!(breaker.allows(s(4)));
    }

    proptest! {
        #[test]
        fn a_circuit_never_stays_open_for_good(events in proptest::collection::vec((0..3u8, 0..5_000u64), 0..200)) {
            let mut breaker = CircuitBreaker::default();
            let mut now = Duration::ZERO;
            for (event, pause) in events {
                now += Duration::from_millis(pause);
                match event {
                    0 => breaker.failed("why", now),
                    1 if breaker.allows(now) => breaker.sent(now),
                    1 => {}
                    _ => breaker.succeeded(),
                }
            }
            prop_assert!(breaker.allows(now + s(61)));
        }
    }
}
