//! The registry: which models a household has, as state of the whole cluster. Any node may change it, alone or with
//! others; what two halves of a partition changed is merged, and the order in which that happens does not matter.
//!
//! **Rules of merging.** Each field has a last writer, by [`Stamp`]. What was written at the same time by somebody who
//! did not know of the last write does not hold, but stands beside it and is shown until the field is written again.
//! Parameters and pins are a field each, so two halves that set different ones both have their way. A removal takes
//! away what its writer knew of: see [`Record`]. The default model is an entry of its own. Removals are forgotten after
//! 90 days: see `forget.rs`.
//!
//! These structs are stored in the state directory and are on the wire since `wire::v2`.

mod check;
mod default;
mod field;
mod forget;
#[cfg(test)]
mod forget_tests;
mod record;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use default::DefaultModel;
pub use field::{Field, Seen, Stamp, Written};
pub use forget::{REMEMBERED_MS, SLACK_MS};
use record::MOST_COUNTER;
pub use record::{
    Endpoint, FOREVER, KeepAlive, MOST_PARAMETERS, MOST_PINS, ModelType, NewModel, Origin, Record, Value,
};
pub use source::{Source, SourceError};

use crate::{ModelDigest, NodeId};

/// The most models that may be registered.
pub const MOST_MODELS: usize = 512;
/// The most entries, those of removed models included.
pub const MOST_ENTRIES: usize = 4_096;

/// Why something cannot be registered, or is not taken from somebody else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The name is none.
    #[error("{0}")]
    Name(String),
    /// The name is in use.
    #[error("a model `{0}` is registered already: choose another name, or remove that one with `ingle models rm {0}`")]
    Exists(String),
    /// There is no such model.
    #[error("no model `{0}` is registered")]
    Unknown(String),
    /// The source is none.
    #[error("{0}")]
    Source(String),
    /// The endpoint cannot be one.
    #[error("the endpoint cannot be used: {0}")]
    Endpoint(String),
    /// A parameter has no name, or a value that is too long.
    #[error("`{0}` is no parameter with a value that can be kept")]
    Parameter(String),
    /// A node's name is none.
    #[error("`{0}` is no name of a node")]
    Node(String),
    /// There are too many.
    #[error("{0}")]
    Full(String),
    /// What came from elsewhere is not what an honest node writes.
    #[error("the entry `{name}` is not sound: {what}")]
    Unsound {
        /// The entry.
        name: String,
        /// What is wrong.
        what: String,
    },
}

/// One entry, as it goes from node to node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// A model.
    Model(Record),
    /// Which model `default` means.
    Default(DefaultModel),
}

impl Entry {
    /// See [`Record::check`].
    pub fn check(&self) -> Result<(), RegistryError> {
        match self {
            Self::Model(record) => record.check(),
            Self::Default(default) => default.check(),
        }
    }
}

/// All entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    models: BTreeMap<String, Record>,
    default: DefaultModel,
}

impl Registry {
    /// All registered models, by name.
    pub fn models(&self) -> impl Iterator<Item = &Record> {
        self.models.values().filter(|record| !record.is_removed())
    }

    /// A registered model.
    pub fn model(&self, name: &str) -> Option<&Record> {
        self.models.get(name).filter(|record| !record.is_removed())
    }

    /// Which model `default` means.
    pub fn default_model(&self) -> &DefaultModel {
        &self.default
    }

