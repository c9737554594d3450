//! Which token begins, ends and fills, and the chat template: what `SpecialVocab` of the `gguf` package reads from
//! `tokenizer.json`, `tokenizer_config.json` and `config.json`.

use serde_json::Value;

use super::config::Config;
use super::tokenizer::Json;
use super::{Folder, Metadata};
use crate::gguf::MetaValue;
use crate::quantize::ConvertError;

/// Names of special tokens in Hugging Face's files and in GGUF ("seperator" is how GGUF spells it).
const NAMES: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
];

/// The ids, what is added to every text, and the template. `count`: tokens of the vocabulary.
pub(super) fn metadata(
    folder: &Folder,
    json: &Json,
    settings: &Value,
    config: &Config,
    count: usize,
) -> Result<Metadata, ConvertError> {
    let mut metadata = Metadata::new();
    let text_of = |name: &str| {
        let entry = &settings[format!("{name}_token")];
        entry.as_str().or_else(|| entry["content"].as_str()).map(ToString::to_string)
    };
    let mut texts: Vec<Option<String>> = NAMES.iter().map(|(name, _)| text_of(name)).collect();
    let at = |name: &str| NAMES.iter().position(|(known, _)| *known == name).unwrap_or(0);
    // BERT names its first and last tokens otherwise.
    texts[at("bos")] = texts[at("bos")].take().or_else(|| texts[at("cls")].clone());
    texts[at("eos")] = texts[at("eos")].take().or_else(|| texts[at("sep")].clone());

    let (first, last) = around(&json.root["post_processor"]);
    let mut add = [("bos", false), ("eos", false)];
    if let Some(first) = first {
        add[0].1 = [at("bos"), at("cls")].iter().any(|at| texts[*at].as_deref() == Some(first.as_str()));
    }
    let mut end_of_turn = None;
    if let Some(last) = last {
        // What a text ends with is its end; what was named so ends a turn.
        if texts[at("eos")].as_deref() != Some(last.as_str()) {
            end_of_turn = texts[at("eos")].replace(last);
        }
        add[1].1 = true;
    }
    let id_of = |text: &str| json.added.iter().find(|token| token.content == text).map(|token| token.id);
    let number = |name: &str| config.get(&format!("{name}_token_id")).and_then(Value::as_u64);
    let in_range = |id: &u64| usize::try_from(*id).is_ok_and(|id| id < count);
    for ((name, key), text) in NAMES.iter().zip(&texts) {
        let by_text = text.as_deref().and_then(id_of);
        let id = by_text.or_else(|| number(name).filter(in_range).map(|id| id as u32));
        metadata.extend(id.map(|id| (format!("tokenizer.ggml.{key}_token_id"), MetaValue::U32(id))));
    }
    if let Some(id) = end_of_turn.as_deref().and_then(id_of) {
        metadata.push(("tokenizer.ggml.eot_token_id".into(), MetaValue::U32(id)));
    }
    for (name, adds) in add {
        // Always said, as what holds where it is not said differs from program to program.
        let adds = settings[format!("add_{name}_token")].as_bool().unwrap_or(adds);
        metadata.push((format!("tokenizer.ggml.add_{name}_token"), MetaValue::Bool(adds)));
    }
    if let Some(template) = chat_template(folder, settings)? {
        metadata.push(("tokenizer.chat_template".into(), MetaValue::Text(template)));
    }
    Ok(metadata)
}

/// The special tokens that a template puts before and behind a text.
fn around(processor: &Value) -> (Option<String>, Option<String>) {
    let alone = std::slice::from_ref(processor);
    let all = processor["processors"].as_array().map_or(alone, Vec::as_slice);
    if let Some(bert) = all.iter().find(|one| one["type"] == "BertProcessing" || one["type"] == "RobertaProcessing") {
        let token = |name: &str| bert[name][0].as_str().map(ToString::to_string);
        return (token("cls"), token("sep"));
    }
    let template = all.iter().find(|processor| processor["type"] == "TemplateProcessing");
    let Some(single) = template.and_then(|template| template["single"].as_array()).filter(|all| all.len() > 1) else {
        return (None, None);
    };
    let special = |entry: Option<&Value>| entry?["SpecialToken"]["id"].as_str().map(ToString::to_string);
    (special(single.first()), special(single.last()))
}

/// The template: in the tokenizer's settings (alone, or the default of several), else in a file of its own.
fn chat_template(folder: &Folder, settings: &Value) -> Result<Option<String>, ConvertError> {
    match &settings["chat_template"] {
        Value::String(template) => return Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|template| template["name"] == "default");
            if let Some(template) = default.and_then(|template| template["template"].as_str()) {
                return Ok(Some(template.into()));
            }
        }
        _ => {}
    }
    if let Some(template) = folder.text("chat_template.jinja")? {
        return Ok(Some(template));
    }
    let json = folder.json("chat_template.json")?;
    Ok(json.and_then(|json| json["chat_template"].as_str().map(ToString::to_string)))
}
