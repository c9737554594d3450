//! Changes of a running model's parameters: taken by its engine, or by another one that replaces it.
//!
//! A change that the running engine cannot take starts a second engine beside it. When that one is ready, requests go
//! to it from that moment on, and the one before finishes its answers and is ended. Where memory is too small for
//! both, the first finishes and is ended before the second is started. Whatever goes wrong, the engine that runs in
//! the end has the values that are kept.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_protocol::wire::v2::ModelState;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::SILENCE_LIMIT;
use super::child_engine::AdjustFailure;
use super::engine_life::Life;
use super::model_worker::ModelWorker;
use super::order::{Order, SAY_AGAIN};
use super::route::Route;
use crate::node::{Change, GivenParameters, ModelParameters, Outcome, ParameterChanges};
use crate::platform::memory_of;

/// How long an engine may take to get ready when parameters are changed.
const READY_DEADLINE: Duration = Duration::from_secs(600);
/// How long an engine that is no longer needed may take to finish its answers. Each has a deadline of its own, so
/// this is for what hangs.
const FINISH_DEADLINE: Duration = Duration::from_secs(3_600);
/// Engines of one model that may be finishing their answers; each holds memory.
const MOST_RETIRING: usize = 2;

/// Why a started engine does not get ready.
struct NotReady {
    why: String,
    /// Bytes of memory that were missing; 0 where it is something else.
    missing_memory: u64,
}

impl NotReady {
    fn because(why: impl Into<String>) -> Self {
        Self { why: why.into(), missing_memory: 0 }
    }
}

/// How a change went.
enum Changed {
    To(Outcome),
    /// Everything is as it was.
    Refused(String),
    /// The engine ended in the middle of it; nothing was changed. True where it hung.
    Ended(bool),
}

impl ModelWorker {
    pub(super) fn refuse_for_now(&self, order: Order) {
        let state = self.status().state.words();
        order.end(Err(format!("the model is {state}: set its parameters when it is ready")));
    }

    /// Keeps what is to be set for an engine that does not run.
    pub(super) async fn only_keep(&self, order: Order) {
        let result = match self.prepare(&order) {
            Ok((set, values)) => self.keep(set, values).await.map(|()| Outcome::Stored),
            Err(why) => Err(why),
        };
        order.end(result);
    }

    /// Parameters of a model that is not loaded: they hold when it is.
    pub(super) async fn set_unloaded(&self, changes: &ParameterChanges) -> Result<Outcome, String> {
        let (set, values) = self.prepared(changes)?;
        self.keep(set, values).await.map(|()| Outcome::Stored)
    }

    fn prepare(&self, order: &Order) -> Result<(GivenParameters, ModelParameters), String> {
        self.prepared(&order.request.changes)
    }

    fn prepared(&self, changes: &ParameterChanges) -> Result<(GivenParameters, ModelParameters), String> {
        let mut layers = self.status().parameters.clone();
        layers.set = layers.set.with(changes);
        let values = layers.resolve().map_err(|error| error.to_string())?;
        Ok((layers.set, values))
    }

    /// Writes down what is set, and takes it for what holds. On an error nothing has changed.
    async fn keep(&self, set: GivenParameters, values: ModelParameters) -> Result<(), String> {
        let (file, name, on_disk) = (self.options.parameter_file.clone(), self.status().name.clone(), set.clone());
        // fsync takes its time, and tasks that pulse must not wait for it.
        let storing = tokio::task::spawn_blocking(move || file.store(&name, &on_disk));
        storing.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let mut status = self.status();
        (status.parameters.set, status.values) = (set, values);
        Ok(())
    }

