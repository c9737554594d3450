//! What a model is for: a conversation goes to one that writes, a text that shall become numbers to one that embeds.

use std::collections::BTreeSet;
use std::time::Duration;

use ingle_protocol::registry::ModelType;

use super::offers::{Offer, default_name};
use super::router::Router;
use super::{DEFAULT_MODEL, GatewayError, choice};
use crate::registry::ModelRegistry;

/// When a machine may have been updated.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What the model of this name does, as far as it is known: what a node says of a model that it has loaded counts more
/// than what somebody registered.
pub(super) fn kind_of(offers: &[Offer], registry: &ModelRegistry, name: &str) -> Option<ModelType> {
    let known: Vec<ModelType> =
        offers.iter().filter(|offer| offer.facts.name == name).filter_map(|offer| offer.facts.kind()).collect();
    let embeds = known.contains(&ModelType::Embedding);
    let said = if embeds { Some(ModelType::Embedding) } else { known.first().copied() };
    said.or_else(|| registry.model(name).map(|record| record.kind()))
}

/// All who could answer are too old to be asked.
fn is_beyond_reach(offers: &[Offer], name: &str) -> bool {
    let mut able = offers.iter().filter(|offer| offer.facts.name == name && offer.can_answer()).peekable();
    able.peek().is_some() && able.all(Offer::is_too_old_to_embed)
}

fn wrong(why: String) -> GatewayError {
    GatewayError::WrongModel { why }
}

impl Router {
    /// The name that a request means. Of embedding models the default one counts where it is one, else the only one.
    pub fn resolve(&self, offers: &[Offer], asked: &str, embeds: bool) -> Result<String, GatewayError> {
        let asked = asked.trim();
        if !embeds || !(asked.is_empty() || asked == DEFAULT_MODEL) {
            return choice::resolve(offers, &self.registry, asked);
        }
        let is_embedding = |name: &str| kind_of(offers, &self.registry, name) == Some(ModelType::Embedding);
        if let Some(name) = default_name(offers, &self.registry.default_route()).filter(|name| is_embedding(name)) {
            return choice::resolve(offers, &self.registry, &name);
        }
        let offered: BTreeSet<&str> = offers.iter().map(|offer| offer.facts.name.as_str()).collect();
        let offered: Vec<&str> = offered.into_iter().filter(|name| is_embedding(name)).collect();
        match offered.as_slice() {
            [] => Err(wrong(
                "This cluster has no embedding model: load one with `ingle models load FILE.gguf`, and `ingle models ls` \
                 shows it with the type embedding."
                    .into(),
            )),
            [only] => Ok((*only).to_owned()),
            several => Err(wrong(format!(
                "This cluster has several embedding models and none of them is the default: say which, as `{}`.",
                several.join("` or `")
            ))),
        }
    }

    /// Refuses what the model is not for. Of one that was never loaded here it may not be known: its engine says it.
    pub fn check_purpose(&self, offers: &[Offer], name: &str, embeds: bool) -> Result<(), GatewayError> {
        match (kind_of(offers, &self.registry, name), embeds) {
            (Some(ModelType::Embedding), false) => Err(wrong(format!(
                "`{name}` is an embedding model: it turns texts into numbers (/v1/embeddings) and does not chat."
            ))),
            (Some(kind), true) if kind != ModelType::Embedding => Err(wrong(format!(
                "`{name}` is no embedding model (its type is {}): ask one that is, as `ingle models ls` shows.",
                kind.as_str()
            ))),
            (_, true) if is_beyond_reach(offers, name) => Err(GatewayError::NoWorker {
                why: format!(
                    "The model `{name}` is only on machines whose Ingle is too old to be asked for embeddings from here: \
                     update it there, or ask them."
                ),
                retry_after: RETRY_AFTER,
            }),
            _ => Ok(()),
        }
    }
}
