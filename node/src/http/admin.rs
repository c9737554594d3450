//! `GET /admin/models`: all models, also those that cannot answer, with what this node knows of its own.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use ingle_actors::gateway::OfferedModel;
use ingle_actors::protocol::registry::ModelType;
use ingle_actors::worker::manager::SeenModel;
use serde::Serialize;

use super::App;
use super::openai::ok;

#[derive(Serialize)]
struct AllModels {
    /// What the cluster offers, ready or not.
    models: Vec<Model>,
    /// What this node has or knows, loaded or not.
    here: Vec<SeenModel>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    r#type: Option<ModelType>,
    features: Vec<String>,
    state: String,
    nodes: Vec<String>,
    context_length: u32,
    is_default: bool,
}

impl From<OfferedModel> for Model {
    fn from(model: OfferedModel) -> Self {
        let OfferedModel { name, kind, features, state, nodes, context_length, is_default, .. } = model;
        Self { name, r#type: kind, features, state: state.words(), nodes, context_length, is_default }
    }
}

/// `GET /admin/models`.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let models = app.node.models().into_iter().map(Model::from).collect();
    ok(AllModels { models, here: app.node.loaded() })
}
