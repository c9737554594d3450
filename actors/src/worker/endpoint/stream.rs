//! The events of an answer as our frames. No I/O, no clock.

use std::borrow::Cow;

use ingle_protocol::wire::v2::{EXTRA_LIMIT, FailureKind, FinishReason, Finished, Load, NO_TOKEN_ID, Token, Usage};

use super::chunk::{Chunk, Extras, pack};
use super::errors::{FarError, Trouble};

/// What stands behind the last chunk.
const DONE: &[u8] = b"[DONE]";

/// An answer as far as it has come.
#[derive(Debug)]
pub struct AnswerStream {
    /// `host:port`, for messages.
    endpoint: String,
    position: u32,
    extras: Extras,
    /// Members of the chunk itself as the reader of our frames has them.
    told: Vec<u8>,
    end: Option<End>,
    usage: Usage,
    usage_extras: Vec<u8>,
    done: bool,
}

/// What the finish reason came with.
#[derive(Debug)]
struct End {
    reason: FinishReason,
    choice: Vec<u8>,
}

impl AnswerStream {
    /// `prompt_tokens` is what we believe until the far side says it.
    pub fn new(endpoint: &str, prompt_tokens: u32) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            position: 0,
            extras: Extras::default(),
            told: Vec::new(),
            end: None,
            usage: Usage { prompt_tokens, ..Usage::default() },
            usage_extras: Vec::new(),
            done: false,
        }
    }

    /// `[DONE]` came.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The finish reason or `[DONE]` came, so that the answer is whole where the stream ends.
    pub fn is_whole(&self) -> bool {
        self.done || self.end.is_some()
    }

    /// The far side sends what is no answer.
    pub fn lie(&self, why: impl std::fmt::Display) -> Trouble {
        Trouble::Failed(FailureKind::Protocol, format!("the endpoint {} sends what is no answer: {why}", self.endpoint))
    }

    /// Takes the data of an event; a frame where it has something to say.
    pub fn take(&mut self, data: &[u8]) -> Result<Option<Token>, Trouble> {
        if self.done {
            return Ok(None);
        }
        if data == DONE {
            self.done = true;
            return Ok(None);
        }
        let mut extras = std::mem::take(&mut self.extras);
        let token = Chunk::parse(data, &mut extras)
            .map_err(|error| self.lie(error))
            .and_then(|chunk| self.understand(chunk, &mut extras));
        self.extras = extras;
        token
    }

    fn understand(&mut self, chunk: Chunk<'_>, extras: &mut Extras) -> Result<Option<Token>, Trouble> {
        if let Some(error) = chunk.error {
            return Err(self.far_error(error.get()));
        }
        if let Some(usage) = chunk.usage {
            self.usage = usage;
            std::mem::swap(&mut self.usage_extras, &mut extras.usage);
        }
        // Members beside a finish reason belong to the end, unless there is a token to carry them.
        let mut choice = std::mem::take(&mut extras.choice);
        if let Some(reason) = &chunk.finish_reason {
            let (reason, mut with) = finish(reason);
            if chunk.content.is_empty() && extras.delta.is_empty() {
                with.append(&mut choice);
            }
            self.end = Some(End { reason, choice: with });
        }
        let token = if chunk.content.is_empty() && extras.delta.is_empty() && choice.is_empty() {
            None
        } else {
            let text = match chunk.content {
                Cow::Borrowed(text) => text.as_bytes().to_vec(),
                Cow::Owned(text) => text.into_bytes(),
            };
            let news = self.news(&extras.chunk);
            let extra = self.fitting(pack(&extras.delta, &choice, b"", news))?;
            if news.is_some() {
                self.told.clone_from(&extras.chunk);
            }
            let token = Token { position: self.position, id: NO_TOKEN_ID, text, logprobs: None, extra };
            self.position = self.position.saturating_add(1);
            Some(token)
        };
        choice.clear();
        extras.choice = choice;
        Ok(token)
    }

    /// The chunk's own members, where they are not what was told last.
    fn news<'a>(&self, members: &'a [u8]) -> Option<&'a [u8]> {
        (self.told != members).then_some(members)
    }

    fn fitting(&self, extra: Vec<u8>) -> Result<Vec<u8>, Trouble> {
        if extra.len() > EXTRA_LIMIT {
            return Err(self.lie(format!("members of {} KiB beside the text of one event", extra.len() >> 10)));
        }
        Ok(extra)
    }

    fn far_error(&self, json: &str) -> Trouble {
        let error = FarError::read(format!("{{\"error\":{json}}}").as_bytes());
        match error.status.and_then(|status| reqwest::StatusCode::from_u16(status).ok()) {
            // What a server finds out after it has answered 200 is still about the request, where nothing was written.
            Some(status) if self.position == 0 => {
                super::errors::of_status(status, &reqwest::header::HeaderMap::new(), error, &self.endpoint)
            }
            _ => {
                let message = format!("the endpoint {} ends with an error: {}", self.endpoint, error.message);
                Trouble::Failed(FailureKind::EngineError, message)
            }
        }
    }

    /// The last frame; an error where the answer is not whole.
    pub fn finish(&mut self) -> Result<Finished, Trouble> {
        if !self.is_whole() {
            let message = format!("the endpoint {} ended the stream in the middle of the answer", self.endpoint);
            return Err(Trouble::Failed(FailureKind::ConnectionLost, message));
        }
        let End { reason, choice } =
            self.end.take().unwrap_or_else(|| End { reason: FinishReason::Stop, choice: Vec::new() });
        let news = self.news(&self.extras.chunk);
        let extra = self.fitting(pack(b"", &choice, &self.usage_extras, news))?;
        let mut usage = self.usage;
        if usage.completion_tokens == 0 {
            // A far side that does not count: one piece of text is about a token.
            usage.completion_tokens = self.position;
        }
        Ok(Finished { reason, usage, load: Load::default(), extra })
    }
}

