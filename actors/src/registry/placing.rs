//! Registered models with a file come to the nodes that are to have them: those that they are pinned to, else where
//! [`ingle_protocol::placement`] says. Each node does so for itself alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use ingle_protocol::placement::{Candidate, Copy, Placement, Reason};
use ingle_protocol::registry::{FOREVER, Record, Source, Value};
use ingle_protocol::wire::v2::Capability;
use ingle_protocol::{ModelDigest, NodeId};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::view::View;
use super::{ModelRegistry, QUANTIZATION};
use crate::cluster::Mesh;
use crate::models::choice_of;
use crate::node::ModelChoice;
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
/// A node that could not have a model which others have tries again after so long.
const DECLINED_FOR: Duration = Duration::from_secs(600);
/// What could not be done is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// Another version of a model that could not be loaded is tried again after this.
const VERSION_AGAIN: Duration = Duration::from_secs(60);
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

/// What is under way and what was tried: one job for each model at a time.
#[derive(Default)]
struct Jobs {
    running: JoinSet<(String, bool)>,
    names: BTreeSet<String>,
    /// When the next try may be, where one failed.
    later: BTreeMap<String, Instant>,
}

impl Jobs {
    fn spawn(&mut self, name: &str, job: impl Future<Output = Result<(), String>> + Send + 'static) {
        self.later.retain(|_, at| *at > Instant::now());
        if self.names.len() >= MOST_JOBS || self.later.contains_key(name) || !self.names.insert(name.to_owned()) {
            return;
        }
        let name = name.to_owned();
        self.running.spawn(async move {
            let done = job.await;
            if let Err(why) = &done {
                tracing::warn!(model = name, why, "a registered model");
            }
            (name, done.is_ok())
        });
    }

    fn wait(&mut self, name: &str, pause: Duration) {
        self.later.insert(name.to_owned(), Instant::now() + pause);
    }

    fn collect(&mut self) {
        while let Some(ended) = self.running.try_join_next() {
            match ended {
                Ok((name, is_done)) => {
                    self.names.remove(&name);
                    if !is_done {
                        self.wait(&name, TRY_AGAIN);
                    }
                }
                // Whose name is lost with it; all are looked at anew.
                Err(_) if self.running.is_empty() => self.names.clear(),
                Err(_) => {}
            }
        }
    }
}

/// What a placer remembers from one look to the next.
#[derive(Default)]
struct Memory {
    placement: Placement,
    jobs: Jobs,
    /// Models that this node could not have, and when it may try again.
    declined: BTreeMap<String, Instant>,
    /// What was last loaded as another version of a model, and when: what fails is not tried again at once.
    versions: BTreeMap<String, (ModelSpec, Instant)>,
    /// Files of this machine that were offered to the others.
    shared: BTreeSet<(String, ModelDigest)>,
}

impl Memory {
    fn retain(&mut self, known: impl Fn(&str) -> bool) {
        self.placement.retain(&known);
        self.declined.retain(|name, until| known(name) && *until > Instant::now());
        self.versions.retain(|name, _| known(name));
        self.shared.retain(|(name, _)| known(name));
    }
}

