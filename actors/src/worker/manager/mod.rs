//! The models of a node: any number of them, loaded, switched and unloaded while requests run.
//!
//! [`ModelManager::load`], [`ModelManager::unload`] and [`ModelManager::states`] are all that somebody needs who wants
//! to drive it. Each model has a task that keeps it (`keeper`), which owns its worker; each worker owns its engine
//! process. A request for a model that is known and not loaded loads it: the gateway asks by `Workers::want`.

mod keeper;
mod known;
mod memory;
mod seen;
mod spec;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use ingle_protocol::names::near;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::keeper::{Begun, Order};
use self::known::KnownModels;
use self::memory::{Ledger, NodeRoom};
use super::model_worker::{ModelWorker, WorkerOptions};
use super::{Worker, Workers};
use crate::models::Holders;
use crate::node::{DeviceKind, GivenParameters, Layers, ModelChoice, ParameterFile, check_model_file};

pub use self::memory::Promised;
pub use self::seen::SeenModel;
pub use self::spec::{LoadError, LoadRequest, ModelSpec};

/// Models that a node knows at most, loaded or not.
pub const MOST_MODELS: usize = 256;
/// Orders for one model that may wait.
const ORDERS: usize = 8;
/// How long the one who keeps a model may take to hear an order: it may be letting another version finish.
const ORDER_DEADLINE: Duration = Duration::from_secs(30);
/// An order that cannot be carried out now is given again after this long.
const ORDER_AGAIN: Duration = Duration::from_millis(200);
/// How long making room may take, others' answers included.
const PLANNING_DEADLINE: Duration = Duration::from_secs(900);
/// What comes on top of the limit of an unload.
const UNLOAD_MARGIN: Duration = Duration::from_secs(30);

/// What all models of a node have in common.
#[derive(Debug, Clone)]
pub struct ManagerOptions {
    /// Where what is known and what is set is kept; its lock is held.
    pub state_dir: PathBuf,
    /// The model of the configuration; it is pinned.
    pub own: Option<ModelChoice>,
    /// What the configuration gives for models.
    pub parameters: GivenParameters,
    /// What models compute on.
    pub device: DeviceKind,
    /// Where model files are kept.
    pub cache: PathBuf,
    /// Bytes that they may take there; `None` for the usual share of the disk.
    pub cache_limit: Option<u64>,
    /// Who else has model files.
    pub holders: Arc<dyn Holders>,
    /// Bytes of memory that all models may take; `None` for as much as there is.
    pub memory: Option<u64>,
    /// Environment variables for the engine processes.
    pub environment: Vec<(String, String)>,
    /// Engines from this number on are the manager's; number 0 is that of the configuration's model.
    pub first_index: u16,
}

/// One model that the node knows.
#[derive(Debug)]
struct Model {
    name: String,
    is_default: bool,
    /// It was ready once: only what works is kept.
    worked: AtomicBool,
    spec: Mutex<ModelSpec>,
    current: Mutex<Arc<ModelWorker>>,
    orders: mpsc::Sender<Order>,
    /// Taken by whoever keeps it.
    ordered: tokio::sync::Mutex<mpsc::Receiver<Order>>,
}

impl Model {
    fn spec(&self) -> ModelSpec {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_spec(&self, spec: ModelSpec) {
        *self.spec.lock().unwrap_or_else(PoisonError::into_inner) = spec;
    }

    fn current(&self) -> Arc<ModelWorker> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, worker: Arc<ModelWorker>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = worker;
    }
}

/// See the module.
#[derive(Debug)]
pub struct ModelManager {
    options: ManagerOptions,
    workers: Arc<Workers>,
    known: KnownModels,
    /// Held while what is known is written.
    writing: tokio::sync::Mutex<()>,
    models: Mutex<BTreeMap<String, Arc<Model>>>,
    /// All workers with the names of their models, also those that come and go.
    engines: Mutex<Vec<(String, Weak<ModelWorker>)>>,
    ledger: Ledger,
    next_index: AtomicU16,
    own: Option<String>,
    /// Models that nobody keeps yet.
    unkept: mpsc::Sender<Arc<Model>>,
    to_keep: tokio::sync::Mutex<mpsc::Receiver<Arc<Model>>>,
    ending: AtomicBool,
    room: Weak<Self>,
    /// Counts models that come and go.
    changed: watch::Sender<u64>,
}

/// A model that is being loaded.
#[derive(Debug)]
pub struct Loading {
    /// Its name.
    pub name: String,
    begun: Begun,
}

