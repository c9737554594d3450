//! The model families that can be converted, and the metadata of each: the keys that `set_gguf_parameters` of
//! llama.cpp's converter writes.

use std::path::Path;

use serde_json::Value;

use super::config::Config;
use super::{Folder, Metadata};
use crate::gguf::MetaValue;
use crate::quantize::ConvertError;

/// A family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
    Phi3,
    Bert,
}

/// What `architectures` names, and what that is.
const KNOWN: [(&str, Family); 9] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Llama),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("Gemma3ForCausalLM", Family::Gemma3),
    ("Phi3ForCausalLM", Family::Phi3),
    ("BertModel", Family::Bert),
    ("BertForMaskedLM", Family::Bert),
    ("BertForPreTraining", Family::Bert),
];

/// How a sentence's vectors become one, as llama.cpp numbers the ways.
mod pooling {
    pub const MEAN: u32 = 1;
    pub const CLS: u32 = 2;
    pub const LAST: u32 = 3;
}

impl Family {
    pub fn of(config: &Config) -> Result<Self, ConvertError> {
        let name = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str).unwrap_or("none");
        let hint = || format!("{} can", KNOWN.map(|(name, _)| name).join(", "));
        let family = KNOWN.iter().find(|(known, _)| *known == name).map(|(_, family)| *family);
        let family = family.ok_or_else(|| config.unsupported(format!("the architecture {name}"), &hint()))?;
        if config.get("quantization_config").is_some() {
            let what = "a model that is quantized already (quantization_config)";
            return Err(config.unsupported(what.into(), "take the original weights, f32, f16 or bf16"));
        }
        if config.number(&["num_local_experts", "num_experts", "n_routed_experts"])?.is_some() {
            return Err(config.unsupported("a mixture of experts".into(), "dense models can"));
        }
        Ok(family)
    }

    /// llama.cpp's name.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Bert => "bert",
        }
    }

    /// The hyperparameters under this family's keys.
    pub fn parameters(self, config: &Config, folder: &Folder) -> Result<Metadata, ConvertError> {
        let mut keys = Keys { architecture: self.architecture(), metadata: Metadata::new() };
        let heads = config.need(&["num_attention_heads"])?;
        keys.number("block_count", config.need(&["num_hidden_layers"])?);
        let context = config.number(&["max_position_embeddings", "n_positions"])?;
        keys.number("context_length", context.unwrap_or(if self == Self::Gemma3 { 131_072 } else { 2048 }));
        keys.number("embedding_length", config.need(&["hidden_size"])?);
        keys.number("feed_forward_length", config.need(&["intermediate_size"])?);
        keys.number("attention.head_count", heads);
        if self == Self::Bert {
            keys.float("attention.layer_norm_epsilon", config.float(&["layer_norm_eps"])?.unwrap_or(1e-12));
            keys.truth("attention.causal", false);
            if let Some(kind) = pooling_of(folder)? {
                keys.number("pooling_type", kind);
            }
            let types = config.number(&["type_vocab_size"])?.unwrap_or(1);
            keys.metadata.push(("tokenizer.ggml.token_type_count".into(), MetaValue::U32(types)));
            self.refuse_bert_variants(config)?;
            return Ok(keys.metadata);
        }
        keys.number("attention.head_count_kv", config.number(&["num_key_value_heads"])?.unwrap_or(heads));
        keys.float("attention.layer_norm_rms_epsilon", config.float(&["rms_norm_eps"])?.unwrap_or(1e-6));
        let base = config.rope_float("rope_theta")?.unwrap_or(if self == Self::Gemma3 { 1e6 } else { 1e4 });
        keys.float("rope.freq_base", base);
        if let (Self::Gemma3, Some(base)) = (self, config.local_rope_base) {
            keys.float("rope.freq_base_swa", base);
        }
        self.rope_scaling(config, &mut keys)?;
        let given = config.number(&["head_dim"])?;
        if let Some(width) = given.or((self == Self::Gemma3).then_some(256)) {
            keys.number("attention.key_length", width);
            keys.number("attention.value_length", width);
        }
        match self {
            Self::Llama => {
                keys.number("vocab_size", config.need(&["vocab_size"])?);
                keys.number("rope.dimension_count", config.head_size()?);
            }
            Self::Gemma3 => {
                for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    if config.get(key).is_some() {
                        return Err(config.unsupported(format!("a Gemma 3 with {key}"), "those without can"));
                    }
                }
                keys.number("attention.sliding_window", config.need(&["sliding_window"])?);
            }
            Self::Phi3 => {
                let part = config.rope_float("partial_rotary_factor")?.unwrap_or(1.0);
                let embedding = config.need(&["hidden_size"])?;
                keys.number("rope.dimension_count", (f64::from(part) * f64::from(embedding)) as u32 / heads);
                let original = match config.rope_float("original_max_position_embeddings")? {
                    Some(original) => original as u32,
                    None => config.need(&["max_position_embeddings"])?,
                };
                keys.number("rope.scaling.original_context_length", original);
                // Zero says: none.
                keys.number("attention.sliding_window", config.number(&["sliding_window"])?.unwrap_or(0));
            }
            _ => {}
        }
        Ok(keys.metadata)
    }

    fn rope_scaling(self, config: &Config, keys: &mut Keys) -> Result<(), ConvertError> {
        let factor = config.rope_float("factor")?;
        match (config.rope_type(), factor) {
            ("default", _) => Ok(()),
            // A tensor of factors says it.
            ("llama3", _) if self == Self::Llama => Ok(()),
            ("linear", Some(factor)) => {
                keys.text("rope.scaling.type", "linear");
                keys.float("rope.scaling.factor", factor);
                Ok(())
            }
            ("su" | "longrope", _) if self == Self::Phi3 => {
                keys.text("rope.scaling.type", "longrope");
                let context = config.need(&["max_position_embeddings"])? as f32;
                let original = config.rope_float("original_max_position_embeddings")?.unwrap_or(context);
                let scale = context / original;
                let factor = if scale > 1.0 { (1.0 + scale.ln() / original.ln()).sqrt() } else { 1.0 };
                keys.float("rope.scaling.attn_factor", factor);
                Ok(())
            }
            (other, _) => {
                let what = format!("the rotary scaling {other:?} of {} models", self.architecture());
                Err(config.unsupported(what, "none and linear can, llama3 for Llama, longrope for Phi-3"))
            }
        }
    }

    fn refuse_bert_variants(self, config: &Config) -> Result<(), ConvertError> {
        let position = config.text("position_embedding_type").unwrap_or("absolute");
        if position != "absolute" {
            return Err(config.unsupported(format!("a BERT with {position} positions"), "absolute ones can"));
        }
        match config.text("hidden_act").unwrap_or("gelu") {
            "gelu" => Ok(()),
            other => Err(config.unsupported(format!("a BERT with the activation {other}"), "gelu can")),
        }
    }
}

