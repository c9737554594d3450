//! A model of this node: its file, its engine process, and what happens when that dies. Whether it is loaded at all is
//! the [`manager`](super::manager)'s business.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{EnginePulse, EngineReport, ModelFacts, ModelState, RefusalKind, Request};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::child_engine;
use super::forecast::Forecast;
use super::order::{ChangeRequest, Order, Said};
use super::route::{Route, Uses};
use super::{Worker, Workers, loading, refused};
use crate::models::{ModelStore, default_model};
use crate::node::{
    DeviceKind, Layers, ModelChoice, ModelParameters, Outcome, Parameter, ParameterError, ParameterFile,
    ShownParameters,
};

/// What an echo engine is called.
const ECHO_NAME: &str = "echo";
/// A file that could not be fetched is tried again after this long.
const FETCH_PAUSE: Duration = Duration::from_secs(60);
/// Changes that are handed over at a time: there is one in all.
const ORDERS: usize = 1;
/// Where there was no room for it, a request may have it look again after this long.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(3);
/// How long an engine that is no longer wanted may take to end before it is killed.
const END_GRACE: Duration = Duration::from_secs(3);

/// How long requests may be on their way that were sent before their sender knew that another worker has taken over.
const LATE: Duration = Duration::from_secs(1);
/// How long answers that were cut off have to say so.
const CUT_OFF_GRACE: Duration = Duration::from_millis(500);

/// Who knows what else is in this machine's memory.
pub trait Room: std::fmt::Debug + Send + Sync {
    /// Makes room for a worker's engine. `file` is `None` for echo. The values that it is to start with, or why it
    /// does not fit.
    fn make<'a>(
        &'a self,
        worker: &'a ModelWorker,
        file: Option<&'a Path>,
        values: ModelParameters,
    ) -> BoxFuture<'a, Result<ModelParameters, String>>;
}

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The model's name.
    pub name: String,
    /// The model.
    pub choice: ModelChoice,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// Who makes room for it.
    pub room: Arc<dyn Room>,
    /// What it computes on.
    pub device: DeviceKind,
    /// Where model files are kept.
    pub cache: PathBuf,
    /// Where the engine's socket may be; private to this node.
    pub sockets: PathBuf,
    /// Which of the node's engines.
    pub index: u16,
    /// What is set for the model.
    pub parameters: Layers,
    /// Where to keep what is set by command.
    pub parameter_file: ParameterFile,
    /// Environment variables for the engine process.
    pub environment: Vec<(String, String)>,
}

/// What is known of the model and of the engine that takes its requests.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub name: String,
    pub digest: Option<ModelDigest>,
    pub state: ModelState,
    pub generation: u32,
    pub route: Option<Arc<Route>>,
    pub report: Option<EngineReport>,
    pub reported_at: Option<Instant>,
    pub parameters: Layers,
    /// All of them together.
    pub values: ModelParameters,
    /// Slots of the engine; `None` while there is none.
    pub room: Option<u32>,
    /// The engine process that takes its requests.
    pub pid: Option<u32>,
    /// Since when it is ready.
    pub ready_since: Option<Instant>,
    pub forecast: Forecast,
    /// It goes, but takes what was sent to it before others knew.
    pub takes_late: bool,
}

/// One model of this node.
#[derive(Debug)]
pub struct ModelWorker {
    pub(super) options: WorkerOptions,
    pub(super) workers: Arc<Workers>,
    status: Mutex<Status>,
    state: watch::Sender<ModelState>,
    problem: Mutex<Option<String>>,
    orders: mpsc::Sender<Order>,
    changing: Arc<Semaphore>,
    /// Taken by whoever runs the model.
    ordered: tokio::sync::Mutex<mpsc::Receiver<Order>>,
    /// Engine processes so far.
    pub(super) generations: AtomicU32,
    pub(super) uses: Arc<Uses>,
    /// Somebody waits for it.
    wanted: AtomicBool,
    wake: Notify,
    /// When there was no room for it.
    no_room: Mutex<Option<Instant>>,
    /// It finishes what it has and is not started again.
    leaving: AtomicBool,
}

