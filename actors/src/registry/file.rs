//! The registry on disk: one file in the state directory, whole or not there at all.

use std::io;
use std::path::{Path, PathBuf};

use ingle_protocol::registry::Registry;

use super::now_ms;
use crate::platform::{read_optional, write_private};

/// The file in the state directory.
const FILE: &str = "registry.json";

/// Where the registry is kept. Who has it holds the state directory's lock.
#[derive(Debug, Clone)]
pub(super) struct RegistryFile {
    path: PathBuf,
}

impl RegistryFile {
    pub fn of(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE) }
    }

    /// What is there. One that cannot be understood is set aside and not written over: the words say so, and the other
    /// nodes tell this one what it had.
    pub fn load(&self) -> io::Result<(Registry, Option<String>)> {
        let Some(bytes) = read_optional(&self.path)? else { return Ok((Registry::default(), None)) };
        let read = serde_json::from_slice::<Registry>(&bytes).map_err(|error| error.to_string());
        match read.and_then(|registry| registry.check().map(|()| registry).map_err(|error| error.to_string())) {
            Ok(registry) => Ok((registry, None)),
            Err(why) => {
                let aside = self.set_aside("damaged")?;
                let said = format!(
                    "the registry of models in {} cannot be understood ({why}): it was moved to {}, and this node \
                     knows only the models that other nodes tell it",
                    self.path.display(),
                    aside.display()
                );
                Ok((Registry::default(), Some(said)))
            }
        }
    }

    /// When this returns it is on disk. Blocks for as long as the disk takes.
    pub fn store(&self, registry: &Registry) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(registry).map_err(io::Error::other)?;
        write_private(&self.path, &bytes)
    }

    /// Moves the file out of the way, and says where to.
    pub fn set_aside(&self, why: &str) -> io::Result<PathBuf> {
        let aside = self.path.with_file_name(format!("registry.{why}-{}.json", now_ms()));
        match std::fs::rename(&self.path, &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(aside),
        }
    }
}
