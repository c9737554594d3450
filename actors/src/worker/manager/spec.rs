//! What is to be loaded: from what people type to a file, a source or an engine.

use std::path::Path;
use std::time::Duration;

use ingle_protocol::names::near;
use serde::{Deserialize, Serialize};

use crate::gateway::{DEFAULT_MODEL, unknown_model};
use crate::models::{default_model, parse_source};
use crate::node::ModelChoice;
use crate::worker::model_name_of;

/// The longest name of a model in bytes.
const LONGEST_NAME: usize = 128;

/// A model of this node, loaded or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// The name that requests use.
    pub name: String,
    /// What it is.
    pub choice: ModelChoice,
    /// It never goes to make room for others, and is loaded when the node starts.
    pub pinned: bool,
    /// It goes after so many seconds in which nobody uses it; `None`: when others need its memory.
    pub keep_alive_s: Option<u64>,
    /// It is here because the registry has it, and goes when that says so.
    #[serde(default)]
    pub registered: bool,
}

impl ModelSpec {
    /// A model under its usual name, that stays until its memory is needed.
    pub fn of(choice: ModelChoice) -> Self {
        Self { name: model_name_of(&choice), choice, pinned: false, keep_alive_s: None, registered: false }
    }

    /// See the field.
    pub fn keep_alive(&self) -> Option<Duration> {
        self.keep_alive_s.map(Duration::from_secs)
    }
}

/// A wish to load a model, as it is typed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadRequest {
    /// A model's name, an absolute path, or a source.
    pub what: String,
    /// The name that it shall have; `None` for its own.
    pub name: Option<String>,
    /// See [`ModelSpec::pinned`]; `None` leaves it as it is.
    pub pinned: Option<bool>,
    /// See [`ModelSpec::keep_alive_s`]; `None` leaves it as it is, zero takes it back.
    pub keep_alive_s: Option<u64>,
}

/// Why a model is not loaded or unloaded, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Nothing of this name.
    #[error("{} Give the path of a GGUF file, a source (`ingle help models load`), or the name of a model that was loaded before.", unknown_model(.0, .1, &[]))]
    Unknown(String, Vec<String>),
    /// A name that no model can have.
    #[error(
        "`{0}` is no name for a model: up to {LONGEST_NAME} of A-Z, a-z, 0-9 and ._:/@-, beginning with a letter or digit, and not `{DEFAULT_MODEL}`"
    )]
    Name(String),
    /// A source that cannot be understood.
    #[error("{0}")]
    Source(String),
    /// The file is no model.
    #[error("{0}")]
    File(String),
    /// It is known by this name already as something else, and is on its way.
    #[error("`{0}` is being changed or has too many orders waiting: try again when that is done (see `ingle ps`)")]
    Busy(String),
    /// There are too many.
    #[error("this node knows {0} models already, which is all that it keeps: forget one first")]
    TooMany(usize),
    /// What is known cannot be kept.
    #[error("{0}")]
    Kept(String),
    /// It began to load and failed.
    #[error("{0}")]
    Failed(String),
    /// The node ends.
    #[error("this node is shutting down")]
    Ending,
}

/// Checks a name for a model.
pub fn check_name(name: &str) -> Result<(), LoadError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:/@-".contains(c);
    let good = name.len() <= LONGEST_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(plain)
        && name != DEFAULT_MODEL;
    if good { Ok(()) } else { Err(LoadError::Name(name.chars().take(LONGEST_NAME).collect())) }
}

impl LoadRequest {
    /// What is meant. `known` are the models that the node knows, the one that `default` means first.
    pub fn resolve(&self, known: &[ModelSpec]) -> Result<ModelSpec, LoadError> {
        let what = self.what.trim();
        let by_name = || known.iter().find(|spec| spec.name == what || what == DEFAULT_MODEL);
        let catalog = default_model();
        let mut spec = if let Some(spec) = by_name() {
            spec.clone()
        } else if what == DEFAULT_MODEL || what == catalog.name {
            ModelSpec::of(ModelChoice::Default)
        } else if what == "echo" {
            ModelSpec::of(ModelChoice::Echo)
        } else if let Some(source) = parse_source(what) {
            ModelSpec::of(ModelChoice::Source(source.map_err(LoadError::Source)?))
        } else if Path::new(what).is_absolute() {
            ModelSpec::of(ModelChoice::File(what.into()))
        } else {
            let names = known.iter().map(|spec| spec.name.as_str()).chain([catalog.name.as_str()]);
            let near = near(what, names).into_iter().map(str::to_owned).collect();
            return Err(LoadError::Unknown(what.to_owned(), near));
        };
        if let Some(name) = &self.name {
            spec.name = name.trim().to_owned();
        }
        check_name(&spec.name)?;
        // What was said of a model of this name before holds on.
        let before = known.iter().find(|before| before.name == spec.name);
        spec.pinned = before.is_some_and(|before| before.pinned);
        spec.keep_alive_s = before.and_then(|before| before.keep_alive_s);
        spec.registered = before.is_some_and(|before| before.registered);
        spec.pinned = self.pinned.unwrap_or(spec.pinned);
        spec.keep_alive_s = self.keep_alive_s.or(spec.keep_alive_s).filter(|seconds| *seconds > 0);
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(what: &str, name: Option<&str>) -> LoadRequest {
        LoadRequest { what: what.into(), name: name.map(str::to_owned), ..LoadRequest::default() }
    }

    #[test]
    fn names_paths_and_sources_are_told_apart_and_the_rest_gets_a_hint() {
        let known = [
            ModelSpec { pinned: true, ..ModelSpec::of(ModelChoice::File("/m/Tiny.gguf".into())) },
            ModelSpec::of(ModelChoice::Echo),
        ];
        let of = |what, name| asked(what, name).resolve(&known);
        assert_eq!(of("tiny", None).unwrap(), known[0]);
        assert_eq!(of("default", None).unwrap().name, "tiny");
        assert_eq!(of("smollm2-135m-instruct", None).unwrap().choice, ModelChoice::Default);
        let other = of("/m/other.gguf", Some("tiny")).unwrap();
        assert_eq!((other.choice, other.pinned), (ModelChoice::File("/m/other.gguf".into()), true));
        let copy = of("tiny", Some("copy")).unwrap();
        assert_eq!((copy.choice, copy.pinned), (known[0].choice.clone(), false));
        assert!(matches!(of("tin", None), Err(LoadError::Unknown(_, near)) if near == ["tiny"]));
        assert!(matches!(of("../m.gguf", None), Err(LoadError::Unknown(..))));
        for bad in ["", "default", "../x", "a b", "x\ny", &"x".repeat(200)] {
            assert!(matches!(of("echo", Some(bad)), Err(LoadError::Name(_))), "{bad}");
        }
        let spec = LoadRequest { pinned: Some(false), keep_alive_s: Some(9), ..asked("tiny", None) };
        let spec = spec.resolve(&known).unwrap();
        assert_eq!((spec.pinned, spec.keep_alive()), (false, Some(Duration::from_secs(9))));
    }
}
