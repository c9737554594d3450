//! Texts become the same numbers at whichever machine they come in, as `ingle models embed` computes them, also where a
//! machine dies in the middle.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::harness::*;

const TEXTS: [&str; 3] = ["hello world", "the house has one line", "café"];

#[tokio::test]
async fn embeddings_are_the_same_from_any_machine() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], &tiny_bert()).await;
    let machines = [&workers[0], &workers[1], &mini];
    let due = mini.embedded_by_command(&TEXTS).await;
    let tokens: u64 = due.iter().map(|row| row["tokens"].as_u64().unwrap()).sum();
    for machine in machines {
        // By its name, by what `default` means of embedding models, and without a name.
        for model in [json!(TINY_BERT), json!("default"), Value::Null] {
            let answer = machine.embed(&json!({"model": model, "input": TEXTS})).await;
            for (got, due) in answer.embeddings().iter().zip(&due) {
                assert_eq!(*got, due["embedding"], "{} {model}", machine.name);
            }
            assert_eq!((answer.embeddings().len(), &answer.body["model"]), (3, &json!(TINY_BERT)));
            assert_eq!(answer.body["usage"]["prompt_tokens"], tokens);
        }
        let alone = machine.embed(&json!({"model": TINY_BERT, "input": TEXTS[1]})).await.embeddings();
        assert_eq!(alone, [due[1]["embedding"].clone()], "alone or among others");
        let packed = json!({"model": TINY_BERT, "input": TEXTS[0], "encoding_format": "base64", "user": "me"});
        let packed = machine.embed(&packed).await.embeddings();
        let bytes = BASE64.decode(packed[0].as_str().unwrap()).unwrap();
        let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect();
        let same: Vec<f32> = serde_json::from_value(due[0]["embedding"].clone()).unwrap();
        assert_eq!(numbers, same);
    }
    // Tokens are taken as they are: [CLS] hello world [SEP].
    let ids = json!([2, 52, 53, 3]);
    let one = mini.embed(&json!({"model": TINY_BERT, "input": ids})).await;
    let many = mini.embed(&json!({"model": TINY_BERT, "input": [[5, 9], ids]})).await;
    assert_eq!(one.embeddings(), [due[0]["embedding"].clone()]);
    assert_eq!(many.embeddings()[1], due[0]["embedding"]);
    assert_eq!(many.body["usage"]["prompt_tokens"], 6);

    let shown = mini.get("/v1/models").await.body["data"][0].clone();
    assert_eq!((&shown["id"], &shown["type"]), (&json!(TINY_BERT), &json!("embedding")), "{shown}");
    assert_eq!(shown["features"], json!(["embeddings"]));
    assert_eq!(mini.model_named(TINY_BERT).await["type"], "embedding");
    assert_eq!(workers[0].processes().await[TINY_BERT]["type"], "embedding");
    let tested: Value = serde_json::from_str(&mini.ingle(&["models", "test", TINY_BERT, "--json"]).await.ok()).unwrap();
    assert_eq!(tested["dimensions"], 64, "{tested}");
    let explained = mini.explain(many.headers["x-request-id"].to_str().unwrap()).await;
    assert_eq!((&explained["outcome"], explained["prompt_tokens"].as_u64()), (&json!("finished"), Some(6)));
    assert_eq!(explained["attempts"][0]["considered"].as_array().unwrap().len(), 2, "{explained}");
}

#[tokio::test]
async fn what_cannot_be_embedded_is_said_by_its_place() {
    let (mut tower, mini) = (Machine::new("tower").model(&tiny_bert()), Machine::new("mini").model("echo"));
    tower.up().await;
    let mut mini = mini;
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's model is ready", |status| status.model("tower")["state"] == "ready").await;
    tower.until("mini's model is ready", |status| status.model("mini")["state"] == "ready").await;

    let long = "one ".repeat(70);
    let many = vec!["one"; 2_049];
    for (more, status, param, code, message) in [
        (json!({"input": [TEXTS[0], long]}), 400, "input[1]", "context_length_exceeded", "64 at most"),
        (json!({"input": long}), 400, "input", "context_length_exceeded", "72 tokens"),
        (json!({"input": [[2, 3], [2, 4_000_000]]}), 400, "input[1]", "", "4000000"),
        (json!({"input": ["a", ""]}), 400, "input[1]", "", "empty"),
        (json!({"input": many}), 400, "input", "", "2048"),
        (json!({"input": []}), 400, "input", "", "empty"),
        (json!({}), 400, "input", "", "missing"),
        (json!({"input": "x", "dimensions": 32}), 400, "dimensions", "unsupported_parameter", "64 numbers"),
        (json!({"input": "x", "input_type": "query"}), 400, "input_type", "unsupported_parameter", "input_type"),
        (json!({"input": "x", "encoding_format": "int8"}), 400, "encoding_format", "", "base64"),
        (json!({"input": "x", "model": "echo"}), 400, "model", "wrong_model_type", "no embedding model"),
        (json!({"input": "x", "model": "bert_meen"}), 404, "model", "model_not_found", TINY_BERT),
    ] {
        for machine in [&tower, &mini] {
            let mut body = json!({"model": TINY_BERT});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let answer = machine.embed(&body).await;
            assert_eq!((answer.status, answer.code()), (status, code), "{}: {}", machine.name, answer.body);
            assert_eq!(answer.body["error"]["param"].as_str(), Some(param), "{}", answer.body);
            assert!(answer.message().contains(message), "{}", answer.body);
        }
    }
    // As many numbers as it has may be asked for, and the same model does not chat, at neither of them.
    let whole = mini.embed(&json!({"model": TINY_BERT, "input": "x", "dimensions": 64})).await;
    assert_eq!(whole.embeddings()[0].as_array().unwrap().len(), 64);
    for machine in [&tower, &mini] {
        let answer = machine.ask(&to(TINY_BERT, "hello")).await;
        assert_eq!((answer.status, answer.code()), (400, "wrong_model_type"), "{}", answer.body);
        assert!(answer.message().contains("/v1/embeddings"), "{}", answer.body);
        assert_eq!(machine.ask(&to("echo", "hello")).await.text(), "hello", "beside it");
    }
    let none = Machine::new("alone").model("echo");
    let mut none = none;
    none.up().await;
    let answer = none.embed(&json!({"input": "x"})).await;
    assert_eq!((answer.status, answer.code()), (400, "wrong_model_type"), "{}", answer.body);
    assert!(answer.message().contains("no embedding model"), "{}", answer.body);
}

