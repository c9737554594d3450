//! The body of a request for embeddings. What we have no field for travels to the worker as `extra`, which honours it or
//! refuses it by name.

use ingle_actors::protocol::wire::v2::{Embed, EmbedInput, MOST_INPUTS};
use serde_json::Value;

use super::ApiError;
use super::fields::{Fields, wrong_type};
use super::json;
use super::request::{LONGEST_NAME, Written};

/// A request for embeddings, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingsRequest {
    /// As the client wrote it; empty for none.
    pub model: String,
    /// What is to be embedded.
    pub embed: Embed,
    /// Write numbers as base64 of little-endian floats.
    pub base64: bool,
    /// What the client calls its user, for logs.
    pub user: Option<String>,
    /// Members without a field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// Reads a request body.
pub fn parse(body: &[u8]) -> Result<EmbeddingsRequest, ApiError> {
    let text = std::str::from_utf8(body)
        .map_err(|error| ApiError::unreadable(format!("The request body is not UTF-8: {error}.")))?;
    let value = json::parse(text.as_bytes())
        .map_err(|error| ApiError::unreadable(format!("The request body is not valid JSON: {error}.")))?;
    let mut fields = Fields::new(value, "")?;
    let model = fields.text("model")?.unwrap_or_default();
    if model.len() > LONGEST_NAME {
        return Err(ApiError::invalid("model", format!("`model` is longer than {LONGEST_NAME} bytes.")));
    }
    let inputs = inputs(fields.take("input"))?;
    let base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let other: String = other.chars().take(80).collect();
            let message = format!("`encoding_format` is `{other}`: it must be float or base64.");
            return Err(ApiError::invalid("encoding_format", message));
        }
    };
    let dimensions = fields.count("dimensions")?;
    let user = fields.text("user")?;
    let extra = Written::new(text).extra(&fields.rest(), "")?;
    Ok(EmbeddingsRequest { model, embed: Embed { inputs, dimensions }, base64, user, extra })
}

fn inputs(value: Option<Value>) -> Result<Vec<EmbedInput>, ApiError> {
    let expected = "a string, an array of strings, or an array of token ids";
    let items = match value {
        Some(Value::Array(items)) => items,
        Some(Value::String(text)) => return Ok(vec![one_text(text, "input")?]),
        Some(other) => return Err(wrong_type("input", expected, &other)),
        None => return Err(ApiError::invalid("input", format!("`input` is missing: it must be {expected}."))),
    };
    match items.first() {
        None => Err(ApiError::invalid("input", "`input` is empty: write at least one text.")),
        // One list of tokens is one input.
        Some(Value::Number(_)) => Ok(vec![tokens(items, "input")?]),
        Some(_) if items.len() > MOST_INPUTS => {
            let message = format!("`input` has {} entries: at most {MOST_INPUTS} are possible.", items.len());
            Err(ApiError::invalid("input", message))
        }
        Some(first) => {
            let of_texts = first.is_string();
            let numbered = items.into_iter().enumerate();
            numbered.map(|(index, item)| several(item, of_texts, &format!("input[{index}]"))).collect()
        }
    }
}

/// One of several inputs, all of which are of the kind of the first one.
fn several(item: Value, of_texts: bool, path: &str) -> Result<EmbedInput, ApiError> {
    match item {
        Value::String(text) if of_texts => one_text(text, path),
        Value::Array(ids) if !of_texts => tokens(ids, path),
        other if of_texts => Err(wrong_type(path, "a string, as the first one is", &other)),
        other => Err(wrong_type(path, "a string or an array of token ids, all of one kind", &other)),
    }
}

fn one_text(text: String, path: &str) -> Result<EmbedInput, ApiError> {
    match text.is_empty() {
        true => Err(ApiError::invalid(path, format!("`{path}` is an empty string: there is nothing to embed."))),
        false => Ok(EmbedInput::Text(text)),
    }
}

