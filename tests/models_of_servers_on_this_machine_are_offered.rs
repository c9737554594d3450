//! `ingle models add --discover` finds what already runs on this machine, offers it, and registers what is wanted.

use crate::harness::*;

/// `ingle models add --discover` at these ports.
async fn discover(machine: &Machine, servers: &[&FarServer], more: &[&str]) -> Vec<Value> {
    let ports: Vec<String> = servers.iter().map(|server| format!("--port={}", server.address.port())).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    let found = machine.models(&[&["add", "--discover"], &ports[..], more].concat()).await;
    found.as_array().unwrap().clone()
}

#[tokio::test]
async fn models_of_servers_on_this_machine_are_offered() {
    let programs = ["Ollama", "llama.cpp", "vLLM", "LM Studio"];
    let mut servers = Vec::new();
    for program in programs {
        let server = FarServer::start().await;
        server.is(program);
        servers.push(server);
    }
    let locked = FarServer::start().await;
    locked.set_models(401, r#"{"error":{"message":"Invalid API Key"}}"#);
    let page = FarServer::start().await;
    page.set_models(200, "<html>router login</html>");
    let elsewhere = FarServer::start().await;
    elsewhere.set_models(307, "");
    let all: Vec<&FarServer> = servers.iter().chain([&locked, &page, &elsewhere]).collect();

    // Without a node one sees what there is, and what to type.
    let mut tower = Machine::new("tower").model("echo");
    let found = discover(&tower, &all, &[]).await;
    let names: Vec<&str> = found.iter().map(|offer| offer["name"].as_str().unwrap_or("-")).collect();
    let expected = ["far-model", "far-model-llamacpp", "far-model-vllm", "far-model-lmstudio", "-"];
    assert_eq!(names, expected, "{found:?}");
    for (offer, program) in found.iter().zip(programs) {
        assert!(offer["server"].as_str().unwrap().starts_with(program), "{offer}");
        assert_eq!((&offer["model"], &offer["added"]), (&json!(FAR_MODEL), &json!(false)));
    }
    assert_eq!(found[4]["needs_key"], true);
    assert!(found[4]["command"].as_str().unwrap().contains("--api-key-env"), "{:?}", found[4]);
    let port = |server: &FarServer| format!("--port={}", server.address.port());
    let without_node = tower.ingle(&["models", "add", "--discover", &port(&servers[0]), "--yes"]).await.fails_with(1);
    assert!(without_node.contains("ingle up"), "{without_node}");

    // Nobody is at the terminal: it prints what to type, and registers nothing.
    tower.up().await;
    let printed = tower.ingle(&["models", "add", "--discover", &port(&servers[1])]).await.ok();
    let command = printed.lines().find_map(|line| line.trim().strip_prefix("ingle ")).unwrap();
    assert!(printed.contains("llama.cpp b6000-abc at http://127.0.0.1:"), "{printed}");
    assert!(tower.registered().await.is_empty());
    // What is printed can be typed.
    let words: Vec<&str> = command.split(' ').collect();
    tower.ingle(&words).await.ok();
    assert_eq!(tower.ask(&far("plain")).await.text(), "Héllo \n🔥");
    // By its name, and all that are left.
    let named = discover(&tower, &all, &["far-model-ollama"]).await;
    assert_eq!(named.iter().filter(|offer| offer["added"] == true).count(), 1, "{named:?}");
    let rest = discover(&tower, &all, &["--yes"]).await;
    let known: Vec<&Value> = rest.iter().map(|offer| &offer["known_as"]).collect();
    let none = &Value::Null;
    assert_eq!(known, [&json!("far-model-ollama"), &json!("far-model"), none, none, none]);
    tower.until_registered(&["far-model", "far-model-lmstudio", "far-model-ollama", "far-model-vllm"]).await;
    for name in ["far-model-lmstudio", "far-model-ollama", "far-model-vllm"] {
        assert_eq!(tower.ask(&to(name, "plain")).await.text(), "Héllo \n🔥");
    }
    let again = discover(&tower, &all, &["--yes"]).await;
    assert!(again.iter().all(|offer| offer["added"] == false), "{again:?}");

    // Our own node is nobody's endpoint, and an unknown name is said.
    let own = format!("--port={}", tower.http().port());
    assert_eq!(tower.models(&["add", "--discover", &own]).await, json!([]));
    let nothing = tower.ingle(&["models", "add", "--discover", &own]).await.ok();
    assert!(nothing.contains("No server"), "{nothing}");
    let unknown = tower.ingle(&["models", "add", "--discover", &own, "poem"]).await.fails_with(1);
    assert!(unknown.contains("no model `poem`"), "{unknown}");
    for (arguments, expected) in [
        (&["--discover", "--name", "x"][..], "cannot be used with"),
        (&["--discover", "--endpoint", "http://a"], "cannot be used with"),
        (&["--name", "x", "--endpoint", "http://a", "--yes"], "cannot be used with"),
        (&["--discover", "max_tokens=3"], "names of models"),
    ] {
        let said = tower.ingle(&[&["models", "add"], arguments].concat()).await.fails_with(2);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_holds_nobody_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = format!("--port={}", listener.local_addr().unwrap().port());
    let server = FarServer::start().await;
    let other = format!("--port={}", server.address.port());
    let began = std::time::Instant::now();
    let tower = Machine::new("tower");
    let found = tower.models(&["add", "--discover", &port, &other]).await;
    assert_eq!(found.as_array().unwrap().len(), 1, "{found}");
    assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?}", began.elapsed());
}
