//! How models call tools: which text means a call depends on the family, and the chat template shows the family.
//!
//! [`ToolFormat::of_template`] recognises it; the engine announces it among its features, and whoever writes answers
//! for clients reads calls out of the text with a [`ToolCallParser`].

use ingle_protocol::raw_json::{self, Extent};
use serde::de::IgnoredAny;

#[cfg(test)]
mod tests;

/// The most bytes of one call (or one list of calls): more is taken for text.
const LONGEST_CALL: usize = 256 << 10;
/// What a feature that names a format begins with.
const FEATURE: &str = "tools:";

/// The text that means a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, for each call: Hermes, Qwen 2.5, Qwen 3.
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, or behind `<|python_tag|>`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral up to Nemo.
    Mistral,
    /// `<|tool_call|>[{"name": …, "arguments": {…}}, …]<|/tool_call|>`: Phi-4-mini.
    Phi4,
}

/// What a chat template knows of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolSupport {
    /// It has no place for them.
    None,
    /// It has, but how the model calls them is not known here.
    Unknown,
    /// It has, and calls look like this.
    Known(ToolFormat),
}

impl ToolSupport {
    /// From the source of a chat template.
    pub fn of_template(source: &str) -> Self {
        let has = |part: &str| source.contains(part);
        let names_tools = source.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "tools");
        match () {
            () if !names_tools => Self::None,
            // Qwen 3 Coder writes XML into the same mark, newer Mistrals names outside of the JSON.
            () if has("<function=") || has("[ARGS]") => Self::Unknown,
            () if has("<tool_call>") => Self::Known(ToolFormat::Hermes),
            () if has("[TOOL_CALLS]") => Self::Known(ToolFormat::Mistral),
            () if has("<|tool_call|>") || has("<|tool|>") => Self::Known(ToolFormat::Phi4),
            () if has("<|start_header_id|>") && has("\"parameters\"") => Self::Known(ToolFormat::Llama3),
            () => Self::Unknown,
        }
    }
}

impl ToolFormat {
    const ALL: [Self; 4] = [Self::Hermes, Self::Llama3, Self::Mistral, Self::Phi4];

    /// The feature with which an engine announces it.
    pub fn feature(self) -> String {
        let name = match self {
            Self::Hermes => "hermes",
            Self::Llama3 => "llama3",
            Self::Mistral => "mistral",
            Self::Phi4 => "phi4",
        };
        format!("{FEATURE}{name}")
    }

    /// The format among an engine's features.
    pub fn among(features: &[String]) -> Option<Self> {
        Self::ALL.into_iter().find(|format| features.contains(&format.feature()))
    }

    /// What a call begins with. It may be a control token, whose text is part of answers all the same.
    pub fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama3 => "<|python_tag|>",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Phi4 => "<|tool_call|>",
        }
    }

    /// What stands behind a call, if anything does; models leave it out now and then.
    pub fn close(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("</tool_call>"),
            Self::Phi4 => Some("<|/tool_call|>"),
            Self::Llama3 | Self::Mistral => None,
        }
    }

    /// The first character of a call's JSON: one call, or a list.
    fn opening(self) -> char {
        match self {
            Self::Hermes | Self::Llama3 => '{',
            Self::Mistral | Self::Phi4 => '[',
        }
    }
}

/// A call that a model asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// Its arguments: a JSON object as the model wrote it.
    pub arguments: String,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerPart {
    /// Text; never empty.
    Text(String),
    /// A call, whole.
    Call(ToolCall),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Start,
    Text,
    /// A call may begin at `head` bytes of the buffer, which stand in front of its JSON.
    Call {
        head: usize,
        bare: bool,
    },
    /// Behind a call.
    After,
}

/// Reads calls out of an answer as it comes. What it gives does not depend on how the text is cut. Text is held back
/// only where it may be the beginning of a call; a call that turns out to be none is text.
#[derive(Debug)]
pub struct ToolCallParser {
    format: ToolFormat,
    state: State,
    /// What is not decided yet.
    buffer: String,
    /// How far the JSON behind `head` has been looked at.
    extent: Extent,
    parts: Vec<AnswerPart>,
}

impl ToolCallParser {
    /// For a model's answers.
    pub fn new(format: ToolFormat) -> Self {
        let (state, extent) = (State::Start, Extent::default());
        Self { format, state, buffer: String::new(), extent, parts: Vec::new() }
    }

