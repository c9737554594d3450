//! A server that speaks OpenAI's HTTP, well or badly: real TCP, and what it does is written in the question.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    /// What else it answers, by paths.
    pages: Mutex<HashMap<String, String>>,
    /// Its parrots fall silent in the middle of a word.
    breaks_off: AtomicBool,
    /// Milliseconds between two words of a parrot; 0 for the usual ones.
    pace: AtomicU64,
    /// It goes on with an assistant's message at the end where it is told so, or always, or never.
    continues: Mutex<Continues>,
    /// Questions that it answers now, and how many it takes at once; 0 for any number.
    answering: AtomicU64,
    room: AtomicU64,
    /// How many it had to refuse.
    refused: AtomicU64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Continues {
    #[default]
    Never,
    Flagged,
    Always,
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

    /// What it says from now on to `GET path`.
    pub fn says(&self, path: &str, body: &Value) {
        self.seen.pages.lock().unwrap().insert(path.to_owned(), body.to_string());
    }

    /// It behaves from now on as this program does.
    pub fn is(&self, program: &str) {
        let (owner, continues) = match program {
            "llama.cpp" => {
                let settings = json!({"n_ctx": 512});
                self.says(
                    "/props",
                    &json!({"total_slots": 2, "default_generation_settings": settings, "build_info": "b6000-abc"}),
                );
                ("llamacpp", Continues::Flagged)
            }
            "vLLM" => {
                self.says("/version", &json!({"version": "0.9.1"}));
                ("vllm", Continues::Flagged)
            }
            "Ollama" => {
                self.says("/api/version", &json!({"version": "0.5.1"}));
                let tag = |name: &str, family: &str| json!({"name": name, "details": {"family": family}});
                self.says(
                    "/api/tags",
                    &json!({"models": [tag(FAR_MODEL, "llama"), tag("nomic-embed-text:latest", "nomic-bert")]}),
                );
                ("library", Continues::Always)
            }
            "LM Studio" => {
                let model = |id: &str, kind: &str| json!({"id": id, "type": kind, "state": "loaded"});
                self.says(
                    "/api/v0/models",
                    &json!({"data": [model(FAR_MODEL, "llm"), model("text-embedding", "embeddings")]}),
                );
                ("organization_owner", Continues::Never)
            }
            other => panic!("nobody knows {other}"),
        };
        let mut models = vec![json!({"id": FAR_MODEL, "owned_by": owner})];
        match program {
            "Ollama" => models.push(json!({"id": "nomic-embed-text:latest", "owned_by": owner})),
            "LM Studio" => models.push(json!({"id": "text-embedding", "owned_by": owner})),
            _ => {}
        }
        self.set_models(200, &json!({"object": "list", "data": models}).to_string());
        *self.seen.continues.lock().unwrap() = continues;
    }

    /// All parrots that speak, and all that begin, fall silent in the middle.
    pub fn break_off(&self) {
        self.seen.breaks_off.store(true, Ordering::SeqCst);
    }

    /// It ends, and its address is free.
    pub fn stopped_at(self) -> SocketAddr {
        self.address
    }

    /// Milliseconds between two words of its parrots.
    pub fn set_pace(&self, ms: u64) {
        self.seen.pace.store(ms, Ordering::SeqCst);
    }

    /// It answers so many at once and refuses more.
    pub fn set_room(&self, room: u64) {
        self.seen.room.store(room, Ordering::SeqCst);
    }

    /// Questions that it refused for lack of room.
    pub fn refused(&self) -> u64 {
        self.seen.refused.load(Ordering::SeqCst)
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
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            let page = seen.pages.lock().unwrap().get(&path).cloned();
            let (status, body) = match (path.as_str(), page) {
                ("/v1/models", _) => seen.models.lock().unwrap().clone(),
                (_, Some(page)) => (200, page),
                (_, None) => (404, "{}".into()),
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
        let messages = body["messages"].as_array().unwrap();
        let is_parrot = |message: &&Value| message["content"].as_str().is_some_and(|what| what.contains("parrot"));
        let what = messages.iter().find(is_parrot).or(messages.last()).unwrap()["content"].as_str().unwrap().to_owned();
        let said = messages.last().filter(|last| last["role"] == "assistant");
        let said = said.map(|said| said["content"].as_str().unwrap().to_owned());
        let flagged = body["continue_final_message"] == true && body["add_generation_prompt"] == false;
        let said = said.filter(|_| match *seen.continues.lock().unwrap() {
            Continues::Never => false,
            Continues::Flagged => flagged,
            Continues::Always => true,
        });
        assert_eq!(body["stream"], true);
        seen.requests.lock().unwrap().push(Received { head, raw, body });
        let room = seen.room.load(Ordering::SeqCst);
        if seen.answering.fetch_add(1, Ordering::SeqCst) >= room && room > 0 {
            seen.answering.fetch_sub(1, Ordering::SeqCst);
            seen.refused.fetch_add(1, Ordering::SeqCst);
            let said = json!({"error": {"message": "server busy, please try again"}}).to_string();
            if whole(&mut stream, &seen, 503, "content-type: application/json\r\n", &said).await.is_none() {
                return;
            }
            continue;
        }
        let answered = match is_parrot(&&json!({ "content": what })) {
            true => parrot(&mut stream, &seen, &what, said.as_deref()).await,
            false => answer(&mut stream, &seen, &what).await,
        };
        seen.answering.fetch_sub(1, Ordering::SeqCst);
        if answered.is_none() {
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

/// Says what it was told, as an echo engine does, or goes on with it behind what was said before.
async fn parrot(stream: &mut TcpStream, seen: &Seen, what: &str, said: Option<&str>) -> Option<()> {
    let text = what.split_once(": ").map_or(what, |(_, text)| text);
    let rest = match said {
        Some(said) => text.strip_prefix(said).unwrap_or_else(|| panic!("`{said}` is not how `{text}` begins")),
        None => text,
    };
    write(stream, seen, EVENTS.as_bytes()).await?;
    let mut from = 0;
    // A word and the space in front of it, as tokens are.
    for to in rest.match_indices(' ').map(|(at, _)| at).filter(|at| *at > 0).chain([rest.len()]) {
        if seen.breaks_off.load(Ordering::SeqCst) {
            return None;
        }
        event(stream, seen, json!({ "content": rest[from..to] }), None).await?;
        from = to;
        let pace = match seen.pace.load(Ordering::SeqCst) {
            0 => 2 * SLOW,
            ms => Duration::from_millis(ms),
        };
        tokio::time::sleep(pace).await;
    }
    end(stream, seen, "stop").await
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
        // As Ollama does: calls whole in one chunk, the finish reason in one of its own, no usage, comments between.
        "whole call" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            piece(stream, seen, ": keep-alive\r\n\r\n").await?;
            let function = json!({"name": "weather", "arguments": "{\"city\":\"Oslo\"}"});
            let call = json!({"index": 0, "id": "call_1", "type": "function", "function": function});
            event(stream, seen, json!({"role": "assistant", "content": "", "tool_calls": [call]}), None).await?;
            event(stream, seen, json!({"role": "assistant", "content": ""}), Some("tool_calls")).await?;
            write(stream, seen, b"0\r\n\r\n").await
        }
        "reasons and breaks" => {
            write(stream, seen, EVENTS.as_bytes()).await?;
            event(stream, seen, json!({"reasoning_content": "I need to think."}), None).await?;
            event(stream, seen, json!({"content": "so far"}), None).await?;
            None
        }
        "drips" => {
            two_tokens(stream, seen).await?;
            for _ in 0..4_000 {
                piece(stream, seen, "x").await?;
                tokio::time::sleep(SLOW).await;
            }
            None
        }
        "gzip" => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n";
            write(stream, seen, head.as_bytes()).await?;
            write(stream, seen, b"\x1f\x8b\x08\x00").await?;
            None
        }
        "headers" => {
            write(stream, seen, b"HTTP/1.1 200 OK\r\n").await?;
            for number in 0..100_000 {
                write(stream, seen, format!("x-header-{number}: {}\r\n", "x".repeat(1 << 10)).as_bytes()).await?;
            }
            None
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
        other if other.starts_with("elsewhere ") => {
            let location = other.trim_start_matches("elsewhere ");
            whole(stream, seen, 308, &format!("location: {location}\r\n"), "").await
        }
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
