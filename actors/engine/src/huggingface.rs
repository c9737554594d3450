//! A model folder as Hugging Face has them (`config.json`, `tokenizer.json`, `*.safetensors`), read as the GGUF file
//! that llama.cpp's `convert_hf_to_gguf.py` would make of it: the same tensor names, the same metadata keys, the same
//! changes to weights. What cannot be converted is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::gguf::MetaValue;
use crate::quantize::{ConvertError, Source, SourceTensor};
use crate::safetensors::{Safetensors, SafetensorsError};

mod config;
mod family;
mod special;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod tests;

use config::Config;
use family::Family;
use tensors::{Origin, Weights};

/// The longest JSON file that is read: tokenizers of 256 Ki tokens have some 33 MB.
const MAX_JSON: u64 = 256 << 20;
/// The most files that a model's weights may be spread over.
const MAX_SHARDS: usize = 1_000;

/// Metadata in the order in which it is to be written.
type Metadata = Vec<(String, MetaValue)>;

/// The files of a model beside its weights.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// What is there, where nothing is on a disk.
    #[cfg(any(test, feature = "fuzz"))]
    files: Option<BTreeMap<&'static str, Vec<u8>>>,
}

/// An opened model folder.
#[derive(Debug)]
pub struct HuggingFace {
    folder: Folder,
    bytes: u64,
    metadata: Metadata,
    files: Vec<Safetensors>,
    tensors: Vec<SourceTensor>,
    origins: Vec<Origin>,
}

impl HuggingFace {
    /// Opens a folder, or the folder of one `.safetensors` file with that file's weights.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let (folder, files) = if path.is_dir() {
            (path.to_path_buf(), weight_files(path)?)
        } else {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            (folder.to_path_buf(), vec![path.to_path_buf()])
        };
        #[cfg(not(any(test, feature = "fuzz")))]
        let folder = Folder { path: folder };
        #[cfg(any(test, feature = "fuzz"))]
        let folder = Folder { path: folder, files: None };
        let open = || files.iter().map(|path| open_weights(path)).collect();
        Self::read(folder, open)
    }

    /// A folder that is nowhere, with one file of weights.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn in_memory(files: BTreeMap<&'static str, Vec<u8>>, weights: Vec<u8>) -> Result<Self, ConvertError> {
        let path = PathBuf::from("memory");
        let open = || Ok(vec![weights_of(Path::new("memory.safetensors"), Safetensors::from_bytes(weights))?]);
        Self::read(Folder { path, files: Some(files) }, open)
    }

    fn read(
        folder: Folder,
        open: impl FnOnce() -> Result<Vec<Safetensors>, ConvertError>,
    ) -> Result<Self, ConvertError> {
        let config = Config::new(folder.path.join("config.json"), folder.needed_json("config.json")?)?;
        let family = Family::of(&config)?;
        let files = open()?;
        let bytes = files.iter().map(Safetensors::file_bytes).sum();

        let mut metadata = vec![
            ("general.architecture".into(), MetaValue::Text(family.architecture().into())),
            ("general.type".into(), MetaValue::Text("model".into())),
            ("general.name".into(), MetaValue::Text(name_of(&folder.path))),
        ];
        metadata.extend(family.parameters(&config, &folder)?);
        let vocabulary = tokenizer::read(&folder, family, &config)?;
        let Weights { tensors, origins } = tensors::collect(&folder.path, &files, family, &config, vocabulary.known)?;
        metadata.extend(vocabulary.metadata);
        Ok(Self { folder, bytes, metadata, files, tensors, origins })
    }
}

