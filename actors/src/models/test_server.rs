//! A server of the hub's shape, with faults on demand. One request for each connection.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

/// What a request asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub path: String,
    pub range: Option<(u64, u64)>,
    pub if_range: Option<String>,
}

/// What goes back. `status` 206 makes a Content-Range from what was asked for.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Says this many bytes in Content-Length; `None` for as many as there are.
    pub claims: Option<u64>,
    /// Closes the connection after so many bytes of the body.
    pub cut: Option<usize>,
    /// Sends nothing more after so many bytes of the body, and leaves the connection open.
    pub stall: Option<usize>,
    /// Sends ten bytes now and then.
    pub drip: Option<Duration>,
}

impl Answer {
    pub fn new(status: u16) -> Self {
        Self { status, headers: vec![], body: vec![], claims: None, cut: None, stall: None, drip: None }
    }

    /// The file, or the range of it that was asked for.
    pub fn file(asked: &Asked, content: &[u8], etag: &str) -> Self {
        let wanted = asked.if_range.as_deref().is_none_or(|tag| tag == etag);
        let mut answer = match asked.range.filter(|_| wanted) {
            Some((first, last)) => {
                let last = last.min(content.len() as u64 - 1);
                let range = format!("bytes {first}-{last}/{}", content.len());
                let body = content[first as usize..=last as usize].to_vec();
                Self { headers: vec![("Content-Range", range)], body, ..Self::new(206) }
            }
            None => Self { body: content.to_vec(), ..Self::new(200) },
        };
        answer.headers.push(("ETag", etag.into()));
        answer
    }
}

pub(super) struct TestServer {
    pub url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _task: AbortOnDropHandle<()>,
}

impl TestServer {
    /// `answer` gets the request and how many came before it.
    pub async fn start(answer: impl Fn(&Asked, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (asked.clone(), Arc::new(answer));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, answer) = (seen.clone(), answer.clone());
                connections.spawn(async move {
                    let (asked, stream) = read_request(stream).await;
                    let number = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(asked.clone());
                        seen.len() - 1
                    };
                    // A client that leaves early is not this server's problem.
                    let _ = send(answer(&asked, number), stream).await;
                });
            }
        });
        Self { url, asked, _task: AbortOnDropHandle::new(task) }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

async fn read_request(stream: TcpStream) -> (Asked, TcpStream) {
    let mut reader = BufReader::new(stream);
    let mut asked = Asked::default();
    let mut line = String::new();
    reader.read_line(&mut line).await.unwrap();
    asked.path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    loop {
        line.clear();
        reader.read_line(&mut line).await.unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                asked.range = Some((first.parse().unwrap(), last.parse().unwrap()));
            }
            "if-range" => asked.if_range = Some(value.to_owned()),
            _ => {}
        }
    }
    (asked, reader.into_inner())
}

async fn send(answer: Answer, mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Whatever\r\nConnection: close\r\n", answer.status);
    let length = answer.claims.unwrap_or(answer.body.len() as u64);
    head.push_str(&format!("Content-Length: {length}\r\n"));
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).await?;
    let end = answer.cut.or(answer.stall).unwrap_or(answer.body.len()).min(answer.body.len());
    for chunk in answer.body[..end].chunks(if answer.drip.is_some() { 10 } else { 10_000 }) {
        stream.write_all(chunk).await?;
        if let Some(pause) = answer.drip {
            tokio::time::sleep(pause).await;
        }
    }
    stream.flush().await?;
    if answer.stall.is_some() {
        std::future::pending::<()>().await;
    }
    stream.shutdown().await
}
