//! The supervision tree: actors that own plain async code and start it again when it breaks.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio_util::sync::CancellationToken;

/// At most [`Self::MOST`] restarts within [`Self::WINDOW`].
#[derive(Debug, Default)]
pub struct RestartBudget {
    restarts: VecDeque<Instant>,
}

impl RestartBudget {
    /// Restarts within the window.
    pub const MOST: usize = 3;
    /// The window.
    pub const WINDOW: Duration = Duration::from_secs(60);

    /// Spends one restart, if there is one.
    pub fn try_restart(&mut self, now: Instant) -> bool {
        while self.restarts.front().is_some_and(|at| now.saturating_duration_since(*at) >= Self::WINDOW) {
            self.restarts.pop_front();
        }
        let allowed = self.restarts.len() < Self::MOST;
        if allowed {
            self.restarts.push_back(now);
        }
        allowed
    }
}

type Run = dyn Fn(CancellationToken) -> BoxFuture<'static, Result<(), String>> + Send + Sync;

/// One branch of the tree: plain async code that runs until its token is cancelled.
#[derive(Clone)]
pub struct Service {
    name: &'static str,
    run: Arc<Run>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Service({})", self.name)
    }
}

impl Service {
    /// `run` is called again for each restart.
    pub fn new<F>(name: &'static str, run: impl Fn(CancellationToken) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self { name, run: Arc::new(move |cancel| run(cancel).boxed()) }
    }
}

/// Owns one service: cancels it when the actor stops, fails when the service does.
struct ServiceActor {
    service: Service,
    cancel: CancellationToken,
}

/// The service ended.
struct Ended(Result<(), String>);

impl ractor::Message for Ended {}

impl Actor for ServiceActor {
    type Msg = Ended;
    type State = CancellationToken;
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<Ended>, (): ()) -> Result<CancellationToken, ActorProcessingErr> {
        let cancel = self.cancel.child_token();
        let task = tokio::spawn((self.service.run)(cancel.clone()));
        tokio::spawn(async move {
            let result = task.await.unwrap_or_else(|error| Err(format!("it panicked: {error}")));
            // An actor that is gone already needs no news.
            let _ = myself.cast(Ended(result));
        });
        Ok(cancel)
    }

    async fn handle(
        &self,
        myself: ActorRef<Ended>,
        Ended(result): Ended,
        cancel: &mut CancellationToken,
    ) -> Result<(), ActorProcessingErr> {
        match result {
            Ok(()) if cancel.is_cancelled() => {
                myself.stop(None);
                Ok(())
            }
            Ok(()) => Err("it ended although nobody asked it to".into()),
            Err(error) => Err(error.into()),
        }
    }

    async fn post_stop(&self, _: ActorRef<Ended>, cancel: &mut CancellationToken) -> Result<(), ActorProcessingErr> {
        cancel.cancel();
        Ok(())
    }
}

