//! What a running engine cannot change is changed by another one beside it, and nobody who asks notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::*;

#[tokio::test]
async fn a_changed_context_length_moves_over_without_a_failed_request() {
    let (tower, mini) = tower_and_mini().await;
    let engine = tower.engine().await;
    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = [&tower, &tower, &mini, &mini]
        .map(|machine| {
            let (url, done) = (machine.url("/v1/chat/completions"), done.clone());
            tokio::spawn(async move {
                let (client, body, mut answered) = (client(), echo("repeat 4 every 2ms: hello "), 0);
                while !done.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&body).send().await.unwrap();
                    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
                    let body: Value = answer.json().await.unwrap();
                    assert_eq!(body["choices"][0]["message"]["content"], "hello ".repeat(4));
                    answered += 1;
                }
                answered
            })
        })
        .into();
    let here = tower.stream(&echo("repeat 60 every 20ms: hello ")).await.begun().await;
    let there = mini.stream(&echo("repeat 60 every 20ms: hello ")).await.begun().await;

    assert_eq!(tower.set("echo", &["context_length=600"]).await, "moved");
    assert!(tower.engines().len() == 2 && tower.engines().contains(&engine), "the first one finishes its answers");
    let too_long = "x".repeat(700);
    for machine in [&tower, &mini] {
        assert_eq!(machine.ask(&echo(&too_long)).await.code(), "context_length_exceeded");
        let status = machine.until("all know it", |status| status.model("tower")["context_length"] == 600).await;
        assert_eq!(status.model("tower")["state"], "ready");
    }
    assert_eq!(tower.set("echo", &["batch_size=40"]).await, "moved", "more than it has slots for");
    here.rest().await.is_whole(&"hello ".repeat(60));
    there.rest().await.is_whole(&"hello ".repeat(60));
    done.store(true, Ordering::Relaxed);
    for asking in load {
        assert!(asking.await.unwrap() > 0);
    }
    until("the engines before have ended", async || (tower.engines().len() == 1).then_some(())).await;
    assert!(!is_alive(engine));
}
