//! An endpoint: a model that an OpenAI-compatible server elsewhere (Ollama, llama.cpp, vLLM, LM Studio …) answers for.
//! Requests are passed on to it, and its answer comes back as our frames. The only place below `node` that knows a
//! JSON dialect.

mod address;
mod chunk;
mod dialect;
mod discover;
mod embed;
mod errors;
mod exchange;
mod gate;
mod health;
mod meter;
mod options;
mod request;
mod sse;
mod stream;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Accepted, EMBEDDINGS, ENDPOINT_NUMERICS, Embed, EnginePulse, FinishReason, Finished, Load, ModelFacts, ModelState,
    RESUMES_TEXT, RefusalKind, Refused, Request, Usage,
};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

pub use address::{EndpointUrl, EndpointUrlError, Secret};
pub use discover::{FoundName, FoundServer, USUAL_PORTS, discover};
pub use options::EndpointOptions;

use self::dialect::FarSide;
use self::exchange::{Ended, Exchange, Patience};
use self::gate::Gate;
use self::health::NotReady;
use self::meter::Meter;
use self::options::client;
use self::stream::Behind;
use super::{ANSWER_BUFFER, Worker, Workers, only_refusal};
use crate::models::{ClientError, model_name};

/// Requests that may be at one endpoint; most of them wait there.
const MOST_REQUESTS: u32 = 1_024;
/// Places of an endpoint that does not say how many it has.
const USUAL_SLOTS: u32 = 8;
/// How often a good endpoint is asked how it is, and how soon a bad one, which waits twice as long each time.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// How often one that is to go is looked at, whether its answers have ended.
const FINISH_LOOK: Duration = Duration::from_millis(20);
/// For so long another endpoint with the same model goes before one where an answer broke.
const DOUBT: Duration = Duration::from_secs(5);
/// A tokenizer is not here; four bytes a token is the usual estimate for English.
const BYTES_PER_TOKEN: usize = 4;

#[derive(Debug, Clone)]
struct Status {
    state: ModelState,
    /// The model's name at the far side, once it is known.
    model: Option<String>,
    /// Counts how often it came to be ready.
    generation: u32,
    slots: u32,
    context_length: u32,
    /// What it is.
    far: FarSide,
    /// When an answer last broke there.
    broke: Option<Instant>,
}

/// One endpoint.
#[derive(Debug)]
pub struct EndpointWorker {
    options: EndpointOptions,
    index: u16,
    client: reqwest::Client,
    headers: HeaderMap,
    meter: Arc<Meter>,
    gate: Arc<Gate>,
    workers: Arc<Workers>,
    status: Arc<Mutex<Status>>,
    state: watch::Sender<ModelState>,
    /// Wakes the prober: a request did not come through.
    trouble: Arc<Notify>,
    /// It is to go: whatever the far side says, it takes nothing new.
    retiring: AtomicBool,
}

/// Asks a far server once: the name of the model that it would answer with, or why it would not.
pub(crate) async fn ask_once(options: &EndpointOptions) -> Result<String, String> {
    let client = client(&options.url).map_err(|error| error.to_string())?;
    match health::probe(&client, &options.url, options.key.as_ref(), options.model.as_deref()).await {
        Ok(found) => Ok(found.name),
        Err(NotReady::Loading) => Err("it is there, but still reads its model".into()),
        Err(NotReady::Failed(why)) => Err(why),
    }
}

