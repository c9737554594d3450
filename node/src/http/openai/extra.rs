//! What an endpoint said and our frames have no field for: read where it is written out again.

use std::borrow::Cow;

use ingle_actors::json::Members;
use ingle_actors::protocol::wire::v2::Usage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The `extra` of a frame, by the place that its members belong to.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Extra<'a> {
    /// Of the message.
    #[serde(borrow)]
    pub delta: Members<'a>,
    /// Of the choice.
    #[serde(borrow)]
    pub choice: Members<'a>,
    /// Of the usage.
    #[serde(borrow)]
    pub usage: Members<'a>,
    /// Of the completion itself; `None` where that does not change.
    #[serde(borrow)]
    pub chunk: Option<Members<'a>>,
}

impl<'a> Extra<'a> {
    /// Reads it; what another node sent and is not of this form counts as nothing.
    pub fn read(json: &'a [u8]) -> Self {
        if json.is_empty() {
            return Self::default();
        }
        serde_json::from_slice(json).unwrap_or_else(|error| {
            tracing::warn!(%error, "members of an answer that cannot be read are left out");
            Self::default()
        })
    }
}

/// What an answer cost, as OpenAI writes it.
#[derive(Debug, Serialize)]
pub struct UsageBody<'a> {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
    #[serde(flatten)]
    more: Members<'a>,
}

#[derive(Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl<'a> UsageBody<'a> {
    /// `more` is what an endpoint said beside it.
    pub fn new(usage: Usage, more: Members<'a>) -> Self {
        let details = PromptTokensDetails { cached_tokens: usage.cached_tokens };
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: (!more.has("prompt_tokens_details")).then_some(details),
            more,
        }
    }
}

/// The members of all frames of an answer, put together as they stand in a whole answer.
#[derive(Debug, Default)]
pub struct Gathered {
    message: Map<String, Value>,
    choice: Map<String, Value>,
    completion: Map<String, Value>,
}

impl Gathered {
    /// One more frame.
    pub fn add(&mut self, extra: &Extra<'_>) {
        let all = [(&extra.delta, &mut self.message), (&extra.choice, &mut self.choice)];
        for (members, gathered) in all {
            for (name, value) in &members.0 {
                // It was read as JSON before.
                let Ok(value) = serde_json::from_str(value.get()) else { continue };
                match gathered.get_mut(&**name) {
                    Some(known) => join(name, known, value),
                    None => drop(gathered.insert(name.to_string(), value)),
                }
            }
        }
        for (name, value) in extra.chunk.iter().flat_map(|chunk| &chunk.0) {
            if let Ok(value) = serde_json::from_str(value.get()) {
                self.completion.insert(name.to_string(), value);
            }
        }
    }

    /// Members of the choice, of the completion and of the message, without those that are always ours. Pieces of
    /// lists that were numbered (tool calls) lose their numbers.
    pub fn into_parts(mut self) -> (Map<String, Value>, Map<String, Value>, Map<String, Value>) {
        self.message.remove("role");
        for ours in ["index", "message"] {
            self.choice.remove(ours);
        }
        for ours in ["id", "object", "created", "model", "choices", "usage"] {
            self.completion.remove(ours);
        }
        for items in self.message.values_mut().filter_map(Value::as_array_mut) {
            for item in items.iter_mut().filter_map(Value::as_object_mut) {
                item.remove("index");
            }
        }
        (self.choice, self.completion, self.message)
    }
}

/// Adds a piece to what is known, as clients do that read a stream: texts go on, objects are joined member by
/// member, pieces of a list by their `index`. What names or counts something is not added up but replaced.
fn join(name: &str, known: &mut Value, piece: Value) {
    match (known, piece) {
        (_, Value::Null) => {}
        (Value::String(known), Value::String(piece)) if !matches!(name, "id" | "type" | "name" | "role") => {
            known.push_str(&piece);
        }
        (Value::Object(known), Value::Object(piece)) => {
            for (name, value) in piece {
                match known.get_mut(&name) {
                    Some(known) => join(&name, known, value),
                    None => drop(known.insert(name, value)),
                }
            }
        }
        (Value::Array(known), Value::Array(pieces)) => {
            for piece in pieces {
                let index = piece.get("index").and_then(Value::as_u64);
                let same = index.and_then(|index| {
                    known.iter_mut().find(|item| item.get("index").and_then(Value::as_u64) == Some(index))
                });
                match same {
                    Some(item) => join("", item, piece),
                    None => known.push(piece),
                }
            }
        }
        (known, piece) => *known = piece,
    }
}

/// A text out of frames, whatever they carried.
pub fn text_of(bytes: Vec<u8>) -> String {
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => match String::from_utf8_lossy(error.as_bytes()) {
            Cow::Borrowed(text) => text.to_owned(),
            Cow::Owned(text) => text,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pieces_of_tool_calls_become_whole_ones() {
        let mut gathered = Gathered::default();
        for extra in [
            json!({"delta": {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
                   "chunk": {"system_fingerprint": "b1"}}),
            json!({"delta": {"tool_calls": [{"index": 0, "id": "c1", "function": {"arguments": "{\"a\""}}], "reasoning_content": "I "}}),
            json!({"delta": {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}}]}}),
            json!({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}], "reasoning_content": "think"}}),
            json!({"choice": {"logprobs": {"content": [{"token": "a"}]}}}),
            json!({"choice": {"logprobs": {"content": [{"token": "b"}]}, "finish_reason": "tool_calls"}, "chunk": {"timings": 1}}),
        ] {
            gathered.add(&Extra::read(extra.to_string().as_bytes()));
        }
        let (choice, completion, message) = gathered.into_parts();
        assert_eq!(Value::from(completion), json!({"system_fingerprint": "b1", "timings": 1}));
        assert_eq!(
            Value::from(choice),
            json!({"logprobs": {"content": [{"token": "a"}, {"token": "b"}]}, "finish_reason": "tool_calls"})
        );
        assert_eq!(
            Value::from(message),
            json!({"reasoning_content": "I think", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}},
                {"id": "c2", "function": {"name": "g", "arguments": "{}"}},
            ]})
        );
    }

    #[test]
    fn what_is_no_object_counts_as_nothing() {
        for json in ["", "[]", "{", r#"{"delta":5}"#, r#"{"other":{}}"#] {
            let extra = Extra::read(json.as_bytes());
            assert!(extra.delta.0.is_empty() && extra.chunk.is_none(), "{json}");
        }
    }
}
