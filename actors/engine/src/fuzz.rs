//! What the fuzz targets call (`fuzz/` beside this crate): each function takes any bytes, gives them to one reader and
//! does with the result what a loader would. None may panic, hang or allocate much. Tests call them with the seeds.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ingle_protocol::wire::v2::{Message, Role};

use crate::gguf::{Gguf, MetaValue};
use crate::huggingface::HuggingFace;
use crate::model::{Hyperparameters, Model};
use crate::quantize::Source;
use crate::safetensors::Safetensors;
use crate::text::{ChatTemplate, Codec, Conversation, Detokenizer, Special, Tokenizer};
use crate::{DeviceChoice, ModelOptions, StepEngine, StepEntry};

mod registry;
mod wire;
pub use registry::registry;
pub use wire::wire;

#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

/// Zeros behind the head of a model, so that the fuzzer need not find out weights.
pub const WEIGHTS: usize = 128 << 10;
/// Names of all targets.
pub const TARGETS: [&str; 8] = ["gguf", "model", "safetensors", "folder", "tokenizer", "template", "wire", "registry"];

/// Runs the target of this name.
pub fn run(target: &str, data: &[u8]) {
    match target {
        "gguf" => gguf(data),
        "model" => model(data),
        "safetensors" => safetensors(data),
        "folder" => folder(data),
        "tokenizer" => tokenizer(data),
        "template" => template(data),
        "registry" => registry(data),
        _ => wire(data),
    }
}

/// A GGUF file: its metadata, the places of its tensors, and the numbers that make a model.
pub fn gguf(data: &[u8]) {
    let Ok(gguf) = Gguf::from_bytes(data.to_vec()) else { return };
    for info in gguf.tensors() {
        if let Ok(bytes) = gguf.tensor_bytes(info) {
            assert!(bytes.len() <= data.len());
        }
    }
    for (key, bytes) in gguf.raw_metadata() {
        assert!(!bytes.is_empty() && gguf.find(key).is_some());
        let _ = (gguf.text(key), gguf.number(key), gguf.float(key), gguf.boolean(key));
        let _ = gguf.texts(key);
        let _ = gguf.integers(key).map(|list| list.map(|list| assert_eq!(list.len(), list.count())));
        let _ = gguf.floats(key).map(|list| list.map(|list| assert_eq!(list.len(), list.count())));
    }
    let _ = Hyperparameters::from_gguf(&gguf);
}

/// The head of a model, with weights of zeros behind it: loaded, packed, and two tokens computed.
pub fn model(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.resize(data.len() + WEIGHTS, 0);
    let Ok(gguf) = Gguf::from_bytes(bytes) else { return };
    let Ok(placement) = crate::device::choose(DeviceChoice::Cpu) else { return };
    let options = ModelOptions { slots: 1, context_length: Some(32), threads: Some(1), ..ModelOptions::default() };
    let Ok(mut model) = Model::load(Arc::new(gguf), placement, &options) else { return };
    let blocks: Vec<u32> = (0..model.capabilities().blocks).collect();
    let last = model.capabilities().vocabulary - 1;
    let entry = |token, position| StepEntry { token, slot: 0, position };
    if model.assign(0, &blocks, 0).is_ok() {
        assert!(model.step(&[entry(0, 0), entry(last, 1)], &[1]).is_ok());
    }
}

/// The index of a model's weight files where the first byte is odd, else a safetensors file.
pub fn safetensors(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    if first % 2 == 1 {
        let Ok(value) = serde_json::from_slice(data) else { return };
        for name in crate::huggingface::shards(Path::new("index.json"), &value).unwrap_or_default() {
            assert!(Path::new(&name).components().count() == 1 && name != "..", "{name}");
        }
        return;
    }
    let Ok(file) = Safetensors::from_bytes(data.to_vec()) else { return };
    for entry in file.tensors().values() {
        let elements = entry.shape.iter().product::<u64>();
        assert_eq!(file.bytes(entry).is_empty(), elements == 0);
        if let Some(format) = entry.format() {
            assert_eq!(file.bytes(entry).len() as u64, elements * format.block_bytes() as u64);
        }
    }
}

/// `N` parts with zero bytes between them; the last has the rest.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut parts = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// A model folder: `config.json`, `tokenizer.json`, `tokenizer_config.json` and the head of a safetensors file, with
/// zeros behind it as weights. Nothing is written: what is read from disks is the same, but for the reading.
pub fn folder(data: &[u8]) {
    let [config, tokenizer, settings, head] = parts(data);
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    let files: BTreeMap<_, _> = names.into_iter().zip([config, tokenizer, settings].map(<[u8]>::to_vec)).collect();
    let weights = [&(head.len() as u64).to_le_bytes(), head, &[0; 16 << 10]].concat();
    let Ok(source) = HuggingFace::in_memory(files, weights) else { return };
    for (number, tensor) in source.tensors().iter().enumerate() {
        let row = tensor.dimensions.first().copied().unwrap_or(0);
        if row <= 64 << 10 {
            assert!(source.read(number, 0..1, &mut vec![0.0; row as usize]).is_ok());
        }
    }
    let _ = source.metadata();
}