/// So many inputs of sixty tokens each.
fn many(inputs: u32) -> Value {
    let input: Vec<Vec<u32>> = (0..inputs).map(|n| (0..60).map(|m| (n * 31 + m * 7) % 150 + 5).collect()).collect();
    json!({"model": TINY_BERT, "input": input})
}

#[tokio::test]
async fn embeddings_of_a_killed_worker_come_from_another_one() {
    let (workers, mini) = workers_and_mini(&["tower", "attic"], &tiny_bert()).await;
    let some = many(40);
    let due = mini.embed(&some).await.embeddings();
    assert_eq!(due.len(), 40);
    let mut moved = 0;
    for _ in 0..4 {
        let engine = workers[0].engine().await;
        // It has taken requests and is not done with them when it dies.
        kill(engine, Signal::STOP);
        let asking = futures_util::future::join_all((0..8).map(|_| mini.embed(&some)));
        let killing = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            kill(engine, Signal::KILL);
        };
        let (answers, ()) = tokio::join!(asking, killing);
        for answer in answers {
            assert!(answer.embeddings() == due, "the same numbers");
            let explained = mini.explain(answer.headers["x-request-id"].to_str().unwrap()).await;
            let attempts = explained["attempts"].as_array().unwrap();
            if let Some(again) = attempts.get(1) {
                assert!(again["cause"].as_str().unwrap().starts_with("retry ("), "{explained}");
                assert_eq!((&attempts[0]["node"], &again["node"]), (&json!("tower"), &json!("attic")), "{explained}");
                moved += 1;
            }
        }
        if moved > 0 {
            break;
        }
        mini.until("tower is back", |status| status.model("tower")["state"] == "ready").await;
    }
    assert!(moved > 0, "no request was at the engine that died");
    // A client that leaves frees the worker.
    let leaving = tokio::time::timeout(Duration::from_millis(200), mini.embed(&many(2_048))).await;
    drop(leaving);
    for worker in &workers {
        worker.until_running(0).await;
    }
}

#[tokio::test]
async fn a_far_server_embeds_for_all() {
    let server = FarServer::start().await;
    let (tower, mini) = tower_and_mini().await;
    tower.add_endpoint("far-embed", &server, &["--type", "embedding"]).await;
    let ask = |input: Value| json!({"model": "far-embed", "input": input, "dimensions": 3, "input_type": "query"});
    until("mini knows it", async || (mini.embed(&ask(json!("x"))).await.status == 200).then_some(())).await;
    for machine in [&tower, &mini] {
        for input in [json!(["abc", "d"]), json!(["backwards", "d"])] {
            let answer = machine.embed(&ask(input.clone())).await;
            let length = input[0].as_str().unwrap().len();
            let due = [json!([length as f32, 0.0, 0.5]), json!([1.0, 1.0, 0.5])];
            assert_eq!(answer.embeddings(), due);
            assert_eq!(answer.body["usage"]["prompt_tokens"], 7);
        }
        let answer = machine.embed(&json!({"input": [[1, 2, 3]]})).await;
        assert_eq!(answer.embeddings(), [json!([3.0, 0.0, 0.5])], "the only embedding model");
        for (input, status) in [("too few", 502), ("nonsense", 502), ("no route", 404)] {
            let answer = machine.embed(&ask(json!([input, "x"]))).await;
            assert_eq!(answer.status, status, "{input}: {}", answer.body);
        }
        let chat = machine.ask(&to("far-embed", "plain")).await;
        assert_eq!((chat.status, chat.code()), (400, "wrong_model_type"), "{}", chat.body);
    }
    let written = &server.requests()[0];
    assert_eq!((&written.body["dimensions"], &written.body["input_type"]), (&json!(3), &json!("query")));
    assert_eq!(mini.model_named("far-embed").await["type"], "embedding");
}

#[tokio::test]
async fn an_older_machine_is_not_asked_for_embeddings() {
    let old = Machine::new("attic").environment("INGLE_PROTOCOL_LIMIT", "1").model(&tiny_bert());
    let (mut attic, mut mini) = (old, Machine::new("mini"));
    attic.up().await;
    mini.join(&attic).await;
    mini.up().await;
    mini.until("attic's model is ready", |status| status.model("attic")["state"] == "ready").await;
    let ask = json!({"model": TINY_BERT, "input": "hello world"});
    let answer = mini.embed(&ask).await;
    answer.is_not_now();
    assert!(answer.message().contains("too old"), "{}", answer.body);
    assert_eq!(attic.embed(&ask).await.embeddings().len(), 1, "it answers itself");
}
