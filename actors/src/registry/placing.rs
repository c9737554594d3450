//! Registered models with a file come to the nodes that are to have them: those that they are pinned to, else where
//! [`ingle_protocol::placement`] says. Each node does so for itself alone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use ingle_protocol::NodeId;
use ingle_protocol::placement::{Copy, Placement, Reason};
use ingle_protocol::registry::{FOREVER, Record, Source};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::ModelRegistry;
use super::view::View;
use crate::cluster::Mesh;
use crate::models::choice_of;
use crate::platform;
use crate::worker::manager::{LoadError, ModelSpec};
use crate::worker::{ModelManager, Workers};

/// How often it is looked whether something has to be done, while there are models to place.
const LOOK: Duration = Duration::from_millis(500);
/// How often a node without any looks how much room it has.
const LOOK_IDLY: Duration = Duration::from_secs(10);
/// How long others may take to be found after a start, before a model counts as being nowhere.
const START_GRACE: Duration = Duration::from_secs(10);
/// How long after a start the memory is measured: not while everything else begins.
const MEASURE_AFTER: Duration = Duration::from_secs(1);
/// How long answers of a model that goes may take to finish.
const FINISH_LIMIT: Duration = Duration::from_secs(600);
/// A second copy goes when nobody has used it for so long.
const SECOND_COPY_STAYS: u64 = 600;
/// How long a node that a model is no longer pinned to waits for one of those that it is pinned to now.
const HAND_OVER: Duration = Duration::from_secs(120);
/// Models that are loaded, changed or let go at a time.
const MOST_JOBS: usize = 32;

/// What a node is willing to do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacementRules {
    /// It takes models that nobody has pinned to it.
    pub automatic: bool,
    /// It takes second copies of models that are asked for more than they can answer.
    pub more_copies: bool,
}

impl Default for PlacementRules {
    fn default() -> Self {
        Self { automatic: true, more_copies: true }
    }
}

/// Does it.
#[derive(Debug)]
pub(crate) struct Placer {
    /// The name of this node.
    pub own: String,
    pub rules: PlacementRules,
    /// Models here compute on a graphics card.
    pub on_card: bool,
    pub mesh: Arc<ArcSwapOption<Mesh>>,
    pub registry: Arc<ModelRegistry>,
    pub models: Arc<ModelManager>,
    pub workers: Arc<Workers>,
}

/// What is under way: the names of models, each with one job at a time.
#[derive(Default)]
struct Jobs {
    running: JoinSet<String>,
    names: BTreeSet<String>,
}

impl Jobs {
    fn spawn(&mut self, name: &str, job: impl Future<Output = Result<(), String>> + Send + 'static) {
        if self.names.len() >= MOST_JOBS || !self.names.insert(name.to_owned()) {
            return;
        }
        let name = name.to_owned();
        self.running.spawn(async move {
            if let Err(why) = job.await {
                tracing::warn!(model = name, why, "a registered model");
            }
            name
        });
    }

    fn collect(&mut self) {
        while let Some(ended) = self.running.try_join_next() {
            match ended {
                Ok(name) => drop(self.names.remove(&name)),
                // Whose name is lost with it; all are looked at anew.
                Err(_) if self.running.is_empty() => self.names.clear(),
                Err(_) => {}
            }
        }
    }
}

