//! The registry of models on this node: kept on disk, told to all peers, and the endpoints in it that run here.
//!
//! What is said here is on disk before it is acknowledged, and goes to all peers then. What peers say holds at once,
//! goes on to the others and is on disk a moment later: its writer has it on its own. How what several nodes say comes
//! together is [`ingle_protocol::registry`]'s business.

mod endpoints;
mod file;
mod parameters;
mod placing;
mod shown;
mod standin;
mod view;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ingle_protocol::NodeId;
use ingle_protocol::registry::{Entry, Record, Registry, RegistryError, Stamp};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub(crate) use endpoints::{EndpointKeeper, options_of};
pub(crate) use parameters::{checked_parameters, follow, to_values};
pub use placing::PlacementRules;
pub(crate) use placing::Placer;
pub(crate) use shown::registry_status;
pub use shown::{OnNode, Overruled, RegistryStatus, ShownEndpoint, ShownModel};
pub(crate) use view::View;

use self::file::RegistryFile;

/// How soon the disk is tried again that could not be written.
const STORE_AGAIN: Duration = Duration::from_secs(5);
/// For so long after a change of the default model, requests for it may still go to the one before where the new one
/// cannot answer as far as this node knows: news of the choice may come before news of the model.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// A registered model's parameter that is none of an engine: the format that its weights are converted to.
pub(crate) const QUANTIZATION: &str = "quantization";

/// The entry of the default model among the others: no model can be called that.
const DEFAULT_ENTRY: &str = "default";

pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Why something is not registered. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It cannot be.
    #[error(transparent)]
    Refused(#[from] RegistryError),
    /// It could not be kept.
    #[error("the registry of models cannot be written, so nothing was changed: {0}")]
    Disk(String),
}

/// What `default` means, for whoever routes requests.
#[derive(Debug, Clone, Default)]
pub(crate) struct DefaultRoute {
    /// The model that was chosen.
    pub name: Option<String>,
    /// The one before; for a moment, see [`DEFAULT_GRACE`].
    pub before: Option<String>,
    /// The choice is fresh.
    pub is_fresh: bool,
}

#[derive(Debug)]
struct State {
    registry: Registry,
    /// Counts the changes.
    version: u64,
    /// The version at which each entry changed last.
    changed: BTreeMap<String, u64>,
    /// The default before the present one, and when it changed.
    before: Option<(Option<String>, Instant)>,
}

impl State {
    fn of(registry: Registry) -> Self {
        let changed = registry.entries().map(|entry| (key(&entry), 1)).collect();
        Self { registry, version: 1, changed, before: None }
    }

    /// Takes an entry; true where that changed anything.
    fn take(&mut self, entry: &Entry) -> Result<bool, RegistryError> {
        let default = self.registry.default_model().name().map(str::to_owned);
        let changed = self.registry.merge(entry)?;
        if changed {
            self.version += 1;
            self.changed.insert(key(entry), self.version);
            if self.registry.default_model().name() != default.as_deref() {
                self.before = Some((default, Instant::now()));
            }
        }
        Ok(changed)
    }
}

fn key(entry: &Entry) -> String {
    match entry {
        Entry::Model(record) => record.name().to_owned(),
        Entry::Default(_) => DEFAULT_ENTRY.to_owned(),
    }
}

/// The registry of this node.
#[derive(Debug)]
pub struct ModelRegistry {
    file: RegistryFile,
    state: Mutex<State>,
    /// One write at a time, so that what is on disk is what was acknowledged last.
    writing: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
    unsaved: Notify,
    /// What is wrong with the file, in words.
    problem: Mutex<Option<String>>,
}

