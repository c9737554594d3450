//! What a command has reported as done is on disk before it says so.

use crate::harness::*;

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let (mut tower, mut mini) = (Machine::new("tower"), Machine::new("mini"));
    tower.up().await;
    mini.up().await;
    let (token, address) = tower.token().await;
    tower.kill_9().await;

    tower.up().await;
    mini.try_join(&address, &token, &[]).await.ok();
    tower.kill_9().await;
    mini.kill_9().await;

    mini.up().await;
    tower.up().await;
    tower.until_alive(&[&mini]).await;
    mini.until_alive(&[&tower]).await;
    assert_eq!(mini.status().await.nodes().len(), 2);

    let refusal = Machine::new("late").try_join(&address, &token, &[]).await.fails_with(1);
    assert!(refusal.contains("used already"), "{refusal}");
}
