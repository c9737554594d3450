//! Who could answer, and who is asked: offers of the cluster into candidates, and the reasons of those left out.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::admission::Limits;
use ingle_protocol::liveness::Health;
use ingle_protocol::names::near;
use ingle_protocol::routing::{Candidate, Demand, assume_unmeasured, pick};
use ingle_protocol::wire::v2::{ModelFacts, ModelState, RESUMES_TEXT};
use ingle_protocol::{EngineId, ModelDigest};

use super::admission::AdmissionOptions;
use super::engines::{Engine, Engines};
use super::journal::Considered;
use super::offers::{Offer, default_name};
use super::{DEFAULT_MODEL, GatewayError};
use crate::registry::ModelRegistry;

/// What a client is told to wait where nobody knows better.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// An engine that ended is known to have ended so soon, on other nodes too.
const NEWS: Duration = Duration::from_secs(2);
/// Rates assumed where none was measured, for the size of the queue in front of the workers.
const UNMEASURED_RATE: f32 = 10.0;

/// What a request asks of the workers.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub digest: ModelDigest,
    pub demand: Demand,
    /// See [`ingle_protocol::prefix::beginnings`].
    pub beginnings: Vec<(u64, u32)>,
    /// Bytes that become a token, as last observed.
    pub bytes_per_token: f32,
    /// Numbers are asked for, not an answer in words.
    pub embeds: bool,
}

/// What an answer that was begun asks of the worker that goes on with it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Begun {
    /// Not all of its tokens are known: some came from a far server, which passes texts on.
    pub without_ids: bool,
    /// Whether a far server has it now.
    pub at_endpoint: bool,
    /// The request has fields that only some workers know.
    pub has_extra: bool,
}

impl Begun {
    /// Why a worker cannot go on with it.
    fn objection(self, facts: &ModelFacts) -> Option<&'static str> {
        let takes_text = facts.features.iter().any(|feature| feature == RESUMES_TEXT);
        if (facts.is_endpoint() || self.without_ids) && !takes_text {
            return Some(match facts.is_endpoint() {
                true => "its server is not known to go on with an answer that was begun elsewhere",
                false => "it goes on from tokens only, and of this answer only the text is known",
            });
        }
        // Tools, for one: whoever began it has said how calls are written.
        let differs = self.has_extra && self.at_endpoint != facts.is_endpoint();
        differs.then_some("it reads fields of this request in another way than the worker that began the answer")
    }
}

/// The name that a request means.
pub(super) fn resolve(offers: &[Offer], registry: &ModelRegistry, asked: &str) -> Result<String, GatewayError> {
    let asked = asked.trim();
    let name = match asked.is_empty() || asked == DEFAULT_MODEL {
        true => default_name(offers, &registry.default_route()),
        false => Some(asked.to_owned()),
    };
    let Some(name) = name else {
        let why = match offers.first() {
            None => {
                "No machine of this cluster has a model yet. Start one with `ingle up` where there is memory for it."
                    .into()
            }
            Some(offer) => {
                format!("This cluster has no default model. Ask for one by name, like `{}`.", offer.facts.name)
            }
        };
        return Err(GatewayError::NoWorker { why, retry_after: RETRY_AFTER * 5 });
    };
    if offers.iter().any(|offer| offer.facts.name == name) {
        return Ok(name);
    }
    let mut known = registry.names();
    if known.contains(&name) {
        let why = format!("The model `{name}` is registered, but no machine has it loaded now.");
        return Err(GatewayError::NoWorker { why, retry_after: RETRY_AFTER * 5 });
    }
    if asked != name {
        let why =
            format!("The default model `{name}` is on no machine now: choose another with `ingle models set-default`.");
        return Err(GatewayError::NoWorker { why, retry_after: RETRY_AFTER * 5 });
    }
    known.extend(offers.iter().map(|offer| offer.facts.name.clone()));
    let near = near(&name, known.iter().map(String::as_str)).into_iter().map(str::to_owned).collect();
    known.sort_unstable();
    known.dedup();
    Err(GatewayError::UnknownModel { model: name, near, known })
}

/// The content that a name stands for. While a model is being replaced there can be two: this node's goes first, then
/// the one that can answer.
pub(super) fn digest_of(offers: &[Offer], name: &str) -> Option<ModelDigest> {
    offers
        .iter()
        .filter(|offer| offer.facts.name == name && offer.facts.digest.is_some())
        .map(|offer| (!offer.can_answer(), !offer.local, offer.facts.digest))
        .min()
        .and_then(|(_, _, digest)| digest)
}

/// Why nobody goes on with an answer that was begun.
pub(super) fn nobody_goes_on(offers: &[Offer], wanted: &Wanted, begun: Begun, avoid: &[EngineId]) -> String {
    let others = offers.iter().filter(|offer| offer.facts.digest == Some(wanted.digest));
    let others = others.filter(|offer| offer.facts.engine.is_none_or(|engine| !avoid.contains(&engine)));
    let reasons: Vec<String> = others
        .map(|offer| match begun.objection(&offer.facts) {
            Some(why) => format!("{}: {why}", offer.node_name),
            None => offer.in_words(),
        })
        .collect();
    match reasons.as_slice() {
        [] => "no other worker has this model".into(),
        reasons => reasons.join("; "),
    }
}

