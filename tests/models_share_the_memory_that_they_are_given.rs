//! The longest unused model goes for one that comes; what does not fit is refused with the numbers.

use crate::harness::*;

/// Room for two engines of some 100 MiB.
const TWO: &str = "[model]\nuse = \"none\"\nmemory_mib = 250\n";

fn ask(model: &str) -> Value {
    let mut body = echo("hello");
    body["model"] = model.into();
    body
}

#[tokio::test]
async fn the_longest_unused_goes_and_comes_back_when_it_is_asked_for() {
    let mut tower = Machine::from_settings("tower").settings(TWO);
    tower.up().await;
    for model in ["a", "b"] {
        tower.ingle(&["models", "load", "echo", "--name", model]).await.ok();
    }
    // `a` is used, so `b` is the one that goes for `c`.
    tower.ask(&ask("a")).await.text();
    tower.ingle(&["models", "load", "echo", "--name", "c"]).await.ok();
    let states = async || {
        let all = tower.processes().await;
        ["a", "b", "c"].map(|name| all[name]["state"].as_str().unwrap().to_owned())
    };
    assert_eq!(states().await, ["ready", "unloaded", "ready"]);
    // A request for it brings it back, for which `a` goes.
    assert_eq!(tower.ask(&ask("b")).await.text(), "hello");
    assert_eq!(states().await, ["unloaded", "ready", "ready"]);

    // What is pinned or in use stays, and the one that finds no room is told the numbers.
    tower.ingle(&["models", "load", "b", "--pin"]).await.ok();
    let mut long = echo(LONG);
    long["model"] = "c".into();
    let running = tower.stream(&long).await.begun().await;
    let complaint = tower.ingle(&["models", "load", "a"]).await.fails_with(1);
    for part in ["`a` needs 100 MiB", "50 MiB are left", "250 MiB", "`b` has 100 MiB and is pinned", "`c` has 100 MiB"]
    {
        assert!(complaint.contains(part), "{part:?} in {complaint}");
    }
    let told = tower.ask(&ask("a")).await;
    told.is_not_now();
    assert!(told.message().contains("needs 100 MiB"), "{}", told.message());
    assert_eq!(states().await[1..], ["ready", "ready"]);
    drop(running);
}

#[tokio::test]
async fn a_model_that_nobody_uses_goes_after_its_time() {
    let mut tower = Machine::new("tower");
    tower.up().await;
    tower.ingle(&["models", "load", "echo", "--name", "brief", "--keep-alive", "2s"]).await.ok();
    assert_eq!(tower.ask(&ask("brief")).await.text(), "hello");
    let gone = async || (tower.processes().await["brief"]["state"] == "unloaded").then_some(());
    until("its time is up", gone).await;
    assert!(tower.engines().is_empty());
    assert_eq!(tower.ask(&ask("brief")).await.text(), "hello", "and it comes back");
}

#[tokio::test]
async fn a_model_that_is_too_large_is_refused_with_the_numbers() {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../actors/engine/tests/fixtures/tiny/llama3.gguf");
    let mut tower = Machine::from_settings("tower").settings("[model]\nuse = \"none\"\nmemory_mib = 64\n");
    tower.up().await;
    let complaint = tower.ingle(&["models", "load", tiny, "--name", "tiny"]).await.fails_with(1);
    for part in ["`tiny` needs", "weights 1 MiB", "keys and values", "only 64 MiB are left", "context_length"] {
        assert!(complaint.contains(part), "{part:?} in {complaint}");
    }
    let listed = tower.get("/admin/models").await;
    assert!(listed.body["here"][0]["state"].as_str().unwrap().starts_with("failed ("), "{}", listed.body);
}
