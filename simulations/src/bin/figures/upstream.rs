//! A server that speaks OpenAI's HTTP. The question says what it does: words `name=number` in the last message.
//!
//! | word | what |
//! |---|---|
//! | `tokens=N` | the answer has N tokens (1) |
//! | `first=MS` | so long until the first token (0) |
//! | `every=MS` | so long between two tokens (0: all at once) |
//!
//! With `--slots` so many are answered at a time, the others wait in the order in which they came.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::http::{BODY_BUFFER, Body, CHAT, serve, streamed, whole};
use crate::sse::WORD;
use crate::{Error, listen};

/// The model that it has.
const MODEL: &str = "scripted";

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The port to listen at.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Answers at a time.
    #[arg(long, default_value_t = 100_000)]
    slots: usize,
    /// How long an answer takes on top of what the question says.
    #[arg(long, default_value_t = 0)]
    service_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Script {
    tokens: u32,
    first: Duration,
    every: Duration,
    stream: bool,
    usage: bool,
}

impl Script {
    /// What the body of a request asks for.
    fn read(body: &[u8]) -> Option<Self> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let said = body["messages"].as_array()?.last()?["content"].as_str()?;
        let flag = |value: &Value| value.as_bool().unwrap_or(false);
        let mut script = Self {
            tokens: 1,
            first: Duration::ZERO,
            every: Duration::ZERO,
            stream: flag(&body["stream"]),
            usage: flag(&body["stream_options"]["include_usage"]),
        };
        for (name, value) in said.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
            let Ok(value) = value.parse::<u64>() else { continue };
            match name {
                "tokens" => script.tokens = u32::try_from(value).ok()?,
                "first" => script.first = Duration::from_millis(value),
                "every" => script.every = Duration::from_millis(value),
                _ => {}
            }
        }
        Some(script)
    }

    fn usage(&self) -> Value {
        json!({ "prompt_tokens": 8, "completion_tokens": self.tokens, "total_tokens": 8 + self.tokens })
    }
}

/// Serves until the end.
pub async fn run(options: Options) -> Result<(), Error> {
    let listener = listen(options.port).await?;
    let slots = Arc::new(Semaphore::new(options.slots));
    let service = Duration::from_millis(options.service_ms);
    serve(listener, move |request| answer(request, slots.clone(), service)).await
}

fn plain(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(whole(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}

async fn answer(request: Request<Incoming>, slots: Arc<Semaphore>, service: Duration) -> Response<Body> {
    if request.method() == Method::GET && request.uri().path() == "/v1/models" {
        return plain(StatusCode::OK, &json!({ "object": "list", "data": [{ "id": MODEL, "object": "model" }] }));
    }
    if request.uri().path() != CHAT {
        return plain(StatusCode::NOT_FOUND, &json!({ "error": { "message": "not here" } }));
    }
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let Some(script) = Script::read(&body) else {
        return plain(StatusCode::BAD_REQUEST, &json!({ "error": { "message": "not a question" } }));
    };
    // Held to the end of the answer; a client that leaves drops this future, or the reader of the pieces.
    let Ok(slot) = slots.acquire_owned().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, &json!({ "error": { "message": "at the end" } }));
    };
    sleep(service + script.first).await;
    if !script.stream {
        sleep(script.every * script.tokens.saturating_sub(1)).await;
        let message = json!({ "role": "assistant", "content": WORD.repeat(script.tokens as usize) });
        let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
        let completion = json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice],
            "usage": script.usage(),
        });
        return plain(StatusCode::OK, &completion);
    }
    let (pieces, reader) = mpsc::channel(BODY_BUFFER);
    tokio::spawn(async move {
        let _slot = slot;
        // Whoever asked has left.
        let _ = stream(script, pieces).await;
    });
    let mut response = Response::new(streamed(reader));
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("text/event-stream"));
    response
}

fn event(choices: Value, usage: Value) -> Bytes {
    let mut chunk = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices,
    });
    if !usage.is_null() {
        chunk["usage"] = usage;
    }
    format!("data: {chunk}\n\n").into()
}

async fn stream(script: Script, pieces: mpsc::Sender<Bytes>) -> Result<(), mpsc::error::SendError<Bytes>> {
    let token = event(json!([{ "index": 0, "delta": { "content": WORD }, "finish_reason": null }]), Value::Null);
    let mut end = event(json!([{ "index": 0, "delta": {}, "finish_reason": "stop" }]), Value::Null).to_vec();
    if script.usage {
        end.extend_from_slice(&event(json!([]), script.usage()));
    }
    end.extend_from_slice(b"data: [DONE]\n\n");
    if script.every.is_zero() {
        let mut all = token.repeat(script.tokens as usize);
        all.extend_from_slice(&end);
        return pieces.send(all.into()).await;
    }
    let mut next = Instant::now();
    for _ in 0..script.tokens {
        sleep_until(next).await;
        next += script.every;
        pieces.send(token.clone()).await?;
    }
    pieces.send(end.into()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_say_what_happens() {
        let body = json!({
            "stream": true, "stream_options": { "include_usage": true },
            "messages": [{ "role": "user", "content": "please tokens=3 every=20 first=100 x=y" }],
        });
        let script = Script::read(body.to_string().as_bytes()).unwrap();
        let ms = Duration::from_millis;
        assert_eq!(script, Script { tokens: 3, first: ms(100), every: ms(20), stream: true, usage: true });
        assert!(Script::read(b"{}").is_none());
    }
}
