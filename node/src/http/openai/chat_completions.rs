//! `POST /v1/chat/completions`: dialect in, our request down, frames up, dialect out.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_actors::gateway::{ChatRequest, GatewayError, Reply};
use ingle_actors::protocol::wire::Answer;
use ingle_actors::protocol::wire::v2::{FinishReason, Finished, Logprobs, Priority};
use serde::Serialize;
use serde_json::{Map, Value};
use tracing::Span;

use super::error::ok;
use super::extra::{Extra, Gathered, UsageBody, text_of};
use super::logprobs::LogprobsBody;
use super::stream::EventWriter;
use super::tools::{AnswerTools, CallBody};
use super::{ApiError, request, stream, tools};
use crate::http::App;
use crate::http::authenticate::Principal;
use crate::http::body;
use crate::http::request_id::RequestContext;
use crate::ingress;

/// Name of the node that began the answer.
const NODE: HeaderName = HeaderName::from_static("x-ingle-node");
/// In a request: whose turn comes first when not all can be served.
const PRIORITY: HeaderName = HeaderName::from_static("x-ingle-priority");
/// In a request `true`: say who could have answered and why this one does; in the answer: just that.
pub(super) const EXPLAIN: HeaderName = HeaderName::from_static("x-ingle-explain");

/// What all chunks of an answer have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// `chatcmpl-…`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's full name.
    pub model: String,
}

/// A finish reason as OpenAI writes it.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: [Choice; 1],
    usage: UsageBody<'a>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    message: AnswerMessage,
    /// Outer: an endpoint's own stand in `more`.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Option<LogprobsBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<&'static str>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Serialize)]
struct AnswerMessage {
    role: &'static str,
    /// Inner: null where the answer consists of something else, as tool calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<Option<()>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallBody>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// The handler.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    Extension(Principal(principal)): Extension<Principal>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut log = RequestLog::new(context.span.clone(), false);
    let result = answer(&app, context, principal, request, &mut log).await;
    match result {
        Ok(Begun::Whole(response)) => Ok(response),
        Ok(Begun::Waits(waits)) => {
            log.streams = true;
            Ok(stream::respond_when_ready(waits, log))
        }
        Ok(Begun::Stream { writer, reply, headers }) => {
            log.streams = true;
            let mut response = stream::respond(*writer, reply.answers, log);
            headers.insert(&mut response);
            Ok(response)
        }
        Err(error) => {
            log.refused(&error);
            Err(error)
        }
    }
}

/// A stream whose model is being loaded begins after this long, so that its client sees that the connection lives.
const SILENT_WAIT: Duration = Duration::from_secs(3);
/// Bodies from here on, in bytes, are parsed away from the threads that everything else runs on.
pub(super) const LARGE_BODY: usize = 256 << 10;

