//! An engine that dies is started again, and its answers go on there: the clients see one answer each.

use crate::harness::*;

const ANSWER: &str = "repeat 60 every 50ms: hello ";

#[tokio::test]
async fn answers_go_on_when_their_engine_is_killed() {
    let (tower, mini) = tower_and_mini().await;
    let text = "hello ".repeat(60);

    let engine = tower.engine().await;
    let here = tower.stream(&echo(ANSWER)).await.begun().await;
    let there = mini.stream(&echo(ANSWER)).await.begun().await;
    let answer = echo(ANSWER);
    let whole = mini.ask(&answer);
    let killing = async {
        tower.until_running(3).await;
        kill(engine, Signal::KILL);
    };
    let (whole, ()) = tokio::join!(whole, killing);
    here.rest().await.is_whole(&text);
    there.rest().await.is_whole(&text);
    assert_eq!(whole.text(), text);
    let undisturbed = mini.ask(&answer).await;
    assert_eq!(whole.body["usage"], undisturbed.body["usage"], "what was said before the move counts once");
    assert_ne!(tower.engine().await, engine);

    let explained = mini.explain(whole.headers["x-request-id"].to_str().unwrap()).await;
    assert_eq!(explained["outcome"], "finished", "{explained}");
    assert_eq!(explained["attempts"].as_array().unwrap().len(), 2, "{explained}");
    let status = tower.until("nothing runs", |status| status.running("tower") == 0).await;
    assert_eq!(status.health("mini"), "alive");
}

#[tokio::test]
async fn what_kills_every_engine_ends_in_a_typed_error() {
    // A panic in a step, and an exit of the whole process: each time after two letters more.
    for mishap in ["every 200ms panic after 2: hello", "every 200ms exit after 2: hello"] {
        let (_tower, mini) = tower_and_mini().await;
        let broken = mini.stream(&echo(mishap)).await.rest().await;
        assert!(broken.error.is_some() && !broken.done, "{broken:?}");
        assert_eq!(mini.ask_until_answered(&echo("again")).await.text(), "again");
    }
}