/// The reason as ours, and as it is written where ours does not say it all.
fn finish(reason: &str) -> (FinishReason, Vec<u8>) {
    let written = || {
        let mut member = b"\"finish_reason\":".to_vec();
        // Writing a text into memory cannot fail.
        let _ = serde_json::to_writer(&mut member, reason);
        member.push(b',');
        member
    };
    match reason {
        "stop" => (FinishReason::Stop, Vec::new()),
        "length" => (FinishReason::Length, Vec::new()),
        _ => (FinishReason::Stop, written()),
    }
}

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::RefusalKind;

    use super::*;

    fn stream(events: &[&str]) -> (Vec<(String, String)>, Result<Finished, Trouble>) {
        let mut stream = AnswerStream::new("box:80", 7);
        let mut tokens = Vec::new();
        for event in events {
            match stream.take(event.as_bytes()) {
                Ok(None) => {}
                Ok(Some(token)) => {
                    assert_eq!((token.position, token.id), (tokens.len() as u32, NO_TOKEN_ID));
                    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
                    tokens.push((text(token.text), text(token.extra)));
                }
                Err(trouble) => return (tokens, Err(trouble)),
            }
        }
        (tokens, stream.finish())
    }

    fn delta(delta: &str) -> String {
        format!(r#"{{"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}],"system_fingerprint":"b1"}}"#)
    }

    const STOP: &str = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"system_fingerprint":"b1"}"#;

    #[test]
    fn texts_become_tokens_and_what_does_not_change_is_told_once() {
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6},"system_fingerprint":"b1"}"#;
        let events = [
            &delta(r#"{"role":"assistant","content":null}"#),
            &delta(r#"{"content":"a"}"#),
            &delta(r#"{"content":"\n"}"#),
            STOP,
            usage,
            "[DONE]",
            "nonsense behind the end",
        ];
        let (tokens, finished) = stream(&events);
        let fingerprint = r#"{"chunk":{"system_fingerprint":"b1"}}"#.to_owned();
        assert_eq!(tokens, [("a".into(), fingerprint), ("\n".into(), String::new())]);
        let usage = Usage { prompt_tokens: 4, cached_tokens: 0, completion_tokens: 2 };
        assert_eq!(finished, Ok(Finished { reason: FinishReason::Stop, usage, load: Load::default(), extra: vec![] }));
    }

    #[test]
    fn tool_calls_and_their_finish_reason_pass_through() {
        let call = r#"{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":""}}]}"#;
        let end =
            r#"{"choices":[{"index":0,"delta":{},"stop_reason":9,"finish_reason":"tool_calls"}],"timings":{"n":1}}"#;
        let (tokens, finished) = stream(&[&delta(call), end, "[DONE]"]);
        assert_eq!(tokens, [(String::new(), format!(r#"{{"delta":{call},"chunk":{{"system_fingerprint":"b1"}}}}"#))]);
        let finished = finished.unwrap();
        assert_eq!(
            String::from_utf8(finished.extra).unwrap(),
            r#"{"choice":{"finish_reason":"tool_calls","stop_reason":9},"chunk":{"timings":{"n":1}}}"#
        );
        assert_eq!(finished.usage, Usage { prompt_tokens: 7, cached_tokens: 0, completion_tokens: 1 });
    }

    #[test]
    fn a_finish_reason_or_done_is_enough_and_neither_is_not() {
        assert!(stream(&[STOP]).1.is_ok() && stream(&["[DONE]"]).1.is_ok());
        let (_, cut) = stream(&[&delta(r#"{"content":"a"}"#)]);
        assert!(matches!(cut, Err(Trouble::Failed(FailureKind::ConnectionLost, _))), "{cut:?}");
    }

    #[test]
    fn errors_within_the_stream_are_refusals_only_before_the_first_token() {
        let error = r#"{"error":{"code":400,"message":"no such grammar","type":"invalid_request_error"}}"#;
        let (_, before) = stream(&[error]);
        assert!(matches!(before, Err(Trouble::Refused(refused)) if refused.kind == RefusalKind::InvalidField));
        let (_, behind) = stream(&[&delta(r#"{"content":"a"}"#), error]);
        assert!(
            matches!(behind, Err(Trouble::Failed(FailureKind::EngineError, why)) if why.contains("no such grammar"))
        );
        let (_, lie) = stream(&["<html>"]);
        assert!(matches!(lie, Err(Trouble::Failed(FailureKind::Protocol, why)) if why.contains("box:80")));
    }

    #[test]
    fn members_without_end_are_refused() {
        let long = delta(&format!(r#"{{"x":"{}"}}"#, "x".repeat(EXTRA_LIMIT)));
        assert!(matches!(stream(&[&long]).1, Err(Trouble::Failed(FailureKind::Protocol, _))));
    }
}
