//! Another file under the name of a loaded model is loaded beside it, requests move over, the old one finishes and its
//! memory is free again. No request fails, none gets a mixture of both.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::harness::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actors/engine/tests/fixtures/tiny").join(name)
}

fn ask(tokens: u32) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens,
        "temperature": 0, "ignore_eos": true})
}

#[tokio::test]
async fn a_new_version_takes_over_without_a_failed_request() {
    let mut tower = Machine::new("tower");
    tower.up().await;
    let load = async |file: &str| {
        let path = fixture(file);
        tower.ingle(&["models", "load", path.to_str().unwrap(), "--name", "tiny"]).await.ok();
    };
    load("llama3.gguf").await;
    let first = tower.ask(&ask(12)).await.text().to_owned();
    let digest = tower.processes().await["tiny"]["digest"].clone();
    let engine = tower.engine().await;

    let done = Arc::new(AtomicBool::new(false));
    let asking: Vec<_> = (0..4)
        .map(|_| {
            let (url, done) = (tower.url("/v1/chat/completions"), done.clone());
            tokio::spawn(async move {
                let (client, mut texts) = (client(), Vec::new());
                while !done.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&ask(12)).send().await.unwrap();
                    let status = answer.status();
                    let answer: Value = answer.json().await.unwrap();
                    assert_eq!(status, 200, "{answer}");
                    texts.push(answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned());
                }
                texts
            })
        })
        .collect();
    load("qwen2.gguf").await;
    let second = tower.ask(&ask(12)).await.text().to_owned();
    assert_ne!(first, second, "these two models answer differently");
    assert_ne!(tower.processes().await["tiny"]["digest"], digest);
    until("the old one's process has ended", async || (!is_alive(engine)).then_some(())).await;
    assert_eq!(tower.engines().len(), 1);
    for _ in 0..3 {
        load("llama3.gguf").await;
        load("qwen2.gguf").await;
    }
    done.store(true, Ordering::Relaxed);
    let mut seen = 0;
    for asked in asking {
        for text in asked.await.unwrap() {
            assert!(text == first || text == second, "a mixture: {text:?}");
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen}");
    until("all others have ended", async || (tower.engines().len() == 1).then_some(())).await;

    // A file that is no model, or one that does not run, changes nothing.
    let bad = tower.ingle(&["models", "load", fixture("qwen2.json").to_str().unwrap(), "--name", "tiny"]).await;
    assert!(bad.fails_with(1).contains("not a GGUF file"));
    let cut = tower.state_dir().join("cut.gguf");
    std::fs::write(&cut, &std::fs::read(fixture("llama3.gguf")).unwrap()[..100_000]).unwrap();
    let bad = tower.ingle(&["models", "load", cut.to_str().unwrap(), "--name", "tiny"]).await;
    assert!(bad.fails_with(1).contains("truncated"));
    assert_eq!(tower.ask(&ask(12)).await.text(), second);
}

#[tokio::test]
async fn where_memory_holds_only_one_the_old_one_finishes_first_and_streams_see_that_they_wait() {
    // Room for one engine of some 100 MiB.
    let mut tower = Machine::from_settings("tower").settings("[model]\nuse = \"none\"\nmemory_mib = 150\n");
    tower.up().await;
    tower.ingle(&["models", "load", "echo", "--name", "tiny"]).await.ok();
    let mut long = echo("repeat 50 every 20ms: hello ");
    long["model"] = "tiny".into();
    let running = tower.stream(&long).await.begun().await;
    let file = fixture("llama3.gguf");
    let load = ["models", "load", file.to_str().unwrap(), "--name", "tiny"];
    let loading = tower.ingle(&load);
    let meanwhile = async {
        until("the old one goes", async || (tower.processes().await["tiny"]["state"] == "draining").then_some(()))
            .await;
        // The stream begins before there is a model: its client is told that the connection lives.
        let question = ask(6);
        let waits = async { (tower.stream_when_ready(&question).await, Instant::now()) };
        let finishes = async { (running.rest().await, Instant::now()) };
        let ((waits, began), (running, finished)) = tokio::join!(waits, finishes);
        assert!(began < finished, "nothing was heard until the old one had finished");
        running.is_whole(&"hello ".repeat(50));
        let answer = waits.rest().await;
        assert!(answer.done && !answer.text.is_empty(), "{answer:?}");
    };
    let (loaded, ()) = tokio::join!(loading, meanwhile);
    loaded.ok();
    assert_eq!(tower.engines().len(), 1);
}
