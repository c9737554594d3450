//! `ingle models add` with a file: some machine loads it without being told, all of them answer for it, and what goes,
//! fails or is asked for too often is put right without anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::*;

/// Three machines, of which `tower` and `desk` take models; `mini` takes none.
async fn household(hub: &Hub, settings: [&str; 2]) -> (Machine, Machine, Machine) {
    let (mut tower, mut desk) = (hub.machine("tower", settings[0]), hub.machine("desk", settings[1]));
    let mut mini = Machine::new("mini");
    tower.up().await;
    for machine in [&mut desk, &mut mini] {
        machine.join(&tower).await;
        machine.up().await;
    }
    mini.until_alive(&[&tower, &desk]).await;
    desk.until_alive(&[&tower, &mini]).await;
    (tower, desk, mini)
}

fn content(family: &str) -> Vec<u8> {
    std::fs::read(tiny(family)).unwrap()
}

fn ask(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0})
}

/// Names of the nodes where the model is in this state.
fn nodes_in(model: &Value, state: &str) -> Vec<String> {
    let nodes = model["nodes"].as_array().into_iter().flatten();
    let these = nodes.filter(|on| on["state"].as_str().is_some_and(|is| is.starts_with(state)));
    these.map(|on| on["node"].as_str().unwrap().to_owned()).collect()
}

fn ready(model: &Value) -> Vec<String> {
    nodes_in(model, "ready")
}

#[tokio::test]
async fn one_machine_fetches_it_and_the_next_one_copies_it() {
    let hub = Hub::start().await;
    let (tower, desk, mini) = household(&hub, ["", ""]).await;
    let file = content("qwen2");
    let source = hub.put("tiny.gguf", file.clone());
    let added = mini.models(&["add", "--name", "tiny", "--source", &source]).await;
    let [first] = ready(&added).try_into().unwrap_or_else(|_| panic!("on one node: {added}"));
    assert_eq!(mini.ask(&ask("tiny")).await.node(), first);
    // One byte is asked for to learn how long the file is.
    assert_eq!(hub.taken(), file.len() as u64 + 1);
    let why = |model: &Value| {
        let on = model["nodes"].as_array().unwrap().iter().find(|on| on["node"] == *first).cloned();
        on.and_then(|on| on["placement"].as_str().map(str::to_owned)).unwrap_or_default()
    };
    let known = desk.until_model("tiny", "its hash is known", |model| why(model).contains("has the file")).await;
    assert!(why(&known).contains("choice ") && known["sha256"].is_string(), "{known}");

    let other = if first == "tower" { "desk" } else { "tower" };
    mini.models(&["pin", "tiny", "tower", "desk"]).await;
    mini.until_model("tiny", "both have it", |model| ready(model).len() == 2).await;
    assert_eq!(hub.taken(), file.len() as u64 + 1, "{other} has copied it");

    // It stays on the one that it is pinned to, and goes from all when it is removed.
    mini.models(&["pin", "tiny", other]).await;
    mini.until_model("tiny", "it is on that one alone", |model| ready(model) == [other]).await;
    assert_eq!(mini.ask(&ask("tiny")).await.node(), other);
    mini.models(&["rm", "tiny"]).await;
    for machine in [&tower, &desk] {
        until("its process is gone", async || machine.engines().is_empty().then_some(())).await;
    }
    assert_eq!(mini.ask(&ask("tiny")).await.status, 404);
}

