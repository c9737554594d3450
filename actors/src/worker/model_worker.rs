//! A model of this node: its file, its engine process, and what happens when that dies. Whether it is loaded at all is
//! the [`manager`](super::manager)'s business.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use ingle_engine::quantize::Target;
use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::{EngineReport, ModelState};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Workers;
use super::forecast::Forecast;
use super::order::{ChangeRequest, Order, Said};
use super::route::{Route, Uses};
use crate::models::{
    CatalogModel, FetchError, FileInUse, FirstModel, Holders, ModelStore, Origin, StoreError, default_model,
};
use crate::node::{
    DeviceKind, GivenParameters, Layers, ModelChoice, ModelParameters, Outcome, Parameter, ParameterError,
    ParameterFile, ShownParameters,
};

/// What an echo engine is called.
const ECHO_NAME: &str = "echo";
/// A file that could not be fetched is tried again after this long, and after twice as long each time that it fails.
const FETCH_PAUSE: Duration = Duration::from_secs(4);
/// Up to this.
const LONGEST_FETCH_PAUSE: Duration = Duration::from_secs(64);
/// Changes that are handed over at a time: there is one in all.
const ORDERS: usize = 1;
/// How long an engine that is no longer wanted may take to end before it is killed.
const END_GRACE: Duration = Duration::from_secs(3);

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
    /// Bytes that they may have; half of their disk where missing.
    pub cache_limit: Option<u64>,
    /// Machines that are asked for the file first.
    pub holders: Arc<dyn Holders>,
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
    /// The file that it comes from: another one where it was converted.
    pub source: Option<ModelDigest>,
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
    pub(super) state: watch::Sender<ModelState>,
    problem: Mutex<Option<String>>,
    origin: Origin,
    /// Keeps the file in the store for as long as an engine may be started with it.
    in_use: Mutex<Option<FileInUse>>,
    orders: mpsc::Sender<Order>,
    changing: Arc<Semaphore>,
    /// Taken by whoever runs the model.
    ordered: tokio::sync::Mutex<mpsc::Receiver<Order>>,
    /// Engine processes so far.
    pub(super) generations: AtomicU32,
    pub(super) uses: Arc<Uses>,
    /// Somebody waits for it.
    pub(super) wanted: AtomicBool,
    pub(super) wake: Notify,
    /// When there was no room for it.
    pub(super) no_room: Mutex<Option<Instant>>,
    /// It finishes what it has and is not started again.
    pub(super) leaving: AtomicBool,
}

