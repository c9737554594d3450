//! What can be set for a model: the parameters, where their values come from, and what a change of each takes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ingle_protocol::wire::v2::LiveParameters;
use serde::{Deserialize, Serialize};

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvKind {
    /// Half precision.
    #[default]
    F16,
    /// 8 bits: half the memory, a little less exact.
    Int8,
}

impl From<KvKind> for ingle_engine::KvType {
    fn from(kind: KvKind) -> Self {
        match kind {
            KvKind::F16 => Self::F16,
            KvKind::Int8 => Self::Int8,
        }
    }
}

/// Every engine has slots for at least so many sequences: a slot alone takes no memory worth speaking of.
const LEAST_ROOM: u32 = 16;

/// All values together, as an engine process is started with them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelParameters {
    /// Tokens of one conversation at most, where the model allows more.
    pub context_length: u32,
    /// Answers that are written at once.
    pub batch_size: u32,
    /// Tokens of one answer at most, also where a request asks for more; unset: up to the context's end.
    pub max_tokens: Option<u32>,
    /// Tokens of prompts that are computed in one step at most.
    pub prefill_budget: u32,
    /// Threads that compute, on the CPU; unset: one for each core.
    pub threads: Option<u32>,
    /// How keys and values are kept.
    pub kv_type: KvKind,
    /// Memory for keys and values at most, in MiB; one full context fits in any case. Unset: a quarter of what is
    /// free.
    pub kv_memory_mib: Option<u64>,
}

impl Default for ModelParameters {
    fn default() -> Self {
        Self {
            context_length: 8_192,
            batch_size: 16,
            max_tokens: None,
            prefill_budget: 256,
            threads: None,
            kv_type: KvKind::F16,
            kv_memory_mib: None,
        }
    }
}

/// What a change of parameters takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Nothing.
    Nothing,
    /// The running engine takes it between two steps.
    Live,
    /// Another engine process.
    Reload,
}

impl ModelParameters {
    /// Slots of an engine that is started with these: `batch_size` can rise so far while it runs.
    pub fn room(&self) -> u32 {
        self.batch_size.saturating_mul(2).max(LEAST_ROOM)
    }

    /// As the engine takes them.
    pub fn to_options(&self, packed_cache: Option<ingle_engine::PackedCache>) -> ingle_engine::ModelOptions {
        ingle_engine::ModelOptions {
            slots: self.batch_size,
            most_slots: self.room(),
            context_length: Some(self.context_length),
            kv_type: self.kv_type.into(),
            kv_memory: self.kv_memory_mib.map(|mib| mib << 20),
            chunk: Some(self.prefill_budget),
            threads: self.threads.map(|threads| threads as usize),
            packed_cache,
            instructions: None,
        }
    }

    /// Those that a running engine can change.
    pub fn live(&self) -> LiveParameters {
        LiveParameters {
            batch_size: self.batch_size,
            max_tokens: self.max_tokens,
            prefill_budget: self.prefill_budget,
            threads: self.threads,
        }
    }

    /// What it takes to get from these to `new`, where the running engine has `room` slots.
    pub fn change_to(&self, new: &Self, room: u32) -> Change {
        if self == new {
            return Change::Nothing;
        }
        let live = Self {
            batch_size: new.batch_size,
            max_tokens: new.max_tokens,
            prefill_budget: new.prefill_budget,
            threads: new.threads,
            ..self.clone()
        };
        if live == *new && new.batch_size <= room { Change::Live } else { Change::Reload }
    }
}

/// The name of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parameter {
    /// [`ModelParameters::context_length`]
    ContextLength,
    /// [`ModelParameters::batch_size`]
    BatchSize,
    /// [`ModelParameters::max_tokens`]
    MaxTokens,
    /// [`ModelParameters::prefill_budget`]
    PrefillBudget,
    /// [`ModelParameters::threads`]
    Threads,
    /// [`ModelParameters::kv_type`]
    KvType,
    /// [`ModelParameters::kv_memory_mib`]
    KvMemoryMib,
}