/// What sentence-transformers says of pooling, if the folder is from there.
fn pooling_of(folder: &Folder) -> Result<Option<u32>, ConvertError> {
    let Some(modules) = folder.json("modules.json")? else { return Ok(None) };
    let is_pooling = |module: &&Value| module["type"].as_str().is_some_and(|kind| kind.ends_with("Pooling"));
    let path = modules.as_array().and_then(|modules| modules.iter().find(is_pooling)?["path"].as_str());
    // A plain folder name, so that nothing outside is read.
    let Some(path) = path.filter(|path| Path::new(path).file_name() == Some(path.as_ref())) else { return Ok(None) };
    let file = format!("{path}/config.json");
    let Some(config) = folder.json(&file)? else { return Ok(None) };
    let set = |key: &str| config[key].as_bool() == Some(true);
    match () {
        () if set("pooling_mode_mean_tokens") => Ok(Some(pooling::MEAN)),
        () if set("pooling_mode_cls_token") => Ok(Some(pooling::CLS)),
        () if set("pooling_mode_lasttoken") => Ok(Some(pooling::LAST)),
        () => Err(ConvertError::Unsupported {
            path: folder.path.join(file),
            what: "this way of pooling".into(),
            hint: "mean, cls and last token can".into(),
        }),
    }
}

/// Puts the architecture in front of keys.
struct Keys {
    architecture: &'static str,
    metadata: Metadata,
}

impl Keys {
    fn put(&mut self, key: &str, value: MetaValue) {
        self.metadata.push((format!("{}.{key}", self.architecture), value));
    }

    fn number(&mut self, key: &str, number: u32) {
        self.put(key, MetaValue::U32(number));
    }

    fn float(&mut self, key: &str, number: f32) {
        self.put(key, MetaValue::F32(number));
    }

    fn text(&mut self, key: &str, text: &str) {
        self.put(key, MetaValue::Text(text.into()));
    }

    fn truth(&mut self, key: &str, truth: bool) {
        self.put(key, MetaValue::Bool(truth));
    }
}