/// The name of a model.
pub fn model_name_of(choice: &ModelChoice) -> String {
    match choice {
        ModelChoice::Default => default_model().name,
        ModelChoice::File(path) => crate::models::model_name(path),
        ModelChoice::Source(model) => model.name.clone(),
        ModelChoice::Echo => ECHO_NAME.to_owned(),
    }
}

/// Echo engines have no content but their name: two of different names are two models.
fn digest_of_echo(name: &str) -> ModelDigest {
    match name {
        ECHO_NAME => ModelDigest::default(),
        name => ModelDigest(Sha256::digest(format!("echo {name}")).into()),
    }
}

/// What goes wrong for good, and what may go better next time.
pub(super) enum Trouble {
    Final(String),
    Fetching(String),
    /// It does not fit into memory now.
    NoRoom(String),
    /// Nobody wants it any more.
    Over,
}

impl ModelWorker {
    /// A worker that does nothing until [`Self::run`].
    pub fn new(options: WorkerOptions, workers: Arc<Workers>) -> Result<Arc<Self>, ParameterError> {
        let status = Status {
            name: options.name.clone(),
            digest: matches!(options.choice, ModelChoice::Echo).then(|| digest_of_echo(&options.name)),
            state: ModelState::Absent,
            generation: 0,
            route: None,
            report: None,
            reported_at: None,
            values: options.parameters.resolve()?,
            parameters: options.parameters.clone(),
            room: None,
            pid: None,
            ready_since: None,
            forecast: Forecast::default(),
            takes_late: false,
        };
        let (orders, ordered) = mpsc::channel(ORDERS);
        Ok(Arc::new(Self {
            options,
            workers,
            status: Mutex::new(status),
            state: watch::Sender::new(ModelState::Absent),
            problem: Mutex::new(None),
            orders,
            changing: Arc::new(Semaphore::new(1)),
            ordered: tokio::sync::Mutex::new(ordered),
            generations: AtomicU32::new(0),
            uses: Arc::default(),
            wanted: AtomicBool::new(false),
            wake: Notify::new(),
            no_room: Mutex::new(None),
            leaving: AtomicBool::new(false),
        }))
    }

    /// Tells it from the node's other engines.
    pub fn index(&self) -> u16 {
        self.options.index
    }

    /// The model's name.
    pub fn name(&self) -> String {
        self.status().name.clone()
    }

    /// Its parameters, with what holds where that is something else.
    pub fn parameters(&self) -> ShownParameters {
        let status = self.status();
        let mut parameters = status.parameters.shown(&status.values);
        let own = status.report.as_ref().map_or(0, |report| report.context_length);
        for shown in &mut parameters {
            match (shown.name, status.room) {
                (Parameter::ContextLength, _) if own > 0 && own < status.values.context_length => {
                    shown.note = format!("the model itself has {own}");
                }
                (Parameter::BatchSize, Some(room)) => shown.note = format!("up to {room}, reload above"),
                _ => {}
            }
        }
        ShownParameters { model: status.name.clone(), parameters }
    }

    /// Changes parameters and returns when they hold, or are refused and everything is as it was. Dropping this does
    /// not stop the change. One change is under way at a time.
    pub async fn set_parameters(&self, request: ChangeRequest, said: Said) -> Result<Outcome, String> {
        let (reply, replied) = oneshot::channel();
        let busy = || "another change is under way: try again when it is done".to_owned();
        let permit = self.changing.clone().try_acquire_owned().map_err(|_| busy())?;
        self.orders.try_send(Order { request, said, _permit: permit, reply }).map_err(|_| busy())?;
        replied.await.unwrap_or_else(|_| Err("the node is shutting down".into()))
    }

    /// The model's state with every change of it.
    pub fn states(&self) -> watch::Receiver<ModelState> {
        self.state.subscribe()
    }