    /// Changes parameters. `Some` where the engine has ended meanwhile: true where it hung.
    pub(super) async fn carry_out(
        &self,
        life: &mut Life,
        file: Option<&Path>,
        order: Order,
        retiring: &mut JoinSet<()>,
    ) -> Option<bool> {
        if self.status().state != ModelState::Ready {
            self.refuse_for_now(order);
            return None;
        }
        let (set, values) = match self.prepare(&order) {
            Ok(prepared) => prepared,
            Err(why) => {
                order.end(Err(why));
                return None;
            }
        };
        let change = self.status().values.change_to(&values, life.room);
        let changed = match (change, order.request.restart) {
            (Change::Nothing, _) => match self.keep(set, values).await {
                Ok(()) => Changed::To(Outcome::Unchanged),
                Err(why) => Changed::Refused(why),
            },
            (Change::Live, false) => self.adjust(life, set, values).await,
            (_, true) => self.restart(life, file, &order, set, values).await,
            (Change::Reload, false) => self.replace(life, file, &order, (set, values), retiring).await,
        };
        match changed {
            Changed::To(outcome) => {
                tracing::info!(?outcome, parameters = ?self.status().values, "parameters set");
                self.workers.note_change();
                order.end(Ok(outcome));
                None
            }
            Changed::Refused(why) => {
                order.end(Err(why));
                None
            }
            Changed::Ended(silent) => {
                order.end(Err("the engine process ended meanwhile: nothing was changed, try again".into()));
                Some(silent)
            }
        }
    }

    /// Gives the running engine other limits. They are on disk before they hold.
    async fn adjust(&self, life: &mut Life, set: GivenParameters, values: ModelParameters) -> Changed {
        let (before, live) = (self.status().clone(), values.live());
        if let Err(why) = self.keep(set, values).await {
            return Changed::Refused(why);
        }
        let Life { child, reports, route, room, was_ready, .. } = life;
        let adjusted = tokio::select! {
            // Its answer first: an engine that took the values may end at once.
            biased;
            adjusted = child.adjust(live) => adjusted,
            silent = self.watch(reports, route, *room, was_ready) => {
                let _ = self.keep(before.parameters.set, before.values).await;
                return Changed::Ended(silent);
            }
        };
        let why = match adjusted {
            Ok(()) => return Changed::To(Outcome::Live),
            Err(AdjustFailure::Refused(why)) => why,
            Err(AdjustFailure::Silent) => {
                let _ = self.keep(before.parameters.set, before.values).await;
                return Changed::Ended(true);
            }
        };
        match self.keep(before.parameters.set, before.values).await {
            Ok(()) => Changed::Refused(why),
            Err(error) => Changed::Refused(format!("{why}; and {error}")),
        }
    }

    /// Starts an engine beside the running one and moves the requests over. Where memory is too small for both, the
    /// running one ends first.
    async fn replace(
        &self,
        life: &mut Life,
        file: Option<&Path>,
        order: &Order,
        (set, values): (GivenParameters, ModelParameters),
        retiring: &mut JoinSet<()>,
    ) -> Changed {
        while retiring.try_join_next().is_some() {}
        if retiring.len() >= MOST_RETIRING {
            return Changed::Refused(format!(
                "{MOST_RETIRING} engines of this model are finishing their answers: try again when one has ended"
            ));
        }
        order.say("Starting another engine beside the running one.".into());
        let mut next = match self.start(file, &values) {
            Ok(next) => next,
            Err(error) => return Changed::Refused(format!("the engine process cannot be started: {error}")),
        };
        let Life { child, reports, route, room, was_ready, .. } = life;
        let ready = tokio::select! {
            ready = until_ready(&mut next, order) => ready,
            silent = self.watch(reports, route, *room, was_ready) => return Changed::Ended(silent),
        };
        if let Err(NotReady { why, missing_memory }) = ready {
            drop(next);
            let freed = child.pid().and_then(memory_of).unwrap_or(0);
            if missing_memory == 0 || missing_memory > freed {
                return Changed::Refused(why);
            }
            order.say("There is not enough memory for two engines at a time.".into());
            return self.restart(life, file, order, set, values).await;
        }
        if let Err(why) = self.keep(set, values).await {
            return Changed::Refused(why);
        }
        self.take_over(&mut next);
        let before = std::mem::replace(life, next);
        let open = before.route.open();
        if open > 0 {
            order.say(format!("The engine before finishes {}.", answers(open)));
        }
        retiring.spawn(async move {
            let mut reports = before.reports;
            // Read on: a full pipe would stop the engine.
            let reading = async { while reports.recv().await.is_some() {} };
            tokio::select! {
                _ = timeout(FINISH_DEADLINE, before.route.idle()) => {}
                () = reading => {}
            }
            before.child.end().await;
        });
        Changed::To(Outcome::Moved)
    }

