//! The registry is one for the whole cluster: who runs a model, who shows it and who changes it can be three machines.

use crate::harness::*;

#[tokio::test]
async fn a_model_said_on_one_node_is_known_on_all() {
    let server = FarServer::start().await;
    let (tower, mini) = tower_and_mini().await;
    let added = mini.add_endpoint("glm-4.7", &server, &["batch_size=3"]).await;
    assert_eq!((&added["pinned"], &added["nodes"][0]["state"]), (&json!(["mini"]), &json!("ready")), "{added}");
    assert_eq!(added["endpoint"]["model"], FAR_MODEL, "the only one there, by its name");

    let ready = |model: &Value| model["nodes"][0]["state"] == "ready";
    let shown = tower.until_model("glm-4.7", "it is ready", ready).await;
    assert_eq!((&shown["nodes"][0]["node"], &shown["changed_by"]), (&json!("mini"), &json!("mini")), "{shown}");
    assert_eq!((&shown["type"], &shown["parameters"]), (&json!("llm"), &json!({"batch_size": 3})), "{shown}");
    assert_eq!(tower.ask(&to("glm-4.7", "plain")).await.text(), "Héllo \n🔥");
    let offered = tower.get("/v1/models").await.body;
    assert!(offered["data"].as_array().unwrap().iter().any(|model| model["id"] == "glm-4.7"), "{offered}");
    // A node's own model is there as well, and is said to be no entry.
    let own = mini.model_named("echo").await;
    assert_eq!((&own["registered"], &own["nodes"][0]["node"]), (&json!(false), &json!("tower")), "{own}");

    // Pinned elsewhere it runs there, too, and then only there.
    tower.models(&["pin", "glm-4.7", "tower", "mini"]).await;
    let both =
        |model: &Value| model["nodes"].as_array().is_some_and(|nodes| nodes.iter().all(|on| on["state"] == "ready"));
    mini.until_model("glm-4.7", "both have it", |model| model["nodes"][1].is_object() && both(model)).await;
    mini.models(&["pin", "glm-4.7", "tower"]).await;
    let moved =
        mini.until_model("glm-4.7", "tower alone has it", |model| model["nodes"][1].is_null() && both(model)).await;
    assert_eq!(moved["nodes"][0]["node"], "tower", "{moved}");
    assert_eq!(mini.ask(&to("glm-4.7", "plain")).await.node(), "tower");

    // A file that nobody has loaded is absent, and says so to who asks for it.
    let sha256 = "ab".repeat(32);
    let source = "hf:owner/name/model.gguf";
    mini.models(&[
        "add",
        "--name",
        "minilm",
        "--type",
        "embedding",
        "--source",
        source,
        "--sha256",
        &sha256,
        "--unchecked",
    ])
    .await;
    let absent = tower.until_model("minilm", "it is known", |model| model["source"] == source).await;
    assert_eq!((&absent["sha256"], &absent["nodes"][0]["state"]), (&json!(sha256), &json!("absent")), "{absent}");
    let asked = tower.ask(&to("minilm", "hello")).await;
    asked.is_not_now();
    assert!(asked.message().contains("no machine has it loaded"), "{}", asked.message());
    let text = tower.ingle(&["models", "status", "--verbose"]).await.ok();
    assert!(text.contains("source      hf:owner/name/model.gguf") && text.contains("absent"), "{text}");

    // What is set of a registered model on any node is known to all, and a running one takes it.
    let echo_file = tower.ingle(&["models", "set", "minilm", "context_length=128"]).await.ok();
    assert!(echo_file.contains("when the model starts"), "{echo_file}");
    let set = |model: &Value| model["parameters"]["context_length"] == 128;
    mini.until_model("minilm", "its parameter is known", set).await;
    assert_eq!(mini.parameters("minilm").await["context_length"]["value"], 128);
    mini.models(&["rm", "minilm"]).await;
    tower.until_registered(&["glm-4.7"]).await;
    assert_eq!(tower.ask(&to("minilm", "hello")).await.status, 404);
}

#[tokio::test]
async fn a_running_model_takes_what_is_set_of_it_on_another_node() {
    let (tower, mini) = tower_and_mini().await;
    // The name of what runs there.
    mini.models(&["add", "--name", "echo", "--source", "hf:owner/name/model.gguf", "--unchecked"]).await;
    tower.until_registered(&["echo"]).await;
    mini.models(&["set", "echo", "max_tokens=5"]).await;
    let taken = async || (tower.ask(&echo("hello world")).await.text() == "hello").then_some(());
    until("tower's model takes it", taken).await;
    // And the other way round: what is set where it runs is known to all.
    assert_eq!(tower.set("echo", &["max_tokens=7"]).await, "live");
    mini.until_model("echo", "it is known", |model| model["parameters"]["max_tokens"] == 7).await;
    assert_eq!(mini.ask(&echo("hello world")).await.text(), "hello w");
}
