//! `ingle drain`: nothing new goes there, what runs finishes or moves, and it can be taken back.

use crate::harness::*;

#[tokio::test]
async fn a_drained_node_loses_no_answer() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], "echo").await;
    let short = mini.stream(&echo("repeat 20 every 50ms: hello ")).await.begun().await;
    let victim = workers.iter().find(|worker| worker.name == short.node).unwrap();

    // Time enough: everything finishes where it is.
    let drained = mini.ingle(&["drain", &victim.name, "--json"]).await.ok();
    let drained: Value = serde_json::from_str(&drained).unwrap();
    assert_eq!((&drained["draining"], &drained["moved"]), (&json!(true), &json!(0)), "{drained}");
    short.rest().await.is_whole(&"hello ".repeat(20));
    assert_eq!(mini.explain("last").await["attempts"].as_array().unwrap().len(), 1);
    mini.until("it is draining", |status| status.model(&victim.name)["state"] == "draining").await;
    assert_eq!(victim.get("/ready").await.status, 503);
    for _ in 0..4 {
        assert_ne!(mini.ask(&echo("hello")).await.node(), victim.name);
    }
    assert_ne!(victim.ask(&echo("hello")).await.node(), victim.name, "who asks there is answered by others");
    mini.ingle(&["drain", &victim.name, "--undo"]).await.ok();
    mini.until("it takes work", |status| status.model(&victim.name)["state"] == "ready").await;

    // No time: what runs moves.
    let long = mini.stream(&echo("repeat 60 every 50ms: hello ")).await.begun().await;
    let node = long.node.clone();
    mini.ingle(&["drain", &node, "--limit", "0s"]).await.ok();
    long.rest().await.is_whole(&"hello ".repeat(60));
    let explained = mini.explain("last").await;
    assert!(explained["attempts"][1]["cause"].as_str().unwrap().contains("shutting_down"), "{explained}");

    let wrong = mini.ingle(&["drain", "cellar"]).await.fails_with(1);
    assert!(wrong.contains("There is no node `cellar`") && wrong.contains("tower"), "{wrong}");
}

/// Three workers, one after the other ended and started again, while requests come.
#[tokio::test]
async fn a_rolling_restart_under_load_loses_nothing() {
    let (mut workers, mini) = workers_and_mini(&["tower", "attic", "shed"], "echo").await;
    let mini = std::sync::Arc::new(mini);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (mini, stop) = (mini.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let stream = mini.stream(&echo("repeat 30 every 20ms: hello ")).await;
                    stream.rest().await.is_whole(&"hello ".repeat(30));
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for worker in &mut workers {
        worker.stop().await;
        worker.up().await;
        mini.until("it is back", |status| status.model(&worker.name)["state"] == "ready").await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}
