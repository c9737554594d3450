//! `ingle explain`, and the header for programs.

use crate::harness::*;

#[tokio::test]
async fn explain_says_who_was_asked_and_why() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], "echo").await;
    let none = workers[0].ingle(&["explain"]).await.fails_with(1);
    assert!(none.contains("No request has entered at this node yet"), "{none}");

    let answer = mini.ask_with(&echo("hello"), &[("x-ingle-explain", "true")]).await;
    let header = answer.headers["x-ingle-explain"].to_str().unwrap().to_owned();
    assert!(header.starts_with(answer.node()) && header.contains("tower ") && header.contains("attic "), "{header}");
    assert!(!mini.ask(&echo("hello")).await.headers.contains_key("x-ingle-explain"), "off by default");

    let id = answer.headers["x-request-id"].to_str().unwrap();
    let explained = mini.explain(id).await;
    assert_eq!(explained["outcome"], "finished");
    assert_eq!(explained["attempts"][0]["node"], answer.node());
    for considered in explained["attempts"][0]["considered"].as_array().unwrap() {
        assert!(considered["estimate"]["output_s"].as_f64().unwrap() > 0.0, "{explained}");
        assert!(considered["decode_rate"].as_f64().unwrap() > 0.0, "measured, not assumed: {explained}");
    }
    let text = mini.ingle(&["explain", id]).await.ok();
    assert!(text.contains("PREDICTED") && text.contains(&format!("sent to {}", answer.node())), "{text}");
    let unknown = mini.ingle(&["explain", &"0".repeat(32)]).await.fails_with(1);
    assert!(unknown.contains("does not remember"), "{unknown}");
    mini.ingle(&["explain", "yesterday"]).await.fails_with(2);
}
