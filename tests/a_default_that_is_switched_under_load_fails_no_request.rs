//! `ingle models set-default` while programs ask every node for the default model: no request fails, and each answer
//! is of one model from its beginning to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::*;

#[tokio::test]
async fn a_default_that_is_switched_under_load_fails_no_request() {
    let (one, two) = (FarServer::start().await, FarServer::start().await);
    let (tower, mini) = tower_and_mini().await;
    tower.add_endpoint("one", &one, &[]).await;
    tower.models(&["set-default", "one"]).await;
    let is_one = |model: &Value| model["is_default"] == true && model["nodes"][0]["state"] == "ready";
    mini.until_model("one", "it is the default", is_one).await;

    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = [&tower, &tower, &mini, &mini]
        .map(|machine| {
            let (url, done) = (machine.url("/v1/chat/completions"), done.clone());
            tokio::spawn(async move {
                let (client, mut answered) = (client(), [0, 0]);
                while !done.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&to("default", "plain")).send().await.unwrap();
                    let status = answer.status();
                    let body: Value = answer.json().await.unwrap();
                    assert_eq!(status, 200, "{body}");
                    assert_eq!(body["choices"][0]["message"]["content"], "Héllo \n🔥");
                    answered[usize::from(body["model"] == "two")] += 1;
                }
                answered
            })
        })
        .into();
    // The second one is added on the one node and chosen on the other, at once.
    mini.add_endpoint("two", &two, &[]).await;
    for round in 0..4 {
        let (model, machine) = if round % 2 == 0 { ("two", &mini) } else { ("one", &tower) };
        machine.models(&["set-default", model]).await;
        let is_default = |shown: &Value| shown["is_default"] == true;
        tower.until_model(model, "it is the default", is_default).await;
        mini.until_model(model, "it is the default", is_default).await;
        let mut default = to("default", "plain");
        default["stream"] = false.into();
        for machine in [&tower, &mini] {
            assert_eq!(machine.ask(&default).await.body["model"], model);
        }
    }
    done.store(true, Ordering::Relaxed);
    let mut sum = [0, 0];
    for asking in load {
        let answered = asking.await.unwrap();
        sum = [sum[0] + answered[0], sum[1] + answered[1]];
    }
    assert!(sum.iter().all(|answers| *answers > 0), "{sum:?}");

    // One that nobody could ask is not chosen by mistake.
    mini.models(&["add", "--name", "absent", "--source", "hf:owner/name/model.gguf", "--unchecked"]).await;
    let refused = mini.ingle(&["models", "set-default", "absent"]).await.fails_with(1);
    assert!(refused.contains("--force"), "{refused}");
    mini.ingle(&["models", "set-default", "nobody"]).await.fails_with(1);
    assert_eq!(mini.ask(&to("default", "plain")).await.body["model"], "one");
    // With the default model goes the choice.
    let removed = mini.ingle(&["models", "rm", "one"]).await;
    assert!(removed.err.contains("was the default model"), "{}", removed.err);
    assert_eq!(mini.models(&["status"]).await["default"], Value::Null);
}
