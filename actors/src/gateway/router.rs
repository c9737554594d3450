//! One request through the cluster: find the model, pick a worker, watch the answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use ingle_protocol::liveness::Health;
use ingle_protocol::names::near;
use ingle_protocol::routing::{Candidate, Demand, pick};
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v1::{Accepted, EnginePulse, Failed, FailureKind, ModelState, RefusalKind, Refused, Request};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use tokio::sync::mpsc;
use tokio::time::timeout_at;
use tracing::Instrument;

use super::offers::{Offer, default_name};
use super::watch::{Place, Watch, broken, out_of_time};
use super::{ChatRequest, DEFAULT_MODEL, GatewayError, OfferedModel, Reply};
use crate::cluster::{Mesh, submit_remote};
use crate::monitor::{Latencies, Outcome, Timeline, request_span};
use crate::worker::{ANSWER_BUFFER, Workers};

/// Tries on other nodes while nothing was computed yet.
const MOST_RETRIES: u32 = 2;
/// When an answer counts as begun although no token has come: long prompts must not keep a client without headers.
const BEGUN_AFTER: Duration = Duration::from_secs(5);
/// What a client is told to wait where nobody knows better.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Expected tokens of an answer whose length is not limited.
const USUAL_ANSWER: u32 = 256;

/// The router of this node.
#[derive(Debug)]
pub struct Gateway {
    name: String,
    mesh: Arc<ArcSwapOption<Mesh>>,
    workers: Arc<Workers>,
    /// Requests of this router per engine, where an engine is a node's n-th.
    in_flight: Mutex<HashMap<(NodeId, u16), Arc<AtomicU32>>>,
    first_heard: Mutex<HashMap<String, u64>>,
    open: Arc<AtomicU32>,
    /// Latencies of what entered here.
    pub latencies: Arc<Latencies>,
}

impl Gateway {
    /// A router over this node's workers and whatever mesh there is.
    pub fn new(name: &str, mesh: Arc<ArcSwapOption<Mesh>>, workers: Arc<Workers>) -> Self {
        Self {
            name: name.to_owned(),
            mesh,
            workers,
            in_flight: Mutex::default(),
            first_heard: Mutex::default(),
            open: Arc::default(),
            latencies: Arc::default(),
        }
    }

    /// Answers that are being passed on.
    pub fn open_answers(&self) -> u32 {
        self.open.load(Ordering::Acquire)
    }

    fn offers(&self) -> Vec<Offer> {
        // Without a mesh, while the node changes its cluster, it still has its own models.
        let mesh = self.mesh.load_full();
        let own = mesh.as_ref().map_or_else(NodeId::default, |mesh| mesh.own_id());
        let pulses: HashMap<EngineId, EnginePulse> =
            self.workers.pulses(own).into_iter().map(|pulse| (pulse.engine, pulse)).collect();
        let mut offers: Vec<Offer> = self
            .workers
            .facts(own)
            .into_iter()
            .map(|facts| Offer {
                node: own,
                node_name: self.name.clone(),
                health: Health::Alive,
                pulse: facts.engine.and_then(|engine| pulses.get(&engine).copied()),
                facts,
                link: None,
                local: true,
            })
            .collect();
        let Some(mesh) = mesh else { return offers };
        let now = mesh.roster.now();
        for (node, member) in mesh.roster.lock().iter() {
            for facts in member.facts.iter().flat_map(|facts| &facts.models) {
                offers.push(Offer {
                    node: *node,
                    node_name: member.name.clone(),
                    health: member.watch.health(now),
                    pulse: facts.engine.and_then(|engine| member.engines.get(&engine).copied()),
                    facts: facts.clone(),
                    link: member.link.clone(),
                    local: false,
                });
            }
        }
        offers
    }

    /// All models of the cluster, ready or not, the default one first.
    pub fn models(&self) -> Vec<OfferedModel> {
        let offers = self.offers();
        let default = default_name(&offers);
        let mut first_heard = self.first_heard.lock().unwrap_or_else(PoisonError::into_inner);
        let mut models: Vec<OfferedModel> = Vec::new();
        for offer in &offers {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let created = *first_heard.entry(offer.facts.name.clone()).or_insert(now);
            let answers = offer.can_answer();
            match models.iter_mut().find(|model| model.name == offer.facts.name) {
                Some(model) => {
                    if answers {
                        model.state = ModelState::Ready;
                        model.nodes.push(offer.node_name.clone());
                    }
                    model.context_length = model.context_length.max(offer.facts.context_length);
                }
                None => models.push(OfferedModel {
                    name: offer.facts.name.clone(),
                    // What a node that is not alive last said of itself is no offer.
                    state: match &offer.health {
                        Health::Alive => offer.facts.state.clone(),
                        _ => ModelState::Failed { why: offer.in_words() },
                    },
                    nodes: if answers { vec![offer.node_name.clone()] } else { Vec::new() },
                    context_length: offer.facts.context_length,
                    is_default: default.as_deref() == Some(offer.facts.name.as_str()),
                    created,
                }),
            }
        }
        models.sort_by(|a, b| b.is_default.cmp(&a.is_default).then_with(|| a.name.cmp(&b.name)));
        models
    }

