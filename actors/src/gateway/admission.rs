//! The door in front of the workers: [`ingle_protocol::admission`] with requests that wait for real.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::admission::{AdmissionQueue, Ask, Decision, Limits, Rejection};
use ingle_protocol::wire::v2::Priority;
use tokio::sync::oneshot;
use tokio::time::timeout_at;

/// Bounds of what may wait at one gateway, for one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionOptions {
    /// As much may wait as the workers compute in this time.
    pub queue_time: Duration,
    /// Requests that may wait.
    pub queued: u32,
    /// Estimated tokens a minute of one principal; `None` for as many as there is room for.
    pub quota_per_minute: Option<u64>,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self { queue_time: Duration::from_secs(30), queued: 1_024, quota_per_minute: None }
    }
}

#[derive(Debug, Default)]
struct Model {
    queue: AdmissionQueue,
    /// Those who wait to be told; as many as the queue lets in.
    waiting: HashMap<u64, oneshot::Sender<Result<(), Rejection>>>,
}

impl Model {
    fn admit(&mut self, limits: &Limits) {
        for id in self.queue.admit(limits) {
            if let Some(waiter) = self.waiting.remove(&id) {
                // Who has left meanwhile gives its place back by dropping its permit.
                let _ = waiter.send(Ok(()));
            }
        }
    }
}

/// Admission to all models at this gateway.
#[derive(Debug)]
pub(super) struct Admission {
    started: Instant,
    next: AtomicU64,
    models: Mutex<HashMap<String, (Model, Limits)>>,
}

/// Why a request does not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotAdmitted {
    /// It is told to come again.
    Rejected(Rejection),
    /// Its time was up while it waited.
    TooLate,
}

/// What a request says of itself at the door.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub model: &'a str,
    pub principal: &'a str,
    pub priority: Priority,
    pub tokens: u64,
    pub deadline: Instant,
}

/// The right to be at the workers, or to wait for it; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    model: String,
    id: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut models = self.admission.lock();
        if let Some((model, limits)) = models.get_mut(&self.model) {
            model.queue.end(self.id);
            model.waiting.remove(&self.id);
            let limits = *limits;
            model.admit(&limits);
        }
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self { started: Instant::now(), next: AtomicU64::new(0), models: Mutex::default() }
    }
}

impl Admission {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Model, Limits)>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to go to the workers.
    pub async fn enter(self: &Arc<Self>, request: Request<'_>, limits: Limits) -> Result<Permit, NotAdmitted> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let remaining = request.deadline.saturating_duration_since(Instant::now());
        let ask = Ask {
            id,
            principal: request.principal.to_owned(),
            priority: request.priority,
            tokens: request.tokens,
            deadline: remaining,
        };
        let (permit, told) = {
            let mut models = self.lock();
            let (model, standing) =
                models.entry(request.model.to_owned()).or_insert_with(|| (Model::default(), limits));
            *standing = limits;
            let (decision, sent_away) = model.queue.ask(ask, &limits, self.started.elapsed());
            for (id, rejection) in sent_away {
                if let Some(waiter) = model.waiting.remove(&id) {
                    let _ = waiter.send(Err(rejection));
                }
            }
            if let Decision::Reject(rejection) = decision {
                return Err(NotAdmitted::Rejected(rejection));
            }
            let permit = Permit { admission: self.clone(), model: request.model.to_owned(), id };
            if decision == Decision::Go {
                return Ok(permit);
            }
            let (waiter, told) = oneshot::channel();
            model.waiting.insert(id, waiter);
            model.admit(&limits);
            (permit, told)
        };
        match timeout_at(request.deadline.into(), told).await {
            Ok(Ok(Ok(()))) => Ok(permit),
            Ok(Ok(Err(rejection))) => Err(NotAdmitted::Rejected(rejection)),
            // Nobody drops a waiter without a word but its own permit.
            Ok(Err(_)) | Err(_) => Err(NotAdmitted::TooLate),
        }
    }

    /// Workers came or went: looks again who may go. Forgets models that nobody asks for.
    pub fn refresh(&self, limits_of: impl Fn(&str) -> Limits) {
        self.lock().retain(|name, (model, limits)| {
            if model.queue.waiting() > 0 {
                *limits = limits_of(name);
                model.admit(&limits.clone());
            }
            model.queue.waiting() > 0 || model.queue.in_flight() > 0
        });
    }

    /// Requests that wait, over all models.
    pub fn waiting(&self) -> u32 {
        self.lock().values().map(|(model, _)| model.queue.waiting()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        in_flight: 1,
        in_flight_tokens: 1_000,
        queued_tokens: 1_000,
        queued: 2,
        tokens_per_second: 100.0,
        quota_per_minute: None,
    };

    fn request(principal: &str, seconds: u64) -> Request<'_> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        Request { model: "m", principal, priority: Priority::Normal, tokens: 10, deadline }
    }

    #[tokio::test]
    async fn who_leaves_while_waiting_leaves_no_gap() {
        let admission = Arc::new(Admission::default());
        let first = admission.enter(request("a", 60), LIMITS).await.unwrap();
        let (waits, leaves) = (admission.clone(), admission.clone());
        let leaving = tokio::spawn(async move { leaves.enter(request("a", 60), LIMITS).await.map(drop) });
        let waiting = tokio::spawn(async move { waits.enter(request("b", 60), LIMITS).await.map(drop) });
        while admission.waiting() < 2 {
            tokio::task::yield_now().await;
        }
        let full = admission.enter(request("b", 60), LIMITS).await.unwrap_err();
        assert!(matches!(full, NotAdmitted::Rejected(Rejection::Quota { .. })), "{full:?}");
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
        assert_eq!(admission.waiting(), 1);
        drop(first);
        waiting.await.unwrap().unwrap();
        admission.refresh(|_| LIMITS);
        assert!(admission.lock().is_empty());
    }

    #[tokio::test]
    async fn a_deadline_ends_the_wait_and_new_workers_begin_it() {
        let admission = Arc::new(Admission::default());
        let _first = admission.enter(request("a", 60), LIMITS).await.unwrap();
        assert_eq!(admission.enter(request("a", 0), LIMITS).await.unwrap_err(), NotAdmitted::TooLate);
        assert_eq!(admission.waiting(), 0);
        let waits = admission.clone();
        let waiting = tokio::spawn(async move { waits.enter(request("a", 60), LIMITS).await.map(drop) });
        while admission.waiting() < 1 {
            tokio::task::yield_now().await;
        }
        admission.refresh(|_| Limits { in_flight: 2, ..LIMITS });
        waiting.await.unwrap().unwrap();
    }
}
