//! Which model `default` means.

use serde::{Deserialize, Serialize};

use super::RegistryError;
use super::field::{Field, Seen, Stamp};
use super::record::{MOST_COUNTER, MOST_WRITERS};
use crate::NodeId;
use crate::names::check_model;

/// Which model `default` means. An entry of its own, so that removing a model and choosing another default do not
/// meet in one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefaultModel {
    seen: Seen,
    model: Field<Option<String>>,
}

impl DefaultModel {
    /// The model's name; `None` where none was chosen.
    pub fn name(&self) -> Option<&str> {
        self.model.value()?.as_deref()
    }

    /// Others that were chosen at the same time: name and who did.
    pub fn overruled(&self) -> Vec<(Option<String>, Stamp)> {
        self.model.overruled().map(|written| (written.value.clone(), written.at)).collect()
    }

    /// Who chose.
    pub fn changed(&self) -> Option<Stamp> {
        self.model.latest().map(|written| written.at)
    }

    /// Every choice that stands here.
    pub fn stamps(&self) -> Vec<Stamp> {
        self.model.versions().iter().map(|written| written.at).collect()
    }

    /// What is known here of choices.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    pub(super) fn write(&mut self, model: Option<String>, at: Stamp) {
        self.seen.note(at);
        self.model.write(model, at);
    }

    /// A choice that gives way to every other one: that of a machine that joins a household, which has its own.
    pub(super) fn yielding(&self, node: NodeId) -> Self {
        let mut weak = Self::default();
        if let Some(name) = self.name() {
            weak.write(Some(name.to_owned()), Stamp { counter: 1, node });
        }
        weak
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.model.merge_kept(&self.seen, &other.model, &other.seen);
        self.seen.merge(&other.seen);
    }

    /// See [`super::Record::check`].
    pub fn check(&self) -> Result<(), RegistryError> {
        let names = self.model.versions().iter().filter_map(|written| written.value.as_deref());
        let named = names.into_iter().try_for_each(check_model);
        named.map_err(|error| RegistryError::Name(error.to_string()))?;
        if self.seen.len() > MOST_WRITERS || self.seen.highest() > MOST_COUNTER || !self.model.is_sound(&self.seen) {
            return Err(RegistryError::Unsound {
                name: "default".into(),
                what: "writes that nobody can have seen".into(),
            });
        }
        Ok(())
    }
}
