//! `tokenizer.json` → `tokenizer.ggml.*`: byte-level BPE (`gpt2`), SentencePiece-like BPE with byte fallback
//! (`llama`) and WordPiece (`bert`). Which token is of which type follows `get_vocab_base` and
//! `_create_vocab_sentencepiece` of llama.cpp's converter.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::Value;

use super::config::Config;
use super::family::Family;
use super::special;
use super::{Folder, Metadata};
use crate::gguf::MetaValue;
use crate::quantize::ConvertError;

/// The most tokens; real vocabularies stay below 2^19.
const MAX_TOKENS: u64 = 1 << 22;
/// The most tokens that a model has more than its tokenizer, to fill up; real ones have some thousand.
const MAX_PADDING: u64 = 1 << 14;
/// SentencePiece's mark for a space.
const SPACE: char = '\u{2581}';

/// Token types as ggml numbers them.
mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// A tokenizer as metadata.
pub(super) struct Vocabulary {
    pub metadata: Metadata,
    /// Tokens that `tokenizer.json` has, without those that only fill up to the model's size.
    pub known: u64,
}

/// A token that was added to the trained vocabulary.
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    special: bool,
}

/// The parts of `tokenizer.json` that every kind has.
pub(super) struct Json {
    pub path: PathBuf,
    pub root: Value,
    pub added: Vec<Added>,
    vocabulary: Vec<Option<String>>,
}

/// Tokens with their types.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
}

/// Reads the tokenizer of a model folder.
pub(super) fn read(folder: &Folder, family: Family, config: &Config) -> Result<Vocabulary, ConvertError> {
    let Some(root) = folder.json("tokenizer.json")? else {
        return Err(ConvertError::Unsupported {
            path: folder.path.clone(),
            what: "a folder without tokenizer.json".into(),
            hint: "load and save the tokenizer with a fast one of transformers, which writes it".into(),
        });
    };
    let settings = folder.json("tokenizer_config.json")?.unwrap_or(Value::Null);
    let size = u64::from(config.need(&["vocab_size"])?);
    let json = Json::new(folder.path.join("tokenizer.json"), root, size)?;
    let model = &json.root["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    let byte_fallback = model["byte_fallback"].as_bool() == Some(true);
    let (mut metadata, tokens) = match (kind, byte_fallback) {
        ("WordPiece", _) if family == Family::Bert => word_piece(&json)?,
        ("BPE", false) if family != Family::Bert => byte_level(&json)?,
        ("BPE", true) if family != Family::Bert => sentence_piece(&json, config)?,
        (kind, _) => {
            let what = format!("a {kind} tokenizer of a {} model", family.architecture());
            return Err(json.unsupported(what, "BPE can, and WordPiece for BERT"));
        }
    };
    let known = json.vocabulary.iter().flatten().count() as u64;
    metadata.extend(special::metadata(folder, &json, &settings, config, tokens.texts.len())?);
    Ok(Vocabulary { metadata, known })
}

impl Json {
    fn new(path: PathBuf, root: Value, size: u64) -> Result<Self, ConvertError> {
        let mut json = Self { path, root, added: Vec::new(), vocabulary: Vec::new() };
        if size > MAX_TOKENS {
            return Err(json.damaged("vocab_size", format!("it is {size}, at most {MAX_TOKENS} is possible")));
        }
        let listed = json.root["model"]["vocab"].as_object().map_or(0, serde_json::Map::len)
            + json.root["added_tokens"].as_array().map_or(0, Vec::len);
        if size > 2 * listed as u64 + MAX_PADDING {
            return Err(json.damaged("vocab_size", format!("it is {size}, of {listed} tokens in tokenizer.json")));
        }
        let mut vocabulary = vec![None; size as usize];
        let mut put = |text: &str, id: Option<u64>| {
            let place = id.and_then(|id| vocabulary.get_mut(usize::try_from(id).ok()?));
            place.map(|place: &mut Option<String>| *place = Some(text.into()))
        };
        let why = |text: &str| format!("the id of {text:?} is not below config.json's vocab_size, {size}");
        let Some(tokens) = json.root["model"]["vocab"].as_object() else {
            return Err(json.unsupported("a vocabulary that is no map".into(), "BPE and WordPiece have one"));
        };
        for (text, id) in tokens {
            put(text, id.as_u64()).ok_or_else(|| json.damaged("model.vocab", why(text)))?;
        }
        let mut added = Vec::new();
        for token in json.root["added_tokens"].as_array().into_iter().flatten() {
            let content = token["content"].as_str().unwrap_or_default();
            put(content, token["id"].as_u64()).ok_or_else(|| json.damaged("added_tokens", why(content)))?;
            let special = token["special"].as_bool() == Some(true);
            // Below `size`, as it was just put there.
            let id = token["id"].as_u64().unwrap_or(0) as u32;
            added.push(Added { id, content: content.into(), special });
        }
        json.added = added;
        json.vocabulary = vocabulary;
        Ok(json)
    }

    pub fn damaged(&self, what: &str, why: String) -> ConvertError {
        ConvertError::Damaged { path: self.path.clone(), what: what.into(), why }
    }

    fn unsupported(&self, what: String, hint: &str) -> ConvertError {
        ConvertError::Unsupported { path: self.path.clone(), what, hint: hint.into() }
    }

    /// All tokens by id; ids that have none are filled up. `normal` is the type of one that was not added.
    fn tokens(&self, normal: impl Fn(&str) -> i32) -> Tokens {
        let mut tokens = Tokens { texts: Vec::new(), kinds: Vec::new() };
        for (id, text) in self.vocabulary.iter().enumerate() {
            tokens.kinds.push(text.as_deref().map_or(kind::UNUSED, &normal));
            tokens.texts.push(text.clone().unwrap_or_else(|| format!("[PAD{id}]")));
        }
        for token in &self.added {
            let id = token.id as usize;
            if token.special || looks_special(&token.content) {
                tokens.kinds[id] = kind::CONTROL;
            } else {
                tokens.kinds[id] = kind::USER_DEFINED;
                // Such tokens are found in the text as it is, before spaces become marks.
                tokens.texts[id] = token.content.replace(SPACE, " ");
            }
        }
        tokens
    }

    /// Pairs that merge, the earliest first.
    fn merges(&self) -> Result<Vec<(String, String)>, ConvertError> {
        let Some(merges) = self.root["model"]["merges"].as_array() else {
            return Err(self.damaged("model.merges", "a list was expected".into()));
        };
        let pair = |merge: &Value| match merge {
            Value::String(text) => text.split_once(' ').map(|(a, b)| (a.into(), b.into())),
            Value::Array(pair) if pair.len() == 2 => Some((pair[0].as_str()?.into(), pair[1].as_str()?.into())),
            _ => None,
        };
        let pairs = merges.iter().map(|merge| {
            pair(merge).ok_or_else(|| self.damaged("model.merges", format!("{merge} is no pair of tokens")))
        });
        pairs.collect()
    }
}

/// Some files do not mark as special what is (`does_token_look_special`).
fn looks_special(token: &str) -> bool {
    let between = |from: &str, to: &str| token.starts_with(from) && token.ends_with(to);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&token)
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

fn head(model: &str, pre: &str, tokens: &Tokens, scores: Option<Vec<f32>>) -> Metadata {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut metadata = vec![
        (key("model"), MetaValue::Text(model.into())),
        (key("pre"), MetaValue::Text(pre.into())),
        (key("tokens"), MetaValue::Texts(tokens.texts.clone())),
    ];
    metadata.extend(scores.map(|scores| (key("scores"), MetaValue::F32s(scores))));
    metadata.push((key("token_type"), MetaValue::I32s(tokens.kinds.clone())));
    metadata
}

/// Regexes of `Split` pre-tokenizers, and llama.cpp's name for what they do.
const SPLITS: [(&str, &str); 2] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
];

