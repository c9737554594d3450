//! Events: models that come and go, nodes that do, and what is said of the registry, told by a node that has no part in
//! any of it.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::harness::*;

/// Events one after the other, as a program reads them.
struct Told {
    lines: Lines<BufReader<ChildStdout>>,
    _follower: Child,
    seen: Vec<Value>,
}

impl Told {
    /// Follows what `machine` tells, by the command.
    fn by(machine: &Machine) -> Self {
        let mut command = ingle();
        command.args(["events", "--follow", "--json", "--state-dir", machine.state_dir().to_str().unwrap()]);
        let mut follower = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
        Self { lines, _follower: follower, seen: Vec::new() }
    }

    /// Waits for an event of this kind, about this node or model, to this.
    async fn until(&mut self, kind: &str, about: &str, to: &str) -> Value {
        loop {
            let line = tokio::time::timeout(DEADLINE, self.lines.next_line()).await;
            let line = line.unwrap_or_else(|_| panic!("no {about} {to} in {:#?}", self.seen)).unwrap().unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            self.seen.push(event.clone());
            let is_about = event["model"] == about || (event["model"].is_null() && event["node"] == about);
            if event["kind"] == kind && is_about && (event["to"] == to || (to == "gone" && event["to"].is_null())) {
                return event;
            }
        }
    }
}

#[tokio::test]
async fn any_node_tells_what_happens_on_all() {
    let (mut tower, mini) = tower_and_mini().await;
    let mut told = Told::by(&mini);
    told.until("node", "tower", "alive").await;
    told.until("model", "echo", "ready").await;

    tower.ingle(&["models", "load", "echo", "--name", "second"]).await.ok();
    let ready = told.until("model", "second", "ready").await;
    assert_eq!((&ready["node"], &ready["from"].is_null()), (&json!("tower"), &false), "{ready}");
    tower.ingle(&["models", "unload", "second"]).await.ok();
    told.until("model", "second", "unloaded").await;

    tower.models(&["add", "--name", "minilm", "--source", "hf:owner/name/model.gguf", "--unchecked"]).await;
    let registered = told.until("registry", "minilm", "registered").await;
    assert_eq!(registered["node"], "tower");
    tower.models(&["set", "minilm", "context_length=128"]).await;
    assert_eq!(told.until("registry", "minilm", "changed").await["why"], "context_length");
    mini.models(&["set-default", "echo"]).await;
    told.until("default", "mini", "echo").await;
    mini.models(&["rm", "minilm"]).await;
    told.until("registry", "minilm", "removed").await;

    // An answer that loses its machine, and the machine.
    tower.kill_9().await;
    let failed = told.until("node", "tower", "failed").await;
    assert!(failed["why"].as_str().is_some_and(|why| !why.is_empty()), "{failed}");
    tower.up().await;
    told.until("node", "tower", "alive").await;

    // Numbers only grow, and whoever asks with one gets what came behind it.
    let numbers: Vec<u64> = told.seen.iter().map(|event| event["number"].as_u64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    let since = failed["number"].as_u64().unwrap();
    let url = mini.url(&format!("/admin/events?since={since}&follow=false"));
    let events = client().get(&url).send().await.unwrap();
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let text = events.text().await.unwrap();
    assert!(text.starts_with(&format!("id: {}\ndata: {{", since + 1)) && text.ends_with("}\n\n"), "{text}");
    let lines = client().get(&url).header("accept", "application/x-ndjson").send().await.unwrap().text().await.unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["number"], since + 1);
    let text = mini.ingle(&["events"]).await.ok();
    assert!(text.contains("Z  second on tower is ") && text.contains(" -> failed: "), "{text}");
    assert_eq!(client().get(mini.url("/admin/events?since=x")).send().await.unwrap().status(), 400);
    let foreign = client().get(&url).header("origin", "https://evil.example").send().await.unwrap();
    assert_eq!(foreign.status(), 403, "guarded as everything");

    // Who follows does not hold up the end.
    let mut mini = mini;
    let following = client().get(mini.url("/admin/events")).send().await.unwrap();
    let begun = std::time::Instant::now();
    mini.stop().await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(following.text().await.unwrap().contains("event: end\n"), "it is told that it is over");
}
