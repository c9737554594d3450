//! `GET /admin/models`: all models with their states on all nodes, also those that cannot answer and those that are
//! registered and that nobody has loaded, with what this node knows of its own.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use ingle_actors::gateway::OfferedModel;
use ingle_actors::registry::{Overruled, RegistryStatus, ShownModel};
use ingle_actors::worker::manager::SeenModel;
use serde::Serialize;

use super::App;
use super::openai::{ApiError, ok};

#[derive(Serialize)]
struct AllModels {
    /// The model that was chosen as the default one, if one was.
    default: Option<String>,
    /// What was chosen at the same time and does not hold.
    default_overruled: Vec<Overruled>,
    models: Vec<Model>,
    /// What this node has or knows, loaded or not.
    here: Vec<SeenModel>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Model {
    /// Request fields beyond the common ones that its engine honours.
    features: Vec<String>,
    /// The best state among the nodes.
    state: String,
    /// Names of the nodes that answer for it now.
    answers: Vec<String>,
    context_length: u32,
    /// What the registry says of it, and its states on all nodes.
    #[serde(flatten)]
    shown: ShownModel,
}

/// Each model once, the default one first.
fn models(shown: Vec<ShownModel>, offered: &[OfferedModel]) -> Vec<Model> {
    let model = |mut shown: ShownModel| {
        let offer = offered.iter().find(|offer| offer.name == shown.name);
        shown.kind = shown.kind.or(offer.and_then(|offer| offer.kind));
        let features = offer.map(|offer| offer.features.clone()).unwrap_or_default();
        // Nobody offers what is only registered.
        let state = offer.map_or_else(|| "absent".to_owned(), |offer| offer.state.words());
        let answers = offer.map(|offer| offer.nodes.clone()).unwrap_or_default();
        Model { features, state, answers, context_length: offer.map_or(0, |offer| offer.context_length), shown }
    };
    shown.into_iter().map(model).collect()
}

/// `GET /admin/models`.
pub async fn list(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let shown = app.node.registry_status();
    let RegistryStatus { default, default_overruled, models: shown } =
        shown.map_err(|why| ApiError::unavailable("changing_cluster", why, None))?;
    let models = models(shown, &app.node.models());
    Ok(ok(AllModels { default, default_overruled, models, here: app.node.loaded() }))
}
