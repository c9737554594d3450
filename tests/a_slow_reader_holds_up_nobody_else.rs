//! A client that does not read pauses its own answer, and after a deadline loses it.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::harness::*;

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_else() {
    let (mut tower, mut mini) = (Machine::new("tower").model("echo"), Machine::new("mini"));
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.ask_until_known(&echo("hello")).await;

    // As much text as fits into the context, at full speed, for somebody who never reads.
    let mut body = echo("repeat 8000: x");
    body["stream"] = true.into();
    let body = body.to_string();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut reader = socket.connect(mini.http()).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: \
         {}\r\n\r\n",
        body.len()
    );
    reader.write_all(format!("{head}{body}").as_bytes()).await.unwrap();

    // It gets stuck: its engine makes no step any more and still counts it.
    until("the answer pauses", async || {
        let before = tower.status().await;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let after = tower.status().await;
        let steps = |status: &Status| status.model("tower")["steps"].as_u64();
        (after.running("tower") == 1 && steps(&before) == steps(&after)).then_some(())
    })
    .await;

    // Everybody else is served in the meantime, by the same engine and over the same connection.
    for machine in [&tower, &mini] {
        let text = "repeat 100: hello ";
        machine.stream(&echo(text)).await.rest().await.is_whole(&"hello ".repeat(100));
    }
    assert_eq!(tower.status().await.running("tower"), 1, "the slow one is still there");
    tower.until_running(0).await;
    let status = mini.until("it counts as failed", |status| status.latency("tower")["failed"] == 1).await;
    assert_eq!(status.latency("tower")["finished"], 2);
    drop(reader);
}
