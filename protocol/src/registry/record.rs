//! One registered model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::RegistryError;
use super::check::{check_origin, check_parameter, check_pin};
use super::field::{Field, Seen, Stamp};
use crate::names::check_model;
use crate::{ModelDigest, NodeId};

/// The most parameters of a model.
pub const MOST_PARAMETERS: usize = 64;
/// The most nodes that a model is pinned to, those that it was pinned to before included.
pub const MOST_PINS: usize = 256;
/// The most nodes that ever wrote one entry.
pub(super) const MOST_WRITERS: usize = 1_024;
/// Counters beyond this are nobody's clock: who sends one would have the last word for ever.
pub(super) const MOST_COUNTER: u64 = 1 << 53;

/// What a model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// Writes texts.
    Llm,
    /// Turns texts into numbers that say what is near.
    Embedding,
    /// Speech to text.
    Stt,
    /// Text to speech.
    Tts,
    /// Looks at images.
    Vision,
}

impl ModelType {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Llm, Self::Embedding, Self::Stt, Self::Tts, Self::Vision];

    /// The name in commands.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llm => "llm",
            Self::Embedding => "embedding",
            Self::Stt => "stt",
            Self::Tts => "tts",
            Self::Vision => "vision",
        }
    }
}

/// What answers for the model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A file that our engine runs, by where it comes from: a text that [`Source`] reads.
    Source(String),
    /// A server elsewhere.
    Endpoint(Endpoint),
}

/// A server elsewhere that answers for a model. Its key is never here, only the name of the environment variable that
/// has it on the machines that need it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// Where it is.
    pub url: String,
    /// The model's name there; the only one that there is where missing.
    pub model: Option<String>,
    /// The environment variable with its key.
    pub api_key_env: Option<String>,
}

/// The value of a parameter. Which parameters there are, those know who use them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// A whole number.
    Number(u64),
    /// A word.
    Word(String),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Word(word) => f.write_str(word),
        }
    }
}

/// How long a model that nobody asks stays loaded, in seconds; [`FOREVER`] for always.
pub type KeepAlive = u32;
/// See [`KeepAlive`].
pub const FOREVER: KeepAlive = u32::MAX;

/// A model that is to be registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewModel {
    /// The name that requests will use.
    pub name: String,
    /// What it does.
    pub kind: ModelType,
    /// What answers for it.
    pub origin: Origin,
    /// Its file's hash, where it is known.
    pub sha256: Option<ModelDigest>,
    /// See [`KeepAlive`].
    pub keep_alive: Option<KeepAlive>,
    /// Parameters that are not the usual ones.
    pub parameters: BTreeMap<String, Value>,
    /// Names of the nodes that are to have it; empty: any.
    pub pins: Vec<String>,
}

/// One model in the registry, or what is left of one that was removed. Every field has its own last writer.
///
/// A removal takes away what its writer knew of. A change that it did not know of brings the model back, with the
/// removal noted on it, until somebody changes or removes the model again: a model that is still there is seen and
/// costs one more command, a change that is gone would be missed by nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    name: String,
    seen: Seen,
    kind: Field<ModelType>,
    origin: Field<Origin>,
    sha256: Field<Option<ModelDigest>>,
    keep_alive: Field<Option<KeepAlive>>,
    parameters: BTreeMap<String, Field<Option<Value>>>,
    pins: BTreeMap<String, Field<bool>>,
    /// What each removal knew of.
    removals: Field<Seen>,
}

impl Record {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            seen: Seen::default(),
            kind: Field::default(),
            origin: Field::default(),
            sha256: Field::default(),
            keep_alive: Field::default(),
            parameters: BTreeMap::new(),
            pins: BTreeMap::new(),
            removals: Field::default(),
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // What it says

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it does.
    pub fn kind(&self) -> ModelType {
        self.kind.value().copied().unwrap_or(ModelType::Llm)
    }

