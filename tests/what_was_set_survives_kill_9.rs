//! A parameter that a command reported as set is on disk, and goes before the configuration file.

use crate::harness::*;

#[tokio::test]
async fn what_was_set_survives_kill_9() {
    let mut tower = Machine::new("tower").model("echo");
    std::fs::create_dir_all(tower.state_dir()).unwrap();
    let config = "[model]\nuse = \"echo\"\n[model.parameters]\nmax_tokens = 9\ncontext_length = 300\n";
    std::fs::write(tower.state_dir().join("ingle.toml"), config).unwrap();
    tower.up().await;
    assert_eq!(tower.ask(&echo("hello world")).await.text(), "hello wor");
    assert_eq!(tower.set("echo", &["max_tokens=5"]).await, "live");
    assert_eq!(tower.set("echo", &["context_length=600"]).await, "moved");
    let before = tower.parameters("echo").await;
    assert_eq!(before["context_length"]["source"], "set");
    tower.kill_9().await;

    tower.up().await;
    assert_eq!(tower.parameters("echo").await, before);
    assert_eq!(tower.ask(&echo("hello world")).await.text(), "hello");
    assert_eq!(tower.status().await.model("tower")["context_length"], 600);

    // An engine that dies comes back with them as well.
    kill(tower.engine().await, Signal::KILL);
    assert_eq!(tower.ask_until_answered(&echo("hello world")).await.text(), "hello");

    // Without a node the same command sets them for the next start.
    tower.stop().await;
    assert_eq!(tower.set("echo", &["max_tokens=default", "context_length=64"]).await, "stored");
    assert_eq!(tower.parameters("echo").await["max_tokens"]["source"], "config");
    tower.up().await;
    assert_eq!(tower.ask(&echo("hello world")).await.text(), "hello wor");
    assert_eq!(tower.status().await.model("tower")["context_length"], 64);
}
