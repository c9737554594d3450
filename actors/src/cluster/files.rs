//! Model files between members: who has which is told over the membership stream, copies come over a connection of
//! their own, so that answers share neither its windows nor its losses.
//!
//! Every member may read what another one tells that it has, guests too: files of the store alone, by their hash, the
//! same models that it may ask questions. What a member gives is believed as little: each chunk and the whole file are
//! checked by whoever copies.

mod give;
mod take;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::{HeldFiles, MOST_HELD_FILES};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch};
use tokio::time::Instant;

pub(super) use give::serve;
pub use take::PeerFiles;

use super::Mesh;
use crate::models::ModelStore;
use crate::worker::Workers;

/// How often the folder is looked at: other nodes of the machine put files there too.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Connections of members that copy, and chunks in memory for them, at a time.
const MOST_COPIERS: usize = 16;
const MOST_CHUNKS: usize = 8;
/// Bytes a second that go to all copiers together while this node gives answers: half of what a gigabit line takes, so
/// that tokens need not wait behind files.
const BESIDE_ANSWERS: f64 = 60e6;

/// The model files that this node gives to members.
#[derive(Debug)]
pub struct FileShare {
    store: PathBuf,
    held: watch::Sender<HeldFiles>,
    copiers: Arc<Semaphore>,
    chunks: Semaphore,
    /// Hashing all of a file is hard work: one at a time.
    hashing: Semaphore,
    workers: Arc<Workers>,
    /// When the next piece may go while answers are given.
    next_piece: Mutex<Instant>,
}

impl FileShare {
    /// The files of the store in this folder, on a node with these workers.
    pub fn new(store: PathBuf, workers: Arc<Workers>) -> Self {
        Self {
            store,
            held: watch::Sender::default(),
            copiers: Arc::new(Semaphore::new(MOST_COPIERS)),
            chunks: Semaphore::new(MOST_CHUNKS),
            hashing: Semaphore::new(1),
            workers,
            next_piece: Mutex::new(Instant::now()),
        }
    }

    /// Waits until a piece may go: at once where this node answers nobody, else within [`BESIDE_ANSWERS`].
    pub(super) async fn pace(&self, bytes: usize) {
        if self.workers.open() == 0 {
            return;
        }
        let at = {
            let mut next = self.next_piece.lock().unwrap_or_else(PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + Duration::from_secs_f64(bytes as f64 / BESIDE_ANSWERS);
            at
        };
        tokio::time::sleep_until(at).await;
    }

    /// A place for a member that copies.
    pub(super) fn copier(&self) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        self.copiers.clone().try_acquire_owned()
    }

    /// The store, if there is one already.
    fn store(&self) -> Option<ModelStore> {
        self.store.is_dir().then(|| ModelStore::open(&self.store).ok()).flatten()
    }

    /// What this node has, with every change of it.
    pub(super) fn held(&self) -> watch::Receiver<HeldFiles> {
        self.held.subscribe()
    }

    /// The files that this node gives.
    pub(crate) fn files(&self) -> HashSet<ModelDigest> {
        self.held.borrow().files.iter().copied().collect()
    }

    /// The files that are there, those used last first where there are too many.
    fn look(&self) -> HeldFiles {
        let files = self.store().and_then(|store| store.files().ok()).unwrap_or_default();
        let mut files: Vec<ModelDigest> = files.iter().rev().take(MOST_HELD_FILES).map(|file| file.digest).collect();
        files.sort();
        HeldFiles { files }
    }
}

/// Looks what files there are until the mesh ends.
pub(super) async fn watch_folder(mesh: Arc<Mesh>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let share = mesh.share.clone();
        let Ok(now) = tokio::task::spawn_blocking(move || share.look()).await else { continue };
        mesh.share.held.send_if_modified(|held| {
            let changed = *held != now;
            *held = now;
            changed
        });
    }
}
