//! `/v1/models` has what can answer and says so; `/admin/models` has everything, also what nobody has loaded.

use crate::harness::*;

#[tokio::test]
async fn all_models_are_shown_with_their_states_on_all_nodes() {
    let (mut tower, mini) = tower_and_mini().await;
    let offered = mini.get("/v1/models").await.body;
    let [model] = &offered["data"].as_array().unwrap()[..] else { panic!("{offered}") };
    assert_eq!((&model["id"], &model["state"], &model["nodes"]), (&json!("echo"), &json!("ready"), &json!(["tower"])));

    // A file that nobody can fetch: known everywhere, and nobody can have it.
    mini.models(&["add", "--name", "minilm", "--source", "hf:owner/name/minilm.gguf", "--pin", "tower", "--unchecked"])
        .await;
    tower.until_registered(&["minilm"]).await;
    for machine in [&tower, &mini] {
        let all = machine.get("/admin/models").await.body;
        let of = |name: &str| all["models"].as_array().unwrap().iter().find(|model| model["name"] == name).cloned();
        let (echo, minilm) = (of("echo").unwrap(), of("minilm").unwrap());
        assert_eq!((&echo["state"], &echo["answers"]), (&json!("ready"), &json!(["tower"])), "{all}");
        assert_eq!((&echo["registered"], &minilm["registered"]), (&json!(false), &json!(true)), "{all}");
        assert_eq!((&minilm["answers"], &minilm["pinned"]), (&json!([]), &json!(["tower"])), "{all}");
        assert_eq!(minilm["nodes"][0]["node"], "tower", "{all}");
        assert_eq!(minilm["source"], "hf:owner/name/minilm.gguf", "{all}");
        let ids = machine.get("/v1/models").await.body;
        assert!(!ids["data"].as_array().unwrap().iter().any(|model| model["id"] == "minilm"), "{ids}");
    }

    // What a machine that is gone last said of itself is no state.
    tower.kill_9().await;
    mini.until("tower has failed", |status| status.health("tower") == "failed").await;
    let all = mini.get("/admin/models").await.body;
    let echo = all["models"].as_array().unwrap().iter().find(|model| model["name"] == "echo").unwrap();
    assert_eq!(echo["answers"], json!([]), "{all}");
    assert_eq!(echo["nodes"][0]["state"], "unknown (tower is failed)", "{all}");
}
