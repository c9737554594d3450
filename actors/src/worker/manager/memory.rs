//! Room for engines: what each was promised, and who goes when another one needs it. What is decided stands in
//! [`ingle_protocol::memory`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_engine::{MemoryNeed, available_memory, memory_need, memory_need_of_echo};
use ingle_protocol::memory::{Memory, Need, Plan, Resident, Stays, at_best, plan};
use ingle_protocol::wire::v2::ModelState;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{ModelManager, PLANNING_DEADLINE};
use crate::node::{DeviceKind, ModelParameters};
use crate::platform::memory_of;
use crate::worker::model_worker::{ModelWorker, Room};

/// Models that are asked to go for one that comes, at most: what is free changes meanwhile, and a plan is made anew.
const MOST_PLANS: u32 = 16;

/// What an engine was promised, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promised {
    /// For its weights: mapped from a file that all engines of this machine share.
    pub weights: u64,
    /// For keys and values.
    pub kv: u64,
    /// For everything else.
    pub other: u64,
}

impl Promised {
    fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.other)
    }

    /// What of it is no longer free. Mapped weights lie in memory that the system counts as free, as it could drop them.
    fn taken(&self, pid: Option<u32>) -> u64 {
        pid.and_then(memory_of).unwrap_or(0).min(self.kv.saturating_add(self.other))
    }
}

/// What all engines of this node were promised, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    promised: Mutex<BTreeMap<u16, Promised>>,
    /// One plan is made at a time.
    planning: tokio::sync::Mutex<()>,
}

impl Ledger {
    pub fn of(&self, index: u16) -> Option<Promised> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).get(&index).copied()
    }

    /// The engine has ended.
    pub fn release(&self, index: u16) {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).remove(&index);
    }

    fn promise(&self, index: u16, promised: Promised) {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).insert(index, promised);
    }
}

/// The room of a node, as its workers see it.
#[derive(Debug)]
pub(super) struct NodeRoom(pub Weak<ModelManager>);

impl Room for NodeRoom {
    fn make<'a>(
        &'a self,
        worker: &'a ModelWorker,
        file: Option<&'a Path>,
        values: ModelParameters,
    ) -> BoxFuture<'a, Result<ModelParameters, String>> {
        async move {
            // Without a manager the node is ending.
            let Some(manager) = self.0.upgrade() else { return Ok(values) };
            match timeout(PLANNING_DEADLINE, Box::pin(make(&manager, worker, file, values))).await {
                Ok(made) => made,
                Err(_) => Err("the models that were to make room for it did not end in time: try again".into()),
            }
        }
        .boxed()
    }
}

async fn make(
    manager: &ModelManager,
    worker: &ModelWorker,
    file: Option<&Path>,
    mut values: ModelParameters,
) -> Result<ModelParameters, String> {
    let Some(needed) = needed(manager, file, &values).await else { return Ok(values) };
    let need = Need { weights: needed.weights, kv: needed.kv_least, other: needed.other };
    let _planning = manager.ledger.planning.lock().await;
    let (index, name) = (worker.index(), worker.name());
    // An engine that is started again has the room that it had.
    manager.ledger.release(index);
    for _ in 0..MOST_PLANS {
        let memory = Memory { free: available_memory(), most: manager.options.memory };
        let (workers, residents) = residents(manager, &name);
        match plan(need, memory, &residents) {
            Plan::Fits { left } => {
                // As much for keys and values as an engine would take that is alone, within what is left.
                let spare = left.saturating_sub(need.weights).saturating_sub(need.other);
                let kv = match left {
                    u64::MAX => needed.kv_most,
                    left => (left / 4).clamp(needed.kv_least, needed.kv_most).min(spare),
                };
                if values.kv_memory_mib.is_none() && left < u64::MAX && needed.kv_most > 0 {
                    values.kv_memory_mib = Some((kv >> 20).max(1));
                }
                manager.ledger.promise(index, Promised { weights: need.weights, kv, other: need.other });
                return Ok(values);
            }
            Plan::Evict(gone) => {
                for resident in gone {
                    let (model, why) = (&workers[resident], name.as_str());
                    tracing::info!(model, "for" = why, "goes to make room");
                    manager.make_way(model, *model == name).await;
                }
            }
            Plan::Refuse(refusal) => return Err(refusal.in_words(&name)),
        }
    }
    Err("the models that were to make room for it are used again and again: try again, or unload one".into())
}

impl ModelManager {
    /// Bytes that one more model could have here if all that may go for it went; `u64::MAX` where nobody can say.
    pub fn room(&self) -> u64 {
        if computes_on_card(self) {
            return u64::MAX;
        }
        let memory = Memory { free: available_memory(), most: self.options.memory };
        at_best(memory, &residents(self, "").1)
    }
}

/// Its models may be on a graphics card, whose memory nobody measures.
fn computes_on_card(manager: &ModelManager) -> bool {
    cfg!(feature = "gpu") && manager.options.device != DeviceKind::Cpu
}

/// `None` where nobody can say: on a graphics card, whose memory nobody measures, and for files that are no models,
/// which the engine itself says.
async fn needed(manager: &ModelManager, file: Option<&Path>, values: &ModelParameters) -> Option<MemoryNeed> {
    if computes_on_card(manager) {
        return None;
    }
    let Some(file) = file.map(Path::to_owned) else { return Some(memory_need_of_echo()) };
    let options = values.to_options(None);
    tokio::task::spawn_blocking(move || memory_need(&file, &options).ok()).await.ok()?
}

/// All engines but those of which nothing is known, with the names of their models. One of the name that is being
/// loaded goes if it must: another version of it comes.
fn residents(manager: &ModelManager, coming: &str) -> (Vec<String>, Vec<Resident>) {
    let mut names = Vec::new();
    let mut residents = Vec::new();
    for (model, worker, is_current) in manager.engines() {
        let Some(promised) = manager.ledger.of(worker.index()) else { continue };
        let (pid, has_failed) = {
            let status = worker.status();
            (status.pid, matches!(status.state, ModelState::Failed { .. }))
        };
        if has_failed {
            continue;
        }
        let idle = match worker.idle_for() {
            _ if !is_current => Err(Stays::Busy),
            _ if model.name == coming => Ok(std::time::Duration::ZERO),
            _ if model.spec().pinned => Err(Stays::Pinned),
            Some(idle) => Ok(idle),
            None => Err(Stays::Busy),
        };
        names.push(model.name.clone());
        let (total, taken) = (promised.total(), promised.taken(pid));
        residents.push(Resident { name: model.name.clone(), promised: total, taken, idle });
    }
    (names, residents)
}
