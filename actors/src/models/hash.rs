//! SHA-256 of files, and the memory of it: a file that has not changed is not read again.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ingle_protocol::ModelDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use crate::platform::{Fingerprint, read_optional, write_atomically};

const BUFFER: usize = 1 << 20;

/// Runs `work` where it may block. It is told by the token when nobody waits for it any more.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&CancellationToken) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let left = CancellationToken::new();
    let _leave = left.clone().drop_guard();
    tokio::task::spawn_blocking(move || work(&left)).await.map_err(io::Error::other)?
}

/// Feeds `reader` to `hasher` until its end; gives the number of bytes.
pub(super) fn hash_all(mut reader: impl Read, hasher: &mut Sha256, left: &CancellationToken) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut done = 0;
    while !left.is_cancelled() {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(done),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                done += n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Err(ErrorKind::Interrupted.into())
}

pub(super) fn finish(hasher: Sha256) -> ModelDigest {
    ModelDigest(hasher.finalize().into())
}

/// The digest of a file as it is on the disk, whatever is remembered of it. `done` counts the bytes.
pub(super) async fn hash_file(path: PathBuf, done: Arc<AtomicU64>) -> io::Result<ModelDigest> {
    struct Counting<R>(R, Arc<AtomicU64>);
    impl<R: Read> Read for Counting<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            self.1.fetch_add(read as u64, Ordering::Relaxed);
            Ok(read)
        }
    }
    blocking(move |left| {
        let mut hasher = Sha256::new();
        hash_all(Counting(File::open(&path)?, done), &mut hasher, left)?;
        Ok(finish(hasher))
    })
    .await
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    path: PathBuf,
    file: Fingerprint,
    digest: ModelDigest,
}

/// Digests of files that were read once, one small file for each path.
#[derive(Debug, Clone)]
pub(super) struct DigestMemory {
    dir: PathBuf,
}

impl DigestMemory {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The digest of the file at `path` (canonical), from memory where the file is unchanged. Says before the
    /// file has to be read.
    pub(super) async fn digest_of_file(&self, path: &Path, before_reading: impl FnOnce()) -> io::Result<ModelDigest> {
        let (memory, wanted) = (self.clone(), path.to_owned());
        let known = blocking(move |_| Ok(memory.recall(&wanted, &Fingerprint::of(&fs::metadata(&wanted)?)))).await?;
        if let Some(digest) = known {
            return Ok(digest);
        }
        before_reading();
        let (memory, path) = (self.clone(), path.to_owned());
        blocking(move |left| {
            let file = File::open(&path)?;
            let before = Fingerprint::of(&file.metadata()?);
            let mut hasher = Sha256::new();
            hash_all(&file, &mut hasher, left)?;
            let digest = finish(hasher);
            if Fingerprint::of(&file.metadata()?) != before {
                return Err(io::Error::other("the file was changed while it was read"));
            }
            memory.store(&path, before, digest);
            Ok(digest)
        })
        .await
    }

    fn recall(&self, path: &Path, file: &Fingerprint) -> Option<ModelDigest> {
        let bytes = read_optional(&self.entry_path(path)).ok()??;
        let entry: Entry = serde_json::from_slice(&bytes).ok()?;
        (entry.path == path && entry.file == *file).then_some(entry.digest)
    }

    /// Remembers what was just read or written. Not being able to costs time only.
    pub(super) fn remember(&self, path: &Path, digest: ModelDigest) {
        match fs::metadata(path) {
            Ok(file) => self.store(path, Fingerprint::of(&file), digest),
            Err(error) => tracing::debug!(%error, file = %path.display(), "nothing there to be remembered"),
        }
    }

    fn store(&self, path: &Path, file: Fingerprint, digest: ModelDigest) {
        let entry = Entry { path: path.to_owned(), file, digest };
        let written = fs::create_dir_all(&self.dir)
            .and_then(|()| Ok(serde_json::to_vec(&entry)?))
            .and_then(|bytes| write_atomically(&self.entry_path(path), &bytes, 0o600));
        if let Err(error) = written {
            tracing::debug!(%error, file = %path.display(), "the digest of this file will be computed again");
        }
    }