    /// What is wrong and stays wrong, in words.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_state(&self, state: ModelState) {
        let changed = {
            let mut status = self.status();
            let changed = status.state != state;
            if changed {
                status.forecast.note(&state, Instant::now());
                status.ready_since = (state == ModelState::Ready).then(Instant::now);
                status.state = state.clone();
            }
            changed
        };
        if changed {
            if state == ModelState::Ready {
                // Who waited has it; the time in which nobody uses it begins.
                self.wanted.store(false, Ordering::Release);
                self.uses.touch();
            }
            self.state.send_replace(state);
            self.workers.note_change();
        }
    }

    pub(super) fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Fetches the file, runs the engine, starts it again when it dies: until `cancel`, or until it dies too often.
    /// When this returns the engine process has ended. It can be called again.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let mut orders = self.ordered.lock().await;
        self.leaving.store(false, Ordering::Release);
        self.wanted.store(false, Ordering::Release);
        self.status().takes_late = false;
        // Engines that finish their answers; they end with this.
        let mut retiring = JoinSet::new();
        let running = async {
            loop {
                let trouble = self.keep_running(&cancel, &mut orders, &mut retiring).await;
                let (why, pause) = match trouble {
                    Trouble::Over => return,
                    Trouble::Final(why) => (why, None),
                    Trouble::Fetching(why) => (why, Some(FETCH_PAUSE)),
                    Trouble::NoRoom(why) => {
                        *self.no_room.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                        (why, None)
                    }
                };
                tracing::info!(model = self.options.name, why, "the model does not run");
                self.set_problem(Some(why.clone()));
                self.set_state(ModelState::Failed { why });
                let pausing = async {
                    match pause {
                        Some(pause) => tokio::time::sleep(pause).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = pausing => {}
                    // What failed for good is not started again by a supervisor either, but with other parameters it
                    // may run.
                    Some(order) = orders.recv() => self.only_keep(order).await,
                    () = self.until_wanted() => {}
                }
                *self.no_room.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
        };
        tokio::select! {
            () = running => {}
            () = async { cancel.cancelled().await; tokio::time::sleep(END_GRACE).await } => {}
        }
        // Whoever waits for a change is told that there will be none.
        while orders.try_recv().is_ok() {}
        retiring.shutdown().await;
        {
            let mut status = self.status();
            (status.route, status.room, status.pid, status.report) = (None, None, None, None);
        }
        self.set_problem(None);
        self.set_state(ModelState::Unloaded);
        Ok(())
    }

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
        let Ok(store) = ModelStore::open(&self.options.cache) else { return false };
        let digest = self.status().digest;
        store.local_file(path).await.is_ok_and(|file| digest.is_some_and(|digest| digest != file.digest))
    }

    /// How long until it is ready.
    pub(super) fn ready_in(&self) -> Duration {
        let status = self.status();
        status.forecast.ready_in(&status.state, Instant::now())
    }

    pub(super) async fn find_file(&self, cancel: &CancellationToken) -> Result<Option<PathBuf>, Trouble> {
        let store = || ModelStore::open(&self.options.cache).map_err(|error| Trouble::Fetching(error.to_string()));
        let catalog = match &self.options.choice {
            ModelChoice::Echo => return Ok(None),
            ModelChoice::Default => Ok(default_model()),
            ModelChoice::Source(model) => Ok(model.clone()),
            ModelChoice::File(path) => Err(path),
        };
        let found = match catalog {
            Ok(model) => {
                self.status().digest = Some(model.digest);
                let path = store()?
                    .ensure(&model, &|state| self.set_state(state), cancel)
                    .await
                    .map_err(|error| Trouble::Fetching(error.to_string()))?;
                (model.digest, path)
            }
            Err(path) => {
                self.set_state(ModelState::Verifying);
                let file = store()?.local_file(path).await.map_err(|error| Trouble::Final(error.to_string()))?;
                (file.digest, file.path)
            }
        };
        self.status().digest = Some(found.0);
        Ok(Some(found.1))
    }

    fn engine_id(&self, own: NodeId, status: &Status) -> EngineId {
        EngineId { node: own, index: self.options.index, generation: status.generation }
    }
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
            features: report.map(|r| r.features.clone()).unwrap_or_default(),
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
