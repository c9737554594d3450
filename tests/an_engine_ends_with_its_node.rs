//! No engine process outlives its node, whatever both are doing when the node is killed.

use crate::harness::*;

#[tokio::test]
async fn an_engine_ends_with_its_node() {
    let mut tower = Machine::new("tower").model("echo");
    for text in ["hello", LONG, "stall 500000ms after 1: hello"] {
        tower.up().await;
        let engine = tower.engine().await;
        let stream = tower.stream(&echo(text)).await.begun().await;
        tower.kill_9().await;
        until("the engine process is gone", async || (!is_alive(engine)).then_some(())).await;
        drop(stream);
    }
    // And at the orderly end.
    tower.up().await;
    let engine = tower.engine().await;
    tower.stop().await;
    assert!(!is_alive(engine));
}