/// A value as it is given: `4096`, `int8`, or `none` where nothing is to be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ParameterValue {
    /// A whole number.
    Number(u64),
    /// A word.
    Word(String),
}

impl fmt::Display for ParameterValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Word(word) => f.write_str(word),
        }
    }
}

impl From<&str> for ParameterValue {
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Word(text.to_owned()), Self::Number)
    }
}

/// The word for "nothing is set" where a parameter allows that.
const NONE: &str = "none";

impl Parameter {
    /// All of them, in the order in which people see them.
    pub const ALL: [Self; 7] = [
        Self::ContextLength,
        Self::BatchSize,
        Self::MaxTokens,
        Self::PrefillBudget,
        Self::Threads,
        Self::KvType,
        Self::KvMemoryMib,
    ];

    /// The name in files and commands.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ContextLength => "context_length",
            Self::BatchSize => "batch_size",
            Self::MaxTokens => "max_tokens",
            Self::PrefillBudget => "prefill_budget",
            Self::Threads => "threads",
            Self::KvType => "kv_type",
            Self::KvMemoryMib => "kv_memory_mib",
        }
    }

    /// What its change takes at most. (`batch_size` beyond the running engine's room takes another engine.)
    pub fn change(self) -> Change {
        match self {
            Self::BatchSize | Self::MaxTokens | Self::PrefillBudget | Self::Threads => Change::Live,
            Self::ContextLength | Self::KvType | Self::KvMemoryMib => Change::Reload,
        }
    }

    /// Its value among others.
    pub fn of(self, all: &ModelParameters) -> ParameterValue {
        let number = |value: u32| ParameterValue::Number(value.into());
        let optional = |value: Option<u64>| value.map_or(ParameterValue::Word(NONE.into()), ParameterValue::Number);
        match self {
            Self::ContextLength => number(all.context_length),
            Self::BatchSize => number(all.batch_size),
            Self::MaxTokens => optional(all.max_tokens.map(u64::from)),
            Self::PrefillBudget => number(all.prefill_budget),
            Self::Threads => optional(all.threads.map(u64::from)),
            Self::KvType => ParameterValue::Word(match all.kv_type {
                KvKind::F16 => "f16".into(),
                KvKind::Int8 => "int8".into(),
            }),
            Self::KvMemoryMib => optional(all.kv_memory_mib),
        }
    }

    /// Puts a value among the others, or says what is wrong with it.
    pub fn put(self, all: &mut ModelParameters, value: &ParameterValue) -> Result<(), ParameterError> {
        let wrong = |expected: String| ParameterError::Value { parameter: self, value: value.to_string(), expected };
        let number = |least: u64, most: u64| match value {
            ParameterValue::Number(number) if (least..=most).contains(number) => Ok(*number),
            _ => Err(wrong(format!("a whole number from {least} to {most}"))),
        };
        let small = |least: u32, most: u32| number(least.into(), most.into()).map(|number| number as u32);
        let optional = |most: u64| match value {
            ParameterValue::Word(word) if word == NONE => Ok(None),
            ParameterValue::Number(number) if (1..=most).contains(number) => Ok(Some(*number)),
            _ => Err(wrong(format!("a whole number from 1 to {most}, or `{NONE}`"))),
        };
        let small_optional = |most: u32| optional(most.into()).map(|number| number.map(|number| number as u32));
        match self {
            Self::ContextLength => all.context_length = small(16, 1 << 24)?,
            Self::BatchSize => all.batch_size = small(1, 1_024)?,
            Self::MaxTokens => all.max_tokens = small_optional(u32::MAX)?,
            Self::PrefillBudget => all.prefill_budget = small(1, 65_536)?,
            Self::Threads => all.threads = small_optional(1_024)?,
            Self::KvType => {
                all.kv_type = match value {
                    ParameterValue::Word(word) if word == "f16" => KvKind::F16,
                    ParameterValue::Word(word) if word == "int8" => KvKind::Int8,
                    _ => return Err(wrong("`f16` or `int8`".into())),
                }
            }
            Self::KvMemoryMib => all.kv_memory_mib = optional(1 << 30)?,
        }
        Ok(())
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Parameter {
    type Err = ParameterError;
    fn from_str(text: &str) -> Result<Self, ParameterError> {
        let found = Self::ALL.into_iter().find(|parameter| parameter.as_str() == text);
        found.ok_or_else(|| ParameterError::Unknown(text.chars().take(100).collect()))
    }
}

/// A parameter that cannot be so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// No such name.
    #[error("there is no parameter `{0}`; there are {all}", all = Parameter::ALL.map(Parameter::as_str).join(", "))]
    Unknown(String),
    /// A value that it cannot have.
    #[error("{parameter} is {value}: it must be {expected}")]
    Value {
        /// The parameter.
        parameter: Parameter,
        /// The value.
        value: String,
        /// What it could be.
        expected: String,
    },
}

