//! Two machines that could not hear each other both changed the registry: afterwards both know everything.

use crate::harness::*;

const SOURCE: [&str; 3] = ["--source", "hf:owner/name/model.gguf", "--unchecked"];

async fn add(machine: &Machine, name: &str) {
    machine.models(&[&["add", "--name", name], &SOURCE[..]].concat()).await;
}

#[tokio::test]
async fn two_halves_that_changed_the_registry_are_merged() {
    let (mut tower, mut mini) = tower_and_mini().await;
    for name in ["both", "fought-over", "removed", "kept"] {
        add(&tower, name).await;
    }
    mini.until_registered(&["both", "fought-over", "kept", "removed"]).await;

    mini.stop().await;
    add(&tower, "of-tower").await;
    tower.models(&["set", "both", "threads=2"]).await;
    tower.models(&["set", "fought-over", "threads=2"]).await;
    tower.models(&["rm", "removed"]).await;
    tower.models(&["rm", "kept"]).await;
    tower.models(&["set-default", "of-tower", "--force"]).await;
    tower.kill_9().await;

    mini.start().await;
    add(&mini, "of-mini").await;
    mini.models(&["set", "both", "batch_size=3"]).await;
    mini.models(&["set", "fought-over", "threads=3"]).await;
    mini.models(&["pin", "kept", "mini"]).await;

    tower.up().await;
    for machine in [&tower, &mini] {
        machine.until_registered(&["both", "fought-over", "kept", "of-mini", "of-tower"]).await;
        let both = |model: &Value| model["parameters"] == json!({"batch_size": 3, "threads": 2});
        machine.until_model("both", "both have their way", both).await;
        let fought_over = machine.model_named("fought-over").await;
        // The last one holds, and the other one is not lost in silence.
        assert_eq!(fought_over["parameters"], json!({"threads": 3}), "{fought_over}");
        let overruled = json!([{"field": "threads", "value": "2", "by": "tower"}]);
        assert_eq!(fought_over["overruled"], overruled, "{fought_over}");
        let kept = machine.model_named("kept").await;
        assert_eq!((&kept["pinned"], &kept["overruled"][0]["field"]), (&json!(["mini"]), &json!("removal")), "{kept}");
        assert_eq!(machine.models(&["status"]).await["default"], "of-tower");
    }
    let said = tower.ingle(&["models", "status"]).await.ok();
    assert!(said.contains("`threads` was set to 2 by tower at the same time"), "{said}");
    // Who sets it again settles it, for all.
    mini.models(&["set", "fought-over", "threads=5"]).await;
    let settled = |model: &Value| model["parameters"] == json!({"threads": 5}) && model["overruled"] == json!([]);
    tower.until_model("fought-over", "it is settled", settled).await;

    // A machine that had nothing to do with it joins and knows all; its own models come along.
    let mut attic = Machine::new("attic");
    attic.up().await;
    add(&attic, "of-attic").await;
    attic.models(&["set-default", "of-attic", "--force"]).await;
    attic.join(&tower).await;
    attic.until_alive(&[&tower]).await;
    let all = ["both", "fought-over", "kept", "of-attic", "of-mini", "of-tower"];
    for machine in [&attic, &tower, &mini] {
        machine.until_registered(&all).await;
        assert_eq!(machine.models(&["status"]).await["default"], "of-tower", "the household's choice holds");
    }
}