#[tokio::test]
async fn what_a_machine_had_that_is_gone_comes_to_another_one() {
    let hub = Hub::start().await;
    let (mut tower, mut desk, mini) = household(&hub, ["", ""]).await;
    let source = hub.put("tiny.gguf", content("qwen2"));
    let added = mini.models(&["add", "--name", "tiny", "--source", &source]).await;
    mini.models(&["set-default", "tiny"]).await;
    let first = ready(&added)[0].clone();
    let (gone, other) = if first == "tower" { (&mut tower, &desk) } else { (&mut desk, &tower) };
    let before = mini.ask(&ask("default")).await.text().to_owned();
    gone.kill_9().await;
    mini.until_model("tiny", "the other one has it", |model| ready(model) == [other.name.clone()]).await;
    let answer = mini.ask(&ask("default")).await;
    assert_eq!((answer.node(), answer.text()), (other.name.as_str(), before.as_str()));
    // What was registered while it was away, it learns when it is back; what it had, it has again.
    gone.up().await;
    mini.until_alive(&[&*gone]).await;
    assert_eq!(mini.ask(&ask("tiny")).await.text(), before);
}

#[tokio::test]
async fn what_cannot_be_loaded_is_not_registered() {
    let hub = Hub::start().await;
    let (tower, desk, mini) = household(&hub, ["[model]\nuse = \"none\"\nmemory_mib = 1", ""]).await;
    let good = hub.put("tiny.gguf", content("qwen2"));
    let mut cut = content("qwen2");
    cut.truncate(100_000);
    let (cut, poem) = (hub.put("cut.gguf", cut), hub.put("poem.gguf", b"Roses are red".repeat(9_000)));
    let other_hash = "ab".repeat(32);
    for (more, expected) in [
        (&["--source", "hf:owner/models/nothing.gguf"][..], "404"),
        (&["--source", &good, "--sha256", &other_hash], "SHA-256"),
        (&["--source", &poem], "GGUF"),
        (&["--source", &cut], "truncated"),
    ] {
        let ran = mini.ingle(&[&["models", "add", "--name", "bad"], more].concat()).await;
        let complaint = ran.fails_with(1);
        assert!(complaint.contains("`bad` is not registered") && complaint.contains(expected), "{complaint}");
        for machine in [&tower, &desk, &mini] {
            machine.until_model("bad", "it is not there", |model| model["registered"] != true).await;
        }
    }
    // The one without room leaves it to the other one.
    let added = mini.models(&["add", "--name", "tiny", "--source", &good]).await;
    assert_eq!(ready(&added), ["desk"], "{added}");
}

#[tokio::test]
async fn a_model_that_all_ask_for_gets_a_second_copy() {
    let hub = Hub::start().await;
    let (tower, desk, mini) = household(&hub, ["", ""]).await;
    // One that writes to the end of its context.
    let source = hub.put("tiny.gguf", content("gemma3"));
    let added = mini.models(&["add", "--name", "tiny", "--source", &source, "batch_size=1"]).await;
    assert_eq!(ready(&added).len(), 1, "{added}");
    let done = Arc::new(AtomicBool::new(false));
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let (url, done) = (mini.url("/v1/chat/completions"), done.clone());
            tokio::spawn(async move {
                let (client, mut long) = (client(), ask("tiny"));
                long["max_tokens"] = 400.into();
                while !done.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&long).send().await.unwrap();
                    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
                }
            })
        })
        .collect();
    mini.until_model("tiny", "both have it", |model| ready(model).len() == 2).await;
    done.store(true, Ordering::Relaxed);
    for asking in asking {
        asking.await.unwrap();
    }
    for machine in [&tower, &desk] {
        assert_eq!(machine.engines().len(), 1);
    }
}

#[tokio::test]
async fn a_file_of_one_machine_is_copied_by_the_others() {
    let hub = Hub::start().await;
    let (tower, desk, mini) = household(&hub, ["", ""]).await;
    let path = tower.state_dir().join("my.gguf");
    std::fs::write(&path, content("llama3")).unwrap();
    let source = format!("file:{}", path.display());
    let added = tower.models(&["add", "--name", "mine", "--source", &source, "--pin", "tower"]).await;
    assert_eq!(ready(&added), ["tower"], "{added}");
    mini.until_model("mine", "its hash is known", |model| model["sha256"].is_string()).await;
    let before = mini.ask(&ask("mine")).await.text().to_owned();
    // All machines of a test have one disk: where the file was, nobody finds it now.
    std::fs::remove_file(&path).unwrap();
    mini.models(&["pin", "mine", "desk"]).await;
    mini.until_model("mine", "desk has it, and it alone", |model| ready(model) == ["desk"]).await;
    let answer = mini.ask(&ask("mine")).await;
    assert_eq!((answer.node(), answer.text()), ("desk", before.as_str()));
    drop(desk);
}

