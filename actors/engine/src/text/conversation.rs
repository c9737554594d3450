//! What a chat template is given: messages and tools, with all members that the client sent.

use ingle_protocol::wire::v2::Message;
use minijinja::value::{Value, ValueKind};

use super::PromptError;

/// A conversation as values of a template.
#[derive(Debug, Clone)]
pub struct Conversation {
    /// Objects with `role`, `content` and what else the client sent (`tool_calls`, `tool_call_id`, `name`).
    pub(super) messages: Value,
    /// The request's `tools`; none where the model is not to use any.
    pub(super) tools: Value,
}

impl Conversation {
    /// From a request's messages and its further members, which are a JSON object or empty. The order of members is
    /// kept: models were trained on descriptions of tools that begin with their names.
    pub fn new(messages: &[Message], extra: &[u8]) -> Result<Self, PromptError> {
        let request = members(extra, "extra")?;
        let member = |name: &str| request.get_attr(name).unwrap_or_default();
        let unwanted = member("tool_choice").as_str() == Some("none");
        let tools = member("tools");
        let has_tools = !unwanted && tools.kind() == ValueKind::Seq && tools.len() != Some(0);
        let messages = messages
            .iter()
            .enumerate()
            .map(|(index, message)| value_of(message, index))
            .collect::<Result<Vec<Value>, _>>()?;
        Ok(Self { messages: Value::from(messages), tools: if has_tools { tools } else { Value::from(()) } })
    }

    /// Something is true of one of its texts.
    pub(super) fn any_text(&self, is: &dyn Fn(&str) -> bool) -> bool {
        any_text(&self.messages, is) || any_text(&self.tools, is)
    }

    /// Replaces all texts.
    pub(super) fn change_texts(&mut self, change: &dyn Fn(&str) -> String) {
        self.messages = with_texts(&self.messages, change);
        self.tools = with_texts(&self.tools, change);
    }
}

/// A JSON object of the wire.
fn members(json: &[u8], what: &str) -> Result<Value, PromptError> {
    if json.is_empty() {
        return Ok(Value::from_pairs(std::iter::empty::<(Value, Value)>()));
    }
    let value: Value = serde_json::from_slice(json).map_err(|why| PromptError(format!("{what}: not JSON: {why}")))?;
    if value.kind() == ValueKind::Map { Ok(value) } else { Err(PromptError(format!("{what}: not a JSON object"))) }
}

fn value_of(message: &Message, index: usize) -> Result<Value, PromptError> {
    let extra = members(&message.extra, &format!("messages[{index}]"))?;
    let mut pairs = vec![
        (Value::from("role"), Value::from(message.role.as_str())),
        (Value::from("content"), Value::from(message.content.as_str())),
    ];
    for (name, value) in pairs_of(&extra) {
        match name.as_str() {
            Some("role" | "content") => {}
            // Templates ask whether a member is there, not whether it is null.
            _ if value.is_none() => {}
            Some("tool_calls") => pairs.push((name, with_parsed_arguments(&value))),
            _ => pairs.push((name, value)),
        }
    }
    Ok(Value::from_pairs(pairs))
}

/// OpenAI's clients send a call's arguments as JSON inside of a text; templates expect the object.
fn with_parsed_arguments(calls: &Value) -> Value {
    let parsed = |arguments: Value| {
        let object = arguments.as_str().and_then(|json| serde_json::from_str::<Value>(json).ok());
        object.filter(|object| object.kind() == ValueKind::Map).unwrap_or(arguments)
    };
    let inside = |value: Value, name: &str, change: &dyn Fn(Value) -> Value| match value.kind() {
        ValueKind::Map => {
            Value::from_pairs(pairs_of(&value).into_iter().map(|(key, value)| match key.as_str() == Some(name) {
                true => (key, change(value)),
                false => (key, value),
            }))
        }
        _ => value,
    };
    items_of(calls)
        .map(|calls| {
            let call = |call| inside(call, "function", &|function| inside(function, "arguments", &parsed));
            calls.into_iter().map(call).collect::<Value>()
        })
        .unwrap_or_else(|| calls.clone())
}

