//! A process that is alive and does nothing is the worst kind of dead: it is noticed within a moment, its answers go on
//! elsewhere, and it gets work again as soon as it is well.

use crate::harness::*;

#[tokio::test]
async fn a_hung_worker_is_noticed_and_its_answers_move() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], "echo").await;
    // Shorter than what makes a node kill an engine that stands still.
    let text = "hello ".repeat(12);
    let stream = mini.stream(&echo("repeat 12 every 50ms: hello ")).await.begun().await;
    let victim = workers.iter().find(|worker| worker.name == stream.node).unwrap();
    let healthy = workers.iter().find(|worker| worker.name != stream.node).unwrap();

    // Its engine stands still; the node, its HTTP and its QUIC are as lively as ever.
    let engine = victim.engine().await;
    kill(engine, Signal::STOP);
    stream.rest().await.is_whole(&text);
    let explained = mini.explain("last").await;
    let cause = explained["attempts"][1]["cause"].as_str().unwrap_or_else(|| panic!("{explained}"));
    assert!(cause.contains("under suspicion"), "{explained}");
    let status = mini.status().await;
    assert_eq!(status.health(&victim.name), "alive", "the node itself is well");
    assert!(status.model(&victim.name)["trouble"].as_str().unwrap().starts_with("suspect: "));
    for _ in 0..4 {
        assert_eq!(mini.ask(&echo("hello")).await.node(), healthy.name);
    }
    kill(engine, Signal::CONT);
    mini.until("it is trusted again", |status| status.model(&victim.name)["trouble"].is_null()).await;
    assert_eq!(victim.engine().await, engine, "nobody had to kill it");

    // The whole machine stands still.
    let stream = mini.stream(&echo("repeat 12 every 50ms: hello ")).await.begun().await;
    let victim = workers.iter().find(|worker| worker.name == stream.node).unwrap();
    let engine = victim.engine().await;
    victim.signal(Signal::STOP);
    kill(engine, Signal::STOP);
    stream.rest().await.is_whole(&text);
    victim.signal(Signal::CONT);
    kill(engine, Signal::CONT);
    mini.until("it is well again", |status| {
        status.health(&victim.name) == "alive" && status.model(&victim.name)["trouble"].is_null()
    })
    .await;
}

/// A queue and a long prompt are work, not a hang.
#[tokio::test]
async fn a_busy_worker_is_not_taken_for_a_hung_one() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], "echo").await;
    let body = echo("repeat 10 every 150ms: hello ");
    let answers = (0..60).map(|_| mini.ask(&body));
    for answer in futures_util::future::join_all(answers).await {
        assert_eq!(answer.text(), "hello ".repeat(10));
    }
    for worker in &workers {
        assert!(!worker.log().contains("under suspicion"));
    }
    assert!(!mini.log().contains("goes on elsewhere"), "nothing was moved");
}
