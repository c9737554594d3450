//! Our renderings of real templates against Jinja2's. `tests/fixtures/make_tokenizer_references.py` made the
//! references and says how.

use std::collections::BTreeMap;

use ingle_protocol::wire::v2::{Message, Role};
use minijinja::value::Value;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct References {
    /// As values, since these keep the order of members.
    cases: BTreeMap<String, Value>,
    templates: Vec<Template>,
}

#[derive(Deserialize)]
struct Template {
    name: String,
    bos: String,
    eos: String,
    source: String,
    rendered: BTreeMap<String, Rendered>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rendered {
    Text(String),
    Error(String),
}

fn json_without(value: &Value, names: &[&str]) -> Vec<u8> {
    let pairs = value.try_iter().unwrap().filter(|name| !names.contains(&name.as_str().unwrap()));
    let rest = Value::from_pairs(pairs.map(|name| (name.clone(), value.get_item(&name).unwrap())));
    serde_json::to_vec(&rest).unwrap()
}

fn conversation(case: &Value) -> Conversation {
    let message = |message: Value| {
        let text = |name: &str| message.get_attr(name).unwrap().as_str().unwrap().to_string();
        let role =
            [Role::System, Role::User, Role::Assistant, Role::Tool].into_iter().find(|r| r.as_str() == text("role"));
        Message { role: role.unwrap(), content: text("content"), extra: json_without(&message, &["role", "content"]) }
    };
    let messages: Vec<Message> = case.get_attr("messages").unwrap().try_iter().unwrap().map(message).collect();
    Conversation::new(&messages, &json_without(case, &["messages"])).unwrap()
}

/// The reference has the format where today belongs.
fn with_today(text: &str) -> String {
    match text.split_once('⟨').and_then(|(front, rest)| Some((front, rest.split_once('⟩')?))) {
        Some((front, (format, rest))) => format!("{front}{}{}", strftime_now(format).unwrap(), with_today(rest)),
        None => text.to_string(),
    }
}

#[test]
fn templates_render_as_jinja_renders_them() {
    let References { cases, templates } =
        serde_json::from_str(include_str!("../../../tests/fixtures/chat_templates.json")).unwrap();
    let (mut equal, mut refused, mut wrong) = (0, 0, Vec::new());
    for Template { name, bos, eos, source, rendered } in &templates {
        let template = ChatTemplate::new(source, bos, eos).unwrap_or_else(|why| panic!("{name}: {why}"));
        for (title, expected) in rendered {
            match (template.render(&conversation(&cases[title])), expected) {
                (Ok(text), Rendered::Text(expected)) if text == with_today(expected) => equal += 1,
                // Where the template refuses by itself, its own words reach the client.
                (Err(why), Rendered::Error(expected)) if why.0.contains(expected) => refused += 1,
                (ours, Rendered::Text(expected)) => {
                    wrong.push(format!("{name}, {title}:\n{ours:?} instead of\n{:?}", with_today(expected)));
                }
                (ours, Rendered::Error(expected)) => {
                    wrong.push(format!("{name}, {title}: {ours:?} instead of the error {expected}"));
                }
            }
        }
    }
    println!("{} templates: {equal} renderings equal, {refused} refused by both", templates.len());
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), equal + refused + wrong.len(), wrong.join("\n"));
    assert!(equal >= 90, "{equal}");
}
