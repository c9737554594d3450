//! Metadata values of a GGUF file.

use super::{GgufError, Reader};

/// The most bytes of one text in the metadata (chat templates are the longest, at some 10 KiB).
const MAX_TEXT: u64 = 16 << 20;

/// One value of the metadata. Integers of all widths are held as `i64` (`u64` above its range as `Unsigned`).
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer that fits.
    Integer(i64),
    /// An integer above `i64::MAX`.
    Unsigned(u64),
    /// `f32` and `f64`.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Many of one type.
    Array(Array),
}

/// Many values of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Integers up to `i64::MAX`.
    Integers(Vec<i64>),
    /// `f32` and `f64`, as `f32`.
    Floats(Vec<f32>),
    /// Truth values.
    Bools(Vec<bool>),
    /// Texts.
    Texts(Vec<String>),
    /// Arrays of arrays.
    Arrays(Vec<Array>),
}

impl Value {
    /// What it is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Integer(_) | Self::Unsigned(_) => "a whole number out of the expected range or type",
            Self::Float(_) => "a floating-point number",
            Self::Bool(_) => "a truth value",
            Self::Text(_) => "a text",
            Self::Array(_) => "a list",
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(super) fn as_u32(&self) -> Option<u32> {
        if let Self::Integer(number) = self { u32::try_from(*number).ok() } else { None }
    }

    pub(super) fn as_f32(&self) -> Option<f32> {
        if let Self::Float(number) = self { Some(*number as f32) } else { None }
    }

    pub(super) fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(truth) = self { Some(*truth) } else { None }
    }

    pub(super) fn as_texts(&self) -> Option<&[String]> {
        if let Self::Array(Array::Texts(texts)) = self { Some(texts) } else { None }
    }

    pub(super) fn as_integers(&self) -> Option<&[i64]> {
        if let Self::Array(Array::Integers(numbers)) = self { Some(numbers) } else { None }
    }

    pub(super) fn as_floats(&self) -> Option<&[f32]> {
        if let Self::Array(Array::Floats(numbers)) = self { Some(numbers) } else { None }
    }
}

/// The types as GGUF numbers them.
pub(super) mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// The fewest bytes that a value of this type takes.
fn least_bytes(kind: u32) -> Option<u64> {
    Some(match kind {
        kind::U8 | kind::I8 | kind::BOOL => 1,
        kind::U16 | kind::I16 => 2,
        kind::U32 | kind::I32 | kind::F32 => 4,
        kind::U64 | kind::I64 | kind::F64 | kind::TEXT => 8,
        kind::ARRAY => 12,
        _ => return None,
    })
}

/// Reads the value of `key`.
pub(super) fn read(reader: &mut Reader<'_>, key: &str, kind: u32, depth: u32) -> Result<Value, GgufError> {
    Ok(match kind {
        kind::TEXT => Value::Text(reader.text(MAX_TEXT, || key.into())?),
        kind::F32 | kind::F64 => Value::Float(float(reader, key, kind)?),
        kind::BOOL => Value::Bool(boolean(reader, key)?),
        kind::ARRAY => Value::Array(array(reader, key, depth)?),
        kind::U64 => match reader.u64(|| key.into())? {
            number if number > i64::MAX as u64 => Value::Unsigned(number),
            number => Value::Integer(number as i64),
        },
        _ => Value::Integer(integer(reader, key, kind)?),
    })
}

fn array(reader: &mut Reader<'_>, key: &str, depth: u32) -> Result<Array, GgufError> {
    let damaged = |why| Err(GgufError::Invalid { what: key.into(), why });
    if depth == 0 {
        return damaged("it is nested too deep".into());
    }
    let kind = reader.u32(|| format!("the element type of {key}"))?;
    let count = reader.u64(|| format!("the length of {key}"))?;
    let Some(least) = least_bytes(kind) else { return damaged(format!("its element type is {kind}, which is none")) };
    // Checked before room is made for them: a count can lie, the bytes behind it cannot.
    let limit = reader.rest() / least;
    if count > limit {
        return Err(GgufError::TooMany { what: format!("the length of {key}"), got: count, limit });
    }
    Ok(match kind {
        kind::TEXT => Array::Texts(many(count, || reader.text(MAX_TEXT, || format!("an entry of {key}")))?),
        kind::F32 | kind::F64 => Array::Floats(many(count, || Ok(float(reader, key, kind)? as f32))?),
        kind::BOOL => Array::Bools(many(count, || boolean(reader, key))?),
        kind::ARRAY => Array::Arrays(many(count, || array(reader, key, depth - 1))?),
        kind => Array::Integers(many(count, || integer(reader, key, kind))?),
    })
}

fn many<T>(count: u64, mut next: impl FnMut() -> Result<T, GgufError>) -> Result<Vec<T>, GgufError> {
    (0..count).map(|_| next()).collect()
}

fn integer(reader: &mut Reader<'_>, key: &str, kind: u32) -> Result<i64, GgufError> {
    let what = || key.to_string();
    Ok(match kind {
        kind::U8 => reader.array(what).map(u8::from_le_bytes)?.into(),
        kind::I8 => reader.array(what).map(i8::from_le_bytes)?.into(),
        kind::U16 => reader.array(what).map(u16::from_le_bytes)?.into(),
        kind::I16 => reader.array(what).map(i16::from_le_bytes)?.into(),
        kind::U32 => reader.u32(what)?.into(),
        kind::I32 => reader.array(what).map(i32::from_le_bytes)?.into(),
        kind::I64 => reader.array(what).map(i64::from_le_bytes)?,
        kind::U64 => i64::try_from(reader.u64(what)?)
            .map_err(|_| GgufError::Invalid { what: key.into(), why: "a number is out of range".into() })?,
        other => {
            return Err(GgufError::Invalid { what: key.into(), why: format!("its type is {other}, which is none") });
        }
    })
}

fn float(reader: &mut Reader<'_>, key: &str, kind: u32) -> Result<f64, GgufError> {
    let what = || key.to_string();
    Ok(if kind == kind::F32 {
        reader.array(what).map(f32::from_le_bytes)?.into()
    } else {
        reader.array(what).map(f64::from_le_bytes)?
    })
}

fn boolean(reader: &mut Reader<'_>, key: &str) -> Result<bool, GgufError> {
    match reader.array::<1>(|| key.into())? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(GgufError::Invalid { what: key.into(), why: format!("a truth value of {other}") }),
    }
}