/// How an answer goes on.
enum Begun {
    /// It is complete.
    Whole(Response),
    /// Its model is being loaded, and its client would like to see events.
    Waits(BoxFuture<'static, Result<(EventWriter, Reply), ApiError>>),
    /// The rest comes.
    Stream { writer: Box<EventWriter>, reply: Reply, headers: AnswerHeaders },
}

async fn answer(
    app: &App,
    context: RequestContext,
    principal: String,
    request: Request,
    log: &mut RequestLog,
) -> Result<Begun, ApiError> {
    let priority = priority_of(request.headers())?;
    let explains = request.headers().get(EXPLAIN).is_some_and(|value| value == "true" || value == "1");
    let body = body::read(request, app.body_limit, &app.body_memory).await?;
    let seed = ingress::random_seed();
    let parsed = if body.len() > LARGE_BODY {
        // Long enough to hold up the pulses of this node.
        let parsing = tokio::task::spawn_blocking(move || request::parse(&body, seed));
        parsing.await.map_err(|error| ApiError::unreadable(format!("The request cannot be read: {error}.")))??
    } else {
        request::parse(&body, seed)?
    };
    context.span.record("principal", &principal);
    if let Some(user) = &parsed.user {
        context.span.record("user", user);
    }
    if !app.is_accepting() {
        return Err(ApiError::unavailable("draining", "This node is shutting down.", None));
    }
    let wanted = parsed.model.clone();
    let wants_logprobs = parsed.sampling.logprobs.is_some();
    let request = ChatRequest {
        request_id: context.request_id,
        trace: context.trace,
        principal,
        priority,
        deadline: app.request_timeout,
        model: parsed.model,
        messages: parsed.messages,
        sampling: parsed.sampling,
        extra: parsed.extra,
    };
    // On the heap: the future of a whole request through the cluster is large.
    let node = app.node.clone();
    let mut asking = async move { node.chat(request).await }.boxed();
    let id = format!("chatcmpl-{}", context.request_id);
    let Some(begun) = begun_or_waiting(app, &wanted, parsed.stream, &mut asking).await else {
        let (tools, include_usage) = (parsed.tools, parsed.include_usage);
        return Ok(Begun::Waits(
            async move {
                let reply = asking.await?;
                let tools = AnswerTools::new(tools, &reply.features);
                Ok((EventWriter::new(head_of(id, &reply), include_usage, tools), reply))
            }
            .boxed(),
        ));
    };
    // The full name where there is one, once: a field recorded twice stands there twice.
    context.span.record("model", begun.as_ref().map_or(&wanted, |reply| &reply.model));
    let mut reply = begun?;
    let head = head_of(id, &reply);
    let headers = AnswerHeaders { node: reply.node.clone(), explain: explains.then(|| reply.record.lock().line()) };
    let tools = AnswerTools::new(parsed.tools, &reply.features);
    if parsed.stream {
        let writer = Box::new(EventWriter::new(head, parsed.include_usage, tools));
        return Ok(Begun::Stream { writer, reply, headers });
    }
    let mut response = collect(head, &mut reply, wants_logprobs, tools, log).await?;
    headers.insert(&mut response);
    Ok(Begun::Whole(response))
}

fn head_of(id: String, reply: &Reply) -> Head {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    Head { id, created, model: reply.model.clone() }
}

/// What comes of asking; `None` where it takes long because the model is being loaded, and the client can be told so
/// by events. Until then an error still has a status of its own.
async fn begun_or_waiting(
    app: &App,
    model: &str,
    streams: bool,
    asking: &mut BoxFuture<'static, Result<Reply, GatewayError>>,
) -> Option<Result<Reply, GatewayError>> {
    loop {
        tokio::select! {
            begun = &mut *asking => return Some(begun),
            () = tokio::time::sleep(SILENT_WAIT), if streams => {
                if app.node.is_waited_for(model) {
                    return None;
                }
            }
        }
    }
}

/// Waits for the whole answer.
async fn collect(
    head: Head,
    reply: &mut Reply,
    wants_logprobs: bool,
    tools: Option<AnswerTools>,
    log: &mut RequestLog,
) -> Result<Response, ApiError> {
    let mut text = Vec::new();
    let mut logprobs: Option<Vec<Logprobs>> = wants_logprobs.then(Vec::new);
    let mut gathered = Gathered::default();
    loop {
        let answer = reply.answers.recv().await.unwrap_or_else(stream::broken_off);
        log.note(&answer);
        match answer {
            Answer::Token(token) => {
                text.extend_from_slice(&token.text);
                if let Some(logprobs) = &mut logprobs {
                    logprobs.extend(token.logprobs);
                }
                if !token.extra.is_empty() {
                    gathered.add(&Extra::read(&token.extra));
                }
            }
            Answer::Finished(finished) => {
                let parts = (text_of(text), logprobs);
                return Ok(ok(whole(head, parts, tools, gathered, &finished)));
            }
            Answer::Failed(failed) => return Err(failed.into()),
            Answer::Refused(refused) => return Err(refused.into()),
            Answer::Accepted(_) | Answer::Progress(_) | Answer::Embedding(_) => {}
        }
    }
}

fn whole(
    head: Head,
    (text, logprobs): (String, Option<Vec<Logprobs>>),
    mut tools: Option<AnswerTools>,
    mut gathered: Gathered,
    finished: &Finished,
) -> Completion<'_> {
    let (text, tool_calls) = match &mut tools {
        Some(tools) => tools::split(tools, &text),
        None => (text, vec![]),
    };
    let reason = tools.map_or(finish_reason(finished.reason), |tools| tools.finish_reason(finished.reason));
    let extra = Extra::read(&finished.extra);
    gathered.add(&extra);
    let (choice, completion, message) = gathered.into_parts();
    let says_else = text.is_empty() && !(message.is_empty() && tool_calls.is_empty());
    let message = AnswerMessage {
        role: "assistant",
        content: (!message.contains_key("content")).then(|| (!says_else).then_some(text)),
        refusal: (!message.contains_key("refusal")).then_some(None),
        tool_calls,
        more: message,
    };
    let choice = Choice {
        index: 0,
        message,
        logprobs: (!choice.contains_key("logprobs")).then(|| logprobs.map(|all| LogprobsBody::new(&all))),
        finish_reason: (!choice.contains_key("finish_reason")).then_some(reason),
        more: choice,
    };
    let Head { id, created, model } = head;
    let usage = UsageBody::new(finished.usage, extra.usage);
    Completion { id, object: "chat.completion", created, model, choices: [choice], usage, more: completion }
}

