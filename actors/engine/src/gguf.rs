//! A memory-mapped GGUF file (versions 2 and 3, little endian). Nothing in the file is believed: every count,
//! length, offset and alignment is checked against the file's length before anything is read or allocated, so a
//! damaged or hostile file gives an error that names the key or tensor, never a panic.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::EngineError;

mod value;
mod writer;
pub use value::{List, Value};
pub use writer::{MetaValue, Plan, PlannedTensor, WriteError};

#[cfg(test)]
pub(crate) mod tiny;

#[cfg(test)]
mod tests;

/// The most metadata entries of a file; real ones have some dozen. Each takes up to 200 bytes of memory.
const MAX_METADATA: u64 = 4096;
/// The most tensors of a file; real ones have some hundred. Each takes up to 300 bytes of memory.
const MAX_TENSORS: u64 = 65_536;
/// The most bytes of a key or of a tensor's name.
const MAX_NAME: u64 = 65_535;
/// How deep arrays may nest in metadata.
const MAX_DEPTH: u32 = 4;
/// GGUF's own bound.
const MAX_DIMENSIONS: u32 = 4;
/// Where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// What is wrong with a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// Another kind of file.
    #[error("this is not a GGUF file (it begins with {0:02x?})")]
    Magic(Vec<u8>),
    /// A version that we do not know.
    #[error("GGUF version {0} is not supported: versions 2 and 3 are")]
    Version(u32),
    /// It was written for the other byte order.
    #[error("this is a big-endian GGUF file: only little-endian ones are supported")]
    BigEndian,
    /// It ends too early.
    #[error("the file is truncated: {what} needs bytes {from}..{to}, the file has {length}; download it again")]
    Truncated {
        /// What reaches over the end.
        what: String,
        /// Its first byte.
        from: u64,
        /// The byte behind its last.
        to: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// A number that cannot be.
    #[error("the file is damaged: {what} is {got}, where at most {limit} is possible")]
    TooMany {
        /// What is counted.
        what: String,
        /// The number in the file.
        got: u64,
        /// The most that it may be.
        limit: u64,
    },
    /// A value that cannot be.
    #[error("the file is damaged: {what}: {why}")]
    Invalid {
        /// Which key or tensor.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A key or tensor that a model needs is not there.
    #[error("{0} is missing")]
    Missing(String),
    /// Weights in a format that we cannot read.
    #[error("tensor {tensor} is {format}, which is not supported; supported are {supported}")]
    Format {
        /// The tensor.
        tensor: String,
        /// Its format.
        format: String,
        /// What would do.
        supported: String,
    },
}

/// Where a tensor lies and how it is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Sizes, the fastest-moving first (`[in, out]` for a matrix whose rows are outputs).
    pub dimensions: Vec<u64>,
    /// Its format as ggml numbers it.
    pub format: u32,
    /// Elements in all.
    pub elements: u64,
    /// Where its bytes begin, from the start of the data section.
    pub offset: u64,
}

/// An opened file: its metadata and the places of its tensors.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    bytes: Bytes,
    version: u32,
    metadata: BTreeMap<String, Value>,
    /// Keys in the file's order, each with the bytes of its type and value.
    places: Vec<(String, Range<usize>)>,
    tensors: BTreeMap<String, TensorInfo>,
    data: u64,
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

