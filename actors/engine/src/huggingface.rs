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
use crate::safetensors::Safetensors;

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

/// An opened model folder.
#[derive(Debug)]
pub struct HuggingFace {
    folder: PathBuf,
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
        let config = Config::new(folder.join("config.json"), read_json(&folder.join("config.json"))?)?;
        let family = Family::of(&config)?;
        let files = files.iter().map(|path| open_weights(path)).collect::<Result<Vec<_>, _>>()?;
        let bytes = files.iter().map(Safetensors::file_bytes).sum();

        let mut metadata = vec![
            ("general.architecture".into(), MetaValue::Text(family.architecture().into())),
            ("general.type".into(), MetaValue::Text("model".into())),
            ("general.name".into(), MetaValue::Text(name_of(&folder))),
        ];
        metadata.extend(family.parameters(&config, &folder)?);
        let vocabulary = tokenizer::read(&folder, family, &config)?;
        let Weights { tensors, origins } = tensors::collect(&folder, &files, family, &config, vocabulary.known)?;
        metadata.extend(vocabulary.metadata);
        Ok(Self { folder, bytes, metadata, files, tensors, origins })
    }
}

impl Source for HuggingFace {
    fn path(&self) -> &Path {
        &self.folder
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
    use crate::safetensors::SafetensorsError as E;
    Safetensors::open(path).map_err(|why| match why {
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
        let names = shards(&index, &read_json(&index)?)?;
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

/// Reads a file of JSON of bounded length.
fn read_json(path: &Path) -> Result<Value, ConvertError> {
    let read = |error| ConvertError::Read { path: path.into(), error };
    let damaged = |why: String| ConvertError::Damaged { path: path.into(), what: "its JSON".into(), why };
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(read)?.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(damaged(format!("it has more than {MAX_JSON} bytes")));
    }
    serde_json::from_slice(&bytes).map_err(|why| damaged(why.to_string()))
}

/// [`read_json`] of a file that need not be there.
fn read_optional_json(path: &Path) -> Result<Option<Value>, ConvertError> {
    if path.is_file() { read_json(path).map(Some) } else { Ok(None) }
}

/// A text file that need not be there.
fn read_optional_text(path: &Path) -> Result<Option<String>, ConvertError> {
    if !path.is_file() {
        return Ok(None);
    }
    fs::read_to_string(path).map(Some).map_err(|error| ConvertError::Read { path: path.into(), error })
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
