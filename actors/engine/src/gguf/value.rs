//! Metadata values of a GGUF file.

use std::ops::Range;

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
    List(List),
}

/// Many values of one type. They stay in the file and are read when they are asked for: a vocabulary has hundreds of
/// thousands, and each as a value of its own would take several times the bytes that it has in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    kind: u32,
    count: usize,
    /// Their bytes in the file, looked through once: all are there, and texts are UTF-8.
    place: Range<usize>,
}

impl List {
    fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        file.get(self.place.clone()).unwrap_or_default()
    }

    /// Its entries of `width` bytes, if it has values of one of these types.
    fn entries<'a>(&self, file: &'a [u8], kinds: &[u32]) -> Option<std::slice::ChunksExact<'a, u8>> {
        let width = least_bytes(self.kind)? as usize;
        kinds.contains(&self.kind).then(|| self.bytes(file).chunks_exact(width))
    }

    /// All texts, if it has texts. They are looked through again, as somebody may have changed the file.
    pub(super) fn texts<'a>(&self, file: &'a [u8], key: &str) -> Option<Result<Vec<&'a str>, GgufError>> {
        let mut reader = Reader { bytes: self.bytes(file), at: 0 };
        let next = |_| reader.str(MAX_TEXT, || format!("an entry of {key}"));
        (self.kind == kind::TEXT).then(|| (0..self.count).map(next).collect())
    }

    /// All whole numbers, if it has whole numbers.
    pub(super) fn integers<'a>(&self, file: &'a [u8]) -> Option<impl ExactSizeIterator<Item = i64> + use<'a>> {
        use kind::{I8, I16, I32, I64, U8, U16, U32, U64};
        let signed = [I8, I16, I32, I64].contains(&self.kind);
        self.entries(file, &[U8, I8, U16, I16, U32, I32, U64, I64]).map(move |entries| {
            entries.map(move |bytes| {
                let fill = if signed && bytes.last().is_some_and(|high| high & 0x80 != 0) { 0xff } else { 0 };
                let mut number = [fill; 8];
                number[..bytes.len()].copy_from_slice(bytes);
                i64::from_le_bytes(number)
            })
        })
    }

    /// All floating-point numbers, if it has any, as `f32`.
    pub(super) fn floats<'a>(&self, file: &'a [u8]) -> Option<impl ExactSizeIterator<Item = f32> + use<'a>> {
        let float = |bytes: &[u8]| match (bytes.first_chunk(), bytes.first_chunk()) {
            (_, Some(eight)) => f64::from_le_bytes(*eight) as f32,
            (four, None) => four.map_or(0.0, |four| f32::from_le_bytes(*four)),
        };
        self.entries(file, &[kind::F32, kind::F64]).map(|entries| entries.map(float))
    }
}

impl Value {
    /// What it is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Integer(_) | Self::Unsigned(_) => "a whole number out of the expected range or type",
            Self::Float(_) => "a floating-point number",
            Self::Bool(_) => "a truth value",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
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

    pub(super) fn as_list(&self) -> Option<&List> {
        if let Self::List(list) = self { Some(list) } else { None }
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
        kind::ARRAY => Value::List(list(reader, key, depth)?),
        kind::U64 => match reader.u64(|| key.into())? {
            number if number > i64::MAX as u64 => Value::Unsigned(number),
            number => Value::Integer(number as i64),
        },
        _ => Value::Integer(integer(reader, key, kind)?),
    })
}

fn list(reader: &mut Reader<'_>, key: &str, depth: u32) -> Result<List, GgufError> {
    let damaged = |why: &str| Err(GgufError::Invalid { what: key.into(), why: why.into() });
    if depth == 0 {
        return damaged("it is nested too deep");
    }
    let kind = reader.u32(|| format!("the element type of {key}"))?;
    let count = reader.u64(|| format!("the length of {key}"))?;
    let Some(least) = least_bytes(kind) else { return damaged(&format!("its element type is {kind}, which is none")) };
    // A count can lie, the bytes behind it cannot.
    let limit = reader.rest() / least;
    if count > limit {
        return Err(GgufError::TooMany { what: format!("the length of {key}"), got: count, limit });
    }
    let from = reader.at;
    match kind {
        kind::TEXT => {
            for _ in 0..count {
                reader.str(MAX_TEXT, || format!("an entry of {key}"))?;
            }
        }
        kind::ARRAY => {
            for _ in 0..count {
                list(reader, key, depth - 1)?;
            }
        }
        _ => {
            let bytes = reader.take(count * least, || key.into())?;
            if kind == kind::BOOL && bytes.iter().any(|byte| *byte > 1) {
                return damaged("a truth value that is neither 0 nor 1");
            }
            if kind == kind::U64 && bytes.chunks_exact(8).any(|number| number[7] & 0x80 != 0) {
                return damaged("a number is out of range");
            }
        }
    }
    Ok(List { kind, count: count as usize, place: from..reader.at })
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
