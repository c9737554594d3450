use proptest::prelude::*;

use super::AnswerPart::{Call, Text};
use super::*;

const FORMATS: [ToolFormat; 4] = ToolFormat::ALL;

fn parsed(format: ToolFormat, pieces: &[&str]) -> Vec<AnswerPart> {
    let mut parser = ToolCallParser::new(format);
    let mut parts: Vec<AnswerPart> = Vec::new();
    let all = pieces.iter().flat_map(|piece| parser.push(piece)).collect::<Vec<_>>();
    for part in all.into_iter().chain(parser.finish()) {
        match (parts.last_mut(), part) {
            (Some(Text(before)), Text(text)) => before.push_str(&text),
            (_, part) => parts.push(part),
        }
    }
    parts
}

fn whole(format: ToolFormat, text: &str) -> Vec<AnswerPart> {
    parsed(format, &[text])
}

fn call(name: &str, arguments: &str) -> AnswerPart {
    Call(ToolCall { name: name.into(), arguments: arguments.into() })
}

fn text(text: &str) -> AnswerPart {
    Text(text.into())
}

#[test]
fn the_family_is_seen_in_the_template() {
    #[derive(serde::Deserialize)]
    struct Templates {
        templates: Vec<Template>,
    }
    #[derive(serde::Deserialize)]
    struct Template {
        name: String,
        source: String,
    }
    let Templates { templates } =
        serde_json::from_str(include_str!("../../../tests/fixtures/chat_templates.json")).unwrap();
    use ToolSupport::{Known, None, Unknown};
    let mut seen = 0;
    for Template { name, source } in templates {
        let expected = match name.as_str() {
            "llama-3.1" | "llama-3.2" => Known(ToolFormat::Llama3),
            "mistral-nemo" => Known(ToolFormat::Mistral),
            "mistral-small-3.2" => Unknown,
            "qwen2.5" | "qwen3" | "qwq" | "hermes-3-tools" => Known(ToolFormat::Hermes),
            _ => None,
        };
        assert_eq!(ToolSupport::of_template(&source), expected, "{name}");
        seen += u32::from(expected != None);
    }
    assert!(seen >= 8, "{seen}");
    let phi = "{% if tools %}{{ '<|tool|>' + tools + '<|/tool|>' }}{% endif %}";
    assert_eq!(ToolSupport::of_template(phi), Known(ToolFormat::Phi4));
    assert_eq!(ToolSupport::of_template("{{ my_tools }} <tool_call>"), None);
    for format in FORMATS {
        assert_eq!(ToolFormat::among(&["logprobs".into(), format.feature()]), Some(format));
    }
    assert_eq!(ToolFormat::among(&["tools:other".into()]), Option::None);
}

#[test]
fn each_family_calls_in_its_own_way() {
    let hermes = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln</tool_call>\", \"n\": 1.50}}\n</tool_call>\n<tool_call>{\"arguments\":{},\"name\":\"b\"}</tool_call>";
    let first = call("weather", "{\"city\": \"Köln</tool_call>\", \"n\": 1.50}");
    assert_eq!(whole(ToolFormat::Hermes, hermes), [text("Let me see.\n"), first, call("b", "{}")]);

    let llama = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}";
    assert_eq!(whole(ToolFormat::Llama3, llama), [call("weather", "{\"city\": \"Paris\"}")]);
    let two = format!("<|python_tag|>{llama}; {{\"type\": \"function\", \"name\": \"b\", \"parameters\": {{}}}}");
    assert_eq!(whole(ToolFormat::Llama3, &two), [call("weather", "{\"city\": \"Paris\"}"), call("b", "{}")]);

    let list = "[{\"name\": \"a\", \"arguments\": {\"x\": [1]}}, {\"name\": \"b\", \"arguments\": \"{\\\"y\\\": 2}\"}]";
    let calls = [call("a", "{\"x\": [1]}"), call("b", "{\"y\": 2}")];
    assert_eq!(whole(ToolFormat::Mistral, &format!("[TOOL_CALLS] {list}")), calls);
    assert_eq!(whole(ToolFormat::Phi4, &format!("<|tool_call|>{list}<|/tool_call|>")), calls);
    // Without the end of the mark, and with text behind.
    assert_eq!(whole(ToolFormat::Phi4, &format!("<|tool_call|>{list}")), calls);
    let behind = whole(ToolFormat::Hermes, "<tool_call>{\"name\":\"a\"}</tool_call>\n\nDone.");
    assert_eq!(behind, [call("a", "{}"), text("Done.")]);
}