impl Placer {
    /// Places models until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let started = Instant::now();
        let (mut placement, mut jobs) = (Placement::default(), Jobs::default());
        let mut unpinned_since = std::collections::BTreeMap::new();
        let mut changes = self.registry.changes();
        let measuring = tokio::time::sleep(MEASURE_AFTER);
        tokio::pin!(measuring);
        let mut bandwidth = None;
        loop {
            changes.mark_unchanged();
            jobs.collect();
            let records = self.records();
            let has_work = !records.is_empty() || !self.models.registered().is_empty();
            self.tell(bandwidth.unwrap_or(0));
            if let Some(mesh) = self.mesh.load_full().filter(|_| has_work) {
                let view = View::of(&mesh, self.workers.capability().borrow().to_owned());
                let now = started.elapsed();
                for record in &records {
                    let unpinned = unpinned_since.entry(record.name().to_owned()).or_insert(None);
                    self.look_at(record, &view, &mut placement, unpinned, now, &mut jobs, &mesh);
                }
                self.let_go(&records, &mut jobs);
                let known = |name: &str| records.iter().any(|record| record.name() == name);
                placement.retain(known);
                unpinned_since.retain(|name, _| known(name));
            }
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                changed = changes.changed() => changed.map_err(|error| error.to_string())?,
                () = &mut measuring, if bandwidth.is_none() => {
                    let measured = tokio::task::spawn_blocking(platform::memory_bandwidth).await;
                    bandwidth = Some(measured.unwrap_or(0));
                }
                () = tokio::time::sleep(if has_work { LOOK } else { LOOK_IDLY }) => {}
            }
        }
    }

    /// Registered models with a file that are not this node's own by its configuration.
    fn records(&self) -> Vec<Record> {
        let own = self.models.own().map(|model| model.name());
        let registry = self.registry.snapshot();
        let files = registry.models().filter(|record| record.source().is_some());
        files.filter(|record| Some(record.name()) != own.as_deref()).cloned().collect()
    }

    fn tell(&self, memory_bandwidth: u64) {
        self.workers.set_capability(ingle_protocol::wire::v2::Capability {
            memory_bandwidth,
            room: self.models.room(),
            on_card: self.on_card,
            takes_models: self.rules.automatic && !self.workers.is_draining(),
        });
    }

    #[expect(clippy::too_many_arguments, reason = "all that one look has, once")]
    fn look_at(
        &self,
        record: &Record,
        view: &View,
        placement: &mut Placement,
        unpinned_since: &mut Option<Duration>,
        now: Duration,
        jobs: &mut Jobs,
        mesh: &Mesh,
    ) {
        let (name, own_id) = (record.name(), mesh.own_id());
        let candidates = view.candidates(record);
        let copy = |node: NodeId| candidates.iter().find(|one| one.node == node).map_or(Copy::None, |one| one.copy);
        let own_copy = copy(own_id);
        let pins = record.pins();
        let is_pinned = pins.contains(&self.own.as_str());
        *unpinned_since = if !pins.is_empty() && !is_pinned { unpinned_since.or(Some(now)) } else { None };
        let Some(spec) = self.spec_of(record, is_pinned) else { return };
        let here = self.models.spec(name);
        match here {
            Some(here) if here.registered => {
                self.note_hash(record, mesh, jobs);
                let others = || candidates.iter().filter(|one| one.node != own_id);
                let elsewhere = others().any(|one| matches!(one.copy, Copy::Ready | Copy::Busy));
                let taken_over = pins.is_empty() && matches!(own_copy, Copy::NoRoom | Copy::Failed) && elsewhere;
                let moved = unpinned_since.is_some_and(|since| {
                    let there = view.of_names(&pins).any(|node| matches!(copy(node), Copy::Ready | Copy::Busy));
                    there || now.saturating_sub(since) > HAND_OVER
                });
                if taken_over || moved {
                    self.forget(name, jobs);
                } else {
                    self.keep_up(here, spec, jobs);
                }
            }
            // Somebody has loaded it here by hand under the same name: it is his.
            Some(_) => {}
            None if is_pinned => self.load(spec, "it is pinned to this machine", jobs),
            None if !pins.is_empty() => {}
            None => {
                if now < START_GRACE && !view.is_settled() {
                    return;
                }
                let more = self.rules.more_copies;
                match placement.judge(name, &candidates, None, own_id, more, now) {
                    Some(Reason::Nowhere) => self.load(spec, "no machine has it", jobs),
                    Some(Reason::Busy) => {
                        let keep_alive_s = spec.keep_alive_s.or(Some(SECOND_COPY_STAYS));
                        let spec = ModelSpec { keep_alive_s, pinned: false, ..spec };
                        self.load(spec, "all machines that have it are busy", jobs);
                    }
                    None => {}
                }
            }
        }
        // A copy that was there before and has gone for want of use comes back as a second one does.
        if own_copy == Copy::There
            && placement.judge(name, &candidates, None, own_id, self.rules.more_copies, now) == Some(Reason::Busy)
        {
            self.workers.want(name);
        }
    }

    /// What this node would load; `None` where it cannot.
    fn spec_of(&self, record: &Record, is_pinned: bool) -> Option<ModelSpec> {
        let source: Source = record.source()?.parse().ok()?;
        let choice = match choice_of(record.name(), &source, record.sha256()) {
            Ok(choice) => choice,
            Err(why) => {
                tracing::debug!(model = record.name(), why, "not for this machine");
                return None;
            }
        };
        let stays = record.keep_alive();
        Some(ModelSpec {
            name: record.name().to_owned(),
            choice,
            pinned: is_pinned || stays == Some(FOREVER),
            keep_alive_s: stays.filter(|stays| *stays != FOREVER).map(u64::from),
            registered: true,
        })
    }

    fn load(&self, spec: ModelSpec, why: &'static str, jobs: &mut Jobs) {
        let models = self.models.clone();
        jobs.spawn(&spec.name.clone(), async move {
            tracing::info!(model = spec.name, why, "a registered model is loaded");
            models.load_as(spec).await.map(drop).map_err(|error| error.to_string())
        });
    }

    /// What is here becomes what the registry says.
    fn keep_up(&self, here: ModelSpec, wanted: ModelSpec, jobs: &mut Jobs) {
        // A second copy's own time holds where the registry says nothing.
        let keep_alive_s = wanted.keep_alive_s.or(here.keep_alive_s.filter(|stays| *stays == SECOND_COPY_STAYS));
        let wanted = ModelSpec { keep_alive_s, ..wanted };
        if here == wanted {
            return;
        }
        let is_same = here.choice == wanted.choice || {
            let content = self.models.get(&here.name).and_then(|worker| worker.digest());
            content.is_some() && content == wanted.choice.digest()
        };
        if !is_same {
            return self.load(wanted, "it is another one now", jobs);
        }
        let models = self.models.clone();
        jobs.spawn(&here.name, async move { models.amend(wanted).await.map_err(|error| error.to_string()) });
    }

    /// The registry learns the hash of a file that nobody knew before: all other copies are held to it.
    fn note_hash(&self, record: &Record, mesh: &Mesh, jobs: &mut Jobs) {
        let Some(worker) = self.models.get(record.name()) else { return };
        let Some(digest) = worker.digest() else { return };
        if record.sha256().is_some() || !worker.is_ready() {
            return;
        }
        let (registry, node, name) = (self.registry.clone(), mesh.own_id(), record.name().to_owned());
        let file = record.source().and_then(|source| source.strip_prefix("file:")).map(std::path::PathBuf::from);
        jobs.spawn(record.name(), async move {
            // Others copy what is in the store.
            if let (Some(file), Ok(store)) = (file, worker.store()) {
                let adopting = tokio::task::spawn_blocking(move || store.adopt(&file, &digest));
                if !adopting.await.unwrap_or(false) {
                    tracing::info!(
                        model = name,
                        "its file cannot be linked into the model folder: others cannot copy it"
                    );
                }
            }
            let noted = registry.write(node, |registry, at| registry.set_sha256(&name, Some(digest), at)).await;
            noted.map_err(|error| error.to_string())
        });
    }

    fn forget(&self, name: &str, jobs: &mut Jobs) {
        let (models, model) = (self.models.clone(), name.to_owned());
        jobs.spawn(name, async move {
            tracing::info!(model, "a registered model goes");
            match timeout(FINISH_LIMIT * 2, models.forget(&model, FINISH_LIMIT)).await {
                Ok(Err(error)) if !matches!(error, LoadError::Unknown(..)) => Err(error.to_string()),
                Ok(_) => Ok(()),
                Err(_) => Err("it did not end in time".into()),
            }
        });
    }

    /// What is registered no more goes.
    fn let_go(&self, records: &[Record], jobs: &mut Jobs) {
        for spec in self.models.registered() {
            if !records.iter().any(|record| record.name() == spec.name) {
                self.forget(&spec.name, jobs);
            }
        }
    }
}
