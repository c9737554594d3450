//! Models of this node, loaded and unloaded while it runs.

use std::time::Duration;

use super::Node;
use crate::gateway::DEFAULT_MODEL;
use crate::worker::manager::{LoadError, LoadRequest, Loading, ModelManager, SeenModel};

impl Node {
    /// This node's name.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Who keeps this node's models.
    pub fn manager(&self) -> &ModelManager {
        &self.models
    }

    /// Loads a model, or another version of one that is loaded. Returns when that has begun.
    pub async fn load_model(&self, request: &LoadRequest) -> Result<Loading, LoadError> {
        if !self.is_accepting() {
            return Err(LoadError::Ending);
        }
        self.models.load(request).await
    }

    /// Lets a model of this node go; returns when its process has ended.
    pub async fn unload_model(&self, name: &str, limit: Duration) -> Result<(), LoadError> {
        let name = match name {
            DEFAULT_MODEL => self.models.own().map_or_else(|| name.to_owned(), |own| own.name()),
            name => name.to_owned(),
        };
        self.models.unload(&name, limit).await
    }

    /// All models that this node knows, loaded or not.
    pub fn loaded(&self) -> Vec<SeenModel> {
        self.models.states()
    }
}
