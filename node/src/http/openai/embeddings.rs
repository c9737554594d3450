//! `POST /v1/embeddings`: dialect in, our request down, numbers up, dialect out.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::FutureExt;
use ingle_actors::gateway::{EmbedRequest, Embedded};
use serde::Serialize;

use super::ApiError;
use super::chat_completions::{AnswerHeaders, EXPLAIN, LARGE_BODY, RequestLog, priority_of};
use super::embedding_request::{self, EmbeddingsRequest};
use crate::http::App;
use crate::http::authenticate::Principal;
use crate::http::body;
use crate::http::request_id::RequestContext;

/// Answers of more numbers are written away from the threads that everything else runs on.
const MANY_NUMBERS: usize = 64 << 10;

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Row>,
    model: String,
    usage: UsageBody,
}

#[derive(Serialize)]
struct Row {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct UsageBody {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// The handler.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    Extension(Principal(principal)): Extension<Principal>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut log = RequestLog::new(context.span.clone(), false);
    let answered = answer(&app, context, principal, request).await;
    match &answered {
        Ok(_) => log.finished("embedded"),
        Err(error) => log.refused(error),
    }
    answered
}

async fn answer(app: &App, context: RequestContext, principal: String, request: Request) -> Result<Response, ApiError> {
    let priority = priority_of(request.headers())?;
    let explains = request.headers().get(EXPLAIN).is_some_and(|value| value == "true" || value == "1");
    let body = body::read(request, app.body_limit, &app.body_memory).await?;
    let parsed = if body.len() > LARGE_BODY {
        let parsing = tokio::task::spawn_blocking(move || embedding_request::parse(&body));
        parsing.await.map_err(|error| ApiError::unreadable(format!("The request cannot be read: {error}.")))??
    } else {
        let parsed = embedding_request::parse(&body)?;
        // What is set aside for bodies is for those that are being read.
        drop(body);
        parsed
    };
    context.span.record("principal", &principal);
    if let Some(user) = &parsed.user {
        context.span.record("user", user);
    }
    if !app.is_accepting() {
        return Err(ApiError::unavailable("draining", "This node is shutting down.", None));
    }
    let EmbeddingsRequest { model, embed, base64, extra, .. } = parsed;
    let wanted = model.clone();
    let request = EmbedRequest {
        request_id: context.request_id,
        trace: context.trace,
        principal,
        priority,
        deadline: app.request_timeout,
        model,
        embed,
        extra,
    };
    // On the heap: the future of a whole request through the cluster is large.
    let done = app.node.embed(request).boxed().await;
    // The full name where there is one, once: a field recorded twice stands there twice.
    context.span.record("model", done.as_ref().map_or(&wanted, |done| &done.model));
    let done = done?;
    let explain = explains.then(|| done.record.lock().line());
    let headers = AnswerHeaders { node: done.node.clone(), explain };
    let numbers: usize = done.embeddings.iter().map(Vec::len).sum();
    let json = if numbers > MANY_NUMBERS {
        tokio::task::spawn_blocking(move || written(done, base64)).await.map_err(unwritable)?
    } else {
        written(done, base64)
    };
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    let mut response = (kind, json.map_err(unwritable)?).into_response();
    headers.insert(&mut response);
    Ok(response)
}

fn unwritable(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal(format!("The answer cannot be written: {error}."))
}

fn written(done: Embedded, base64: bool) -> serde_json::Result<Vec<u8>> {
    let Embedded { model, embeddings, usage, .. } = done;
    let row = |(index, values): (usize, Vec<f32>)| {
        let embedding = if base64 { Numbers::Base64(encoded(&values)) } else { Numbers::Floats(values) };
        Row { object: "embedding", index, embedding }
    };
    let data = embeddings.into_iter().enumerate().map(row).collect();
    let usage = UsageBody { prompt_tokens: usage.prompt_tokens, total_tokens: usage.prompt_tokens };
    serde_json::to_vec(&List { object: "list", data, model, usage })
}

/// As OpenAI packs them: each number's four bytes, the lowest first.
fn encoded(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    BASE64.encode(bytes)
}

#[cfg(test)]
mod tests {
    use ingle_actors::gateway::Record;
    use ingle_actors::protocol::wire::v2::Usage;

    use super::*;

    #[test]
    fn answers_are_in_the_usual_shape() {
        let done = || Embedded {
            node: "tower".into(),
            model: "m".into(),
            embeddings: vec![vec![1.0, -0.5], vec![0.1, 1e-9]],
            usage: Usage { prompt_tokens: 7, cached_tokens: 0, completion_tokens: 0 },
            record: Record::default(),
        };
        let text = |base64| String::from_utf8(written(done(), base64).unwrap()).unwrap();
        assert_eq!(
            text(false),
            r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":[1.0,-0.5]},{"object":"embedding","index":1,"embedding":[0.1,1e-9]}],"model":"m","usage":{"prompt_tokens":7,"total_tokens":7}}"#
        );
        assert!(text(true).contains(r#""index":0,"embedding":"AACAPwAAAL8="}"#), "{}", text(true));
    }
}