/// The chat template of [`tokenizer`]: one of its own would be most of a run, and is what [`template`] is for.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<e>{{ m.role }} {{ m.content }}{% endfor %}";

/// A tokenizer, and a text that it is used on. The parts: settings (one byte each: type, variant, flags), tokens (the
/// first byte of each says its type), merges, the text; tokens and merges end in line breaks.
pub fn tokenizer(data: &[u8]) {
    let [settings, tokens, merges, text] = parts(data);
    let Ok(gguf) = Gguf::from_bytes(tokenizer_file(settings, tokens, merges)) else { return };
    let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) else { return };
    let text = String::from_utf8_lossy(text);
    let check = |ids: Vec<u32>| {
        assert!(ids.iter().all(|id| *id < tokenizer.vocabulary()), "{ids:?}");
        let _ = tokenizer.decode(&ids);
        ids
    };
    for special in [Special::AsText, Special::Parse] {
        let ids = tokenizer.encode(&text, special).map(check).unwrap_or_default();
        let mut detokenizer = Detokenizer::new(&[text.chars().skip(2).take(2).collect(), "<end>".into()]);
        let whole = ids.iter().all(|id| std::str::from_utf8(&detokenizer.push(&tokenizer, *id).text).is_ok());
        assert!(whole && std::str::from_utf8(&detokenizer.finish().text).is_ok());
        let _ = ids.iter().any(|id| tokenizer.is_end(*id) || tokenizer.bytes(*id).len() > tokenizer.longest());
    }
    let _ = tokenizer.passage(&text).map(check);
    let _ = tokenizer.prompt(&messages(&text), b"").map(check);
}

fn messages(text: &str) -> [Message; 2] {
    let message = |role, content: &str| Message { role, content: content.into(), extra: vec![] };
    [message(Role::System, "Be kind."), message(Role::User, text)]
}

/// The head of a GGUF file with a tokenizer in it.
fn tokenizer_file(settings: &[u8], tokens: &[u8], merges: &[u8]) -> Vec<u8> {
    const MODELS: [&str; 3] = ["gpt2", "llama", "bert"];
    const VARIANTS: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"];
    const ROLES: [&str; 6] = ["bos", "eos", "unknown", "seperator", "cls", "eot"];
    let setting = |n: usize| usize::from(settings.get(n).copied().unwrap_or(0));
    let lines = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes);
        text.split_terminator('\n').map(ToString::to_string).collect()
    };
    let (mut texts, mut kinds, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for (number, line) in lines(tokens).iter().enumerate() {
        let mut characters = line.chars();
        let kind = characters.next().map_or(1, |kind| kind as u32);
        texts.push(characters.as_str().to_string());
        kinds.push((kind % 8) as i32);
        scores.push(if kind % 31 == 0 { f32::NAN } else { -(number as f32) });
    }
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut metadata = vec![
        ("general.architecture".into(), MetaValue::Text(if setting(2) & 1 == 1 { "phi3" } else { "llama" }.into())),
        (key("model"), MetaValue::Text(MODELS[setting(0) % 3].into())),
        (key("pre"), MetaValue::Text(VARIANTS[setting(1) % 0x80 % 6].into())),
        (key("tokens"), MetaValue::Texts(texts)),
        (key("token_type"), MetaValue::I32s(kinds)),
        (key("scores"), MetaValue::F32s(scores)),
        (key("merges"), MetaValue::Texts(lines(merges))),
    ];
    for (bit, name) in ["add_bos_token", "add_eos_token", "add_space_prefix"].iter().enumerate() {
        if setting(2) >> (2 * bit + 1) & 1 == 1 {
            metadata.push((key(name), MetaValue::Bool(setting(2) >> (2 * bit + 2) & 1 == 1)));
        }
    }
    for (n, role) in ROLES.iter().enumerate() {
        // 255 and what is missing is none.
        if let Some(id) = settings.get(3 + n).filter(|id| **id != 255) {
            metadata.push((key(&format!("{role}_token_id")), MetaValue::U32((*id).into())));
        }
    }
    if setting(1) & 0x80 != 0 {
        metadata.push(("tokenizer.chat_template".into(), MetaValue::Text(TEMPLATE.into())));
    }
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(key.bytes());
        out.extend(value.bytes());
    }
    out
}

/// A chat template, the text of a message, and the request's further members.
pub fn template(data: &[u8]) {
    let [source, text, extra] = parts(data);
    let Ok(source) = std::str::from_utf8(source) else { return };
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return };
    let text = String::from_utf8_lossy(text);
    let mut messages = messages(&text).to_vec();
    let calls = r#"{"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"a\":[1]}"}}]}"#;
    messages.push(Message { role: Role::Assistant, content: String::new(), extra: calls.into() });
    messages.push(Message { role: Role::Tool, content: text.into(), extra: extra.into() });
    if let Ok(conversation) = Conversation::new(&messages, br#"{"tools":[{"name":"f"}]}"#) {
        let _ = template.render(&conversation);
    }
    if let Ok(conversation) = Conversation::new(&messages[..2], extra) {
        let _ = template.render(&conversation);
    }
}
