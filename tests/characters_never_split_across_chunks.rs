//! The echo engine's tokens are single bytes, so every character beyond ASCII crosses token borders.

use crate::harness::*;

const TEXT: &str = "Grüße, 世界! 😀 👩‍👩‍👧‍👦 🏳️‍🌈 e\u{301} नमस्ते \u{10FFFF} 한국어 ✓";

#[tokio::test]
async fn characters_never_split_across_chunks() {
    let (mut tower, mut mini) = (Machine::new("tower").model("echo"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    for machine in [&tower, &mini] {
        machine.ask_until_known(&echo("hello")).await;
        for request in [echo(TEXT), echo(&format!("every 2ms: {TEXT}"))] {
            assert_eq!(machine.ask(&request).await.text(), TEXT);
            let seen = machine.stream(&request).await.rest().await;
            seen.is_whole(TEXT);
            assert!(seen.deltas.len() > 30, "in pieces: {:?}", seen.deltas);
            assert!(!seen.deltas.iter().any(|delta| delta.contains('\u{FFFD}')), "{:?}", seen.deltas);
        }
    }
    // Stop texts of many bytes, and the usage counts tokens whether or not they had a text.
    let mut request = echo(TEXT);
    request["stop"] = json!(["👧‍👦"]);
    request["stream_options"] = json!({"include_usage": true});
    let seen = mini.stream(&request).await.rest().await;
    seen.is_whole(TEXT.split_once("👧‍👦").unwrap().0);
    assert_eq!(seen.finish_reason.as_deref(), Some("stop"));
    let upto = TEXT.find("👧‍👦").unwrap() + "👧‍👦".len();
    assert_eq!(seen.usage.unwrap()["completion_tokens"], upto);
    assert_eq!(mini.ingle(&["chat", "-m", "echo", TEXT]).await.ok(), format!("{TEXT}\n"));
}
