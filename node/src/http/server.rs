//! Connections: how many, how patient, and how they end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A client that has not sent a request's head after so long is cut off; so is an idle connection.
const HEAD_DEADLINE: Duration = Duration::from_secs(15);
/// Rest after an accept that failed for lack of something (file descriptors): trying at once would spin.
const ACCEPT_REST: Duration = Duration::from_millis(500);

/// A server that accepts connections until it is told to end.
#[derive(Debug)]
pub struct Server {
    /// No new connections; those there are end after their running answer.
    closing: CancellationToken,
    /// Connections end now.
    killed: CancellationToken,
    tasks: TaskTracker,
}

/// Opens the listening socket. The error says what to do.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow::anyhow!(
            "The HTTP address {address} is in use. Another node may run here already (see `ingle status`): end it, or \
             choose another port, as in `ingle up --http {}`; --http 0 picks a free one.",
            address.port().saturating_add(100)
        ),
        io::ErrorKind::PermissionDenied => anyhow::anyhow!(
            "The HTTP address {address} is not allowed to this user: choose a port from 1024 up, as in \
             `ingle up --http 11435`."
        ),
        _ => anyhow::anyhow!("The HTTP address {address} cannot be used: {error}. Choose another one with --http."),
    })
}

impl Server {
    /// Serves `routes` with at most `connections` at a time; more wait in the system's queue.
    pub fn start(listener: TcpListener, routes: Router, connections: usize) -> Self {
        let server =
            Self { closing: CancellationToken::new(), killed: CancellationToken::new(), tasks: TaskTracker::new() };
        let accepting = accept(
            listener,
            routes,
            Arc::new(Semaphore::new(connections)),
            server.tasks.clone(),
            server.closing.clone(),
            server.killed.clone(),
        );
        server.tasks.spawn(accepting);
        server
    }

    /// Stops accepting, lets running answers finish for at most `limit`, then cuts the rest off. True where nothing
    /// had to be cut off.
    pub async fn close(&self, limit: Duration) -> bool {
        self.closing.cancel();
        self.tasks.close();
        let all_done = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        self.killed.cancel();
        self.tasks.wait().await;
        all_done
    }
}

async fn accept(
    listener: TcpListener,
    routes: Router,
    room: Arc<Semaphore>,
    tasks: TaskTracker,
    closing: CancellationToken,
    killed: CancellationToken,
) {
    loop {
        let accepted = async {
            // The permit first: without room a connection stays in the system's queue.
            let permit = room.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accepted => accepted,
            () = closing.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let serving = serve(stream, routes.clone(), closing.clone());
                let killed = killed.clone();
                tasks.spawn(async move {
                    let _permit = permit;
                    tokio::select! {
                        () = serving => {}
                        () = killed.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, routes: Router, closing: CancellationToken) {
    // A token is a small packet: it must not wait for the acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended badly");
    }
}
