//! Fetching one model's file: attempts at a source, the way of its bytes to the disk, the check at the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use ingle_protocol::wire::v2::ModelState;
use tokio::sync::mpsc;

use super::catalog::CatalogModel;
use super::hash::{blocking, finish};
use super::part::{Note, Part, write_chunks};
use super::source::{Job, Source, SourceError};
use super::store::ModelStore;
use crate::platform::{FileLock, available_disk_space};

/// Attempts at one source in all, as long as each brings something new.
const MOST_ATTEMPTS: u32 = 20;
/// Attempts one after the other that bring nothing new, of a source that has given something before.
const MOST_IDLE_ATTEMPTS: u32 = 3;
/// Chunks on the way to the disk: some 16 KiB each.
const CHUNKS_WAITING: usize = 32;
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// A model's file on its way into the store, under the lock of its digest.
pub(super) struct Fetch<'a> {
    pub(super) store: &'a ModelStore,
    pub(super) model: &'a CatalogModel,
    /// The model's digest is that of its file; else whatever comes is the file.
    pub(super) is_known: bool,
    pub(super) part: Part,
    pub(super) lock: Arc<FileLock>,
    pub(super) progress: &'a (dyn Fn(ModelState) + Send + Sync),
}

impl Fetch<'_> {
    /// Fetches from one source: goes on where it was cut, gives up early where there is nothing.
    pub(super) async fn from(&self, name: &str, source: &dyn Source) -> Result<PathBuf, SourceError> {
        let shown = Shown::new(self);
        let (mut best, mut idle) = (0, 0);
        for attempt in 1.. {
            let mut resumed = false;
            let error = match self.attempt(name, source, &shown, &mut resumed).await {
                Ok(path) => return Ok(path),
                Err(error) => error,
            };
            let most = shown.most.load(Ordering::Relaxed);
            idle = if most > best { 0 } else { idle + 1 };
            best = best.max(most);
            let again = match &error {
                // What was kept from before was the damaged part, perhaps. It is gone now.
                SourceError::Altered { .. } => resumed,
                error => error.is_transient() && best > 0 && idle < MOST_IDLE_ATTEMPTS,
            };
            if !again || attempt >= MOST_ATTEMPTS {
                return Err(error);
            }
            tracing::info!(model = self.model.name, source = name, %error, "trying again");
            tokio::time::sleep(self.store.settings().pause * 2_u32.pow(idle)).await;
        }
        Err(SourceError::NotAvailable("no attempt was made".into()))
    }

    async fn attempt(
        &self,
        name: &str,
        source: &dyn Source,
        shown: &Shown<'_>,
        resumed: &mut bool,
    ) -> Result<PathBuf, SourceError> {
        let digest = &self.model.digest;
        let progress = |done| shown.show(done);
        let job = Job { work_dir: self.store.work_dir(digest), expected_size: self.model.size, progress: &progress };
        let file = source.resolve(&job).await?;
        let size = file.size();
        if let Some(expected) = self.model.size.filter(|expected| *expected != size) {
            return Err(SourceError::WrongSize { got: size, expected });
        }
        shown.set_total(size);
        self.make_room(size).await?;

        let note = file.tag().map(|tag| Note { source: name.to_owned(), tag: tag.to_owned(), size });
        let mut start = note.as_ref().map_or(0, |note| self.part.resumable(note));
        let mut opened = self.open(start).await?;
        let (needed, available) = (
            size - start,
            available_disk_space(self.store.dir()).map_err(SourceError::io("asking for free disk space"))?,
        );
        if available < needed {
            return Err(SourceError::NoSpace { needed, available });
        }
        let body = file.fetch(start..size).await?;
        if body.start != start {
            start = body.start;
            opened = self.open(start).await?;
        }
        *resumed = start > 0;
        self.part.set_note(note.as_ref()).map_err(SourceError::io("writing the note of a partial file"))?;
        if file.is_here() {
            (self.progress)(ModelState::Verifying);
        }

        let (chunks, receiver) = mpsc::channel(CHUNKS_WAITING);
        let (sink, hasher) = opened;
        let lock = self.lock.clone();
        let writer = tokio::task::spawn_blocking(move || {
            // The lock lasts until the last byte is written, also where nobody waits for it any more.
            let _lock = lock;
            write_chunks(sink, hasher, receiver)
        });
        let received = pass_on(body.bytes, chunks, |done| {
            if !file.is_here() {
                shown.show(start + done)
            }
        })
        .await;
        let written = writer.await.map_err(|error| SourceError::io("writing")(std::io::Error::other(error)))?;
        let (sink, hasher) = written.map_err(SourceError::io("writing the file"))?;
        let done = start + received?;
        if done != size {
            return Err(SourceError::Cut { done, total: size, why: "no more came".into() });
        }

        (self.progress)(ModelState::Verifying);
        let (store, expected, part, lock) = (self.store.clone(), *digest, self.part.clone(), self.lock.clone());
        let is_known = self.is_known;
        let check = move || {
            let _lock = lock;
            let got = finish(hasher);
            if is_known && got != expected {
                let moved_to = store.corrupt_path(&expected);
                part.move_aside(&moved_to).map_err(SourceError::io("moving the file aside"))?;
                return Err(SourceError::Altered { got, expected, moved_to });
            }
            if !is_known {
                // A page that says why there is no file is none.
                if let Err(error) = ingle_engine::inspect(&part.path) {
                    let _ = part.remove();
                    return Err(SourceError::Refused(format!("what it gave is no model: {error}")));
                }
                store.note_first(&expected, &got);
            }
            let path = store.path_of(&got);
            part.publish(&sink, &path).map_err(SourceError::io("giving the file its name"))?;
            store.remember(&path, got);
            Ok(path)
        };
        blocking(move |_| Ok(check())).await.map_err(SourceError::io("checking the file"))?
    }

    /// Room for a file of which nobody knew how large it is.
    pub(super) async fn make_room(&self, size: u64) -> Result<(), SourceError> {
        if self.model.size.is_some() {
            return Ok(());
        }
        let needed = size.saturating_sub(self.part.len());
        let made = self.store.make_room(self.model, size, needed).await;
        made.map_err(|error| SourceError::Refused(error.to_string()))
    }

    async fn open(&self, start: u64) -> Result<(std::fs::File, sha2::Sha256), SourceError> {
        let (part, lock) = (self.part.clone(), self.lock.clone());
        let opened = blocking(move |left| {
            let _lock = lock;
            part.open(start, left)
        });
        opened.await.map_err(SourceError::io("opening the partial file"))
    }
}

