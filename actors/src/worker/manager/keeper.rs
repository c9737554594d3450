//! Who keeps one model: loads it when it is wanted, lets it go when it is not, moves its name to another version.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_protocol::wire::v2::ModelState;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::spec::{LoadError, ModelSpec};
use super::{Model, ModelManager};
use crate::supervisor::RestartBudget;
use crate::worker::model_worker::ModelWorker;

/// How often it is looked whether a model's time is up.
const LOOK: Duration = Duration::from_millis(500);
/// How long a version that another one has replaced may take to finish its answers. Each has a deadline of its own, so
/// this is for what hangs.
const FINISH_DEADLINE: Duration = Duration::from_secs(3_600);
/// How long a version may take to finish where there is no memory for two: requests wait meanwhile.
const MAKE_WAY_DEADLINE: Duration = Duration::from_secs(600);
/// Versions of one model that may be finishing their answers; each holds memory.
const MOST_RETIRING: usize = 2;
/// Commands that may wait for one load.
const MOST_WAITING: usize = 64;
/// How long a worker may take to end: it kills its engine before.
const END_DEADLINE: Duration = Duration::from_secs(8);

/// What somebody wants of a model.
#[derive(Debug)]
pub(super) enum Order {
    /// Load it, as this.
    Load { spec: ModelSpec, begun: oneshot::Sender<Begun> },
    /// Let it go, and where `forget` says so know it no more; told when it has gone.
    Unload { limit: Duration, forget: bool, gone: oneshot::Sender<()> },
    /// Go where nobody uses it, or when it has finished; told when it has gone, or that it stays.
    MakeWay { force: bool, gone: oneshot::Sender<bool> },
}

/// A load that has begun.
#[derive(Debug)]
pub(super) struct Begun {
    pub worker: Arc<ModelWorker>,
    /// Told when it is ready, or why it is not.
    pub done: oneshot::Receiver<Result<(), String>>,
}

/// A worker that runs.
struct Life {
    worker: Arc<ModelWorker>,
    states: watch::Receiver<ModelState>,
    stop: CancellationToken,
    run: JoinHandle<Result<(), String>>,
    waiting: Vec<oneshot::Sender<Result<(), String>>>,
    budget: RestartBudget,
}

impl Life {
    fn start(worker: Arc<ModelWorker>, cancel: &CancellationToken) -> Self {
        let stop = cancel.child_token();
        let run = tokio::spawn(worker.clone().run(stop.clone()));
        let states = worker.states();
        Self { worker, states, stop, run, waiting: Vec::new(), budget: RestartBudget::default() }
    }

    fn begun(&mut self) -> Option<Begun> {
        self.waiting.retain(|waiting| !waiting.is_closed());
        if self.waiting.len() >= MOST_WAITING {
            return None;
        }
        let (told, done) = oneshot::channel();
        match self.states.borrow().clone() {
            ModelState::Ready => drop(told.send(Ok(()))),
            _ => self.waiting.push(told),
        }
        Some(Begun { worker: self.worker.clone(), done })
    }

    fn tell(&mut self, result: &Result<(), String>) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(result.clone());
        }
    }

    fn tell_state(&mut self, state: &ModelState) {
        match state {
            ModelState::Ready => self.tell(&Ok(())),
            ModelState::Failed { why } => self.tell(&Err(why.clone())),
            ModelState::Unloaded => self.tell(&Err("it was unloaded meanwhile".into())),
            _ => {}
        }
    }

    /// Ends it. Its process is gone when this returns.
    async fn end(mut self, manager: &ModelManager) {
        self.stop.cancel();
        if tokio::time::timeout(END_DEADLINE, &mut self.run).await.is_err() {
            self.run.abort();
            self.worker.set_state(ModelState::Unloaded);
        }
        self.tell(&Err("it was unloaded meanwhile".into()));
        manager.ledger.release(self.worker.index());
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // Also where its keeper broke: nobody else would end it.
        self.stop.cancel();
    }
}

/// The next state; never where there is none any more.
async fn changed(states: &mut watch::Receiver<ModelState>) -> ModelState {
    match states.changed().await {
        Ok(()) => states.borrow_and_update().clone(),
        Err(_) => std::future::pending().await,
    }
}

