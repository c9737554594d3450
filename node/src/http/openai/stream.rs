//! A completion as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use ingle_actors::gateway::Reply;
use ingle_actors::json::Members;
use ingle_actors::protocol::wire::Answer;
use ingle_actors::protocol::wire::v2::{Failed, FailureKind, Finished, Logprobs, Token};
use serde::Serialize;
use tokio::sync::mpsc;

use super::ApiError;
use super::chat_completions::{Head, RequestLog, finish_reason};
use super::extra::{Extra, UsageBody};
use super::logprobs::LogprobsBody;
use super::tools::{AnswerTools, CallBody, Part};

/// So much silence, and a comment shows proxies and clients that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Tokens that are there already go out together, up to about so many bytes.
const BATCH: usize = 16 << 10;

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    /// Outer: the client asked for usage; inner: null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody<'a>>>,
    /// What an endpoint says in each chunk.
    #[serde(flatten)]
    more: &'a Members<'a>,
}

#[derive(Default, Serialize)]
struct Choice<'a> {
    index: u32,
    delta: Delta<'a>,
    /// Outer: an endpoint's own stand in `more`.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Option<LogprobsBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<Option<&'static str>>,
    #[serde(flatten)]
    more: Members<'a>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[&'a CallBody; 1]>,
    #[serde(flatten)]
    more: Members<'a>,
}

/// Turns frames into events. Knows no clock and no socket.
#[derive(Debug)]
pub struct EventWriter {
    head: Head,
    include_usage: bool,
    /// Where the answer may call tools.
    tools: Option<AnswerTools>,
    ended: bool,
    /// Members of the chunk itself that an endpoint last said, as JSON; empty for none.
    sticky: Vec<u8>,
}

impl EventWriter {
    /// `include_usage` adds a chunk with the usage before the end.
    pub fn new(head: Head, include_usage: bool, tools: Option<AnswerTools>) -> Self {
        Self { head, include_usage, tools, ended: false, sticky: Vec::new() }
    }

    /// The first event: who speaks.
    pub fn begin(&self, out: &mut Vec<u8>) {
        let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
        self.event(
            out,
            &[Choice { delta, logprobs: Some(None), finish_reason: Some(None), ..Choice::default() }],
            None,
        );
    }

    /// The event for a frame, if it has one. Nothing is written after the last frame.
    pub fn write(&mut self, answer: &Answer, out: &mut Vec<u8>) {
        if self.ended {
            return;
        }
        self.ended = answer.is_last();
        match answer {
            // A token whose text is held back still says how likely it was.
            Answer::Token(token) if token.text.is_empty() && token.logprobs.is_none() && token.extra.is_empty() => {}
            Answer::Token(token) => match &mut self.tools {
                None => self.token(token, out),
                Some(tools) => {
                    let parts = tools.push(&String::from_utf8_lossy(&token.text));
                    self.parts(out, &parts, token.logprobs.as_ref());
                }
            },
            Answer::Finished(finished) => self.finish(finished, out),
            // No `[DONE]` behind these: a client that waits for it must see that the answer is not whole.
            Answer::Failed(failed) => write_error(out, &failed.clone().into()),
            Answer::Refused(refused) => write_error(out, &refused.clone().into()),
            Answer::Accepted(_) | Answer::Progress(_) | Answer::Embedding(_) => {}
        }
    }

    fn text(&self, out: &mut Vec<u8>, text: &str, logprobs: Option<&Logprobs>) {
        self.chunk(out, Delta { content: Some(text), ..Delta::default() }, logprobs);
    }

    /// Parts that a token released, and how likely it was.
    fn parts(&self, out: &mut Vec<u8>, parts: &[Part], mut logprobs: Option<&Logprobs>) {
        for part in parts {
            match part {
                Part::Text(text) => self.text(out, text, logprobs.take()),
                Part::Call(call) => {
                    self.chunk(out, Delta { tool_calls: Some([call]), ..Delta::default() }, logprobs.take());
                }
            }
        }
        if logprobs.is_some() {
            self.text(out, "", logprobs);
        }
    }

