//! Reading files of the store anew: what is not what its name says is set aside and fetched again.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::ModelState;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::catalog::{CatalogModel, default_model};
use super::hash::hash_file;
use super::store::{ModelStore, StoreError};
use crate::platform::{FileLock, LockError};

/// How often it is said how far the reading is.
const SAY_EVERY: Duration = Duration::from_millis(200);

/// What came of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It is what its name says.
    Good,
    /// It was not, and is set aside; the right file is here again.
    FetchedAgain {
        /// What it held.
        got: ModelDigest,
        /// Where it is now.
        moved_to: PathBuf,
    },
    /// It was not, and is set aside; the right file is not here.
    Corrupt {
        /// What it held.
        got: ModelDigest,
        /// Where it is now.
        moved_to: PathBuf,
        /// Why it was not fetched again.
        why: String,
    },
    /// It could not be read.
    Unreadable {
        /// Why.
        why: String,
    },
}

/// A file and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedFile {
    /// The model's name; the digest where nobody here knows one.
    pub name: String,
    /// What the file should hold.
    pub digest: ModelDigest,
    /// Its bytes.
    pub size: u64,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Nothing could be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No file of that name.
    #[error("There is no file of a model `{asked}` here. {}", .there.as_str())]
    Unknown {
        /// What was asked for.
        asked: String,
        /// What there is, in words.
        there: String,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ModelStore {
    /// Reads the files of `name` (a model's name, `default` or a digest), or all that are here. `known` are models beside
    /// the default one whose names and sources somebody knows. `say` hears the file, and bytes read of bytes in all.
    pub async fn verify(
        &self,
        name: Option<&str>,
        known: &[CatalogModel],
        say: &(dyn Fn(&str, u64, u64) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Result<Vec<VerifiedFile>, VerifyError> {
        let default = default_model();
        let model_of = |digest: &ModelDigest| known.iter().chain([&default]).find(|model| model.digest == *digest);
        let name_of = |digest: &ModelDigest| match model_of(digest) {
            Some(model) => model.name.clone(),
            None => digest.to_string(),
        };
        let folder = |error| StoreError::Folder { dir: self.dir().to_owned(), error };
        let mut files = self.files().map_err(folder)?;
        let there: Vec<String> = files.iter().map(|file| name_of(&file.digest)).collect();
        if let Some(asked) = name {
            files.retain(|file| {
                name_of(&file.digest) == asked
                    || asked == file.digest.to_string()
                    || (asked == "default" && file.digest == default.digest)
            });
            if files.is_empty() {
                let there = match there.is_empty() {
                    true => "There are none at all.".to_owned(),
                    false => format!("There is {}.", there.join(", ")),
                };
                return Err(VerifyError::Unknown { asked: asked.into(), there });
            }
        }
        let mut verified = Vec::with_capacity(files.len());
        for file in files {
            let name = name_of(&file.digest);
            let done = Arc::new(AtomicU64::new(0));
            let reading = hash_file(file.path.clone(), done.clone());
            tokio::pin!(reading);
            let got = loop {
                tokio::select! {
                    got = &mut reading => break got,
                    () = tokio::time::sleep(SAY_EVERY) => say(&name, done.load(Ordering::Relaxed), file.size),
                }
            };
            let verdict = match got {
                Err(error) => Verdict::Unreadable { why: error.to_string() },
                Ok(got) if got == file.digest => {
                    self.remember(&file.path, got);
                    Verdict::Good
                }
                Ok(got) => self.replace(&file.digest, got, model_of(&file.digest), &name, say, cancel).await?,
            };
            verified.push(VerifiedFile { name, digest: file.digest, size: file.size, verdict });
        }
        Ok(verified)
    }

    async fn replace(
        &self,
        digest: &ModelDigest,
        got: ModelDigest,
        model: Option<&CatalogModel>,
        name: &str,
        say: &(dyn Fn(&str, u64, u64) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Result<Verdict, VerifyError> {
        let path = self.lock_path(digest);
        let moved_to = match FileLock::try_acquire(&path) {
            Ok(_lock) => self.set_aside(digest)?,
            Err(LockError::Held { holder }) => {
                let why = format!("it is damaged, and process {holder} is at it now: verify it again");
                return Ok(Verdict::Unreadable { why });
            }
            Err(LockError::Io(error)) => return Err(StoreError::File { path, error }.into()),
        };
        tracing::warn!(name, moved_to = %moved_to.display(), "a damaged model file was set aside");
        let Some(model) = model else {
            let why = "nobody here knows where it came from: fetch it as it was fetched before".into();
            return Ok(Verdict::Corrupt { got, moved_to, why });
        };
        let progress = |state| {
            if let ModelState::Fetching { done, total } = state {
                say(name, done, total);
            }
        };
        Ok(match self.ensure(model, &progress, cancel).await {
            Ok(_) => Verdict::FetchedAgain { got, moved_to },
            Err(error) => Verdict::Corrupt { got, moved_to, why: error.to_string() },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sha2::{Digest, Sha256};

    use super::super::SourceSettings;
    use super::*;

    #[tokio::test]
    async fn a_damaged_file_is_set_aside_also_where_it_was_believed() {
        let folder = tempfile::tempdir().unwrap();
        let store = ModelStore::open_with(folder.path(), SourceSettings::default()).unwrap();
        let [good, bad] = [b"good", b"evil"].map(|content| ModelDigest(Sha256::digest(content).into()));
        fs::write(store.path_of(&good), b"good").unwrap();
        fs::write(store.path_of(&bad), b"devil").unwrap();
        // What is remembered does not count.
        store.remember(&store.path_of(&bad), bad);
        let verify = async |name: Option<String>| {
            store.verify(name.as_deref(), &[], &|_, _, _| (), &CancellationToken::new()).await
        };
        let error = verify(Some("other".into())).await.unwrap_err().to_string();
        assert!(error.contains("`other`") && error.contains(&good.to_string()), "{error}");
        assert_eq!(verify(Some(good.to_string())).await.unwrap()[0].verdict, Verdict::Good);
        let verified = verify(None).await.unwrap();
        assert_eq!(verified.len(), 2);
        let file = verified.iter().find(|file| file.digest == bad).unwrap();
        let Verdict::Corrupt { got, moved_to, .. } = &file.verdict else { panic!("{file:?}") };
        assert_eq!(
            (*got, fs::read(moved_to).unwrap()),
            (ModelDigest(Sha256::digest(b"devil").into()), b"devil".to_vec())
        );
        assert!(!store.path_of(&bad).exists());
        assert_eq!(verify(None).await.unwrap().len(), 1);

        // One whose source somebody knows has the name that it has there, and is fetched from it.
        fs::write(store.path_of(&bad), b"devil").unwrap();
        let source = super::super::SourceSpec::Https { url: "http://localhost:1/x.gguf".into() };
        let known = CatalogModel { name: "mine".into(), digest: bad, size: None, sources: vec![source] };
        let verified = store.verify(Some("mine"), &[known], &|_, _, _| (), &CancellationToken::new()).await.unwrap();
        let [VerifiedFile { name, verdict: Verdict::Corrupt { why, .. }, .. }] = &verified[..] else {
            panic!("{verified:?}")
        };
        assert!(name == "mine" && why.contains("could not be fetched"), "{why}");
    }
}
