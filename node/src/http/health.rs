//! `GET /health`: the process lives. `GET /ready`: a request would find a model now.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::App;
use super::openai::models::can_answer;
use super::openai::ok;

#[derive(Serialize)]
struct Status {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// `GET /health`.
pub async fn health() -> Response {
    ok(Status { status: "ok", reason: None })
}

/// `GET /ready`.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    match why_not(&app) {
        None => ok(Status { status: "ready", reason: None }),
        reason => {
            let body = ok(Status { status: "not ready", reason });
            (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], body).into_response()
        }
    }
}

fn why_not(app: &App) -> Option<String> {
    if !app.is_accepting() {
        return Some("the node is shutting down".into());
    }
    if app.node.is_draining() {
        return Some("the node is being drained".into());
    }
    if app.node.models().iter().any(can_answer) {
        return None;
    }
    Some(match app.node.model_state() {
        Some(state) => format!("the model of this node is {}", state.borrow().words()),
        None => "no node of the cluster has a model that can answer now".into(),
    })
}