    /// Requests go to this engine from now on.
    fn take_over(&self, next: &mut Life) {
        let mut status = self.status();
        (status.generation, status.pid) = (next.generation, next.child.pid());
        (status.route, status.room) = (Some(next.route.clone()), Some(next.room));
        status.report = next.report.take();
        status.reported_at = Some(Instant::now());
    }

    /// Lets the running engine finish, ends it and starts another; where that one does not get ready, one with the
    /// values before.
    async fn restart(
        &self,
        life: &mut Life,
        file: Option<&Path>,
        order: &Order,
        set: GivenParameters,
        values: ModelParameters,
    ) -> Changed {
        self.set_state(ModelState::Draining);
        let Life { reports, route, room, was_ready, .. } = life;
        let idle = tokio::select! {
            idle = until_idle(route, order) => idle,
            silent = self.watch(reports, route, *room, was_ready) => return Changed::Ended(silent),
        };
        if !idle {
            self.set_state(ModelState::Ready);
            return Changed::Refused("its answers do not end; it goes on as it was".into());
        }
        let before = self.status().values.clone();
        self.set_state(ModelState::Loading);
        {
            let mut status = self.status();
            (status.route, status.room, status.report) = (None, None, None);
        }
        order.say("Starting the engine anew.".into());
        let why = match self.start(file, &values) {
            Ok(next) => {
                let old = std::mem::replace(life, next);
                old.child.end().await;
                let ready = until_ready(life, order).await.map_err(|failed| failed.why);
                match ready {
                    Ok(()) => match self.keep(set, values).await {
                        Ok(()) => {
                            self.take_over(life);
                            self.set_state(ModelState::Ready);
                            return Changed::To(Outcome::Restarted);
                        }
                        Err(why) => why,
                    },
                    Err(why) => why,
                }
            }
            Err(error) => format!("the engine process cannot be started: {error}"),
        };
        match self.start(file, &before) {
            Ok(next) => {
                let failed = std::mem::replace(life, next);
                failed.child.end().await;
                self.status().generation = life.generation;
                order.say("Starting the engine with the values before.".into());
                match until_ready(life, order).await {
                    Ok(()) => {
                        self.take_over(life);
                        self.set_state(ModelState::Ready);
                        Changed::Refused(format!("{why} (the engine was started again with the values before)"))
                    }
                    Err(_) => Changed::Ended(false),
                }
            }
            // What is in `life` has ended or is of no use: the usual restart follows.
            Err(_) => Changed::Ended(true),
        }
    }
}

/// Waits until a started engine is ready to take requests.
async fn until_ready(life: &mut Life, order: &Order) -> Result<(), NotReady> {
    let waiting = async {
        let mut said = Instant::now();
        let mut last = None;
        loop {
            let report = match timeout(SILENCE_LIMIT, life.reports.recv()).await {
                Ok(Some(report)) => report,
                Ok(None) => return Err(NotReady::because("the new engine process ended before it was ready")),
                Err(_) => return Err(NotReady::because("the new engine process went silent")),
            };
            if last.as_ref() != Some(&report.state) || said.elapsed() >= SAY_AGAIN {
                order.say(format!("The new engine is {}.", report.state.words()));
                (last, said) = (Some(report.state.clone()), Instant::now());
            }
            match &report.state {
                ModelState::Ready => {
                    (life.was_ready, life.report) = (true, Some(report));
                    return Ok(());
                }
                ModelState::Failed { why } => {
                    return Err(NotReady { why: why.clone(), missing_memory: report.missing_memory });
                }
                _ => {}
            }
        }
    };
    timeout(READY_DEADLINE, waiting)
        .await
        .unwrap_or_else(|_| Err(NotReady::because("the new engine process did not get ready in time")))
}

/// Waits until an engine gives no answer. False where its answers do not end.
async fn until_idle(route: &Arc<Route>, order: &Order) -> bool {
    let waiting = async {
        loop {
            let open = route.open();
            if open > 0 {
                order.say(format!("Waiting for {} to end; new requests wait.", answers(open)));
            }
            if timeout(SAY_AGAIN, route.idle()).await.is_ok() {
                return;
            }
        }
    };
    timeout(FINISH_DEADLINE, waiting).await.is_ok()
}

fn answers(count: u32) -> String {
    if count == 1 { "1 answer".into() } else { format!("{count} answers") }
}
