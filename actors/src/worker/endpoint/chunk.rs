//! One event of a streamed chat completion, read without a tree and, in the usual case, without an allocation.

use std::borrow::Cow;
use std::fmt;

use ingle_protocol::wire::v2::Usage;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::json::{Members, Text};

/// Members of a chunk that have no field in [`Chunk`], as they were written: `"name":value,` one behind the other.
/// Kept from chunk to chunk for its memory.
#[derive(Debug, Default)]
pub struct Extras {
    /// Of the delta.
    pub delta: Vec<u8>,
    /// Of the choice.
    pub choice: Vec<u8>,
    /// Of the usage.
    pub usage: Vec<u8>,
    /// Of the chunk itself.
    pub chunk: Vec<u8>,
}

/// What an event says.
#[derive(Debug, Default)]
pub struct Chunk<'a> {
    /// Text to add to the answer; empty for none.
    pub content: Cow<'a, str>,
    /// Why the answer is at its end.
    pub finish_reason: Option<Cow<'a, str>>,
    /// What it cost so far.
    pub usage: Option<Usage>,
    /// The far side's error.
    pub error: Option<&'a RawValue>,
}

impl<'a> Chunk<'a> {
    /// Reads an event; what has no field goes to `extras`, which is emptied before.
    pub fn parse(data: &'a [u8], extras: &mut Extras) -> Result<Self, serde_json::Error> {
        let Extras { delta, choice, usage, chunk } = &mut *extras;
        [delta, choice, usage, chunk].into_iter().for_each(Vec::clear);
        let mut read = Chunk::default();
        let mut deserializer = serde_json::Deserializer::from_slice(data);
        Part { level: Level::Chunk, extras, read: &mut read }.deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(read)
    }
}

/// Where in a chunk we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Chunk,
    Choices,
    Choice,
    Delta,
    Usage,
}

/// Reads one object of the chunk (or the array of its choices). `null` is the same as nothing.
struct Part<'s, 'de> {
    level: Level,
    extras: &'s mut Extras,
    read: &'s mut Chunk<'de>,
}

impl<'de> Part<'_, 'de> {
    fn within(&mut self, level: Level) -> Part<'_, 'de> {
        Part { level, extras: self.extras, read: self.read }
    }

    fn member<A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error> {
        match (self.level, name) {
            // The answer has an id, a time and a model's name of ours.
            (Level::Chunk, "id" | "object" | "created" | "model") => drop(map.next_value::<IgnoredAny>()?),
            (Level::Chunk, "choices") => map.next_value_seed(self.within(Level::Choices))?,
            (Level::Chunk, "usage") => map.next_value_seed(self.within(Level::Usage))?,
            (Level::Chunk, "error") => self.read.error = map.next_value::<Option<&RawValue>>()?,
            (Level::Choice, "index") => {
                if map.next_value::<Option<u64>>()?.unwrap_or(0) != 0 {
                    return Err(A::Error::custom("a second choice, which nobody asked for"));
                }
            }
            (Level::Choice, "delta") => map.next_value_seed(self.within(Level::Delta))?,
            (Level::Choice, "finish_reason") => {
                self.read.finish_reason = map.next_value::<Option<Text<'de>>>()?.map(|Text(reason)| reason);
            }
            (Level::Delta, "content") => {
                let value: &'de RawValue = map.next_value()?;
                if value.get().starts_with('"') {
                    let Text(text) = serde_json::from_str(value.get()).map_err(A::Error::custom)?;
                    self.read.content = text;
                } else {
                    add(&mut self.extras.delta, name, value);
                }
            }
            (Level::Delta, "role") => {
                let value: &'de RawValue = map.next_value()?;
                if value.get() != "\"assistant\"" {
                    add(&mut self.extras.delta, name, value);
                }
            }
            (Level::Usage, "prompt_tokens") => self.usage().prompt_tokens = count(map)?,
            (Level::Usage, "completion_tokens") => self.usage().completion_tokens = count(map)?,
            // The sum of the two.
            (Level::Usage, "total_tokens") => drop(map.next_value::<IgnoredAny>()?),
            (Level::Usage, "prompt_tokens_details") => {
                let value: &'de RawValue = map.next_value()?;
                let details = Members::parse(value.get().as_bytes()).unwrap_or_default();
                if let Some(cached) = details.get("cached_tokens") {
                    self.usage().cached_tokens = cached.get().parse().unwrap_or_default();
                }
                add(&mut self.extras.usage, name, value);
            }
            (level, name) => {
                let value: &'de RawValue = map.next_value()?;
                let extras = match level {
                    Level::Chunk => &mut self.extras.chunk,
                    Level::Choices | Level::Choice => &mut self.extras.choice,
                    Level::Delta => &mut self.extras.delta,
                    Level::Usage => &mut self.extras.usage,
                };
                add(extras, name, value);
            }
        }
        Ok(())
    }

    fn usage(&mut self) -> &mut Usage {
        self.read.usage.get_or_insert_default()
    }
}

