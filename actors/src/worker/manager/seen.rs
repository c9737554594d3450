//! A model of this node as people see it.

use std::time::{Duration, Instant};

use ingle_protocol::NodeId;
use ingle_protocol::wire::v2::ModelState;
use serde::{Deserialize, Serialize};

use super::{Model, ModelManager, Promised};
use crate::node::ModelChoice;
use crate::platform::resident_memory_of;
use crate::worker::Worker;

/// What `ingle ps` shows of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenModel {
    /// Its name.
    pub name: String,
    /// Its state in a word or a few.
    pub state: String,
    /// Where it comes from: a file, a source, `default` or `echo`.
    pub source: String,
    /// SHA-256 of its file.
    pub digest: Option<String>,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// It never goes to make room for others.
    pub pinned: bool,
    /// What it runs on; empty while it does not.
    pub backend: String,
    /// Context length in tokens; 0 while it is not known.
    pub context_length: u32,
    /// Answers that it writes at once.
    pub slots: u32,
    /// Answers that it writes now.
    pub running: u32,
    /// Requests that wait in it.
    pub waiting: u32,
    /// Bytes that it was promised.
    pub promised: Option<Promised>,
    /// Bytes that its process has; mapped weights count, and may be shared.
    pub resident: Option<u64>,
    /// Its process.
    pub pid: Option<u32>,
    /// Milliseconds since it is ready.
    pub ready_for_ms: Option<u64>,
    /// Milliseconds for which nobody has used it.
    pub idle_ms: Option<u64>,
    /// It goes after so many seconds in which nobody uses it.
    pub keep_alive_s: Option<u64>,
    /// Milliseconds until it will probably be ready, while it is on its way.
    pub ready_in_ms: Option<u64>,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn in_words(choice: &ModelChoice) -> String {
    match choice {
        ModelChoice::Default => "default".into(),
        ModelChoice::Echo => "echo".into(),
        ModelChoice::File(path) | ModelChoice::LocalFile { path, .. } => path.display().to_string(),
        ModelChoice::Quantized { inner, to } => format!("{} as {to}", in_words(inner)),
        ModelChoice::First(model) => model.source.to_string(),
        ModelChoice::Source(model) => model.sources.first().map(ToString::to_string).unwrap_or_default(),
    }
}

impl ModelManager {
    pub(super) fn see(&self, model: &Model) -> SeenModel {
        let (spec, worker) = (model.spec(), model.current());
        let facts = worker.facts(NodeId::default());
        let load = worker.pulse(NodeId::default()).map(|pulse| pulse.load).unwrap_or_default();
        let (pid, ready_since) = {
            let status = worker.status();
            (status.pid, status.ready_since)
        };
        let comes = matches!(
            facts.state,
            ModelState::Fetching { .. } | ModelState::Verifying | ModelState::Loading | ModelState::Warming
        );
        SeenModel {
            name: facts.name,
            state: facts.state.words(),
            source: in_words(&spec.choice),
            digest: facts.digest.map(|digest| digest.to_string()),
            is_default: model.is_default,
            pinned: spec.pinned,
            backend: facts.backend,
            context_length: facts.context_length,
            slots: facts.slots,
            running: load.running,
            waiting: load.waiting,
            promised: self.ledger.of(worker.index()),
            resident: pid.and_then(resident_memory_of),
            pid,
            ready_for_ms: ready_since.map(|since| ms(Instant::now().saturating_duration_since(since))),
            idle_ms: worker.idle_for().map(ms),
            keep_alive_s: spec.keep_alive_s,
            ready_in_ms: comes.then(|| ms(worker.ready_in())),
        }
    }
}
