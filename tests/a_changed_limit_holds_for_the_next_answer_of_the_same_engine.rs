//! Limits of a running engine change between two steps: nothing is restarted, and what runs is not disturbed.

use crate::harness::*;

#[tokio::test]
async fn a_changed_limit_holds_for_the_next_answer_of_the_same_engine() {
    let mut tower = Machine::new("tower").model("echo");
    tower.up().await;
    let engine = tower.engine().await;
    let before = tower.stream(&echo("repeat 8 every 20ms: hello ")).await.begun().await;

    assert_eq!(tower.set("echo", &["max_tokens=5", "prefill_budget=16", "threads=1"]).await, "live");
    let short = tower.ask(&echo("hello world")).await;
    assert_eq!((short.text(), &short.body["choices"][0]["finish_reason"]), ("hello", &json!("length")));
    let asked = json!({"max_tokens": 3, "model": "echo", "messages": [{"role": "user", "content": "hello"}]});
    assert_eq!(tower.ask(&asked).await.text(), "hel", "a request may ask for less");
    let shown = tower.parameters("echo").await;
    assert_eq!((&shown["max_tokens"]["value"], &shown["max_tokens"]["source"]), (&json!(5), &json!("set")));
    assert_eq!((&shown["kv_type"]["value"], &shown["kv_type"]["source"]), (&json!("f16"), &json!("default")));
    before.rest().await.is_whole(&"hello ".repeat(8));

    assert_eq!(tower.set("default", &["max_tokens=default"]).await, "live");
    assert_eq!(tower.ask(&echo("hello world")).await.text(), "hello world");
    assert_eq!(tower.set("echo", &["max_tokens=none"]).await, "unchanged");

    // Two run; with room for one both go on, and a third waits until there is room for it.
    let running = [tower.stream(&echo(LONG)).await.begun().await, tower.stream(&echo(LONG)).await.begun().await];
    assert_eq!(tower.set("echo", &["batch_size=1"]).await, "live");
    let third = tokio::spawn({
        let (url, body) = (tower.url("/v1/chat/completions"), echo("me too"));
        async move { client().post(url).json(&body).send().await.unwrap().status() }
    });
    let status = tower.until("one waits", |status| status.0["waiting"] == 1).await;
    assert_eq!(status.running("tower"), 2);
    assert_eq!(tower.set("echo", &["batch_size=3"]).await, "live");
    assert_eq!(third.await.unwrap(), 200);
    assert_eq!(tower.engines(), [engine]);
    drop(running);
}
