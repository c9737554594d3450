//! Waiting is bounded and fair: a program that asks for everything at once delays others by a request, not by a queue.

use crate::harness::*;

const TWO_SLOTS: &str = "[model.parameters]\nbatch_size = 2\n[admission]\nqueue_requests = 40\n";

#[tokio::test]
async fn a_script_does_not_starve_a_person() {
    let mut tower = Machine::new("tower").model("echo").settings(TWO_SLOTS);
    tower.up().await;
    let body = echo("repeat 5 every 100ms: hello ");
    let order = std::sync::Mutex::new(Vec::new());
    let ask = async |who: &'static str, key: &str| {
        let answer = tower.ask_with(&body, &[("authorization", key)]).await;
        assert_eq!(answer.text(), "hello ".repeat(5));
        order.lock().unwrap().push(who);
    };
    let script = futures_util::future::join_all((0..30).map(|_| ask("script", "Bearer script")));
    let person = async {
        tower.until("the script waits", |status| status.0["waiting"].as_u64().unwrap() > 20).await;
        ask("person", "Bearer person").await;
    };
    tokio::join!(script, person);
    let order = order.into_inner().unwrap();
    let at = order.iter().position(|who| *who == "person").unwrap();
    let when_asked = 8;
    assert!(at < when_asked + 8, "the person came in as number {at} of {}", order.len());
}

#[tokio::test]
async fn what_does_not_fit_is_told_when_to_come_again() {
    let mut tower = Machine::new("tower").model("echo").settings(TWO_SLOTS);
    tower.up().await;
    let body = echo(LONG);
    let script: Vec<_> = (0..43)
        .map(|_| {
            let request = client().post(tower.url("/v1/chat/completions")).header("authorization", "Bearer script");
            tokio::spawn(request.json(&body).send())
        })
        .collect();
    tower.until("the queue is full", |status| status.0["waiting"] == 40).await;
    // Our capacity: all that waits is its own.
    let full = tower.ask_with(&body, &[("authorization", "Bearer script")]).await;
    full.is_not_now();
    // Its share: somebody else came, and it has more than half.
    let person = client().post(tower.url("/v1/chat/completions")).json(&body).send();
    let person = tokio::spawn(person);
    let over = until("somebody of the script is sent away", async || {
        let answer = tower.ask_with(&body, &[("authorization", "Bearer script")]).await;
        (answer.status == 429).then_some(answer)
    })
    .await;
    assert_eq!(over.code(), "rate_limit_exceeded");
    assert!(over.headers.contains_key("retry-after"));
    assert!(!person.is_finished(), "the person waits in its place");
    person.abort();
    for request in script {
        request.abort();
    }
    tower.until("nobody waits", |status| status.0["waiting"] == 0 && status.running("tower") == 0).await;

    let wrong = tower.ask_with(&echo("hello"), &[("x-ingle-priority", "urgent")]).await;
    assert_eq!((wrong.status, wrong.body["error"]["param"].as_str()), (400, Some("x-ingle-priority")));
    let hello = tower.ask_with(&echo("hello"), &[("x-ingle-priority", "background")]).await;
    assert_eq!(hello.text(), "hello");
}
