//! The main line, with real weights: `up`, `token`, `join`, `up --no-model`, and a client on either machine.

use std::process::Stdio;

use tokio::io::AsyncReadExt;

use crate::harness::*;

#[tokio::test]
async fn a_machine_without_a_model_answers_with_the_others() {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let mut mini = Machine::new("mini");
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's model is ready", |status| status.model("tower")["state"] == "ready").await;
    tower.until_alive(&[&mini]).await;

    one_text_everywhere(&tower, &mini).await;
    both_list_the_model(&tower, &mini).await;
    both_show_the_cluster(&tower, &mini).await;
    people_can_chat(&tower, &mini).await;
}

/// Greedy answers are the same here and there, whole and streamed.
async fn one_text_everywhere(tower: &Machine, mini: &Machine) {
    let question = json!({
        "messages": [{"role": "user", "content": "Say hello in one short sentence."}],
        "temperature": 0,
        "max_tokens": 16,
    });
    let there = mini.ask(&question).await;
    assert!(!there.text().is_empty());
    assert_eq!(there.node(), "tower");
    assert_eq!(there.body["object"], "chat.completion");
    let usage = &there.body["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert!(count("prompt_tokens") > 8 && (1..=16).contains(&count("completion_tokens")), "{usage}");
    assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));

    let here = tower.ask(&question).await;
    assert_eq!((here.text(), here.node()), (there.text(), "tower"));
    assert_eq!(&here.body["usage"], usage);

    let mut streamed = question.clone();
    streamed["stream_options"] = json!({"include_usage": true});
    for machine in [mini, tower] {
        let events = machine.stream(&streamed).await;
        assert_eq!(events.node, "tower");
        let seen = events.rest().await;
        seen.is_whole(there.text());
        assert!(seen.deltas.len() > 1, "it comes in pieces: {seen:?}");
        assert_eq!(seen.usage.as_ref(), Some(usage));
        assert_eq!(seen.finish_reason.as_deref(), there.body["choices"][0]["finish_reason"].as_str());
    }
}

async fn both_list_the_model(tower: &Machine, mini: &Machine) {
    for machine in [tower, mini] {
        let list = machine.get("/v1/models").await.body;
        let [model] = list["data"].as_array().unwrap().as_slice() else { panic!("one model: {list}") };
        assert_eq!((&list["object"], &model["object"]), (&json!("list"), &json!("model")));
        assert_eq!(model["nodes"], json!(["tower"]));
        assert_eq!(model["is_default"], true);
        let id = model["id"].as_str().unwrap();
        assert_eq!(machine.get(&format!("/v1/models/{id}")).await.body, *model);
        assert_eq!(machine.get("/v1/models/default").await.body, *model);
        let missing = machine.get(&format!("/v1/models/{}", &id[1..])).await;
        assert_eq!((missing.status, missing.code()), (404, "model_not_found"));
        assert!(missing.message().contains(id), "near names: {}", missing.message());
        assert_eq!(machine.get("/health").await.body["status"], "ok");
        assert_eq!(machine.get("/ready").await.body["status"], "ready");
    }
}

async fn both_show_the_cluster(tower: &Machine, mini: &Machine) {
    for (machine, other) in [(tower, mini), (mini, tower)] {
        // The engine's own count is told a little after the answer that it counts.
        let counted = |s: &Status| {
            s.latency("tower")["finished"].as_u64() >= Some(2) && s.model("tower")["steps"].as_u64() > Some(16)
        };
        let status = machine.until("it counts what it has done", counted).await;
        assert_eq!(status.nodes().len(), 2);
        assert_eq!(status.node(&machine.name)["id"], status.0["this_node"]);
        assert_eq!(status.health(&other.name), "alive");
        assert_eq!(status.node(&other.name)["address"], other.address());
        let model = status.model("tower");
        assert_eq!((&model["state"], &model["is_default"]), (&json!("ready"), &json!(true)));
        assert!(model["context_length"].as_u64().unwrap() > 1_000 && model["backend"].is_string(), "{model}");
        assert_eq!(status.latency("tower")["failed"], 0);
        assert_eq!(status.0["problems"], json!([]));
        let table = machine.ingle(&["status"]).await.ok();
        assert!(table.contains("tower") && table.contains("mini") && table.contains("alive"), "{table}");
    }
    // The control plane (actors over QUIC) answers too.
    mini.until("the control plane answers", |s| s.node("tower")["control_round_trip_ms"].is_number()).await;
}

/// `ingle chat` prints the answer as it comes, on either machine. How long the answer becomes is the model's affair.
async fn people_can_chat(tower: &Machine, mini: &Machine) {
    for machine in [tower, mini] {
        let mut command = ingle();
        command.args(["chat", "Say hello.", "--state-dir"]).arg(machine.state_dir());
        let mut chat = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; 2];
        let reading = chat.stdout.as_mut().unwrap().read_exact(&mut said);
        tokio::time::timeout(DEADLINE, reading).await.expect("it prints").unwrap();
        assert!(!String::from_utf8_lossy(&said).trim().is_empty(), "{said:?}");
    }
}