/// Nobody can answer now.
pub(super) fn nobody(offers: &[Offer], engines: &Engines, name: &str, now: Duration) -> GatewayError {
    let states: Vec<String> = offers
        .iter()
        .filter(|offer| offer.facts.name == name)
        .map(|offer| match trouble(offer, engines, now) {
            Some(why) if offer.can_answer() => format!("{}: {why}", offer.node_name),
            _ => offer.in_words(),
        })
        .collect();
    let why = format!("The model `{name}` cannot answer now: {}.", states.join("; "));
    GatewayError::NoWorker { why, retry_after: RETRY_AFTER }
}

fn trouble(offer: &Offer, engines: &Engines, now: Duration) -> Option<String> {
    if offer.facts.is_endpoint() && offer.facts.slots == 0 && offer.can_answer() {
        return Some("its server has no room and asks to be left alone for a while".into());
    }
    let engine = engines.of(offer.facts.engine?);
    match engine.suspicion() {
        Some(why) => Some(why),
        None if engine.is_allowed(now) => None,
        None => Some("it failed several times in a row and is left alone for a while".into()),
    }
}

/// Somebody who cannot answer now may well in a moment: an engine that starts again or is under suspicion. One that was
/// asked and broke may be another one soon, which is known only `NEWS` later; a far server stays the one that it is.
pub(super) fn is_hope(
    offers: &[Offer],
    digest: ModelDigest,
    begun: Option<Begun>,
    avoid: &[EngineId],
    waited: Duration,
) -> bool {
    let able = |offer: &&Offer| begun.and_then(|begun| begun.objection(&offer.facts)).is_none();
    offers.iter().filter(|offer| offer.facts.digest == Some(digest)).filter(able).any(|offer| {
        let reachable = offer.local || matches!(offer.health, Health::Alive | Health::Suspect { .. });
        let was_asked = offer.facts.engine.is_some_and(|engine| avoid.contains(&engine));
        reachable
            && match offer.facts.state {
                ModelState::Ready => !was_asked || (waited < NEWS && !offer.facts.is_endpoint()),
                ModelState::Loading | ModelState::Warming => true,
                _ => false,
            }
    })
}

/// One choice: whom, at what engine, and who was considered.
pub(super) struct Choice<'a> {
    pub offer: &'a Offer,
    pub id: EngineId,
    pub engine: Arc<Engine>,
    pub cached_tokens: u32,
    pub considered: Vec<Considered>,
}

/// Chooses among all who have the content, and can go on with it where the answer has begun. Engines in `avoid` are not asked again; their nodes only where nobody else
/// is left (an engine that was started again is another engine).
pub(super) fn choose<'a>(
    offers: &'a [Offer],
    engines: &Engines,
    wanted: &Wanted,
    begun: Option<Begun>,
    avoid: &[EngineId],
    now: Duration,
) -> Option<Choice<'a>> {
    let mut able: Vec<(&Offer, EngineId, Arc<Engine>)> = Vec::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut considered: Vec<Considered> = Vec::new();
    for offer in offers.iter().filter(|offer| offer.facts.digest == Some(wanted.digest)) {
        let left_out = |why: String| Considered {
            node: offer.node_name.clone(),
            estimate: None,
            left_out: Some(why),
            in_flight: 0,
            running: 0,
            waiting: 0,
            slots: offer.facts.slots,
            cached_tokens: 0,
            prefill_rate: 0.0,
            decode_rate: 0.0,
        };
        let id = match offer.facts.engine {
            Some(id) if offer.can_answer() => id,
            _ => {
                considered.push(left_out(offer.in_words()));
                continue;
            }
        };
        // Two models of one name can be of different types.
        if offer.facts.embeds() != wanted.embeds {
            considered.push(left_out(if wanted.embeds { "it does not embed" } else { "it does not chat" }.into()));
            continue;
        }
        if wanted.embeds && offer.is_too_old_to_embed() {
            considered.push(left_out("its node is too old to be asked for embeddings".into()));
            continue;
        }
        if avoid.contains(&id) {
            considered.push(left_out("it was asked before".into()));
            continue;
        }
        if let Some(why) = begun.and_then(|begun| begun.objection(&offer.facts)) {
            considered.push(left_out(why.into()));
            continue;
        }
        if let Some(why) = trouble(offer, engines, now) {
            considered.push(left_out(why));
            continue;
        }
        let engine = engines.of(id);
        candidates.push(candidate(offer, id, &engine, wanted));
        able.push((offer, id, engine));
    }
    assume_unmeasured(&mut candidates);
    considered.extend(able.iter().zip(&candidates).map(|((offer, _, engine), candidate)| Considered {
        node: offer.node_name.clone(),
        estimate: Some(candidate.estimate(wanted.demand)),
        left_out: None,
        in_flight: engine.in_flight(),
        running: offer.pulse.map_or(0, |pulse| pulse.load.running),
        waiting: offer.pulse.map_or(0, |pulse| pulse.load.waiting),
        slots: candidate.slots,
        cached_tokens: candidate.cached_tokens,
        prefill_rate: candidate.prefill_rate,
        decode_rate: candidate.decode_rate,
    }));
    let nodes: Vec<_> = avoid.iter().map(|engine| engine.node).collect();
    let random = rand::random();
    let index =
        pick(&candidates, &nodes, wanted.demand, random).or_else(|| pick(&candidates, &[], wanted.demand, random))?;
    let cached_tokens = candidates[index].cached_tokens;
    let (offer, id, engine) = able.swap_remove(index);
    Some(Choice { offer, id, engine, cached_tokens, considered })
}

