//! An engine that dies costs its own requests, nothing else.

use crate::harness::*;

#[tokio::test]
async fn a_killed_engine_ends_its_answers_in_typed_errors_and_starts_again() {
    let (tower, mini) = tower_and_mini().await;

    let engine = tower.engine().await;
    let long = echo(LONG);
    let here = tower.stream(&long).await.begun().await;
    let there = mini.stream(&long).await.begun().await;
    let whole = mini.ask(&long);
    let killing = async {
        tower.until_running(3).await;
        kill(engine, Signal::KILL);
    };
    let (whole, ()) = tokio::join!(whole, killing);
    here.rest().await.broke_with("engine_died");
    there.rest().await.broke_with("engine_died");
    assert_eq!((whole.status, whole.code()), (502, "engine_died"), "{}", whole.body);

    for machine in [&mini, &tower] {
        assert_eq!(machine.ask_until_answered(&echo("again")).await.text(), "again");
    }
    assert_ne!(tower.engine().await, engine);
    let status = tower.until("nothing runs", |status| status.running("tower") == 0).await;
    assert_eq!(status.health("mini"), "alive");
    assert_eq!(status.latency("tower")["failed"], 1, "of those that entered here");

    // The same from within: a panic in a step, and an exit of the whole process.
    for mishap in ["every 200ms panic after 2: hello", "every 200ms exit after 2: hello"] {
        let broken = mini.stream(&echo(mishap)).await.rest().await;
        assert!(broken.error.is_some() && !broken.done, "{broken:?}");
        assert_eq!(mini.ask_until_answered(&echo("again")).await.text(), "again");
    }
}
