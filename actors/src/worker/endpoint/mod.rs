//! An endpoint: a model that an OpenAI-compatible server elsewhere (Ollama, llama.cpp, vLLM, LM Studio …) answers for.
//! Requests are passed on to it, and its answer comes back as our frames. The only place below `node` that knows a
//! JSON dialect.

mod address;
mod chunk;
mod embed;
mod errors;
mod exchange;
mod health;
mod meter;
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
    EMBEDDINGS, ENDPOINT_NUMERICS, Embed, EnginePulse, Load, ModelFacts, ModelState, RefusalKind, Refused, Request,
};
use ingle_protocol::{EngineId, ModelDigest, NodeId};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

pub use address::{EndpointUrl, EndpointUrlError, Secret};

use self::exchange::{Exchange, Patience};
use self::health::NotReady;
use self::meter::Meter;
use super::{ANSWER_BUFFER, Worker, Workers, only_refusal};
use crate::models::{ClientError, model_name};

/// Requests that may be at one endpoint; most of them wait there.
const MOST_REQUESTS: u32 = 1_024;
/// Places of an endpoint that does not say how many it has.
const USUAL_SLOTS: u32 = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Servers close idle connections after five seconds or more; who is earlier never writes into one that is closing.
const IDLE_LIMIT: Duration = Duration::from_secs(4);
/// How often a good endpoint is asked how it is, and how soon a bad one, which waits twice as long each time.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// How often one that is to go is looked at, whether its answers have ended.
const FINISH_LOOK: Duration = Duration::from_millis(20);
/// A tokenizer is not here; four bytes a token is the usual estimate for English.
const BYTES_PER_TOKEN: usize = 4;

/// An endpoint as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointOptions {
    /// Where it is.
    pub url: EndpointUrl,
    /// The model's name there; `None` takes the only one that there is.
    pub model: Option<String>,
    /// The model's name here; `None` is the far side's.
    pub name: Option<String>,
    /// Sent as a bearer token.
    pub key: Option<Secret>,
    /// Answers that it writes at once; `None` asks it.
    pub slots: Option<u32>,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// Its model turns texts into numbers, and does not chat.
    pub embeds: bool,
    /// How long it may be silent until the first token.
    pub first_token_timeout: Duration,
    /// How long it may be silent between two pieces of an answer.
    pub silence_timeout: Duration,
}

impl EndpointOptions {
    /// The usual [`Self::first_token_timeout`]: slow machines read long prompts for minutes, and say nothing.
    pub const FIRST_TOKEN_TIMEOUT: Duration = Duration::from_secs(300);
    /// The usual [`Self::silence_timeout`]: some servers hold a tool call back until it is complete.
    pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
}

#[derive(Debug, Clone)]
struct Status {
    state: ModelState,
    /// The model's name at the far side, once it is known.
    model: Option<String>,
    /// Counts how often it came to be ready.
    generation: u32,
    slots: u32,
    context_length: u32,
}

