//! What cannot be registered is said with its reason, and nothing of it stays anywhere.

use crate::harness::*;

#[tokio::test]
async fn bad_registrations_leave_nothing_behind() {
    let server = FarServer::start().await;
    let (tower, mini) = tower_and_mini().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("poem.gguf");
    std::fs::write(&file, "no model at all").unwrap();
    let (poem, url) = (format!("file:{}", file.display()), server.url());
    let digest = "AB".repeat(32);
    let add = async |arguments: &[&str], code: i32| {
        let ran = mini.ingle(&[&["models", "add"], arguments].concat()).await;
        assert_eq!(ran.out, "");
        ran.fails_with(code)
    };
    for (arguments, code, expected) in [
        (&["--name", "default", "--endpoint", &url][..], 1, "always means"),
        (&["--name", "../x", "--endpoint", &url], 1, "begin with a letter"),
        (&["--name", "echo", "--endpoint", &url], 1, "has a model `echo` already (on tower)"),
        (&["--name", "x", "--endpoint", "box:80"], 1, "http or https"),
        (&["--name", "x", "--endpoint", "http://me:hunter2@box"], 1, "password"),
        (&["--name", "x", "--endpoint", "http://127.0.0.1:9"], 1, "cannot connect"),
        (&["--name", "x", "--endpoint", &url, "--model", "another"], 1, "does not have the model `another`"),
        (&["--name", "x", "--endpoint", &url, "--api-key-env", "NO_KEY"], 1, "no environment variable NO_KEY"),
        (&["--name", "x", "--endpoint", &url, "--api-key-env", "sk-12"], 1, "environment variable"),
        (&["--name", "x", "--endpoint", &url, "--pin", "cellar"], 1, "no node `cellar`"),
        (&["--name", "x", "--endpoint", &url, "max_tokens=3"], 1, "far server's own business"),
        (&["--name", "x", "--source", "hf:owner/name/x.gguf", "--type", "stt"], 1, "not built yet"),
        (&["--name", "x", "--source", "hf:owner/name/../x"], 1, "without `..`"),
        (&["--name", "x", "--source", "ftp://x"], 1, "no kind of source"),
        (&["--name", "x", "--source", "hf:owner/name/x.gguf", "--sha256", &digest], 1, "lower-case hex"),
        (&["--name", "x", "--source", "file:/no/such/file.gguf"], 1, "file.gguf"),
        (&["--name", "x", "--source", &poem], 1, "poem.gguf"),
        (&["--name", "x", "--source", "hf:owner/name/x.gguf", "batch_size=0"], 2, "batch_size is 0"),
        (&["--name", "x"], 2, "--source"),
    ] {
        let said = add(arguments, code).await;
        assert!(said.contains(expected) && !said.contains("hunter2"), "{arguments:?}: {said}");
    }
    for (status, body, expected) in [
        (200, "<html>", "cannot be read"),
        (200, r#"{"data":[]}"#, "no model"),
        (200, r#"{"data":[{"id":"a"},{"id":"b"}]}"#, "(a, b)"),
        (500, "{}", "500"),
        (503, "{}", "still reads its model"),
    ] {
        server.set_models(status, body);
        let said = add(&["--name", "x", "--endpoint", &url], 1).await;
        assert!(said.contains(expected) && said.contains("nothing is registered"), "{body}: {said}");
    }
    for machine in [&tower, &mini] {
        assert!(machine.registered().await.is_empty());
        assert!(!machine.state_dir().join("registry.json").exists(), "nothing was ever written");
        assert_eq!(machine.ask(&to("x", "plain")).await.status, 404);
    }
    assert_eq!(server.requests().len(), 0);

    // With --unchecked it is registered all the same, and comes when its server does.
    let added = mini.add_endpoint("x", &server, &["--unchecked", "--model", FAR_MODEL]).await;
    assert!(added["nodes"][0]["state"].as_str().is_some_and(|state| state != "ready"), "{added}");
    let twice = add(&["--name", "x", "--endpoint", &url], 1).await;
    assert!(twice.contains("registered already"), "{twice}");
    server.set_models(200, &json!({"data": [{"id": FAR_MODEL}]}).to_string());
    assert_eq!(tower.ask_until_answered(&to("x", "plain")).await.text(), "Héllo \n🔥");
    let unknown = mini.ingle(&["models", "rm", "y"]).await.fails_with(1);
    assert!(unknown.contains("no model `y`"), "{unknown}");
    let own = mini.ingle(&["models", "rm", "echo"]).await.fails_with(1);
    assert!(own.contains("given to a node when that was started"), "{own}");
}