    /// Takes more text; returns what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        self.buffer.push_str(text);
        while self.step(false) {}
        std::mem::take(&mut self.parts)
    }

    /// The rest: no more text comes.
    pub fn finish(&mut self) -> Vec<AnswerPart> {
        while self.step(true) {}
        std::mem::take(&mut self.parts)
    }

    fn say(&mut self, bytes: usize) {
        let text: String = self.buffer.drain(..bytes).collect();
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(AnswerPart::Text(before)) => before.push_str(&text),
            _ => self.parts.push(AnswerPart::Text(text)),
        }
    }

    fn expect_call(&mut self, head: usize, bare: bool) -> bool {
        (self.state, self.extent) = (State::Call { head, bare }, Extent::default());
        true
    }

    /// Decides something, or returns false where more text is needed (or, at the `end`, where nothing is left).
    fn step(&mut self, end: bool) -> bool {
        match self.state {
            State::Start => self.start(end),
            State::Text => self.text(end),
            State::Call { head, bare } => self.call(head, bare, end),
            State::After => self.after(end),
        }
    }

    fn start(&mut self, end: bool) -> bool {
        let (mark, begun) = (self.format.mark(), self.buffer.trim_start());
        let space = self.buffer.len() - begun.len();
        if begun.starts_with(mark) {
            return self.expect_call(space + mark.len(), false);
        }
        if self.format == ToolFormat::Llama3 && begun.starts_with('{') {
            return self.expect_call(space, true);
        }
        if mark.starts_with(begun) && !end {
            return false;
        }
        self.state = State::Text;
        true
    }

    fn text(&mut self, end: bool) -> bool {
        let mark = self.format.mark();
        if let Some(at) = self.buffer.find(mark) {
            self.say(at);
            return self.expect_call(mark.len(), false);
        }
        let held = if end { 0 } else { held_back(&self.buffer, mark) };
        self.say(self.buffer.len() - held);
        false
    }

    fn call(&mut self, head: usize, bare: bool, end: bool) -> bool {
        let body = &self.buffer[head..];
        let json = body.trim_start();
        let space = body.len() - json.len();
        if json.is_empty() && !end && body.len() <= LONGEST_CALL {
            return false;
        }
        if !json.starts_with(self.format.opening()) || bare && !may_be_call(json) {
            return self.no_call(head, bare);
        }
        match self.extent.end(json) {
            Some(length) if space + length <= LONGEST_CALL => match calls_of(&json[..length], bare) {
                Some(calls) => {
                    self.buffer.drain(..head + space + length);
                    self.parts.extend(calls.into_iter().map(AnswerPart::Call));
                    self.state = State::After;
                    true
                }
                None => self.no_call(head, bare),
            },
            None if !end && body.len() <= LONGEST_CALL => false,
            _ => self.no_call(head, bare),
        }
    }

    /// What looked like a call is text; there may be one further on.
    fn no_call(&mut self, head: usize, bare: bool) -> bool {
        // A bare one is only possible where an answer begins, so this cannot come back to it.
        self.say(if bare { 0 } else { head });
        self.state = State::Text;
        true
    }

    fn after(&mut self, end: bool) -> bool {
        let rest = self.buffer.trim_start();
        let space = self.buffer.len() - rest.len();
        self.buffer.drain(..space);
        let rest = self.buffer.as_str();
        if rest.is_empty() {
            return false;
        }
        if let Some(close) = self.format.close() {
            if rest.starts_with(close) {
                self.buffer.drain(..close.len());
                return true;
            }
            if close.starts_with(rest) && !end {
                return false;
            }
        }
        if self.format == ToolFormat::Llama3 {
            if rest.starts_with(';') {
                self.buffer.drain(..1);
                return true;
            }
            if rest.starts_with('{') {
                return self.expect_call(0, true);
            }
        }
        self.state = State::Text;
        true
    }
}

/// Bytes at the end of `text` that may be the beginning of `mark`.
fn held_back(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len() - 1);
    (1..=longest).rev().find(|length| text.as_bytes().ends_with(&mark.as_bytes()[..*length])).unwrap_or(0)
}

/// JSON without a mark may still be a call: its first member is one that calls begin with.
fn may_be_call(json: &str) -> bool {
    let first = json[1..].trim_start();
    ["\"name\"", "\"type\"", "\"function\""].iter().any(|name| name.starts_with(first) || first.starts_with(name))
}

/// The calls in one object or one array of objects; `None` where any of it is none.
fn calls_of(json: &str, bare: bool) -> Option<Vec<ToolCall>> {
    serde_json::from_str::<IgnoredAny>(json).ok()?;
    if json.starts_with('{') {
        return Some(vec![call_of(json, bare)?]);
    }
    let calls = raw_json::items(json).into_iter().map(|item| call_of(item, bare)).collect::<Option<Vec<_>>>()?;
    (!calls.is_empty()).then_some(calls)
}

fn call_of(object: &str, bare: bool) -> Option<ToolCall> {
    let members = raw_json::members(object);
    let member = |name: &str| {
        let is = |written: &str| serde_json::from_str::<String>(written).is_ok_and(|written| written == name);
        members.iter().find(|(written, _)| is(written)).map(|(_, value)| *value)
    };
    let name = member("name").and_then(|name| serde_json::from_str::<String>(name).ok());
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        // As OpenAI's requests have it.
        let inner = member("function").filter(|function| function.starts_with('{') && function.len() < object.len());
        return call_of(inner?, bare);
    };
    let arguments = match member("arguments").or_else(|| member("parameters")) {
        Some(object) if object.starts_with('{') => object.to_owned(),
        Some(text) if text.starts_with('"') => {
            let text = serde_json::from_str::<String>(text).ok()?;
            let is_object = text.trim_start().starts_with('{') && serde_json::from_str::<IgnoredAny>(&text).is_ok();
            is_object.then_some(text)?
        }
        // Behind a mark it is a call all the same; any JSON with a name is not.
        None | Some("null") if !bare => "{}".into(),
        _ => return None,
    };
    Some(ToolCall { name, arguments })
}