impl Gguf {
    /// Maps the file and reads its head.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let cannot = |why| EngineError::Open { path: path.into(), why };
        let file = File::open(path).map_err(cannot)?;
        if !file.metadata().map_err(cannot)?.is_file() {
            return Err(cannot(std::io::Error::other("it is not a file")));
        }
        // Mapped so that the kernel may drop pages again and a second engine shares them.
        #[allow(unsafe_code)]
        // SAFETY: model files are written once (temp, fsync, rename) and never changed in place. Where somebody
        // truncates one all the same, the engine process gets a SIGBUS and dies alone; no bytes are trusted.
        let map = unsafe { Mmap::map(&file) }.map_err(cannot)?;
        Self::parse(path, Bytes::Mapped(map)).map_err(|why| EngineError::Gguf { path: path.into(), why })
    }

    /// Reads a file that is in memory.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        Self::parse(Path::new("memory.gguf"), Bytes::Owned(bytes))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self, GgufError> {
        let mut reader = Reader { bytes: &bytes, at: 0 };
        let magic = &bytes[..bytes.len().min(4)];
        if magic != b"GGUF" {
            return Err(GgufError::Magic(magic.to_vec()));
        }
        reader.take(4, || "the magic number".into())?;
        let version = reader.u32(|| "the version".into())?;
        match version {
            2 | 3 => {}
            // The same numbers read from the wrong end.
            0x0200_0000 | 0x0300_0000 => return Err(GgufError::BigEndian),
            other => return Err(GgufError::Version(other)),
        }
        let tensor_count = reader.count("the number of tensors", MAX_TENSORS)?;
        let metadata_count = reader.count("the number of metadata entries", MAX_METADATA)?;
        let (metadata, places) = read_metadata(&mut reader, metadata_count)?;
        let tensors = read_tensor_infos(&mut reader, tensor_count)?;
        let alignment = alignment(&metadata)?;
        let data = (reader.at as u64).next_multiple_of(alignment);
        let gguf = Self { path: path.into(), version, metadata, places, tensors, data, bytes };
        gguf.check_extents(alignment)?;
        Ok(gguf)
    }

    /// Tensors of formats that we can size are checked here, so that a truncated file is refused at once and not
    /// in the middle of loading.
    fn check_extents(&self, alignment: u64) -> Result<(), GgufError> {
        let mut places = Vec::with_capacity(self.tensors.len());
        for info in self.tensors.values() {
            if !info.offset.is_multiple_of(alignment) {
                let why = format!("its offset {} is not a multiple of the alignment {alignment}", info.offset);
                return Err(GgufError::Invalid { what: format!("tensor {}", info.name), why });
            }
            places.push(match crate::dequantize::Format::of(info) {
                Ok(format) => (self.extent(info, format.bytes_for(info)?)?, &info.name),
                Err(_) => (self.extent(info, 0)?, &info.name),
            });
        }
        // Tensors that share bytes would make a small file ask for any amount of memory.
        places.sort_by_key(|(place, _)| place.start);
        match places.windows(2).find(|pair| pair[1].0.start < pair[0].0.end) {
            Some(pair) => {
                let why = format!("it shares bytes with tensor {}", pair[0].1);
                Err(GgufError::Invalid { what: format!("tensor {}", pair[1].1), why })
            }
            None => Ok(()),
        }
    }

    fn extent(&self, info: &TensorInfo, bytes: u64) -> Result<Range<usize>, GgufError> {
        let length = self.bytes.len() as u64;
        let from = self.data.saturating_add(info.offset);
        let to = from.saturating_add(bytes);
        if to > length {
            return Err(GgufError::Truncated { what: format!("tensor {}", info.name), from, to, length });
        }
        // Both are at most the length of a slice.
        Ok(from as usize..to as usize)
    }

    /// Gives back the memory of pages that were read and will hardly be read again. They come back when they are.
    pub(crate) fn forget_pages(&self) {
        #[cfg(unix)]
        match &self.bytes {
            Bytes::Mapped(map) => {
                #[allow(unsafe_code)]
                // SAFETY: nobody wrote to the pages, so their content is the file's whenever they are read again.
                let forgotten = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
                if let Err(why) = forgotten {
                    tracing::debug!(%why, "the pages of the model file stay in memory");
                }
            }
            #[cfg(any(test, feature = "fuzz"))]
            Bytes::Owned(_) => {}
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// A tensor, if there is one of this name.
    pub fn find_tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A tensor that must be there.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.find_tensor(name).ok_or_else(|| GgufError::Missing(format!("tensor {name}")))
    }

    /// A tensor's bytes; refused where its format is none of ours.
    pub fn tensor_bytes(&self, info: &TensorInfo) -> Result<&[u8], GgufError> {
        let bytes = crate::dequantize::Format::of(info)?.bytes_for(info)?;
        Ok(&self.bytes[self.extent(info, bytes)?])
    }

    /// All metadata in the file's order, each value with its type as GGUF encodes them (the same in versions 2 and
    /// 3): what a copy of the file must hold bit for bit.
    pub fn raw_metadata(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.places.iter().map(|(key, place)| (key.as_str(), &self.bytes[place.clone()]))
    }

    /// A metadata value, if there is one under this key.
    pub fn find(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn typed<'a, T>(&'a self, key: &str, kind: &str, get: fn(&'a Value) -> Option<T>) -> Result<Option<T>, GgufError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| GgufError::Invalid {
            what: key.into(),
            why: format!("expected {kind}, the file has {}", value.kind()),
        })
    }

    /// A text, if there is one under this key; another type is an error.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A number from 0 to 2³²−1, if there is one under this key; another type is an error.
    pub fn number(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "a number from 0 to 4294967295", Value::as_u32)
    }

    /// A floating-point number, if there is one under this key; another type is an error.
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a floating-point number", Value::as_f32)
    }

    /// A truth value, if there is one under this key; another type is an error.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        get: impl FnOnce(&'a List) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(list) = self.typed(key, kind, Value::as_list)? else { return Ok(None) };
        let why = || format!("expected {kind}, the file has a list of something else");
        get(list).map(Some).ok_or_else(|| GgufError::Invalid { what: key.into(), why: why() })
    }

    /// A list of texts, if there is one under this key; another type is an error.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        self.list(key, "a list of texts", |list| list.texts(&self.bytes, key))?.transpose()
    }

    /// A list of whole numbers, if there is one under this key; another type is an error.
    pub fn integers(&self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = i64>>, GgufError> {
        self.list(key, "a list of whole numbers", |list| list.integers(&self.bytes))
    }

    /// A list of floating-point numbers, if there is one under this key; another type is an error.
    pub fn floats(&self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = f32>>, GgufError> {
        self.list(key, "a list of floating-point numbers", |list| list.floats(&self.bytes))
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u32() {
        Some(bytes) if bytes.is_power_of_two() && bytes <= 1 << 20 => Ok(bytes.into()),
        _ => Err(GgufError::Invalid {
            what: "general.alignment".into(),
            why: "it must be a power of two up to 1 MiB".into(),
        }),
    }
}

/// The values by key, and the keys in the file's order with the places of their types and values.
type Metadata = (BTreeMap<String, Value>, Vec<(String, Range<usize>)>);

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<Metadata, GgufError> {
    let (mut metadata, mut places) = (BTreeMap::new(), Vec::new());
    for n in 0..count {
        let key = reader.name(|| format!("the key of metadata entry {n}"))?;
        let from = reader.at;
        let kind = reader.u32(|| format!("the type of {key}"))?;
        let value = value::read(reader, &key, kind, MAX_DEPTH)?;
        places.push((key.clone(), from..reader.at));
        if metadata.insert(key.clone(), value).is_some() {
            return Err(GgufError::Invalid { what: key, why: "it is there twice".into() });
        }
    }
    Ok((metadata, places))
}

fn read_tensor_infos(reader: &mut Reader<'_>, count: u64) -> Result<BTreeMap<String, TensorInfo>, GgufError> {
    let mut tensors = BTreeMap::new();
    for n in 0..count {
        let name = reader.name(|| format!("the name of tensor {n}"))?;
        let what = || format!("the head of tensor {name}");
        let rank = reader.u32(what)?;
        if rank == 0 || rank > MAX_DIMENSIONS {
            let why = format!("it has {rank} dimensions, where 1 to {MAX_DIMENSIONS} are possible");
            return Err(GgufError::Invalid { what: format!("tensor {name}"), why });
        }
        let dimensions = (0..rank).map(|_| reader.u64(what)).collect::<Result<Vec<_>, _>>()?;
        let elements = dimensions.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let Some(elements) = elements.filter(|elements| (1..=1 << 48).contains(elements)) else {
            let why = format!("its dimensions {dimensions:?} are impossible");
            return Err(GgufError::Invalid { what: format!("tensor {name}"), why });
        };
        let format = reader.u32(what)?;
        let offset = reader.u64(what)?;
        let info = TensorInfo { name: name.clone(), dimensions, format, elements, offset };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(GgufError::Invalid { what: format!("tensor {name}"), why: "it is there twice".into() });
        }
    }
    Ok(tensors)
}

/// Takes little-endian values off the front of the file.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next `count` bytes. `what` is only called for the error.
    pub fn take(&mut self, count: u64, what: impl FnOnce() -> String) -> Result<&'a [u8], GgufError> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(count).ok().and_then(|count| rest.get(..count)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(GgufError::Truncated {
                what: what(),
                from: self.at as u64,
                to: (self.at as u64).saturating_add(count),
                length: self.bytes.len() as u64,
            }),
        }
    }

    pub fn array<const N: usize>(&mut self, what: impl FnOnce() -> String) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub fn u32(&mut self, what: impl FnOnce() -> String) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: impl FnOnce() -> String) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, GgufError> {
        match self.u64(|| what.into())? {
            got if got > limit => Err(GgufError::TooMany { what: what.into(), got, limit }),
            got => Ok(got),
        }
    }

    /// Bytes that are left.
    pub fn rest(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// A text with its length in front. `what` is only called for errors.
    pub fn text(&mut self, limit: u64, what: impl Fn() -> String) -> Result<String, GgufError> {
        self.str(limit, what).map(ToString::to_string)
    }

    /// [`Reader::text`], where it lies.
    fn str(&mut self, limit: u64, what: impl Fn() -> String) -> Result<&'a str, GgufError> {
        let length = self.u64(&what)?;
        if length > limit {
            return Err(GgufError::TooMany { what: format!("the length of {}", what()), got: length, limit });
        }
        let bytes = self.take(length, &what)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::Invalid { what: what(), why: "it is not valid UTF-8".into() })
    }

    fn name(&mut self, what: impl Fn() -> String) -> Result<String, GgufError> {
        self.text(MAX_NAME, what)
    }
}