/// One endpoint.
#[derive(Debug)]
pub struct EndpointWorker {
    options: EndpointOptions,
    index: u16,
    client: reqwest::Client,
    headers: HeaderMap,
    meter: Arc<Meter>,
    workers: Arc<Workers>,
    status: Mutex<Status>,
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
        };
        Ok(Arc::new(Self {
            options,
            index,
            client,
            headers,
            meter: Arc::default(),
            workers,
            status: Mutex::new(status),
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

    /// What it is, in words.
    pub fn backend(&self) -> String {
        format!("endpoint ({})", self.options.url)
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
        tokio::select! {
            () = asking => {}
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
                    let (slots, context_length) = health::properties(client, &options.url, key).await;
                    let mut status = self.status();
                    status.generation += 1;
                    status.slots = options.slots.or(slots).unwrap_or(USUAL_SLOTS);
                    status.context_length = if context_length > 0 { context_length } else { found.context_length };
                    status.model = Some(found.name);
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
    fn ready_model(&self) -> Result<(String, u32), ModelState> {
        let status = self.status();
        match (&status.state, &status.model) {
            (ModelState::Ready, Some(model)) => Ok((model.clone(), status.context_length)),
            (state, _) => Err(state.clone()),
        }
    }

    fn start(&self, request: &Request) -> Result<mpsc::Receiver<Answer>, Refused> {
        let not_now = |kind, message| Refused { kind, message, param: None, retry_after_ms: Some(1_000) };
        let (model, context_length) = self.ready_model().map_err(|state| {
            let message = format!("the model `{}` is not ready: {}", request.model, state.words());
            not_now(RefusalKind::Loading, message)
        })?;
        let embed = request.embed.as_ref();
        if embed.is_some() != self.options.embeds {
            let does = if self.options.embeds { "embeds and does not chat" } else { "chats and does not embed" };
            let message = format!("`{}` {does}, as it was registered", request.model);
            let kind = RefusalKind::UnsupportedField;
            return Err(Refused { kind, message, param: Some("model".into()), retry_after_ms: None });
        }
        let (route, body) = match embed {
            Some(embed) => ("v1/embeddings", embed::body(request, embed, &model)?),
            None => ("v1/chat/completions", request::body(request, &model)?),
        };
        let now = Instant::now();
        let (texts, tokens) = embed.map_or((0, 0), Embed::lengths);
        let bytes = texts + request.messages.iter().map(|message| message.content.len()).sum::<usize>();
        let prompt_tokens = u32::try_from(bytes / BYTES_PER_TOKEN + tokens).unwrap_or(u32::MAX);
        let place = self.meter.begin(MOST_REQUESTS, prompt_tokens, now).ok_or_else(|| {
            not_now(RefusalKind::Busy, format!("{MOST_REQUESTS} requests are at the endpoint {}", self.options.url))
        })?;
        let url = self.options.url.route(route);
        // One more for the last word to a reader that reads too slowly.
        let (answers, reader) = mpsc::channel(ANSWER_BUFFER + 1);
        let exchange = Exchange {
            request: self.client.post(url).headers(self.headers.clone()).body(body),
            endpoint: self.options.url.host_and_port(),
            key: self.options.key.clone(),
            deadline: now + Duration::from_millis(request.remaining_ms).min(FAR),
            patience: Patience { first_token: self.options.first_token_timeout, silence: self.options.silence_timeout },
            place,
            context_length,
            embeddings: embed.map(|embed| embed.inputs.len()),
            trouble: self.trouble.clone(),
        };
        tokio::spawn(exchange.run(answers).in_current_span());
        Ok(reader)
    }
}

/// A deadline further away than this is none.
const FAR: Duration = Duration::from_secs(30 * 24 * 3_600);

/// A client that keeps its connections, follows nobody and has no limit for an answer as a whole.
fn client(url: &EndpointUrl) -> Result<reqwest::Client, ClientError> {
    // reqwest is built without a provider of its own. An error means that one is installed: just as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ingle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_LIMIT)
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none());
    if url.is_loopback() {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| ClientError::new(crate::models::in_words(&error)))
}

impl Worker for EndpointWorker {
    fn facts(&self, own: NodeId) -> ModelFacts {
        let status = self.status();
        ModelFacts {
            name: self.name_in(&status),
            digest: status.model.as_deref().map(|model| digest(model, self.options.embeds)),
            state: status.state.clone(),
            engine: matches!(status.state, ModelState::Ready | ModelState::Draining).then_some(EngineId {
                node: own,
                index: self.index,
                generation: status.generation,
            }),
            backend: self.backend(),
            numerics: format!("{ENDPOINT_NUMERICS}{}", self.options.url.host_and_port()),
            context_length: status.context_length,
            slots: status.slots,
            // Fields that we have no name for reach it as they are.
            features: features(self.options.embeds),
            is_default: self.options.is_default,
        }
    }

    fn pulse(&self, own: NodeId) -> Option<EnginePulse> {
        let generation = self.status().generation;
        let engine = EngineId { node: own, index: self.index, generation };
        (generation > 0).then(|| self.meter.pulse(engine, Instant::now()))
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