impl Loading {
    /// Its state, with every change of it.
    pub fn states(&self) -> tokio::sync::watch::Receiver<ingle_protocol::wire::v2::ModelState> {
        self.begun.worker.states()
    }

    /// Returns when it is ready, or with the reason why it is not.
    pub async fn done(&mut self) -> Result<(), LoadError> {
        match (&mut self.begun.done).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(LoadError::Failed(why)),
            Err(_) => Err(LoadError::Ending),
        }
    }
}

impl ModelManager {
    /// Knows what was known before. Nothing is loaded until [`Self::run`].
    pub fn new(options: ManagerOptions, workers: Arc<Workers>) -> Result<Arc<Self>, LoadError> {
        let known = KnownModels::of(&options.state_dir);
        let own = options.own.clone().map(|choice| ModelSpec { pinned: true, ..ModelSpec::of(choice) });
        let mut specs = known.load()?;
        specs.truncate(MOST_MODELS);
        if let Some(own) = &own {
            specs.retain(|spec| spec.name != own.name);
        }
        let (unkept, to_keep) = mpsc::channel(MOST_MODELS + 1);
        let manager = Arc::new_cyclic(|room| Self {
            next_index: AtomicU16::new(options.first_index),
            options,
            workers,
            known,
            writing: tokio::sync::Mutex::default(),
            models: Mutex::default(),
            engines: Mutex::default(),
            ledger: Ledger::default(),
            own: own.as_ref().map(|own| own.name.clone()),
            unkept,
            to_keep: tokio::sync::Mutex::new(to_keep),
            ending: AtomicBool::new(false),
            room: room.clone(),
            changed: watch::Sender::new(0),
        });
        for spec in own.into_iter().chain(specs) {
            manager.add(spec)?.worked.store(true, Ordering::Release);
        }
        Ok(manager)
    }

