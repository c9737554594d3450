//! The router of a node: what the cluster offers, who gets in, and each request's flight.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use ingle_protocol::admission::Rejection;
use ingle_protocol::liveness::Health;
use ingle_protocol::prefix::beginnings;
use ingle_protocol::recovery::{Circuit, RetryBudget};
use ingle_protocol::routing::Demand;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{EnginePulse, ModelState, Request};
use ingle_protocol::{EngineId, NodeId, RequestId};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::admission::{self, Admission, AdmissionOptions, NotAdmitted};
use super::choice::{self, Usual, Wanted};
use super::delivery::{self, Delivery};
use super::engines::Engines;
use super::flight::{Flight, Step};
use super::journal::{Journal, RequestRecord};
use super::offers::{Offer, default_name};
use super::purpose::kind_of;
use super::warming::{Warming, is_cold};
use super::{ChatRequest, GatewayError, OfferedModel, Reply};
use crate::cluster::Mesh;
use crate::monitor::{Latencies, Outcome, request_span};
use crate::registry::ModelRegistry;
use crate::worker::{ANSWER_BUFFER, Workers};

/// When an answer counts as begun although no token has come: long prompts must not keep a client without headers.
const BEGUN_AFTER: Duration = Duration::from_secs(5);
/// How often engines are looked at: often enough to see a suspicion as soon as it is one.
const LOOK: Duration = Duration::from_millis(50);
/// The same while nothing is under way and nobody is under suspicion: an idle node sleeps. A request ends that.
const LOOK_WHILE_IDLE: Duration = Duration::from_millis(250);
/// A look that comes so late says that this node itself stood still; what it sees then is old.
const STOOD_STILL: Duration = Duration::from_millis(300);

/// See the module.
#[derive(Debug)]
pub(super) struct Router {
    name: String,
    started: Instant,
    mesh: Arc<ArcSwapOption<Mesh>>,
    pub workers: Arc<Workers>,
    pub registry: Arc<ModelRegistry>,
    pub engines: Engines,
    admission: Arc<Admission>,
    pub warming: Warming,
    options: AdmissionOptions,
    retries: Mutex<RetryBudget>,
    usual: Mutex<HashMap<String, Usual>>,
    journal: Journal,
    first_heard: Mutex<HashMap<String, u64>>,
    open: Arc<AtomicU32>,
    /// Told when the first answer is under way.
    begun: Notify,
    latencies: Arc<Latencies>,
    /// Answers that went on elsewhere since somebody last asked, by node and model.
    moves: Mutex<BTreeMap<(String, String), u64>>,
}

/// The door of a node for requests.
#[derive(Debug, Clone)]
pub struct Gateway(pub(super) Arc<Router>);

