//! The trace that a client names goes with its request through the gateway, the worker node and the engine process.

use crate::harness::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[tokio::test]
async fn one_request_has_one_trace_in_all_processes() {
    let debug = |machine: Machine| {
        machine.environment("INGLE_LOG", "info,ingle=debug,ingle_actors=debug").environment("INGLE_LOG_FORMAT", "json")
    };
    let (mut tower, mut mini) = (debug(Machine::new("tower").model("echo")), debug(Machine::new("mini")));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.ask_until_known(&echo("hello")).await;

    let request = client().post(mini.url("/v1/chat/completions")).json(&echo("traced"));
    let response = request.header("traceparent", format!("00-{TRACE}-b7ad6b7169203331-01")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let id = response.headers()["x-request-id"].to_str().unwrap().strip_prefix("req_").unwrap().to_owned();

    // The gateway, the worker node, and its engine process, which logs to where its node does.
    let modules = [(&mini, "ingle_actors::gateway"), (&tower, "ingle_actors::cluster"), (&tower, "ingle_engine")];
    for (machine, module) in modules {
        until(&format!("{module} logs the request on {}", machine.name), async || {
            let log = machine.log();
            // The last line may not be whole yet; others are no JSON because they are for people.
            let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut lines = lines.filter(|line| line["target"].as_str().is_some_and(|name| name.starts_with(module)));
            let is_ours = |span: &Value| span["trace_id"] == TRACE && span["request_id"] == id.as_str();
            lines.any(|line| line["spans"].as_array().is_some_and(|spans| spans.iter().any(is_ours))).then_some(())
        })
        .await;
    }
    let over = mini.log().lines().filter(|line| line.contains("request over") && line.contains(TRACE)).count();
    assert_eq!(over, 1, "one line says how the request went");
}
