//! The key of an endpoint goes to its server and to nobody else: not into files, logs, listings or errors, and not to
//! where its server sends us.

use std::path::Path;

use crate::harness::*;

const KEY: &str = "sk-very-secret-98765";

/// Every file below this folder that has the key in it.
fn with_key(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            with_key(&path, found);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            if bytes.windows(KEY.len()).any(|window| window == KEY.as_bytes()) {
                found.push(path.display().to_string());
            }
        }
    }
}

#[tokio::test]
async fn the_key_of_an_endpoint_is_nowhere_to_be_found() {
    let (server, thief) = (FarServer::start().await, FarServer::start().await);
    let mut tower = Machine::new("tower").model("echo").environment("FAR_KEY", KEY);
    // As much as may be is logged.
    tower = tower.environment("INGLE_LOG", "trace");
    let mut mini = Machine::new("mini").environment("INGLE_LOG", "trace");
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    tower.add_endpoint(FAR_MODEL, &server, &["--api-key-env", "FAR_KEY"]).await;
    mini.until_registered(&[FAR_MODEL]).await;
    assert_eq!(mini.ask_until_known(&far("plain")).await.text(), "Héllo \n🔥");
    let asked = server.requests().pop().unwrap();
    assert!(asked.head.contains(&format!("authorization: Bearer {KEY}")), "it is sent where it belongs");

    let mut said = String::new();
    for what in ["echo of the key", "breaks off", "broken event", "page"] {
        said += &mini.ask(&far(what)).await.body.to_string();
        said += &mini.explain("last").await.to_string();
    }
    // Nobody is followed to another host, with the key or without.
    let elsewhere = format!("elsewhere {}/v1/chat/completions", thief.url());
    let refused = mini.ask(&far(&elsewhere)).await;
    assert_eq!((refused.status, refused.code()), (502, "engine_error"), "{}", refused.body);
    assert!(refused.message().contains("sends us elsewhere"), "{}", refused.body);
    assert_eq!((thief.requests().len(), thief.connections()), (0, 0));
    for machine in [&tower, &mini] {
        for command in [&["status"][..], &["status", "--json"], &["models", "status", "--verbose"], &["models", "ls"]] {
            said += &machine.ingle(command).await.ok();
        }
        said += &machine.models(&["show", FAR_MODEL]).await.to_string();
        said += &machine.get("/v1/models").await.body.to_string();
        said += &machine.get("/admin/models").await.body.to_string();
    }
    assert!(said.contains("FAR_KEY") && !said.contains(KEY), "{said}");
    for machine in [&mut tower, &mut mini] {
        machine.stop().await;
        // Logs and outputs stand beside the state directory.
        let mut found = Vec::new();
        with_key(machine.state_dir().parent().unwrap(), &mut found);
        assert_eq!(found, Vec::<String>::new());
    }
}
