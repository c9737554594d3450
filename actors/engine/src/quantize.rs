//! Model files in another format: `f32` → INT8 and below, and back. The input is a GGUF file or a model folder as
//! Hugging Face has them ([`crate::huggingface`]); the output is a GGUF file.
//!
//! Weights stream through in pieces of whole rows, so memory stays bounded however large a tensor is. Each block is
//! encoded from its own weights alone: the file is the same on every machine and for any number of threads.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::EngineError;
use crate::dequantize::Format;
use crate::gguf::{MetaValue, Plan, PlannedTensor, WriteError};
use crate::huggingface::HuggingFace;

mod encode;
mod k_quants;
mod mixture;
mod source;

#[cfg(test)]
mod tests;

pub use mixture::{Fallback, Target};
pub use source::{GgufSource, Source, SourceTensor};

/// Weights that are in memory at once, as `f32`: 4 MiB, or one row where that is more.
const PIECE: u64 = 1 << 20;
/// The version of ggml's block layouts (`GGML_QUANT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The GGUF file cannot be read.
    #[error(transparent)]
    Input(#[from] EngineError),
    /// The output cannot be written.
    #[error(transparent)]
    Output(#[from] WriteError),
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: the file is damaged: {what}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which key or tensor.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The model is sound, but we cannot convert it.
    #[error("{}: {what} cannot be converted: {hint}", path.display())]
    Unsupported {
        /// The file or folder.
        path: PathBuf,
        /// What it has or is.
        what: String,
        /// What could be, or what to do.
        hint: String,
    },
    /// Rounding twice was not asked for.
    #[error(
        "{} is quantized already: {tensor} and others are {format}. Rounding a second time adds to the first error. \
         Start from a file with f32, f16 or bf16 weights, or ask for it all the same (--requantize).",
        path.display()
    )]
    AlreadyQuantized {
        /// The file.
        path: PathBuf,
        /// A tensor.
        tensor: String,
        /// What it is in.
        format: String,
    },
    /// A weight that the format has no room for.
    #[error("tensor {tensor} holds a weight of {weight}, which {format} cannot hold; {hint}")]
    Weight {
        /// The tensor.
        tensor: String,
        /// The weight.
        weight: f32,
        /// The format.
        format: String,
        /// What to do.
        hint: &'static str,
    },
    /// The caller does not want it any more.
    #[error("cancelled; what was written of the new file is removed")]
    Cancelled,
}

/// Opens what `path` is: a GGUF file, a `.safetensors` file (its folder says what model it is) or such a folder.
pub fn open(path: &Path) -> Result<Box<dyn Source>, ConvertError> {
    let is_safetensors = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors"));
    Ok(if path.is_dir() || is_safetensors {
        Box::new(HuggingFace::open(path)?)
    } else {
        Box::new(GgufSource::open(path)?)
    })
}

/// A conversion that is thought through but not yet begun.
pub struct Conversion {
    source: Box<dyn Source>,
    plan: Plan,
    fallbacks: Vec<Fallback>,
    requantized: bool,
}

/// Tensors of one format in a new file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatShare {
    /// The format, as ggml names it.
    pub format: String,
    /// How many tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl std::fmt::Debug for Conversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversion").field("plan", &self.plan).field("fallbacks", &self.fallbacks).finish()
    }
}

impl Conversion {
    /// Decides what each tensor becomes. Already quantized tensors are refused unless `requantize` is set; one that
    /// keeps its format is copied as it is.
    pub fn plan(source: Box<dyn Source>, target: Target, requantize: bool) -> Result<Self, ConvertError> {
        let mut plan = Plan::default();
        for (key, bytes) in source.metadata() {
            plan.set_raw(&key, bytes);
        }
        plan.set("general.file_type", &MetaValue::U32(target.file_type()));
        plan.set("general.quantization_version", &MetaValue::U32(QUANTIZATION_VERSION));
        if let Some(bytes) = source.alignment() {
            plan.set_alignment(bytes);
        }
        let (mut fallbacks, mut requantized) = (Vec::new(), false);
        let has_output = source.tensors().iter().any(|tensor| tensor.name == mixture::OUTPUT);
        for tensor in source.tensors() {
            let (format, fallback) = target.format_for(&tensor.name, &tensor.dimensions, has_output);
            if tensor.format.is_quantized() && tensor.format != format {
                if !requantize {
                    return Err(ConvertError::AlreadyQuantized {
                        path: source.path().into(),
                        tensor: tensor.name.clone(),
                        format: tensor.format.name(),
                    });
                }
                requantized = true;
            }
            fallbacks.extend(fallback);
            plan.add(PlannedTensor { name: tensor.name.clone(), dimensions: tensor.dimensions.clone(), format });
        }
        Ok(Self { source, plan, fallbacks, requantized })
    }

