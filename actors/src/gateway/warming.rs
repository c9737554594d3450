//! Requests for a model that nobody can answer for yet: they have it loaded, and wait for that.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::liveness::Health;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{ModelState, RefusalKind, Request};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::GatewayError;
use super::choice::{self, Wanted};
use super::offers::Offer;
use super::router::Router;
use crate::cluster::submit_remote;

/// How often it is looked again; what happens on this node is seen at once.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long another node's model takes to get ready, as far as is known here.
const ELSEWHERE: Duration = Duration::from_secs(5);
/// How often another node is asked to load a model.
const KNOCK_AGAIN: Duration = Duration::from_secs(3);
/// How long it may take to say that it does.
const KNOCK_DEADLINE: Duration = Duration::from_secs(5);
/// How long another node may take to begin to load a model: one that is being drained does not.
const PATIENCE: Duration = Duration::from_secs(15);
/// Models whose loading elsewhere was asked for, that are remembered.
const MOST_KNOCKS: usize = 256;

/// Who waits for models to be loaded.
#[derive(Debug)]
pub(super) struct Warming {
    /// Requests that may wait.
    places: Semaphore,
    knocked: Mutex<HashMap<String, Instant>>,
}

impl Warming {
    pub fn new(most: u32) -> Self {
        Self { places: Semaphore::new(most as usize), knocked: Mutex::default() }
    }

    /// Nobody has asked lately; whoever gets true does.
    fn may_knock(&self, model: &str) -> bool {
        let mut knocked = self.knocked.lock().unwrap_or_else(PoisonError::into_inner);
        knocked.retain(|_, at| at.elapsed() < KNOCK_AGAIN);
        let may = !knocked.contains_key(model) && knocked.len() < MOST_KNOCKS;
        if may {
            knocked.insert(model.to_owned(), Instant::now());
        }
        may
    }
}

fn is_coming(state: &ModelState) -> bool {
    matches!(state, ModelState::Fetching { .. } | ModelState::Verifying | ModelState::Loading | ModelState::Warming)
}

/// It is loaded when somebody asks for it.
fn is_loadable(state: &ModelState) -> bool {
    matches!(state, ModelState::Absent | ModelState::Unloaded | ModelState::Draining)
}

/// Nobody can answer for the model now.
pub(super) fn is_cold(offers: &[Offer], name: &str) -> bool {
    !offers.iter().any(|offer| offer.facts.name == name && offer.can_answer())
}

impl Router {
    /// How long until somebody will probably answer for the model; `None` where waiting is of no use. A model of this
    /// node is loaded for it.
    pub fn coming(&self, offers: &[Offer], name: &str) -> Option<Duration> {
        self.here(offers, name).into_iter().chain(Self::elsewhere(offers, name)).min()
    }

    /// As [`Self::coming`], elsewhere.
    fn elsewhere(offers: &[Offer], name: &str) -> Option<Duration> {
        let others = offers.iter().filter(|offer| offer.facts.name == name && !offer.local);
        let others = others.filter(|offer| offer.health == Health::Alive && offer.link.is_some());
        others.filter(|offer| is_coming(&offer.facts.state) || is_loadable(&offer.facts.state)).map(|_| ELSEWHERE).min()
    }

    /// As [`Self::coming`], on this node.
    fn here(&self, offers: &[Offer], name: &str) -> Option<Duration> {
        // Where another node is at it already, it is not loaded here as well.
        let is_under_way = offers.iter().any(|offer| {
            offer.facts.name == name && !offer.local && offer.health == Health::Alive && is_coming(&offer.facts.state)
        });
        let is_here = offers.iter().any(|offer| offer.local && offer.facts.name == name);
        (is_here && !is_under_way).then(|| self.workers.want(name)).flatten()
    }