fn byte_level(json: &Json) -> Result<(Metadata, Tokens), ConvertError> {
    let pre = pre_tokenizer(json)?;
    let tokens = json.tokens(|_| kind::NORMAL);
    let mut metadata = head("gpt2", pre, &tokens, None);
    // A space parts the two, so one inside of them is written as byte-level BPE shows it.
    let merges = json.merges()?.into_iter();
    let merges = merges.map(|(a, b)| format!("{} {}", a.replace(' ', "\u{120}"), b.replace(' ', "\u{120}")));
    metadata.push(("tokenizer.ggml.merges".into(), MetaValue::Texts(merges.collect())));
    Ok((metadata, tokens))
}

/// llama.cpp's name for how the text is cut before pairs are merged.
fn pre_tokenizer(json: &Json) -> Result<&'static str, ConvertError> {
    let whole = &json.root["pre_tokenizer"];
    let alone = std::slice::from_ref(whole);
    let steps = whole["pretokenizers"].as_array().map_or(alone, Vec::as_slice);
    let kind = |step: &Value| step["type"].as_str().unwrap_or("none").to_string();
    let kinds: Vec<String> = steps.iter().map(kind).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    // Where it is missing it is on, as tokenizers has it.
    let gpt2 = |step: &Value| step["use_regex"].as_bool() != Some(false);
    let known = match kinds.as_slice() {
        ["ByteLevel"] if gpt2(&steps[0]) => Some("gpt-2"),
        ["Digits", "ByteLevel"] if steps[0]["individual_digits"].as_bool() == Some(true) && gpt2(&steps[1]) => {
            Some("smollm")
        }
        ["Split", "ByteLevel"] if !gpt2(&steps[1]) => {
            let pattern = steps[0]["pattern"]["Regex"].as_str().unwrap_or_default();
            SPLITS.iter().find(|(known, _)| *known == pattern).map(|(_, name)| *name)
        }
        _ => None,
    };
    known.ok_or_else(|| {
        let what = format!("a tokenizer with the pre-tokenizer {}", shortened(&whole.to_string()));
        json.unsupported(what, "those of GPT-2, SmolLM, Llama 3 and Qwen 2 can")
    })
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= 200 { text.into() } else { text.chars().take(200).chain(['…']).collect() }
}