    /// Bytes of the file to be.
    pub fn file_bytes(&self) -> u64 {
        self.plan.file_bytes()
    }

    /// Bytes of the input's files.
    pub fn input_bytes(&self) -> u64 {
        self.source.bytes()
    }

    /// Tensors that get another format than was asked for, and why.
    pub fn fallbacks(&self) -> &[Fallback] {
        &self.fallbacks
    }

    /// True where weights that were rounded before are rounded again.
    pub fn is_requantization(&self) -> bool {
        self.requantized
    }

    /// Weights in all.
    pub fn weights(&self) -> u64 {
        self.source.tensors().iter().map(SourceTensor::weights).sum()
    }

    /// What of the file is in which format, the largest share first.
    pub fn shares(&self) -> Vec<FormatShare> {
        let mut shares: Vec<FormatShare> = Vec::new();
        for tensor in self.plan.tensors() {
            let format = tensor.format.name();
            let at = shares.iter().position(|share| share.format == format).unwrap_or_else(|| {
                shares.push(FormatShare { format, tensors: 0, bytes: 0 });
                shares.len() - 1
            });
            shares[at].tensors += 1;
            shares[at].bytes += tensor.bytes();
        }
        shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        shares
    }

    /// Writes the file: all of it or, on any error, nothing. Blocks, on all cores. `progress` is told weights done
    /// and in all; setting `cancelled` ends it soon.
    pub fn write(
        &self,
        path: &Path,
        replace: bool,
        cancelled: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), ConvertError> {
        let all = self.weights();
        let mut done = 0;
        self.plan.write(path, replace, |number, out| {
            let tensor = &self.source.tensors()[number];
            let format = self.plan.tensors()[number].format;
            let failed = |error| WriteError::Io { path: path.into(), error };
            if let Some(bytes) = self.source.raw(number).filter(|_| tensor.format == format) {
                for piece in bytes.chunks(PIECE as usize) {
                    stop_if(cancelled)?;
                    out.write_all(piece).map_err(failed)?;
                }
                done += tensor.weights();
                progress(done, all);
                return Ok(());
            }
            self.pieces(number, format, cancelled, |bytes, weights| {
                out.write_all(bytes).map_err(failed)?;
                done += weights;
                progress(done, all);
                Ok(())
            })
        })
    }

    /// Gives a tensor, encoded, piece by piece.
    fn pieces(
        &self,
        number: usize,
        format: Format,
        cancelled: &AtomicBool,
        mut take: impl FnMut(&[u8], u64) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let tensor = &self.source.tensors()[number];
        let (width, rows) = (tensor.row(), tensor.rows());
        let step = (PIECE / width).max(1);
        let (mut weights, mut bytes) = (Vec::new(), Vec::new());
        let mut from = 0;
        while from < rows {
            stop_if(cancelled)?;
            let to = (from + step).min(rows);
            // Both fit: a row is bounded by the input file, which is mapped.
            let count = ((to - from) * width) as usize;
            weights.resize(count, 0.0f32);
            self.source.read(number, from..to, &mut weights)?;
            check(&tensor.name, format, &weights)?;
            bytes.resize(count / format.block_weights() * format.block_bytes(), 0u8);
            format.quantize(&weights, &mut bytes);
            take(&bytes, count as u64)?;
            from = to;
        }
        Ok(())
    }
}

fn stop_if(cancelled: &AtomicBool) -> Result<(), ConvertError> {
    if cancelled.load(Ordering::Relaxed) { Err(ConvertError::Cancelled) } else { Ok(()) }
}

/// Refuses weights that would become others altogether.
fn check(tensor: &str, format: Format, weights: &[f32]) -> Result<(), ConvertError> {
    // Not `any(x.abs() > largest)`: that is false for NaN.
    let holds = |weight: &f32| weight.abs() <= format.largest();
    match weights.iter().find(|weight| !holds(weight)) {
        None => Ok(()),
        Some(weight) => Err(ConvertError::Weight {
            tensor: tensor.into(),
            weight: *weight,
            format: format.name(),
            hint: if weight.is_finite() { "use bf16 or f32" } else { "the model itself is damaged" },
        }),
    }
}

/// For tests and small models: the file in memory.
#[cfg(test)]
fn convert(source: Box<dyn Source>, target: Target) -> Result<Vec<u8>, ConvertError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    Conversion::plan(source, target, true)?.write(&path, false, &AtomicBool::new(false), &mut |_, _| ())?;
    Ok(std::fs::read(path).unwrap())
}