/// What is wrong and not over, for `status`.
#[derive(Debug, Clone, Default)]
pub struct Problems(Arc<Mutex<HashMap<&'static str, String>>>);

impl Problems {
    fn set(&self, name: &'static str, problem: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, problem);
    }

    /// All of them, in words.
    pub fn list(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// The root of the tree.
struct NodeSupervisor {
    cancel: CancellationToken,
    problems: Problems,
}

struct SupervisorState {
    children: HashMap<ActorId, Service>,
    budgets: HashMap<&'static str, RestartBudget>,
}

impl NodeSupervisor {
    async fn start(&self, service: Service, myself: ActorCell, state: &mut SupervisorState) -> Result<(), String> {
        let actor = ServiceActor { service: service.clone(), cancel: self.cancel.clone() };
        let (child, _) = Actor::spawn_linked(None, actor, (), myself).await.map_err(|error| error.to_string())?;
        state.children.insert(child.get_id(), service);
        Ok(())
    }

    async fn restart(&self, child: ActorId, why: String, myself: ActorCell, state: &mut SupervisorState) {
        let Some(service) = state.children.remove(&child) else { return };
        if self.cancel.is_cancelled() {
            return;
        }
        let name = service.name;
        tracing::error!(service = name, why, "a part of the node failed");
        let budget = state.budgets.entry(name).or_default();
        if budget.try_restart(Instant::now()) {
            // What broke it may pass: each try waits twice as long.
            let pause = RESTART_PAUSE * (1 << budget.restarts.len().min(5));
            if self.cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            if let Err(error) = self.start(service, myself, state).await {
                self.problems.set(name, format!("{name} does not start again: {error}"));
            }
        } else {
            self.problems.set(name, format!("{name} failed too often and stays down ({why}); restart the node"));
        }
    }
}

impl Actor for NodeSupervisor {
    type Msg = ();
    type State = SupervisorState;
    type Arguments = Vec<Service>;

    async fn pre_start(
        &self,
        myself: ActorRef<()>,
        services: Vec<Service>,
    ) -> Result<SupervisorState, ActorProcessingErr> {
        let mut state = SupervisorState { children: HashMap::new(), budgets: HashMap::new() };
        for service in services {
            self.start(service, myself.get_cell(), &mut state).await?;
        }
        Ok(state)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<()>,
        event: SupervisionEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(child, error) => {
                self.restart(child.get_id(), error.to_string(), myself.get_cell(), state).await;
            }
            SupervisionEvent::ActorTerminated(child, _, reason) => {
                let why = reason.unwrap_or_else(|| "it stopped".into());
                self.restart(child.get_id(), why, myself.get_cell(), state).await;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The running tree.
#[derive(Debug)]
pub struct Supervision {
    root: ActorRef<()>,
    cancel: CancellationToken,
    /// What is wrong and not over.
    pub problems: Problems,
}

impl Supervision {
    /// Starts the tree; services start in their order.
    pub async fn start(services: Vec<Service>) -> Result<Self, String> {
        let (cancel, problems) = (CancellationToken::new(), Problems::default());
        let supervisor = NodeSupervisor { cancel: cancel.clone(), problems: problems.clone() };
        let (root, _) = Actor::spawn(None, supervisor, services).await.map_err(|error| error.to_string())?;
        Ok(Self { root, cancel, problems })
    }

    /// Cancels all services and waits for them, for at most `limit`.
    pub async fn stop(&self, limit: Duration) {
        self.cancel.cancel();
        let children = self.root.get_cell().get_children();
        let stopped = async {
            for child in children {
                let _ = child.wait(None).await;
            }
        };
        let _ = tokio::time::timeout(limit, stopped).await;
        let _ = self.root.stop_and_wait(None, Some(Duration::from_millis(500))).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn the_budget_is_three_in_a_minute() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut budget = RestartBudget::default();
        assert!([0, 1, 2].into_iter().all(|s| budget.try_restart(at(s))));
        assert!(!budget.try_restart(at(59)));
        assert!(budget.try_restart(at(60)));
        assert!(!budget.try_restart(at(60)));
    }

    #[tokio::test]
    async fn a_service_that_panics_is_started_again_until_its_budget_is_spent() {
        let starts = Arc::new(AtomicU32::new(0));
        let counter = starts.clone();
        let fragile = Service::new("fragile", move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            async { panic!("on purpose") }
        });
        let calm = Service::new("calm", |cancel: CancellationToken| async move {
            cancel.cancelled().await;
            Ok(())
        });
        let tree = Supervision::start(vec![fragile, calm]).await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while tree.problems.list().is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(starts.load(Ordering::SeqCst), 1 + RestartBudget::MOST as u32);
        let problems = tree.problems.list();
        assert!(problems.len() == 1 && problems[0].contains("fragile failed too often"), "{problems:?}");
        tree.stop(Duration::from_secs(2)).await;
    }
}
