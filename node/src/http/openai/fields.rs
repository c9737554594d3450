//! Members of a JSON object, taken out one by one; each error names the member by its full path.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::ApiError;

/// An object of which we know where it stands in the request.
pub struct Fields {
    members: Map<String, Value>,
    path: String,
}

impl Fields {
    /// `path` is where the object stands, as `messages[1]`; empty for the whole request.
    pub fn new(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(members) => Ok(Self { members, path }),
            other if path.is_empty() => Err(ApiError::unreadable(format!(
                "The request body must be a JSON object, but it is {}.",
                kind(&other)
            ))),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The full path of a member.
    pub fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a member. `null` is the same as nothing.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a string.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name)
            .map(|value| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong_type(self.path_of(name), "a string", &other)),
            })
            .transpose()
    }

    /// Takes a boolean.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.take(name)
            .map(|value| value.as_bool().ok_or_else(|| wrong_type(self.path_of(name), "a boolean", &value)))
            .transpose()
    }

    /// Takes a number within a range.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path_of(name);
        let number = value.as_f64().ok_or_else(|| wrong_type(path.clone(), "a number", &value))?;
        if !range.contains(&number) {
            let message = format!("`{path}` is {number}: it must be between {} and {}.", range.start(), range.end());
            return Err(ApiError::invalid(path, message));
        }
        Ok(Some(number))
    }

    /// Takes a whole number of at least 1. One that exceeds `u32` counts as its maximum: it means "no limit".
    pub fn count(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path_of(name);
        match value.as_u64() {
            Some(0) => Err(ApiError::invalid(path.clone(), format!("`{path}` is 0: it must be at least 1."))),
            Some(number) => Ok(Some(u32::try_from(number).unwrap_or(u32::MAX))),
            None if value.is_i64() => {
                Err(ApiError::invalid(path.clone(), format!("`{path}` is {value}: it must be at least 1.")))
            }
            None => Err(wrong_type(path, "a whole number", &value)),
        }
    }

    /// Takes a whole number of at least `least`, which is 0 or −1; −1 becomes `u32::MAX`, and so does what exceeds it.
    pub fn whole(&mut self, name: &str, least: i64) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path_of(name);
        match (value.as_u64(), value.as_i64()) {
            (Some(number), _) => Ok(Some(u32::try_from(number).unwrap_or(u32::MAX))),
            (None, Some(number)) if number >= least => Ok(Some(u32::MAX)),
            (None, Some(number)) => {
                Err(ApiError::invalid(path.clone(), format!("`{path}` is {number}: it must be at least {least}.")))
            }
            (None, None) => Err(wrong_type(path, "a whole number", &value)),
        }
    }

    /// What nobody took and what is not null.
    pub fn rest(self) -> Map<String, Value> {
        self.members.into_iter().filter(|(_, value)| !value.is_null()).collect()
    }
}

/// 400 for a value of the wrong type at `path`.
pub fn wrong_type(path: impl Into<String>, expected: &str, got: &Value) -> ApiError {
    let path = path.into();
    let message = format!("`{path}` must be {expected}, but it is {}.", kind(got));
    ApiError::invalid(path, message)
}

/// A value's type in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
