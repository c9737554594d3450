//! A stored model file with its weights in another format, made on this machine. The same file and format give the same
//! bytes everywhere, so the result has one hash on all machines, and is a file of the store like any other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ingle_engine::quantize::{self, Conversion, Target};
use ingle_protocol::ModelDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::catalog::CatalogModel;
use super::store::{FetchError, ModelStore, StoreError};
use crate::platform::{available_disk_space, read_optional, write_atomically};

/// Where it is noted what became of a conversion.
const NOTES: &str = "converted";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    result: ModelDigest,
}

/// Tells a conversion that nobody waits for it any more.
struct Leave(Arc<AtomicBool>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl ModelStore {
    /// The file `path` of the content `digest`, in the format `to`: the one that was made before, or made now. Dropping
    /// the future ends the conversion; what it has written goes.
    pub(crate) async fn in_format(
        &self,
        name: &str,
        digest: ModelDigest,
        path: &Path,
        to: Target,
    ) -> Result<(ModelDigest, PathBuf), FetchError> {
        let note = self.dir().join(NOTES).join(format!("{digest}.{to}.json"));
        let known = read_optional(&note).ok().flatten();
        if let Some(Note { result }) = known.and_then(|bytes| serde_json::from_slice(&bytes).ok())
            && let Ok(Some(path)) = self.find(&result).await
        {
            return Ok((result, path));
        }
        // Made under a name of its own: of several nodes of a machine one makes it.
        let work = ModelDigest(Sha256::digest(format!("{digest} as {to}")).into());
        let model = CatalogModel { name: name.to_owned(), digest: work, size: None, sources: vec![] };
        let _lock = self.lock(&model, &|_| ()).await?;
        let failed = |error| StoreError::Folder { dir: self.dir().to_owned(), error };
        std::fs::create_dir_all(self.dir().join(NOTES)).map_err(failed)?;
        let source = path.to_owned();
        let why =
            |error: &dyn std::fmt::Display| FetchError::Conversion { model: name.to_owned(), why: error.to_string() };
        let planned = tokio::task::spawn_blocking(move || Conversion::plan(quantize::open(&source)?, to, true)).await;
        let conversion = planned.map_err(|error| why(&error))?.map_err(|error| why(&error))?;
        let size = conversion.file_bytes();
        self.make_room(&model, size, size).await?;
        let available = available_disk_space(self.dir()).map_err(failed)?;
        if available < size {
            let (model, dir) = (name.to_owned(), self.dir().to_owned());
            return Err(FetchError::NoSpace { model, dir, needed: size, available });
        }
        let left = Arc::new(AtomicBool::new(false));
        let (_leave, target) = (Leave(left.clone()), self.dir().join(format!("{work}.part")));
        let written = target.clone();
        tracing::info!(model = name, %to, bytes = size, "the model is converted");
        let writing = tokio::task::spawn_blocking(move || conversion.write(&written, true, &left, &mut |_, _| ()));
        writing.await.map_err(|error| why(&error))?.map_err(|error| why(&error))?;
        let hashed = super::hash::blocking({
            let target = target.clone();
            move |left: &CancellationToken| {
                let mut hasher = Sha256::new();
                super::hash::hash_all(std::fs::File::open(target)?, &mut hasher, left)?;
                Ok(super::hash::finish(hasher))
            }
        });
        let result = hashed.await.map_err(|error| StoreError::File { path: target.clone(), error })?;
        let path = self.path_of(&result);
        // The file is on disk by its writer's word; its name is what is new.
        std::fs::rename(&target, &path).map_err(|error| StoreError::File { path: target, error })?;
        self.remember(&path, result);
        let noted = serde_json::to_vec(&Note { result }).map_err(std::io::Error::other);
        noted.and_then(|bytes| write_atomically(&note, &bytes, 0o644)).map_err(failed)?;
        Ok((result, path))
    }
}
