//! The engine processes of a model: started, watched, and started again when they die.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ingle_protocol::liveness::EngineWatch;
use ingle_protocol::wire::v2::{EngineReport, ModelState};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::SILENCE_LIMIT;
use super::child_engine::ChildEngine;
use super::model_worker::{ModelWorker, Trouble};
use super::order::Order;
use super::route::Route;
use crate::node::{DeviceKind, ModelParameters};
use crate::supervisor::RestartBudget;

const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// An engine that is in one step for so long, and so many times as long as such a step takes, does not come back.
const HUNG_AFTER: Duration = Duration::from_secs(20);
const HUNG_AFTER_STEPS: u32 = 100;

/// A running engine process.
pub(super) struct Life {
    pub child: ChildEngine,
    pub reports: mpsc::Receiver<EngineReport>,
    pub route: Arc<Route>,
    pub generation: u32,
    /// What it was started with.
    pub room: u32,
    pub was_ready: bool,
    /// The last thing that it said, while it takes no requests yet.
    pub report: Option<EngineReport>,
}

impl Life {
    /// How the process ended, in words.
    async fn ended(&mut self, silent: bool) -> String {
        if silent {
            self.child.kill().await;
            return "it hung and was killed".into();
        }
        self.child.ended().await
    }

    /// Ends the process, which nobody needs any more.
    pub async fn end(self) {
        self.child.end().await;
    }
}

impl ModelWorker {
    /// Runs the engine and starts it again when it dies, until there is no use in that.
    pub(super) async fn keep_running(
        &self,
        cancel: &CancellationToken,
        orders: &mut mpsc::Receiver<Order>,
        retiring: &mut JoinSet<()>,
    ) -> Trouble {
        let finding = self.find_file(cancel);
        tokio::pin!(finding);
        let file = loop {
            tokio::select! {
                found = &mut finding => match found {
                    Ok(file) => break file,
                    Err(trouble) => return trouble,
                },
                () = cancel.cancelled() => return Trouble::Over,
                Some(order) = orders.recv() => self.refuse_for_now(order),
            }
        };
        let file = file.as_deref();
        if let Some(file) = file {
            self.make_room_for_packed(file).await;
        }
        if let Some(Ok(bytes)) = file.map(|file| file.metadata().map(|metadata| metadata.len())) {
            self.status().forecast.bytes = bytes;
        }
        let mut budget = RestartBudget::default();
        let mut ever_ready = false;
        loop {
            self.set_state(ModelState::Loading);
            let values = self.status().values.clone();
            // Making room waits for others to end, each within its deadline.
            let making = tokio::select! {
                made = self.options.room.make(self, file, values) => made,
                () = cancel.cancelled() => return Trouble::Over,
            };
            let values = match making {
                Ok(values) => values,
                Err(why) => return Trouble::NoRoom(why),
            };
            let mut life = match self.start(file, &values) {
                Ok(life) => life,
                Err(error) => return Trouble::Final(format!("the engine process cannot be started: {error}")),
            };
            {
                let mut status = self.status();
                (status.generation, status.pid) = (life.generation, life.child.pid());
            }
            let silent = loop {
                tokio::select! {
                    silent = self.watch(&mut life.reports, &life.route, life.room, &mut life.was_ready) => break silent,
                    () = cancel.cancelled() => {
                        life.end().await;
                        return Trouble::Over;
                    }
                    Some(order) = orders.recv() => {
                        if let Some(silent) = self.carry_out(&mut life, file, order, retiring).await {
                            break silent;
                        }
                    }
                }
            };
            let ended = life.ended(silent).await;
            if self.is_leaving() {
                self.status().route = None;
                return Trouble::Over;
            }
            ever_ready |= life.was_ready;
            tracing::warn!(model = self.status().name, ended, "the engine process ended");
            let reported = {
                let mut status = self.status();
                (status.route, status.room, status.pid) = (None, None, None);
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

    /// The weights that its engine will pack count in the limit of the model folder. Where they get no room there an
    /// engine has a copy of its own.
    async fn make_room_for_packed(&self, file: &Path) {
        // A card has them in its own memory.
        if cfg!(feature = "gpu") && self.options.device != DeviceKind::Cpu {
            return;
        }
        let size = file.metadata().map_or(0, |file| file.len());
        let digest = self.status().digest.unwrap_or_default();
        let Ok(store) = self.store() else { return };
        match store.make_room_for_packed(digest, size).await {
            Ok(limit) => self.packed_limit.store(limit.map_or(0, |limit| limit.max(1)), Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "no room is made for packed weights"),
        }
    }

    pub(super) fn start(&self, file: Option<&Path>, values: &ModelParameters) -> std::io::Result<Life> {
        let digest = self.status().digest.unwrap_or_default();
        let generation = self.generations.fetch_add(1, Ordering::Relaxed) + 1;
        let socket = self.options.sockets.join(format!("engine-{}-{generation}.sock", self.options.index));
        let (child, reports) = ChildEngine::spawn(
            &socket,
            file,
            digest,
            values,
            self.packed_limit.load(Ordering::Relaxed),
            &self.options,
        )?;
        tracing::info!(pid = child.pid(), generation, "engine process started");
        let (route, room) = (Route::new(socket, self.uses.clone()), values.room());
        Ok(Life { child, reports, route, generation, room, was_ready: false, report: None })
    }

    /// Takes down what the engine that takes requests says, until it ends: false, or until it hangs: true.
    pub(super) async fn watch(
        &self,
        reports: &mut mpsc::Receiver<EngineReport>,
        route: &Arc<Route>,
        room: u32,
        was_ready: &mut bool,
    ) -> bool {
        // Reports go on while a driver hangs: they come from another thread.
        let (mut steps, started) = (EngineWatch::default(), Instant::now());
        loop {
            let report = match timeout(SILENCE_LIMIT, reports.recv()).await {
                Ok(Some(report)) => report,
                Ok(None) => return false,
                Err(_) => return true,
            };
            steps.observe(&report.pulse, started.elapsed());
            let usual = Duration::from_millis(report.pulse.usual_step_ms.into());
            if steps.in_step_for(started.elapsed()) >= HUNG_AFTER.max(usual * HUNG_AFTER_STEPS) {
                return true;
            }
            let state = report.state.clone();
            let (state_change, slow_change) = {
                let mut status = self.status();
                (status.route, status.room) = (Some(route.clone()), Some(room));
                if !report.numerics.is_empty() {
                    status.features.clone_from(&report.features);
                }
                let known = status.report.replace(report.clone());
                status.reported_at = Some(Instant::now());
                let state_change = known.as_ref().is_none_or(|known| known.state != state);
                let is_same = |known: &EngineReport| known.slots == report.slots && known.backend == report.backend;
                (state_change, !known.as_ref().is_some_and(is_same))
            };
            if state_change {
                if state == ModelState::Ready && !*was_ready {
                    *was_ready = true;
                    self.set_problem(None);
                }
                if !matches!(state, ModelState::Failed { .. }) {
                    self.set_state(state);
                }
            }
            if state_change || slow_change {
                self.workers.note_change();
            }
        }
    }
}