/// Some parameters with their values: those that a file gives, or those that were set by command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GivenParameters(pub BTreeMap<Parameter, ParameterValue>);

impl GivenParameters {
    /// `all` with these in it.
    pub fn over(&self, mut all: ModelParameters) -> Result<ModelParameters, ParameterError> {
        for (parameter, value) in &self.0 {
            parameter.put(&mut all, value)?;
        }
        Ok(all)
    }

    /// These with changes; `None` takes a parameter back.
    pub fn with(&self, changes: &ParameterChanges) -> Self {
        let mut given = self.clone();
        for (parameter, value) in changes {
            match value {
                Some(value) => given.0.insert(*parameter, value.clone()),
                None => given.0.remove(parameter),
            };
        }
        given
    }
}

/// What is to be set, and (with `None`) what is no longer to be.
pub type ParameterChanges = BTreeMap<Parameter, Option<ParameterValue>>;

/// Where a value comes from. Each goes before the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `ingle models set`.
    Set,
    /// The configuration file.
    Config,
    /// Nobody gave one.
    Default,
}

/// One parameter as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownParameter {
    /// Its name.
    pub name: Parameter,
    /// Its value; `none` where nothing is set.
    pub value: ParameterValue,
    /// Where that comes from.
    pub source: Source,
    /// What a change takes.
    pub change: Change,
    /// What there is to say of it, or nothing: another value that holds, or how far it can rise.
    pub note: String,
}

/// The parameters of one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownParameters {
    /// The model.
    pub model: String,
    /// All parameters.
    pub parameters: Vec<ShownParameter>,
}

/// What a change came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The values were these already.
    Unchanged,
    /// The running engine took them between two steps.
    Live,
    /// A new engine took over; the one before finishes its answers.
    Moved,
    /// The engine finished its answers and was started anew.
    Restarted,
    /// No engine runs: they hold when one starts.
    Stored,
}

/// The layers of one model's parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layers {
    /// From the configuration file.
    pub config: GivenParameters,
    /// Set by command.
    pub set: GivenParameters,
}

impl Layers {
    /// The values that hold: set > config > default.
    pub fn resolve(&self) -> Result<ModelParameters, ParameterError> {
        self.set.over(self.config.over(ModelParameters::default())?)
    }

    /// Every parameter with its value and where that comes from.
    pub fn shown(&self, values: &ModelParameters) -> Vec<ShownParameter> {
        let source = |parameter: &Parameter| match parameter {
            _ if self.set.0.contains_key(parameter) => Source::Set,
            _ if self.config.0.contains_key(parameter) => Source::Config,
            _ => Source::Default,
        };
        let shown = |name: &Parameter| ShownParameter {
            name: *name,
            value: name.of(values),
            source: source(name),
            change: name.change(),
            note: String::new(),
        };
        Parameter::ALL.iter().map(shown).collect()
    }
}

#[cfg(test)]
mod tests;
