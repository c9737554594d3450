//! A client that does not read its answer loses it after a deadline, and is told so when it reads again.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::harness::*;

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_else() {
    let (tower, mini) = tower_and_mini().await;

    // As much text as fits into the context, at full speed, for somebody who never reads; again and again on one
    // connection, because what lies between the two may hold several megabytes.
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
    reader.write_all(format!("{head}{body}").repeat(12).as_bytes()).await.unwrap();

    // Everybody else is served all the while, by the same engine and over the same connection.
    let given_up = |status: &Status| status.latency("tower")["failed"].as_u64() > Some(0);
    let others = async {
        loop {
            for machine in [&tower, &mini] {
                machine.stream(&echo("repeat 100: hello ")).await.rest().await.is_whole(&"hello ".repeat(100));
            }
        }
    };
    tokio::select! {
        _ = mini.until("the slow one is given up", given_up) => {}
        () = others => {}
    }

    let mut got = String::new();
    let mut buffer = vec![0; 1 << 16];
    while !got.contains("reader_too_slow") {
        let read = tokio::time::timeout(DEADLINE, reader.read(&mut buffer)).await.expect("more to read").unwrap();
        assert!(read > 0, "the connection ended without a word: {}", &got[got.len().saturating_sub(500)..]);
        got += &String::from_utf8_lossy(&buffer[..read]);
    }
    drop(reader);
    tower.until_running(0).await;
}
