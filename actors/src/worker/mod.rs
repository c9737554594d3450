//! Workers: what turns a request into an answer.

mod child_engine;
pub mod endpoint;
mod engine_change;
mod engine_life;
pub mod engine_process;
mod forecast;

pub mod manager;
mod model_use;
mod model_worker;
mod order;
mod route;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use ingle_protocol::NodeId;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Capability, EnginePulse, Failed, FailureKind, Load, ModelFacts, ModelState, RefusalKind, Refused, Request,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::cluster::RemoteAnswers;

pub use endpoint::{EndpointOptions, EndpointWorker};
pub use manager::ModelManager;
pub use model_worker::{ModelWorker, Room, WorkerOptions, model_name_of};
pub use order::{ChangeRequest, Said};

/// Frames of one answer that may wait for their reader. When it is full the sequence pauses.
pub const ANSWER_BUFFER: usize = 64;
/// A worker that owes a frame and sends none for so long is taken for silent.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// Something that answers requests for one model.
pub trait Worker: Send + Sync + std::fmt::Debug {
    /// The model and how it is. `own` is this node's id, which can change while the worker lives.
    fn facts(&self, own: NodeId) -> ModelFacts;
    /// The counters, once there is an engine.
    fn pulse(&self, own: NodeId) -> Option<EnginePulse>;
    /// Frames of the answer; the last one is always a last one. Dropping the receiver cancels.
    fn submit(&self, request: Request) -> BoxFuture<'_, mpsc::Receiver<Answer>>;
    /// An answer broke there a moment ago: where another has the same content, it goes first.
    fn is_doubtful(&self) -> bool {
        false
    }
    /// Somebody waits for it: it gets ready where it is not and can. How long that will probably take; `None` where
    /// waiting is of no use.
    fn want(&self) -> Option<Duration> {
        None
    }
}

/// The workers of this node.
#[derive(Debug)]
pub struct Workers {
    list: RwLock<Vec<Arc<dyn Worker>>>,
    draining: AtomicBool,
    /// Ends what still runs when the time for draining is up; a fresh one for each time.
    cut_off: RwLock<CancellationToken>,
    running: Arc<AtomicU32>,
    /// Answers that are on their way to other nodes.
    passing: Arc<AtomicU32>,
    changed: watch::Sender<u64>,
    /// What this node could do with one more model.
    capability: watch::Sender<Capability>,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            list: RwLock::default(),
            draining: AtomicBool::new(false),
            cut_off: RwLock::default(),
            running: Arc::default(),
            passing: Arc::default(),
            changed: watch::Sender::new(0),
            capability: watch::Sender::default(),
        }
    }
}

impl Workers {
    /// One more worker.
    pub fn add(&self, worker: Arc<dyn Worker>) {
        self.list.write().unwrap_or_else(PoisonError::into_inner).push(worker);
        self.note_change();
    }

    /// The worker has gone. Its answers go on to their end.
    pub fn remove(&self, worker: &Arc<dyn Worker>) {
        self.list.write().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, worker));
        self.note_change();
    }

    /// Somebody waits for the model of this name. How long it will probably take; `None` where this node will not have
    /// it.
    pub fn want(&self, model: &str) -> Option<Duration> {
        if self.is_draining() {
            return None;
        }
        let named = |worker: &Arc<dyn Worker>| worker.facts(NodeId::default()).name == model;
        self.all().iter().filter(|worker| named(worker)).filter_map(|worker| worker.want()).min()
    }

    fn all(&self) -> Vec<Arc<dyn Worker>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A worker's slow facts changed.
    pub fn note_change(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Changes whenever slow facts do.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What this node could do with one more model, with every change of it that is worth telling.
    pub fn capability(&self) -> watch::Receiver<Capability> {
        self.capability.subscribe()
    }

    /// It could do this now. Small changes are nobody's business.
    pub fn set_capability(&self, now: Capability) {
        let near = |a: u64, b: u64| a.abs_diff(b) <= a.max(b) / 8;
        self.capability.send_if_modified(|known| {
            let is_same = near(known.room, now.room)
                && near(known.memory_bandwidth, now.memory_bandwidth)
                && (known.on_card, known.takes_models) == (now.on_card, now.takes_models);
            if !is_same {
                *known = now;
            }
            !is_same
        });
    }

    /// The models of this node.
    pub fn facts(&self, own: NodeId) -> Vec<ModelFacts> {
        let draining = self.draining.load(Ordering::Acquire);
        let facts = |worker: &Arc<dyn Worker>| {
            let mut facts = worker.facts(own);
            if draining && facts.state == ModelState::Ready {
                facts.state = ModelState::Draining;
            }
            facts
        };
        self.all().iter().map(facts).collect()
    }

    /// The engines of this node.
    pub fn pulses(&self, own: NodeId) -> Vec<EnginePulse> {
        self.all().iter().filter_map(|worker| worker.pulse(own)).collect()
    }

    /// Answers that are being given.
    pub fn running(&self) -> u32 {
        self.running.load(Ordering::Acquire)
    }

    /// Answers that are being given, and those whose last frames have not arrived.
    pub fn open(&self) -> u32 {
        self.running() + self.passing.load(Ordering::Acquire)
    }

    /// One more answer that goes to another node, until the value is dropped.
    pub fn hold(&self) -> Running {
        Running::one_more(&self.passing)
    }

    /// Takes nothing new from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.note_change();
    }

    /// Takes work again.
    pub fn undo_drain(&self) {
        self.draining.store(false, Ordering::Release);
        self.note_change();
    }

    /// It takes nothing new.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Ends what still runs: whoever reads it can go on elsewhere.
    pub fn cut_off(&self) {
        std::mem::take(&mut *self.cut_off.write().unwrap_or_else(PoisonError::into_inner)).cancel();
    }

    /// Takes nothing new, gives answers `limit` to finish here, then lets them move. Returns how many ran, and how
    /// many of them moved.
    pub async fn drain_within(&self, limit: Duration) -> (u32, u32) {
        self.drain();
        let running = self.running();
        let finished = async {
            // Answers end by themselves; there is no event for "all of them did".
            while self.open() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(limit, finished).await.is_ok() {
            return (running, 0);
        }
        let moved = self.running();
        if self.is_draining() {
            self.cut_off();
        }
        (running, moved)
    }

    /// Gives the request to the worker that has its content.
    pub async fn submit(&self, request: Request) -> Answers {
        self.submit_to(None, request).await
    }

    /// As [`Self::submit`]; of several with that content the engine of number `meant` goes first.
    pub async fn submit_to(&self, meant: Option<u16>, request: Request) -> Answers {
        // Counted first and looked at second: a drain that begins in between waits for this request.
        let running = Running::one_more(&self.running);
        if self.draining.load(Ordering::Acquire) {
            return refused(RefusalKind::Draining, "this node is shutting down".into()).into();
        }
        // Two endpoints can have the same model: then the less busy of those that are ready.
        let load = |worker: &Arc<dyn Worker>| {
            let facts = worker.facts(NodeId::default());
            let work = |load: Load| load.running.saturating_add(load.waiting);
            let busy = || worker.pulse(NodeId::default()).map_or(0, |pulse| work(pulse.load));
            // Of one content under two names the one that is asked for goes first; a far server's names mean nothing.
            let is_other = facts.name != request.model && !facts.is_endpoint();
            let is_meant = meant.is_some() && facts.engine.map(|engine| engine.index) == meant;
            (facts.digest == Some(request.digest))
                .then(|| (facts.state != ModelState::Ready, !is_meant, worker.is_doubtful(), is_other, busy()))
        };
        let able = self.all().into_iter().filter_map(|worker| Some((load(&worker)?, worker)));
        let Some((_, worker)) = able.min_by_key(|(load, _)| *load) else {
            // Nobody knows the content of a model before it was loaded for the first time.
            if let Some(wait) = self.want(&request.model).filter(|wait| !wait.is_zero()) {
                return loading(&request.model, wait).into();
            }
            let message = format!("this node does not have {}", request.model);
            return refused(RefusalKind::UnknownModel, message).into();
        };
        let inner = worker.submit(request).await;
        let cut_off = self.cut_off.read().unwrap_or_else(PoisonError::into_inner).clone();
        Answers { inner: Source::Here(inner), held: Some((running, cut_off)) }
    }
}

