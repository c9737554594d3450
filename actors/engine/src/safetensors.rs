//! A memory-mapped safetensors file: 8 bytes with the length of a JSON head, the head (name → type, shape, place),
//! the weights. Nothing in the file is believed: the head's length, every shape and every place is checked against
//! the file's length before anything is read, so a damaged or hostile file gives an error that names the tensor,
//! never a panic.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};

use crate::dequantize::Format;

#[cfg(test)]
mod tests;

/// The longest head; the format's own bound.
const MAX_HEAD: u64 = 100_000_000;
/// The most tensors.
const MAX_TENSORS: usize = 65_536;
/// The most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;
/// What is not a tensor in the head.
const METADATA: &str = "__metadata__";

/// Why a safetensors file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// The file cannot be opened or mapped.
    #[error("cannot be read: {0}")]
    Open(#[from] std::io::Error),
    /// It ends too early.
    #[error("the file is truncated: {what} needs {needed} bytes, the file has {length}; download it again")]
    Truncated {
        /// What reaches over the end.
        what: String,
        /// Bytes up to its end.
        needed: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// A value that cannot be.
    #[error("the file is damaged: {what}: {why}")]
    Invalid {
        /// What.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A tensor in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its type as the format names it: `F32`, `BF16` and so on.
    pub kind: String,
    /// Sizes, the slowest-moving first (`[out, in]` for a matrix).
    pub shape: Vec<u64>,
    /// Where its bytes are in the file.
    place: Range<usize>,
}

impl Entry {
    /// The format of its weights; `None` for types that no model weight has.
    pub fn format(&self) -> Option<Format> {
        match self.kind.as_str() {
            "F32" => Some(Format::F32),
            "F16" => Some(Format::F16),
            "BF16" => Some(Format::Bf16),
            _ => None,
        }
    }
}

/// An opened file.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    bytes: Bytes,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    #[cfg(any(test, feature = "fuzz"))]
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            #[cfg(any(test, feature = "fuzz"))]
            Self::Owned(bytes) => bytes,
        }
    }
}

/// The head as it is in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct Head(BTreeMap<String, RawEntry>);

impl<'de> Deserialize<'de> for Head {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Head;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Head, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<de::IgnoredAny>()?;
                        continue;
                    }
                    if entries.len() == MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let entry = map.next_value()?;
                    if entries.insert(name.clone(), entry).is_some() {
                        return Err(de::Error::custom(format!("tensor {name} is there twice")));
                    }
                }
                Ok(Head(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Bytes of one element.
fn element_bytes(kind: &str) -> Option<u64> {
    Some(match kind {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
        _ => return None,
    })
}

impl Safetensors {
    /// Maps the file and reads its head.
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("it is not a file").into());
        }
        #[allow(unsafe_code)]
        // SAFETY: as for GGUF files (see `Gguf::open`): no bytes are trusted, and whoever truncates the file while
        // it is read ends this process alone.
        let map = unsafe { Mmap::map(&file) }?;
        Self::parse(path, Bytes::Mapped(map))
    }

    /// Reads a file that is in memory.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Result<Self, SafetensorsError> {
        Self::parse(Path::new("memory.safetensors"), Bytes::Owned(bytes))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self, SafetensorsError> {
        let length = bytes.len() as u64;
        let truncated = |what: &str, needed: u64| SafetensorsError::Truncated { what: what.into(), needed, length };
        let invalid = |what: &str, why: String| SafetensorsError::Invalid { what: what.into(), why };
        let Some(first) = bytes.first_chunk::<8>() else { return Err(truncated("the length of its head", 8)) };
        let head_bytes = u64::from_le_bytes(*first);
        if head_bytes > MAX_HEAD {
            let why =
                format!("it would have {head_bytes} bytes, {MAX_HEAD} are possible (is this a safetensors file?)");
            return Err(invalid("the head", why));
        }
        let data = 8 + head_bytes as usize;
        let Some(head) = bytes.get(8..data) else { return Err(truncated("the head", data as u64)) };
        let head: Head = serde_json::from_slice(head).map_err(|why| invalid("the head", why.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, RawEntry { dtype, shape, data_offsets: (from, to) }) in head.0 {
            let what = format!("tensor {name}");
            let invalid = |why: String| Err(SafetensorsError::Invalid { what: what.clone(), why });
            let Some(size) = element_bytes(&dtype) else { return invalid(format!("its type {dtype:?} is not known")) };
            if shape.len() > MAX_DIMENSIONS {
                return invalid(format!("it has {} dimensions, {MAX_DIMENSIONS} are possible", shape.len()));
            }
            let needed = shape.iter().try_fold(size, |product, size| product.checked_mul(*size));
            let Some(needed) = needed.filter(|needed| *needed <= i64::MAX as u64) else {
                return invalid(format!("its shape {shape:?} is impossible"));
            };
            if to.checked_sub(from) != Some(needed) {
                return invalid(format!("it lies at {from}..{to}, its shape {shape:?} of {dtype} has {needed} bytes"));
            }
            // Up to here `to` may be anything; the sum below cannot overflow for a file that long.
            let end = to.saturating_add(data as u64);
            if end > length {
                return Err(truncated(&what, end));
            }
            let place = data + from as usize..data + to as usize;
            tensors.insert(name, Entry { kind: dtype, shape, place });
        }
        check_overlap(&tensors)?;
        Ok(Self { path: path.into(), bytes, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    /// The bytes of a tensor of this file.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        self.bytes.get(entry.place.clone()).unwrap_or_default()
    }
}

/// Tensors that share bytes would make a small file a large model.
fn check_overlap(tensors: &BTreeMap<String, Entry>) -> Result<(), SafetensorsError> {
    let mut places: Vec<_> = tensors.iter().filter(|(_, entry)| !entry.place.is_empty()).collect();
    places.sort_by_key(|(_, entry)| entry.place.start);
    match places.windows(2).find(|pair| pair[1].1.place.start < pair[0].1.place.end) {
        Some(pair) => Err(SafetensorsError::Invalid {
            what: format!("tensor {}", pair[1].0),
            why: format!("it shares bytes with tensor {}", pair[0].0),
        }),
        None => Ok(()),
    }
}
