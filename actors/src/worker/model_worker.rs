//! A model of this node: its file, its engine process, and what happens when that dies.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v1::{EnginePulse, EngineReport, ModelFacts, ModelState, RefusalKind, Request};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::child_engine::{self, ChildEngine};
use super::{SILENCE_LIMIT, Worker, Workers, refused};
use crate::models::{ModelStore, default_model};
use crate::node::{DeviceKind, ModelChoice, ModelParameters};
use crate::supervisor::RestartBudget;

/// What an echo engine is called.
const ECHO_NAME: &str = "echo";
/// A file that could not be fetched is tried again after this long.
const FETCH_PAUSE: Duration = Duration::from_secs(60);
const RESTART_PAUSE: Duration = Duration::from_millis(200);

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
    pub parameters: ModelParameters,
    /// Environment variables for the engine process.
    pub environment: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
struct Status {
    name: String,
    digest: Option<ModelDigest>,
    state: ModelState,
    generation: u32,
    socket: Option<PathBuf>,
    report: Option<EngineReport>,
    reported_at: Option<Instant>,
}

/// One model of this node.
#[derive(Debug)]
pub struct ModelWorker {
    options: WorkerOptions,
    workers: Arc<Workers>,
    status: Mutex<Status>,
    state: watch::Sender<ModelState>,
    problem: Mutex<Option<String>>,
}

/// What goes wrong for good, and what may go better next time.
enum Trouble {
    Final(String),
    Fetching(String),
}

impl ModelWorker {
    /// A worker that does nothing until [`Self::run`].
    pub fn new(options: WorkerOptions, workers: Arc<Workers>) -> Arc<Self> {
        let (name, state) = match &options.choice {
            ModelChoice::Default => (default_model().name, ModelState::Absent),
            ModelChoice::File(path) => (crate::models::model_name(path), ModelState::Verifying),
            ModelChoice::Echo => (ECHO_NAME.to_owned(), ModelState::Loading),
        };
        let digest = matches!(options.choice, ModelChoice::Echo).then(ModelDigest::default);
        let status =
            Status { name, digest, state: state.clone(), generation: 0, socket: None, report: None, reported_at: None };
        Arc::new(Self {
            options,
            workers,
            status: Mutex::new(status),
            state: watch::Sender::new(state),
            problem: Mutex::new(None),
        })
    }

    /// The model's state with every change of it.
    pub fn states(&self) -> watch::Receiver<ModelState> {
        self.state.subscribe()
    }

    /// What is wrong and stays wrong, in words.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: ModelState) {
        let changed = std::mem::replace(&mut self.status().state, state.clone()) != state;
        if changed {
            self.state.send_replace(state);
            self.workers.note_change();
        }
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Fetches the file, runs the engine, starts it again when it dies: until `cancel`, or until it dies too often.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let running = async {
            loop {
                match self.keep_running(&cancel).await {
                    Trouble::Final(why) => {
                        tracing::info!(model = self.status().name, why, "the model does not run");
                        self.set_problem(Some(why.clone()));
                        self.set_state(ModelState::Failed { why });
                        // Nothing more to do; what failed for good is not started again by a supervisor either.
                        std::future::pending::<()>().await;
                    }
                    Trouble::Fetching(why) => {
                        tracing::info!(why, "the model is not here");
                        self.set_problem(Some(why.clone()));
                        self.set_state(ModelState::Failed { why });
                        tokio::time::sleep(FETCH_PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = running => {}
            () = cancel.cancelled() => {}
        }
        self.status().socket = None;
        self.set_state(ModelState::Unloaded);
        Ok(())
    }

    async fn find_file(&self, cancel: &CancellationToken) -> Result<Option<PathBuf>, Trouble> {
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

    async fn keep_running(&self, cancel: &CancellationToken) -> Trouble {
        let file = match self.find_file(cancel).await {
            Ok(file) => file,
            Err(trouble) => return trouble,
        };
        let mut budget = RestartBudget::default();
        let mut ever_ready = false;
        loop {
            self.set_state(ModelState::Loading);
            let (ended, was_ready) = match self.run_once(file.as_deref()).await {
                Ok(ended) => ended,
                Err(error) => return Trouble::Final(format!("the engine process cannot be started: {error}")),
            };
            ever_ready |= was_ready;
            tracing::warn!(model = self.status().name, ended, "the engine process ended");
            let reported = {
                let mut status = self.status();
                status.socket = None;
                match status.report.take().map(|report| report.state) {
                    Some(ModelState::Failed { why }) => Some(why),
                    _ => None,
                }
            };
            // What it says of a model that never ran will be the same the next time.
            if let (Some(why), false) = (&reported, ever_ready) {
                return Trouble::Final(why.clone());
            }
            let why = reported.unwrap_or(ended);
            if !budget.try_restart(Instant::now()) {
                return Trouble::Final(format!(
                    "the engine process died {} times within a minute, the last time with {why}; restart the node to try again",
                    RestartBudget::MOST + 1
                ));
            }
            self.set_problem(Some(format!("the engine process died ({why}) and was started again")));
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    }

    /// One life of the engine process: how it ended, and whether it was ever ready.
    async fn run_once(&self, file: Option<&std::path::Path>) -> std::io::Result<(String, bool)> {
        let digest = self.status().digest.unwrap_or_default();
        let generation = {
            let mut status = self.status();
            status.generation += 1;
            status.generation
        };
        let socket = self.options.sockets.join(format!("engine-{}-{generation}.sock", self.options.index));
        let (mut child, mut reports) = ChildEngine::spawn(socket, file, digest, &self.options)?;
        tracing::info!(pid = child.pid(), generation, "engine process started");
        let mut was_ready = false;
        loop {
            let report = match timeout(SILENCE_LIMIT, reports.recv()).await {
                Ok(Some(report)) => report,
                Ok(None) => break,
                Err(_) => {
                    child.kill().await;
                    return Ok(("it went silent and was killed".into(), was_ready));
                }
            };
            let state = report.state.clone();
            let slow_change = {
                let mut status = self.status();
                let known = status.report.replace(report);
                status.reported_at = Some(Instant::now());
                status.socket = Some(child.socket.clone());
                known.is_none_or(|known| known.state != state)
            };
            if slow_change {
                if state == ModelState::Ready && !was_ready {
                    was_ready = true;
                    self.set_problem(None);
                }
                if !matches!(state, ModelState::Failed { .. }) {
                    self.set_state(state);
                    self.workers.note_change();
                }
            }
        }
        Ok((child.ended().await, was_ready))
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
            engine: status.socket.as_ref().map(|_| self.engine_id(own, &status)),
            backend: report.map(|r| r.backend.clone()).unwrap_or_default(),
            numerics: report.map(|r| r.numerics.clone()).unwrap_or_default(),
            context_length: report.map_or(0, |r| r.context_length),
            slots: report.map_or(self.options.parameters.batch_size, |r| r.slots),
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
        let (socket, state) = {
            let status = self.status();
            (status.socket.clone(), status.state.clone())
        };
        async move {
            match (socket, state) {
                (Some(socket), ModelState::Ready) => child_engine::submit(&socket, &request).await,
                (_, state) => refused(
                    RefusalKind::Loading,
                    format!("the model `{}` is not ready: {}", request.model, state.words()),
                ),
            }
        }
        .boxed()
    }
}
