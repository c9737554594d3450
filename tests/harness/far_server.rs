//! A server that speaks OpenAI's HTTP, well or badly: real TCP, and what it does is written in the question.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use super::{DEADLINE, until};

/// The model that it has.
pub const FAR_MODEL: &str = "far-model";

/// Between the pieces of a slow answer.
const SLOW: Duration = Duration::from_millis(50);

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Received {
    pub head: String,
    pub raw: String,
    pub body: Value,
}

#[derive(Debug, Default)]
struct Seen {
    requests: Mutex<Vec<Received>>,
    connections: AtomicU64,
    /// Exchanges in which the other side hung up before the end.
    hung_up: AtomicU64,
    /// Bytes that went into sockets.
    written: AtomicU64,
    /// What it answers when asked for its models, and how.
    models: Mutex<(u16, String)>,
}

/// The server. It ends when it is dropped.
#[derive(Debug)]
pub struct FarServer {
    pub address: SocketAddr,
    seen: Arc<Seen>,
    task: AbortHandle,
}

impl Drop for FarServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FarServer {
    /// A server with one model.
    pub async fn start() -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into()).await
    }

    /// A server at this address, once it is free.
    pub async fn start_at(address: SocketAddr) -> Self {
        let listener = until("the address is free", async || TcpListener::bind(address).await.ok()).await;
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen::default());
        *seen.models.lock().unwrap() = (200, json!({"object": "list", "data": [{"id": FAR_MODEL}]}).to_string());
        let shared = seen.clone();
        let task = tokio::spawn(async move {
            // Its connections end with it.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                shared.connections.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { address, seen, task: task.abort_handle() }
    }

    /// What `--endpoint` takes.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it says from now on when it is asked for its models.
    pub fn set_models(&self, status: u16, body: &str) {
        *self.seen.models.lock().unwrap() = (status, body.to_owned());
    }

    /// The questions so far.
    pub fn requests(&self) -> Vec<Received> {
        self.seen.requests.lock().unwrap().clone()
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.seen.connections.load(Ordering::SeqCst)
    }

    /// Bytes of answers so far.
    pub fn written(&self) -> u64 {
        self.seen.written.load(Ordering::SeqCst)
    }

    /// Waits until so many questions have come.
    pub async fn until_asked(&self, count: usize) {
        until("the far server is asked", async || (self.requests().len() >= count).then_some(())).await;
    }

    /// Waits until so many times somebody has hung up on it.
    pub async fn until_hung_up(&self, count: u64) {
        let hung_up = async || (self.seen.hung_up.load(Ordering::SeqCst) >= count).then_some(());
        until("the far server sees that nobody listens", hung_up).await;
    }
}

/// A question that says what shall happen.
pub fn far(what: &str) -> Value {
    json!({"model": FAR_MODEL, "messages": [{"role": "user", "content": what}]})
}

async fn serve(mut stream: TcpStream, seen: Arc<Seen>) {
    while let Some((head, body)) = read_request(&mut stream).await {
        if head.starts_with("GET ") {
            let (status, body) = match head.starts_with("GET /v1/models ") {
                true => seen.models.lock().unwrap().clone(),
                false => (404, "{}".into()),
            };
            whole(&mut stream, &seen, status, "content-type: application/json\r\n", &body).await;
            continue;
        }
        let raw = String::from_utf8(body).unwrap();
        let body: Value = serde_json::from_str(&raw).expect("a request is JSON");
        if head.starts_with("POST /v1/embeddings ") {
            let (status, answer) = super::embeddings::far_embeddings(&body);
            seen.requests.lock().unwrap().push(Received { head, raw, body });
            whole(&mut stream, &seen, status, "content-type: application/json\r\n", &answer).await;
            continue;
        }
        let what = body["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap().to_owned();
        assert_eq!(body["stream"], true);
        seen.requests.lock().unwrap().push(Received { head, raw, body });
        if answer(&mut stream, &seen, &what).await.is_none() {
            return;
        }
    }
}

/// Head and body; `None` where the connection ends.
async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    while bytes.len() < end + length.unwrap_or(0) {
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return None;
        }
    }
    Some((head, bytes.split_off(end)))
}

