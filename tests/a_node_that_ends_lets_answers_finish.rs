//! Ctrl-C and SIGTERM: nothing new, running answers finish within the limit, others hear that the node has left.

use crate::harness::*;

const ANSWER: &str = "repeat 80 every 20ms: hello ";

#[tokio::test]
async fn a_node_that_ends_lets_answers_finish() {
    let (mut tower, mut mini) = tower_and_mini().await;
    let text = "hello ".repeat(80);

    // The worker ends while it answers here and there.
    let here = tower.stream(&echo(ANSWER)).await.begun().await;
    let there = mini.stream(&echo(ANSWER)).await.begun().await;
    tower.signal(Signal::TERM);
    let not_ready = until("it is not ready", async || {
        let answer = tower.get("/ready").await;
        (answer.status == 503).then_some(answer)
    });
    assert_eq!(not_ready.await.body["reason"], "the node is shutting down");
    let refused = tower.ask(&echo("too late")).await;
    refused.is_not_now();
    assert_eq!(refused.code(), "draining");
    mini.ask(&echo("too late")).await.is_not_now();
    here.rest().await.is_whole(&text);
    there.rest().await.is_whole(&text);
    assert_eq!(tower.ended().await.code(), Some(0));
    let status = mini.until("tower has left", |status| status.health("tower") == "left").await;
    assert_eq!(status.why("tower"), "it was shut down");

    // The gateway ends while an answer goes through it.
    tower.up().await;
    mini.ask_until_answered(&echo("hello")).await;
    let through = mini.stream(&echo(ANSWER)).await.begun().await;
    mini.signal(Signal::INT);
    through.rest().await.is_whole(&text);
    assert_eq!(mini.ended().await.code(), Some(0));
    tower.until("mini has left", |status| status.health("mini") == "left").await;
}

#[tokio::test]
async fn a_drain_has_a_limit_and_a_second_signal_ends_it_at_once() {
    let mut tower = Machine::new("tower").model("echo").with("--drain-limit").with("1s");
    tower.up().await;
    let stream = tower.stream(&echo(LONG)).await.begun().await;
    tower.signal(Signal::TERM);
    let seen = stream.rest().await;
    assert!(seen.error.is_some() && !seen.done, "what is cut off says so: {seen:?}");
    assert_eq!(tower.ended().await.code(), Some(0));

    let mut mini = Machine::new("mini").model("echo").with("--drain-limit").with("10m");
    mini.up().await;
    let _stream = mini.stream(&echo(LONG)).await.begun().await;
    mini.signal(Signal::INT);
    until("it drains", async || (mini.get("/ready").await.status == 503).then_some(())).await;
    mini.signal(Signal::INT);
    assert_eq!(mini.ended().await.code(), Some(0));
}