    /// Returns what is offered when somebody can answer for the model. Past the deadline, or where that will be before
    /// the model is there, the error says when it will be.
    pub async fn warm_up(&self, request: &Request, deadline: Instant) -> Result<Vec<Offer>, GatewayError> {
        let name = request.model.as_str();
        let offers = self.offers();
        if !is_cold(&offers, name) {
            return Ok(offers);
        }
        let later = |why: String, retry_after: Duration| GatewayError::Loading { why, retry_after };
        let Ok(_place) = self.warming.places.try_acquire() else {
            let eta = self.coming(&offers, name).unwrap_or(ELSEWHERE);
            let why = format!("As many requests wait for `{name}` and others to be loaded as may wait here.");
            return Err(later(why, eta));
        };
        let mut changes = self.workers.changes();
        let mut under_way = Instant::now();
        loop {
            changes.mark_unchanged();
            let offers = self.offers();
            if !is_cold(&offers, name) {
                return Ok(offers);
            }
            let now = Instant::now();
            let here = self.here(&offers, name);
            let mut named = offers.iter().filter(|offer| offer.facts.name == name);
            if here.is_some() || named.any(|offer| is_coming(&offer.facts.state)) {
                under_way = now;
            }
            let coming = here.into_iter().chain(Self::elsewhere(&offers, name)).min();
            let Some(eta) = coming.filter(|_| now.duration_since(under_way) < PATIENCE) else {
                return Err(choice::nobody(&offers, &self.engines, name, self.now()));
            };
            if now + eta > deadline {
                let states: Vec<String> =
                    offers.iter().filter(|offer| offer.facts.name == name).map(Offer::in_words).collect();
                let why = format!(
                    "The model `{name}` is being loaded and will be there in about {} s, which is later than this \
                     request can wait: {}. Try again then.",
                    eta.as_secs().max(1),
                    states.join("; ")
                );
                return Err(later(why, eta));
            }
            if here.is_none() {
                self.knock(request, &offers).await;
            }
            // A change is seen at once; other nodes' news has no event.
            let _ = timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }

    /// Has another node load the model, where none is at it: the request itself is what makes it do so.
    async fn knock(&self, request: &Request, offers: &[Offer]) {
        let name = request.model.as_str();
        let named = || offers.iter().filter(|offer| offer.facts.name == name);
        if named().any(|offer| is_coming(&offer.facts.state)) {
            return;
        }
        let loadable =
            |offer: &&Offer| !offer.local && is_loadable(&offer.facts.state) && offer.health == Health::Alive;
        let Some((offer, link)) = named().filter(loadable).find_map(|offer| Some((offer, offer.link.as_ref()?))) else {
            return;
        };
        if !self.warming.may_knock(name) {
            return;
        }
        let mut knock = request.clone();
        knock.digest = offer.facts.digest.unwrap_or_default();
        knock.remaining_ms = u64::try_from(KNOCK_DEADLINE.as_millis()).unwrap_or(u64::MAX);
        knock.sampling.max_tokens = Some(1);
        let asking = async {
            match submit_remote(link, &knock).await {
                Ok(mut answers) => answers.recv().await,
                Err(refused) => Some(Answer::Refused(refused)),
            }
        };
        // Whatever it says, what counts is what it then does: that is seen in its facts.
        match timeout(KNOCK_DEADLINE, asking).await {
            Ok(Some(Answer::Refused(refused))) if refused.kind == RefusalKind::Loading => {
                tracing::info!(model = name, node = offer.node_name, "another node loads a model for a request");
            }
            other => tracing::debug!(model = name, node = offer.node_name, ?other, "asked to load a model"),
        }
    }

    /// The model may be another version than when the request came, where nobody answers for that one any more.
    pub fn follow_name(&self, request: &mut Request, wanted: &mut Wanted, offers: &[Offer]) {
        let answers = |offer: &Offer| offer.facts.digest == Some(wanted.digest) && offer.can_answer();
        if offers.iter().any(answers) {
            return;
        }
        if let Some(now) = self.wanted(request, offers)
            && now.digest != wanted.digest
        {
            tracing::info!(model = request.model, "the request goes to another version of its model");
            request.digest = now.digest;
            *wanted = now;
        }
    }
}
