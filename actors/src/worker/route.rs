//! The way to an engine, and how many answers it gives.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How a model is used, whichever of its engines answers.
#[derive(Debug)]
pub struct Uses {
    open: watch::Sender<u32>,
    /// When an answer last began or ended.
    last: Mutex<Instant>,
    /// Ends the answers that run; a fresh one for each time.
    cut_off: Mutex<CancellationToken>,
}

impl Default for Uses {
    fn default() -> Self {
        Self { open: watch::Sender::new(0), last: Mutex::new(Instant::now()), cut_off: Mutex::default() }
    }
}

impl Uses {
    fn change(&self, change: impl FnOnce(&mut u32)) {
        self.touch();
        self.open.send_modify(change);
    }

    /// It counts as used just now.
    pub fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Answers of all its engines.
    pub fn open(&self) -> u32 {
        *self.open.borrow()
    }

    /// For how long nobody has used it; `None` while somebody does.
    pub fn idle_for(&self) -> Option<Duration> {
        (self.open() == 0).then(|| self.last.lock().unwrap_or_else(PoisonError::into_inner).elapsed())
    }

    /// Returns when no engine of it gives an answer.
    pub async fn idle(&self) {
        // The sender is ours, so this cannot fail.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }

    /// Ends what runs: whoever reads it can go on elsewhere.
    pub fn cut_off(&self) {
        std::mem::take(&mut *self.cut_off.lock().unwrap_or_else(PoisonError::into_inner)).cancel();
    }
}

/// The way to one engine process.
#[derive(Debug)]
pub struct Route {
    socket: PathBuf,
    open: watch::Sender<u32>,
    uses: Arc<Uses>,
}

impl Route {
    /// To the engine that listens at `socket`.
    pub fn new(socket: PathBuf, uses: Arc<Uses>) -> Arc<Self> {
        Arc::new(Self { socket, open: watch::Sender::new(0), uses })
    }

    /// Where the engine listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// One more answer, until the value is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.open.send_modify(|open| *open += 1);
        self.uses.change(|open| *open += 1);
        let cut_off = self.uses.cut_off.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Held { route: self.clone(), cut_off }
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
pub struct Held {
    route: Arc<Route>,
    cut_off: CancellationToken,
}

impl Held {
    /// Where the engine listens.
    pub fn socket(&self) -> &Path {
        self.route.socket()
    }

    /// Returns when the answer has to end here.
    pub async fn cut_off(&self) {
        self.cut_off.cancelled().await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.route.open.send_modify(|open| *open -= 1);
        self.route.uses.change(|open| *open -= 1);
    }
}