impl ModelRegistry {
    /// Reads what a state directory has. Its lock must be held.
    pub fn open(state_dir: &Path) -> std::io::Result<Arc<Self>> {
        let file = RegistryFile::of(state_dir);
        let (registry, problem) = file.load()?;
        if let Some(problem) = &problem {
            tracing::error!("{problem}");
        }
        Ok(Arc::new(Self {
            file,
            state: Mutex::new(State::of(registry)),
            writing: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(1),
            unsaved: Notify::new(),
            problem: Mutex::new(problem),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything, as it is now.
    pub fn snapshot(&self) -> Registry {
        self.lock().registry.clone()
    }

    /// A registered model.
    pub fn model(&self, name: &str) -> Option<Record> {
        self.lock().registry.model(name).cloned()
    }

    /// The names of all registered models.
    pub fn names(&self) -> Vec<String> {
        self.lock().registry.models().map(|record| record.name().to_owned()).collect()
    }

    /// What `default` means.
    pub(crate) fn default_route(&self) -> DefaultRoute {
        let state = self.lock();
        let name = state.registry.default_model().name().map(str::to_owned);
        let fresh = state.before.as_ref().filter(|(_, at)| at.elapsed() < DEFAULT_GRACE);
        DefaultRoute { name, is_fresh: fresh.is_some(), before: fresh.and_then(|(before, _)| before.clone()) }
    }

    /// Changes whenever an entry does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The entries that changed behind `version`, and the version now.
    pub(crate) fn since(&self, version: u64) -> (u64, Vec<Entry>) {
        let state = self.lock();
        let is_new = |entry: &Entry| state.changed.get(&key(entry)).is_some_and(|at| *at > version);
        (state.version, state.registry.entries().filter(is_new).collect())
    }

    /// What is wrong and stays wrong, in words.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Changes something in the name of `node`. When this returns it is on disk, and on its way to all peers; on an
    /// error nothing has changed.
    pub async fn write(
        &self,
        node: NodeId,
        change: impl FnOnce(&mut Registry, Stamp) -> Result<(), RegistryError>,
    ) -> Result<(), WriteError> {
        let _one_at_a_time = self.writing.lock().await;
        let mut next = self.snapshot();
        let at = next.stamp(node, now_ms());
        change(&mut next, at)?;
        self.store(next.clone()).await.map_err(WriteError::Disk)?;
        self.take_all(&next)?;
        Ok(())
    }

    fn take_all(&self, next: &Registry) -> Result<(), RegistryError> {
        let version = {
            // Merged and not put in place: peers may have said something while the disk was busy.
            let mut state = self.lock();
            for entry in next.entries() {
                state.take(&entry)?;
            }
            state.version
        };
        self.changed.send_replace(version);
        Ok(())
    }

    async fn store(&self, registry: Registry) -> Result<(), String> {
        let file = self.file.clone();
        // fsync takes its time, and tasks that pulse must not wait for it.
        let storing = tokio::task::spawn_blocking(move || file.store(&registry));
        storing.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }

    /// What a peer says.
    pub(crate) fn receive(&self, from: NodeId, entry: &Entry) {
        let before = self.overruled_in(entry);
        let taken = {
            let mut state = self.lock();
            state.take(entry).map(|changed| changed.then_some(state.version))
        };
        match taken {
            Ok(None) => {}
            Ok(Some(version)) => {
                self.changed.send_replace(version);
                self.unsaved.notify_one();
                for (field, value, at) in self.overruled_in(entry) {
                    if !before.iter().any(|(_, _, known)| *known == at) {
                        tracing::warn!(model = key(entry), field, value, by = %at.node, "changed on two nodes at a time");
                    }
                }
            }
            // A newer build may know more than this one; the rest of what it says is good.
            Err(error) => tracing::warn!(peer = %from, %error, "an entry of the registry of models is not taken"),
        }
    }

    fn overruled_in(&self, entry: &Entry) -> Vec<(String, String, Stamp)> {
        let state = self.lock();
        match entry {
            Entry::Model(record) => state.registry.record(record.name()).map(Record::overruled).unwrap_or_default(),
            Entry::Default(_) => {
                let others = state.registry.default_model().overruled().into_iter();
                others.map(|(name, at)| ("default".into(), name.unwrap_or_else(|| "none".into()), at)).collect()
            }
        }
    }

    /// Writes down what peers said, until `cancel`.
    pub(crate) async fn keep(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        loop {
            let ended = cancel.run_until_cancelled(self.unsaved.notified()).await.is_none();
            let stored = {
                let _one_at_a_time = self.writing.lock().await;
                let registry = self.snapshot();
                if ended && registry == Registry::default() { Ok(()) } else { self.store(registry).await }
            };
            match stored {
                _ if ended => return stored,
                Ok(()) => self.set_problem(None),
                Err(why) => {
                    self.set_problem(Some(format!("the registry of models cannot be written: {why}")));
                    let _ = cancel.run_until_cancelled(tokio::time::sleep(STORE_AGAIN)).await;
                    self.unsaved.notify_one();
                }
            }
        }
    }

    /// This node, which was `node`, joins another household. What it registered while it was alone comes along; what
    /// belongs to others whom it leaves stays with them, and a copy in the state directory.
    pub(crate) async fn moves(&self, node: NodeId, leaves_others: bool) -> Result<(), String> {
        let _one_at_a_time = self.writing.lock().await;
        let next = if leaves_others { Registry::default() } else { self.snapshot().brought_along(node) };
        if leaves_others {
            let file = self.file.clone();
            let moved = tokio::task::spawn_blocking(move || file.set_aside("left")).await;
            moved.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        } else if next != Registry::default() {
            self.store(next.clone()).await?;
        }
        let version = {
            let mut state = self.lock();
            let version = state.version + 1;
            *state = State { version, ..State::of(next) };
            version
        };
        self.changed.send_replace(version);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
