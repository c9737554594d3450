//! Models come and go by command from another shell; whoever asks meanwhile is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::*;

#[tokio::test]
async fn models_are_loaded_and_unloaded_while_requests_run() {
    let mut tower = Machine::new("tower").model("echo");
    tower.up().await;
    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = ["echo", "second", "second"]
        .map(|model| {
            let (url, done) = (tower.url("/v1/chat/completions"), done.clone());
            tokio::spawn(async move {
                let mut body = echo("repeat 4 every 2ms: hello ");
                body["model"] = model.into();
                let (client, mut answered) = (client(), 0);
                while !done.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&body).send().await.unwrap();
                    let status = answer.status();
                    let answer: Value = answer.json().await.unwrap();
                    // Before it was loaded for the first time nobody knows it.
                    if answered == 0 && status == 404 {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                        continue;
                    }
                    assert_eq!(status, 200, "{answer}");
                    assert_eq!(answer["choices"][0]["message"]["content"], "hello ".repeat(4));
                    assert_eq!(answer["model"], model);
                    answered += 1;
                }
                answered
            })
        })
        .into();
    let said = tower.ingle(&["models", "load", "echo", "--name", "second"]).await.ok();
    assert_eq!(said, "second is ready on tower.\n");
    assert_eq!(tower.engines().len(), 2);
    assert!(tower.ingle(&["models", "test", "second"]).await.ok().starts_with("second answers: tower read"));
    let before = tower.processes().await;
    assert_eq!((&before["second"]["state"], &before["echo"]["pinned"]), (&json!("ready"), &json!(true)));
    for _ in 0..3 {
        // Who asks while it goes has it loaded again.
        let said = tower.ingle(&["models", "unload", "second"]).await.ok();
        assert!(said.starts_with("second is unloaded"), "{said}");
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    done.store(true, Ordering::Relaxed);
    for asking in load {
        assert!(asking.await.unwrap() > 3);
    }

    // Nobody asks: it stays away, and its process has ended.
    let pid = tower.processes().await["second"]["pid"].as_u64();
    tower.ingle(&["models", "unload", "second"]).await.ok();
    let after = tower.processes().await;
    assert_eq!((&after["second"]["state"], &after["second"]["pid"]), (&json!("unloaded"), &Value::Null));
    assert!(pid.is_none_or(|pid| !is_alive(pid as u32)));
    assert_eq!(tower.engines().len(), 1);
    let listed = tower.get("/v1/models").await;
    let ids: Vec<&str> = listed.body["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["echo"], "only what can answer");
    let all = tower.get("/admin/models").await;
    assert!(all.body["models"].as_array().unwrap().iter().any(|m| m["name"] == "second" && m["state"] == "unloaded"));

    // It is known after a restart, too.
    tower.stop().await;
    tower.up().await;
    let mut ask = echo("hello again");
    ask["model"] = "second".into();
    assert_eq!(tower.ask(&ask).await.text(), "hello again");

    // What cannot be is said.
    let complaint = tower.ingle(&["models", "load", "secnd"]).await.fails_with(1);
    assert!(complaint.contains("does not exist here") && complaint.contains("Did you mean second?"), "{complaint}");
    let complaint = tower.ingle(&["models", "load", "echo", "--name", "default"]).await.fails_with(1);
    assert!(complaint.contains("is no name for a model"), "{complaint}");
    let complaint = tower.ingle(&["models", "unload", "nothing"]).await.fails_with(1);
    assert!(complaint.contains("does not exist here"), "{complaint}");
}

#[tokio::test]
async fn an_answer_finishes_before_its_model_goes() {
    let mut tower = Machine::new("tower").model("echo");
    tower.up().await;
    tower.ingle(&["models", "load", "echo", "--name", "second"]).await.ok();
    let ask = |text: &str| {
        let mut body = echo(text);
        body["model"] = "second".into();
        body
    };
    let running = tower.stream(&ask("repeat 20 every 20ms: hello ")).await.begun().await;
    tower.ingle(&["models", "unload", "second"]).await.ok();
    running.rest().await.is_whole(&"hello ".repeat(20));

    // One that does not end in time and has nowhere to go says so.
    let running = tower.stream(&ask(LONG)).await.begun().await;
    tower.ingle(&["models", "unload", "second", "--limit", "1s"]).await.ok();
    running.rest().await.broke_with("shutting_down");
    assert_eq!(tower.processes().await["second"]["state"], "unloaded");
}
