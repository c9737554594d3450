//! Where model files are kept: one folder, each file under the SHA-256 of its content, shared by all nodes of the
//! machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcetera::BaseStrategy;
use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::ModelState;
use tokio_util::sync::CancellationToken;

use super::catalog::{CatalogModel, FirstModel};
use super::fetch::Fetch;
use super::hash::{DigestMemory, LocalFileError, LocalModel, local_file};
use super::holders::{Holders, Origin};
use super::part::Part;
use super::pypi::Usage;
use super::source::{SourceError, SourceSettings};
use crate::platform::{FileLock, LockError, available_disk_space, is_writable_by_others, write_atomically};

/// How often a node looks whether another one has fetched the file. (Waiting in the lock could not be cancelled.)
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long what a source gave is taken for what it has, where nobody has said the hash.
const FIRST_NOTE_HOLDS: Duration = Duration::from_secs(3_600);

/// Where the model files of this user are, where nobody says otherwise.
pub fn default_dir() -> Option<PathBuf> {
    let system = etcetera::choose_base_strategy().ok()?;
    Some(system.cache_dir().join("ingle").join("models"))
}

/// The store, or a file in it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made or read.
    #[error(
        "The model folder {dir} cannot be used: {error}. Choose another one, or make it one that you may write to."
    )]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} has SHA-256 {got}: damaged or altered, and refused")]
    Altered {
        /// The file.
        path: PathBuf,
        /// The hash of what it holds.
        got: ModelDigest,
    },
    /// A file cannot be read or moved.
    #[error("{path} cannot be used: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A model's file is not here and could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Every source failed.
    #[error(
        "The model {model} could not be fetched:\n{}\nCheck this machine's network, or give a GGUF file with --model /path/file.gguf.",
        .failures.iter().map(|line| format!("  - {line}")).collect::<Vec<_>>().join("\n")
    )]
    NoSource {
        /// The model.
        model: String,
        /// What each source said, a line each, in the order tried.
        failures: Vec<String>,
    },
    /// There is no room for it.
    #[error(
        "The model {model} needs {needed} bytes of free disk space in {dir}, and {available} are available. Free some, or choose another folder for models."
    )]
    NoSpace {
        /// The model.
        model: String,
        /// The store's folder.
        dir: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// The folder may not become so large.
    #[error(
        "The model {model} has {size} bytes, and the model folder {dir} may have {limit} (cache_limit_gib): {in_use} of them are files in use. Raise the limit, or choose another folder for models."
    )]
    OverLimit {
        /// The model.
        model: String,
        /// The store's folder.
        dir: PathBuf,
        /// Bytes of the model.
        size: u64,
        /// Bytes that the folder may have.
        limit: u64,
        /// Bytes of files that cannot go.
        in_use: u64,
    },
    /// The room went away while it was fetched.
    #[error(
        "The disk of {dir} became full while the model {model} was fetched. What was there of it is removed. Free some space, or choose another folder for models."
    )]
    DiskFull {
        /// The model.
        model: String,
        /// The store's folder.
        dir: PathBuf,
    },
    /// It cannot be had in the format that it is to have.
    #[error("The model {model} cannot be converted: {why}")]
    Conversion {
        /// The model.
        model: String,
        /// Why.
        why: String,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The caller does not want it any more.
    #[error("fetching the model {model} was cancelled")]
    Cancelled {
        /// The model.
        model: String,
    },
}

/// The folder of model files.
#[derive(Debug, Clone)]
pub struct ModelStore {
    dir: PathBuf,
    pub(super) memory: DigestMemory,
    settings: SourceSettings,
    holders: Option<Arc<dyn Holders>>,
    origin: Origin,
    pub(super) limit: Option<u64>,
}