    /// Sends the request to the best worker and returns when its answer has begun.
    pub async fn chat(&self, chat: ChatRequest) -> Result<Reply, GatewayError> {
        let began = Instant::now();
        let deadline = began + chat.deadline;
        let mut request = Request {
            request_id: chat.request_id,
            attempt: 0,
            trace: chat.trace,
            principal: chat.principal,
            priority: chat.priority,
            remaining_ms: 0,
            model: chat.model,
            digest: ModelDigest::default(),
            messages: chat.messages,
            sampling: chat.sampling,
            resume: Vec::new(),
            extra: chat.extra,
        };
        let span = request_span("route", &request);
        async {
            let mut tried: Vec<NodeId> = Vec::new();
            loop {
                let offers = self.offers();
                let chosen = match self.choose(&offers, &request, &tried) {
                    Ok(chosen) => chosen,
                    Err(Choice::Tried(refused)) => return Err(GatewayError::Refused(refused)),
                    Err(Choice::Nobody(error)) => return Err(error),
                };
                request.model.clone_from(&chosen.facts.name);
                request.digest = chosen.facts.digest.unwrap_or_default();
                request.remaining_ms =
                    deadline.saturating_duration_since(Instant::now()).as_millis().try_into().unwrap_or(u64::MAX);
                let place = self.take_place(chosen);
                tracing::debug!(node = chosen.node_name, attempt = request.attempt, "sent to a worker");
                let refused = match self.begin(chosen, &request, began, deadline, place).await {
                    Ok(reply) => return Ok(reply),
                    Err(error) if is_retryable(&error) => error,
                    Err(error) => return Err(error),
                };
                tried.push(chosen.node);
                request.attempt += 1;
                if request.attempt > MOST_RETRIES || !self.has_another(&request, &tried) {
                    return Err(refused);
                }
            }
        }
        .instrument(span)
        .await
    }

    fn has_another(&self, request: &Request, tried: &[NodeId]) -> bool {
        self.choose(&self.offers(), request, tried).is_ok()
    }