/// Keeps a model until `cancel`.
pub(super) async fn keep(manager: Arc<ModelManager>, model: Arc<Model>, cancel: CancellationToken) {
    let mut orders = model.ordered.lock().await;
    let retiring = JoinSet::new();
    let mut keeper = Keeper { manager, model: model.clone(), cancel, retiring, before: None, is_forgotten: false };
    let mut begun = None;
    let mut loads = model.spec().pinned;
    loop {
        if !loads {
            begun = tokio::select! {
                () = keeper.cancel.cancelled() => break,
                order = orders.recv() => match order {
                    None => break,
                    Some(Order::Unload { forget, gone, .. }) => {
                        if forget {
                            keeper.manager.drop_model(&model);
                        }
                        let _ = gone.send(());
                        if forget {
                            break;
                        }
                        continue;
                    }
                    Some(Order::MakeWay { gone, .. }) => {
                        let _ = gone.send(true);
                        continue;
                    }
                    Some(Order::Load { spec, begun }) => {
                        keeper.become_other(spec);
                        Some(begun)
                    }
                },
                () = async { model.current().until_wanted().await } => None,
            };
        }
        loads = false;
        let mut life = Life::start(model.current(), &keeper.cancel);
        if let (Some(told), Some(load)) = (begun.take(), life.begun()) {
            let _ = told.send(load);
        }
        keeper.attend(life, &mut orders).await;
        if keeper.cancel.is_cancelled() || keeper.is_forgotten {
            break;
        }
    }
    // Those that finish their answers end with the node.
    while keeper.retiring.join_next().await.is_some() {}
}

struct Keeper {
    manager: Arc<ModelManager>,
    model: Arc<Model>,
    cancel: CancellationToken,
    retiring: JoinSet<()>,
    /// What it was meant to be before another version began to be loaded.
    before: Option<ModelSpec>,
    /// The node knows the model no more.
    is_forgotten: bool,
}

impl Keeper {
    /// While it is not loaded it becomes something else without further ado.
    fn become_other(&self, spec: ModelSpec) {
        let before = self.model.current();
        if self.model.spec().choice == spec.choice {
            self.model.set_spec(spec);
            return;
        }
        match self.manager.worker(&spec) {
            Ok(worker) => {
                self.model.set_spec(spec);
                self.manager.workers.add(worker.clone());
                self.model.set_current(worker);
                self.manager.remove_worker(before);
            }
            Err(error) => tracing::error!(model = spec.name, %error, "it stays what it was"),
        }
    }

