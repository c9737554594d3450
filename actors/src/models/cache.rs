//! What is in the folder of model files, what of it is in use, and what goes when room is needed.
//!
//! A file in use has a lock that all its users share, on a file of its name in `used/`; the time of that file is when
//! it was used last. Files of earlier versions have none: the time of the file itself counts then.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::ChunkList;

use super::catalog::CatalogModel;
use super::chunks::{list_of, read_chunk};
use super::hash::blocking;
use super::store::{FetchError, ModelStore, StoreError};
use crate::platform::{available_disk_space, disk_size, open_not_through_links};

/// A file of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// What its name says that it holds.
    pub digest: ModelDigest,
    /// Where it is.
    pub path: PathBuf,
    /// Its bytes.
    pub size: u64,
    /// When it was used last.
    pub used: SystemTime,
}

/// As long as this lives the file of the store stays.
#[derive(Debug)]
pub struct FileInUse {
    _shared: File,
}

impl ModelStore {
    fn marker(&self, digest: &ModelDigest) -> PathBuf {
        self.dir().join("used").join(digest.to_string())
    }

    /// Keeps the file of this content from being taken away, whether it is here yet or not. Taken before it is looked
    /// for, so that it cannot go in between.
    pub fn hold(&self, digest: &ModelDigest) -> Result<FileInUse, StoreError> {
        let path = self.marker(digest);
        let taken = fs::create_dir_all(self.dir().join("used")).and_then(|()| {
            let file = open_not_through_links(&path, 0o600)?;
            // Whoever takes files away holds the lock for a moment only.
            file.lock_shared()?;
            file.set_modified(SystemTime::now())?;
            Ok(FileInUse { _shared: file })
        });
        taken.map_err(|error| StoreError::File { path, error })
    }

