//! A client that is wrong hears where, in OpenAI's shape, and disturbs nobody.

use crate::harness::*;

/// A good request with one more field.
fn with(field: &str, value: Value) -> String {
    let mut request = echo("hello");
    request[field] = value;
    request.to_string()
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let (tower, mini) = tower_and_mini().await;

    let long = echo(&"x".repeat(9_000)).to_string();
    let good = echo("hello").to_string();
    let cut = &good[..good.len() - 2];
    let context = "This model's maximum context length is 8192 tokens";
    let table: Vec<(&str, u16, Option<&str>, &str, &str)> = vec![
        // body, status, param, code, part of the message
        ("", 400, None, "invalid_json", "not valid JSON"),
        ("{", 400, None, "invalid_json", "not valid JSON"),
        (cut, 400, None, "invalid_json", "not valid JSON"),
        ("[]", 400, None, "invalid_json", "must be a JSON object"),
        (r#"{"model":"echo","model":"echo"}"#, 400, None, "invalid_json", "model"),
        (r#"{"model":"echo"}"#, 400, Some("messages"), "", "missing"),
        (r#"{"model":"echo","messages":[]}"#, 400, Some("messages"), "", "empty"),
        (r#"{"model":"echo","messages":"hi"}"#, 400, Some("messages"), "", "array"),
        (r#"{"model":5,"messages":[]}"#, 400, Some("model"), "", "string"),
        (r#"{"model":"echo","messages":[{"role":"user"}]}"#, 400, Some("messages[0].content"), "", "missing"),
        (r#"{"model":"echo","messages":[{"role":"king","content":""}]}"#, 400, Some("messages[0].role"), "", "king"),
        (
            r#"{"model":"ecco","messages":[{"role":"user","content":"hi"}]}"#,
            404,
            Some("model"),
            "model_not_found",
            "echo",
        ),
        (&long, 400, Some("messages"), "context_length_exceeded", context),
    ];
    let fields = [
        ("temperature", json!("hot"), ""),
        ("temperature", json!(3), ""),
        ("top_p", json!(-1), ""),
        ("max_tokens", json!(0), ""),
        ("max_completion_tokens", json!("many"), ""),
        ("seed", json!(0.5), ""),
        ("stop", json!(["a", "b", "c", "d", "e"]), ""),
        ("stop", json!(7), ""),
        ("stream", json!("yes"), ""),
        ("stream_options", json!({"include_usage": true}), ""),
        ("top_k", json!(-2), ""),
        ("min_p", json!(2), ""),
        ("repetition_penalty", json!(0), ""),
        ("presence_penalty", json!(-3), ""),
        ("frequency_penalty", json!("much"), ""),
        ("logit_bias", json!({"hello": 1}), ""),
        // Only the engine knows how many tokens there are.
        ("logit_bias", json!({"261": 1}), ""),
        ("stop_token_ids", json!([261]), ""),
        ("logprobs", json!(5), ""),
        ("top_logprobs", json!(5), ""),
        ("tools", json!("all"), ""),
        ("tool_choice", json!("required"), "unsupported_parameter"),
        ("n", json!(2), "unsupported_parameter"),
        ("response_format", json!({"type": "json_object"}), "unsupported_parameter"),
        ("grammar", json!("root ::= x"), "unsupported_parameter"),
        ("a_field_that_nobody_knows", json!(1), "unsupported_parameter"),
    ];
    let field_bodies: Vec<String> = fields.iter().map(|(name, value, _)| with(name, value.clone())).collect();
    let rows = table.into_iter().chain(
        fields.iter().zip(&field_bodies).map(|((name, _, code), body)| (body.as_str(), 400, Some(*name), *code, *name)),
    );
    for (body, status, param, code, message) in rows {
        for machine in [&tower, &mini] {
            let answer = machine.send_raw(body.to_owned()).await;
            let shown: String = body.chars().take(120).collect();
            assert_eq!((answer.status, answer.code()), (status, code), "{shown}: {}", answer.body);
            assert_eq!(answer.body["error"]["param"].as_str(), param, "{shown}: {}", answer.body);
            assert_eq!(answer.body["error"]["type"], "invalid_request_error", "{shown}");
            assert!(answer.message().contains(message), "{shown}: {}", answer.message());
        }
    }
    // Fields that ask for what happens anyway are fine.
    for (field, value) in [("n", json!(1)), ("logprobs", json!(false)), ("tools", json!([])), ("user", json!("me"))] {
        assert_eq!(mini.send_raw(with(field, value)).await.text(), "hello", "{field}");
    }
    assert_eq!(mini.status().await.running("tower"), 0);
}

#[tokio::test]
async fn requests_that_are_none_are_told_so_too() {
    let mut tower = Machine::new("tower").model("echo");
    tower.up().await;
    let large = tower.send_raw(format!("{{\"model\":\"{}\"}}", "x".repeat(16 << 20))).await;
    assert_eq!((large.status, large.code()), (413, "request_too_large"));

    let url = tower.url("/v1/chat/completions");
    for (header, value) in [("host", "evil.example"), ("origin", "https://evil.example"), ("origin", "null")] {
        let answer = client().post(&url).json(&echo("hello")).header(header, value).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{header}: {value}");
        let error: Value = answer.json().await.unwrap();
        assert_eq!(error["error"]["type"], "permission_error");
    }
    let unknown = tower.get("/v1/nothing").await;
    assert_eq!((unknown.status, unknown.code()), (404, "unknown_url"));
    let method = tower.get("/v1/chat/completions").await;
    assert_eq!((method.status, method.code()), (405, "method_not_allowed"));
    assert_eq!(tower.ask(&echo("hello")).await.text(), "hello");
}