    fn choose<'a>(&self, offers: &'a [Offer], request: &Request, tried: &[NodeId]) -> Result<&'a Offer, Choice> {
        let asked = request.model.trim();
        let name = if asked.is_empty() || asked == DEFAULT_MODEL { default_name(offers) } else { Some(asked.into()) };
        let Some(name) = name else {
            let why = match offers.first() {
                None => "No machine of this cluster has a model yet. Start one with `ingle up` where there is memory for it.".into(),
                Some(offer) => format!("This cluster has no default model. Ask for one by name, like `{}`.", offer.facts.name),
            };
            return Err(Choice::Nobody(GatewayError::NoWorker { why, retry_after: RETRY_AFTER * 5 }));
        };
        let known: Vec<&Offer> = offers.iter().filter(|offer| offer.facts.name == name).collect();
        if known.is_empty() {
            let near = near(&name, offers.iter().map(|offer| offer.facts.name.as_str()));
            let near = near.into_iter().map(str::to_owned).collect();
            let mut known: Vec<String> = offers.iter().map(|offer| offer.facts.name.clone()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Choice::Nobody(GatewayError::UnknownModel { model: name, near, known }));
        }
        // One name can stand for two contents while a model is being replaced: an attempt that follows another
        // stays with the content of the first.
        let digest = if tried.is_empty() {
            known.iter().filter(|offer| offer.can_answer()).map(|offer| (!offer.local, offer.facts.digest)).min()
        } else {
            Some((false, Some(request.digest)))
        };
        let able: Vec<&Offer> = known
            .iter()
            .copied()
            .filter(|offer| offer.can_answer() && digest.is_some_and(|(_, digest)| offer.facts.digest == digest))
            .collect();
        let candidates: Vec<Candidate> = able.iter().map(|offer| self.candidate(offer)).collect();
        let characters: usize = request.messages.iter().map(|message| message.content.len()).sum();
        let demand = Demand {
            // A gateway has no tokenizer; four bytes a token is the usual estimate for English.
            prompt_tokens: u32::try_from(characters / 4).unwrap_or(u32::MAX),
            output_tokens: request.sampling.max_tokens.unwrap_or(USUAL_ANSWER),
        };
        match pick(&candidates, tried, demand, rand::random()) {
            Some(index) => Ok(able[index]),
            None if tried.is_empty() => {
                let states: Vec<String> = known.iter().map(|offer| offer.in_words()).collect();
                let why = format!("The model `{name}` cannot answer now: {}.", states.join("; "));
                Err(Choice::Nobody(GatewayError::NoWorker { why, retry_after: RETRY_AFTER }))
            }
            None => Err(Choice::Tried(Refused {
                kind: RefusalKind::Busy,
                message: format!("No machine takes a request for `{name}` now."),
                param: None,
                retry_after_ms: Some(1_000),
            })),
        }
    }

    fn candidate(&self, offer: &Offer) -> Candidate {
        let engine = offer.facts.engine.unwrap_or(EngineId { node: offer.node, index: 0, generation: 0 });
        let pulse = offer.pulse;
        Candidate {
            engine,
            local: offer.local,
            in_flight: self.in_flight(engine).load(Ordering::Acquire),
            running: pulse.map_or(0, |pulse| pulse.running),
            waiting: pulse.map_or(0, |pulse| pulse.waiting),
            slots: offer.facts.slots,
            prefill_rate: pulse.map_or(0.0, |pulse| pulse.prefill_rate),
            decode_rate: pulse.map_or(0.0, |pulse| pulse.decode_rate),
        }
    }

    fn in_flight(&self, engine: EngineId) -> Arc<AtomicU32> {
        let mut counts = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        counts.entry((engine.node, engine.index)).or_default().clone()
    }

    fn take_place(&self, offer: &Offer) -> Place {
        let engine = offer.facts.engine.unwrap_or(EngineId { node: offer.node, index: 0, generation: 0 });
        Place::take([self.in_flight(engine), self.open.clone()])
    }

    /// Submits and waits for the first sign of an answer.
    async fn begin(
        &self,
        offer: &Offer,
        request: &Request,
        began: Instant,
        deadline: Instant,
        place: Place,
    ) -> Result<Reply, GatewayError> {
        let mut inner = match &offer.link {
            None => self.workers.submit(request.clone()).await,
            Some(link) => submit_remote(link, request).await.map_err(GatewayError::Refused)?.into(),
        };
        let mut timeline = Timeline::new(began);
        let mut accepted: Option<Accepted> = None;
        let mut first = None;
        let mut patience = deadline;
        loop {
            let answer = match timeout_at(patience.into(), inner.recv()).await {
                Ok(answer) => answer.unwrap_or_else(broken),
                Err(_) if accepted.is_some() && patience < deadline => break,
                Err(_) => out_of_time(),
            };
            timeline.observe(&answer, Instant::now());
            match answer {
                Answer::Accepted(body) => {
                    accepted = Some(body);
                    patience = deadline.min(Instant::now() + BEGUN_AFTER);
                }
                Answer::Progress(_) => {}
                Answer::Refused(refused) => return Err(GatewayError::Refused(refused)),
                Answer::Failed(failed) => {
                    timeline.close(&self.latencies, &offer.node_name, &request.model, Outcome::Failed, Instant::now());
                    return Err(GatewayError::Failed(failed));
                }
                Answer::Token(_) | Answer::Finished(_) => {
                    first = Some(answer);
                    break;
                }
            }
        }
        let Some(accepted) = accepted else {
            let message = "the worker answered before it accepted the request".to_owned();
            let kind = FailureKind::Protocol;
            return Err(GatewayError::Failed(Failed { kind, message, retryable: false, migratable: false }));
        };
        // One more for the last word to a reader that reads too slowly.
        let (answers, reader) = mpsc::channel(ANSWER_BUFFER + 1);
        let watch = Watch {
            timeline,
            latencies: self.latencies.clone(),
            node: offer.node_name.clone(),
            model: request.model.clone(),
            deadline,
            _place: place,
        };
        tokio::spawn(watch.run(first, inner, answers).in_current_span());
        Ok(Reply { node: offer.node_name.clone(), model: request.model.clone(), accepted, answers: reader })
    }
}

/// Nothing was delivered, and another node may do better.
fn is_retryable(error: &GatewayError) -> bool {
    match error {
        GatewayError::Refused(refused) => refused.kind.is_retryable(),
        GatewayError::Failed(failed) => failed.retryable,
        GatewayError::UnknownModel { .. } | GatewayError::NoWorker { .. } => false,
    }
}

enum Choice {
    /// Nobody could ever be asked.
    Nobody(GatewayError),
    /// All who could be asked were.
    Tried(Refused),
}
