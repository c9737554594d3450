//! What can be registered at all: checked where it is said, and again where it comes from elsewhere.

use super::record::{Endpoint, NewModel, Origin, Value};
use super::source::SOURCE_LIMIT;
use super::{RegistryError, Source};
use crate::names::{check_model, is_node};

/// The longest name of a parameter, and the longest word as its value, in bytes.
const LONGEST_WORD: usize = 64;
/// The longest name of a model at a far server, in bytes.
const LONGEST_FAR_NAME: usize = 256;
/// The longest name of an environment variable, in bytes.
const LONGEST_VARIABLE: usize = 128;

/// What somebody wants to register.
pub(super) fn check_new(new: &NewModel) -> Result<(), RegistryError> {
    check_model(&new.name).map_err(|error| RegistryError::Name(error.to_string()))?;
    check_origin(&new.origin)?;
    new.parameters.iter().try_for_each(|(name, value)| check_parameter(name, Some(value)))?;
    new.pins.iter().try_for_each(|node| check_pin(node))
}

pub(super) fn check_origin(origin: &Origin) -> Result<(), RegistryError> {
    let wrong = |why: &str| Err(RegistryError::Endpoint(why.into()));
    let endpoint = match origin {
        Origin::Source(source) => {
            return source.parse::<Source>().map(drop).map_err(|error| RegistryError::Source(error.to_string()));
        }
        Origin::Endpoint(endpoint) => endpoint,
    };
    let Endpoint { url, model, api_key_env } = endpoint;
    if url.len() > SOURCE_LIMIT || url.contains(char::is_control) {
        return wrong("its address is too long or has control characters");
    }
    if let Some(model) = model
        && (model.trim().is_empty() || model.len() > LONGEST_FAR_NAME || model.contains(char::is_control))
    {
        return wrong("the model's name there is empty, longer than 256 bytes or has control characters");
    }
    if let Some(variable) = api_key_env
        && !is_variable(variable)
    {
        return wrong(
            "the key is given by the name of an environment variable: letters, digits and `_`, no digit first",
        );
    }
    Ok(())
}

/// The name of an environment variable. A key itself seldom looks like one.
fn is_variable(text: &str) -> bool {
    (1..=LONGEST_VARIABLE).contains(&text.len())
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

pub(super) fn check_parameter(name: &str, value: Option<&Value>) -> Result<(), RegistryError> {
    let is_name = (1..=LONGEST_WORD).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let is_value = match value {
        Some(Value::Word(word)) => word.len() <= LONGEST_WORD && !word.contains(char::is_control),
        Some(Value::Number(_)) | None => true,
    };
    if is_name && is_value { Ok(()) } else { Err(RegistryError::Parameter(name.chars().take(100).collect())) }
}

pub(super) fn check_pin(node: &str) -> Result<(), RegistryError> {
    if is_node(node) { Ok(()) } else { Err(RegistryError::Node(node.chars().take(100).collect())) }
}