    fn chunk(&self, out: &mut Vec<u8>, delta: Delta<'_>, logprobs: Option<&Logprobs>) {
        let logprobs = logprobs.map(|token| LogprobsBody::new(std::slice::from_ref(token)));
        let choice = Choice { delta, logprobs: Some(logprobs), finish_reason: Some(None), ..Choice::default() };
        self.event(out, &[choice], None);
    }

    fn token(&mut self, token: &Token, out: &mut Vec<u8>) {
        let text = String::from_utf8_lossy(&token.text);
        let extra = self.take_extra(&token.extra);
        // A token without a text of its own says what an endpoint said instead.
        let content = (!text.is_empty() || extra.delta.0.is_empty()).then_some(&*text);
        let logprobs = token.logprobs.as_ref().map(|token| LogprobsBody::new(std::slice::from_ref(token)));
        let logprobs = (!extra.choice.has("logprobs")).then_some(logprobs);
        let delta = Delta { content, more: extra.delta, ..Delta::default() };
        self.event(out, &[Choice { index: 0, delta, logprobs, finish_reason: Some(None), more: extra.choice }], None);
    }

    fn finish(&mut self, finished: &Finished, out: &mut Vec<u8>) {
        let parts = self.tools.as_mut().map(AnswerTools::finish).unwrap_or_default();
        self.parts(out, &parts, None);
        let extra = self.take_extra(&finished.extra);
        let logprobs = (!extra.choice.has("logprobs")).then_some(None);
        let reason =
            self.tools.as_ref().map_or(finish_reason(finished.reason), |tools| tools.finish_reason(finished.reason));
        let reason = (!extra.choice.has("finish_reason")).then_some(Some(reason));
        let delta = Delta { more: extra.delta, ..Delta::default() };
        self.event(out, &[Choice { index: 0, delta, logprobs, finish_reason: reason, more: extra.choice }], None);
        if self.include_usage {
            self.event(out, &[], Some(UsageBody::new(finished.usage, extra.usage)));
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Reads a frame's `extra` and keeps what holds for later chunks as well.
    fn take_extra<'a>(&mut self, extra: &'a [u8]) -> Extra<'a> {
        let extra = Extra::read(extra);
        if let Some(chunk) = &extra.chunk {
            self.sticky.clear();
            if !chunk.0.is_empty() {
                // Members that were read can be written.
                let _ = serde_json::to_writer(&mut self.sticky, chunk);
            }
        }
        extra
    }

    fn event(&self, out: &mut Vec<u8>, choices: &[Choice<'_>], usage: Option<UsageBody<'_>>) {
        let more = Members::parse(&self.sticky).unwrap_or_default();
        let chunk = Chunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            choices,
            usage: self.include_usage.then_some(usage),
            more: &more,
        };
        out.extend_from_slice(b"data: ");
        // Writing numbers and strings into memory cannot fail.
        let _ = serde_json::to_writer(&mut *out, &chunk);
        out.extend_from_slice(b"\n\n");
    }
}

fn write_error(out: &mut Vec<u8>, error: &ApiError) {
    out.extend_from_slice(format!("data: {}\n\n", error.to_json()).as_bytes());
}

/// Everything that a running stream holds. Dropping it (the client has left) cancels the request.
struct Running {
    writer: EventWriter,
    answers: mpsc::Receiver<Answer>,
    log: RequestLog,
    begun: bool,
    /// [`KEEP_ALIVE`].
    keep_alive: Duration,
}

