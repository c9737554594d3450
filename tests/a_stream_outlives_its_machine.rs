//! The machine that answers is killed: another one goes on behind the last word that the client has.

use crate::harness::*;

#[tokio::test]
async fn a_stream_outlives_its_machine() {
    let (mut workers, mini) = workers_and_mini(&["tower", "attic"], "echo").await;
    let text = "hello ".repeat(60);
    let streams: Vec<Events> = {
        let mut streams = Vec::new();
        for _ in 0..6 {
            streams.push(mini.stream(&echo("repeat 60 every 50ms: hello ")).await.begun().await);
        }
        streams
    };
    let victim = streams[0].node.clone();
    let worker = workers.iter_mut().find(|worker| worker.name == victim).unwrap();
    worker.kill_9().await;
    for stream in streams {
        let seen = stream.rest().await;
        seen.is_whole(&text);
    }
    mini.until("it is known", |status| status.health(&victim) == "failed").await;
    assert_ne!(mini.ask(&echo("hello")).await.node(), victim);
}

/// Real weights, greedy and with a seed: the answer is the one that an undisturbed machine gives, word for word.
#[tokio::test]
async fn a_moved_answer_is_the_undisturbed_one() {
    let (mut workers, mini) = workers_and_mini(&["tower", "attic"], "default").await;
    let question = |temperature: f64| {
        let message = json!({"role": "user", "content": "Tell me a long story about a lighthouse."});
        json!({
            "model": "default", "messages": [message], "max_tokens": 160, "temperature": temperature, "seed": 7,
            "stop": ["xyzzy"], "stream_options": {"include_usage": true},
        })
    };
    for temperature in [0.0, 0.9] {
        let undisturbed = mini.stream(&question(temperature)).await.rest().await;
        let stream = mini.stream(&question(temperature)).await.until_text(40).await;
        let victim = stream.node.clone();
        let worker = workers.iter_mut().find(|worker| worker.name == victim).unwrap();
        worker.kill_9().await;
        let moved = stream.rest().await;
        moved.is_whole(&undisturbed.text);
        assert_eq!(moved.finish_reason, undisturbed.finish_reason);
        let tokens = |seen: &Streamed| seen.usage.as_ref().unwrap()["completion_tokens"].clone();
        assert_eq!(tokens(&moved), tokens(&undisturbed));
        let explained = mini.explain("last").await;
        let attempts = explained["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 2, "{explained}");
        assert!(attempts[1]["cause"].as_str().unwrap().starts_with("migration ("), "{explained}");
        assert_eq!(attempts[0]["numerics"], attempts[1]["numerics"]);
        assert_eq!(explained["notes"], json!([]), "one class: nothing to warn of");
        worker.up().await;
        mini.until("it is back", |status| status.model(&victim)["state"] == "ready").await;
    }
}
