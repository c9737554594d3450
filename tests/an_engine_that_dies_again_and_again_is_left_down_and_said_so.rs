//! Three restarts within a minute; then the model stays down, everybody knows why, and the node lives on.

use crate::harness::*;

#[tokio::test]
async fn an_engine_that_dies_again_and_again_is_left_down_and_said_so() {
    let (tower, mini) = tower_and_mini().await;
    let mut engine = tower.engine().await;
    for death in 1..=4 {
        kill(engine, Signal::KILL);
        if death == 4 {
            break;
        }
        let before = engine;
        engine = until("another engine is there", async || {
            tower.engines().into_iter().find(|engine| *engine != before && is_alive(*engine))
        })
        .await;
        tower.until("it answers again", |status| status.model("tower")["state"] == "ready").await;
        assert_eq!(mini.ask_until_answered(&echo("again")).await.text(), "again");
    }
    for machine in [&tower, &mini] {
        let status = machine.until("it is given up", |status| {
            status.model("tower")["state"].as_str().is_some_and(|state| state.starts_with("failed"))
        });
        let said = status.await.model("tower")["state"].to_string();
        assert!(said.contains("died 4 times within a minute") && said.contains("restart the node"), "{said}");
    }
    assert!(tower.engines().is_empty());
    let refused = mini.ask(&echo("hello")).await;
    refused.is_not_now();
    assert!(refused.message().contains("died 4 times"), "{}", refused.message());
    assert_eq!(mini.status().await.health("tower"), "alive", "the node itself is well");
}