impl Running {
    /// The next bytes to send; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        if !self.begun {
            self.begun = true;
            self.writer.begin(&mut out);
            // Not alone: the first token is there in most cases.
            self.take_ready(&mut out);
            return Some(out.into());
        }
        while out.is_empty() {
            if self.writer.ended {
                return None;
            }
            match tokio::time::timeout(self.keep_alive, self.answers.recv()).await {
                Err(_) => out.extend_from_slice(b": keep-alive\n\n"),
                Ok(answer) => {
                    self.take(&answer.unwrap_or_else(broken_off), &mut out);
                    self.take_ready(&mut out);
                }
            }
        }
        Some(out.into())
    }

    /// All bytes to send.
    fn events(self) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> + Send {
        futures_util::stream::unfold(self, |mut running| async move {
            running.next().await.map(|bytes| (Ok(bytes), running))
        })
    }

    fn take_ready(&mut self, out: &mut Vec<u8>) {
        while out.len() < BATCH && !self.writer.ended {
            let Ok(answer) = self.answers.try_recv() else { break };
            self.take(&answer, out);
        }
    }

    fn take(&mut self, answer: &Answer, out: &mut Vec<u8>) {
        self.log.note(answer);
        self.writer.write(answer, out);
    }
}

/// What stands for an answer that ended without its last frame. That is a fault of ours, and it must not look like
/// a whole answer.
pub fn broken_off() -> Answer {
    Answer::Failed(Failed {
        kind: FailureKind::Protocol,
        message: "The answer broke off.".into(),
        retryable: false,
        migratable: false,
    })
}

/// The response that streams `answers`.
pub fn respond(writer: EventWriter, answers: mpsc::Receiver<Answer>, log: RequestLog) -> Response {
    events(Running { writer, answers, log, begun: false, keep_alive: KEEP_ALIVE }.events().boxed())
}

/// An answer that has not begun, because its model is being loaded.
type Waits = BoxFuture<'static, Result<(EventWriter, Reply), ApiError>>;

/// The response that says that it waits until the answer begins, and then streams it. It has no headers that say who
/// answers: nobody knows yet. An error is an event.
pub fn respond_when_ready(waits: Waits, log: RequestLog) -> Response {
    let waiting = futures_util::stream::unfold(Some((waits, log, true)), |state| async move {
        let (mut waits, mut log, is_first) = state?;
        let pause = if is_first { Duration::ZERO } else { KEEP_ALIVE };
        match tokio::time::timeout(pause, &mut waits).await {
            Err(_) => {
                let comment = Bytes::from_static(b": the model is being loaded\n\n");
                let piece = futures_util::stream::iter([Ok(comment)]).boxed();
                Some((piece, Some((waits, log, false))))
            }
            Ok(Err(error)) => {
                let mut out = Vec::new();
                write_error(&mut out, &error);
                log.failed(&error);
                Some((futures_util::stream::iter([Ok(Bytes::from(out))]).boxed(), None))
            }
            Ok(Ok((writer, reply))) => {
                let running = Running { writer, answers: reply.answers, log, begun: false, keep_alive: KEEP_ALIVE };
                Some((running.events().boxed(), None))
            }
        }
    });
    events(waiting.flatten().boxed())
}

/// A response of server-sent events.
fn events(events: futures_util::stream::BoxStream<'static, Result<Bytes, Infallible>>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Reverse proxies of the nginx kind hold events back otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(events)).into_response()
}

#[cfg(test)]
mod tests {
    use ingle_actors::protocol::wire::v2::{FinishReason, Load, Logprob, NO_TOKEN_ID, Usage};

    use super::super::tools::ToolUse;
    use super::*;

    fn head() -> Head {
        Head { id: "chatcmpl-1".into(), created: 5, model: "m".into() }
    }

    fn token(position: u32, text: &str) -> Answer {
        Answer::Token(Token { position, id: 1, text: text.as_bytes().to_vec(), logprobs: None, extra: vec![] })
    }

