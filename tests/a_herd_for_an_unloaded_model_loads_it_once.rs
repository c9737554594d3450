//! Five hundred requests at once for a model that is known and not loaded: one load, and everybody is answered or told.

use std::collections::BTreeMap;

use crate::harness::*;

#[tokio::test]
async fn a_herd_for_an_unloaded_model_loads_it_once() {
    let (mut tower, mut mini) = (Machine::new("tower").model("echo"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    tower.ingle(&["models", "load", "echo", "--name", "herd"]).await.ok();
    tower.ingle(&["models", "unload", "herd"]).await.ok();
    let is_unloaded = |status: &Status| {
        let models = status.node("tower")["models"].as_array().unwrap();
        models.iter().any(|model| model["name"] == "herd" && model["state"] == "unloaded")
    };
    mini.until("mini knows that it is unloaded", is_unloaded).await;

    let mut body = echo("hello herd");
    (body["model"], body["max_tokens"]) = ("herd".into(), 10.into());
    // One for all: making one takes longer than a server waits for a request's head, where there are 500.
    let client = client();
    let asking: Vec<_> = (0..500)
        .map(|number| {
            // Most at the machine itself, some at another one, which has it load the model there.
            let url = if number % 10 == 0 { &mini } else { &tower }.url("/v1/chat/completions");
            let (client, body) = (client.clone(), body.clone());
            tokio::spawn(async move {
                let answer = client.post(url).json(&body).send().await.unwrap();
                let (status, told) = (answer.status().as_u16(), answer.headers().contains_key("retry-after"));
                let body: Value = answer.json().await.unwrap();
                match status {
                    200 => assert_eq!(body["choices"][0]["message"]["content"], "hello herd"),
                    429 | 503 => assert!(told, "{body}"),
                    other => panic!("{other}: {body}"),
                }
                status
            })
        })
        .collect();
    let mut counts: BTreeMap<u16, u32> = BTreeMap::new();
    for asked in asking {
        *counts.entry(asked.await.unwrap()).or_default() += 1;
    }
    println!("answers by status: {counts:?}");
    assert!(counts[&200] >= 100, "{counts:?}");
    let started = tower.log().matches("engine process started").count();
    // Its own model, the first load, and the herd's.
    assert_eq!(started, 3, "one load for all");
    assert_eq!(tower.engines().len(), 2);

    // A machine that was restarted knows it still, and loads it for whoever asks anywhere.
    tower.stop().await;
    tower.up().await;
    assert_eq!(tower.engines().len(), 1);
    mini.until_alive(&[&tower]).await;
    assert_eq!(mini.ask_until_known(&body).await.text(), "hello herd");
    assert_eq!(tower.engines().len(), 2);
}

#[tokio::test]
async fn a_stream_that_waits_for_its_model_sees_that_it_lives() {
    let mut tower = Machine::new("tower");
    tower.up().await;
    // A node without a model has one when it is told to load one.
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../actors/engine/tests/fixtures/tiny/llama3.gguf");
    tower.ingle(&["models", "load", tiny, "--name", "tiny"]).await.ok();
    tower.ingle(&["models", "unload", "tiny"]).await.ok();
    let ask = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4});
    let streamed = tower.stream_when_ready(&ask).await.rest().await;
    assert!(streamed.done, "{streamed:?}");
    assert_eq!(tower.ask(&ask).await.status, 200);
}

#[tokio::test]
async fn who_cannot_wait_so_long_is_told_when_it_will_be_there() {
    let settings = "[model]\nuse = \"none\"\n[http]\nrequest_timeout = \"800ms\"\n";
    let mut tower = Machine::from_settings("tower").settings(settings);
    tower.up().await;
    tower.ingle(&["models", "load", "echo", "--name", "herd"]).await.ok();
    tower.ingle(&["models", "unload", "herd"]).await.ok();
    let mut body = echo("hello herd");
    body["model"] = "herd".into();
    let told = tower.ask(&body).await;
    told.is_not_now();
    assert_eq!(told.code(), "model_loading");
    assert!(told.message().contains("is being loaded and will be there in about 1 s"), "{}", told.message());
    // It was loaded for that request all the same.
    assert_eq!(tower.ask_until_answered(&body).await.text(), "hello herd");
}
