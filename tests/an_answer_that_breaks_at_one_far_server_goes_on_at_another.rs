//! An answer that breaks off at a far server goes on at another worker of the same model, behind its last word, where
//! that one can be told to; where it cannot, the client is told so and why.

use crate::harness::*;

const TEXT: &str =
    "parrot polly wants a very big cracker and another one of them and then some more until all are gone";

/// A question to which echo engines and far servers alike say `TEXT`, a piece after the other.
fn say() -> Value {
    to(FAR_MODEL, &format!("every 40ms: {TEXT}"))
}

/// A node that has nothing but this server, behind another node or alone.
async fn keeper(name: &str, server: &FarServer, first: Option<&Machine>, settings: &str) -> Machine {
    let settings = format!("[[endpoints]]\nurl = \"{}\"\nmodel = \"{FAR_MODEL}\"\n{settings}", server.url());
    let mut machine = Machine::new(name).settings(&settings);
    if let Some(first) = first {
        machine.join(first).await;
    }
    machine.up().await;
    machine
}

async fn both_ready(machine: &Machine, names: [&str; 2]) {
    let ready = |status: &Status| names.iter().all(|name| status.model(name)["state"] == "ready");
    machine.until("both are ready", ready).await;
}

#[tokio::test]
async fn an_answer_that_breaks_at_one_far_server_goes_on_at_another() {
    for (program, flagged) in [("llama.cpp", true), ("vLLM", true), ("Ollama", false)] {
        let servers = [FarServer::start().await, FarServer::start().await];
        servers.iter().for_each(|server| server.is(program));
        let tower = keeper("tower", &servers[0], None, "").await;
        let _attic = keeper("attic", &servers[1], Some(&tower), "").await;
        both_ready(&tower, ["tower", "attic"]).await;
        let backend = tower.status().await.model("attic")["backend"].to_string();
        assert!(backend.contains(&format!(", {program} ")), "{backend}");

        let mut question = say();
        question["max_tokens"] = json!(60);
        question["stream_options"] = json!({"include_usage": true});
        let stream = tower.stream(&question).await.until_text(20).await;
        let (broken, other) = if stream.node == "tower" { (0, 1) } else { (1, 0) };
        servers[broken].break_off();
        let events = stream.rest().await;
        events.is_whole(TEXT);
        assert_eq!(events.finish_reason.as_deref(), Some("stop"));

        // It was told what had been said, in its own way, and how much is left of the answer.
        let moved = servers[other].requests().pop().unwrap().body;
        let said = moved["messages"][1]["content"].as_str().unwrap_or_default();
        assert!(TEXT.starts_with(said) && said.len() >= 20 && !said.ends_with(' '), "{moved}");
        assert_eq!(moved["messages"][1]["role"], "assistant");
        let left = moved["max_tokens"].as_u64().unwrap();
        let before = 60 - left;
        assert!((1..59).contains(&before), "{moved}");
        let flags = (&moved["continue_final_message"], &moved["add_generation_prompt"]);
        let expected = if flagged { (&json!(true), &json!(false)) } else { (&Value::Null, &Value::Null) };
        assert_eq!(flags, expected);
        // What was said at both is counted; the prompt there had what was said before.
        let usage = events.usage.unwrap();
        assert_eq!(usage["completion_tokens"].as_u64().unwrap(), before + 3, "{usage}");
        assert_eq!(usage["prompt_tokens"].as_u64().unwrap(), 11u64.saturating_sub(before), "{usage}");

        let explained = tower.explain("last").await;
        let attempts = explained["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 2, "{explained}");
        assert!(attempts[1]["cause"].as_str().unwrap().starts_with("migration (connection_lost"), "{explained}");
        let note = explained["notes"][0].as_str().unwrap();
        assert!(note.starts_with("moved from endpoint-127.0.0.1:") && note.contains("may differ"), "{note}");
    }
}

#[tokio::test]
async fn of_two_far_servers_at_one_node_the_other_goes_on() {
    let servers = [FarServer::start().await, FarServer::start().await];
    servers.iter().for_each(|server| server.is("vLLM"));
    let second = format!("[[endpoints]]\nurl = \"{}\"\nmodel = \"{FAR_MODEL}\"\n", servers[1].url());
    let tower = keeper("tower", &servers[0], None, &second).await;
    let both = |status: &Status| {
        let models = status.node("tower")["models"].as_array().unwrap();
        models.len() == 2 && models.iter().all(|model| model["state"] == "ready")
    };
    tower.until("both are ready", both).await;
    let stream = tower.stream(&say()).await.until_text(20).await;
    let broken = usize::from(servers[0].requests().is_empty());
    servers[broken].break_off();
    stream.rest().await.is_whole(TEXT);
    let explained = tower.explain("last").await;
    let numerics = explained["attempts"][1]["numerics"].as_str().unwrap();
    assert_eq!(numerics, format!("endpoint-{}", servers[1 - broken].address), "{explained}");
}

#[tokio::test]
async fn an_answer_that_nobody_can_be_told_to_go_on_with_says_so() {
    let servers = [FarServer::start().await, FarServer::start().await];
    let tower = keeper("tower", &servers[0], None, "").await;
    let _attic = keeper("attic", &servers[1], Some(&tower), "").await;
    both_ready(&tower, ["tower", "attic"]).await;
    let stream = tower.stream(&say()).await.until_text(20).await;
    servers.iter().for_each(FarServer::break_off);
    let events = stream.rest().await;
    events.broke_with("connection_lost");
    let why = "its server is not known to go on with an answer that was begun elsewhere";
    let said = events.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(said.contains("could not go on elsewhere") && said.contains(why), "{said}");
    let explained = tower.explain("last").await;
    assert!(explained["notes"].to_string().contains(why), "{explained}");
    assert_eq!(servers[0].requests().len() + servers[1].requests().len(), 1, "it was not begun anew");

    // Nor does anybody go on with reasoning.
    servers.iter().for_each(|server| server.is("vLLM"));
    let thinks = tower.stream(&far("reasons and breaks")).await.rest().await;
    thinks.broke_with("connection_lost");
    let said = thinks.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(said.contains("more than text"), "{said}");
}

/// An echo engine, whose model stands for a file, and the settings of an endpoint that has the same one.
async fn engine_and_same() -> (Machine, String) {
    let mut engine = Machine::new("engine").model("echo");
    engine.up().await;
    let digest = engine.status().await.model("engine")["digest"].as_str().unwrap().to_owned();
    (engine, format!("name = \"echo\"\nsha256 = \"{digest}\"\n"))
}

async fn moved_once(machine: &Machine) {
    let explained = machine.explain("last").await;
    let attempts = explained["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2, "{explained}");
    assert!(attempts[1]["cause"].as_str().unwrap().starts_with("migration"), "{explained}");
}

#[tokio::test]
async fn an_answer_moves_from_an_engine_to_a_far_server_that_has_the_same_file() {
    let server = FarServer::start().await;
    server.is("llama.cpp");
    let (mut engine, same) = engine_and_same().await;
    let mut mini = Machine::new("mini");
    mini.join(&engine).await;
    mini.up().await;
    mini.until("the engine is ready", |status| status.model("engine")["state"] == "ready").await;
    let stream = mini.stream(&to("echo", &format!("every 300ms: {TEXT}"))).await.until_text(10).await;
    let _keeper = keeper("keeper", &server, Some(&mini), &same).await;
    mini.until("the endpoint is ready", |status| status.model("keeper")["state"] == "ready").await;
    engine.kill_9().await;
    stream.rest().await.is_whole(TEXT);
    moved_once(&mini).await;
}

#[tokio::test]
async fn an_answer_moves_from_a_far_server_to_an_engine_that_has_the_same_file() {
    let server = FarServer::start().await;
    server.is("Ollama");
    let (mut engine, same) = engine_and_same().await;
    let keeper = keeper("keeper", &server, Some(&engine), &same).await;
    engine.stop().await;
    server.set_pace(1_500);
    let stream = keeper.stream(&to("echo", &format!("every 20ms: {TEXT}"))).await.until_text(10).await;
    engine.up().await;
    keeper.until("the engine is ready", |status| status.model("engine")["state"] == "ready").await;
    server.break_off();
    let events = stream.rest().await;
    events.is_whole(TEXT);
    moved_once(&keeper).await;

    // Fields that both read in their own way keep an answer where it is.
    let server = FarServer::start_at(server.stopped_at()).await;
    server.is("Ollama");
    server.set_pace(1_500);
    let mut tools = to("echo", &format!("every 20ms: {TEXT}"));
    tools["tools"] = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    engine.stop().await;
    keeper.until("the endpoint is ready again", |status| status.model("keeper")["state"] == "ready").await;
    let stream = keeper.stream(&tools).await.until_text(10).await;
    engine.up().await;
    keeper.until("the engine is ready", |status| status.model("engine")["state"] == "ready").await;
    server.break_off();
    let events = stream.rest().await;
    events.broke_with("connection_lost");
    assert!(events.error.unwrap()["message"].as_str().unwrap().contains("reads fields of this request in another way"));
}