    fn finished() -> Answer {
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2 };
        Answer::Finished(Finished { reason: FinishReason::Length, usage, load: Load::default(), extra: vec![] })
    }

    fn failed() -> Answer {
        let message = "the engine died".into();
        Answer::Failed(Failed { kind: FailureKind::EngineDied, message, retryable: false, migratable: true })
    }

    fn written(include_usage: bool, answers: &[Answer]) -> String {
        let mut out = Vec::new();
        let mut writer = EventWriter::new(head(), include_usage, None);
        writer.begin(&mut out);
        answers.iter().for_each(|answer| writer.write(answer, &mut out));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_whole_answer_byte_for_byte() {
        let chunk = |choices: &str, usage: &str| {
            format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":5,\"model\":\"m\",\
                 \"choices\":[{choices}]{usage}}}\n\n"
            )
        };
        let choice = |delta: &str, reason: &str| {
            format!("{{\"index\":0,\"delta\":{{{delta}}},\"logprobs\":null,\"finish_reason\":{reason}}}")
        };
        let answers = [token(0, "hé"), token(1, ""), token(2, "\"\n🔥"), finished(), failed()];
        let events = |usage: &str| {
            [
                chunk(&choice("\"role\":\"assistant\",\"content\":\"\"", "null"), usage),
                chunk(&choice("\"content\":\"hé\"", "null"), usage),
                chunk(&choice("\"content\":\"\\\"\\n🔥\"", "null"), usage),
                chunk(&choice("", "\"length\""), usage),
            ]
            .concat()
        };
        assert_eq!(written(false, &answers), events("") + "data: [DONE]\n\n");
        let usage = ",\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5,\
                     \"prompt_tokens_details\":{\"cached_tokens\":1}}";
        assert_eq!(written(true, &answers), events(",\"usage\":null") + &chunk("", usage) + "data: [DONE]\n\n");
    }

    #[test]
    fn logprobs_come_with_their_token_also_where_its_text_is_held_back() {
        let logprob = |id, logprob, bytes: &[u8]| Logprob { id, logprob, bytes: bytes.to_vec() };
        let chosen = logprob(7, -0.5, b"\xc3");
        let top = vec![chosen.clone(), logprob(8, -9_999.0, b"")];
        let half = Token { position: 0, id: 7, text: vec![], logprobs: Some(Logprobs { chosen, top }), extra: vec![] };
        let text = written(false, &[Answer::Token(half), token(1, "é"), finished()]);
        let events: Vec<&str> = text.split("\n\n").collect();
        assert!(events[1].ends_with(
            "{\"index\":0,\"delta\":{\"content\":\"\"},\"logprobs\":{\"content\":[{\"token\":\"\u{fffd}\",\
             \"logprob\":-0.5,\"bytes\":[195],\"top_logprobs\":[{\"token\":\"\u{fffd}\",\"logprob\":-0.5,\"bytes\":[195]},\
             {\"token\":\"\",\"logprob\":-9999.0,\"bytes\":[]}]}],\"refusal\":null},\"finish_reason\":null}]}"
        ), "{}", events[1]);
        assert!(events[2].contains("\"content\":\"é\"},\"logprobs\":null"), "{}", events[2]);
    }

    #[test]
    fn a_call_of_a_tool_is_one_delta_behind_the_text_before_it() {
        let tools = AnswerTools::new(Some(ToolUse { parallel: true }), &["tools:hermes".into()]);
        let (mut out, mut writer) = (Vec::new(), EventWriter::new(head(), false, tools));
        let mut finished = finished();
        if let Answer::Finished(finished) = &mut finished {
            finished.reason = FinishReason::Stop;
        }
        for text in ["Hm", " <tool", "_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}", "}</tool_call>"] {
            writer.write(&token(0, text), &mut out);
        }
        writer.write(&finished, &mut out);
        let text = String::from_utf8(out).unwrap();
        let choices: Vec<serde_json::Value> = text
            .split("\n\n")
            .filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
            .map(|chunk: serde_json::Value| chunk["choices"][0].clone())
            .collect();
        let [hm, space, call, end] = choices.try_into().unwrap();
        assert_eq!((&hm["delta"]["content"], &space["delta"]["content"]), (&"Hm".into(), &" ".into()));
        let call = &call["delta"]["tool_calls"][0];
        assert_eq!((&call["index"], &call["type"]), (&0.into(), &"function".into()));
        assert_eq!(call["function"], serde_json::json!({"name": "f", "arguments": "{\"x\": 1}"}));
        assert_eq!(end["finish_reason"], "tool_calls");
    }

    #[test]
    fn what_an_endpoint_says_more_stands_where_it_belongs() {
        let with = |text: &str, extra: &str| {
            let (text, extra) = (text.into(), extra.into());
            Answer::Token(Token { position: 0, id: NO_TOKEN_ID, text, logprobs: None, extra })
        };
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2 };
        let extra =
            br#"{"choice":{"finish_reason":"tool_calls"},"usage":{"prompt_tokens_details":{"x":1},"y":2},"chunk":{}}"#;
        let end = Answer::Finished(Finished {
            reason: FinishReason::Stop,
            usage,
            load: Load::default(),
            extra: extra.to_vec(),
        });
        let call = r#"{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\": 1.0}"}}]}"#;
        let logprobs = r#"{"logprobs":{"content":[]}}"#;
        let answers = [
            with("", &format!(r#"{{"delta":{call},"chunk":{{"system_fingerprint":"b1"}}}}"#)),
            with("a", &format!(r#"{{"choice":{logprobs}}}"#)),
            end,
        ];
        let text = written(true, &answers);
        let events: Vec<&str> = text.split("\n\n").collect();
        let ends = |event: usize, end: &str| assert!(events[event].ends_with(end), "{}\n{end}", events[event]);
        let fingerprint = r#","usage":null,"system_fingerprint":"b1"}"#;
        ends(
            1,
            &format!(r#""choices":[{{"index":0,"delta":{call},"logprobs":null,"finish_reason":null}}]{fingerprint}"#),
        );
        ends(
            2,
            &format!(
                r#"{{"index":0,"delta":{{"content":"a"}},"finish_reason":null,"logprobs":{{"content":[]}}}}]{fingerprint}"#
            ),
        );
        ends(3, r#"{"index":0,"delta":{},"logprobs":null,"finish_reason":"tool_calls"}],"usage":null}"#);
        ends(
            4,
            r#""choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"x":1},"y":2}}"#,
        );
        ends(5, "data: [DONE]");
    }

    #[test]
    fn a_broken_answer_ends_in_a_typed_error_and_without_done() {
        let text = written(false, &[token(0, "a"), failed(), finished()]);
        assert!(text.ends_with(
            "data: {\"error\":{\"message\":\"the engine died\",\"type\":\"server_error\",\"param\":null,\
             \"code\":\"engine_died\"}}\n\n"
        ));
        assert!(!text.contains("[DONE]"));
    }

    #[tokio::test]
    async fn silence_is_filled_and_an_answer_without_an_end_is_an_error() {
        let (sender, answers) = mpsc::channel(4);
        let mut running = Running {
            writer: EventWriter::new(head(), false, None),
            answers,
            log: RequestLog::new(tracing::Span::none(), true),
            begun: false,
            keep_alive: Duration::from_millis(50),
        };
        assert!(running.next().await.unwrap().starts_with(b"data: {"));
        let before = std::time::Instant::now();
        assert_eq!(&running.next().await.unwrap()[..], b": keep-alive\n\n");
        assert!(before.elapsed() >= running.keep_alive);
        sender.send(token(0, "a")).await.unwrap();
        sender.send(token(1, "b")).await.unwrap();
        let together = running.next().await.unwrap();
        assert_eq!(together.windows(5).filter(|w| w == b"data:").count(), 2);
        drop(sender);
        let last = String::from_utf8(running.next().await.unwrap().to_vec()).unwrap();
        assert!(last.contains("protocol_error"), "{last}");
        assert_eq!(running.next().await, None);
    }
}
