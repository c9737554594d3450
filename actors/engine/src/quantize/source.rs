//! Where weights come from.

use std::ops::Range;
use std::path::Path;

use super::ConvertError;
use crate::EngineError;
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError};

/// A tensor of the input, with the name and shape that it has in the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name as llama.cpp has it.
    pub name: String,
    /// Sizes, the fastest-moving first; none is 0.
    pub dimensions: Vec<u64>,
    /// What it is in.
    pub format: Format,
}

impl SourceTensor {
    /// Weights in all.
    pub fn weights(&self) -> u64 {
        self.dimensions.iter().product()
    }

    /// Weights of a row.
    pub fn row(&self) -> u64 {
        self.dimensions.first().copied().unwrap_or(1).max(1)
    }

    /// Rows.
    pub fn rows(&self) -> u64 {
        self.weights() / self.row()
    }
}

/// A model that can be read tensor by tensor.
pub trait Source: Send {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// Bytes of its files.
    fn bytes(&self) -> u64;

    /// Keys with types and values as GGUF encodes them, in the order in which they are to be written.
    fn metadata(&self) -> Vec<(String, Vec<u8>)>;

    /// The alignment that the metadata names.
    fn alignment(&self) -> Option<u32> {
        None
    }

    /// The tensors, in the order in which they are to be written.
    fn tensors(&self) -> &[SourceTensor];

    /// Some whole rows of the tensor of this number as `f32`: `out` has [`SourceTensor::row`] for each.
    fn read(&self, number: usize, rows: Range<u64>, out: &mut [f32]) -> Result<(), ConvertError>;

    /// The tensor's bytes in its own format, where the file has them as the output needs them.
    fn raw(&self, _number: usize) -> Option<&[u8]> {
        None
    }
}

/// A GGUF file.
#[derive(Debug)]
pub struct GgufSource {
    gguf: Gguf,
    tensors: Vec<SourceTensor>,
}

impl GgufSource {
    /// Opens the file. Tensors in formats that we cannot read are refused by name.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        Self::new(Gguf::open(path)?).map_err(|why| EngineError::Gguf { path: path.into(), why }.into())
    }

    pub(super) fn new(gguf: Gguf) -> Result<Self, GgufError> {
        let mut infos: Vec<_> = gguf.tensors().collect();
        infos.sort_by_key(|info| info.offset);
        let tensors = infos.into_iter().map(|info| {
            // Also known to have whole blocks and to lie in the file.
            gguf.tensor_bytes(info)?;
            let format = Format::of(info)?;
            Ok(SourceTensor { name: info.name.clone(), dimensions: info.dimensions.clone(), format })
        });
        let tensors = tensors.collect::<Result<Vec<_>, GgufError>>()?;
        Ok(Self { gguf, tensors })
    }
}

impl Source for GgufSource {
    fn path(&self) -> &Path {
        self.gguf.path()
    }

    fn bytes(&self) -> u64 {
        self.gguf.file_bytes()
    }

    fn metadata(&self) -> Vec<(String, Vec<u8>)> {
        self.gguf.raw_metadata().map(|(key, bytes)| (key.to_string(), bytes.to_vec())).collect()
    }

    fn alignment(&self) -> Option<u32> {
        self.gguf.number("general.alignment").ok().flatten()
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read(&self, number: usize, rows: Range<u64>, out: &mut [f32]) -> Result<(), ConvertError> {
        let tensor = &self.tensors[number];
        let bytes = self.raw(number).unwrap_or_default();
        let row_bytes = tensor.row() as usize / tensor.format.block_weights() * tensor.format.block_bytes();
        let place = rows.start as usize * row_bytes..rows.end as usize * row_bytes;
        let Some(bytes) = bytes.get(place) else {
            let why = format!("it has no rows {rows:?}");
            return Err(ConvertError::Damaged { path: self.path().into(), what: tensor.name.clone(), why });
        };
        tensor.format.dequantize_in_parallel(bytes, out);
        Ok(())
    }

    fn raw(&self, number: usize) -> Option<&[u8]> {
        let info = self.gguf.find_tensor(&self.tensors[number].name)?;
        self.gguf.tensor_bytes(info).ok()
    }
}
