//! Writes GGUF files, version 3. What the file will hold is planned first, so that its size is known before the
//! first byte is written; then the tensors come one after the other, in pieces, through a buffer. The file gets its
//! name only once it is whole and on the disk; until then it is a temporary one beside it, removed on any error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::value::kind;
use crate::dequantize::Format;

/// Where tensors begin is a multiple of this; written only if the metadata says nothing else.
const ALIGNMENT: u64 = 32;
const BUFFER: usize = 1 << 20;

/// A metadata value to be written, of exactly this type.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaValue {
    /// A `u32`.
    U32(u32),
    /// An `f32`.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// `i32`s.
    I32s(Vec<i32>),
    /// `f32`s.
    F32s(Vec<f32>),
}

impl MetaValue {
    /// Type and value as GGUF encodes them.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut head = |kinds: &[u32]| kinds.iter().for_each(|kind| out.extend(kind.to_le_bytes()));
        match self {
            Self::U32(_) => head(&[kind::U32]),
            Self::F32(_) => head(&[kind::F32]),
            Self::Bool(_) => head(&[kind::BOOL]),
            Self::Text(_) => head(&[kind::TEXT]),
            Self::Texts(_) => head(&[kind::ARRAY, kind::TEXT]),
            Self::I32s(_) => head(&[kind::ARRAY, kind::I32]),
            Self::F32s(_) => head(&[kind::ARRAY, kind::F32]),
        }
        let length = |out: &mut Vec<u8>, length: usize| out.extend((length as u64).to_le_bytes());
        match self {
            Self::U32(number) => out.extend(number.to_le_bytes()),
            Self::F32(number) => out.extend(number.to_le_bytes()),
            Self::Bool(truth) => out.push(u8::from(*truth)),
            Self::Text(text) => put_text(&mut out, text),
            Self::Texts(texts) => {
                length(&mut out, texts.len());
                texts.iter().for_each(|text| put_text(&mut out, text));
            }
            Self::I32s(numbers) => {
                length(&mut out, numbers.len());
                numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
            Self::F32s(numbers) => {
                length(&mut out, numbers.len());
                numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
        }
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Sizes, the fastest-moving first. The first is a multiple of the format's block.
    pub dimensions: Vec<u64>,
    /// Its format in the file.
    pub format: Format,
}

impl PlannedTensor {
    /// Its bytes in the file, without what is filled up behind it.
    pub fn bytes(&self) -> u64 {
        let weights: u64 = self.dimensions.iter().product();
        weights / self.format.block_weights() as u64 * self.format.block_bytes() as u64
    }
}

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is one of this name, and it was not to be replaced.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// The system says no.
    #[error("{} cannot be written: {error}", path.display())]
    Io {
        /// The file to be.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// All that a file will hold but the weights.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<PlannedTensor>,
    alignment: Option<u64>,
}

impl Plan {
    /// Sets a metadata entry, in the place of one of the same key where there is one.
    pub fn set(&mut self, key: &str, value: &MetaValue) {
        self.set_raw(key, value.bytes());
    }

    /// [`Plan::set`] with type and value as GGUF encodes them.
    pub fn set_raw(&mut self, key: &str, bytes: Vec<u8>) {
        match self.metadata.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => *old = bytes,
            None => self.metadata.push((key.into(), bytes)),
        }
    }

    /// The alignment that the metadata (`general.alignment`) asks for: a power of two.
    pub fn set_alignment(&mut self, bytes: u32) {
        debug_assert!(bytes.is_power_of_two());
        self.alignment = Some(bytes.into());
    }

    /// Adds a tensor behind those that are there.
    pub fn add(&mut self, tensor: PlannedTensor) {
        debug_assert!(
            tensor.dimensions.first().is_some_and(|n| n.is_multiple_of(tensor.format.block_weights() as u64))
        );
        self.tensors.push(tensor);
    }

    /// The tensors in their order.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|tensor| self.aligned(tensor.bytes())).sum();
        self.aligned(self.head().len() as u64) + data
    }

    fn aligned(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.alignment.unwrap_or(ALIGNMENT))
    }

    /// Everything before the weights.
    fn head(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, bytes) in &self.metadata {
            put_text(&mut out, key);
            out.extend(bytes);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.format.number().to_le_bytes());
            out.extend(u64::to_le_bytes(offset));
            offset += self.aligned(tensor.bytes());
        }
        out
    }

    /// Writes the file. `weights` is called for each tensor in order, with its number and where to write its
    /// [`bytes`](PlannedTensor::bytes); an error of it ends the writing and leaves nothing behind. With `replace` a
    /// file of that name is replaced, at once and as a whole.
    pub fn write<E: From<WriteError>>(
        &self,
        path: &Path,
        replace: bool,
        mut weights: impl FnMut(usize, &mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        let failed = |error| WriteError::Io { path: path.into(), error };
        let refuse = || match path.symlink_metadata() {
            Ok(_) if !replace => Err(WriteError::Exists(path.into())),
            _ => Ok(()),
        };
        refuse()?;
        let (temporary, file) = Temporary::beside(path).map_err(failed)?;
        let mut out = Counted { inner: BufWriter::with_capacity(BUFFER, file), written: 0 };
        let fill = |out: &mut Counted| {
            let zeros = vec![0; (self.aligned(out.written) - out.written) as usize];
            out.write_all(&zeros).map_err(failed)
        };
        out.write_all(&self.head()).map_err(failed)?;
        fill(&mut out)?;
        for (number, tensor) in self.tensors.iter().enumerate() {
            let before = out.written;
            weights(number, &mut out)?;
            if out.written - before != tensor.bytes() {
                let why = format!("{} bytes for tensor {} of {}", out.written - before, tensor.name, tensor.bytes());
                return Err(failed(io::Error::other(why)).into());
            }
            fill(&mut out)?;
        }
        let file = out.inner.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        refuse()?;
        temporary.publish(path).map_err(failed)?;
        Ok(())
    }
}

struct Counted {
    inner: BufWriter<File>,
    written: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A file that is removed unless it was published.
struct Temporary {
    path: PathBuf,
    published: bool,
}

impl Temporary {
    /// A new file in the same folder, so that a rename gives it its name at once.
    fn beside(path: &Path) -> io::Result<(Self, File)> {
        let name = path.file_name().ok_or_else(|| io::Error::other("this is no file name"))?;
        for n in 0..1000 {
            let hidden = format!(".{}.{}-{n}.part", name.to_string_lossy(), std::process::id());
            let path = path.with_file_name(hidden);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((Self { path, published: false }, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("too many temporary files of this name are there"))
    }

    fn publish(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.published = true;
        // The new name must survive a power cut too. Folders cannot be synced everywhere; the file is whole anyway.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests;
