//! `GET /v1/models` and `GET /v1/models/{id}`: the models that can answer now.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use ingle_actors::gateway::{DEFAULT_MODEL, OfferedModel, unknown_model};
use ingle_actors::protocol::names;
use ingle_actors::protocol::registry::ModelType;
use serde::Serialize;

use super::ApiError;
use super::error::ok;
use crate::http::App;

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    // Beyond OpenAI:
    /// `llm` or `embedding`.
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<ModelType>,
    features: Vec<String>,
    state: String,
    context_length: u32,
    is_default: bool,
    nodes: Vec<String>,
}

impl From<OfferedModel> for Model {
    fn from(model: OfferedModel) -> Self {
        Self {
            id: model.name,
            object: "model",
            created: model.created,
            owned_by: "ingle",
            r#type: model.kind,
            features: model.features,
            state: model.state.words(),
            context_length: model.context_length,
            is_default: model.is_default,
            nodes: model.nodes,
        }
    }
}

/// `GET /v1/models`.
pub async fn list(State(app): State<Arc<App>>) -> Response {
    let data = app.node.models().into_iter().filter(can_answer).map(Model::from).collect();
    ok(List { object: "list", data })
}

/// `GET /v1/models/{id}`.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::no_model("That is no name of a model.".to_owned()))?;
    find(app.node.models(), &id).map(ok)
}

/// Some node answers for it now.
pub fn can_answer(model: &OfferedModel) -> bool {
    !model.nodes.is_empty()
}

fn find(models: Vec<OfferedModel>, id: &str) -> Result<Model, ApiError> {
    let known: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let wanted = |model: &OfferedModel| model.name == id || (id == DEFAULT_MODEL && model.is_default);
    match models.into_iter().find(wanted) {
        Some(model) if can_answer(&model) => Ok(model.into()),
        Some(model) => {
            let message = format!("The model `{}` cannot answer now: it is {}.", model.name, model.state.words());
            Err(ApiError::unavailable("model_not_ready", message, Some(Duration::from_secs(5))))
        }
        None => {
            let near = names::near(id, known.iter().map(String::as_str)).into_iter().map(str::to_owned);
            Err(ApiError::no_model(unknown_model(id, &near.collect::<Vec<_>>(), &known)))
        }
    }
}

#[cfg(test)]
mod tests {
    use ingle_actors::protocol::wire::v2::ModelState;

    use super::*;

    fn offered(name: &str, nodes: &[&str], is_default: bool) -> OfferedModel {
        OfferedModel {
            name: name.into(),
            kind: Some(ModelType::Llm),
            features: vec![],
            state: if nodes.is_empty() { ModelState::Loading } else { ModelState::Ready },
            nodes: nodes.iter().map(|&node| node.to_owned()).collect(),
            context_length: 2048,
            is_default,
            created: 5,
        }
    }

    #[test]
    fn models_are_found_by_name_or_as_the_default_and_missing_ones_get_hints() {
        let models = || vec![offered("smollm2", &["tower"], true), offered("qwen3", &[], false)];
        assert_eq!(find(models(), "smollm2").unwrap().id, "smollm2");
        assert_eq!(find(models(), "default").unwrap().id, "smollm2");
        let loading = find(models(), "qwen3").unwrap_err();
        assert_eq!(loading.status, 503);
        assert!(loading.message.contains("loading") && loading.retry_after.is_some());
        let missing = find(models(), "smolm2").unwrap_err();
        assert_eq!((missing.status.as_u16(), missing.code), (404, Some("model_not_found")));
        assert!(missing.message.contains("Did you mean smollm2?"));
    }
}
