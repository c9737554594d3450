//! Who may go to a model's workers now, who waits, who is sent away? Pure: `now` is a time since any fixed start.
//!
//! Waiting is bounded in estimated tokens. Between principals it is fair (start-time fair queueing, Goyal and others
//! 1996): each has a virtual time that grows by what its requests cost, and the one that is furthest behind goes
//! first. So a script with five hundred requests delays a person by one request, not by five hundred. Within a
//! principal the higher priority goes first; between principals a higher priority makes a request cheaper.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use crate::wire::v2::Priority;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Chosen by the caller, never twice.
    pub id: u64,
    /// On whose behalf.
    pub principal: String,
    /// Its place among others.
    pub priority: Priority,
    /// Estimated tokens, prompt and answer together.
    pub tokens: u64,
    /// How long an answer is still worth something.
    pub deadline: Duration,
}

/// What the model's workers can take together, as this gateway sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Requests that may be at the workers.
    pub in_flight: u32,
    /// Estimated tokens that may be at the workers; one request is let through in any case.
    pub in_flight_tokens: u64,
    /// Estimated tokens that may wait.
    pub queued_tokens: u64,
    /// Requests that may wait.
    pub queued: u32,
    /// What the workers compute in a second, for estimates.
    pub tokens_per_second: f64,
    /// Estimated tokens a minute of one principal; `None` for as many as there is room for.
    pub quota_per_minute: Option<u64>,
}

/// Why a request is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// The principal has more than its share (HTTP 429).
    Quota {
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// There is no room (HTTP 503).
    Capacity {
        /// When it is worth trying again.
        retry_after: Duration,
    },
}

/// The answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It goes now.
    Go,
    /// It waits; [`AdmissionQueue::admit`] will name it.
    Wait {
        /// How long, probably.
        eta: Duration,
    },
    /// It is sent away.
    Reject(Rejection),
}

/// The most principals whose accounts are kept.
const MOST_PRINCIPALS: usize = 4_096;
/// Bounds of what a client is told to wait.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

fn weight(priority: Priority) -> f64 {
    match priority {
        Priority::Background => 0.25,
        Priority::Normal => 1.0,
        Priority::Interactive => 4.0,
    }
}

#[derive(Debug, Default)]
struct Account {
    virtual_time: f64,
    /// By priority, each first come first served.
    waiting: [VecDeque<Ask>; 3],
    waiting_tokens: u64,
    running: u32,
    /// What is left of its quota, as of when.
    allowance: Option<(f64, Duration)>,
}

impl Account {
    fn first(&self) -> Option<&Ask> {
        self.waiting.iter().rev().find_map(VecDeque::front)
    }

    fn pop_first(&mut self) -> Option<Ask> {
        let ask = self.waiting.iter_mut().rev().find_map(VecDeque::pop_front)?;
        self.waiting_tokens -= ask.tokens;
        Some(ask)
    }

    fn pop_last(&mut self) -> Option<Ask> {
        let ask = self.waiting.iter_mut().find_map(VecDeque::pop_back)?;
        self.waiting_tokens -= ask.tokens;
        Some(ask)
    }

    fn is_waiting(&self) -> bool {
        self.first().is_some()
    }

    /// Takes `tokens` from the minute's quota, or says how long until they are there.
    fn spend(&mut self, tokens: u64, per_minute: u64, now: Duration) -> Result<(), Duration> {
        let (most, tokens) = (per_minute as f64, tokens as f64);
        let (left, at) = self.allowance.unwrap_or((most, now));
        let left = (left + now.saturating_sub(at).as_secs_f64() * most / 60.0).min(most);
        // One that is larger than the whole quota goes when the quota is untouched.
        if left < tokens.min(most) {
            self.allowance = Some((left, now));
            let seconds = (tokens.min(most) - left) * 60.0 / most.max(1.0);
            return Err(Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_RETRY));
        }
        self.allowance = Some((left - tokens, now));
        Ok(())
    }
}

/// Admission to one model at one gateway.
#[derive(Debug, Default)]
pub struct AdmissionQueue {
    accounts: BTreeMap<String, Account>,
    /// Those at the workers: whose, and what they cost.
    running: HashMap<u64, (String, u64)>,
    running_tokens: u64,
    waiting: u32,
    waiting_tokens: u64,
    virtual_time: f64,
}

impl AdmissionQueue {
    /// Requests that wait.
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Requests at the workers.
    pub fn in_flight(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap_or(u32::MAX)
    }

    fn fits(&self, tokens: u64, limits: &Limits) -> bool {
        self.running.is_empty() && limits.in_flight > 0
            || self.in_flight() < limits.in_flight
                && self.running_tokens.saturating_add(tokens) <= limits.in_flight_tokens
    }

