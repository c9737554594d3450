//! The way to an engine, and how many answers it gives.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

/// The way to one engine process.
#[derive(Debug)]
pub struct Route {
    socket: PathBuf,
    open: watch::Sender<u32>,
}

impl Route {
    /// To the engine that listens at `socket`.
    pub fn new(socket: PathBuf) -> Arc<Self> {
        Arc::new(Self { socket, open: watch::Sender::new(0) })
    }

    /// Where the engine listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// One more answer, until the value is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.open.send_modify(|open| *open += 1);
        Held(self.clone())
    }

    /// Answers that are being given or waited for.
    pub fn open(&self) -> u32 {
        *self.open.borrow()
    }

    /// Returns when there are none.
    pub async fn idle(&self) {
        // The sender is ours, so this cannot fail.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }
}

/// An answer of an engine.
#[derive(Debug)]
pub struct Held(Arc<Route>);

impl Held {
    /// Where the engine listens.
    pub fn socket(&self) -> &Path {
        self.0.socket()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}