/// Frames of one answer. Dropping it cancels the request.
#[derive(Debug)]
pub struct Answers {
    inner: Source,
    /// For a request of this node's own workers: that it runs, and what ends it when the node does.
    held: Option<(Running, CancellationToken)>,
}

#[derive(Debug)]
enum Source {
    Here(mpsc::Receiver<Answer>),
    // On the heap: it has buffers of its own.
    Member(Box<RemoteAnswers>),
}

impl From<mpsc::Receiver<Answer>> for Answers {
    fn from(inner: mpsc::Receiver<Answer>) -> Self {
        Self { inner: Source::Here(inner), held: None }
    }
}

impl From<RemoteAnswers> for Answers {
    fn from(inner: RemoteAnswers) -> Self {
        Self { inner: Source::Member(Box::new(inner)), held: None }
    }
}

impl Answers {
    /// The next frame; `None` behind the last one. Loses nothing where it is dropped before its end.
    pub async fn recv(&mut self) -> Option<Answer> {
        let inner = match &mut self.inner {
            Source::Here(inner) => inner,
            Source::Member(answers) => return answers.recv().await,
        };
        let Some((_, cut_off)) = &self.held else { return inner.recv().await };
        let answer = tokio::select! {
            biased;
            () = cut_off.cancelled() => {
                inner.close();
                Some(shutting_down())
            }
            answer = inner.recv() => answer,
        };
        if answer.as_ref().is_none_or(Answer::is_last) {
            self.held = None;
        }
        answer
    }

    /// A frame that is there already, of a worker of this node.
    pub fn try_recv(&mut self) -> Option<Answer> {
        let Source::Here(inner) = &mut self.inner else { return None };
        let answer = inner.try_recv().ok()?;
        if answer.is_last() {
            self.held = None;
        }
        Some(answer)
    }
}

/// Counts as an answer that is being given.
#[derive(Debug)]
pub struct Running(Arc<AtomicU32>);

impl Running {
    fn one_more(count: &Arc<AtomicU32>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn shutting_down() -> Answer {
    let message = "the node shut down before the answer was complete".to_owned();
    Answer::Failed(Failed { kind: FailureKind::ShuttingDown, message, retryable: false, migratable: true })
}

/// The refusal of a model that is on its way.
fn loading(model: &str, wait: Duration) -> mpsc::Receiver<Answer> {
    only_refusal(Refused {
        kind: RefusalKind::Loading,
        message: format!("the model `{model}` is being loaded, which takes about {} s", wait.as_secs().max(1)),
        param: None,
        retry_after_ms: u64::try_from(wait.as_millis()).ok(),
    })
}

/// An answer that is one refusal.
pub(crate) fn refused(kind: RefusalKind, message: String) -> mpsc::Receiver<Answer> {
    only_refusal(Refused { kind, message, param: None, retry_after_ms: kind.is_retryable().then_some(1_000) })
}

fn only_refusal(refusal: Refused) -> mpsc::Receiver<Answer> {
    let (answers, reader) = mpsc::channel(1);
    // The channel is new and has room for one.
    let _ = answers.try_send(Answer::Refused(refusal));
    reader
}
