//! HTTP/1.1 on both sides, as bare as hyper has it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::Error;

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Where chat completions are.
pub const CHAT: &str = "/v1/chat/completions";
/// Pieces of a body that wait for a slow reader.
pub const BODY_BUFFER: usize = 16;
/// A connection that was idle for longer is not used again: the other side may be closing it.
const IDLE: Duration = Duration::from_secs(5);

/// A body that is there.
pub fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// A body whose pieces come over a channel.
pub fn streamed(pieces: mpsc::Receiver<Bytes>) -> Body {
    let pieces = stream::unfold(pieces, async |mut pieces| {
        let piece = pieces.recv().await?;
        Some((Ok(Frame::data(piece)), pieces))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// Serves connections until the task is dropped.
pub async fn serve<F, A>(listener: TcpListener, answer: F) -> Result<(), Error>
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            // A client that hangs up is nothing to speak of.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// Connections to one server, kept open between requests.
#[derive(Debug)]
pub struct Pool {
    to: SocketAddr,
    idle: Mutex<Vec<(SendRequest<Full<Bytes>>, Instant)>>,
}

/// A connection that is in use.
#[derive(Debug)]
pub struct Lease(SendRequest<Full<Bytes>>);

impl Pool {
    /// Connections to this address.
    pub fn new(to: SocketAddr) -> Self {
        Self { to, idle: Mutex::default() }
    }

    fn idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((connection, since)) = idle.pop() {
            if since.elapsed() < IDLE && connection.is_ready() {
                return Some(connection);
            }
        }
        None
    }

    /// A connection that nobody uses.
    pub async fn connection(&self) -> Result<Lease, Error> {
        if let Some(connection) = self.idle() {
            return Ok(Lease(connection));
        }
        let stream = TcpStream::connect(self.to).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Lease(sender))
    }

    /// Posts a chat completion on the connection.
    pub async fn post(
        &self,
        lease: &mut Lease,
        body: Bytes,
        headers: &[(String, String)],
    ) -> Result<Response<Incoming>, Error> {
        let mut request =
            Request::post(CHAT).header(HOST, self.to.to_string()).header(CONTENT_TYPE, "application/json");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        Ok(lease.0.send_request(request.body(Full::new(body))?).await?)
    }

    /// The answer was read to its end.
    pub async fn give_back(&self, mut lease: Lease) {
        if lease.0.ready().await.is_ok() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push((lease.0, Instant::now()));
        }
    }
}
