//! How a model of this node is used: asked, wanted, let go.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{EMBEDDINGS, EnginePulse, ModelFacts, ModelState, RESUMES_TEXT, RefusalKind, Request};
use ingle_protocol::{EngineId, NodeId};
use tokio::sync::mpsc;

use super::child_engine;
use super::model_worker::{ModelWorker, Status};
use super::route::Route;
use super::{Worker, loading, refused};
use crate::node::ModelChoice;

/// Where there was no room for it, a request may have it look again after this long.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(3);
/// How long requests may be on their way that were sent before their sender knew that another worker has taken over.
const LATE: Duration = Duration::from_secs(1);
/// How long answers that were cut off have to say so.
const CUT_OFF_GRACE: Duration = Duration::from_millis(500);

impl ModelWorker {
    /// Returns when somebody waits for it.
    pub(super) async fn until_wanted(&self) {
        while !self.wanted.swap(false, Ordering::AcqRel) {
            self.wake.notified().await;
        }
    }

    /// It takes nothing new, finishes what it has and is not started again.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Takes nothing new, lets answers finish within `limit`, then lets them move. `takes_late`: what was sent before
    /// others knew is taken still, as where another one has taken over.
    pub(super) async fn finish(&self, limit: Duration, takes_late: bool) {
        self.leaving.store(true, Ordering::Release);
        self.status().takes_late = takes_late;
        if self.status().state == ModelState::Ready {
            self.set_state(ModelState::Draining);
        }
        if takes_late {
            tokio::time::sleep(limit.min(LATE)).await;
        }
        if tokio::time::timeout(limit, self.uses.idle()).await.is_err() {
            self.status().takes_late = false;
            self.uses.cut_off();
            let _ = tokio::time::timeout(CUT_OFF_GRACE, self.uses.idle()).await;
        }
    }

    /// Takes nothing new from now on, where it is ready and nobody uses it; else false, and nothing has changed.
    pub(super) fn leave_if_idle(&self) -> bool {
        {
            let mut status = self.status();
            // Requests are taken under this lock, so none can come in between.
            if status.state != ModelState::Ready || self.uses.open() > 0 {
                return false;
            }
            self.leaving.store(true, Ordering::Release);
            status.state = ModelState::Draining;
        }
        self.state.send_replace(ModelState::Draining);
        self.workers.note_change();
        true
    }

    /// For how long nobody has used it, while it is ready.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let is_ready = self.status().state == ModelState::Ready;
        self.uses.idle_for().filter(|_| is_ready)
    }

    /// Its file has another content now than what is loaded.
    pub(super) async fn is_outdated(&self) -> bool {
        let ModelChoice::File(path) = &self.options.choice else { return false };
        let Ok(store) = self.store() else { return false };
        let digest = self.status().digest;
        store.local_file(path).await.is_ok_and(|file| digest.is_some_and(|digest| digest != file.digest))
    }

    /// How long until it is ready.
    pub(super) fn ready_in(&self) -> Duration {
        let status = self.status();
        status.forecast.ready_in(&status.state, Instant::now())
    }

    fn engine_id(&self, own: NodeId, status: &Status) -> EngineId {
        EngineId { node: own, index: self.options.index, generation: status.generation }
    }
}

/// What its engine honours, and for one that writes: it goes on behind a text of somebody else.
fn features(status: &Status) -> Vec<String> {
    let mut features = status.features.clone();
    if status.report.is_some() && !features.iter().any(|feature| feature == EMBEDDINGS) {
        features.push(RESUMES_TEXT.to_owned());
    }
    features
}

impl Worker for ModelWorker {
    fn facts(&self, own: NodeId) -> ModelFacts {
        let status = self.status();
        let report = status.report.as_ref();
        ModelFacts {
            name: status.name.clone(),
            digest: status.digest,
            state: status.state.clone(),
            engine: status.route.as_ref().map(|_| self.engine_id(own, &status)),
            backend: report.map(|r| r.backend.clone()).unwrap_or_default(),
            numerics: report.map(|r| r.numerics.clone()).unwrap_or_default(),
            context_length: report.map_or(0, |r| r.context_length),
            slots: report.map_or(status.values.batch_size, |r| r.slots),
            features: features(&status),
            // The echo engine is for tests: nobody gets it without asking for it by name.
            is_default: self.options.is_default && !matches!(self.options.choice, ModelChoice::Echo),
        }
    }

    fn pulse(&self, own: NodeId) -> Option<EnginePulse> {
        let status = self.status();
        let pulse = status.report.as_ref()?.pulse;
        let silent = status.reported_at.map_or(Duration::ZERO, |at| at.elapsed());
        let silent_ms = u32::try_from(silent.as_millis()).unwrap_or(u32::MAX);
        Some(EnginePulse { engine: self.engine_id(own, &status), silent_ms, ..pulse })
    }

    fn submit(&self, request: Request) -> BoxFuture<'_, mpsc::Receiver<Answer>> {
        // Held under the lock: an engine that is replaced gets no answer more from the moment on.
        let (held, state) = {
            let status = self.status();
            let takes = match status.state {
                ModelState::Ready => true,
                ModelState::Draining => status.takes_late,
                _ => false,
            };
            (status.route.as_ref().filter(|_| takes).map(Route::hold), status.state.clone())
        };
        async move {
            match held {
                Some(held) => child_engine::submit(held, &request).await,
                // Who was sent here by a node that does not know better has it loaded as well.
                None => match self.want() {
                    Some(wait) => loading(&request.model, wait),
                    None => refused(
                        RefusalKind::Loading,
                        format!("the model `{}` is not ready: {}", request.model, state.words()),
                    ),
                },
            }
        }
        .boxed()
    }

    fn want(&self) -> Option<Duration> {
        let state = self.status().state.clone();
        match state {
            ModelState::Ready => return Some(Duration::ZERO),
            ModelState::Failed { .. } => {
                let no_room = *self.no_room.lock().unwrap_or_else(PoisonError::into_inner);
                // What failed for good fails again; room may have come.
                no_room.filter(|at| at.elapsed() >= NO_ROOM_PAUSE)?;
            }
            _ => {}
        }
        // While it is on its way this changes nothing: it is forgotten when it is ready.
        self.wanted.store(true, Ordering::Release);
        self.wake.notify_one();
        Some(self.ready_in())
    }
}
