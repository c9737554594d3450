//! What was set by command, kept in the state directory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::parameters::{GivenParameters, ModelParameters};
use crate::platform::{read_optional, write_private};

/// The file in the state directory: for each model's name its parameters.
const FILE: &str = "parameters.json";

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ParameterFileError {
    /// It cannot be read or written.
    #[error("the parameters in {} cannot be kept: {why}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
    /// It is not what we wrote.
    #[error("{} cannot be understood ({why}): correct or remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// The file. Who has it holds the state directory's lock.
#[derive(Debug, Clone)]
pub struct ParameterFile {
    path: PathBuf,
}

impl ParameterFile {
    /// That of a state directory.
    pub fn of(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE) }
    }

    fn all(&self) -> Result<BTreeMap<String, GivenParameters>, ParameterFileError> {
        let io = |why| ParameterFileError::Io { path: self.path.clone(), why };
        let damaged = |why: String| ParameterFileError::Damaged { path: self.path.clone(), why };
        let Some(bytes) = read_optional(&self.path).map_err(io)? else { return Ok(BTreeMap::new()) };
        let all: BTreeMap<String, GivenParameters> =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        for (model, given) in &all {
            given.over(ModelParameters::default()).map_err(|error| damaged(format!("{model}: {error}")))?;
        }
        Ok(all)
    }

    /// What was set for a model.
    pub fn load(&self, model: &str) -> Result<GivenParameters, ParameterFileError> {
        Ok(self.all()?.remove(model).unwrap_or_default())
    }

    /// Keeps what is set for a model: when this returns it is on disk. Blocks for as long as the disk takes.
    pub fn store(&self, model: &str, given: &GivenParameters) -> Result<(), ParameterFileError> {
        let mut all = self.all()?;
        if given.0.is_empty() {
            all.remove(model);
        } else {
            all.insert(model.to_owned(), given.clone());
        }
        let bytes = serde_json::to_vec_pretty(&all).map_err(io::Error::other);
        bytes
            .and_then(|bytes| write_private(&self.path, &bytes))
            .map_err(|why| ParameterFileError::Io { path: self.path.clone(), why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_model_keeps_its_own_and_a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = ParameterFile::of(folder.path());
        let given = |name: &str, value: &str| GivenParameters([(name.parse().unwrap(), value.into())].into());
        assert_eq!(file.load("a").unwrap(), GivenParameters::default());
        file.store("a", &given("max_tokens", "3")).unwrap();
        file.store("b", &given("kv_type", "int8")).unwrap();
        file.store("a", &given("max_tokens", "4")).unwrap();
        assert_eq!(file.load("a").unwrap(), given("max_tokens", "4"));
        file.store("a", &GivenParameters::default()).unwrap();
        assert_eq!(file.load("a").unwrap(), GivenParameters::default());
        assert_eq!(file.load("b").unwrap(), given("kv_type", "int8"));
        for damage in ["{", r#"{"b": {"kv_type": "int4"}}"#, r#"{"b": {"colour": 3}}"#] {
            std::fs::write(&file.path, damage).unwrap();
            let error = file.load("b").unwrap_err().to_string();
            assert!(error.contains("parameters.json cannot be understood"), "{error}");
        }
    }
}
