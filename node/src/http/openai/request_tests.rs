use ingle_actors::gateway::{DEFAULT_TEMPERATURE, DEFAULT_TOP_P};
use ingle_actors::protocol::wire::v2::LogitBias;

use super::*;

fn parsed(body: Value) -> CompletionRequest {
    parse(body.to_string().as_bytes(), 7).unwrap()
}

/// A request with the given members beside one message.
fn with(members: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in members.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn a_bare_request_gets_the_usual_values() {
    let request = parsed(with(json!({})));
    assert_eq!(request.model, "");
    assert_eq!(request.messages, [Message { role: Role::User, content: "hi".into(), extra: vec![] }]);
    let (temperature, top_p) = (DEFAULT_TEMPERATURE, DEFAULT_TOP_P);
    assert_eq!(request.sampling, Sampling { temperature, top_p, seed: 7, ..Sampling::default() });
    assert!(!request.stream && !request.include_usage && request.extra.is_empty() && request.user.is_none());
}

#[test]
fn every_field_is_taken() {
    let request = parsed(with(json!({
        "model": "m", "temperature": 0, "top_p": 0.5, "seed": -1, "max_tokens": 5, "max_completion_tokens": 5,
        "stop": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}, "user": "u",
        "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "repeat_last_n": 32, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "logit_bias": {"7": -100, "8": 1.5}, "min_tokens": 2, "stop_token_ids": [1, 2],
        "ignore_eos": true, "logprobs": true, "top_logprobs": 3,
    })));
    let sampling = Sampling {
        temperature: 0.0,
        top_k: 40,
        top_p: 0.5,
        min_p: 0.05,
        repetition_penalty: 1.1,
        repetition_window: 32,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: vec![LogitBias { token: 7, bias: -100.0 }, LogitBias { token: 8, bias: 1.5 }],
        seed: u64::MAX,
        max_tokens: Some(5),
        min_tokens: 2,
        stop: vec!["a".into(), "b".into()],
        stop_token_ids: vec![1, 2],
        ignore_eos: true,
        logprobs: Some(3),
    };
    assert_eq!(request.sampling, sampling);
    assert!(request.stream && request.include_usage && request.extra.is_empty());
    assert_eq!((request.model.as_str(), request.user.as_deref()), ("m", Some("u")));
    assert_eq!(parsed(with(json!({"stop": "x"}))).sampling.stop, ["x"]);
    assert_eq!(parsed(with(json!({"max_completion_tokens": 1u64 << 40}))).sampling.max_tokens, Some(u32::MAX));
    assert_eq!(parsed(with(json!({"seed": u64::MAX}))).sampling.seed, u64::MAX);
}

#[test]
fn names_mean_what_they_mean_where_they_come_from() {
    let repetition = |members: Value| {
        let sampling = parsed(with(members)).sampling;
        (sampling.repetition_penalty, sampling.repetition_window)
    };
    assert_eq!(repetition(json!({"repetition_penalty": 1.5})), (1.5, u32::MAX));
    assert_eq!(repetition(json!({"repeat_penalty": 1.5})), (1.5, 64));
    assert_eq!(repetition(json!({"repeat_penalty": 1.5, "repetition_penalty": 1.5})), (1.5, u32::MAX));
    assert_eq!(repetition(json!({"repeat_penalty": 1.5, "repeat_last_n": -1})), (1.5, u32::MAX));
    assert_eq!(repetition(json!({"repetition_penalty": 1.5, "repeat_last_n": 0})), (1.5, 0));
    for off in [-1, 0] {
        assert_eq!(parsed(with(json!({"top_k": off}))).sampling.top_k, 0);
    }
    for (members, expected) in [
        (json!({"logprobs": true}), Some(0)),
        (json!({"logprobs": true, "top_logprobs": 20}), Some(20)),
        (json!({"logprobs": false, "top_logprobs": 0}), None),
    ] {
        assert_eq!(parsed(with(members)).sampling.logprobs, expected);
    }
}