impl EndpointWorker {
    /// A worker that asks nothing until [`Self::run`]. `index` tells it from the node's other engines.
    pub fn new(options: EndpointOptions, index: u16, workers: Arc<Workers>) -> Result<Arc<Self>, ClientError> {
        let client = client(&options.url)?;
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        if let Some(key) = &options.key {
            let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose()))
                .map_err(|_| ClientError::new("the endpoint's key has characters that no HTTP header can have"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let status = Status {
            state: ModelState::Loading,
            model: options.model.clone(),
            generation: 0,
            slots: options.slots.unwrap_or(USUAL_SLOTS),
            context_length: 0,
            far: FarSide::default(),
            broke: None,
        };
        Ok(Arc::new(Self {
            options,
            index,
            client,
            headers,
            meter: Arc::default(),
            gate: Arc::default(),
            workers,
            status: Arc::new(Mutex::new(status)),
            state: watch::Sender::new(ModelState::Loading),
            trouble: Arc::default(),
            retiring: AtomicBool::new(false),
        }))
    }

    fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state with every change of it.
    pub fn states(&self) -> watch::Receiver<ModelState> {
        self.state.subscribe()
    }

    /// The model's name here, as far as it is known.
    pub fn name(&self) -> String {
        self.name_in(&self.status())
    }

    fn name_in(&self, status: &Status) -> String {
        let far = || status.model.as_deref().map(name_of);
        let name = self.options.name.clone().or_else(far);
        name.unwrap_or_else(|| format!("endpoint {}", self.options.url.host_and_port()))
    }

    /// What it is, in words, and what was learnt of how much it takes.
    pub fn backend(&self) -> String {
        let program = self.status().far.in_words();
        let learnt = match (self.gate.pause(Instant::now()), self.gate.limit()) {
            (Some(_), _) => Some("asks for a pause".to_owned()),
            (None, Some(limit)) => Some(format!("takes {limit} at once")),
            (None, None) => None,
        };
        let parts = [Some(self.options.url.to_string()), program, learnt];
        format!("endpoint ({})", parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }

    /// Places there; none while it asks to be left alone.
    fn slots(&self, status: &Status) -> u32 {
        match (self.gate.pause(Instant::now()), self.gate.limit()) {
            (Some(_), _) => 0,
            // What somebody set, or it says itself, is not more than what it takes.
            (None, Some(limit)) => status.slots.min(limit),
            (None, None) => status.slots,
        }
    }

    /// What is wrong, in words.
    pub fn problem(&self) -> Option<String> {
        match &self.status().state {
            ModelState::Failed { why } => Some(format!("the endpoint {}: {why}", self.options.url)),
            _ => None,
        }
    }

    /// Asks the endpoint how it is, again and again, until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let asking = async {
            let mut retry = FIRST_RETRY;
            loop {
                self.look().await;
                let ready = self.status().state == ModelState::Ready;
                let pause = if ready { PROBE_INTERVAL } else { retry };
                retry = if ready { FIRST_RETRY } else { (retry * 2).min(LAST_RETRY) };
                let pausing = async {
                    tokio::time::sleep(pause).await;
                    // Requests that get on say it better than any question.
                    while ready
                        && self.meter.load() != Load::default()
                        && self.meter.has_progress(PROBE_INTERVAL, Instant::now())
                    {
                        tokio::time::sleep(PROBE_INTERVAL).await;
                    }
                };
                tokio::select! {
                    () = pausing => {}
                    // What is known to be down is not asked more often because requests come.
                    () = self.trouble.notified(), if ready => {}
                }
            }
        };
        let reopening = async {
            loop {
                self.gate.reopened().await;
                // It has places again, which others have to hear.
                self.workers.note_change();
            }
        };
        tokio::select! {
            () = asking => {}
            () = reopening => {}
            () = cancel.cancelled() => {}
        }
        self.set_state(ModelState::Unloaded);
        Ok(())
    }

    /// Asks once.
    async fn look(&self) {
        let Self { client, options, .. } = self;
        let key = options.key.as_ref();
        let state = match health::probe(client, &options.url, key, options.model.as_deref()).await {
            Ok(found) => {
                if self.status().state != ModelState::Ready {
                    let far = dialect::identify(client, &options.url, key, &found.owner).await;
                    let mut status = self.status();
                    status.generation += 1;
                    status.slots = options.slots.or(far.slots).unwrap_or(USUAL_SLOTS);
                    status.context_length =
                        if far.context_length > 0 { far.context_length } else { found.context_length };
                    status.model = Some(found.name);
                    status.far = far;
                }
                ModelState::Ready
            }
            Err(NotReady::Loading) => ModelState::Loading,
            Err(NotReady::Failed(why)) => ModelState::Failed { why },
        };
        self.set_state(state);
    }

