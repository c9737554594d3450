//! Sampling through two hops, with real weights: HTTP on a machine without a model, QUIC, the engine of the other.

use crate::harness::*;

/// Of the default model, ` the`.
const SOME_TOKEN: &str = "260";

fn ask_for(members: Value) -> Value {
    let mut request = json!({
        "messages": [{"role": "user", "content": "Name some animals."}], "temperature": 0, "max_tokens": 12,
        "logprobs": true, "top_logprobs": 2,
    });
    for (name, value) in members.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

fn tokens(answer: &Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.node()), (200, "tower"), "{}", answer.body);
    answer.body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone()
}

fn texts(tokens: &[Value]) -> Vec<&str> {
    tokens.iter().map(|token| token["token"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn what_is_said_about_the_choice_of_tokens_holds_on_another_machine() {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let mut mini = Machine::new("mini");
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's model is ready", |status| status.model("tower")["state"] == "ready").await;

    // Logprobs, the same here and there, whole and streamed.
    let plain = ask_for(json!({}));
    let whole = mini.ask(&plain).await;
    let likely = tokens(&whole);
    assert_eq!(likely.len(), 12);
    assert_eq!(tokens(&tower.ask(&plain).await), likely);
    for token in &likely {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"], &top[0]["logprob"]), (2, &token["token"], &token["logprob"]));
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64() && token["logprob"].as_f64() <= Some(0.0));
    }
    assert_eq!(texts(&likely).concat(), whole.text());
    let streamed = mini.stream(&plain).await.rest().await;
    streamed.is_whole(whole.text());
    assert_eq!(streamed.logprobs, likely);

    // A bias forces a token, and forbids it.
    let forced = tokens(&mini.ask(&ask_for(json!({"logit_bias": {SOME_TOKEN: 100}}))).await);
    assert_eq!(texts(&forced), vec![texts(&forced)[0]; 12]);
    let first = texts(&likely)[0];
    let stop = json!({"stop_token_ids": [SOME_TOKEN.parse::<u32>().unwrap()], "logit_bias": {SOME_TOKEN: 100}});
    let stopped = mini.ask(&ask_for(stop)).await;
    assert_eq!((stopped.text(), &stopped.body["choices"][0]["finish_reason"]), ("", &json!("stop")));
    assert_ne!(texts(&forced)[0], first);

    // One seed is one answer, on either machine; every option together.
    let drawn = |seed: u64| {
        ask_for(json!({
            "seed": seed, "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
            "presence_penalty": 0.2, "frequency_penalty": 0.2, "logit_bias": {SOME_TOKEN: 1}, "ignore_eos": true,
        }))
    };
    let once = tokens(&mini.ask(&drawn(5)).await);
    assert_eq!(tokens(&tower.ask(&drawn(5)).await), once);
    assert_eq!(once.len(), 12, "nothing ends it");
    let another = tokens(&mini.ask(&drawn(6)).await);
    assert_ne!(texts(&another), texts(&once));
}
