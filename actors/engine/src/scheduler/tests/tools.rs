//! Requests with tools, through models whose templates know them or do not.

use serde_json::Value;

use super::*;
use crate::gguf::tiny::Meta;

/// A template of the references.
fn template(name: &str) -> String {
    let all: Value = serde_json::from_str(include_str!("../../../tests/fixtures/chat_templates.json")).unwrap();
    let found = all["templates"].as_array().unwrap().iter().find(|template| template["name"] == name);
    found.unwrap()["source"].as_str().unwrap().to_owned()
}

/// A tiny model with this template.
fn tiny_with(name: &str) -> (tempfile::TempDir, Engine) {
    let folder = tempfile::tempdir().unwrap();
    let mut model = tiny::llama(tiny::Sizes { context_length: 8_192, ..tiny::Sizes::default() });
    model.meta("tokenizer.chat_template", Meta::Text(template(name)));
    let source = ModelSource::Gguf(model.write(folder.path()));
    (folder, started(EngineSpec::new(source, ModelDigest::default())))
}

const TOOLS: &str = r#"{"tools":[{"type":"function","function":{"name":"weather","description":"d","parameters":{"type":"object","properties":{"zone":{"type":"string"},"city":{"type":"string"}}}}}]}"#;

fn with(extra: &str) -> Request {
    changed("hello", |r| {
        r.extra = extra.into();
        r.sampling.max_tokens = Some(1);
    })
}

#[test]
fn a_template_with_tools_shows_them_to_the_model() {
    for (name, feature) in
        [("qwen2.5", "tools:hermes"), ("llama-3.2", "tools:llama3"), ("mistral-nemo", "tools:mistral")]
    {
        let (_folder, engine) = tiny_with(name);
        assert_eq!(engine.snapshot().features, [feature]);
        let prompt =
            |request| ask(&engine, request).accepted.unwrap_or_else(|| panic!("{name}: refused")).prompt_tokens;
        let plain = prompt(with(""));
        // A token is a byte here.
        assert!(prompt(with(TOOLS)) > plain + 100, "{name}");
        let unwanted = TOOLS.replace("}]}", "}],\"tool_choice\":\"none\"}");
        assert_eq!(prompt(with(&unwanted)), plain, "{name}");
        let mut turns = with(TOOLS);
        let message = |role, content: &str, extra: &str| Message { role, content: content.into(), extra: extra.into() };
        turns.messages.extend([
            message(
                Role::Assistant,
                "",
                r#"{"tool_calls":[{"id":"abcdef123","type":"function","function":{"name":"weather","arguments":"{\"zone\":\"x\"}"}}]}"#,
            ),
            message(Role::Tool, "sunny", r#"{"tool_call_id":"abcdef123","name":"weather"}"#),
        ]);
        assert!(prompt(turns) > plain + 150, "{name}");
    }
}

#[test]
fn what_a_model_cannot_do_with_tools_is_refused_by_name() {
    let refusal = |engine: &Engine, request| {
        let refused = ask(engine, request).refused().clone();
        assert_eq!(refused.kind, RefusalKind::UnsupportedField);
        (refused.param.unwrap(), refused.message)
    };
    let (_folder, engine) = tiny_with("smollm3");
    assert!(engine.snapshot().features.is_empty());
    let (param, message) = refusal(&engine, with(TOOLS));
    assert!(param == "tools" && message.contains("this model's template has no tools"), "{message}");
    let mut call = with("");
    call.messages[0] = Message { role: Role::Assistant, content: "".into(), extra: br#"{"tool_calls":[{}]}"#.into() };
    assert_eq!(refusal(&engine, call).0, "messages[0].tool_calls");

    let (_folder, engine) = tiny_with("mistral-small-3.2");
    assert!(refusal(&engine, with(TOOLS)).1.contains("how the model calls them is not known"));

    let (_folder, engine) = tiny_with("qwen2.5");
    for choice in ["\"required\"", r#"{"type":"function","function":{"name":"weather"}}"#] {
        let forced = TOOLS.replacen('{', &format!("{{\"tool_choice\":{choice},"), 1);
        let (param, message) = refusal(&engine, with(&forced));
        assert!(param == "tool_choice" && message.contains("cannot force"), "{message}");
    }
    assert_eq!(refusal(&engine, with(r#"{"tool_choice":"required"}"#)).0, "tool_choice");
}

/// The mark of a call is a control token in some vocabularies: it is seen all the same, and only it.
#[test]
fn the_mark_of_a_call_is_text() {
    use crate::text::{Codec, Tokenizer};
    let folder = tempfile::tempdir().unwrap();
    let mut model = tiny::llama(tiny::Sizes::default());
    let tokens: Vec<Meta> =
        model.metadata.iter().filter(|(key, _)| key.ends_with("ggml.tokens")).map(|m| m.1.clone()).collect();
    let Some(Meta::Texts(mut tokens)) = tokens.into_iter().next() else { panic!("no tokens") };
    tokens[tiny::START as usize] = "[TOOL_CALLS]".into();
    model.meta("tokenizer.ggml.tokens", Meta::Texts(tokens));
    model.meta("tokenizer.chat_template", Meta::Text(template("mistral-nemo")));
    let tokenizer = Tokenizer::open(&model.write(folder.path())).unwrap();
    assert_eq!(tokenizer.bytes(tiny::START), b"[TOOL_CALLS]");
    assert_eq!(tokenizer.bytes(tiny::END), b"");
}