#[test]
fn what_is_no_call_is_text_to_the_last_byte() {
    for (format, said) in [
        (ToolFormat::Hermes, "plain < text <tool and { \"name\""),
        (ToolFormat::Hermes, " \n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": }}\n</tool_call>"),
        (ToolFormat::Hermes, "<tool_call>not json</tool_call>"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"cut"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": 3}"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"a\", \"arguments\": [1]}"),
        (ToolFormat::Llama3, "{\"a\": 1}"),
        (ToolFormat::Llama3, "{\"name\": \"Ada\"}"),
        (ToolFormat::Llama3, "It is {\"name\": \"a\", \"parameters\": {}}"),
        (ToolFormat::Llama3, "<|python_tag|>print(1)"),
        (ToolFormat::Mistral, "[TOOL_CALLS][]"),
        (ToolFormat::Mistral, "[TOOL_CALLS][{\"name\": \"a\"}, 3]"),
        (ToolFormat::Mistral, "[TOOL_CALLS]"),
        (ToolFormat::Phi4, "  "),
    ] {
        assert_eq!(whole(format, said), [text(said)], "{format:?}");
    }
    let second = "<tool_call>{]<tool_call>{\"name\": \"a\"}";
    assert_eq!(whole(ToolFormat::Hermes, second), [text("<tool_call>{]"), call("a", "{}")]);
    let second = "<tool_call>oh <tool_call>{\"name\": \"a\"}";
    assert_eq!(whole(ToolFormat::Hermes, second), [text("<tool_call>oh "), call("a", "{}")]);
    let long = format!("<tool_call>{{\"name\": \"{}\"}}", "x".repeat(LONGEST_CALL));
    assert_eq!(whole(ToolFormat::Hermes, &long), [text(&long)]);
}

#[test]
fn ordinary_text_is_not_held_back() {
    let mut parser = ToolCallParser::new(ToolFormat::Hermes);
    assert_eq!(parser.push("I like <b>"), [text("I like <b>")]);
    assert_eq!(parser.push(" and <to"), [text(" and ")]);
    assert_eq!(parser.push("ads>"), [text("<toads>")]);
    let mut parser = ToolCallParser::new(ToolFormat::Llama3);
    assert_eq!(parser.push("{\"colo"), [text("{\"colo")]);
    let mut parser = ToolCallParser::new(ToolFormat::Hermes);
    assert_eq!(parser.push("<tool_call>{\"name\": \"a\"}"), [call("a", "{}")], "a call is said when it is whole");
}

proptest! {
    #[test]
    fn any_cut_gives_the_same(
        which in 0usize..4,
        words in proptest::collection::vec(0usize..22, 0..14),
        cuts in proptest::collection::vec(0usize..300, 0..20),
    ) {
        let format = FORMATS[which];
        let words = words.into_iter().map(|word| match word {
            0..=4 => format.mark(),
            5..=7 => format.close().unwrap_or(";"),
            8..=10 => "{\"name\": \"a\", \"parameters\": {\"x\": \"}\\\"\"}}",
            11..=13 => "[{\"name\": \"a\", \"arguments\": {}}]",
            14 => "{",
            15 => "]",
            16 => "\n ",
            17 => "<tool",
            18 => "\"name\":",
            19 => "\"",
            20 => "é",
            _ => "text ",
        });
        let said: String = words.collect();
        let expected = whole(format, &said);
        let mut at: Vec<usize> = cuts.into_iter().filter(|at| said.is_char_boundary(*at)).collect();
        at.extend([0, said.len()]);
        at.sort_unstable();
        let pieces: Vec<&str> = at.windows(2).map(|cut| &said[cut[0]..cut[1].min(said.len())]).collect();
        prop_assert_eq!(parsed(format, &pieces), expected.clone());
        let bytes: Vec<&str> = said.split_inclusive(|_| true).collect();
        prop_assert_eq!(parsed(format, &bytes), expected);
    }
}