    /// Takes nothing new from now on. Returns when its answers have ended, at the latest after `limit`.
    pub(crate) async fn retire(&self, limit: Duration) {
        self.retiring.store(true, Ordering::Release);
        self.set_state(ModelState::Draining);
        let finished = async {
            // Answers end by themselves; there is no event for "all of them did".
            while self.meter.load() != Load::default() {
                tokio::time::sleep(FINISH_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(limit, finished).await;
    }

    fn set_state(&self, state: ModelState) {
        let goes = self.retiring.load(Ordering::Acquire) && state != ModelState::Unloaded;
        let state = if goes { ModelState::Draining } else { state };
        let changed = std::mem::replace(&mut self.status().state, state.clone()) != state;
        if changed {
            tracing::info!(endpoint = %self.options.url, state = state.words(), "an endpoint changed");
            self.state.send_replace(state);
            self.workers.note_change();
        }
    }

    /// Who answers, where it is ready.
    fn ready_model(&self) -> Result<(String, u32, FarSide), ModelState> {
        let status = self.status();
        match (&status.state, &status.model) {
            (ModelState::Ready, Some(model)) => Ok((model.clone(), status.context_length, status.far.clone())),
            (state, _) => Err(state.clone()),
        }
    }

    fn start(&self, request: &Request) -> Result<mpsc::Receiver<Answer>, Refused> {
        let not_now = |kind, message, wait| Refused { kind, message, param: None, retry_after_ms: Some(wait) };
        let (model, context_length, far) = self.ready_model().map_err(|state| {
            let message = format!("the model `{}` is not ready: {}", request.model, state.words());
            not_now(RefusalKind::Loading, message, 1_000)
        })?;
        let embed = request.embed.as_ref();
        if embed.is_some() != self.options.embeds {
            let does = if self.options.embeds { "embeds and does not chat" } else { "chats and does not embed" };
            let message = format!("`{}` {does}, as it was registered", request.model);
            let kind = RefusalKind::UnsupportedField;
            return Err(Refused { kind, message, param: Some("model".into()), retry_after_ms: None });
        }
        let url = &self.options.url;
        let now = Instant::now();
        if let Some(pause) = self.gate.pause(now) {
            let wait = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            let message =
                format!("the endpoint {url} has no room and asks to be left alone for {} s", wait.div_ceil(1_000));
            return Err(not_now(RefusalKind::Busy, message, wait));
        }
        let (texts, tokens) = embed.map_or((0, 0), Embed::lengths);
        let bytes = texts + request.messages.iter().map(|message| message.content.len()).sum::<usize>();
        let prompt_tokens = u32::try_from(bytes / BYTES_PER_TOKEN + tokens).unwrap_or(u32::MAX);
        let said = u32::try_from(request.resume.len()).unwrap_or(u32::MAX);
        if said > 0 && request.sampling.max_tokens.is_some_and(|most| said >= most) {
            return Ok(said_all(prompt_tokens, said, context_length));
        }
        let (route, body) = match embed {
            Some(embed) => ("v1/embeddings", embed::body(request, embed, &model)?),
            None => ("v1/chat/completions", request::body(request, &model, &far)?),
        };
        let place = self.meter.begin(MOST_REQUESTS, prompt_tokens, now).ok_or_else(|| {
            not_now(RefusalKind::Busy, format!("{MOST_REQUESTS} requests are at the endpoint {url}"), 1_000)
        })?;
        // One more for the last word to a reader that reads too slowly.
        let (answers, reader) = mpsc::channel(ANSWER_BUFFER + 1);
        let request_there = self.client.post(url.route(route));
        let exchange = Exchange {
            request: request_there.headers(self.headers.clone()).body(body),
            endpoint: url.host_and_port(),
            key: self.options.key.clone(),
            deadline: now + Duration::from_millis(request.remaining_ms).min(FAR),
            patience: Patience { first_token: self.options.first_token_timeout, silence: self.options.silence_timeout },
            place,
            gate: self.gate.clone(),
            workers: self.workers.clone(),
            context_length,
            embeddings: embed.map(|embed| embed.inputs.len()),
            behind: Behind::of(request),
            trouble: self.trouble.clone(),
        };
        let (status, generation) = (self.status.clone(), self.status().generation);
        let running = async move {
            if exchange.run(answers).await == Ended::Broken {
                let mut status = status.lock().unwrap_or_else(PoisonError::into_inner);
                if status.generation == generation {
                    status.broke = Some(Instant::now());
                }
            }
        };
        tokio::spawn(running.in_current_span());
        Ok(reader)
    }
}

/// An answer that has all the tokens that it may have, and lacks its end only.
fn said_all(prompt_tokens: u32, said: u32, context_length: u32) -> mpsc::Receiver<Answer> {
    let (answers, reader) = mpsc::channel(2);
    let load = Load::default();
    let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens: said };
    // The channel is new and has room for two.
    let _ = answers.try_send(Answer::Accepted(Accepted { prompt_tokens, cached_tokens: 0, context_length, load }));
    let finished = Finished { reason: FinishReason::Length, usage, load, extra: Vec::new() };
    let _ = answers.try_send(Answer::Finished(finished));
    reader
}

/// A deadline further away than this is none.
const FAR: Duration = Duration::from_secs(30 * 24 * 3_600);

impl Worker for EndpointWorker {
    fn facts(&self, own: NodeId) -> ModelFacts {
        let backend = self.backend();
        let status = self.status();
        // Fields that we have no name for reach it as they are.
        let mut features = features(self.options.embeds);
        if status.far.program.continues().is_some() {
            features.push(RESUMES_TEXT.into());
        }
        ModelFacts {
            name: self.name_in(&status),
            digest: self
                .options
                .sha256
                .or_else(|| status.model.as_deref().map(|model| digest(model, self.options.embeds))),
            state: status.state.clone(),
            engine: matches!(status.state, ModelState::Ready | ModelState::Draining).then_some(EngineId {
                node: own,
                index: self.index,
                generation: status.generation,
            }),
            backend,
            numerics: format!("{ENDPOINT_NUMERICS}{}", self.options.url.host_and_port()),
            context_length: status.context_length,
            slots: self.slots(&status),
            features,
            is_default: self.options.is_default,
        }
    }

    fn pulse(&self, own: NodeId) -> Option<EnginePulse> {
        let generation = self.status().generation;
        let engine = EngineId { node: own, index: self.index, generation };
        (generation > 0).then(|| self.meter.pulse(engine, Instant::now()))
    }

    fn is_doubtful(&self) -> bool {
        self.status().broke.is_some_and(|broke| broke.elapsed() < DOUBT)
    }

    fn submit(&self, request: Request) -> BoxFuture<'_, mpsc::Receiver<Answer>> {
        let reader = self.start(&request).unwrap_or_else(only_refusal);
        std::future::ready(reader).boxed()
    }
}

/// What an endpoint honours, by what its model is for.
pub(crate) fn features(embeds: bool) -> Vec<String> {
    let kinds = if embeds { &["extra", EMBEDDINGS][..] } else { &["extra"] };
    kinds.iter().map(|kind| (*kind).to_owned()).collect()
}

/// The name here of a model that has none but the one there. llama.cpp calls a model by the path of its file.
fn name_of(model: &str) -> String {
    if model.ends_with(".gguf") { model_name(Path::new(model)) } else { model.to_owned() }
}

/// Stands for the content of a model that we do not see: two endpoints with the same model count as the same.
fn digest(model: &str, embeds: bool) -> ModelDigest {
    let kind = if embeds { "embedding model" } else { "model" };
    ModelDigest(Sha256::digest(format!("endpoint {kind} {model}")).into())
}