    /// Every entry, those of removed models included: what others need to know.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let default = (!self.default.seen().is_empty()).then(|| Entry::Default(self.default.clone()));
        self.models.values().cloned().map(Entry::Model).chain(default)
    }

    /// The entry of this name, also where it is removed.
    pub fn record(&self, name: &str) -> Option<&Record> {
        self.models.get(name)
    }

    /// The stamp for a write of `node` at `now_ms` (milliseconds since 1970).
    pub fn stamp(&self, node: NodeId, now_ms: u64) -> Stamp {
        let seen = self.models.values().map(Record::seen).chain([self.default.seen()]);
        let known = seen.map(Seen::highest).max().unwrap_or(0);
        Stamp { counter: known.saturating_add(1).max(now_ms).min(MOST_COUNTER), node }
    }

    fn change(&mut self, name: &str) -> Result<&mut Record, RegistryError> {
        let known = self.models.get_mut(name).filter(|record| !record.is_removed());
        known.ok_or_else(|| RegistryError::Unknown(name.chars().take(100).collect()))
    }

    /// Registers a model.
    pub fn add(&mut self, new: NewModel, at: Stamp) -> Result<(), RegistryError> {
        check::check_new(&new)?;
        if self.model(&new.name).is_some() {
            return Err(RegistryError::Exists(new.name));
        }
        if self.models().count() >= MOST_MODELS {
            return Err(RegistryError::Full(format!("{MOST_MODELS} models are registered: remove one first")));
        }
        if self.models.len() >= MOST_ENTRIES && !self.models.contains_key(&new.name) {
            let why = format!("{MOST_ENTRIES} names have been used, those of removed models included: use one of them");
            return Err(RegistryError::Full(why));
        }
        let mut record = self.models.get(&new.name).cloned().unwrap_or_else(|| Record::new(&new.name));
        record.write(new, at);
        record.check()?;
        self.models.insert(record.name().to_owned(), record);
        Ok(())
    }

    /// Removes a model. Where it was the default one, there is none from now on.
    pub fn remove(&mut self, name: &str, at: Stamp) -> Result<(), RegistryError> {
        self.change(name)?.remove(at);
        if self.default.name() == Some(name) {
            self.default.write(None, at);
        }
        Ok(())
    }

    /// Sets parameters; `None` takes one back.
    pub fn set_parameters(
        &mut self,
        name: &str,
        changes: &BTreeMap<String, Option<Value>>,
        at: Stamp,
    ) -> Result<(), RegistryError> {
        changes.iter().try_for_each(|(name, value)| check::check_parameter(name, value.as_ref()))?;
        let record = self.change(name)?;
        let mut changed = record.clone();
        changed.write_parameters(changes, at);
        changed.check()?;
        *record = changed;
        Ok(())
    }

    /// Sets how long the model stays loaded when nobody asks it.
    pub fn set_keep_alive(
        &mut self,
        name: &str,
        keep_alive: Option<KeepAlive>,
        at: Stamp,
    ) -> Result<(), RegistryError> {
        self.change(name)?.write_keep_alive(keep_alive, at);
        Ok(())
    }

    /// Notes the hash of the model's file.
    pub fn set_sha256(&mut self, name: &str, sha256: Option<ModelDigest>, at: Stamp) -> Result<(), RegistryError> {
        self.change(name)?.write_sha256(sha256, at);
        Ok(())
    }

    /// Pins the model to exactly these nodes.
    pub fn set_pins(&mut self, name: &str, pins: &[String], at: Stamp) -> Result<(), RegistryError> {
        pins.iter().try_for_each(|node| check::check_pin(node))?;
        let record = self.change(name)?;
        let mut changed = record.clone();
        changed.write_pins(pins, at);
        changed.check()?;
        *record = changed;
        Ok(())
    }

    /// Chooses what `default` means. The model need not be registered: a node can have one of its own.
    pub fn set_default(&mut self, model: Option<String>, at: Stamp) -> Result<(), RegistryError> {
        if let Some(name) = &model {
            crate::names::check_model(name).map_err(|error| RegistryError::Name(error.to_string()))?;
        }
        self.default.write(model, at);
        Ok(())
    }

    /// Takes an entry from elsewhere. True where that changed anything.
    pub fn merge(&mut self, entry: &Entry) -> Result<bool, RegistryError> {
        entry.check()?;
        let is_full = self.models.len() >= MOST_ENTRIES;
        match entry {
            Entry::Model(theirs) => match self.models.get_mut(theirs.name()) {
                Some(ours) => {
                    let mut merged = ours.clone();
                    merged.merge(theirs);
                    // Each side within its limits can be too much together.
                    merged.check()?;
                    let is_news = merged != *ours;
                    *ours = merged;
                    Ok(is_news)
                }
                None if is_full => Err(RegistryError::Full(format!(
                    "the entry `{}` has no room beside {MOST_ENTRIES} others",
                    theirs.name()
                ))),
                None => {
                    self.models.insert(theirs.name().to_owned(), theirs.clone());
                    Ok(true)
                }
            },
            Entry::Default(theirs) => {
                let before = self.default.clone();
                self.default.merge(theirs);
                Ok(self.default != before)
            }
        }
    }

    /// As this node brings it along when it joins another household: its models come with it, its choice of a default
    /// gives way to one that was made there. `node` is who it was.
    pub fn brought_along(mut self, node: NodeId) -> Self {
        self.default = self.default.yielding(node);
        self
    }

    /// Everything is as honest nodes write it.
    pub fn check(&self) -> Result<(), RegistryError> {
        if let Some((key, _)) = self.models.iter().find(|(key, record)| *key != record.name()) {
            let what = "it stands under another name".into();
            return Err(RegistryError::Unsound { name: key.chars().take(100).collect(), what });
        }
        if self.models.len() > MOST_ENTRIES {
            return Err(RegistryError::Full(format!("more than {MOST_ENTRIES} entries")));
        }
        self.models.values().try_for_each(Record::check)?;
        self.default.check()
    }
}
