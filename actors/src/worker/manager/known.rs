//! The models that this node knows, kept in the state directory: a request for one of them loads it.

use std::io;
use std::path::{Path, PathBuf};

use super::spec::{LoadError, ModelSpec};
use crate::platform::{read_optional, write_private};

const FILE: &str = "known_models.json";

/// The file. Who has it holds the state directory's lock.
#[derive(Debug, Clone)]
pub(super) struct KnownModels {
    path: PathBuf,
}

impl KnownModels {
    /// That of a state directory.
    pub fn of(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE) }
    }

    /// All of them.
    pub fn load(&self) -> Result<Vec<ModelSpec>, LoadError> {
        let damaged = |why: String| {
            LoadError::Kept(format!("{} cannot be understood ({why}): correct or remove it", self.path.display()))
        };
        let bytes = read_optional(&self.path).map_err(|why| self.io(&why))?;
        let Some(bytes) = bytes else { return Ok(Vec::new()) };
        let known: Vec<ModelSpec> = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        for spec in &known {
            super::spec::check_name(&spec.name).map_err(|error| damaged(error.to_string()))?;
        }
        Ok(known)
    }

    /// When this returns they are on disk. Blocks for as long as the disk takes.
    pub fn store(&self, known: &[ModelSpec]) -> Result<(), LoadError> {
        let bytes = serde_json::to_vec_pretty(known).map_err(io::Error::other);
        bytes.and_then(|bytes| write_private(&self.path, &bytes)).map_err(|why| self.io(&why))
    }

    fn io(&self, why: &io::Error) -> LoadError {
        LoadError::Kept(format!("the known models in {} cannot be kept: {why}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::ModelChoice;

    #[test]
    fn what_is_known_comes_back_and_a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = KnownModels::of(folder.path());
        assert_eq!(file.load().unwrap(), []);
        let known = [
            ModelSpec { pinned: true, ..ModelSpec::of(ModelChoice::File("/m/a.gguf".into())) },
            ModelSpec { keep_alive_s: Some(60), ..ModelSpec::of(ModelChoice::Source(crate::models::default_model())) },
        ];
        file.store(&known).unwrap();
        assert_eq!(file.load().unwrap(), known);
        for damage in ["{", r#"[{"name": "../x", "choice": "echo", "pinned": false, "keep_alive_s": null}]"#] {
            std::fs::write(&file.path, damage).unwrap();
            assert!(file.load().unwrap_err().to_string().contains("cannot be understood"));
        }
    }
}