impl ModelStore {
    /// Uses `dir`, made where it is missing, with sources as the environment says.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, SourceSettings::from_environment())
    }

    /// [`ModelStore::open`] with sources as told.
    pub fn open_with(dir: &Path, settings: SourceSettings) -> Result<Self, StoreError> {
        let failed = |error| StoreError::Folder { dir: dir.to_owned(), error };
        fs::create_dir_all(dir).map_err(failed)?;
        let dir = fs::canonicalize(dir).map_err(failed)?;
        // What lies in there is believed to have been checked.
        if is_writable_by_others(&dir).map_err(failed)? {
            let why = "others may write to it; choose a folder of this user's own (INGLE_MODEL_CACHE)";
            return Err(failed(io::Error::other(why)));
        }
        fs::read_dir(&dir).map_err(|error| StoreError::Folder { dir: dir.clone(), error })?;
        let memory = DigestMemory::new(dir.join("remembered"));
        Ok(Self { memory, dir, settings, holders: None, origin: Origin::default(), limit: None })
    }

    /// With machines that are asked before any source.
    pub fn with_holders(self, holders: Arc<dyn Holders>) -> Self {
        Self { holders: Some(holders), ..self }
    }

    /// With something that shows where the bytes of a fetch come from.
    pub fn with_origin(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    /// With so many bytes of model files at most; without that, half of the disk.
    pub fn with_limit(self, limit: Option<u64>) -> Self {
        Self { limit, ..self }
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of this content is, if it is here.
    pub fn path_of(&self, digest: &ModelDigest) -> PathBuf {
        self.dir.join(format!("{digest}.gguf"))
    }

    /// The file of this content, if it is here and holds what its name says. It is read only where it has changed
    /// since it was last checked.
    pub async fn find(&self, digest: &ModelDigest) -> Result<Option<PathBuf>, StoreError> {
        self.find_and_say(digest, || ()).await
    }

    /// A file that somebody brought along, taken as it is and where it is.
    pub async fn local_file(&self, path: &Path) -> Result<LocalModel, LocalFileError> {
        local_file(&self.memory, path).await
    }

    /// Gives a checked file that lies elsewhere a second name in the store, so that other machines can copy it. It takes
    /// no room; false where that cannot be, as across file systems. Who changes the file changes the store's, which is
    /// found out before it is used or given. Blocks.
    pub(crate) fn adopt(&self, path: &Path, digest: &ModelDigest) -> bool {
        // The file itself, not a link to it.
        let linked = fs::canonicalize(path).and_then(|path| fs::hard_link(path, self.path_of(digest)));
        match linked {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
        }
    }

    /// The model's file: the one that is here, or else fetched from the model's sources in order. Of several nodes
    /// of a machine one fetches. Dropping the future ends it as `cancel` does; what can be gone on with is kept.
    pub async fn ensure(
        &self,
        model: &CatalogModel,
        progress: &(dyn Fn(ModelState) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Result<PathBuf, FetchError> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(FetchError::Cancelled { model: model.name.clone() }),
            result = Box::pin(self.ensure_uncancelled(model, progress)) => result,
        }
    }

    async fn ensure_uncancelled(
        &self,
        model: &CatalogModel,
        progress: &(dyn Fn(ModelState) + Send + Sync),
    ) -> Result<PathBuf, FetchError> {
        // Unlocked first: what is here and right is what is asked for nearly always.
        if let Ok(Some(path)) = self.find_and_say(&model.digest, || progress(ModelState::Verifying)).await {
            return Ok(path);
        }
        let lock = self.lock(model, progress).await?;
        let mut failures = Vec::new();
        match self.find_and_say(&model.digest, || progress(ModelState::Verifying)).await {
            // Another node has fetched it meanwhile.
            Ok(Some(path)) => return Ok(path),
            Ok(None) => {}
            Err(StoreError::Altered { path, got }) => {
                let moved_to = self.set_aside(&model.digest)?;
                let line = format!(
                    "the file that was here: {}; moved to {}",
                    StoreError::Altered { path, got },
                    moved_to.display()
                );
                tracing::warn!(model = model.name, "{line}");
                failures.push(line);
            }
            Err(error) => return Err(error.into()),
        }
        let part = Part::new(&self.dir, &model.digest);
        let fetch = Fetch { store: self, model, is_known: true, part, lock, progress };
        let fetched = self.fetch(fetch, failures).await;
        self.origin.set("");
        fetched
    }

    /// The file of a model whose hash nobody knows: what its source gives now, and its hash. Held to nothing but
    /// what the source itself promises.
    pub async fn fetch_first(
        &self,
        model: &FirstModel,
        progress: &(dyn Fn(ModelState) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Result<(ModelDigest, PathBuf), FetchError> {
        let model = model.as_unknown();
        let fetching = async {
            let lock = self.lock(&model, progress).await?;
            if let Some(digest) = self.fetched_lately(&model.digest)
                && let Ok(Some(path)) = self.find(&digest).await
            {
                return Ok(path);
            }
            let part = Part::new(&self.dir, &model.digest);
            let fetch = Fetch { store: self, model: &model, is_known: false, part, lock, progress };
            let fetched = self.fetch(fetch, Vec::new()).await;
            self.origin.set("");
            fetched
        };
        let path = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(FetchError::Cancelled { model: model.name.clone() }),
            result = Box::pin(fetching) => result?,
        };
        let digest = self.memory.digest_of_file(&path, || progress(ModelState::Verifying)).await;
        Ok((digest.map_err(|error| StoreError::File { path: path.clone(), error })?, path))
    }

    /// Where it is noted what a source gave that nobody knew the hash of.
    fn first_note(&self, work: &ModelDigest) -> PathBuf {
        self.dir.join(format!("{work}.first"))
    }

    pub(super) fn note_first(&self, work: &ModelDigest, got: &ModelDigest) {
        if let Err(error) = write_atomically(&self.first_note(work), got.to_string().as_bytes(), 0o644) {
            tracing::debug!(%error, "what a source gave is not noted");
        }
    }

    /// What the source gave a moment ago: to another node of the machine, or before a kill -9. Later it may have
    /// something else.
    fn fetched_lately(&self, work: &ModelDigest) -> Option<ModelDigest> {
        let note = self.first_note(work);
        let age = fs::metadata(&note).ok()?.modified().ok()?.elapsed().ok()?;
        let text = (age < FIRST_NOTE_HOLDS).then(|| fs::read_to_string(&note).ok()).flatten()?;
        text.trim().parse().ok()
    }

    async fn find_and_say(
        &self,
        digest: &ModelDigest,
        before_reading: impl FnOnce(),
    ) -> Result<Option<PathBuf>, StoreError> {
        let path = self.path_of(digest);
        match self.memory.digest_of_file(&path, before_reading).await {
            Ok(got) if got == *digest => Ok(Some(path)),
            Ok(got) => Err(StoreError::Altered { path, got }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::File { path, error }),
        }
    }

    /// Waits until no other node of this machine fetches the model, and shows how far it is meanwhile.
    pub(super) async fn lock(
        &self,
        model: &CatalogModel,
        progress: &(dyn Fn(ModelState) + Send + Sync),
    ) -> Result<Arc<FileLock>, StoreError> {
        let path = self.lock_path(&model.digest);
        let part = Part::new(&self.dir, &model.digest);
        loop {
            match FileLock::try_acquire(&path) {
                Ok(lock) => return Ok(Arc::new(lock)),
                Err(LockError::Held { .. }) => {}
                Err(LockError::Io(error)) => return Err(StoreError::File { path, error }),
            }
            let done = part.len().max(Usage::of(&self.work_dir(&model.digest)).largest);
            let total = model.size.unwrap_or(0);
            progress(ModelState::Fetching { done: if total > 0 { done.min(total) } else { done }, total });
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Held by whoever fetches or moves the file.
    pub(super) fn lock_path(&self, digest: &ModelDigest) -> PathBuf {
        self.dir.join(format!("{digest}.lock"))
    }

    /// Where sources may put what they need on the way.
    pub(super) fn work_dir(&self, digest: &ModelDigest) -> PathBuf {
        self.dir.join(format!("{digest}.work"))
    }

    /// Where a file goes that has another content than its name says.
    pub(super) fn corrupt_path(&self, digest: &ModelDigest) -> PathBuf {
        self.dir.join(format!("{digest}.corrupt"))
    }

    pub(super) fn settings(&self) -> &SourceSettings {
        &self.settings
    }

    /// Makes a checked file the store's own.
    pub(super) fn remember(&self, path: &Path, digest: ModelDigest) {
        self.memory.remember(path, digest);
    }

    async fn fetch(&self, fetch: Fetch<'_>, mut failures: Vec<String>) -> Result<PathBuf, FetchError> {
        let model = fetch.model;
        if let Some(size) = model.size {
            let needed = size.saturating_sub(fetch.part.len());
            self.make_room(model, size, needed).await?;
            let available =
                available_disk_space(&self.dir).map_err(|error| StoreError::Folder { dir: self.dir.clone(), error })?;
            if available < needed {
                return Err(FetchError::NoSpace {
                    model: model.name.clone(),
                    dir: self.dir.clone(),
                    needed,
                    available,
                });
            }
        }
        if let Some(holders) = self.holders.as_ref().filter(|_| fetch.is_known) {
            match fetch.copy_from(holders.as_ref()).await {
                Ok(Some(path)) => return Ok(path),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("the machines of the cluster do not give the model: {error}");
                    failures.push(format!("machines of the cluster: {error}"));
                }
            }
        }
        for spec in &model.sources {
            let name = spec.to_string();
            self.origin.set(name.clone());
            let result = match self.settings.source(spec) {
                Ok(source) => fetch.from(&name, source.as_ref()).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(path) => return Ok(path),
                Err(SourceError::DiskFull) => {
                    let _ = fetch.part.remove();
                    return Err(FetchError::DiskFull { model: model.name.clone(), dir: self.dir.clone() });
                }
                Err(error) => {
                    tracing::warn!("{name} does not give the model: {error}");
                    failures.push(format!("{name}: {error}"));
                }
            }
        }
        if failures.is_empty() {
            failures.push("it has no source but the machines of the cluster, and none of them gives it now".into());
        }
        Err(FetchError::NoSource { model: model.name.clone(), failures })
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
