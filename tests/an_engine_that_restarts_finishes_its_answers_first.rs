//! Where a second engine shall not run beside the first, the first finishes before the second starts.

use crate::harness::*;

#[tokio::test]
async fn an_engine_that_restarts_finishes_its_answers_first() {
    let mut tower = Machine::new("tower").model("echo");
    tower.up().await;
    let engine = tower.engine().await;
    let running = tower.stream(&echo("repeat 40 every 20ms: hello ")).await.begun().await;
    let setting = tower.ingle(&["models", "set", "echo", "kv_type=int8", "--restart"]);
    let meanwhile = async {
        tower.until("it drains", |status| status.model("tower")["state"] == "draining").await;
        let busy = tower.ingle(&["models", "set", "echo", "max_tokens=1"]).await.fails_with(1);
        assert!(busy.contains("another change is under way"), "{busy}");
        // Who asks meanwhile waits for the other engine.
        let me_too = echo("me too");
        let (waited, running) = tokio::join!(tower.ask(&me_too), running.rest());
        assert_eq!(waited.text(), "me too");
        running.is_whole(&"hello ".repeat(40));
    };
    let (set, ()) = tokio::join!(setting, meanwhile);
    assert!(set.err.contains("Waiting for 1 answer to end"), "{}", set.err);
    assert!(set.ok().contains("finished its answers and was started anew"));
    assert_ne!(tower.engine().await, engine);
    assert_eq!(tower.ask(&echo("again")).await.text(), "again");
    assert_eq!(tower.parameters("echo").await["kv_type"]["value"], "int8");
}