async fn write(stream: &mut TcpStream, seen: &Seen, bytes: &[u8]) -> Option<()> {
    if stream.write_all(bytes).await.is_err() {
        seen.hung_up.fetch_add(1, Ordering::SeqCst);
        return None;
    }
    seen.written.fetch_add(bytes.len() as u64, Ordering::SeqCst);
    Some(())
}

async fn whole(stream: &mut TcpStream, seen: &Seen, status: u16, headers: &str, body: &str) -> Option<()> {
    let text = format!("HTTP/1.1 {status} Status\r\n{headers}content-length: {}\r\n\r\n{body}", body.len());
    write(stream, seen, text.as_bytes()).await
}

const EVENTS: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// One chunk of HTTP's chunked encoding.
async fn piece(stream: &mut TcpStream, seen: &Seen, bytes: &str) -> Option<()> {
    write(stream, seen, format!("{:x}\r\n{bytes}\r\n", bytes.len()).as_bytes()).await
}

async fn event(stream: &mut TcpStream, seen: &Seen, delta: Value, finish_reason: Option<&str>) -> Option<()> {
    let chunk = json!({
        "id": "far-1", "object": "chat.completion.chunk", "created": 1, "model": FAR_MODEL, "system_fingerprint": "b7",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    });
    piece(stream, seen, &format!("data: {chunk}\n\n")).await
}

