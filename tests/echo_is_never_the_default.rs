//! The engine for tests answers only who asks for it by name.

use crate::harness::*;

#[tokio::test]
async fn echo_is_never_the_default() {
    let (mut tower, mut mini) = (Machine::new("tower").model("echo"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    for machine in [&tower, &mini] {
        machine.ask_until_known(&echo("hello")).await;
        for request in [
            json!({"messages": [{"role": "user", "content": "hello"}]}),
            json!({"model": "default", "messages": [{"role": "user", "content": "hello"}]}),
            json!({"model": "", "messages": [{"role": "user", "content": "hello"}]}),
        ] {
            let answer = machine.ask(&request).await;
            answer.is_not_now();
            assert!(answer.message().contains("ingle up"), "what to do: {}", answer.message());
        }
        assert_eq!(machine.get("/v1/models/default").await.status, 404);
        let refusal = machine.ingle(&["chat", "hello"]).await.fails_with(1);
        assert!(refusal.contains("ingle up"), "{refusal}");
    }
    // Nor where a model is asked for that the command line does not know.
    let output = tower.output();
    let copied = output.lines().find(|line| line.contains("curl ")).unwrap();
    assert!(copied.contains(r#""model":"echo""#), "the line to copy works: {copied}");
}