impl Placer {
    /// Places models until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let started = Instant::now();
        let mut memory = Memory::default();
        let mut changes = self.registry.changes();
        let measuring = tokio::time::sleep(MEASURE_AFTER);
        tokio::pin!(measuring);
        let mut bandwidth = None;
        loop {
            changes.mark_unchanged();
            memory.jobs.collect();
            let records = self.records();
            let has_work = !records.is_empty() || !self.models.registered().is_empty();
            self.tell(bandwidth.unwrap_or(0));
            if let Some(mesh) = self.mesh.load_full().filter(|_| has_work) {
                let view = View::of(&mesh, self.workers.capability().borrow().to_owned());
                for record in &records {
                    self.look_at(record, &view, &mut memory, started.elapsed(), mesh.own_id());
                }
                self.let_go(&records, &mut memory.jobs);
                memory.retain(|name| records.iter().any(|record| record.name() == name));
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
        self.workers.set_capability(Capability {
            memory_bandwidth,
            room: self.models.room(),
            on_card: self.on_card,
            takes_models: self.rules.automatic && !self.workers.is_draining(),
        });
    }

    fn look_at(&self, record: &Record, view: &View, memory: &mut Memory, now: Duration, own_id: NodeId) {
        let name = record.name();
        let candidates = view.candidates(record);
        let copy = |node: NodeId| candidates.iter().find(|one| one.node == node).map_or(Copy::None, |one| one.copy);
        let answers = |node: NodeId| matches!(copy(node), Copy::Ready | Copy::Busy);
        let pins = record.pins();
        let is_pinned = pins.contains(&self.own.as_str());
        let spec = self.spec_of(record, is_pinned, own_id);
        match self.models.spec(name) {
            Some(here) if here.registered => {
                let elsewhere = candidates.iter().any(|one| one.node != own_id && answers(one.node));
                let cannot = matches!(copy(own_id), Copy::NoRoom | Copy::Failed);
                if pins.is_empty() && cannot && elsewhere {
                    memory.declined.insert(name.to_owned(), Instant::now() + DECLINED_FOR);
                    return self.forget(name, &mut memory.jobs);
                }
                // As long as none of those that it is pinned to answers, this one does.
                if !pins.is_empty() && !is_pinned && view.of_names(&pins).any(answers) {
                    return self.forget(name, &mut memory.jobs);
                }
                let Some(spec) = spec else { return };
                self.note_hash(record, &here, &spec, memory, own_id);
                self.keep_up(here, spec, memory);
                // A copy that has gone for want of use comes back as a second one does.
                if copy(own_id) == Copy::There && self.judged(name, &candidates, memory, own_id, now) {
                    self.workers.want(name);
                }
            }
            // Somebody has loaded it here by hand under the same name: it is his.
            Some(_) => {}
            None => {
                let Some(spec) = spec else { return };
                if is_pinned {
                    return self.load(spec, "it is pinned to this machine", memory);
                }
                if !pins.is_empty() || memory.declined.contains_key(name) || (now < START_GRACE && !view.is_settled()) {
                    return;
                }
                let more = self.rules.more_copies;
                match memory.placement.judge(name, &candidates, None, own_id, more, now) {
                    Some(Reason::Nowhere) => self.load(spec, "no machine has it", memory),
                    Some(Reason::Busy) => {
                        let keep_alive_s = spec.keep_alive_s.or(Some(SECOND_COPY_STAYS));
                        let spec = ModelSpec { keep_alive_s, pinned: false, ..spec };
                        self.load(spec, "all machines that have it are busy", memory);
                    }
                    None => {}
                }
            }
        }
    }

    /// All others are busy with it.
    fn judged(&self, name: &str, candidates: &[Candidate], memory: &mut Memory, own_id: NodeId, now: Duration) -> bool {
        let judged = memory.placement.judge(name, candidates, None, own_id, self.rules.more_copies, now);
        judged == Some(Reason::Busy)
    }

    /// What this node would load; `None` where it cannot.
    fn spec_of(&self, record: &Record, is_pinned: bool, own_id: NodeId) -> Option<ModelSpec> {
        let source: Source = record.source()?.parse().ok()?;
        let is_ours = record.origin_writer() == Some(own_id);
        let choice = match choice_of(record.name(), &source, record.sha256(), is_ours) {
            Ok(choice) => choice,
            Err(why) => {
                tracing::debug!(model = record.name(), why, "not for this machine");
                return None;
            }
        };
        let choice = match record.parameters().get(QUANTIZATION) {
            Some(Value::Word(to)) => ModelChoice::Quantized { inner: Box::new(choice), to: to.clone() },
            _ => choice,
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

    fn load(&self, spec: ModelSpec, why: &'static str, memory: &mut Memory) {
        let models = self.models.clone();
        memory.jobs.spawn(&spec.name.clone(), async move {
            tracing::info!(model = spec.name, why, "a registered model is loaded");
            models.load_as(spec).await.map(drop).map_err(|error| error.to_string())
        });
    }

    /// What is here becomes what the registry says.
    fn keep_up(&self, here: ModelSpec, wanted: ModelSpec, memory: &mut Memory) {
        // A second copy's own time holds where the registry says nothing.
        let keep_alive_s = wanted.keep_alive_s.or(here.keep_alive_s.filter(|stays| *stays == SECOND_COPY_STAYS));
        let wanted = ModelSpec { keep_alive_s, ..wanted };
        if here == wanted {
            return;
        }
        let worker = self.models.get(&here.name);
        if !worker.is_some_and(|worker| worker.is_what(&here.choice, &wanted.choice)) {
            let lately = memory.versions.get(&here.name);
            if lately.is_some_and(|(tried, at)| *tried == wanted && at.elapsed() < VERSION_AGAIN) {
                return;
            }
            memory.versions.insert(here.name.clone(), (wanted.clone(), Instant::now()));
            return self.load(wanted, "it is another one now", memory);
        }
        // What is always to be here is loaded where it is not.
        if wanted.pinned && !here.pinned {
            return self.load(wanted, "it is pinned to this machine", memory);
        }
        let models = self.models.clone();
        memory.jobs.spawn(&here.name, async move { models.amend(wanted).await.map_err(|error| error.to_string()) });
    }

    /// The registry learns the hash of a file that nobody knew before, and all other copies are held to it; a file of
    /// this machine is offered to them.
    fn note_hash(&self, record: &Record, here: &ModelSpec, wanted: &ModelSpec, memory: &mut Memory, own_id: NodeId) {
        let Some(worker) = self.models.get(record.name()).filter(|worker| worker.is_ready()) else { return };
        let Some(digest) = worker.source_digest() else { return };
        let name = record.name().to_owned();
        let is_file = record.source().is_some_and(|source| source.starts_with("file:"));
        let is_new = record.sha256().is_none();
        // What runs may still be what had this name before.
        if !worker.is_what(&here.choice, &wanted.choice) || (is_new && *worker.choice() != wanted.choice) {
            return;
        }
        if is_file && memory.shared.insert((name.clone(), digest)) {
            let (worker, name) = (worker.clone(), name.clone());
            memory.jobs.spawn(record.name(), async move {
                if !worker.share().await {
                    tracing::info!(
                        model = name,
                        "its file cannot be linked into the model folder: no machine can copy it"
                    );
                }
                Ok(())
            });
        } else if is_new {
            let registry = self.registry.clone();
            memory.jobs.spawn(record.name(), async move {
                let noted = registry.write(own_id, |registry, at| registry.set_sha256(&name, Some(digest), at)).await;
                noted.map_err(|error| error.to_string())
            });
        }
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
