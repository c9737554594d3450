//! A machine that dies is named as failed, and is a member again as soon as its node runs.

use crate::harness::*;

#[tokio::test]
async fn a_killed_worker_node_is_reported_and_comes_back_by_itself() {
    let (mut tower, mut mini) = (Machine::new("tower").model("echo"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    let hello = echo("hello");
    mini.ask_until_known(&hello).await;

    let stream = mini.stream(&echo(LONG)).await.begun().await;
    tower.kill_9().await;
    stream.rest().await.broke_with("connection_lost");
    let status = mini.until("tower has failed", |status| status.health("tower") == "failed").await;
    assert!(!status.why("tower").is_empty(), "it says why");
    let text = mini.ingle(&["status"]).await.ok();
    assert!(text.contains(&format!("tower is failed: {}", status.why("tower"))), "{text}");

    let answer = mini.ask(&hello).await;
    answer.is_not_now();
    assert!(answer.message().contains("tower is failed"), "{}", answer.message());
    assert_eq!(mini.get("/ready").await.status, 503);
    assert_eq!(mini.get("/v1/models").await.body["data"], json!([]));
    mini.get("/v1/models/echo").await.is_not_now();

    tower.up().await;
    assert_eq!(mini.ask_until_answered(&hello).await.node(), "tower");
    mini.until_alive(&[&tower]).await;

    // The gateway, too, comes back by what it remembers.
    mini.kill_9().await;
    tower.until("mini has failed", |status| status.health("mini") == "failed").await;
    mini.up().await;
    assert_eq!(mini.ask_until_known(&hello).await.node(), "tower");
    tower.until_alive(&[&mini]).await;

    // Both at once: a power cut.
    mini.kill_9().await;
    tower.kill_9().await;
    mini.up().await;
    tower.up().await;
    assert_eq!(mini.ask_until_known(&hello).await.node(), "tower");
}
