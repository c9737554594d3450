//! The registered endpoints that are pinned to this node: started, changed and ended while the node runs.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use ingle_protocol::ModelDigest;
use ingle_protocol::registry::{Endpoint, ModelType, Record, Value};
use ingle_protocol::wire::v2::ModelState;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::ModelRegistry;
use super::standin::Standin;
use crate::node::Parameter;
use crate::worker::endpoint::Secret;
use crate::worker::{EndpointOptions, EndpointWorker, Worker, Workers};

/// How long an endpoint that is removed may take to finish its answers. Each of them has a deadline of its own.
const FINISH_LIMIT: Duration = Duration::from_secs(600);
/// How long an endpoint that takes another's place may take to get ready before that one is drained.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// Rest before an endpoint is started again whose task broke.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Numbers of engines from here on are those of registered endpoints.
const FIRST_INDEX: u16 = 0x8000;

/// What has to be the same for an endpoint to go on as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    endpoint: Endpoint,
    slots: Option<u32>,
    embeds: bool,
    sha256: Option<ModelDigest>,
}

impl Wanted {
    fn of(record: &Record) -> Option<Self> {
        let slots = match record.parameters().get(Parameter::BatchSize.as_str()) {
            Some(Value::Number(slots)) => u32::try_from(*slots).ok(),
            _ => None,
        };
        let embeds = record.kind() == ModelType::Embedding;
        Some(Self { endpoint: record.endpoint()?.clone(), slots, embeds, sha256: record.sha256() })
    }
}

/// An endpoint's key, out of this node's environment.
fn key_of(variable: &str) -> Result<Secret, String> {
    match std::env::var(variable) {
        Ok(key) if !key.trim().is_empty() => Ok(Secret::new(&key)),
        Ok(_) => Err(format!("the environment variable {variable} of the node is empty")),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(format!("the environment variable {variable} of the node is not UTF-8"))
        }
        Err(std::env::VarError::NotPresent) => Err(format!(
            "the node has no environment variable {variable} with its key: set it where `ingle up` is started"
        )),
    }
}

/// A registered endpoint as a worker takes it.
pub(crate) fn options_of(
    name: &str,
    endpoint: &Endpoint,
    slots: Option<u32>,
    embeds: bool,
    sha256: Option<ModelDigest>,
) -> Result<EndpointOptions, String> {
    Ok(EndpointOptions {
        url: endpoint.url.parse().map_err(|error| format!("its address cannot be used: {error}"))?,
        model: endpoint.model.clone(),
        name: Some(name.to_owned()),
        key: endpoint.api_key_env.as_deref().map(key_of).transpose()?,
        slots,
        is_default: false,
        embeds,
        first_token_timeout: EndpointOptions::FIRST_TOKEN_TIMEOUT,
        silence_timeout: EndpointOptions::SILENCE_TIMEOUT,
        sha256,
    })
}

/// An endpoint that runs, or what stands in its place. Dropping it ends it.
#[derive(Debug)]
struct Running {
    wanted: Wanted,
    workers: Arc<Workers>,
    worker: Arc<dyn Worker>,
    /// `None` for a stand-in.
    endpoint: Option<Arc<EndpointWorker>>,
    cancel: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.workers.remove(&self.worker);
        self.cancel.cancel();
    }
}

impl Running {
    /// Takes nothing new, lets what it has finish, and ends.
    async fn retire(self, successor: Option<Arc<EndpointWorker>>) {
        if let Some(successor) = successor {
            let mut states = successor.states();
            let _ = timeout(READY_LIMIT, states.wait_for(|state| *state == ModelState::Ready)).await;
        }
        if let Some(endpoint) = &self.endpoint {
            endpoint.retire(FINISH_LIMIT).await;
        }
    }
}

/// Runs them.
#[derive(Debug)]
pub(crate) struct EndpointKeeper {
    /// The name of this node.
    pub own: String,
    pub registry: Arc<ModelRegistry>,
    pub workers: Arc<Workers>,
}

/// The name of an endpoint whose task ended; true where it broke.
type Ended = (String, bool);

impl EndpointKeeper {
    /// Follows the registry until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let mut changes = self.registry.changes();
        let mut live: BTreeMap<String, Running> = BTreeMap::new();
        let mut tasks: JoinSet<Ended> = JoinSet::new();
        let mut retiring: JoinSet<()> = JoinSet::new();
        let mut next_index = FIRST_INDEX;
        loop {
            changes.mark_unchanged();
            let wanted = self.wanted();
            let gone: Vec<String> = live.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
            for old in gone.into_iter().filter_map(|name| live.remove(&name)) {
                retiring.spawn(old.retire(None));
            }
            for (name, wanted) in wanted {
                if live.get(&name).is_some_and(|running| running.wanted == wanted) {
                    continue;
                }
                let new = self.start(&name, wanted, next_index, &cancel, &mut tasks);
                next_index = next_index.checked_add(1).unwrap_or(FIRST_INDEX);
                let successor = new.endpoint.clone();
                if let Some(old) = live.insert(name, new) {
                    retiring.spawn(old.retire(successor));
                }
            }
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                changed = changes.changed() => changed.map_err(|error| error.to_string())?,
                Some(_) = retiring.join_next() => {}
                Some(ended) = tasks.join_next() => if let Ok((name, true)) = ended {
                    tracing::error!(model = name, "the task of an endpoint broke and is started again");
                    live.remove(&name);
                },
            }
        }
    }

    fn wanted(&self) -> BTreeMap<String, Wanted> {
        let registry = self.registry.snapshot();
        let here = registry.models().filter(|record| record.pins().contains(&self.own.as_str()));
        here.filter_map(|record| Some((record.name().to_owned(), Wanted::of(record)?))).collect()
    }

    fn start(
        &self,
        name: &str,
        wanted: Wanted,
        index: u16,
        cancel: &CancellationToken,
        tasks: &mut JoinSet<Ended>,
    ) -> Running {
        let cancel = cancel.child_token();
        let made = options_of(name, &wanted.endpoint, wanted.slots, wanted.embeds, wanted.sha256).and_then(|options| {
            EndpointWorker::new(options, index, self.workers.clone()).map_err(|error| error.to_string())
        });
        let (worker, endpoint): (Arc<dyn Worker>, _) = match made {
            Ok(endpoint) => {
                let (name, endpoint_runs, cancel) = (name.to_owned(), endpoint.clone(), cancel.clone());
                tasks.spawn(async move {
                    let broke = AssertUnwindSafe(endpoint_runs.run(cancel)).catch_unwind().await.is_err();
                    if broke {
                        tokio::time::sleep(RESTART_PAUSE).await;
                    }
                    (name, broke)
                });
                (endpoint.clone(), Some(endpoint))
            }
            Err(why) => {
                tracing::error!(model = name, why, "a registered endpoint does not run");
                let backend = format!("endpoint ({})", wanted.endpoint.url);
                (Arc::new(Standin { name: name.to_owned(), backend, why, embeds: wanted.embeds }), None)
            }
        };
        self.workers.add(worker.clone());
        Running { wanted, workers: self.workers.clone(), worker, endpoint, cancel }
    }
}