#[tokio::test]
async fn a_machine_that_is_killed_while_it_fetches_goes_on_where_it_was() {
    let hub = Hub::start().await;
    let mut tower = hub.machine("tower", "");
    tower.up().await;
    let file = content("gemma3");
    let source = hub.put("slow.gguf", file.clone());
    hub.set_slow(true);
    tower.models(&["add", "--name", "slow", "--source", &source, "--unchecked"]).await;
    tower.until_model("slow", "half of it has come", |_| hub.taken() > file.len() as u64 / 2).await;
    let fetching = tower.model_named("slow").await;
    assert_eq!(nodes_in(&fetching, "fetching"), ["tower"], "{fetching}");
    tower.kill_9().await;
    hub.set_slow(false);
    tower.up().await;
    tower.until_model("slow", "it is there", |model| ready(model) == ["tower"]).await;
    let taken = hub.taken();
    assert!(taken < file.len() as u64 * 4 / 3, "{taken} bytes of {} were taken", file.len());
    assert_eq!(tower.ask(&ask("slow")).await.status, 200);

    // How long it stays is changed while it is loaded, on all nodes.
    tower.models(&["set", "slow", "keep_alive=1s"]).await;
    tower.until_model("slow", "nobody asks it, so it goes", |model| nodes_in(model, "unloaded") == ["tower"]).await;
    assert_eq!(tower.ask(&ask("slow")).await.status, 200, "and it comes when somebody does");
}

#[tokio::test]
async fn its_weights_are_converted_where_it_is_loaded() {
    let hub = Hub::start().await;
    let (tower, desk, mini) = household(&hub, ["", ""]).await;
    let source = hub.put("tiny.gguf", content("llama3"));
    let pins = ["--pin", "tower", "--pin", "desk"];
    mini.models(&[&["add", "--name", "tiny", "--source", &source, "quantization=q8_0"][..], &pins].concat()).await;
    let both = |model: &Value| ready(model).len() == 2;
    let model = mini.until_model("tiny", "both have it", both).await;
    assert_eq!(model["parameters"]["quantization"], "q8_0", "{model}");
    let digest_on = async |machine: &Machine| {
        let status = machine.status().await;
        status.node(&machine.name)["models"][0]["digest"].as_str().unwrap_or_default().to_owned()
    };
    let converted = digest_on(&tower).await;
    let known = mini.until_model("tiny", "its hash is known", |model| model["sha256"].is_string()).await;
    assert_ne!(known["sha256"], converted, "the hash is that of the source");
    assert_eq!(digest_on(&desk).await, converted, "a conversion gives the same file on all machines");

    // Back to what the file has, while it is asked: no request fails.
    let done = Arc::new(AtomicBool::new(false));
    let asking = {
        let (url, done) = (mini.url("/v1/chat/completions"), done.clone());
        tokio::spawn(async move {
            let client = client();
            while !done.load(Ordering::Relaxed) {
                let answer = client.post(&url).json(&ask("tiny")).send().await.unwrap();
                assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
            }
        })
    };
    mini.models(&["set", "tiny", "quantization=default"]).await;
    let original = known["sha256"].as_str().unwrap().to_owned();
    for machine in [&tower, &desk] {
        until("it has the source's weights", async || (digest_on(machine).await == original).then_some(())).await;
    }
    mini.until_model("tiny", "both are ready", both).await;
    done.store(true, Ordering::Relaxed);
    asking.await.unwrap();
    let refused = mini.ingle(&["models", "set", "tiny", "quantization=q1"]).await.fails_with(1);
    assert!(refused.contains("there is no format") && refused.contains("q8_0"), "{refused}");
}