    /// What answers for it.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.value()
    }

    /// The node on which it was said what answers for it: a path is one of that machine.
    pub fn origin_writer(&self) -> Option<NodeId> {
        self.origin.latest().map(|written| written.at.node)
    }

    /// The server elsewhere that answers for it, if one does.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        match self.origin() {
            Some(Origin::Endpoint(endpoint)) => Some(endpoint),
            _ => None,
        }
    }

    /// Where its file comes from, if it has one.
    pub fn source(&self) -> Option<&str> {
        match self.origin() {
            Some(Origin::Source(source)) => Some(source),
            _ => None,
        }
    }

    /// Its file's hash, once it is known.
    pub fn sha256(&self) -> Option<ModelDigest> {
        self.sha256.value().copied().flatten()
    }

    /// How long it stays loaded when nobody asks it.
    pub fn keep_alive(&self) -> Option<KeepAlive> {
        self.keep_alive.value().copied().flatten()
    }

    /// Its parameters that are not the usual ones.
    pub fn parameters(&self) -> BTreeMap<&str, &Value> {
        let set = self.parameters.iter();
        set.filter_map(|(name, field)| Some((name.as_str(), field.value()?.as_ref()?))).collect()
    }

    /// All parameters that were ever spoken of; `None` for those that were taken back.
    pub fn all_parameters(&self) -> BTreeMap<&str, Option<&Value>> {
        let all = self.parameters.iter();
        all.map(|(name, field)| (name.as_str(), field.value().and_then(Option::as_ref))).collect()
    }

    /// Names of the nodes that are to have it; empty: any.
    pub fn pins(&self) -> Vec<&str> {
        let pinned = self.pins.iter().filter(|(_, pinned)| pinned.value() == Some(&true));
        pinned.map(|(node, _)| node.as_str()).collect()
    }

    /// Its last change, removals included.
    pub fn changed(&self) -> Option<Stamp> {
        self.stamps().into_iter().chain(self.removals.versions().iter().map(|written| written.at)).max()
    }

    /// It is no longer there: somebody removed it who knew of every change.
    pub fn is_removed(&self) -> bool {
        let mut gone = Seen::default();
        self.removals.versions().iter().for_each(|removal| gone.merge(&removal.value));
        !self.removals.is_empty() && self.stamps().into_iter().all(|at| gone.covers(at))
    }

    /// What did not hold because something else was written at the same time: field, value and who wrote it.
    pub fn overruled(&self) -> Vec<(String, String, Stamp)> {
        fn of<T: Ord + Clone>(
            name: &str,
            field: &Field<T>,
            show: impl Fn(&T) -> String,
        ) -> Vec<(String, String, Stamp)> {
            field.overruled().map(|written| (name.to_owned(), show(&written.value), written.at)).collect()
        }
        fn or_none<T: ToString>(value: &Option<T>) -> String {
            value.as_ref().map_or_else(|| "none".into(), T::to_string)
        }
        let origin = |origin: &Origin| match origin {
            Origin::Source(source) => source.clone(),
            Origin::Endpoint(endpoint) => endpoint.url.clone(),
        };
        let mut all = of("type", &self.kind, |kind| kind.as_str().into());
        all.extend(of("origin", &self.origin, origin));
        all.extend(of("sha256", &self.sha256, or_none));
        all.extend(of("keep_alive", &self.keep_alive, or_none));
        all.extend(self.parameters.iter().flat_map(|(name, field)| of(name, field, or_none)));
        all.extend(self.pins.iter().flat_map(|(node, field)| of(&format!("pin {node}"), field, bool::to_string)));
        if !self.is_removed() {
            all.extend(self.removals.versions().iter().map(|written| ("removal".into(), "removed".into(), written.at)));
        }
        all
    }

    /// Every write that stands here, removals not counted.
    pub fn stamps(&self) -> Vec<Stamp> {
        fn of<T>(versions: &[super::field::Written<T>]) -> impl Iterator<Item = Stamp> {
            versions.iter().map(|written| written.at)
        }
        let mut all: Vec<Stamp> = of(self.kind.versions()).chain(of(self.origin.versions())).collect();
        all.extend(of(self.sha256.versions()).chain(of(self.keep_alive.versions())));
        all.extend(self.parameters.values().flat_map(|field| of(field.versions())));
        all.extend(self.pins.values().flat_map(|field| of(field.versions())));
        all
    }

    /// What is known here of writes to it.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    // -----------------------------------------------------------------------------------------------------------
    // Writing

    /// Whoever writes has seen what stands here, removals included.
    fn begin(&mut self, at: Stamp) {
        self.seen.note(at);
        self.removals.clear();
    }

    /// Writes everything, so that nothing of a former life of the name comes back.
    pub(super) fn write(&mut self, new: NewModel, at: Stamp) {
        self.begin(at);
        self.kind.write(new.kind, at);
        self.origin.write(new.origin, at);
        self.sha256.write(new.sha256, at);
        self.keep_alive.write(new.keep_alive, at);
        let former: Vec<String> = self.parameters.keys().cloned().collect();
        for name in former.into_iter().filter(|name| !new.parameters.contains_key(name)) {
            self.parameters.entry(name).or_default().write(None, at);
        }
        for (name, value) in new.parameters {
            self.parameters.entry(name).or_default().write(Some(value), at);
        }
        self.write_pins(&new.pins, at);
    }

    pub(super) fn write_pins(&mut self, pins: &[String], at: Stamp) {
        self.begin(at);
        // Only those that change: who pins it elsewhere at the same time is not overruled.
        for (node, field) in &mut self.pins {
            let wanted = pins.contains(node);
            if field.value() != Some(&wanted) || field.overruled().next().is_some() {
                field.write(wanted, at);
            }
        }
        for node in pins {
            self.pins.entry(node.clone()).or_insert_with(|| {
                let mut field = Field::default();
                field.write(true, at);
                field
            });
        }
    }

    pub(super) fn write_parameters(&mut self, changes: &BTreeMap<String, Option<Value>>, at: Stamp) {
        self.begin(at);
        for (name, value) in changes {
            self.parameters.entry(name.clone()).or_default().write(value.clone(), at);
        }
    }

    pub(super) fn write_keep_alive(&mut self, keep_alive: Option<KeepAlive>, at: Stamp) {
        self.begin(at);
        self.keep_alive.write(keep_alive, at);
    }

    pub(super) fn write_sha256(&mut self, sha256: Option<ModelDigest>, at: Stamp) {
        self.begin(at);
        self.sha256.write(sha256, at);
    }

    pub(super) fn remove(&mut self, at: Stamp) {
        let known = self.seen.clone();
        self.seen.note(at);
        self.removals.write(known, at);
    }

    // -----------------------------------------------------------------------------------------------------------
    // Merging

    /// Takes what the other has of the same model. Both must have been checked.
    pub(super) fn merge(&mut self, other: &Self) {
        let (seen, theirs) = (&self.seen, &other.seen);
        self.kind.merge(seen, &other.kind, theirs);
        self.origin.merge(seen, &other.origin, theirs);
        self.sha256.merge(seen, &other.sha256, theirs);
        self.keep_alive.merge(seen, &other.keep_alive, theirs);
        merge_all(&mut self.parameters, seen, &other.parameters, theirs);
        merge_all(&mut self.pins, seen, &other.pins, theirs);
        self.removals.merge(seen, &other.removals, theirs);
        self.seen.merge(theirs);
    }

    /// Everything is as an honest node would have written it. What others send and what a file has is checked.
    pub fn check(&self) -> Result<(), RegistryError> {
        let wrong = |what: String| Err(RegistryError::Unsound { name: self.name.chars().take(100).collect(), what });
        check_model(&self.name).map_err(|error| RegistryError::Name(error.to_string()))?;
        if self.seen.len() > MOST_WRITERS || self.seen.highest() > MOST_COUNTER {
            return wrong("more writers or a later time than there can be".into());
        }
        if self.kind.is_empty() || self.origin.is_empty() || self.sha256.is_empty() || self.keep_alive.is_empty() {
            return wrong("a field is missing".into());
        }
        let seen = &self.seen;
        let sound = self.kind.is_sound(seen)
            && self.origin.is_sound(seen)
            && self.sha256.is_sound(seen)
            && self.keep_alive.is_sound(seen)
            && self.parameters.values().all(|field| !field.is_empty() && field.is_sound(seen))
            && self.pins.values().all(|field| !field.is_empty() && field.is_sound(seen))
            && self.removals.is_sound(seen);
        if !sound {
            return wrong("writes that nobody can have seen".into());
        }
        if self.parameters.len() > MOST_PARAMETERS || self.pins.len() > MOST_PINS {
            return wrong(format!("more than {MOST_PARAMETERS} parameters or {MOST_PINS} pins"));
        }
        self.origin.versions().iter().try_for_each(|written| check_origin(&written.value))?;
        for (name, field) in &self.parameters {
            field.versions().iter().try_for_each(|written| check_parameter(name, written.value.as_ref()))?;
        }
        self.pins.keys().try_for_each(|node| check_pin(node))
    }
}

fn merge_all<T: Ord + Clone>(
    ours: &mut BTreeMap<String, Field<T>>,
    seen: &Seen,
    theirs: &BTreeMap<String, Field<T>>,
    their_seen: &Seen,
) {
    for name in theirs.keys() {
        ours.entry(name.clone()).or_default();
    }
    let none = Field::default();
    for (name, field) in ours.iter_mut() {
        field.merge(seen, theirs.get(name).unwrap_or(&none), their_seen);
    }
    ours.retain(|_, field| !field.is_empty());
}
