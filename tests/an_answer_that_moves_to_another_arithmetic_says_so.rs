//! Machines that compute in different ways give different continuations. An answer that has to move between them goes on
//! without a gap or a word said twice, and `explain` says that it did.

use crate::harness::*;

#[tokio::test]
async fn an_answer_that_moves_to_another_arithmetic_says_so() {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    // Its keys and values have eight bits: the same file, another arithmetic.
    let mut attic = Machine::new("attic").model("default").settings("[model.parameters]\nkv_type = \"int8\"\n");
    attic.join(&tower).await;
    attic.up().await;
    let mut mini = Machine::new("mini");
    mini.join(&tower).await;
    mini.up().await;
    for name in ["tower", "attic"] {
        mini.until("both are ready", |status| status.model(name)["state"] == "ready").await;
    }
    let message = json!({"role": "user", "content": "Tell me a long story about a lighthouse."});
    let question = json!({
        "model": "default", "messages": [message], "max_tokens": 200, "temperature": 0, "logprobs": true,
        "stream_options": {"include_usage": true},
    });
    let stream = mini.stream(&question).await.until_text(40).await;
    let victim = stream.node.clone();
    let mut workers = [tower, attic];
    workers.iter_mut().find(|worker| worker.name == victim).unwrap().kill_9().await;
    let moved = stream.rest().await;
    assert!(moved.error.is_none() && moved.done, "{moved:?}");
    let explained = mini.explain("last").await;
    let attempts = explained["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2, "{explained}");
    assert_ne!(attempts[0]["numerics"], attempts[1]["numerics"], "{explained}");
    let note = explained["notes"][0].as_str().unwrap_or_default();
    assert!(note.starts_with("moved from cpu-") && note.contains("may differ"), "{explained}");

    // Each token has an entry with its bytes: together they are the text, and as many as were counted.
    let bytes: Vec<u8> = moved
        .logprobs
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap())
        .map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap())
        .collect();
    assert_eq!(String::from_utf8_lossy(&bytes), moved.text);
    let counted = moved.usage.as_ref().unwrap()["completion_tokens"].as_u64().unwrap();
    // The token that ends an answer is counted and has no entry.
    let ended_by_token = u64::from(moved.finish_reason.as_deref() == Some("stop"));
    assert_eq!(moved.logprobs.len() as u64 + ended_by_token, counted, "{moved:?}");
    for attempt in attempts {
        assert!(attempt["tokens"].as_u64().unwrap() > 0, "both said a part of it: {explained}");
    }
}