    /// How long until what waits now has gone.
    fn eta(&self, more: u64, limits: &Limits) -> Duration {
        let seconds = self.waiting_tokens.saturating_add(more) as f64 / limits.tokens_per_second.max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn account(&mut self, principal: &str) -> &mut Account {
        if self.accounts.len() >= MOST_PRINCIPALS && !self.accounts.contains_key(principal) {
            self.accounts.retain(|_, account| account.is_waiting() || account.running > 0);
        }
        self.accounts.entry(principal.to_owned()).or_default()
    }

    /// Decides on a request. Also returns those that were waiting and are sent away in its favour: they belong to
    /// principals that had more than their share of the queue.
    pub fn ask(&mut self, ask: Ask, limits: &Limits, now: Duration) -> (Decision, Vec<(u64, Rejection)>) {
        if let Some(per_minute) = limits.quota_per_minute
            && let Err(wait) = self.account(&ask.principal).spend(ask.tokens, per_minute, now)
        {
            let retry_after = wait.clamp(SHORTEST_RETRY, LONGEST_RETRY);
            return (Decision::Reject(Rejection::Quota { retry_after }), Vec::new());
        }
        if self.waiting == 0 && self.fits(ask.tokens, limits) {
            self.start(&ask);
            return (Decision::Go, Vec::new());
        }
        let eta = self.eta(0, limits);
        let retry_after = self.eta(ask.tokens, limits).clamp(SHORTEST_RETRY, LONGEST_RETRY);
        if eta > ask.deadline {
            return (Decision::Reject(Rejection::Capacity { retry_after }), Vec::new());
        }
        let mut sent_away = Vec::new();
        while !self.has_room(ask.tokens, limits) {
            let own = self.accounts.get(&ask.principal).map_or(0, |account| account.waiting_tokens);
            let others = self.accounts.iter().filter(|(name, account)| **name != ask.principal && account.is_waiting());
            let largest = others.max_by_key(|(_, account)| account.waiting_tokens);
            let Some((name, account)) = largest else {
                // All that waits is its own, and the model has no room for more of it.
                return (Decision::Reject(Rejection::Capacity { retry_after }), sent_away);
            };
            if own.saturating_add(ask.tokens) > account.waiting_tokens {
                return (Decision::Reject(Rejection::Quota { retry_after }), sent_away);
            }
            let name = name.clone();
            let Some(last) = self.account(&name).pop_last() else { break };
            self.waiting -= 1;
            self.waiting_tokens -= last.tokens;
            sent_away.push((last.id, Rejection::Quota { retry_after }));
        }
        let virtual_time = self.virtual_time;
        let (tokens, priority) = (ask.tokens, ask.priority);
        let account = self.account(&ask.principal);
        if !account.is_waiting() {
            account.virtual_time = account.virtual_time.max(virtual_time);
        }
        account.waiting[priority as usize].push_back(ask);
        account.waiting_tokens += tokens;
        self.waiting += 1;
        self.waiting_tokens += tokens;
        (Decision::Wait { eta }, sent_away)
    }

    fn has_room(&self, tokens: u64, limits: &Limits) -> bool {
        self.waiting < limits.queued
            && (self.waiting == 0 || self.waiting_tokens.saturating_add(tokens) <= limits.queued_tokens)
    }

    /// Books a request as being at the workers.
    fn start(&mut self, ask: &Ask) {
        let virtual_time = self.virtual_time;
        let account = self.account(&ask.principal);
        let begins = account.virtual_time.max(virtual_time);
        account.virtual_time = begins + ask.tokens.max(1) as f64 / weight(ask.priority);
        account.running += 1;
        self.virtual_time = begins;
        self.running_tokens += ask.tokens;
        self.running.insert(ask.id, (ask.principal.clone(), ask.tokens));
    }

    /// The requests that may go now.
    pub fn admit(&mut self, limits: &Limits) -> Vec<u64> {
        let mut admitted = Vec::new();
        loop {
            let behind = |a: &(&String, &Account), b: &(&String, &Account)| {
                a.1.virtual_time.total_cmp(&b.1.virtual_time).then_with(|| a.0.cmp(b.0))
            };
            let waiting = self.accounts.iter().filter(|(_, account)| account.is_waiting());
            let Some((name, account)) = waiting.min_by(behind) else { return admitted };
            // Who is next and does not fit is waited for: smaller ones that pass it would starve it.
            let fits = account.first().is_some_and(|ask| self.fits(ask.tokens, limits));
            let name = name.clone();
            let Some(ask) = fits.then(|| self.account(&name).pop_first()).flatten() else { return admitted };
            self.waiting -= 1;
            self.waiting_tokens -= ask.tokens;
            self.start(&ask);
            admitted.push(ask.id);
        }
    }

    /// A request has ended at the workers, or its client left while it waited.
    pub fn end(&mut self, id: u64) {
        if let Some((principal, tokens)) = self.running.remove(&id) {
            self.running_tokens -= tokens;
            if let Some(account) = self.accounts.get_mut(&principal) {
                account.running -= 1;
            }
            return;
        }
        for account in self.accounts.values_mut() {
            for queue in &mut account.waiting {
                let Some(at) = queue.iter().position(|ask| ask.id == id) else { continue };
                if let Some(ask) = queue.remove(at) {
                    account.waiting_tokens -= ask.tokens;
                    self.waiting -= 1;
                    self.waiting_tokens -= ask.tokens;
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
