//! An endpoint's model is a model like all others: on its own node and on all that are joined to it, streamed and
//! whole, with every field in both directions.

use crate::harness::*;

const KEY: &str = "sk-very-secret-1234";

/// `tower` passes on to the far server; `mini` has nothing but `tower`.
async fn tower_passes_on(server: &FarServer) -> (Machine, Machine) {
    let tower = Machine::new("tower").with("--endpoint").with(&format!("{}/v1/", server.url()));
    let mut tower = tower.with("--endpoint-key-env").with("FAR_KEY").environment("FAR_KEY", KEY);
    let mut mini = Machine::new("mini");
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's endpoint is ready", |status| status.model("tower")["state"] == "ready").await;
    (tower, mini)
}

#[tokio::test]
async fn a_far_server_answers_as_if_it_were_here() {
    let server = FarServer::start().await;
    let (tower, mini) = tower_passes_on(&server).await;

    for machine in [&tower, &mini] {
        for what in ["plain", "cut"] {
            let whole = machine.ask(&far(what)).await;
            assert_eq!(whole.text(), if what == "plain" { "Héllo \n🔥" } else { "Héllo" });
            assert_eq!(whole.node(), "tower");
            assert_eq!(whole.body["model"], FAR_MODEL);
            let streamed = machine.stream(&far(what)).await.rest().await;
            streamed.is_whole(whole.text());
            assert_eq!(streamed.finish_reason.as_deref(), whole.body["choices"][0]["finish_reason"].as_str());
        }
        let mut plain = far("plain");
        plain["stream_options"] = json!({"include_usage": true});
        let streamed = machine.stream(&plain).await.rest().await;
        let usage = json!({"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 5}, "completion_tokens_details": {"reasoning_tokens": 1}});
        assert_eq!(streamed.usage.as_ref(), Some(&usage));
        let whole = machine.ask(&far("plain")).await.body;
        assert_eq!(whole["usage"], usage);
        assert_eq!((&whole["system_fingerprint"], &whole["timings"]), (&json!("b7"), &json!({"x": 1.5})));

        tool_calls_pass(machine, "tools").await;
        tool_calls_pass(machine, "whole call").await;
        // A far side that takes its time is waited for.
        machine.stream(&far("late")).await.rest().await.is_whole("late");
        // There is no other model: it is the default one.
        let mut default = far("plain");
        default["model"] = "default".into();
        assert_eq!(machine.ask(&default).await.text(), "Héllo \n🔥");
        assert_eq!(machine.get("/v1/models").await.body["data"][0]["nodes"], json!(["tower"]));
    }
    // The connection is kept while requests come.
    let before = server.connections();
    for _ in 0..10 {
        mini.ask(&far("plain")).await.text();
    }
    assert!(server.connections() <= before + 1, "{before} → {}", server.connections());

    let status = tower.status().await;
    let model = status.model("tower");
    assert_eq!(model["backend"], format!("endpoint (http://{})", server.address));
    assert!(model["steps"].as_u64() > Some(100), "{model}");
    assert_eq!((&model["running"], &model["waiting"]), (&json!(0), &json!(0)));
    for text in [tower.log(), tower.output(), status.0.to_string(), mini.status().await.0.to_string()] {
        assert!(!text.contains(KEY), "{text}");
    }
}

async fn tool_calls_pass(machine: &Machine, what: &str) {
    let mut request = far(what);
    request["tools"] = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let whole = machine.ask(&request).await.body;
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    let call = json!({"id": "call_1", "type": "function",
        "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}});
    assert_eq!(choice["message"]["tool_calls"], json!([call]), "{whole}");
    let reasoning = if what == "tools" { "I need the weather." } else { "" };
    if what == "tools" {
        assert_eq!(
            choice["message"],
            json!({"role": "assistant", "content": null, "refusal": null, "tool_calls": [call],
                "reasoning_content": reasoning})
        );
    }
    let streamed = machine.stream(&request).await.rest().await;
    streamed.is_whole("");
    assert_eq!(streamed.finish_reason.as_deref(), Some("tool_calls"));
    let text =
        |path: &str| -> String { streamed.chunks.iter().filter_map(|chunk| chunk.pointer(path)?.as_str()).collect() };
    assert_eq!(text("/choices/0/delta/tool_calls/0/function/arguments"), "{\"city\":\"Oslo\"}");
    assert_eq!(text("/choices/0/delta/tool_calls/0/id"), "call_1");
    assert_eq!(text("/choices/0/delta/reasoning_content"), reasoning);
}

#[tokio::test]
async fn every_field_of_a_request_arrives_there() {
    let server = FarServer::start().await;
    let (_tower, mini) = tower_passes_on(&server).await;
    // The order of members and the form of numbers are the client's: a grammar made from a schema depends on both.
    let format = r#"{"type":"json_schema","json_schema":{"schema":{"z":{"minimum":1.0},"a":{"maximum":1e2}}}}"#;
    let body = format!(
        r#"{{"model":"{FAR_MODEL}","response_format":{format},"tool_choice":"auto","tools":[{{"type":"function","function":{{"name":"f"}}}}],
            "messages":[
              {{"role":"user","content":[{{"type":"text","text":"look"}},{{"type":"image_url","image_url":{{"url":"data:,x"}}}}]}},
              {{"role":"assistant","content":null,"tool_calls":[{{"id":"c","type":"function","function":{{"name":"f","arguments":"{{}}"}}}}]}},
              {{"role":"tool","tool_call_id":"c","content":"12"}},
              {{"role":"user","content":"plain"}}],
            "temperature":0.7,"top_k":40,"min_p":0.05,"repetition_penalty":1.1,"seed":-5,"max_completion_tokens":9,
            "stop":["END"],"logit_bias":{{"7":-100}},"made_up":[1.0,{{"b":1,"a":2}}]}}"#
    );
    assert_eq!(mini.send_raw(body).await.text(), "Héllo \n🔥");
    let received = server.requests().pop().unwrap();
    assert!(received.head.contains(&format!("authorization: Bearer {KEY}\r\n")), "{}", received.head);
    let body = received.body;
    let arrived = |name: &str, value: Value| assert_eq!(body[name], value, "{name}: {body}");
    arrived("model", json!(FAR_MODEL));
    arrived("stream_options", json!({"include_usage": true}));
    arrived("temperature", json!(0.7));
    arrived("top_p", json!(0.9));
    arrived("top_k", json!(40));
    arrived("min_p", json!(0.05));
    arrived("repetition_penalty", json!(1.1));
    arrived("repeat_penalty", json!(1.1));
    arrived("seed", json!(-5));
    arrived("max_tokens", json!(9));
    arrived("stop", json!(["END"]));
    arrived("logit_bias", json!({"7": -100.0}));
    arrived("tools", json!([{"type": "function", "function": {"name": "f"}}]));
    arrived("tool_choice", json!("auto"));
    arrived("made_up", json!([1.0, {"b": 1, "a": 2}]));
    let image = json!({"type": "image_url", "image_url": {"url": "data:,x"}});
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    arrived(
        "messages",
        json!([
            {"role": "user", "content": [{"type": "text", "text": "look"}, image]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "12", "tool_call_id": "c"},
            {"role": "user", "content": "plain"},
        ]),
    );
    assert!(received.raw.contains(format), "as it was written: {}", received.raw);

    let mut two = far("plain");
    two["n"] = json!(2);
    let two = mini.ask(&two).await;
    assert_eq!((two.status, two.code(), &two.body["error"]["param"]), (400, "unsupported_parameter", &json!("n")));
}

#[tokio::test]
async fn an_endpoint_beside_a_model_is_asked_for_by_name_only() {
    let server = FarServer::start().await;
    let mut tower = Machine::new("tower").model("echo").with("--endpoint").with(&server.url());
    tower.up().await;
    tower.until("the endpoint is ready", |status| status.node("tower")["models"][1]["state"] == "ready").await;
    assert_eq!(tower.ask(&far("plain")).await.text(), "Héllo \n🔥");
    assert_eq!(tower.ask(&echo("hello")).await.text(), "hello");
    let mut default = far("plain");
    default["model"] = "default".into();
    let refused = tower.ask(&default).await;
    refused.is_not_now();
    assert!(refused.message().contains("no default model"), "{}", refused.message());
    assert!(tower.output().contains("Also ready: far-model on endpoint"), "{}", tower.output());
}
