//! The body of a chat completion request. What we have no field for is neither taken and ignored nor refused here:
//! it travels to the engine as `extra`, and the engine honours it or refuses it by name.

use ingle_actors::protocol::raw_json;
use ingle_actors::protocol::wire::v2::{EXTRA_LIMIT, Message, Role, Sampling};
use serde_json::{Map, Value, json};

use super::ApiError;
use super::fields::{Fields, wrong_type};
use super::json;
use super::sampling::sampling;
use super::tools::{self, ToolUse};

/// The longest name of a model, in bytes.
const LONGEST_NAME: usize = 256;

/// A chat completion request, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// As the client wrote it; empty for none.
    pub model: String,
    /// At least one.
    pub messages: Vec<Message>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Answer as a stream of events.
    pub stream: bool,
    /// Say the usage at the end of the stream.
    pub include_usage: bool,
    /// What the client calls its user, for logs.
    pub user: Option<String>,
    /// It may be answered with calls of tools.
    pub tools: Option<ToolUse>,
    /// Members without a field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// Reads a request body. `random_seed` is taken where the client chose no seed.
pub fn parse(body: &[u8], random_seed: u64) -> Result<CompletionRequest, ApiError> {
    let text = std::str::from_utf8(body)
        .map_err(|error| ApiError::unreadable(format!("The request body is not UTF-8: {error}.")))?;
    let value = json::parse(text.as_bytes())
        .map_err(|error| ApiError::unreadable(format!("The request body is not valid JSON: {error}.")))?;
    let mut fields = Fields::new(value, "")?;

    let model = fields.text("model")?.unwrap_or_default();
    if model.len() > LONGEST_NAME {
        return Err(ApiError::invalid("model", format!("`model` is longer than {LONGEST_NAME} bytes.")));
    }
    let written = Written::new(text);
    let messages = messages(&mut fields, &written)?;
    let sampling = sampling(&mut fields, random_seed)?;
    let stream = fields.flag("stream")?.unwrap_or(false);
    let include_usage = include_usage(&mut fields, stream)?;
    // Who asks changes nothing about the answer: it is for logs only. So are hints for somebody else's cache.
    let user = fields.text("user")?.or(fields.text("safety_identifier")?);
    fields.text("prompt_cache_key")?;
    let rest = without_no_ops(fields.rest());
    let tools = tools::wanted(&rest)?;
    let extra = written.extra(&rest, "")?;
    Ok(CompletionRequest { model, messages, sampling, stream, include_usage, user, tools, extra })
}

fn messages(fields: &mut Fields, written: &Written<'_>) -> Result<Vec<Message>, ApiError> {
    let items = match fields.take("messages") {
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("messages", "an array", &other)),
        None => return Err(ApiError::invalid("messages", "`messages` is missing: write at least one message.")),
    };
    if items.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty: write at least one message."));
    }
    let written = raw_json::items(written.member("messages"));
    let written = written.into_iter().map(Written::new).chain(std::iter::repeat_with(|| Written::new("{}")));
    let numbered = items.into_iter().enumerate().zip(written);
    numbered.map(|((index, item), written)| message(item, &written, format!("messages[{index}]"))).collect()
}

fn message(value: Value, written: &Written<'_>, path: String) -> Result<Message, ApiError> {
    let mut fields = Fields::new(value, path.clone())?;
    let role_path = fields.path_of("role");
    let role = match fields.text("role")?.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some(other) => {
            let other: String = other.chars().take(80).collect();
            let message =
                format!("`{role_path}` is `{other}`: it must be one of system, developer, user, assistant and tool.");
            return Err(ApiError::invalid(role_path, message));
        }
        None => return Err(ApiError::invalid(role_path.clone(), format!("`{role_path}` is missing."))),
    };
    let content_path = fields.path_of("content");
    let content = fields.take("content");
    let mut rest = fields.rest();
    // Empty lists say the same as no member.
    rest.retain(|name, value| {
        !(matches!(name.as_str(), "tool_calls" | "annotations") && value.as_array().is_some_and(Vec::is_empty))
    });
    let content = match content {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) if parts.iter().any(is_no_text) => {
            // Images and the like: only a worker knows whether its model can read them.
            let text = text_of_parts(parts.iter().filter(|part| !is_no_text(part)).cloned().collect(), &content_path)?;
            rest.insert("content".into(), Value::Array(parts));
            text
        }
        Some(Value::Array(parts)) => text_of_parts(parts, &content_path)?,
        Some(other) => return Err(wrong_type(content_path, "a string or an array of text parts", &other)),
        // An answer that consisted of tool calls has no text.
        None if role == Role::Assistant && rest.contains_key("tool_calls") => String::new(),
        None => {
            let message = format!("`{content_path}` is missing: it must be a string or an array of text parts.");
            return Err(ApiError::invalid(content_path, message));
        }
    };
    tools::check_message(role, &rest, &path)?;
    Ok(Message { role, content, extra: written.extra(&rest, &path)? })
}

