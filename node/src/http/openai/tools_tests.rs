use serde_json::json;

use super::*;

fn members(value: Value) -> Map<String, Value> {
    serde_json::from_value(value).unwrap()
}

fn tools(parallel: bool) -> AnswerTools {
    AnswerTools::new(Some(ToolUse { parallel }), &[ToolFormat::Hermes.feature()]).unwrap()
}

const TWO: &str = "Look: <tool_call>{\"name\": \"a\", \"arguments\": {\"z\": 1.0, \"b\": 2}}</tool_call>\n\
                   <tool_call>{\"name\": \"b\"}</tool_call>";

#[test]
fn a_request_says_whether_and_how_tools_may_be_called() {
    let function = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    assert_eq!(wanted(&members(json!({}))).unwrap(), None);
    let all = |more: Value| {
        let mut all = members(json!({"tools": function}));
        all.extend(members(more));
        wanted(&all)
    };
    assert_eq!(all(json!({})).unwrap(), Some(ToolUse { parallel: true }));
    assert_eq!(all(json!({"parallel_tool_calls": false})).unwrap(), Some(ToolUse { parallel: false }));
    assert_eq!(all(json!({"tool_choice": "none"})).unwrap(), None);
    for (bad, param) in [
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [3]}), "tools[0]"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": ""}}]}), "tools[0].function.name"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
            "tools[0].function.parameters",
        ),
        (json!({"tools": function, "parallel_tool_calls": "yes"}), "parallel_tool_calls"),
    ] {
        let error = wanted(&members(bad.clone())).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{bad}");
    }
}

#[test]
fn messages_of_tools_are_checked() {
    let call = |function: Value| json!({"tool_calls": [{"id": "1", "type": "function", "function": function}]});
    let check = |role, value| check_message(role, &members(value), "messages[1]").map_err(|error| error.param.unwrap());
    assert_eq!(check(Role::Assistant, call(json!({"name": "f", "arguments": "{}"}))), Ok(()));
    assert_eq!(check(Role::Tool, json!({"tool_call_id": "1"})), Ok(()));
    assert_eq!(check(Role::Tool, json!({})), Err("messages[1].tool_call_id".into()));
    for (bad, param) in [
        (json!({"tool_calls": 3}), "messages[1].tool_calls"),
        (json!({"tool_calls": [{"type": "function"}]}), "messages[1].tool_calls[0].id"),
        (call(json!({"name": "f"})), "messages[1].tool_calls[0].function.arguments"),
        (call(json!({"name": "f", "arguments": {}})), "messages[1].tool_calls[0].function.arguments"),
    ] {
        assert_eq!(check(Role::Assistant, bad), Err(param.into()));
    }
}

#[test]
fn a_whole_answer_is_split_into_text_and_calls() {
    let mut both = tools(true);
    let (text, calls) = split(&mut both, TWO);
    assert_eq!(text, "Look: ");
    let [first, second] = calls.try_into().unwrap();
    assert_eq!((first.function.name.as_str(), first.function.arguments.as_str()), ("a", "{\"z\": 1.0, \"b\": 2}"));
    assert_eq!(second.function.arguments, "{}");
    assert!(first.id != second.id && first.id.len() == ID_LENGTH && first.index.is_none());
    assert!(first.id.chars().all(|character| character.is_ascii_alphanumeric()), "{}", first.id);
    assert_eq!(both.finish_reason(FinishReason::Stop), "tool_calls");
    assert_eq!(both.finish_reason(FinishReason::Length), "length");

    let (_, calls) = split(&mut tools(false), TWO);
    assert_eq!(calls.len(), 1, "one at a time");
    let mut none = tools(true);
    assert_eq!(split(&mut none, "plain"), ("plain".into(), vec![]));
    assert_eq!(none.finish_reason(FinishReason::Stop), "stop");
    assert!(AnswerTools::new(Some(ToolUse { parallel: true }), &[]).is_none());
}
