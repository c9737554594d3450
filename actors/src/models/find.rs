//! From what people type for a model (its name, or a path) to what is on the disk.

use std::path::{Path, PathBuf};

use ingle_protocol::wire::v2::ModelState;
use tokio_util::sync::CancellationToken;

use super::catalog::default_model;
use super::store::{FetchError, ModelStore, StoreError};

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundModel {
    /// What people call it: the name that was typed, or that of the file or folder without its ending.
    pub name: String,
    /// The file or folder.
    pub path: PathBuf,
    /// True for a file of the store, whose name says nothing.
    pub is_stored: bool,
}

/// Nothing was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Neither a name nor a path.
    #[error(
        "There is no model and no file {0:?}. Give the path of a GGUF file, of a model folder, or the name {1} (or `default`)."
    )]
    Unknown(String, String),
    /// The model store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// Finds a model: a path that is there, or else a name, whose file is fetched into the store at `store` if it is not
/// there yet.
pub async fn find_model(
    store: &Path,
    typed: &str,
    progress: &(dyn Fn(ModelState) + Send + Sync),
    cancel: &CancellationToken,
) -> Result<FoundModel, FindError> {
    let path = Path::new(typed);
    if path.exists() {
        let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let name = if whole.is_dir() { whole.file_name() } else { whole.file_stem() };
        let name = name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        return Ok(FoundModel { name, path: path.into(), is_stored: false });
    }
    let model = default_model();
    if typed != "default" && typed != model.name {
        return Err(FindError::Unknown(typed.into(), model.name));
    }
    let store = ModelStore::open(store)?;
    let path = store.ensure(&model, progress, cancel).await?;
    Ok(FoundModel { name: model.name, path, is_stored: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn paths_are_named_after_their_files_and_unknown_names_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("Some.Q8_0.gguf");
        std::fs::write(&file, b"x").unwrap();
        let find = async |typed: &str| find_model(folder.path(), typed, &|_| (), &CancellationToken::new()).await;
        let found = find(file.to_str().unwrap()).await.unwrap();
        assert_eq!((found.name.as_str(), found.is_stored), ("Some.Q8_0", false));
        let error = find("no-such-model").await.unwrap_err().to_string();
        assert!(error.contains("\"no-such-model\"") && error.contains("smollm2-135m-instruct"), "{error}");
    }
}