/// A number of tokens; what is none counts as 0.
fn count<'de, A: MapAccess<'de>>(map: &mut A) -> Result<u32, A::Error> {
    let number = map.next_value::<&RawValue>()?.get().parse::<u64>().unwrap_or_default();
    Ok(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Adds a member that says something: `null` and an empty list do not.
fn add(extras: &mut Vec<u8>, name: &str, value: &RawValue) {
    if matches!(value.get(), "null" | "[]") {
        return;
    }
    // Writing a text into memory cannot fail.
    let _ = serde_json::to_writer(&mut *extras, name);
    extras.push(b':');
    extras.extend_from_slice(value.get().as_bytes());
    extras.push(b',');
}

impl<'de> DeserializeSeed<'de> for Part<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.level == Level::Choices { "an array" } else { "an object" })
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        // A chunk that is nothing is no chunk.
        if self.level == Level::Chunk { Err(E::custom("null is no chunk")) } else { Ok(()) }
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        if self.level != Level::Choices {
            return Err(A::Error::custom("an array where an object is due"));
        }
        while items.next_element_seed(self.within(Level::Choice))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        if self.level == Level::Choices {
            return Err(A::Error::custom("an object where an array is due"));
        }
        while let Some(Text(name)) = map.next_key::<Text<'de>>()? {
            self.member(&name, &mut map)?;
        }
        Ok(())
    }
}

/// The `extra` of a frame out of its parts; nothing where there is none. A part without members is left out, but for
/// a `chunk` that is there: it takes back what was said before.
pub fn pack(delta: &[u8], choice: &[u8], usage: &[u8], chunk: Option<&[u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    let full = |part| Some(part).filter(|part: &&[u8]| !part.is_empty());
    let parts = [("delta", full(delta)), ("choice", full(choice)), ("usage", full(usage)), ("chunk", chunk)];
    for (name, members) in parts.into_iter().filter_map(|(name, members)| Some((name, members?))) {
        out.push(if out.is_empty() { b'{' } else { b',' });
        out.push(b'"');
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\":{");
        // Without the last comma.
        out.extend_from_slice(&members[..members.len().saturating_sub(1)]);
        out.push(b'}');
    }
    if !out.is_empty() {
        out.push(b'}');
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(extras: &Extras) -> String {
        let Extras { delta, choice, usage, chunk } = extras;
        let chunk = Some(chunk.as_slice()).filter(|chunk| !chunk.is_empty());
        String::from_utf8(pack(delta, choice, usage, chunk)).unwrap()
    }

    fn extras_of(data: &str) -> String {
        let mut extras = Extras::default();
        Chunk::parse(data.as_bytes(), &mut extras).unwrap();
        packed(&extras)
    }

    #[test]
    fn the_usual_chunk_is_borrowed_and_leaves_nothing_over() {
        let data = br#"{"id":"x","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"logprobs":null,"finish_reason":null}],"usage":null}"#;
        let mut extras = Extras { delta: b"old".to_vec(), ..Extras::default() };
        let chunk = Chunk::parse(data, &mut extras).unwrap();
        assert!(matches!(chunk.content, Cow::Borrowed("hi")));
        assert!(chunk.finish_reason.is_none() && chunk.usage.is_none() && chunk.error.is_none());
        assert_eq!(packed(&extras), "");
    }

    #[test]
    fn what_has_no_field_is_kept_as_it_was_written() {
        let tools = r#"[{"index":0,"function":{"arguments":"{\"a\": 1.0}"}}]"#;
        assert_eq!(
            extras_of(&format!(
                r#"{{"choices":[{{"delta":{{"content":null,"tool_calls":{tools},"refusal":null}},"stop_reason":7}}],"system_fingerprint":"b1"}}"#
            )),
            format!(
                r#"{{"delta":{{"tool_calls":{tools}}},"choice":{{"stop_reason":7}},"chunk":{{"system_fingerprint":"b1"}}}}"#
            )
        );
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":99999999999,"total_tokens":1,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}"#;
        let read = Chunk::parse(usage.as_bytes(), &mut Extras::default()).unwrap().usage;
        assert_eq!(read, Some(Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: u32::MAX }));
        assert_eq!(
            extras_of(usage),
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}"#
        );
        assert_eq!(extras_of(r#"{"choices":null,"usage":null}"#), "");
    }

    #[test]
    fn lies_are_errors() {
        for data in [
            "",
            "null",
            "[]",
            "{",
            "\"x\"",
            "{} {}",
            r#"{"choices":{}}"#,
            r#"{"choices":[[]]}"#,
            r#"{"choices":[5]}"#,
            r#"{"choices":[{"index":1,"delta":{"content":"x"}}]}"#,
            r#"{"choices":[{"delta":{"content":"\ud800"}}]}"#,
            r#"{"choices":[{"delta":"x"}]}"#,
            r#"{"choices":[{"finish_reason":5}]}"#,
        ] {
            assert!(Chunk::parse(data.as_bytes(), &mut Extras::default()).is_err(), "{data}");
        }
    }

    proptest! {
        #[test]
        fn any_text_arrives_as_it_was(text: String) {
            let data = serde_json::json!({"choices": [{"delta": {"content": text, "reasoning": text}}]}).to_string();
            let mut extras = Extras::default();
            let chunk = Chunk::parse(data.as_bytes(), &mut extras).unwrap();
            prop_assert_eq!(&chunk.content, &text);
            let packed: serde_json::Value = serde_json::from_str(&packed(&extras)).unwrap();
            prop_assert_eq!(packed, serde_json::json!({"delta": {"reasoning": text}}));
        }

        #[test]
        fn no_bytes_make_it_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Chunk::parse(&data, &mut Extras::default());
        }
    }
}