fn sentence_piece(json: &Json, config: &Config) -> Result<(Metadata, Tokens), ConvertError> {
    let unknown = json.root["model"]["unk_token"].as_str().unwrap_or("<unk>").to_string();
    let is_byte = |text: &str| text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
    let mut tokens = json.tokens(|text| if is_byte(text) { kind::BYTE } else { kind::NORMAL });
    for (text, kind) in tokens.texts.iter().zip(&mut tokens.kinds) {
        if *text == unknown {
            *kind = kind::UNKNOWN;
        }
    }
    // SentencePiece merges the pair whose product has the best score first: the rank of a merge, negated. What no
    // merge makes needs none.
    let mut scores = vec![0.0f32; tokens.texts.len()];
    let ids: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, text)| (text.as_str(), id)).collect();
    let mut rank = 0;
    let mut made = vec![false; scores.len()];
    for (a, b) in json.merges()? {
        let Some(id) = ids.get(format!("{a}{b}").as_str()) else {
            return Err(json.damaged("model.merges", format!("{a:?} and {b:?} make no token")));
        };
        if !std::mem::replace(&mut made[*id], true) {
            rank += 1;
            scores[*id] = -(rank as f32);
        }
    }
    for ((score, made), kind) in scores.iter_mut().zip(made).zip(&tokens.kinds) {
        match *kind {
            kind::CONTROL | kind::USER_DEFINED => *score = -1000.0,
            kind::UNUSED => *score = -10_000.0,
            kind::NORMAL if !made => *score = -(rank as f32) - 1.0,
            _ => {}
        }
    }
    let mut metadata = head("llama", "default", &tokens, Some(scores));
    let prefix = space_prefix(json, config)?;
    metadata.push(("tokenizer.ggml.add_space_prefix".into(), MetaValue::Bool(prefix)));
    Ok((metadata, tokens))
}

/// Whether a space is put in front of the text. What else a normalizer or pre-tokenizer does is refused.
fn space_prefix(json: &Json, config: &Config) -> Result<bool, ConvertError> {
    let flat = |value: &Value, list: &str| -> Vec<Value> {
        match value[list].as_array() {
            Some(steps) => steps.clone(),
            None if value.is_null() => Vec::new(),
            None => vec![value.clone()],
        }
    };
    let mut prefix = false;
    let normalizers = flat(&json.root["normalizer"], "normalizers");
    let pre_tokenizers = flat(&json.root["pre_tokenizer"], "pretokenizers");
    for step in normalizers.iter().chain(&pre_tokenizers) {
        let is_space = |text: &Value| text.as_str() == Some("\u{2581}");
        match step["type"].as_str().unwrap_or("none") {
            "Prepend" if is_space(&step["prepend"]) => prefix = true,
            "Replace" if step["pattern"]["String"] == " " && is_space(&step["content"]) => {}
            // Parts at spaces that are marks by now: it finds none.
            "Split" if step["pattern"]["String"] == " " => {}
            "Metaspace" if is_space(&step["replacement"]) => {
                prefix |= step["prepend_scheme"].as_str() != Some("never") && step["add_prefix_space"] != false;
            }
            other => {
                let what = format!("a {} tokenizer with the step {other}", config.text("model_type").unwrap_or("BPE"));
                return Err(json.unsupported(what, "with byte fallback, only spaces may become marks"));
            }
        }
    }
    Ok(prefix)
}

fn word_piece(json: &Json) -> Result<(Metadata, Tokens), ConvertError> {
    let prefix = json.root["model"]["continuing_subword_prefix"].as_str().unwrap_or("##");
    let normalizer = &json.root["normalizer"];
    if normalizer["type"].as_str() != Some("BertNormalizer") || normalizer["lowercase"].as_bool() == Some(false) {
        return Err(json.unsupported("a WordPiece tokenizer that keeps upper case".into(), "lower-case ones can"));
    }
    if prefix != "##" {
        return Err(json.unsupported(format!("WordPiece with the prefix {prefix:?}"), "\"##\" can"));
    }
    let mut tokens = json.tokens(|_| kind::NORMAL);
    // llama.cpp marks beginnings of words, where WordPiece marks continuations.
    for (text, kind) in tokens.texts.iter_mut().zip(&tokens.kinds) {
        if *kind != kind::CONTROL {
            *text = text.strip_prefix("##").map_or_else(|| format!("{SPACE}{text}"), ToString::to_string);
        }
    }
    // llama.cpp's name for what BERT's pre-tokenizer does.
    let mut metadata = head("bert", "jina-v2-en", &tokens, None);
    metadata.push(("tokenizer.ggml.normalizer.lowercase".into(), MetaValue::Bool(true)));
    Ok((metadata, tokens))
}