    /// Keeps it loaded until somebody or something ends that.
    async fn attend(&mut self, mut life: Life, orders: &mut tokio::sync::mpsc::Receiver<Order>) {
        let mut next: Option<Life> = None;
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let manager = self.manager.clone();
            while self.retiring.try_join_next().is_some() {}
            tokio::select! {
                () = self.cancel.cancelled() => {
                    if let Some(next) = next {
                        tokio::join!(life.end(&manager), next.end(&manager));
                    } else {
                        life.end(&manager).await;
                    }
                    return;
                }
                ended = &mut life.run => {
                    let again = match ended {
                        Err(error) if error.is_panic() => {
                            tracing::error!(model = self.model.name, "its worker broke");
                            life.budget.try_restart(Instant::now())
                        }
                        _ => false,
                    };
                    manager.ledger.release(life.worker.index());
                    if again {
                        life.run = tokio::spawn(life.worker.clone().run(life.stop.clone()));
                        continue;
                    }
                    life.tell(&Err("it ended".into()));
                    if life.worker.status().state != ModelState::Unloaded {
                        life.worker.set_state(ModelState::Failed { why: "its worker broke too often".into() });
                    }
                    match next.take() {
                        Some(other) => life = self.move_to(other, None),
                        None => return,
                    }
                }
                state = changed(&mut life.states) => {
                    if state == ModelState::Ready {
                        manager.remember(&self.model).await;
                    }
                    life.tell_state(&state);
                }
                state = async {
                    match &mut next {
                        Some(next) => changed(&mut next.states).await,
                        None => std::future::pending().await,
                    }
                } => {
                    let Some(mut other) = next.take() else { continue };
                    if state == ModelState::Ready {
                        manager.remember(&self.model).await;
                    }
                    other.tell_state(&state);
                    match state {
                        ModelState::Ready => life = self.move_to(other, Some(life)),
                        ModelState::Failed { .. } | ModelState::Unloaded => {
                            let worker = other.worker.clone();
                            other.end(&manager).await;
                            manager.remove_worker(worker);
                            // It stays what it was, also in what is kept.
                            if let Some(before) = self.before.take() {
                                self.model.set_spec(before);
                                manager.remember_specs().await;
                            }
                        }
                        _ => next = Some(other),
                    }
                }
                _ = ticks.tick() => {
                    let idle = life.worker.idle_for();
                    let spec = self.model.spec();
                    let is_over = spec.keep_alive().is_some_and(|limit| idle.is_some_and(|idle| idle >= limit));
                    if is_over && !spec.pinned && next.is_none() && life.worker.leave_if_idle() {
                        tracing::info!(model = self.model.name, "nobody has used it for long: it goes");
                        life.end(&manager).await;
                        return;
                    }
                }
                order = orders.recv() => match order {
                    None => {
                        life.end(&manager).await;
                        return;
                    }
                    Some(Order::Unload { limit, forget, gone }) => {
                        if let Some(other) = next {
                            let worker = other.worker.clone();
                            other.end(&manager).await;
                            manager.remove_worker(worker);
                        }
                        self.let_go(life, limit).await;
                        // Before anybody is told: who asks for it from now on does not have it loaded again.
                        self.is_forgotten = forget;
                        if forget {
                            manager.drop_model(&self.model);
                        }
                        let _ = gone.send(());
                        return;
                    }
                    Some(Order::MakeWay { force, gone }) => {
                        let goes = life.worker.leave_if_idle() || (force && next.is_some());
                        if !goes {
                            let _ = gone.send(false);
                            continue;
                        }
                        let (other, before) = (next.take(), life.worker.clone());
                        self.let_go(life, MAKE_WAY_DEADLINE).await;
                        let _ = gone.send(true);
                        match other {
                            None => return,
                            Some(other) => {
                                life = self.move_to(other, None);
                                manager.remove_worker(before);
                            }
                        }
                    }
                    Some(Order::Load { spec, begun }) => {
                        if next.is_some() || self.retiring.len() >= MOST_RETIRING {
                            // Whoever waits sees that it was not taken.
                            continue;
                        }
                        match self.load(spec, &mut life, &mut next).await {
                            Ok(Some(load)) => drop(begun.send(load)),
                            Ok(None) => {}
                            Err(error) => tracing::warn!(model = self.model.name, %error, "it stays what it was"),
                        }
                    }
                }
            }
        }
    }

    /// It is loaded, or on its way: as another version it is loaded beside, as the same one there is nothing to do but
    /// to try again what has failed.
    async fn load(
        &mut self,
        spec: ModelSpec,
        life: &mut Life,
        next: &mut Option<Life>,
    ) -> Result<Option<Begun>, LoadError> {
        let before = self.model.spec();
        let is_same = life.worker.is_what(&before.choice, &spec.choice) && !life.worker.is_outdated().await;
        self.model.set_spec(spec.clone());
        let failed = matches!(life.worker.status().state, ModelState::Failed { .. });
        if is_same && !failed {
            return Ok(life.begun());
        }
        let worker = self.manager.worker(&spec).inspect_err(|_| self.model.set_spec(before.clone()))?;
        self.manager.workers.add(worker.clone());
        let mut other = Life::start(worker, &self.cancel);
        let begun = other.begun();
        if failed {
            let old = std::mem::replace(life, other);
            self.model.set_current(life.worker.clone());
            let worker = old.worker.clone();
            old.end(&self.manager).await;
            self.manager.remove_worker(worker);
        } else {
            self.before = Some(before);
            *next = Some(other);
        }
        Ok(begun)
    }

    /// Lets answers finish and ends the worker.
    async fn let_go(&mut self, life: Life, limit: Duration) {
        tokio::select! {
            () = life.worker.finish(limit, false) => {}
            () = self.cancel.cancelled() => {}
        }
        life.end(&self.manager).await;
    }

    /// Requests go to `next` from now on; `before` finishes its answers and is ended.
    fn move_to(&mut self, next: Life, before: Option<Life>) -> Life {
        self.model.set_current(next.worker.clone());
        let Some(before) = before else { return next };
        tracing::info!(model = self.model.name, "another version has taken over");
        let (manager, cancel) = (self.manager.clone(), self.cancel.clone());
        self.retiring.spawn(async move {
            tokio::select! {
                () = before.worker.finish(FINISH_DEADLINE, true) => {}
                () = cancel.cancelled() => {}
            }
            let worker = before.worker.clone();
            before.end(&manager).await;
            manager.remove_worker(worker);
        });
        next
    }
}