/// A part of a message that says itself that it is none of text.
fn is_no_text(part: &Value) -> bool {
    part.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "text")
}

/// The texts of all parts, a line break between them.
fn text_of_parts(parts: Vec<Value>, path: &str) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::new(part, format!("{path}[{index}]"))?;
        let type_path = fields.path_of("type");
        match fields.text("type")?.as_deref() {
            Some(_) => {}
            None => return Err(ApiError::invalid(type_path.clone(), format!("`{type_path}` is missing."))),
        }
        let text_path = fields.path_of("text");
        let text = fields.text("text")?;
        texts.push(text.ok_or_else(|| ApiError::invalid(text_path.clone(), format!("`{text_path}` is missing.")))?);
        refuse_rest(fields)?;
    }
    Ok(texts.join("\n"))
}

fn refuse_rest(fields: Fields) -> Result<(), ApiError> {
    let path = fields.path_of("");
    match fields.rest().into_iter().next() {
        None => Ok(()),
        Some((name, _)) => {
            let path = format!("{path}{}", name.chars().take(80).collect::<String>());
            let message = format!("`{path}` is not supported.");
            Err(ApiError::unsupported(path, message))
        }
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "`stream_options` needs `stream` to be true."));
    }
    let mut options = Fields::new(value, "stream_options")?;
    let include = options.flag("include_usage")?.unwrap_or(false);
    if options.flag("include_obfuscation")?.unwrap_or(false) {
        let path = "stream_options.include_obfuscation";
        return Err(ApiError::unsupported(path, format!("`{path}` is not supported.")));
    }
    refuse_rest(options)?;
    Ok(include)
}

/// Members with the value that they have anyway say nothing: they are dropped, so that client libraries that
/// always send them work. All others stay.
fn without_no_ops(mut members: Map<String, Value>) -> Map<String, Value> {
    if members.is_empty() {
        return members;
    }
    let table = [
        ("n", json!([1])),
        ("tools", json!([[]])),
        ("functions", json!([[]])),
        ("response_format", json!([{"type": "text"}])),
        ("modalities", json!([["text"]])),
        ("service_tier", json!(["auto", "default"])),
        ("store", json!([false])),
        ("metadata", json!([{}])),
        ("verbosity", json!(["medium"])),
    ];
    for (name, values) in table {
        let same = |value: &Value| values.as_array().is_some_and(|v| v.iter().any(|no_op| equal(value, no_op)));
        if members.get(name).is_some_and(same) {
            members.remove(name);
        }
    }
    // These say something only about tools.
    if !members.contains_key("tools") && members.get("tool_choice").is_some_and(|v| v == "none" || v == "auto") {
        members.remove("tool_choice");
    }
    if !members.contains_key("functions") && members.get("function_call").is_some_and(|v| v == "none" || v == "auto") {
        members.remove("function_call");
    }
    if !members.contains_key("tools") && members.get("parallel_tool_calls").is_some_and(Value::is_boolean) {
        members.remove("parallel_tool_calls");
    }
    members
}

/// Equal as JSON means it: 0 is 0.0.
fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The members of an object as the client wrote them. What travels on keeps their order and the digits of their
/// numbers: models are trained on descriptions of tools that begin with their names.
struct Written<'t> {
    members: Vec<(String, &'t str)>,
}

impl<'t> Written<'t> {
    /// Of JSON that was read without an error.
    fn new(object: &'t str) -> Self {
        let name = |written: &str| serde_json::from_str(written).unwrap_or_default();
        Self { members: raw_json::members(object).into_iter().map(|(key, value)| (name(key), value)).collect() }
    }

    /// One of them; nothing where it is not there.
    fn member(&self, name: &str) -> &'t str {
        self.members.iter().find(|(known, _)| known == name).map_or("", |(_, value)| *value)
    }

    /// Those that are left, as bytes. `path` is where the object stands; empty for the whole request.
    fn extra(&self, rest: &Map<String, Value>, path: &str) -> Result<Vec<u8>, ApiError> {
        let mut left = self.members.iter().filter(|(name, _)| rest.contains_key(name)).peekable();
        let Some((first, _)) = left.peek() else { return Ok(vec![]) };
        let first: String = first.chars().take(80).collect();
        let members: Vec<String> =
            left.map(|(name, value)| format!("{}:{value}", Value::from(name.as_str()))).collect();
        let bytes = format!("{{{}}}", members.join(",")).into_bytes();
        // An image is as long as it is: the limit of the whole body holds for it.
        let has_parts = !path.is_empty() && rest.contains_key("content");
        if bytes.len() > EXTRA_LIMIT && !has_parts {
            let param = if path.is_empty() { first } else { format!("{path}.{first}") };
            let message =
                format!("`{param}` and the other less common fields are longer than {} KiB.", EXTRA_LIMIT >> 10);
            return Err(ApiError::invalid(param, message));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