    fn models(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Model>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn model(&self, name: &str) -> Result<Arc<Model>, LoadError> {
        let models = self.models();
        models.get(name).cloned().ok_or_else(|| {
            let near = near(name, models.keys().map(String::as_str)).into_iter().map(str::to_owned).collect();
            LoadError::Unknown(name.to_owned(), near)
        })
    }

    /// The model of the configuration.
    pub fn own(&self) -> Option<Arc<ModelWorker>> {
        self.get(self.own.as_deref()?)
    }

    /// The worker of a model, loaded or not.
    pub fn get(&self, name: &str) -> Option<Arc<ModelWorker>> {
        self.models().get(name).map(|model| model.current())
    }

    /// What is wrong with models and stays wrong, in words.
    pub fn problems(&self) -> Vec<String> {
        let models: Vec<Arc<Model>> = self.models().values().cloned().collect();
        models.iter().filter_map(|model| Some(format!("{}: {}", model.name, model.current().problem()?))).collect()
    }

    /// All models that the node knows, the configuration's first.
    pub fn states(&self) -> Vec<SeenModel> {
        let models: Vec<Arc<Model>> = self.models().values().cloned().collect();
        let mut seen: Vec<SeenModel> = models.iter().map(|model| self.see(model)).collect();
        seen.sort_by_key(|model| !model.is_default);
        seen
    }

    fn specs(&self) -> Vec<ModelSpec> {
        let own = self.own.as_deref();
        let mut specs: Vec<ModelSpec> = self.models().values().map(|model| model.spec()).collect();
        specs.sort_by_key(|spec| Some(spec.name.as_str()) != own);
        specs
    }

    /// Loads a model, or another version of one. What is loaded stays until that is ready. Returns when it has begun.
    pub async fn load(&self, request: &LoadRequest) -> Result<Loading, LoadError> {
        self.load_as(request.resolve(&self.specs())?).await
    }

    /// As [`Self::load`].
    pub async fn load_as(&self, spec: ModelSpec) -> Result<Loading, LoadError> {
        if self.ending.load(Ordering::Acquire) {
            return Err(LoadError::Ending);
        }
        spec::check_name(&spec.name)?;
        if let ModelChoice::File(path) = &spec.choice {
            let path = path.clone();
            let checked = tokio::task::spawn_blocking(move || check_model_file(&path)).await;
            checked.map_err(|_| LoadError::Ending)?.map_err(|error| LoadError::File(error.to_string()))?;
        }
        let name = spec.name.clone();
        let known = self.models().get(&name).cloned();
        let model = match known {
            Some(model) => model,
            None => self.add(spec.clone())?,
        };
        let begin = async {
            loop {
                let (begun, began) = oneshot::channel();
                let order = Order::Load { spec: spec.clone(), begun };
                if model.orders.try_send(order).is_ok()
                    && let Ok(begun) = began.await
                {
                    return begun;
                }
                // Another version of it is on its way, or older ones are finishing their answers.
                tokio::time::sleep(ORDER_AGAIN).await;
            }
        };
        let begun = timeout(ORDER_DEADLINE, begin).await.map_err(|_| LoadError::Busy(name.clone()))?;
        // On disk before anybody is told that it will be there again.
        self.keep_known().await?;
        Ok(Loading { name, begun })
    }

    /// Lets a model go: its answers finish within `limit`, or move. Returns when its process has ended. It stays known:
    /// a request for it loads it again.
    pub async fn unload(&self, name: &str, limit: Duration) -> Result<(), LoadError> {
        self.order_unload(name, limit, false).await
    }

    async fn order_unload(&self, name: &str, limit: Duration, forget: bool) -> Result<(), LoadError> {
        let model = self.model(name)?;
        let busy = || LoadError::Busy(name.to_owned());
        let (gone, went) = oneshot::channel();
        model.orders.try_send(Order::Unload { limit, forget, gone }).map_err(|_| busy())?;
        timeout(limit + UNLOAD_MARGIN, went).await.map_err(|_| busy())?.map_err(|_| LoadError::Ending)
    }

    /// Unloads a model and knows it no more. Not the configuration's.
    pub async fn forget(&self, name: &str, limit: Duration) -> Result<(), LoadError> {
        self.order_unload(name, limit, self.own.as_deref() != Some(name)).await?;
        self.keep_known().await
    }

    /// How a model of this node is meant to be, if there is one of this name.
    pub fn spec(&self, name: &str) -> Option<ModelSpec> {
        self.models().get(name).map(|model| model.spec())
    }

    /// The models that are here because the registry has them.
    pub fn registered(&self) -> Vec<ModelSpec> {
        self.specs().into_iter().filter(|spec| spec.registered).collect()
    }

    /// All models of this node, loaded or not.
    pub fn workers(&self) -> Vec<Arc<ModelWorker>> {
        self.models().values().map(|model| model.current()).collect()
    }

    /// Changes whenever a model comes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether it is pinned and how long it stays may be meant otherwise than before; what is loaded stays.
    pub async fn amend(&self, spec: ModelSpec) -> Result<(), LoadError> {
        let model = self.model(&spec.name)?;
        let before = model.spec();
        if before == spec {
            return Ok(());
        }
        model.set_spec(spec);
        self.keep_known().await
    }

    /// Has a model go for another one, if nobody uses it. False where it stays.
    async fn make_way(&self, name: &str, force: bool) -> bool {
        let Ok(model) = self.model(name) else { return true };
        let (gone, went) = oneshot::channel();
        let sent = model.orders.try_send(Order::MakeWay { force, gone }).is_ok();
        sent && timeout(PLANNING_DEADLINE, went).await.is_ok_and(|went| went.unwrap_or(true))
    }

    /// Keeps all models until `cancel`. Their engines have ended when this returns.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let mut to_keep = self.to_keep.lock().await;
        let mut keepers = JoinSet::new();
        // Those that a run before this one has left.
        let models: Vec<Arc<Model>> = self.models().values().cloned().collect();
        while to_keep.try_recv().is_ok() {}
        for model in models {
            keepers.spawn(keeper::keep(self.clone(), model, cancel.child_token()));
        }
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                Some(model) = to_keep.recv() => {
                    keepers.spawn(keeper::keep(self.clone(), model, cancel.child_token()));
                }
                Some(ended) = keepers.join_next() => {
                    if ended.is_err_and(|error| error.is_panic()) {
                        return Err("who keeps a model broke".into());
                    }
                }
            }
        }
        self.ending.store(true, Ordering::Release);
        while keepers.join_next().await.is_some() {}
        Ok(())
    }

    /// One more model.
    fn add(&self, spec: ModelSpec) -> Result<Arc<Model>, LoadError> {
        let worker = self.worker(&spec)?;
        let (orders, ordered) = mpsc::channel(ORDERS);
        let name = spec.name.clone();
        let model = Arc::new(Model {
            is_default: self.own.as_deref() == Some(name.as_str()),
            name: name.clone(),
            worked: AtomicBool::new(false),
            spec: Mutex::new(spec),
            current: Mutex::new(worker.clone()),
            orders,
            ordered: tokio::sync::Mutex::new(ordered),
        });
        {
            let mut models = self.models();
            if let Some(there) = models.get(&name) {
                return Ok(there.clone());
            }
            if models.len() >= MOST_MODELS {
                return Err(LoadError::TooMany(MOST_MODELS));
            }
            models.insert(name, model.clone());
        }
        self.changed.send_modify(|count| *count += 1);
        self.workers.add(worker);
        // As many fit as there may be models.
        self.unkept.try_send(model.clone()).map_err(|_| LoadError::TooMany(MOST_MODELS))?;
        Ok(model)
    }

    /// A worker for a model, which is not yet among the node's.
    fn worker(&self, spec: &ModelSpec) -> Result<Arc<ModelWorker>, LoadError> {
        let is_own = self.own.as_deref() == Some(spec.name.as_str());
        let mut engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        engines.retain(|(_, worker)| worker.strong_count() > 0);
        let used: Vec<u16> = engines.iter().filter_map(|(_, worker)| Some(worker.upgrade()?.index())).collect();
        let index = match is_own && !used.contains(&0) {
            true => 0,
            // There are far fewer workers than numbers.
            false => loop {
                let index = self.next_index.fetch_add(1, Ordering::Relaxed).max(self.options.first_index);
                if !used.contains(&index) {
                    break index;
                }
            },
        };
        let file = ParameterFile::of(&self.options.state_dir);
        let set = file.load(&spec.name).map_err(|error| LoadError::Kept(error.to_string()))?;
        let options = WorkerOptions {
            name: spec.name.clone(),
            choice: spec.choice.clone(),
            is_default: is_own,
            room: Arc::new(NodeRoom(self.room.clone())),
            device: self.options.device,
            cache: self.options.cache.clone(),
            cache_limit: self.options.cache_limit,
            holders: self.options.holders.clone(),
            sockets: self.options.state_dir.join("run"),
            index,
            parameters: Layers { config: self.options.parameters.clone(), set },
            parameter_file: file,
            environment: self.options.environment.clone(),
        };
        let worker =
            ModelWorker::new(options, self.workers.clone()).map_err(|error| LoadError::Kept(error.to_string()))?;
        engines.push((spec.name.clone(), Arc::downgrade(&worker)));
        Ok(worker)
    }

    /// Who keeps the model ends; nobody finds it any more.
    fn drop_model(&self, model: &Arc<Model>) {
        let mut models = self.models();
        if models.get(&model.name).is_some_and(|known| Arc::ptr_eq(known, model)) {
            models.remove(&model.name);
        }
        drop(models);
        self.remove_worker(model.current());
    }

    /// Writes down how models are meant to be, where that has changed by itself.
    async fn remember_specs(&self) {
        if let Err(error) = self.keep_known().await {
            tracing::error!(%error, "what is known of models is not written down");
        }
    }

    fn remove_worker(&self, worker: Arc<ModelWorker>) {
        let worker: Arc<dyn Worker> = worker;
        self.workers.remove(&worker);
    }

    /// All workers with their models, and whether it is the one that the model's name stands for.
    fn engines(&self) -> Vec<(Arc<Model>, Arc<ModelWorker>, bool)> {
        let engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let models = self.models();
        let with_model = |(name, worker): (String, Weak<ModelWorker>)| {
            let (model, worker) = (models.get(&name)?.clone(), worker.upgrade()?);
            let is_current = Arc::ptr_eq(&model.current(), &worker);
            Some((model, worker, is_current))
        };
        engines.into_iter().filter_map(with_model).collect()
    }

    /// The model works: it is known from now on, also after a restart.
    async fn remember(&self, model: &Model) {
        if !model.worked.swap(true, Ordering::AcqRel)
            && let Err(error) = self.keep_known().await
        {
            tracing::error!(model = model.name, %error, "it will not be known after a restart");
        }
    }

    async fn keep_known(&self) -> Result<(), LoadError> {
        let _writing = self.writing.lock().await;
        let known: Vec<ModelSpec> = {
            let models = self.models();
            let kept = models.values().filter(|model| !model.is_default && model.worked.load(Ordering::Acquire));
            kept.map(|model| model.spec()).collect()
        };
        let file = self.known.clone();
        // fsync takes its time, and tasks that pulse must not wait for it.
        let storing = tokio::task::spawn_blocking(move || file.store(&known));
        storing.await.map_err(|error| LoadError::Kept(error.to_string()))?
    }
}
