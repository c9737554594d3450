//! A model that a command reported as registered is on disk, also where the node is killed in the next moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::harness::*;

#[tokio::test]
async fn what_was_registered_survives_kill_9() {
    let server = FarServer::start().await;
    let mut tower = Machine::new("tower").environment("FAR_KEY", "sk-very-secret-1234");
    tower.up().await;
    tower.add_endpoint("glm-4.7", &server, &["--api-key-env", "FAR_KEY"]).await;
    tower.kill_9().await;
    tower.up().await;
    assert_eq!(tower.ask_until_known(&to("glm-4.7", "plain")).await.text(), "Héllo \n🔥");
    let received = server.requests().pop().unwrap();
    assert!(received.head.contains("authorization: Bearer sk-very-secret-1234\r\n"));

    // Killed in the middle of many: all that were acknowledged are there, and at most one that was not.
    for round in 0..3 {
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let machine = Arc::new(tower);
        let (adding, count) = (machine.clone(), acknowledged.clone());
        let adder = tokio::spawn(async move {
            for number in 0.. {
                let name = format!("m{round}-{number}");
                let source = ["models", "add", "--name", &name, "--source", "hf:owner/name/model.gguf", "--unchecked"];
                if adding.ingle(&source).await.code != Some(0) {
                    return;
                }
                count.store(number + 1, Ordering::SeqCst);
            }
        });
        until("some are registered", async || (acknowledged.load(Ordering::SeqCst) > 3 + round).then_some(())).await;
        kill(machine.pid(), Signal::KILL);
        adder.await.unwrap();
        tower = Arc::into_inner(machine).unwrap();
        tower.ended().await;
        tower.up().await;
        let count = acknowledged.load(Ordering::SeqCst);
        let names = tower.registered().await;
        let found = names.iter().filter(|name| name.starts_with(&format!("m{round}-"))).count();
        assert!((0..count).all(|number| names.contains(&format!("m{round}-{number}"))), "{count}: {names:?}");
        assert!(found <= count + 1, "{count}: {names:?}");
    }
    tower.models(&["set-default", "glm-4.7"]).await;
    tower.models(&["rm", "m0-0"]).await;
    tower.kill_9().await;

    // A damaged file is set aside and said.
    let path = tower.state_dir().join("registry.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("sk-very-secret") && text.contains("FAR_KEY"));
    tower.up().await;
    assert!(!tower.registered().await.contains(&"m0-0".into()));
    assert_eq!(tower.model_named("glm-4.7").await["is_default"], true);
    tower.kill_9().await;
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    tower.up().await;
    assert!(tower.registered().await.is_empty());
    let problems = tower.status().await.0["problems"].to_string();
    assert!(problems.contains("registry.damaged-"), "{problems}");
}