impl Source for HuggingFace {
    fn path(&self) -> &Path {
        &self.folder.path
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn metadata(&self) -> Vec<(String, Vec<u8>)> {
        self.metadata.iter().map(|(key, value)| (key.clone(), value.bytes())).collect()
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read(&self, number: usize, rows: Range<u64>, out: &mut [f32]) -> Result<(), ConvertError> {
        self.origins[number].read(&self.files, &self.tensors[number], rows, out)
    }
}

/// The folder's name, also where the path ends in `.` or `..`.
fn name_of(folder: &Path) -> String {
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.into());
    whole.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn open_weights(path: &Path) -> Result<Safetensors, ConvertError> {
    weights_of(path, Safetensors::open(path))
}

fn weights_of(path: &Path, read: Result<Safetensors, SafetensorsError>) -> Result<Safetensors, ConvertError> {
    use SafetensorsError as E;
    read.map_err(|why| match why {
        E::Open(error) => ConvertError::Read { path: path.into(), error },
        E::Truncated { .. } => {
            ConvertError::Damaged { path: path.into(), what: "its length".into(), why: why.to_string() }
        }
        E::Invalid { what, why } => ConvertError::Damaged { path: path.into(), what, why },
    })
}

/// The weight files: those that the index names, else `model.safetensors`, else the only one.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ConvertError> {
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        let names = shards(&index, &json_of(&index, &read_bytes(&index)?)?)?;
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let read = |error| ConvertError::Read { path: folder.into(), error };
    let entries = fs::read_dir(folder).map_err(read)?.collect::<Result<Vec<_>, _>>().map_err(read)?;
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let found: Vec<_> = entries.into_iter().map(|entry| entry.path()).filter(is_weights).collect();
    let unsupported = |what: &str, hint: &str| {
        Err(ConvertError::Unsupported { path: folder.into(), what: what.into(), hint: hint.into() })
    };
    match found.len() {
        1 => Ok(found),
        0 => unsupported("a folder without *.safetensors", "older *.bin files can be saved anew as safetensors first"),
        _ => unsupported("a folder with several *.safetensors and no index", "name one of the files"),
    }
}

/// The files that an index names, each once.
pub(crate) fn shards(index: &Path, value: &Value) -> Result<Vec<String>, ConvertError> {
    let damaged = |why: String| ConvertError::Damaged { path: index.into(), what: "weight_map".into(), why };
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| damaged("it is missing".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| damaged(format!("the file of {tensor} is no text")))?;
        // Not out of the folder.
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(damaged(format!("the file of {tensor} is {file:?}, which is no plain file name")));
        }
        names.insert(file);
        if names.len() > MAX_SHARDS {
            return Err(damaged(format!("it names more than {MAX_SHARDS} files")));
        }
    }
    Ok(names.into_iter().map(ToString::to_string).collect())
}

impl Folder {
    /// The bytes of a file of bounded length, if it is there.
    fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        #[cfg(any(test, feature = "fuzz"))]
        if let Some(files) = &self.files {
            return Ok(files.get(name).cloned());
        }
        let path = self.path.join(name);
        if path.is_file() { read_bytes(&path).map(Some) } else { Ok(None) }
    }

    /// A file of JSON, if it is there.
    fn json(&self, name: &str) -> Result<Option<Value>, ConvertError> {
        self.bytes(name)?.map(|bytes| json_of(&self.path.join(name), &bytes)).transpose()
    }

    /// A file of JSON that must be there.
    fn needed_json(&self, name: &str) -> Result<Value, ConvertError> {
        let missing = || ConvertError::Read { path: self.path.join(name), error: std::io::ErrorKind::NotFound.into() };
        self.json(name)?.ok_or_else(missing)
    }

    /// A text file, if it is there.
    fn text(&self, name: &str) -> Result<Option<String>, ConvertError> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let why = |why: std::string::FromUtf8Error| why.to_string();
        let damaged = |why| ConvertError::Damaged { path: self.path.join(name), what: "its text".into(), why };
        String::from_utf8(bytes).map(Some).map_err(why).map_err(damaged)
    }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, ConvertError> {
    let read = |error| ConvertError::Read { path: path.into(), error };
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(read)?.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > MAX_JSON {
        let why = format!("it has more than {MAX_JSON} bytes");
        return Err(ConvertError::Damaged { path: path.into(), what: "its length".into(), why });
    }
    Ok(bytes)
}

fn json_of(path: &Path, bytes: &[u8]) -> Result<Value, ConvertError> {
    let damaged = |why: String| ConvertError::Damaged { path: path.into(), what: "its JSON".into(), why };
    serde_json::from_slice(bytes).map_err(|why| damaged(why.to_string()))
}

/// Tensors of all files with the number of their file; one name in two files is an error.
fn all_entries<'a>(
    folder: &Path,
    files: &'a [Safetensors],
) -> Result<BTreeMap<&'a str, (usize, &'a crate::safetensors::Entry)>, ConvertError> {
    let mut all = BTreeMap::new();
    for (number, file) in files.iter().enumerate() {
        for (name, entry) in file.tensors() {
            if all.insert(name.as_str(), (number, entry)).is_some() {
                let why = "it is in two files".into();
                return Err(ConvertError::Damaged { path: folder.into(), what: format!("tensor {name}"), why });
            }
        }
    }
    Ok(all)
}