#[test]
fn roles_and_contents_of_all_kinds() {
    let request = parsed(json!({"messages": [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "x": null}]},
        {"role": "assistant", "content": null, "refusal": null, "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "f", "arguments": "{\"z\": 1.0}"}}]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "tool_calls": [], "name": "n"},
    ]}));
    let roles: Vec<Role> = request.messages.iter().map(|m| m.role).collect();
    assert_eq!(roles, [Role::System, Role::System, Role::Assistant, Role::Tool, Role::Assistant]);
    assert_eq!(request.messages[1].content, "a\nb");
    assert_eq!(
        request.messages[2].extra,
        br#"{"tool_calls":[{"function":{"arguments":"{\"z\": 1.0}","name":"f"},"id":"1","type":"function"}]}"#
    );
    assert_eq!(request.messages[3].extra, br#"{"tool_call_id":"1"}"#);
    assert_eq!(request.messages[4].extra, br#"{"name":"n"}"#);
}

#[test]
fn what_travels_is_as_it_was_written() {
    let body = r#"{"messages": [{"role": "user", "name": "n", "content": [
        {"type": "text", "text": "look"}, {"type": "image_url", "z": 1.0, "a": 1e2}, {"type": "text", "text": "here"}]}],
        "z": {"y": 1.0, "b": 1e2}, "seed": 1, "a": [ 1 ], "n": 1}"#;
    let request = parse(body.as_bytes(), 7).unwrap();
    assert_eq!(request.extra, br#"{"z":{"y": 1.0, "b": 1e2},"a":[ 1 ]}"#);
    let [message] = request.messages.try_into().unwrap();
    assert_eq!(message.content, "look\nhere");
    let parts = body.split_once("\"content\": ").unwrap().1.split_once("}],").unwrap().0;
    assert_eq!(String::from_utf8(message.extra).unwrap(), format!("{{\"name\":\"n\",\"content\":{parts}}}"));
    // Images are longer than other fields may be.
    let long = json!([{"type": "image_url", "image_url": {"url": "x".repeat(EXTRA_LIMIT)}}]);
    let long = parsed(json!({"messages": [{"role": "user", "content": long}]}));
    assert!(long.messages[0].extra.len() > EXTRA_LIMIT);
}

#[test]
fn fields_that_say_nothing_are_dropped_and_all_others_travel() {
    let quiet = parsed(with(json!({
        "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": false, "tools": [], "logit_bias": {},
        "parallel_tool_calls": true, "tool_choice": "auto", "response_format": {"type": "text"}, "store": false,
        "service_tier": "auto", "stream_options": null, "top_logprobs": null, "anything": null, "metadata": {},
        "max_tokens": null, "temperature": null, "stop": null, "seed": null, "user": null, "model": null,
        "prompt_cache_key": "k", "safety_identifier": "s",
    })));
    assert_eq!(quiet.extra, b"", "{:?}", String::from_utf8_lossy(&quiet.extra));
    assert_eq!(quiet.user.as_deref(), Some("s"));
    for (name, value) in [
        ("n", json!(2)),
        ("grammar", json!("root ::= x")),
        ("response_format", json!({"type": "json_object"})),
        ("parallel_tool_calls", json!("yes")),
        ("tool_choice", json!("required")),
        ("n", json!("1")),
    ] {
        let extra = parsed(with(json!({ name: value.clone() }))).extra;
        assert_eq!(serde_json::from_slice::<Value>(&extra).unwrap(), json!({ name: value }));
    }
}

