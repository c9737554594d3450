//! The shell around the routes, over real connections.

use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

const LIMIT: usize = 1 << 20;

async fn length(request: Request) -> Result<String, ApiError> {
    Ok(body::read(request, LIMIT, &Arc::new(Semaphore::new(body::MEMORY_KIB))).await?.len().to_string())
}

async fn slow() -> Response {
    let parts = futures_util::stream::unfold(0, async |n| {
        tokio::time::sleep(Duration::from_millis(100)).await;
        (n < 5).then_some((Ok::<_, std::io::Error>(format!("part {n}\n")), n + 1))
    });
    Response::new(Body::from_stream(parts))
}

async fn panics() -> &'static str {
    assert!(Instant::now() < Instant::now() - Duration::from_secs(1), "on purpose");
    "never"
}

async fn start() -> (Server, std::net::SocketAddr) {
    let routes = Router::new().route("/length", post(length)).route("/slow", get(slow)).route("/panics", get(panics));
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    (Server::start(listener, around(routes, Guard::default()), 16), address)
}

async fn exchange(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that does not read a body to its end may reset the connection behind its answer.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

fn get_request(path: &str, host: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

#[tokio::test]
async fn every_answer_has_an_id_and_every_error_the_usual_shape() {
    let (_server, address) = start().await;
    for (request, status, code) in [
        (get_request("/nowhere", "localhost"), 404, "unknown_url"),
        (get_request("/length", "localhost"), 405, "method_not_allowed"),
        (get_request("/slow", "evil.example"), 403, "forbidden_origin"),
        (get_request("/nowhere", "evil.example"), 403, "forbidden_origin"),
        (get_request("/panics", "localhost"), 500, "internal_error"),
        (
            format!("POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", LIMIT + 1),
            413,
            "request_too_large",
        ),
    ] {
        let answer = exchange(address, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}{answer}");
        assert!(answer.contains("\r\nx-request-id: req_"), "{answer}");
        assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{answer}");
        assert!(!answer.to_lowercase().contains("access-control"), "{answer}");
    }
    let body = "x".repeat(1_000);
    let request =
        format!("POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n{body}");
    assert!(exchange(address, &request).await.ends_with("\r\n\r\n1000"));
}

#[tokio::test]
async fn a_body_without_a_length_is_cut_at_the_limit() {
    let (_server, address) = start().await;
    let mut request = "POST /length HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
    for _ in 0..=LIMIT / 0x10000 {
        request += &format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let mut answer = vec![0; 1_000];
    let (_, read) = tokio::join!(writer.write_all(request.as_bytes()), reader.read(&mut answer));
    assert!(String::from_utf8_lossy(&answer[..read.unwrap()]).starts_with("HTTP/1.1 413 "));
}

#[tokio::test]
async fn running_answers_finish_when_the_server_closes() {
    let (server, address) = start().await;
    let running = tokio::spawn(async move { exchange(address, &get_request("/slow", "localhost")).await });
    // An idle connection must not hold the end up.
    let _idle = TcpStream::connect(address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    let began = Instant::now();
    assert!(server.close(Duration::from_secs(10)).await);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(running.await.unwrap().contains("part 4"));
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn what_takes_longer_than_the_limit_is_cut_off() {
    let (server, address) = start().await;
    let running = tokio::spawn(async move { exchange(address, &get_request("/slow", "localhost")).await });
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(!server.close(Duration::from_millis(10)).await);
    assert!(!running.await.unwrap().contains("part 4"));
}

#[tokio::test]
async fn a_port_in_use_is_named_with_what_to_do() {
    let held = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = held.local_addr().unwrap();
    let message = bind(address).await.unwrap_err().to_string();
    assert!(message.contains(&address.to_string()) && message.contains("--http"), "{message}");
}
