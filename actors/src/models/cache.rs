//! What is in the folder of model files, what of it is in use, and what goes when room is needed. Packed weights, which
//! engines make of the files and keep in `packed/`, count as well.
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

    /// Packed weights that are here.
    fn packed(&self) -> io::Result<Vec<StoredFile>> {
        let mut files = Vec::new();
        let entries = match fs::read_dir(self.dir().join("packed")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(".packed")) else { continue };
            let Some(Ok(digest)) = stem.split('.').next().map(str::parse::<ModelDigest>) else { continue };
            let Ok(found) = entry.metadata() else { continue };
            if found.is_file() {
                let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                files.push(StoredFile { digest, path: entry.path(), size: found.len(), used });
            }
        }
        Ok(files)
    }

    /// Takes away what was not used for longest until `enough` of the bytes that are left. Says how many that are.
    /// Packed weights go before the file that they were made of: making them again takes no network.
    fn take_away_until(&self, keep: &ModelDigest, enough: impl Fn(u64) -> io::Result<bool>) -> io::Result<u64> {
        let files = self.files()?;
        let mut all: Vec<(StoredFile, bool)> = Vec::new();
        for mut packed in self.packed()? {
            if let Some(file) = files.iter().find(|file| file.digest == packed.digest) {
                packed.used = file.used;
            }
            all.push((packed, false));
        }
        all.extend(files.into_iter().map(|file| (file, true)));
        all.sort_by_key(|(file, is_model)| (file.used, *is_model, file.digest));
        all.retain(|(file, is_model)| !(*is_model && file.digest == *keep));
        let mut total = all.iter().fold(0u64, |sum, (file, _)| sum.saturating_add(file.size));
        for (file, is_model) in &all {
            if enough(total)? {
                break;
            }
            let goes = if *is_model { self.take_away(file)? } else { take_packed_away(file)? };
            if goes {
                total = total.saturating_sub(file.size);
            }
        }
        Ok(total)
    }

    /// Makes room for the packed weights of a file of `size` bytes. How many bytes all packed weights may have, where a
    /// limit was said.
    pub(crate) async fn make_room_for_packed(&self, digest: ModelDigest, size: u64) -> io::Result<Option<u64>> {
        let Some(limit) = self.limit else { return Ok(None) };
        let store = self.clone();
        blocking(move |_| {
            let models = |store: &Self| Ok::<u64, io::Error>(store.files()?.iter().map(|file| file.size).sum());
            if !store.packed()?.iter().any(|packed| packed.digest == digest) {
                // Rows are filled up to whole tiles there.
                let packed = size.saturating_add(size / 8);
                let own = fs::metadata(store.path_of(&digest)).map_or(0, |file| file.len());
                let needed = packed.saturating_add(own);
                store.take_away_until(&digest, |total| Ok(needed > limit || total.saturating_add(needed) <= limit))?;
            }
            Ok(Some(limit.saturating_sub(models(&store)?)))
        })
        .await
    }

    /// Takes files away until `model` fits below the folder's limit and `needed` bytes of the disk are free. Files in
    /// use stay; where that is not enough for a limit that was said, it is an error with the numbers.
    pub(super) async fn make_room(&self, model: &CatalogModel, size: u64, needed: u64) -> Result<(), FetchError> {
        let (store, digest) = (self.clone(), model.digest);
        let made = blocking(move |_| {
            let limit = store.limit_for(size)?;
            let total = store.take_away_until(&digest, |total| {
                let is_free = available_disk_space(store.dir())? >= needed;
                // What can never fit takes nothing away.
                Ok(size > limit || (total.saturating_add(size) <= limit && is_free))
            })?;
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

/// Removes packed weights that no engine uses; says whether it did. Engines share a lock on what they use.
fn take_packed_away(file: &StoredFile) -> io::Result<bool> {
    let opened = match File::open(&file.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        other => other?,
    };
    match opened.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(false),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    fs::remove_file(&file.path)?;
    tracing::info!(file = %file.path.display(), bytes = file.size, "took packed weights away that were not used for long");
    Ok(true)
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
    async fn a_file_whose_size_only_its_source_knows_keeps_to_the_limit_and_to_the_disk() {
        use super::super::test_server::{Answer, TestServer};
        let size = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(3500));
        let said = size.clone();
        let server = TestServer::start(move |_, _| {
            let range = format!("bytes 0-0/{}", said.load(std::sync::atomic::Ordering::SeqCst));
            let headers = vec![("Content-Range", range), ("ETag", "\"one\"".to_owned())];
            Answer { headers, body: vec![0], ..Answer::new(206) }
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let settings = SourceSettings { hub: server.url.clone(), ..SourceSettings::default() };
        let store = ModelStore::open_with(folder.path(), settings).unwrap();
        let (old, young) = (put(&store, 1, 40), put(&store, 2, 30));
        let in_use = store.hold(&young).unwrap();
        let source = super::super::SourceSpec::Hub { repository: "a/b".into(), revision: "c".into(), file: "d".into() };
        let model = CatalogModel { size: None, sources: vec![source], ..wanted(0) };
        let limited = store.clone().with_limit(Some(4000));
        let error = limited.ensure(&model, &|_| (), &CancellationToken::new()).await.unwrap_err().to_string();
        assert!(error.contains("has 3500 bytes") && error.contains("1000 of them"), "{error}");
        assert_eq!(server.asked().len(), 1, "only how large it is");
        assert!(!store.path_of(&old).exists() && store.path_of(&young).exists());
        drop(in_use);

        size.store(500 << 30, std::sync::atomic::Ordering::SeqCst);
        if available_disk_space(folder.path()).unwrap() < 500 << 30 {
            let error = store.ensure(&model, &|_| (), &CancellationToken::new()).await.unwrap_err().to_string();
            assert!(error.contains(&format!("needs {} bytes of free disk space", 500u64 << 30)), "{error}");
            assert_eq!(server.asked().len(), 2);
        }
    }

    #[tokio::test]
    async fn packed_weights_count_and_go_before_their_file_unless_an_engine_uses_them() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 5000);
        let [old, young] = [(1, 40), (2, 30)].map(|(n, days)| put(&store, n, days));
        fs::create_dir(store.dir().join("packed")).unwrap();
        let pack = |digest: &ModelDigest| {
            let path = store.dir().join("packed").join(format!("{digest}.v1.packed"));
            fs::write(&path, [0; 1000]).unwrap();
            path
        };
        let (old_packed, young_packed) = (pack(&old), pack(&young));
        let other = store.dir().join("packed/gpu-x.tuning.json");
        fs::write(&other, "{}").unwrap();
        store.make_room(&wanted(1000), 1000, 0).await.unwrap();
        assert!(old_packed.exists() && store.path_of(&old).exists(), "four and one are five");
        // The older one's go first, and not the file, as long as that is enough.
        store.make_room(&wanted(2000), 2000, 0).await.unwrap();
        assert!(!old_packed.exists() && store.path_of(&old).exists() && young_packed.exists());
        let in_use = File::open(&young_packed).unwrap();
        in_use.lock_shared().unwrap();
        store.make_room(&wanted(4000), 4000, 0).await.unwrap();
        assert!(young_packed.exists() && other.exists() && store.files().unwrap().is_empty());
        let error = store.make_room(&wanted(4500), 4500, 0).await.unwrap_err().to_string();
        assert!(error.contains("1000 of"), "{error}");

        // What an engine packs gets room the same way, and is told how much there is.
        drop(in_use);
        let [big, unused] = [(3, 20), (4, 10)].map(|(n, days)| put(&store, n, days));
        assert_eq!(store.make_room_for_packed(big, 1000).await.unwrap(), Some(3000));
        assert!(young_packed.exists(), "one, one and one, and a bit more than one");
        store.make_room_for_packed(big, 3000).await.unwrap();
        assert!(!young_packed.exists() && !store.path_of(&unused).exists() && store.path_of(&big).exists());
        let without = ModelStore::open_with(folder.path(), SourceSettings::default()).unwrap();
        assert_eq!(without.make_room_for_packed(big, u64::MAX).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_model_over_the_limit_is_refused_before_anything_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 100);
        let error = store.ensure(&wanted(101), &|_| (), &CancellationToken::new()).await.unwrap_err();
        assert!(matches!(error, FetchError::OverLimit { limit: 100, .. }), "{error}");
    }
}
