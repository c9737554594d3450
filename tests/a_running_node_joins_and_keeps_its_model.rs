//! `ingle join` where a node runs: its cluster part starts anew, its model stays loaded and serves all the while.

use crate::harness::*;

#[tokio::test]
async fn a_running_node_joins_and_keeps_its_model() {
    let (mut tower, mut mini) = (Machine::new("tower"), Machine::new("mini").model("echo"));
    let mut attic = Machine::new("attic");
    tower.up().await;
    mini.up().await;
    // Somebody to say goodbye to, which takes its time.
    attic.join(&mini).await;
    attic.up().await;
    mini.until_alive(&[&attic]).await;
    let engine = mini.engine().await;
    let before = mini.status().await;
    let stream = mini.stream(&echo("repeat 30 every 20ms: hello ")).await.begun().await;

    // Requests on the joining machine find its model at any moment.
    let (token, address) = tower.token().await;
    let joining = mini.try_join(&address, &token, &["--leave-current"]);
    let client = client();
    let asking = async {
        loop {
            let request = client.post(mini.url("/v1/chat/completions")).json(&echo("still there"));
            let answer = request.send().await.unwrap();
            let (status, text) = (answer.status(), answer.text().await.unwrap());
            assert!(status == 200 && text.contains("still there"), "{status}: {text}");
        }
    };
    tokio::select! {
        joined = joining => drop(joined.ok()),
        () = asking => {}
    }
    assert_eq!(mini.ask(&echo("still there")).await.text(), "still there");
    stream.rest().await.is_whole(&"hello ".repeat(30));

    tower.until_alive(&[&mini]).await;
    mini.until_alive(&[&tower]).await;
    let after = mini.status().await;
    assert_ne!(after.0["cluster"], before.0["cluster"]);
    assert_eq!(after.0["cluster"], tower.status().await.0["cluster"]);
    assert_ne!(after.0["this_node"], before.0["this_node"], "the signer chose the id");
    assert_eq!(mini.engine().await, engine, "the engine process is the same");

    tower.until("mini's model is ready", |status| status.model("mini")["state"] == "ready").await;
    let answer = tower.ask(&echo("over there")).await;
    assert_eq!((answer.text(), answer.node()), ("over there", "mini"));
    assert_eq!(tower.ingle(&["chat", "-m", "echo", "by hand"]).await.ok(), "by hand\n");
}