fn tokens(ids: Vec<Value>, path: &str) -> Result<EmbedInput, ApiError> {
    if ids.is_empty() {
        return Err(ApiError::invalid(path, format!("`{path}` is an empty array: there is nothing to embed.")));
    }
    let numbered = ids.into_iter().enumerate();
    let ids = numbered.map(|(index, id)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        number.ok_or_else(|| {
            let message = format!("`{path}[{index}]` must be a token id, a whole number from 0 to {}.", u32::MAX);
            ApiError::invalid(format!("{path}[{index}]"), message)
        })
    });
    Ok(EmbedInput::Tokens(ids.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(body: Value) -> Result<EmbeddingsRequest, ApiError> {
        parse(body.to_string().as_bytes())
    }

    fn inputs_of(input: Value) -> Vec<EmbedInput> {
        of(json!({"input": input})).unwrap().embed.inputs
    }

    #[test]
    fn all_four_forms_of_input_are_read() {
        let text = |text: &str| EmbedInput::Text(text.into());
        let tokens = |ids: &[u32]| EmbedInput::Tokens(ids.to_vec());
        assert_eq!(inputs_of(json!("a cat")), [text("a cat")]);
        assert_eq!(inputs_of(json!(["a", " "])), [text("a"), text(" ")]);
        assert_eq!(inputs_of(json!([101, 4294967295u32])), [tokens(&[101, u32::MAX])]);
        assert_eq!(inputs_of(json!([[1, 2], [3]])), [tokens(&[1, 2]), tokens(&[3])]);
        let body = json!({"model": "m", "input": "x", "encoding_format": "base64", "dimensions": 256, "user": "me",
            "input_type": "query"});
        let request = of(body).unwrap();
        assert_eq!((request.model.as_str(), request.base64, request.embed.dimensions), ("m", true, Some(256)));
        assert_eq!(
            (request.user.as_deref(), request.extra.as_slice()),
            (Some("me"), &br#"{"input_type":"query"}"#[..])
        );
        let plain = of(json!({"input": "x", "encoding_format": "float", "dimensions": null})).unwrap();
        assert_eq!((plain.base64, plain.embed.dimensions, plain.extra.len()), (false, None, 0));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": null}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": ""}), "input"),
            (json!({"input": {"a": 1}}), "input"),
            (json!({"input": true}), "input"),
            (json!({"input": ["a", ""]}), "input[1]"),
            (json!({"input": ["a", 1]}), "input[1]"),
            (json!({"input": ["a", ["b"]]}), "input[1]"),
            (json!({"input": [null]}), "input[0]"),
            (json!({"input": [1, "a"]}), "input[1]"),
            (json!({"input": [1, -1]}), "input[1]"),
            (json!({"input": [1.5]}), "input[0]"),
            (json!({"input": [4294967296u64]}), "input[0]"),
            (json!({"input": [[1], []]}), "input[1]"),
            (json!({"input": [[1], ["x"]]}), "input[1][0]"),
            (json!({"input": [[1], "x"]}), "input[1]"),
            (json!({"input": [[[1]]]}), "input[0][0]"),
            (json!({"input": vec!["x"; MOST_INPUTS + 1]}), "input"),
            (json!({"input": "x", "encoding_format": "int8"}), "encoding_format"),
            (json!({"input": "x", "encoding_format": 5}), "encoding_format"),
            (json!({"input": "x", "dimensions": 0}), "dimensions"),
            (json!({"input": "x", "dimensions": "many"}), "dimensions"),
            (json!({"input": "x", "model": "m".repeat(300)}), "model"),
            (json!({"input": "x", "user": 5}), "user"),
        ] {
            let error = of(body.clone()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}: {error:?}");
        }
        for body in ["", "[]", "{\"input\":\"a\",\"input\":\"b\"}", "{\"input\":\"\\ud800\"}"] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_json")), "{body}: {error:?}");
        }
        assert_eq!(of(json!({"input": vec!["x"; MOST_INPUTS]})).unwrap().embed.inputs.len(), MOST_INPUTS);
    }
}