fn any_text(value: &Value, is: &dyn Fn(&str) -> bool) -> bool {
    match value.as_str() {
        Some(text) => is(text),
        None if value.kind() == ValueKind::Map => {
            pairs_of(value).iter().any(|(name, value)| any_text(name, is) || any_text(value, is))
        }
        None => items_of(value).is_some_and(|items| items.iter().any(|item| any_text(item, is))),
    }
}

fn with_texts(value: &Value, change: &dyn Fn(&str) -> String) -> Value {
    match value.as_str() {
        Some(text) => Value::from(change(text)),
        None if value.kind() == ValueKind::Map => Value::from_pairs(
            pairs_of(value).iter().map(|(name, value)| (with_texts(name, change), with_texts(value, change))),
        ),
        None => match items_of(value) {
            Some(items) => items.iter().map(|item| with_texts(item, change)).collect(),
            None => value.clone(),
        },
    }
}

fn items_of(value: &Value) -> Option<Vec<Value>> {
    (value.kind() == ValueKind::Seq).then(|| value.try_iter().ok()).flatten().map(Iterator::collect)
}

fn pairs_of(value: &Value) -> Vec<(Value, Value)> {
    let pair = |name: Value| {
        let value = value.get_item(&name).unwrap_or_default();
        (name, value)
    };
    value.try_iter().map(|names| names.map(pair).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ingle_protocol::wire::v2::Role;

    fn assistant(extra: &str) -> Message {
        Message { role: Role::Assistant, content: "c".into(), extra: extra.into() }
    }

    #[test]
    fn members_keep_their_order_and_arguments_become_objects() {
        let extra = r#"{"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"b\":1,\"a\":[true]}"}},{"function":{"arguments":"no json"}}],"role":"x","name":null}"#;
        let conversation = Conversation::new(&[assistant(extra)], b"").unwrap();
        let json = serde_json::to_string(&conversation.messages).unwrap();
        let calls = r#"[{"id":"1","type":"function","function":{"name":"f","arguments":{"b":1,"a":[true]}}},{"function":{"arguments":"no json"}}]"#;
        assert_eq!(json, format!(r#"[{{"role":"assistant","content":"c","tool_calls":{calls}}}]"#));
        assert!(conversation.tools.is_none());
    }

    #[test]
    fn tools_are_there_unless_they_are_unwanted() {
        let tools = |extra: &str| Conversation::new(&[], extra.as_bytes()).unwrap().tools;
        assert_eq!(tools(r#"{"tools":[{"z":1,"a":2}]}"#).to_string(), "[{'z': 1, 'a': 2}]");
        for none in [r#"{"tools":[1],"tool_choice":"none"}"#, r#"{"tools":[]}"#, r#"{"tools":null}"#, r#"{"n":1}"#] {
            assert!(tools(none).is_none(), "{none}");
        }
        assert!(Conversation::new(&[], b"[1]").unwrap_err().0.contains("extra: not a JSON object"));
        assert!(Conversation::new(&[assistant("{")], b"").unwrap_err().0.contains("messages[0]: not JSON"));
    }

    #[test]
    fn all_texts_are_seen_and_changed() {
        let mut conversation =
            Conversation::new(&[assistant(r#"{"tool_calls":[{"x":["deep"]}]}"#)], br#"{"tools":[{"key":1}]}"#).unwrap();
        for text in ["c", "assistant", "deep", "key"] {
            assert!(conversation.any_text(&|found| found == text), "{text}");
        }
        conversation.change_texts(&str::to_uppercase);
        assert_eq!(conversation.tools.to_string(), "[{'KEY': 1}]");
        assert!(conversation.messages.to_string().contains("{'X': ['DEEP']}"), "{}", conversation.messages);
    }
}
