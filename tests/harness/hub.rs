//! A model hub on this machine: files over HTTP with ranges, and a count of what was taken from it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use super::{Machine, PAUSE};

/// Bytes that a slow hub gives at a time.
const SLOW: usize = 16 << 10;

/// The small random-weight model of this family, of the engine's own tests.
pub fn tiny(family: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../actors/engine/tests/fixtures/tiny", &format!("{family}.gguf")].iter().collect()
}

#[derive(Debug, Default)]
struct Shelf {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    taken: AtomicU64,
    slow: AtomicBool,
}

/// The hub. It ends when it is dropped.
#[derive(Debug)]
pub struct Hub {
    address: SocketAddr,
    shelf: Arc<Shelf>,
    task: AbortHandle,
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Hub {
    /// An empty one.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shelf = Arc::new(Shelf::default());
        let shared = shelf.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { address, shelf, task: task.abort_handle() }
    }

    /// Puts a file there; the source that names it.
    pub fn put(&self, name: &str, content: Vec<u8>) -> String {
        self.shelf.files.lock().unwrap().insert(format!("/owner/models/resolve/main/{name}"), content);
        format!("hf:owner/models/{name}")
    }

    /// It gives [`SLOW`] in a tenth of a second from now on, or as fast as it can.
    pub fn set_slow(&self, slow: bool) {
        self.shelf.slow.store(slow, Ordering::SeqCst);
    }

    /// Bytes of files that were taken from here, all together.
    pub fn taken(&self) -> u64 {
        self.shelf.taken.load(Ordering::SeqCst)
    }

    /// A machine that takes models from here, and takes registered models by itself, with a model folder of its own
    /// below its state directory.
    pub fn machine(&self, name: &str, settings: &str) -> Machine {
        let machine = Machine::new(name).settings(&format!("[placement]\nautomatic = true\n{settings}"));
        let cache = machine.state_dir().join("models");
        machine
            .environment("INGLE_HUB_URL", &format!("http://{}", self.address))
            .environment("INGLE_MODEL_CACHE", cache.to_str().unwrap())
    }
}

async fn serve(mut stream: TcpStream, shelf: Arc<Shelf>) {
    let mut read = Vec::new();
    loop {
        while !read.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut more = [0; 4096];
            match stream.read(&mut more).await {
                Ok(count) if count > 0 => read.extend_from_slice(&more[..count]),
                _ => return,
            }
        }
        let head = String::from_utf8_lossy(&std::mem::take(&mut read)).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let Some(content) = shelf.files.lock().unwrap().get(path).cloned() else {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
            continue;
        };
        let range =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
        let (first, last) = match range.as_deref().and_then(|range| range.split_once('-')) {
            Some((first, last)) => {
                (first.parse().unwrap(), last.trim().parse::<usize>().unwrap().min(content.len() - 1))
            }
            None => (0, content.len() - 1),
        };
        let answer = format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {first}-{last}/{}\r\netag: \"{}\"\r\n\r\n",
            last + 1 - first,
            content.len(),
            content.len()
        );
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        for piece in content[first..=last].chunks(SLOW) {
            if stream.write_all(piece).await.is_err() {
                return;
            }
            shelf.taken.fetch_add(piece.len() as u64, Ordering::SeqCst);
            if shelf.slow.load(Ordering::SeqCst) {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