fn candidate(offer: &Offer, id: EngineId, engine: &Engine, wanted: &Wanted) -> Candidate {
    let pulse = offer.pulse;
    let load = pulse.map(|pulse| pulse.load).unwrap_or_default();
    let rate = |of: fn(&ingle_protocol::wire::v2::EnginePulse) -> f32| pulse.as_ref().map_or(0.0, of);
    let cached = engine.known_bytes(&wanted.beginnings) as f32 / wanted.bytes_per_token;
    let others = engine.of_others(load.running.saturating_add(load.waiting));
    // A far server reads several prompts at once, and its speed of reading is the whole time to its first token as seen
    // from here: neither a backlog nor a cache of which nothing is known shortens or lengthens that.
    let (backlog_tokens, cached) = match offer.facts.is_endpoint() {
        true => (0, 0.0),
        false => (load.backlog_tokens.max(engine.unread()), cached),
    };
    Candidate {
        engine: id,
        local: offer.local,
        in_flight: engine.in_flight().saturating_add(others),
        running: 0,
        waiting: 0,
        slots: offer.facts.slots,
        backlog_tokens,
        cached_tokens: (cached as u32).min(wanted.demand.prompt_tokens),
        prefill_rate: rate(|pulse| pulse.prefill_rate),
        decode_rate: rate(|pulse| pulse.decode_rate),
        full_decode_rate: rate(|pulse| pulse.full_decode_rate),
        ready_in: Duration::ZERO,
    }
}

/// What the workers of a model can take together.
pub(super) fn limits(offers: &[Offer], name: &str, options: &AdmissionOptions) -> Limits {
    let (mut in_flight, mut tokens, mut rate) = (0u32, 0u64, 0f64);
    let named = || offers.iter().filter(|offer| offer.facts.name == name);
    // Who waits at the door when its model goes is let through, to have it loaded again.
    let is_cold = !named().any(Offer::can_answer);
    for offer in named().filter(|offer| offer.can_answer() || (is_cold && offer.local)) {
        let slots = offer.facts.slots.max(1);
        // A few more than there are slots, so that no slot is empty while the next request is on its way.
        in_flight = in_flight.saturating_add(slots + (slots / 4).max(1));
        tokens = tokens.saturating_add(u64::from(slots) * u64::from(offer.facts.context_length.max(4_096)));
        if offer.facts.embeds() {
            // All it does is read, and its requests share one pass after the other.
            let read = offer.pulse.map_or(0.0, |pulse| pulse.prefill_rate);
            rate += f64::from(read.max(UNMEASURED_RATE));
            continue;
        }
        let (full, alone) = offer.pulse.map_or((0.0, 0.0), |pulse| (pulse.full_decode_rate, pulse.decode_rate));
        let each = [full, alone, UNMEASURED_RATE].into_iter().find(|rate| *rate > 0.0).unwrap_or(UNMEASURED_RATE);
        rate += f64::from(each) * f64::from(slots);
    }
    Limits {
        in_flight,
        in_flight_tokens: tokens,
        queued_tokens: (rate * options.queue_time.as_secs_f64()) as u64,
        queued: options.queued,
        tokens_per_second: rate,
        quota_per_minute: options.quota_per_minute,
    }
}

/// What was learnt of a model's requests at this gateway.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usual {
    pub answer_tokens: f32,
    pub bytes_per_token: f32,
}

impl Default for Usual {
    /// Four bytes a token is the usual estimate for English.
    fn default() -> Self {
        Self { answer_tokens: 256.0, bytes_per_token: 4.0 }
    }
}

/// How much a new observation counts against all earlier ones.
const WEIGHT: f32 = 0.1;
/// Models whose habits are remembered.
const MOST_MODELS: usize = 256;

impl Usual {
    /// An answer ended.
    pub fn observe(list: &mut HashMap<String, Self>, model: &str, answer_tokens: u32, bytes: u32, prompt_tokens: u32) {
        if list.len() >= MOST_MODELS && !list.contains_key(model) {
            return;
        }
        let usual = list.entry(model.to_owned()).or_default();
        usual.answer_tokens += WEIGHT * (answer_tokens as f32 - usual.answer_tokens);
        if prompt_tokens > 0 && bytes > 0 {
            let measured = (bytes as f32 / prompt_tokens as f32).clamp(0.25, 16.0);
            usual.bytes_per_token += WEIGHT * (measured - usual.bytes_per_token);
        }
    }
}