    /// The files that are here, the longest unused first. Nothing but files of the store's own naming is looked at.
    pub fn files(&self) -> io::Result<Vec<StoredFile>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.dir())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(".gguf")) else { continue };
            let Ok(digest) = stem.parse::<ModelDigest>() else { continue };
            // Of the entry itself: a link is no file of ours.
            let Ok(found) = entry.metadata() else { continue };
            if !found.is_file() {
                continue;
            }
            let used = fs::metadata(self.marker(&digest)).and_then(|marker| marker.modified());
            let used = used.or_else(|_| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            files.push(StoredFile { digest, path: entry.path(), size: found.len(), used });
        }
        files.sort_by_key(|file| (file.used, file.digest));
        Ok(files)
    }

    /// Bytes that the folder may have: what was said, else half of its disk, or one file where that is more.
    fn limit_for(&self, size: u64) -> io::Result<u64> {
        self.limit.map_or_else(|| Ok((disk_size(self.dir())? / 2).max(size)), Ok)
    }

    /// Takes files away until `model` fits below the folder's limit and `needed` bytes of the disk are free. Files in
    /// use stay; where that is not enough for a limit that was said, it is an error with the numbers.
    pub(super) async fn make_room(&self, model: &CatalogModel, size: u64, needed: u64) -> Result<(), FetchError> {
        let (store, digest) = (self.clone(), model.digest);
        let made = blocking(move |_| {
            let limit = store.limit_for(size)?;
            let mut files = store.files()?;
            files.retain(|file| file.digest != digest);
            let mut total = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.size));
            let free = || Ok::<_, io::Error>(available_disk_space(store.dir())? >= needed);
            for file in &files {
                if total.saturating_add(size) <= limit && free()? {
                    break;
                }
                // What can never fit takes nothing away.
                if size <= limit && store.take_away(file)? {
                    total = total.saturating_sub(file.size);
                }
            }
            let is_over = store.limit.is_some() && total.saturating_add(size) > limit;
            Ok(is_over.then_some((limit, total)))
        });
        let made = made.await.map_err(|error| StoreError::Folder { dir: self.dir().to_owned(), error })?;
        match made {
            None => Ok(()),
            Some((limit, in_use)) => {
                let (model, dir) = (model.name.clone(), self.dir().to_owned());
                Err(FetchError::OverLimit { model, dir, size, limit, in_use })
            }
        }
    }

    /// Removes a file that nobody uses; says whether it did.
    fn take_away(&self, file: &StoredFile) -> io::Result<bool> {
        fs::create_dir_all(self.dir().join("used"))?;
        let marker = open_not_through_links(&self.marker(&file.digest), 0o600)?;
        match marker.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(false),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        fs::remove_file(&file.path)?;
        let _ = fs::remove_file(self.chunks_path(&file.digest));
        tracing::info!(file = %file.path.display(), bytes = file.size, "took a model file away that was not used for long");
        Ok(true)
    }

    fn chunks_dir(&self) -> PathBuf {
        self.dir().join("chunks")
    }

    fn chunks_path(&self, digest: &ModelDigest) -> PathBuf {
        self.chunks_dir().join(format!("{digest}.json"))
    }

    /// Puts the file of this name where it is not used but can be looked at. The caller holds the digest's lock.
    pub(super) fn set_aside(&self, digest: &ModelDigest) -> Result<PathBuf, StoreError> {
        let (path, moved_to) = (self.path_of(digest), self.corrupt_path(digest));
        fs::rename(&path, &moved_to).map_err(|error| StoreError::File { path, error })?;
        let _ = fs::remove_file(self.chunks_path(digest));
        Ok(moved_to)
    }

    /// What the file of this content consists of, for a machine that copies it. `done` counts the bytes that are read
    /// where it is not known yet.
    pub async fn chunk_list(
        &self,
        digest: ModelDigest,
        done: std::sync::Arc<std::sync::atomic::AtomicU64>,
    ) -> io::Result<ChunkList> {
        list_of(self.chunks_dir(), self.path_of(&digest), digest, done).await
    }

    /// One chunk of the file of this content, not checked: whoever gets it does.
    pub async fn chunk(&self, digest: ModelDigest, index: u32) -> io::Result<Vec<u8>> {
        let path = self.path_of(&digest);
        blocking(move |_| read_chunk(&path, index)).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::super::SourceSettings;
    use super::*;

    fn store(dir: &std::path::Path, limit: u64) -> ModelStore {
        ModelStore::open_with(dir, SourceSettings::default()).unwrap().with_limit(Some(limit))
    }

    fn put(store: &ModelStore, n: u8, days_ago: u64) -> ModelDigest {
        let digest = ModelDigest([n; 32]);
        fs::write(store.path_of(&digest), [n; 1000]).unwrap();
        let at = SystemTime::now() - Duration::from_secs(days_ago * 86_400);
        File::options().write(true).open(store.path_of(&digest)).unwrap().set_modified(at).unwrap();
        digest
    }

    fn wanted(size: u64) -> CatalogModel {
        CatalogModel { name: "m".into(), digest: ModelDigest([9; 32]), size: Some(size), sources: vec![] }
    }

    #[tokio::test]
    async fn the_longest_unused_goes_and_what_is_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 4000);
        let [oldest, used, old, young] = [(1, 40), (2, 30), (3, 20), (4, 10)].map(|(n, days)| put(&store, n, days));
        // Used again since: the lock's time counts, not the file's.
        drop(store.hold(&used).unwrap());
        let in_use = store.hold(&old).unwrap();
        // Not ours, whatever it is called.
        fs::write(store.dir().join("holiday.gguf"), [0; 5000]).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", store.dir().join(format!("{}.gguf", ModelDigest([7; 32])))).unwrap();

        let left = || store.files().unwrap().into_iter().map(|file| file.digest).collect::<Vec<_>>();
        assert_eq!(left(), [oldest, young, used, old]);
        store.make_room(&wanted(1000), 1000, 0).await.unwrap();
        assert_eq!(left(), [young, used, old]);
        store.make_room(&wanted(3000), 3000, 0).await.unwrap();
        assert_eq!(left(), [old], "in use");
        let error = store.make_room(&wanted(3500), 3500, 0).await.unwrap_err().to_string();
        assert!(
            error.contains("3500 bytes") && error.contains("may have 4000") && error.contains("1000 of"),
            "{error}"
        );
        drop(in_use);
        store.make_room(&wanted(5000), 5000, 0).await.unwrap_err();
        assert_eq!(left(), [old], "what can never fit takes nothing away");
        store.make_room(&wanted(3500), 3500, 0).await.unwrap();
        assert!(left().is_empty() && store.dir().join("holiday.gguf").exists());
    }

    #[tokio::test]
    async fn a_model_over_the_limit_is_refused_before_anything_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 100);
        let error = store.ensure(&wanted(101), &|_| (), &CancellationToken::new()).await.unwrap_err();
        assert!(matches!(error, FetchError::OverLimit { limit: 100, .. }), "{error}");
    }
}
