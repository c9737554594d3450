//! The events of an answer as our frames. No I/O, no clock.

use std::borrow::Cow;

use ingle_protocol::wire::v2::{
    EXTRA_LIMIT, FailureKind, FinishReason, Finished, Load, NO_TOKEN_ID, Request, Token, Usage,
};

use super::chunk::{Chunk, Extras, pack};
use super::errors::{FarError, Trouble};

/// What stands behind the last chunk.
const DONE: &[u8] = b"[DONE]";

/// What was said of an answer before it came here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Behind {
    /// Tokens of it.
    pub position: u32,
    /// Spaces and line ends at its end. Templates trim them away, so they are not sent, and left out where the answer
    /// says them again.
    pub spaces: String,
}

impl Behind {
    /// What the request says was said, without the spaces at its end, and where the answer goes on.
    pub fn split(request: &Request) -> (String, Self) {
        let mut text = String::from_utf8_lossy(&request.resume_text).into_owned();
        let spaces = text.split_off(text.trim_end().len());
        (text, Self { position: u32::try_from(request.resume.len()).unwrap_or(u32::MAX), spaces })
    }

    /// Where the answer goes on.
    pub fn of(request: &Request) -> Self {
        Self::split(request).1
    }
}

/// An answer as far as it has come.
#[derive(Debug)]
pub struct AnswerStream {
    /// `host:port`, for messages.
    endpoint: String,
    position: u32,
    /// Tokens that were said elsewhere.
    resumed: u32,
    /// See [`Behind::spaces`]; what is left of them.
    spaces: String,
    extras: Extras,
    /// Members of the chunk itself as the reader of our frames has them.
    told: Vec<u8>,
    end: Option<End>,
    usage: Usage,
    /// The far side said it.
    is_counted: bool,
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
    pub fn new(endpoint: &str, prompt_tokens: u32, behind: Behind) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            position: behind.position,
            resumed: behind.position,
            spaces: behind.spaces,
            extras: Extras::default(),
            told: Vec::new(),
            end: None,
            usage: Usage { prompt_tokens, ..Usage::default() },
            is_counted: false,
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

    /// The text without spaces that the client has already.
    fn without_spaces<'a>(&mut self, text: Cow<'a, str>) -> Cow<'a, str> {
        if self.spaces.is_empty() || text.is_empty() {
            return text;
        }
        let same = text.chars().zip(self.spaces.chars()).take_while(|(new, old)| new == old);
        let same: usize = same.map(|(c, _)| c.len_utf8()).sum();
        if same == text.len() {
            self.spaces.drain(..same);
            return Cow::Borrowed("");
        }
        self.spaces.clear();
        Cow::Owned(text[same..].to_owned())
    }

    fn understand(&mut self, mut chunk: Chunk<'_>, extras: &mut Extras) -> Result<Option<Token>, Trouble> {
        chunk.content = self.without_spaces(std::mem::take(&mut chunk.content));
        if let Some(error) = chunk.error {
            return Err(self.far_error(error.get()));
        }
        if let Some(usage) = chunk.usage {
            (self.usage, self.is_counted) = (usage, true);
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
            Some(status) if self.position == self.resumed => {
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
        } else {
            usage.completion_tokens = usage.completion_tokens.saturating_add(self.resumed);
        }
        if self.is_counted {
            // What was said before stood in the prompt there.
            usage.prompt_tokens = usage.prompt_tokens.saturating_sub(self.resumed);
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
        behind(Behind::default(), events)
    }

    fn behind(behind: Behind, events: &[&str]) -> (Vec<(String, String)>, Result<Finished, Trouble>) {
        let first = behind.position;
        let mut stream = AnswerStream::new("box:80", 7, behind);
        let mut tokens = Vec::new();
        for event in events {
            match stream.take(event.as_bytes()) {
                Ok(None) => {}
                Ok(Some(token)) => {
                    assert_eq!((token.position, token.id), (first + tokens.len() as u32, NO_TOKEN_ID));
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
    fn an_answer_that_was_begun_elsewhere_goes_on_without_a_space_too_many() {
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2}}"#;
        let text = |text: &str| delta(&serde_json::json!({ "content": text }).to_string());
        for (spaces, pieces, expected) in [
            (" ", &[" two", " three"][..], "two three"),
            ("\n\n", &["\n", "\nTwo"], "Two"),
            ("\n\n", &["\nTwo"], "Two"),
            (" ", &["two", " three"], "two three"),
            ("", &[" two"], " two"),
            ("\u{3000} ", &["\u{3000}", "  two"], " two"),
        ] {
            let events: Vec<String> = pieces.iter().map(|piece| text(piece)).collect();
            let mut events: Vec<&str> = events.iter().map(String::as_str).collect();
            events.extend([STOP, usage, "[DONE]"]);
            let (tokens, finished) = behind(Behind { position: 3, spaces: spaces.into() }, &events);
            assert_eq!(tokens.iter().map(|(text, _)| text.as_str()).collect::<String>(), expected, "{pieces:?}");
            let usage = finished.unwrap().usage;
            assert_eq!((usage.prompt_tokens, usage.completion_tokens), (7, 5), "{pieces:?}");
        }
        // What it refuses is a refusal as long as it has said nothing itself.
        let error = r#"{"error":{"code":400,"message":"no such thing"}}"#;
        let (_, refused) = behind(Behind { position: 3, spaces: String::new() }, &[error]);
        assert!(matches!(refused, Err(Trouble::Refused(_))), "{refused:?}");
    }

    #[test]
    fn members_without_end_are_refused() {
        let long = delta(&format!(r#"{{"x":"{}"}}"#, "x".repeat(EXTRA_LIMIT)));
        assert!(matches!(stream(&[&long]).1, Err(Trouble::Failed(FailureKind::Protocol, _))));
    }
}