/// Models were trained on descriptions that begin with the name, so order and digits are the client's.
#[test]
fn tools_travel_as_they_were_written() {
    let tools = r#"[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"z": {"minimum": 1.50}, "a": {}}}}}]"#;
    let body = format!(
        r#"{{"tool_choice":"auto","messages":[{{"role":"user","content":"x"}}],"tools":{tools},"seed":3,"max_tokens":1}}"#
    );
    let request = parse(body.as_bytes(), 1).unwrap();
    assert_eq!(String::from_utf8(request.extra).unwrap(), format!(r#"{{"tool_choice":"auto","tools":{tools}}}"#));
    assert_eq!(request.tools, Some(ToolUse { parallel: true }));
    let unwanted = body.replace("\"auto\"", "\"none\"");
    assert_eq!(parse(unwanted.as_bytes(), 1).unwrap().tools, None);
}

#[test]
fn wrong_requests_are_refused_with_the_path_of_the_trouble() {
    let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let message = |message: Value| json!({"messages": [{"role": "user", "content": "x"}, message]});
    let many_biases: Map<String, Value> = (0..=1024).map(|id| (id.to_string(), json!(1))).collect();
    for (body, param, expected) in [
        (json!({}), "messages", "missing"),
        (json!({"messages": []}), "messages", "empty"),
        (json!({"messages": null}), "messages", "missing"),
        (json!({"messages": "hi"}), "messages", "must be an array, but it is a string"),
        (message(json!("hi")), "messages[1]", "must be an object"),
        (message(json!({"role": "user", "content": 5})), "messages[1].content", "but it is a number"),
        (message(json!({"role": "user"})), "messages[1].content", "missing"),
        (message(json!({"role": "assistant", "content": null})), "messages[1].content", "missing"),
        (message(json!({"content": "x"})), "messages[1].role", "missing"),
        (message(json!({"role": "boss", "content": "x"})), "messages[1].role", "`boss`"),
        (message(json!({"role": 1, "content": "x"})), "messages[1].role", "a string"),
        (part(json!("x")), "messages[0].content[0]", "an object"),
        (part(json!({"type": 5})), "messages[0].content[0].type", "a string"),
        (part(json!({"text": "x"})), "messages[0].content[0].type", "missing"),
        (part(json!({"type": "text"})), "messages[0].content[0].text", "missing"),
        (part(json!({"type": "text", "text": "x", "y": 1})), "messages[0].content[0].y", "not supported"),
        (with(json!({"model": 5})), "model", "a string"),
        (with(json!({"temperature": 2.1})), "temperature", "between 0 and 2"),
        (with(json!({"temperature": "hot"})), "temperature", "a number"),
        (with(json!({"top_p": -0.1})), "top_p", "between 0 and 1"),
        (with(json!({"max_tokens": 0})), "max_tokens", "at least 1"),
        (with(json!({"max_tokens": -3})), "max_tokens", "at least 1"),
        (with(json!({"max_tokens": 1.5})), "max_tokens", "a whole number"),
        (with(json!({"max_tokens": 1, "max_completion_tokens": 2})), "max_tokens", "one of the two"),
        (with(json!({"seed": 1.5})), "seed", "a whole number"),
        (with(json!({"stop": ""})), "stop", "empty"),
        (with(json!({"stop": ["a", "b", "c", "d", "e"]})), "stop", "at most 4"),
        (with(json!({"stop": ["a", ""]})), "stop[1]", "not empty"),
        (with(json!({"stop": 5})), "stop", "a string or an array"),
        (with(json!({"stream": "yes"})), "stream", "a boolean"),
        (with(json!({"stream_options": {"include_usage": true}})), "stream_options", "needs `stream`"),
        (with(json!({"stream": true, "stream_options": 5})), "stream_options", "an object"),
        (
            with(json!({"stream": true, "stream_options": {"include_usage": 1}})),
            "stream_options.include_usage",
            "a boolean",
        ),
        (with(json!({"stream": true, "stream_options": {"x": 1}})), "stream_options.x", "not supported"),
        (with(json!({"user": 5})), "user", "a string"),
        (with(json!({"top_k": -2})), "top_k", "at least -1"),
        (with(json!({"top_k": 1.5})), "top_k", "a whole number"),
        (with(json!({"min_p": 1.1})), "min_p", "between 0 and 1"),
        (with(json!({"repetition_penalty": 0})), "repetition_penalty", "between 0.01 and 100"),
        (with(json!({"repeat_penalty": -1})), "repeat_penalty", "between 0.01 and 100"),
        (with(json!({"repeat_penalty": 1.1, "repetition_penalty": 1.2})), "repetition_penalty", "one of the two"),
        (with(json!({"repeat_last_n": -2})), "repeat_last_n", "at least -1"),
        (with(json!({"presence_penalty": 2.1})), "presence_penalty", "between -2 and 2"),
        (with(json!({"frequency_penalty": "x"})), "frequency_penalty", "a number"),
        (with(json!({"logit_bias": [1]})), "logit_bias", "an object"),
        (with(json!({"logit_bias": {"x": 1}})), "logit_bias", "the key `x`"),
        (with(json!({"logit_bias": {"07": 1}})), "logit_bias", "the key `07`"),
        (with(json!({"logit_bias": {"7": 101}})), "logit_bias.7", "between -100 and 100"),
        (with(json!({"logit_bias": {"7": "1"}})), "logit_bias.7", "a number"),
        (with(json!({"logit_bias": many_biases})), "logit_bias", "at most 1024"),
        (with(json!({"stop_token_ids": 7})), "stop_token_ids", "an array"),
        (with(json!({"stop_token_ids": [7, -1]})), "stop_token_ids[1]", "a whole number"),
        (with(json!({"stop_token_ids": vec![7; 65]})), "stop_token_ids", "at most 64"),
        (with(json!({"ignore_eos": 1})), "ignore_eos", "a boolean"),
        (with(json!({"min_tokens": -1})), "min_tokens", "at least 0"),
        (with(json!({"min_tokens": 5, "max_tokens": 4})), "min_tokens", "more than `max_tokens`"),
        (with(json!({"logprobs": 5})), "logprobs", "a boolean"),
        (with(json!({"top_logprobs": 5})), "top_logprobs", "needs `logprobs`"),
        (with(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs", "between 0 and 20"),
        (with(json!({"logprobs": true, "top_logprobs": 300})), "top_logprobs", "between 0 and 20"),
        (with(json!({"grammar": "x".repeat(EXTRA_LIMIT)})), "grammar", "longer than 256 KiB"),
    ] {
        let error = parse(body.to_string().as_bytes(), 7).unwrap_err();
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!(error.status, 400, "{shown}");
        assert_eq!(error.param.as_deref(), Some(param), "{shown}: {}", error.message);
        assert!(error.message.contains(expected), "{shown}: {}", error.message);
    }
}

#[test]
fn bodies_that_are_no_json_object_are_refused_with_the_place() {
    for (body, expected) in [
        (&b"{\"messages\": [}"[..], "line 1 column 15"),
        (b"", "EOF"),
        (b"[]", "must be a JSON object, but it is an array"),
        (b"null", "but it is null"),
        (b"{\"a\":\"\xff\"}", "not UTF-8"),
        (br#"{"model":"a","model":"b"}"#, "stands there twice"),
    ] {
        let error = parse(body, 7).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_json")));
        assert!(error.message.contains(expected), "{}", error.message);
    }
}