    fn entry_path(&self, path: &Path) -> PathBuf {
        let name = ModelDigest(Sha256::digest(path.as_os_str().as_encoded_bytes()).into()).to_string();
        self.dir.join(format!("{}.json", &name[..32]))
    }
}

/// A model file that somebody brought along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalModel {
    /// A name made from the file's: lower-case letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// SHA-256 of the file.
    pub digest: ModelDigest,
    /// The file's canonical path.
    pub path: PathBuf,
}

/// Why a file cannot be taken as a model.
#[derive(Debug, thiserror::Error)]
pub enum LocalFileError {
    /// There is nothing at that path.
    #[error("There is no file {0}. Check the path given with --model.")]
    Missing(PathBuf),
    /// Something else is at that path.
    #[error("{path} is {what}, not a model file. Give --model the path of one GGUF file.")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The file cannot be read.
    #[error("{path} cannot be read: {error}. Check who may read the file and the folders above it.")]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

pub(super) async fn local_file(memory: &DigestMemory, path: &Path) -> Result<LocalModel, LocalFileError> {
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::NotFound => LocalFileError::Missing(path.to_owned()),
        _ => LocalFileError::Unreadable { path: path.to_owned(), error },
    };
    let canonical = tokio::fs::canonicalize(path).await.map_err(failed)?;
    let file = tokio::fs::metadata(&canonical).await.map_err(failed)?;
    // Asked before it is opened: opening a pipe waits for somebody to write into it.
    let what = match () {
        () if file.is_dir() => Some("a folder"),
        () if !file.is_file() => Some("no regular file"),
        () if file.len() == 0 => Some("empty"),
        () => None,
    };
    if let Some(what) = what {
        return Err(LocalFileError::NotAFile { path: path.to_owned(), what });
    }
    let digest = memory.digest_of_file(&canonical, || {}).await.map_err(failed)?;
    // The name that was given counts, not the one of what it may be a link to.
    Ok(LocalModel { name: model_name(path), digest, path: canonical })
}

/// The name of the model in a file: its stem in lower-case letters, digits, `.`, `_` and `-`.
pub fn model_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    let name: String = stem.chars().map(|c| if plain(c) { c } else { '-' }).collect();
    let name = name.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    if name.is_empty() { "model".into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unchanged_file_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let memory = DigestMemory::new(folder.path().join("remembered"));
        let path = folder.path().canonicalize().unwrap().join("Some Model (v2).GGUF");
        fs::write(&path, b"abc").unwrap();
        let digest = local_file(&memory, &path).await.unwrap().digest;
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        memory.digest_of_file(&path, || panic!("read again")).await.unwrap();

        // Another content of the same size, with the modification time set back.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&path, b"abd").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        let mut read = false;
        assert_ne!(memory.digest_of_file(&path, || read = true).await.unwrap(), digest);
        assert!(read);

        // What is remembered wrongly or damaged does not count.
        fs::write(memory.entry_path(&path), b"{").unwrap();
        memory.digest_of_file(&path, || ()).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_file_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let memory = DigestMemory::new(folder.path().join("remembered"));
        let path = |name: &str| folder.path().join(name);
        fs::write(path("empty.gguf"), b"").unwrap();
        fs::write(path("file"), b"x").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (path, words) in [
            (path("none.gguf"), "There is no file"),
            (folder.path().to_owned(), "is a folder"),
            (path("empty.gguf"), "is empty"),
            (path("socket"), "is no regular file"),
            (path("file/below"), "cannot be read"),
        ] {
            let error = local_file(&memory, &path).await.unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn names_are_made_of_plain_characters() {
        for (path, name) in [
            ("/a/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
            ("My Model (v2).gguf", "my-model--v2"),
            ("模型.gguf", "model"),
            ("..gguf", "model"),
        ] {
            assert_eq!(model_name(Path::new(path)), name, "{path}");
        }
    }
}
