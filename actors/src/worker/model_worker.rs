//! A model of this node: its file, its engine process, and what happens when that dies.

use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{EnginePulse, EngineReport, ModelFacts, ModelState, RefusalKind, Request};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::child_engine;
use super::order::{ChangeRequest, Order, Said};
use super::route::Route;
use super::{Worker, Workers, refused};
use crate::models::{ModelStore, default_model};
use crate::node::{
    DeviceKind, GivenParameters, Layers, ModelChoice, ModelParameters, Outcome, Parameter, ParameterError,
    ParameterFile, ShownParameters,
};

/// What an echo engine is called.
const ECHO_NAME: &str = "echo";
/// A file that could not be fetched is tried again after this long.
const FETCH_PAUSE: Duration = Duration::from_secs(60);
/// Changes that are handed over at a time: there is one in all.
const ORDERS: usize = 1;

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The model.
    pub choice: ModelChoice,
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
}

/// The name of a model.
pub fn model_name_of(choice: &ModelChoice) -> String {
    match choice {
        ModelChoice::Default => default_model().name,
        ModelChoice::File(path) => crate::models::model_name(path),
        ModelChoice::Echo => ECHO_NAME.to_owned(),
    }
}

/// What goes wrong for good, and what may go better next time.
pub(super) enum Trouble {
    Final(String),
    Fetching(String),
}

impl ModelWorker {
    /// A worker that does nothing until [`Self::run`].
    pub fn new(options: WorkerOptions, workers: Arc<Workers>) -> Result<Arc<Self>, ParameterError> {
        let state = match &options.choice {
            ModelChoice::Default => ModelState::Absent,
            ModelChoice::File(_) => ModelState::Verifying,
            ModelChoice::Echo => ModelState::Loading,
        };
        let status = Status {
            name: model_name_of(&options.choice),
            digest: matches!(options.choice, ModelChoice::Echo).then(ModelDigest::default),
            state: state.clone(),
            generation: 0,
            route: None,
            report: None,
            reported_at: None,
            values: options.parameters.resolve()?,
            parameters: options.parameters.clone(),
            room: None,
        };
        let (orders, ordered) = mpsc::channel(ORDERS);
        Ok(Arc::new(Self {
            options,
            workers,
            status: Mutex::new(status),
            state: watch::Sender::new(state),
            problem: Mutex::new(None),
            orders,
            changing: Arc::new(Semaphore::new(1)),
            ordered: tokio::sync::Mutex::new(ordered),
            generations: AtomicU32::new(0),
        }))
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

    /// What was set by command.
    pub(crate) fn set_by_command(&self) -> GivenParameters {
        self.status().parameters.set.clone()
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
        let changed = std::mem::replace(&mut self.status().state, state.clone()) != state;
        if changed {
            self.state.send_replace(state);
            self.workers.note_change();
        }
    }

    pub(super) fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Fetches the file, runs the engine, starts it again when it dies: until `cancel`, or until it dies too often.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let mut orders = self.ordered.lock().await;
        // Engines that finish their answers; they end with this.
        let mut retiring = JoinSet::new();
        let running = async {
            loop {
                match self.keep_running(&cancel, &mut orders, &mut retiring).await {
                    Trouble::Final(why) => {
                        tracing::info!(model = self.status().name, why, "the model does not run");
                        self.set_problem(Some(why.clone()));
                        self.set_state(ModelState::Failed { why });
                        // What failed for good is not started again by a supervisor either, but with other
                        // parameters it may run.
                        let Some(order) = orders.recv().await else { return };
                        self.only_keep(order).await;
                    }
                    Trouble::Fetching(why) => {
                        tracing::info!(why, "the model is not here");
                        self.set_problem(Some(why.clone()));
                        self.set_state(ModelState::Failed { why });
                        tokio::select! {
                            () = tokio::time::sleep(FETCH_PAUSE) => {}
                            Some(order) = orders.recv() => self.only_keep(order).await,
                        }
                    }
                }
            }
        };
        tokio::select! {
            () = running => {}
            () = cancel.cancelled() => {}
        }
        // Whoever waits for a change is told that there will be none.
        while orders.try_recv().is_ok() {}
        self.status().route = None;
        self.set_state(ModelState::Unloaded);
        Ok(())
    }

    pub(super) async fn find_file(&self, cancel: &CancellationToken) -> Result<Option<PathBuf>, Trouble> {
        let store = || ModelStore::open(&self.options.cache).map_err(|error| Trouble::Fetching(error.to_string()));
        let found = match &self.options.choice {
            ModelChoice::Echo => return Ok(None),
            ModelChoice::Default => {
                let model = default_model();
                self.status().digest = Some(model.digest);
                let path = store()?
                    .ensure(&model, &|state| self.set_state(state), cancel)
                    .await
                    .map_err(|error| Trouble::Fetching(error.to_string()))?;
                (model.digest, path)
            }
            ModelChoice::File(path) => {
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
            is_default: !matches!(self.options.choice, ModelChoice::Echo),
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
            (status.route.as_ref().map(Route::hold), status.state.clone())
        };
        async move {
            match (held, state) {
                (Some(held), ModelState::Ready) => child_engine::submit(held, &request).await,
                (_, state) => refused(
                    RefusalKind::Loading,
                    format!("the model `{}` is not ready: {}", request.model, state.words()),
                ),
            }
        }
        .boxed()
    }
}