/// Counts an answer that is being passed on.
pub(super) struct Open(Arc<AtomicU32>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Router {
    /// The time on the router's own clock.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Spends a retry, if there is one.
    pub fn try_retry(&self) -> bool {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner).try_retry(self.now())
    }

    /// An answer went well.
    pub fn learn(&self, model: &str, answer_tokens: u32, bytes: u32, prompt_tokens: u32) {
        let mut usual = self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        Usual::observe(&mut usual, model, answer_tokens, bytes, prompt_tokens);
    }

    /// An answer goes on elsewhere.
    pub fn note_move(&self, node: &str, model: &str) {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        *moves.entry((node.to_owned(), model.to_owned())).or_default() += 1;
    }

    fn open(&self) -> Open {
        if self.open.fetch_add(1, Ordering::AcqRel) == 0 {
            self.begun.notify_one();
        }
        Open(self.open.clone())
    }

    /// What all nodes offer now.
    pub fn offers(&self) -> Vec<Offer> {
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

    /// Looks at all engines, and at who waits at the door. Returns whether it should look again soon.
    fn look(&self) -> bool {
        let offers = self.offers();
        let now = self.now();
        let mut known = HashSet::new();
        let mut busy = self.open.load(Ordering::Acquire) > 0 || self.admission.waiting() > 0;
        for offer in &offers {
            let Some(id) = offer.facts.engine else { continue };
            busy |= offer.health != Health::Alive;
            busy |= offer.pulse.is_some_and(|pulse| pulse.load.running > 0 || pulse.load.waiting > 0);
            known.insert((id.node, id.index));
            let peer = match &offer.health {
                Health::Suspect { why } => Some(why.clone()),
                // A connection that is gone ends its answers by itself.
                Health::Alive | Health::Failed { .. } | Health::Left { .. } => None,
            };
            let engine = self.engines.of(id);
            engine.look(offer.pulse.as_ref(), peer, now);
            busy |= engine.suspicion().is_some();
        }
        self.engines.keep(&known);
        self.admission.refresh(|name| choice::limits(&offers, name, &self.options));
        busy
    }

    /// What a request needs of the workers, before anybody has counted its tokens.
    pub fn wanted(&self, request: &Request, offers: &[Offer]) -> Option<Wanted> {
        let digest = choice::digest_of(offers, &request.model)?;
        let usual = {
            let usual = self.usual.lock().unwrap_or_else(PoisonError::into_inner);
            usual.get(&request.model).copied().unwrap_or_default()
        };
        if let Some(embed) = &request.embed {
            let (bytes, tokens) = embed.lengths();
            let prompt_tokens = ((bytes as f32 / usual.bytes_per_token).ceil() as u32).saturating_add(tokens as u32);
            let demand = Demand { prompt_tokens, output_tokens: 0 };
            let bytes_per_token = usual.bytes_per_token;
            return Some(Wanted { digest, demand, beginnings: Vec::new(), bytes_per_token, embeds: true });
        }
        let beginnings = beginnings(&digest, &request.messages);
        let bytes = beginnings.last().map_or(0, |(_, bytes)| *bytes);
        let expected = usual.answer_tokens.ceil() as u32;
        let demand = Demand {
            prompt_tokens: (bytes as f32 / usual.bytes_per_token).ceil() as u32,
            output_tokens: request.sampling.max_tokens.unwrap_or(u32::MAX).min(expected).max(1),
        };
        let bytes_per_token = usual.bytes_per_token;
        Some(Wanted { digest, demand, beginnings, bytes_per_token, embeds: false })
    }

    async fn admit(
        &self,
        request: &Request,
        wanted: &Wanted,
        offers: &[Offer],
        deadline: Instant,
    ) -> Result<admission::Permit, GatewayError> {
        let limits = choice::limits(offers, &request.model, &self.options);
        let tokens = u64::from(wanted.demand.prompt_tokens) + u64::from(wanted.demand.output_tokens);
        let Request { model, principal, priority, .. } = request;
        let asks = admission::Request { model, principal, priority: *priority, tokens, deadline };
        self.admission.enter(asks, limits).await.map_err(|why| match why {
            NotAdmitted::TooLate => GatewayError::Failed(super::flight::out_of_time()),
            NotAdmitted::Rejected(Rejection::Quota { retry_after }) => GatewayError::Quota {
                why: format!(
                    "You have more requests for `{model}` under way than your share; try again in {} s.",
                    retry_after.as_secs().max(1)
                ),
                retry_after,
            },
            NotAdmitted::Rejected(Rejection::Capacity { retry_after }) => GatewayError::NoWorker {
                why: format!(
                    "All machines with `{model}` are busy, and as much waits as they compute in {} s; try again in {} s.",
                    self.options.queue_time.as_secs(),
                    retry_after.as_secs().max(1)
                ),
                retry_after,
            },
        })
    }
}

impl Gateway {
    /// A router over this node's workers and whatever mesh there is. [`Gateway::run`] must run beside it.
    pub fn new(
        name: &str,
        mesh: Arc<ArcSwapOption<Mesh>>,
        workers: Arc<Workers>,
        registry: Arc<ModelRegistry>,
        options: AdmissionOptions,
    ) -> Self {
        Self(Arc::new(Router {
            name: name.to_owned(),
            started: Instant::now(),
            mesh,
            workers,
            registry,
            engines: Engines::default(),
            admission: Arc::default(),
            warming: Warming::new(options.queued),
            options,
            retries: Mutex::default(),
            usual: Mutex::default(),
            journal: Journal::default(),
            first_heard: Mutex::default(),
            open: Arc::default(),
            begun: Notify::new(),
            latencies: Arc::default(),
            moves: Mutex::default(),
        }))
    }

    /// Watches the engines until `cancel`.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), String> {
        let mut busy = true;
        loop {
            let (began, pause) = (Instant::now(), if busy { LOOK } else { LOOK_WHILE_IDLE });
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                () = self.0.begun.notified(), if !busy => {}
                () = sleep(pause) => {}
            }
            // After a standstill of our own all news is still in the sockets: read it before judging others by it.
            if began.elapsed() < pause + STOOD_STILL {
                busy = self.0.look();
            }
        }
    }

    /// Answers that are being passed on.
    pub fn open_answers(&self) -> u32 {
        self.0.open.load(Ordering::Acquire)
    }

    /// Requests that wait at the door.
    pub fn waiting(&self) -> u32 {
        self.0.admission.waiting()
    }

    /// How many answers went on elsewhere since this was last asked, by the node and the model where they were.
    pub(crate) fn take_moves(&self) -> BTreeMap<(String, String), u64> {
        std::mem::take(&mut *self.0.moves.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Latencies of what entered here.
    pub fn latencies(&self) -> &Latencies {
        &self.0.latencies
    }

    /// What became of a request that entered here, or of the last one.
    pub fn explain(&self, request: Option<RequestId>) -> Option<RequestRecord> {
        self.0.journal.find(request)
    }

    /// Why this node sends nothing to an engine now, if it does not.
    pub fn trouble(&self, engine: EngineId) -> Option<String> {
        let engine = self.0.engines.of(engine);
        engine.suspicion().map(|why| format!("suspect: {why}")).or_else(|| match engine.circuit(self.0.now()) {
            Circuit::Closed => None,
            Circuit::Open { why, for_ms } => Some(format!("circuit open for {} s: {why}", for_ms.div_ceil(1_000))),
            Circuit::HalfOpen { why } => Some(format!("circuit half open: {why}")),
        })
    }

    /// All models of the cluster, ready or not, the default one first.
    pub fn models(&self) -> Vec<OfferedModel> {
        let offers = self.0.offers();
        let default = default_name(&offers, &self.0.registry.default_route());
        let mut first_heard = self.0.first_heard.lock().unwrap_or_else(PoisonError::into_inner);
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
                        model.features.clone_from(&offer.facts.features);
                    }
                    model.context_length = model.context_length.max(offer.facts.context_length);
                }
                None => models.push(OfferedModel {
                    name: offer.facts.name.clone(),
                    kind: kind_of(&offers, &self.0.registry, &offer.facts.name),
                    features: offer.facts.features.clone(),
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

    /// Nobody can answer for the model now, but somebody will: whoever asks for it waits.
    pub fn is_waited_for(&self, model: &str) -> bool {
        let offers = self.0.offers();
        choice::resolve(&offers, &self.0.registry, model)
            .is_ok_and(|name| is_cold(&offers, &name) && self.0.coming(&offers, &name).is_some())
    }

    /// Waits for its turn, sends the request to the best worker and returns when its answer has begun.
    pub async fn chat(&self, chat: ChatRequest) -> Result<Reply, GatewayError> {
        let began = Instant::now();
        let deadline = began + chat.deadline;
        let request = Request {
            request_id: chat.request_id,
            attempt: 0,
            trace: chat.trace,
            principal: chat.principal,
            priority: chat.priority,
            remaining_ms: 0,
            model: chat.model,
            digest: Default::default(),
            messages: chat.messages,
            sampling: chat.sampling,
            embed: None,
            resume: Vec::new(),
            resume_text: Vec::new(),
            extra: chat.extra,
        };
        let span = request_span("route", &request);
        async { self.begin(self.depart(request, (began, deadline)).await?).await }.instrument(span).await
    }

    /// Finds out which model is meant, has it loaded where it is not, and waits for its turn.
    pub(super) async fn depart(
        &self,
        mut request: Request,
        (began, deadline): (Instant, Instant),
    ) -> Result<Flight, GatewayError> {
        let embeds = request.embed.is_some();
        let offers = self.0.offers();
        request.model = self.0.resolve(&offers, &request.model, embeds)?;
        self.0.check_purpose(&offers, &request.model, embeds)?;
        let offers = self.0.warm_up(&request, deadline).await?;
        // What it is may be known only now that it is loaded.
        self.0.check_purpose(&offers, &request.model, embeds)?;
        self.0.retries.lock().unwrap_or_else(PoisonError::into_inner).request(self.0.now());
        let nobody = || choice::nobody(&offers, &self.0.engines, &request.model, self.0.now());
        let wanted = self.0.wanted(&request, &offers).ok_or_else(nobody)?;
        let can_come = choice::is_hope(&offers, wanted.digest, None, &[], Duration::ZERO);
        if !can_come {
            return Err(nobody());
        }
        request.digest = wanted.digest;
        let permit = self.0.admit(&request, &wanted, &offers, deadline).await?;
        let record = self.0.journal.open(record_of(&request, &wanted, began));
        Ok(Flight::new(self.0.clone(), request, wanted, (began, deadline), record, permit))
    }

    /// Counts an answer that is being passed on, until the value is dropped.
    pub(super) fn open(&self) -> Open {
        self.0.open()
    }

    /// Flies until there is a first sign of an answer.
    async fn begin(&self, mut flight: Flight) -> Result<Reply, GatewayError> {
        let open = self.0.open();
        let mut patience = flight.deadline;
        let first = loop {
            let step = match timeout_at(patience.into(), flight.step()).await {
                Ok(step) => step,
                // Taken, and long in reading its prompt.
                Err(_) => break None,
            };
            match step {
                Ok(Step::Alive) => {
                    if flight.accepted.is_some() && patience == flight.deadline {
                        patience = flight.deadline.min(Instant::now() + BEGUN_AFTER);
                    }
                }
                Ok(Step::Deliver(answer)) => break Some(answer),
                Err(error) => {
                    flight.close(&error.to_string());
                    let now = Instant::now();
                    let (node, model) = (flight.node(), flight.model().to_owned());
                    flight.timeline.clone().close(&self.0.latencies, &node, &model, Outcome::Failed, now);
                    return Err(error);
                }
            }
        };
        let Some(accepted) = flight.accepted else {
            let failed = match first {
                Some(Answer::Failed(failed)) => failed,
                _ => super::flight::out_of_time(),
            };
            flight.close(&failed.message);
            return Err(GatewayError::Failed(failed));
        };
        // One more for the last word to a reader that reads too slowly.
        let (answers, reader) = mpsc::channel(ANSWER_BUFFER + 1);
        let (node, model, record) = (flight.node(), flight.model().to_owned(), flight.record.clone());
        let features = flight.features.clone();
        let delivery = Delivery { flight, latencies: self.0.latencies.clone(), _open: open };
        tokio::spawn(delivery::run(delivery, first, answers).in_current_span());
        Ok(Reply { node, model, features, accepted, answers: reader, record })
    }
}

fn record_of(request: &Request, wanted: &Wanted, began: Instant) -> RequestRecord {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    RequestRecord {
        request_id: request.request_id,
        came_ms: ms(now.saturating_sub(began.elapsed())),
        model: request.model.clone(),
        principal: request.principal.clone(),
        prompt_tokens: wanted.demand.prompt_tokens,
        expected_tokens: wanted.demand.output_tokens,
        admitted_after_ms: ms(began.elapsed()),
        attempts: Vec::new(),
        notes: Vec::new(),
        outcome: None,
        total_ms: None,
    }
}
