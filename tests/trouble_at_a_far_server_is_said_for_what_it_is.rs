//! Whatever a far server does wrong, the client gets a typed answer, the node goes on, and nothing leaks.

use std::io::Write;

use crate::harness::*;

/// `tower` with the far server and little patience, `mini` behind it.
async fn impatient(server: &FarServer) -> (Machine, Machine, tempfile::NamedTempFile) {
    let mut config = tempfile::NamedTempFile::new().unwrap();
    write!(
        config,
        "[[endpoints]]\nurl = \"{}\"\napi_key_env = \"FAR_KEY\"\nfirst_token_timeout = \"2s\"\nsilence_timeout = \"1s\"\n",
        server.url()
    )
    .unwrap();
    let tower = Machine::new("tower").with("--config").with(config.path().to_str().unwrap());
    let mut tower = tower.environment("FAR_KEY", "sk-very-secret");
    let mut mini = Machine::new("mini");
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's endpoint is ready", |status| status.model("tower")["state"] == "ready").await;
    (tower, mini, config)
}

#[tokio::test]
async fn trouble_at_a_far_server_is_said_for_what_it_is() {
    let server = FarServer::start().await;
    let (tower, mini, _config) = impatient(&server).await;

    let context = r#"400 {"error":{"message":"the request exceeds the context","type":"exceed_context_size_error"}}"#;
    for (what, status, code, message) in [
        (r#"400 {"error":{"message":"no such grammar","param":"grammar"}}"#, 400, "", "no such grammar"),
        (r#"422 {"detail":"unprocessable"}"#, 400, "", "unprocessable"),
        (context, 400, "context_length_exceeded", "exceeds"),
        (r#"404 {"error":"model 'x' not found"}"#, 404, "model_not_found", "model 'x' not found"),
        (r#"429 {"error":{"message":"slow down"}}"#, 503, "busy", "slow down"),
        (r#"503 {"error":{"message":"no room"}}"#, 503, "busy", "no room"),
        (r#"500 {"error":{"message":"CUDA out of memory"}}"#, 502, "engine_error", "CUDA out of memory"),
        ("echo of the key", 502, "engine_error", "bad key …"),
        ("elsewhere", 502, "engine_error", "307"),
        ("whole", 502, "protocol_error", "application/json where a stream of events is due"),
        ("page", 502, "protocol_error", "router login"),
        ("gzip", 502, "protocol_error", "in the coding gzip"),
        ("headers", 502, "connection_lost", "the connection broke"),
        ("no HTTP", 502, "connection_lost", "the connection broke"),
        ("is reset", 502, "connection_lost", "the connection broke"),
        ("never", 504, "worker_silent", "no token for 2 s"),
    ] {
        for machine in [&tower, &mini] {
            for streamed in [false, true] {
                let mut body = far(what);
                body["stream"] = streamed.into();
                let answer = machine.ask(&body).await;
                assert_eq!((answer.status, answer.code()), (status, code), "{what}: {}", answer.body);
                assert!(answer.message().contains(message), "{what}: {}", answer.message());
                assert!(!answer.body.to_string().contains("sk-very-secret"), "{}", answer.body);
                if status == 503 {
                    assert_eq!(answer.headers["retry-after"], "1");
                }
                if what == "is reset" {
                    // The probe that follows finds it well again.
                    let ready = |status: &Status| status.model("tower")["state"] == "ready";
                    mini.until("the endpoint is ready", ready).await;
                }
            }
            // Who fails again and again is left alone for a while; one that goes well shows that it is no such.
            assert_eq!(machine.ask(&far("plain")).await.text(), "Héllo \n🔥");
        }
    }
    for (what, code, message) in [
        ("stalls", "worker_silent", "no line for 1 s"),
        ("drips", "worker_silent", "no line for 1 s"),
        ("breaks off", "connection_lost", "the connection broke"),
        ("ends early", "connection_lost", "in the middle of the answer"),
        ("broken event", "protocol_error", "sends what is no answer"),
        ("long line", "protocol_error", "1024 KiB"),
        ("error event", "engine_error", "the GPU fell out"),
        ("wrong length", "connection_lost", "the connection broke"),
    ] {
        for machine in [&tower, &mini] {
            let events = machine.stream(&far(what)).await.rest().await;
            events.broke_with(code);
            let said = events.error.as_ref().unwrap()["message"].as_str().unwrap();
            assert!(said.contains(message), "{what}: {said}");
            assert_eq!(events.text, if what == "wrong length" { "short" } else { "one two " });
            let whole = machine.ask(&far(what)).await;
            assert_eq!(whole.code(), code, "{what}: {}", whole.body);
            assert_eq!(machine.ask(&far("plain")).await.text(), "Héllo \n🔥");
        }
    }
    assert_eq!(mini.ask(&far("plain")).await.text(), "Héllo \n🔥", "after all that");
    tower.until_running(0).await;
    assert!(!tower.log().contains("sk-very-secret"));
}

#[tokio::test]
async fn a_client_that_leaves_hangs_up_on_the_far_server() {
    let server = FarServer::start().await;
    let (tower, mini, _config) = impatient(&server).await;
    let (mut asked, mut hung_up) = (0, 0);
    for machine in [&tower, &mini] {
        // In the middle of a stream.
        let stream = machine.stream(&far("slow")).await.begun().await;
        tower.until_running(1).await;
        drop(stream);
        (asked, hung_up) = (asked + 1, hung_up + 1);
        server.until_hung_up(hung_up).await;
        tower.until_running(0).await;
        // Before it has begun, and while the whole answer is awaited.
        for what in ["never", "slow"] {
            (asked, hung_up) = (asked + 1, hung_up + 1);
            let question = far(what);
            tokio::select! {
                answer = machine.ask(&question) => panic!("it answers: {answer:?}"),
                () = server.until_asked(asked) => {}
            }
            server.until_hung_up(hung_up).await;
        }
    }
    let idle = |status: &Status| {
        let model = status.model("tower");
        (&model["running"], &model["waiting"]) == (&json!(0), &json!(0))
    };
    mini.until("nothing is left of it", idle).await;
}

#[tokio::test]
async fn who_does_not_read_pauses_the_far_server() {
    let server = FarServer::start().await;
    let (_tower, mini, _config) = impatient(&server).await;
    let stream = mini.stream(&far("firehose")).await.begun().await;
    // 1.6 GB would come: as much as lies in buffers on the way does, and then no more.
    let mut before = 0;
    until("the far server stands still", async || {
        let now = server.written();
        (std::mem::replace(&mut before, now) == now).then_some(())
    })
    .await;
    assert!(server.written() < 64 << 20, "{} bytes", server.written());
    // Everybody else is served.
    assert_eq!(mini.ask(&far("plain")).await.text(), "Héllo \n🔥");
    drop(stream);
    server.until_hung_up(1).await;
}
