//! `config.json`: numbers under the names that model families use, each checked for type and range.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::quantize::ConvertError;

/// The most of anything, as in the loader of GGUF files; keeps products far from overflow.
const MOST: u64 = (1 << 24) + 1;
/// The widest head; tables as long as half of it are computed. Real ones have up to 256.
const MOST_HEAD: u32 = 1 << 16;

/// A model's configuration.
#[derive(Debug)]
pub(super) struct Config {
    pub path: PathBuf,
    values: Map<String, Value>,
    /// Rotary settings of all layers, or of those with full attention; newer files have them in one place.
    pub rope: Map<String, Value>,
    /// The base of sliding-window layers, where they have their own.
    pub local_rope_base: Option<f32>,
}

impl Config {
    pub fn new(path: PathBuf, value: Value) -> Result<Self, ConvertError> {
        let Value::Object(values) = value else {
            return Err(ConvertError::Damaged { path, what: "its JSON".into(), why: "it is no object".into() });
        };
        let mut config = Self { path, values, rope: Map::new(), local_rope_base: None };
        config.gather_rope()?;
        Ok(config)
    }

    /// As `TextModel.__init__` of llama.cpp's converter: settings of older files are put to those of newer ones.
    fn gather_rope(&mut self) -> Result<(), ConvertError> {
        let object = |value: Option<&Value>| value.and_then(Value::as_object).cloned();
        let given = object(self.values.get("rope_parameters")).or_else(|| object(self.values.get("rope_scaling")));
        let given = given.unwrap_or_default();
        let base_of = |settings: Option<Map<String, Value>>| {
            settings.and_then(|settings| settings.get("rope_theta")?.as_f64()).map(|base| base as f32)
        };
        let sliding = object(given.get("sliding_attention"));
        if sliding.is_some() || given.contains_key("full_attention") {
            self.local_rope_base = base_of(sliding);
            self.rope = object(given.get("full_attention")).unwrap_or_default();
            return Ok(());
        }
        self.local_rope_base = self.float(&["rope_local_base_freq", "local_rope_theta"])?;
        self.rope = given;
        for (new, old) in [
            ("rope_theta", "rope_theta"),
            ("partial_rotary_factor", "partial_rotary_factor"),
            ("original_max_position_embeddings", "original_max_position_embeddings"),
        ] {
            if let (false, Some(value)) = (self.rope.contains_key(new), self.values.get(old)) {
                self.rope.insert(new.into(), value.clone());
            }
        }
        if let (false, Some(kind)) = (self.rope.contains_key("rope_type"), self.rope.get("type").cloned()) {
            self.rope.insert("rope_type".into(), kind);
        }
        Ok(())
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    fn damaged(&self, key: &str, why: String) -> ConvertError {
        ConvertError::Damaged { path: self.path.clone(), what: key.into(), why }
    }

    /// What this converter does not do.
    pub fn unsupported(&self, what: String, hint: &str) -> ConvertError {
        ConvertError::Unsupported { path: self.path.clone(), what, hint: hint.into() }
    }

    /// A whole number from 1 to 2²⁴ under one of these names.
    pub fn number(&self, keys: &[&str]) -> Result<Option<u32>, ConvertError> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.get(key)?))) else { return Ok(None) };
        match value.as_u64().filter(|number| (1..MOST).contains(number)) {
            Some(number) => Ok(Some(number as u32)),
            None => Err(self.damaged(key, format!("it is {value}, a number from 1 to {} was expected", MOST - 1))),
        }
    }

    /// A number that must be there.
    pub fn need(&self, keys: &[&str]) -> Result<u32, ConvertError> {
        self.number(keys)?.ok_or_else(|| self.damaged(keys[0], "it is missing".into()))
    }

    /// A finite number under one of these names.
    pub fn float(&self, keys: &[&str]) -> Result<Option<f32>, ConvertError> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.get(key)?))) else { return Ok(None) };
        match value.as_f64().map(|number| number as f32).filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.damaged(key, format!("it is {value}, a number was expected"))),
        }
    }

    /// A finite number of the rotary settings.
    pub fn rope_float(&self, key: &str) -> Result<Option<f32>, ConvertError> {
        let Some(value) = self.rope.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        match value.as_f64().map(|number| number as f32).filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.damaged(key, format!("it is {value}, a number was expected"))),
        }
    }

    /// Factors of the rotary settings, one for each rotated pair.
    pub fn rope_factors(&self, key: &str) -> Result<Option<Vec<f32>>, ConvertError> {
        let Some(value) = self.rope.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        let numbers = value.as_array().and_then(|all| all.iter().map(|n| Some(n.as_f64()? as f32)).collect());
        numbers.map(Some).ok_or_else(|| self.damaged(key, "a list of numbers was expected".into()))
    }

    /// The kind of rotary scaling; `default` where there is none.
    pub fn rope_type(&self) -> &str {
        self.rope.get("rope_type").and_then(Value::as_str).unwrap_or("default")
    }

    /// Width of a head: given, or what is left for each.
    pub fn head_size(&self) -> Result<u32, ConvertError> {
        let heads = self.need(&["num_attention_heads"])?;
        match self.number(&["head_dim"])?.unwrap_or(self.need(&["hidden_size"])? / heads) {
            size if size > MOST_HEAD => Err(self.damaged("head_dim", format!("heads of width {size}"))),
            size => Ok(size),
        }
    }
}
