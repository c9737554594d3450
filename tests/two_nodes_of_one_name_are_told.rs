//! A member that takes another one's name is not let in, and hears why.

use crate::harness::*;

#[tokio::test]
async fn two_nodes_of_one_name_are_told() {
    let (mut tower, mut mini) = (Machine::new("tower"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.until_alive(&[&tower]).await;
    mini.stop().await;

    mini.name = "tower".into();
    mini.start().await;
    let status = mini.until("the refusal is told", |status| {
        status.nodes().iter().any(|node| node["health"]["why"].as_str().is_some_and(|why| why.contains("--name")))
    });
    let status = status.await;
    assert!(mini.log().contains("a node named `tower` is in this cluster already"), "in the log, too");
    assert_eq!(status.nodes().len(), 2);
    let seen = tower.status().await;
    assert_ne!(seen.health("mini"), "alive");
    assert_eq!(seen.nodes().iter().filter(|node| node["name"] == "tower").count(), 1);

    mini.kill_9().await;
    mini.name = "attic".into();
    mini.up().await;
    mini.until_alive(&[&tower]).await;
    tower.until_alive(&[&mini]).await;
    assert_eq!(tower.status().await.nodes().len(), 2, "the old name has gone");
}