/// Hands the bytes to the writer and says how many they are. Ends early, and well, where the writer has ended:
/// the error is the writer's then.
async fn pass_on(
    mut bytes: BoxStream<'static, Result<Bytes, SourceError>>,
    chunks: mpsc::Sender<Bytes>,
    show: impl Fn(u64),
) -> Result<u64, SourceError> {
    let mut done = 0;
    while let Some(chunk) = bytes.next().await {
        let chunk = chunk?;
        let length = chunk.len() as u64;
        if chunks.send(chunk).await.is_err() {
            break;
        }
        done += length;
        show(done);
    }
    Ok(done)
}

/// What was shown of the progress, so that it is neither shown too often nor runs backwards.
pub(super) struct Shown<'a> {
    progress: &'a (dyn Fn(ModelState) + Send + Sync),
    total: AtomicU64,
    most: AtomicU64,
    at: Mutex<Option<Instant>>,
}

impl<'a> Shown<'a> {
    pub(super) fn new(fetch: &Fetch<'a>) -> Self {
        let total = fetch.model.size.unwrap_or(0);
        (fetch.progress)(ModelState::Fetching { done: 0, total });
        Self { progress: fetch.progress, total: total.into(), most: 0.into(), at: Mutex::new(None) }
    }

    pub(super) fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    pub(super) fn show(&self, done: u64) {
        self.most.fetch_max(done, Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        {
            let Ok(mut at) = self.at.lock() else { return };
            if done != total && at.is_some_and(|at| at.elapsed() < SHOW_EVERY) {
                return;
            }
            *at = Some(Instant::now());
        }
        // A package is not exactly as large as the file in it.
        (self.progress)(ModelState::Fetching { done: if total > 0 { done.min(total) } else { done }, total });
    }
}