/// What an answer's headers say of its way.
pub(super) struct AnswerHeaders {
    pub node: String,
    pub explain: Option<String>,
}

impl AnswerHeaders {
    pub fn insert(&self, response: &mut Response) {
        for (name, value) in [(NODE, Some(&self.node)), (EXPLAIN, self.explain.as_ref())] {
            if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
                response.headers_mut().insert(name, value);
            }
        }
    }
}

pub(super) fn priority_of(headers: &HeaderMap) -> Result<Priority, ApiError> {
    let Some(value) = headers.get(PRIORITY) else { return Ok(Priority::Normal) };
    match value.as_bytes() {
        b"background" => Ok(Priority::Background),
        b"normal" => Ok(Priority::Normal),
        b"interactive" => Ok(Priority::Interactive),
        _ => Err(ApiError::invalid(
            PRIORITY.as_str(),
            "The header x-ingle-priority is `background`, `normal` or `interactive`.",
        )),
    }
}

/// One line in the log when a request is over, however it ends. Also a client that leaves drops it.
#[derive(Debug)]
pub struct RequestLog {
    span: Span,
    started: Instant,
    first_token: Option<Duration>,
    tokens: u32,
    status: u16,
    outcome: Option<&'static str>,
    streams: bool,
}

impl RequestLog {
    /// A request begins.
    pub fn new(span: Span, streams: bool) -> Self {
        Self { span, started: Instant::now(), first_token: None, tokens: 0, status: 200, outcome: None, streams }
    }

    /// A frame went by.
    pub fn note(&mut self, answer: &Answer) {
        match answer {
            Answer::Token(_) => {
                self.tokens += 1;
                self.first_token.get_or_insert_with(|| self.started.elapsed());
            }
            Answer::Finished(finished) => self.outcome = Some(finish_reason(finished.reason)),
            Answer::Failed(failed) => self.outcome = Some(failed.kind.as_str()),
            Answer::Refused(_) => self.outcome = Some("refused"),
            Answer::Accepted(_) | Answer::Progress(_) | Answer::Embedding(_) => {}
        }
    }

    /// All of it is there at once.
    pub fn finished(&mut self, how: &'static str) {
        self.outcome = Some(how);
    }

    /// It ends with an error after it was told that it would be a stream.
    pub fn failed(&mut self, error: &ApiError) {
        self.outcome = Some(error.code.unwrap_or(error.kind));
    }

    /// It is not answered.
    pub fn refused(&mut self, error: &ApiError) {
        self.status = error.status.as_u16();
        self.outcome = Some(error.code.unwrap_or(error.kind));
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1_000.0;
        self.span.in_scope(|| {
            tracing::info!(
                status = self.status,
                outcome = self.outcome.unwrap_or("client left"),
                stream = self.streams,
                tokens = self.tokens,
                first_token_ms = self.first_token.map(milliseconds),
                total_ms = milliseconds(self.started.elapsed()),
                "request over"
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use ingle_actors::gateway::Record;
    use ingle_actors::protocol::wire::v2::{Accepted, Load, Token, Usage};
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_whole_answer_in_the_usual_shape() {
        let (sender, answers) = mpsc::channel(8);
        let accepted = Accepted { prompt_tokens: 3, cached_tokens: 1, context_length: 100, load: Load::default() };
        let mut reply = Reply {
            node: "tower".into(),
            model: "m".into(),
            features: vec![],
            accepted,
            answers,
            record: Record::default(),
        };
        // A character that two tokens share stays one character.
        for text in [&b"h"[..], b"\xc3", b"\xa9"] {
            sender
                .send(Answer::Token(Token { position: 0, id: 1, text: text.to_vec(), logprobs: None, extra: vec![] }))
                .await
                .unwrap();
        }
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 3 };
        let finished = Finished { reason: FinishReason::Stop, usage, load: Load::default(), extra: vec![] };
        sender.send(Answer::Finished(finished)).await.unwrap();
        let head = Head { id: "chatcmpl-1".into(), created: 5, model: "m".into() };
        let mut log = RequestLog::new(Span::none(), false);
        let response = collect(head, &mut reply, false, None, &mut log).await.unwrap();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        assert_eq!(
            body,
            r#"{"id":"chatcmpl-1","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hé","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":1}}}"#
        );
        assert_eq!((log.outcome, log.tokens), (Some("stop"), 3));
    }
}