/// The name of a model.
pub fn model_name_of(choice: &ModelChoice) -> String {
    match choice {
        ModelChoice::Default => default_model().name,
        ModelChoice::File(path) | ModelChoice::LocalFile { path, .. } => crate::models::model_name(path),
        ModelChoice::Source(model) => model.name.clone(),
        ModelChoice::First(model) => model.name.clone(),
        ModelChoice::Quantized { inner, to } => format!("{}-{to}", model_name_of(inner)),
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
            source: None,
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
            origin: Origin::default(),
            in_use: Mutex::new(None),
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

    /// What was set by command.
    pub(crate) fn set_by_command(&self) -> GivenParameters {
        self.status().parameters.set.clone()
    }

    /// Changes parameters and returns when they hold, or are refused and everything is as it was. Dropping this does
    /// not stop the change. One change is under way at a time.
    pub async fn set_parameters(&self, request: ChangeRequest, said: Said) -> Result<Outcome, String> {
        if matches!(self.status().state, ModelState::Absent | ModelState::Unloaded) {
            return self.set_unloaded(&request.changes).await;
        }
        let (reply, replied) = oneshot::channel();
        let busy = || "another change is under way: try again when it is done".to_owned();
        let permit = self.changing.clone().try_acquire_owned().map_err(|_| busy())?;
        self.orders.try_send(Order { request, said, _permit: permit, reply }).map_err(|_| busy())?;
        replied.await.unwrap_or_else(|_| Err("the node is shutting down".into()))
    }

    /// SHA-256 of the file that it comes from, once it is known.
    pub(crate) fn source_digest(&self) -> Option<ModelDigest> {
        self.status().source
    }

    /// What it was made for.
    pub(crate) fn choice(&self) -> &ModelChoice {
        &self.options.choice
    }

    /// It has what `wanted` says, where it was meant to be `before`: also where what was fetched from somewhere is named
    /// by its hash now.
    pub(crate) fn is_what(&self, before: &ModelChoice, wanted: &ModelChoice) -> bool {
        let source = self.source_digest();
        let is_source = |choice: &ModelChoice| source.is_some() && choice.digest() == source;
        match (before, wanted) {
            (before, wanted) if before == wanted => true,
            (ModelChoice::Quantized { to: was, .. }, ModelChoice::Quantized { inner, to }) => {
                was == to && is_source(inner)
            }
            (ModelChoice::Quantized { .. }, _) | (_, ModelChoice::Quantized { .. }) => false,
            (_, wanted) => is_source(wanted),
        }
    }

    /// It answers.
    pub(crate) fn is_ready(&self) -> bool {
        self.status().state == ModelState::Ready
    }

    /// The model's state with every change of it.
    pub fn states(&self) -> watch::Receiver<ModelState> {
        self.state.subscribe()
    }

    /// Where the bytes of its file come from now.
    pub fn origin(&self) -> String {
        self.origin.now()
    }

    /// The store of its file.
    pub fn store(&self) -> Result<ModelStore, StoreError> {
        let store = ModelStore::open(&self.options.cache)?.with_limit(self.options.cache_limit);
        Ok(store.with_holders(self.options.holders.clone()).with_origin(self.origin.clone()))
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
            let mut fetch_pause = FETCH_PAUSE;
            loop {
                let trouble = self.keep_running(&cancel, &mut orders, &mut retiring).await;
                let (why, pause) = match trouble {
                    Trouble::Over => return,
                    Trouble::Final(why) => (why, None),
                    Trouble::Fetching(why) => {
                        let pause = fetch_pause;
                        fetch_pause = (pause * 2).min(LONGEST_FETCH_PAUSE);
                        (why, Some(pause))
                    }
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
        // The file may go now, where others need its place.
        *self.in_use.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.set_problem(None);
        self.set_state(ModelState::Unloaded);
        Ok(())
    }

    /// Keeps a file in the store for as long as it runs.
    fn hold(&self, store: &ModelStore, digest: &ModelDigest) -> Result<(), Trouble> {
        let in_use = store.hold(digest).map_err(|error| Trouble::Fetching(error.to_string()))?;
        *self.in_use.lock().unwrap_or_else(PoisonError::into_inner) = Some(in_use);
        Ok(())
    }

    /// Gives the file of this machine that it runs a second name in the store, from where other machines copy it, and
    /// keeps it there. False where that cannot be.
    pub(crate) async fn share(&self) -> bool {
        let choice = match &self.options.choice {
            ModelChoice::Quantized { inner, .. } => inner.as_ref(),
            choice => choice,
        };
        let (ModelChoice::File(path) | ModelChoice::LocalFile { path, .. }) = choice else { return false };
        let (Some(digest), Ok(store), path) = (self.source_digest(), self.store(), path.clone()) else { return false };
        let adopting = tokio::task::spawn_blocking({
            let store = store.clone();
            move || store.adopt(&path, &digest)
        });
        adopting.await.unwrap_or(false) && self.hold(&store, &digest).is_ok()
    }

    /// What was fetched once is held to its hash as long as this worker lives.
    async fn find_first(&self, model: &FirstModel, cancel: &CancellationToken) -> Result<Found, Trouble> {
        let store = self.store().map_err(|error| Trouble::Fetching(error.to_string()))?;
        let known = self.status().source;
        if let Some(digest) = known {
            return self.find_known(&model.known_as(digest), cancel).await;
        }
        let fetched = store.fetch_first(model, &|state| self.set_state(state), cancel).await;
        let found = fetched.map_err(|error| Trouble::Fetching(error.to_string()))?;
        self.hold(&store, &found.0)?;
        Ok(found)
    }

    async fn find_known(&self, model: &CatalogModel, cancel: &CancellationToken) -> Result<Found, Trouble> {
        let store = self.store().map_err(|error| Trouble::Fetching(error.to_string()))?;
        self.hold(&store, &model.digest)?;
        let path = store.ensure(model, &|state| self.set_state(state), cancel).await;
        Ok((model.digest, path.map_err(|error| Trouble::Fetching(error.to_string()))?))
    }

    async fn find_local(&self, path: &Path) -> Result<Found, Trouble> {
        self.set_state(ModelState::Verifying);
        let store = self.store().map_err(|error| Trouble::Fetching(error.to_string()))?;
        let file = store.local_file(path).await.map_err(|error| Trouble::Final(error.to_string()))?;
        Ok((file.digest, file.path))
    }

    /// The model's file; `None` for echo.
    pub(super) async fn find_file(&self, cancel: &CancellationToken) -> Result<Option<PathBuf>, Trouble> {
        let (choice, to) = match &self.options.choice {
            ModelChoice::Quantized { inner, to } => (inner.as_ref(), Some(to)),
            choice => (choice, None),
        };
        if to.is_none()
            && let Some(digest) = choice.digest()
        {
            // Known before it is here.
            self.status().digest = Some(digest);
        }
        let found = match choice {
            ModelChoice::Echo => return Ok(None),
            ModelChoice::Default => self.find_known(&default_model(), cancel).await?,
            ModelChoice::Source(model) => self.find_known(model, cancel).await?,
            ModelChoice::First(model) => self.find_first(model, cancel).await?,
            ModelChoice::File(path) => self.find_local(path).await?,
            ModelChoice::LocalFile { path, digest } => match self.find_local(path).await {
                Ok(found) if found.0 == *digest => found,
                Ok((other, _)) => {
                    let path = path.display();
                    let why = format!("{path} has SHA-256 {other} now, and was registered as {digest}: add it anew");
                    return Err(Trouble::Final(why));
                }
                // It has gone: perhaps the store has it, or another machine.
                Err(_) => {
                    let name = self.name();
                    let model = CatalogModel { name, digest: *digest, size: None, sources: vec![] };
                    self.find_known(&model, cancel).await?
                }
            },
            ModelChoice::Quantized { .. } => return Err(Trouble::Final("a model is converted once".into())),
        };
        self.status().source = Some(found.0);
        let (digest, path) = match to {
            None => found,
            Some(to) => self.converted(found, to, cancel).await?,
        };
        self.status().digest = Some(digest);
        Ok(Some(path))
    }

    /// The file in another format.
    async fn converted(&self, found: Found, to: &str, cancel: &CancellationToken) -> Result<Found, Trouble> {
        let to: Target = to.parse().map_err(Trouble::Final)?;
        let store = self.store().map_err(|error| Trouble::Fetching(error.to_string()))?;
        self.set_state(ModelState::Loading);
        let name = self.name();
        let converting = Box::pin(store.in_format(&name, found.0, &found.1, to));
        let Some(converted) = cancel.run_until_cancelled(converting).await else { return Err(Trouble::Over) };
        let converted = converted.map_err(|error| match error {
            FetchError::Conversion { .. } => Trouble::Final(error.to_string()),
            error => Trouble::Fetching(error.to_string()),
        })?;
        // The file that it was made from may go now.
        self.hold(&store, &converted.0)?;
        Ok(converted)
    }
}

/// A file with the hash of its content.
type Found = (ModelDigest, PathBuf);