async fn end(stream: &mut TcpStream, seen: &Seen, finish_reason: &str) -> Option<()> {
    event(stream, seen, json!({}), Some(finish_reason)).await?;
    let usage = json!({"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 5}, "completion_tokens_details": {"reasoning_tokens": 1}});
    piece(stream, seen, &format!("data: {}\n\n", json!({"choices": [], "usage": usage, "timings": {"x": 1.5}})))
        .await?;
    piece(stream, seen, "data: [DONE]\n\n").await?;
    write(stream, seen, b"0\r\n\r\n").await
}

/// Says nothing more until the other side hangs up.
async fn silence(stream: &mut TcpStream, seen: &Seen) -> Option<()> {
    let mut byte = [0; 1];
    let ended = tokio::time::timeout(4 * DEADLINE, stream.read(&mut byte)).await;
    if matches!(ended, Ok(Ok(0) | Err(_))) {
        seen.hung_up.fetch_add(1, Ordering::SeqCst);
    }
    None
}

async fn two_tokens(stream: &mut TcpStream, seen: &Seen) -> Option<()> {
    write(stream, seen, EVENTS.as_bytes()).await?;
    event(stream, seen, json!({"role": "assistant", "content": ""}), None).await?;
    event(stream, seen, json!({"content": "one "}), None).await?;
    event(stream, seen, json!({"content": "two "}), None).await
}

/// `None` where the connection is over.
async fn answer(stream: &mut TcpStream, seen: &Seen, what: &str) -> Option<()> {
    let json = "content-type: application/json\r\n";
    match what {
        "plain" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            event(stream, seen, json!({"role": "assistant", "content": null}), None).await?;
            for text in ["Hé", "llo \n", "🔥"] {
                event(stream, seen, json!({ "content": text }), None).await?;
            }
            end(stream, seen, "stop").await
        }
        // All at once, cut where it hurts most.
        "cut" => {
            let text = "data: {\"choices\":[{\"delta\":{\"content\":\"Hé\"}}]}\r\n\r\ndata: {\"choices\":[{\"delta\":\
                        {\"content\":\"llo\"},\"finish_reason\":\"length\"}]}\r\n\r\ndata: [DONE]";
            let head = "HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8\r\nconnection: close\r\n\r\n";
            write(stream, seen, head.as_bytes()).await?;
            for byte in text.as_bytes() {
                write(stream, seen, &[*byte]).await?;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            None
        }
        "slow" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            for _ in 0..40_000 {
                event(stream, seen, json!({"content": "tick "}), None).await?;
                tokio::time::sleep(SLOW).await;
            }
            end(stream, seen, "length").await
        }
        "firehose" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            let text = "x".repeat(8 << 10);
            for _ in 0..200_000 {
                event(stream, seen, json!({ "content": text }), None).await?;
            }
            end(stream, seen, "length").await
        }
        "tools" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            event(stream, seen, json!({"role": "assistant", "content": null, "reasoning_content": "I need "}), None)
                .await?;
            event(stream, seen, json!({"reasoning_content": "the weather."}), None).await?;
            let call = |call: Value| json!({"tool_calls": [call]});
            let function = json!({"name": "weather", "arguments": ""});
            event(
                stream,
                seen,
                call(json!({"index": 0, "id": "call_1", "type": "function", "function": function})),
                None,
            )
            .await?;
            for arguments in ["{\"city\":", "\"Oslo\"}"] {
                event(stream, seen, call(json!({"index": 0, "function": {"arguments": arguments}})), None).await?;
            }
            end(stream, seen, "tool_calls").await
        }
        "late" => {
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            write(stream, seen, EVENTS.as_bytes()).await?;
            event(stream, seen, json!({"content": "late"}), None).await?;
            end(stream, seen, "stop").await
        }
        "never" => silence(stream, seen).await,
        "stalls" => {
            two_tokens(stream, seen).await?;
            silence(stream, seen).await
        }
        "breaks off" => {
            two_tokens(stream, seen).await?;
            None
        }
        "ends early" => {
            two_tokens(stream, seen).await?;
            write(stream, seen, b"0\r\n\r\n").await
        }
        "is reset" => {
            stream.set_zero_linger().unwrap();
            None
        }
        "broken event" => {
            two_tokens(stream, seen).await?;
            piece(stream, seen, "data: {\"choices\":[{\"delta\":{\"content\":\"thr\n\n").await?;
            silence(stream, seen).await
        }
        "long line" => {
            two_tokens(stream, seen).await?;
            for _ in 0..40 {
                piece(stream, seen, &format!("data: {}", "x".repeat(64 << 10))).await?;
            }
            silence(stream, seen).await
        }
        "error event" => {
            two_tokens(stream, seen).await?;
            piece(stream, seen, "data: {\"error\":{\"message\":\"the GPU fell out\",\"code\":500}}\n\n").await?;
            write(stream, seen, b"0\r\n\r\n").await
        }
        "wrong length" => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 900\r\n\r\n";
            let text = format!("{head}data: {{\"choices\":[{{\"delta\":{{\"content\":\"short\"}}}}]}}\n\n");
            write(stream, seen, text.as_bytes()).await?;
            None
        }
        "no HTTP" => {
            write(stream, seen, b"SSH-2.0-OpenSSH_9.9\r\n").await?;
            None
        }
        "whole" => whole(stream, seen, 200, json, "{\"choices\":[{\"message\":{\"content\":\"whole\"}}]}").await,
        "page" => whole(stream, seen, 200, "content-type: text/html\r\n", "<h1>router login</h1>").await,
        "elsewhere" => whole(stream, seen, 307, "location: http://127.0.0.1:9/v1\r\n", "").await,
        "echo of the key" => {
            let received = seen.requests.lock().unwrap().last().unwrap().head.clone();
            let key = received.lines().find_map(|line| line.strip_prefix("authorization: Bearer ")).unwrap_or("no key");
            whole(stream, seen, 401, json, &json!({"error": {"message": format!("bad key {key}")}}).to_string()).await
        }
        // `429 retry-after: 7 {"error": …}`: status, headers, body.
        other => {
            let (status, rest) = other.split_once(' ').unwrap_or_else(|| panic!("nobody knows what `{other}` is"));
            let (header, body) = rest.split_once('{').unwrap();
            let header = if header.is_empty() { String::new() } else { format!("{}\r\n", header.trim()) };
            whole(stream, seen, status.parse().unwrap(), &format!("{json}{header}"), &format!("{{{body}")).await
        }
    }
}
