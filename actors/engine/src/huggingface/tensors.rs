//! Tensors of a Hugging Face model under llama.cpp's names, and what happens to their weights on the way: the name
//! tables are those of the `gguf` package (`tensor_mapping.py`), the changes those of `modify_tensors`.

use std::ops::Range;
use std::path::Path;

use super::all_entries;
use super::config::Config;
use super::family::Family;
use crate::dequantize::Format;
use crate::quantize::{ConvertError, SourceTensor};
use crate::safetensors::{Entry, Safetensors};

/// Where a tensor's weights come from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A tensor of a file.
    File {
        /// Which file.
        file: usize,
        /// The tensor.
        entry: Entry,
        /// In which order its rows come.
        order: Order,
        /// Added to each weight.
        shift: f32,
    },
    /// Computed from the configuration.
    Given(Vec<f32>),
}

/// The order of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they are.
    Same,
    /// Heads of this width: Hugging Face rotates element i with i + half, llama.cpp's "norm" rope 2i with 2i + 1.
    Rotary {
        /// Width of a head.
        head: u64,
    },
}

impl Order {
    /// Which row of the file is row `n` of the tensor (`LlamaModel.permute` read backwards).
    fn of(self, n: u64) -> u64 {
        match self {
            Self::Same => n,
            Self::Rotary { head } => {
                let (start, i) = (n / head * head, n % head);
                start + i % 2 * (head / 2) + i / 2
            }
        }
    }
}

impl Origin {
    /// Some whole rows as `f32`.
    pub fn read(
        &self,
        files: &[Safetensors],
        tensor: &SourceTensor,
        rows: Range<u64>,
        out: &mut [f32],
    ) -> Result<(), ConvertError> {
        match self {
            Self::Given(values) => out.copy_from_slice(values),
            Self::File { file, entry, order, shift } => {
                let bytes = files[*file].bytes(entry);
                // A list of numbers is permuted number by number, a matrix row by row.
                let (width, rows) =
                    if tensor.dimensions.len() == 1 { (1, 0..tensor.row()) } else { (tensor.row(), rows) };
                let row_bytes = width as usize * tensor.format.block_bytes();
                if *order == Order::Same {
                    let place = rows.start as usize * row_bytes..rows.end as usize * row_bytes;
                    tensor.format.dequantize_in_parallel(&bytes[place], out);
                } else {
                    for (n, out) in rows.zip(out.chunks_exact_mut(width as usize)) {
                        let row = &bytes[order.of(n) as usize * row_bytes..][..row_bytes];
                        tensor.format.dequantize(row, out);
                    }
                }
                if *shift != 0.0 {
                    out.iter_mut().for_each(|weight| *weight += shift);
                }
            }
        }
        Ok(())
    }
}

/// Tensors and where each comes from.
pub(super) struct Weights {
    pub tensors: Vec<SourceTensor>,
    pub origins: Vec<Origin>,
}

/// All tensors of the model. `known` are the tokens that the tokenizer has; Gemma's embedding ends there.
pub(super) fn collect(
    folder: &Path,
    files: &[Safetensors],
    family: Family,
    config: &Config,
    known: u64,
) -> Result<Weights, ConvertError> {
    let mut weights = Weights { tensors: Vec::new(), origins: Vec::new() };
    for (name, values) in extra(family, config)? {
        weights.tensors.push(SourceTensor {
            name: name.into(),
            dimensions: vec![values.len() as u64],
            format: Format::F32,
        });
        weights.origins.push(Origin::Given(values));
    }
    let layers = u64::from(config.need(&["num_hidden_layers"])?);
    let head = u64::from(config.head_size()?);
    for (name, (file, entry)) in all_entries(folder, files)? {
        let Some(new) = new_name(family, name) else {
            if is_unneeded(family, name) {
                continue;
            }
            let what = format!("tensor {name}");
            let hint = format!("{} models have none of that name", family.architecture());
            return Err(ConvertError::Unsupported { path: files[file].path().into(), what, hint });
        };
        let damaged =
            |why| ConvertError::Damaged { path: files[file].path().into(), what: format!("tensor {name}"), why };
        if layer_of(&new).is_some_and(|layer| layer >= layers) {
            return Err(damaged(format!("config.json says that there are {layers} layers")));
        }
        let Some(format) = entry.format() else {
            let what = format!("tensor {name} of type {}", entry.kind);
            let hint = "F32, F16 and BF16 can".into();
            return Err(ConvertError::Unsupported { path: files[file].path().into(), what, hint });
        };
        if !(1..=2).contains(&entry.shape.len()) || entry.shape.contains(&0) {
            return Err(damaged(format!("its shape is {:?}, where one or two sizes were expected", entry.shape)));
        }
        let mut dimensions: Vec<u64> = entry.shape.iter().rev().copied().collect();
        let rotated = family == Family::Llama && (new.contains(".attn_q.") || new.contains(".attn_k."));
        let order = if rotated { Order::Rotary { head } } else { Order::Same };
        if rotated && (head == 0 || !head.is_multiple_of(2) || !entry.shape[0].is_multiple_of(head)) {
            return Err(damaged(format!("its {} rows are not heads of {head}, an even number", entry.shape[0])));
        }
        if family == Family::Gemma3 && new == "token_embd.weight" && dimensions.len() == 2 {
            dimensions[1] = dimensions[1].min(known.max(1));
        }
        // Gemma keeps norms as their distance from one.
        let shift = if family == Family::Gemma3 && new.ends_with("norm.weight") { 1.0 } else { 0.0 };
        if weights.tensors.iter().any(|tensor| tensor.name == new) {
            return Err(damaged(format!("a second tensor would be {new}")));
        }
        weights.tensors.push(SourceTensor { name: new, dimensions, format });
        weights.origins.push(Origin::File { file, entry: entry.clone(), order, shift });
    }
    let mut both: Vec<_> = weights.tensors.into_iter().zip(weights.origins).collect();
    both.sort_by(|(a, _), (b, _)| order_key(&a.name).cmp(&order_key(&b.name)));
    let (tensors, origins) = both.into_iter().unzip();
    let weights = Weights { tensors, origins };
    for layer in 0..layers {
        if !weights.tensors.iter().any(|tensor| layer_of(&tensor.name) == Some(layer)) {
            let why = "no tensor of it is there".into();
            return Err(ConvertError::Damaged { path: folder.into(), what: format!("layer {layer}"), why });
        }
    }
    if !weights.tensors.iter().any(|tensor| tensor.name == "token_embd.weight") {
        let why = "it is missing".into();
        return Err(ConvertError::Damaged { path: folder.into(), what: "the embedding".into(), why });
    }
    Ok(weights)
}

/// Layers by number, what belongs to none before them.
fn order_key(name: &str) -> (u64, &str) {
    (layer_of(name).map_or(0, |layer| layer + 1), name)
}

/// The layer of a tensor, by its new name.
fn layer_of(name: &str) -> Option<u64> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Factors of the rotary frequencies.
fn extra(family: Family, config: &Config) -> Result<Vec<(&'static str, Vec<f32>)>, ConvertError> {
    match (family, config.rope_type()) {
        (Family::Llama, "llama3") => Ok(vec![("rope_freqs.weight", llama3_factors(config)?)]),
        (Family::Phi3, "su" | "longrope") => {
            let pairs = config.head_size()? as usize / 2;
            let mut factors = Vec::new();
            for (name, key) in
                [("rope_factors_long.weight", "long_factor"), ("rope_factors_short.weight", "short_factor")]
            {
                let values = config.rope_factors(key)?.unwrap_or_default();
                if values.is_empty() || values.len() > pairs {
                    let why = format!("it has {} factors, the heads {pairs} pairs", values.len());
                    return Err(ConvertError::Damaged { path: config.path.clone(), what: key.into(), why });
                }
                factors.push((name, values));
            }
            Ok(factors)
        }
        _ => Ok(Vec::new()),
    }
}

/// By what each frequency is divided in Llama 3.1 and later (`generate_extra_tensors` of `LlamaModel`).
fn llama3_factors(config: &Config) -> Result<Vec<f32>, ConvertError> {
    let setting = |key: &str, default: f32| Ok::<_, ConvertError>(config.rope_float(key)?.unwrap_or(default));
    let (base, size) = (setting("rope_theta", 10_000.0)?, config.head_size()?);
    let factor = setting("factor", 8.0)?;
    let (low, high) = (setting("low_freq_factor", 1.0)?, setting("high_freq_factor", 4.0)?);
    let context = setting("original_max_position_embeddings", 8192.0)?;
    let factors = (0..size / 2).map(|pair| {
        let frequency = 1.0 / base.powf((2 * pair) as f32 / size as f32);
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    });
    Ok(factors.collect())
}

/// What files may hold and no engine needs.
fn is_unneeded(family: Family, name: &str) -> bool {
    let ends = [".rotary_emb.inv_freq", ".attention.masked_bias", "position_ids"];
    if ends.iter().any(|end| name.ends_with(end)) {
        return true;
    }
    match family {
        // The embedding is the output too; some files hold it twice.
        Family::Gemma3 => name == "lm_head.weight",
        Family::Bert => {
            let name = name.strip_prefix("bert.").unwrap_or(name);
            name.starts_with("pooler.") || name.starts_with("cls.")
        }
        _ => false,
    }
}

/// llama.cpp's name of a tensor; `None` where the family has none of this name.
fn new_name(family: Family, name: &str) -> Option<String> {
    if family == Family::Bert {
        return bert_name(name);
    }
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" if family != Family::Gemma3 => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into());
    }
    let (layer, part, end) = split(name.strip_prefix("model.layers.")?)?;
    let gemma = family == Family::Gemma3;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" if family == Family::Phi3 => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" if matches!(family, Family::Qwen3 | Family::Gemma3) => "attn_q_norm",
        "self_attn.k_norm" if matches!(family, Family::Qwen3 | Family::Gemma3) => "attn_k_norm",
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        "pre_feedforward_layernorm" if gemma => "ffn_norm",
        "post_feedforward_layernorm" if gemma => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.gate_up_proj" if family == Family::Phi3 => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{end}"))
}

fn bert_name(name: &str) -> Option<String> {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    let (stem, end) = name.rsplit_once('.')?;
    // Names of the first BERT files.
    let end = match end {
        "gamma" => "weight",
        "beta" => "bias",
        end => end,
    };
    let whole = match stem {
        "embeddings.word_embeddings" => Some("token_embd"),
        "embeddings.position_embeddings" => Some("position_embd"),
        "embeddings.token_type_embeddings" => Some("token_types"),
        "embeddings.LayerNorm" => Some("token_embd_norm"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(format!("{whole}.{end}"));
    }
    let (layer, part, _) = split(name.strip_prefix("encoder.layer.")?)?;
    let part = match part {
        "attention.self.query" => "attn_q",
        "attention.self.key" => "attn_k",
        "attention.self.value" => "attn_v",
        "attention.output.dense" => "attn_output",
        "attention.output.LayerNorm" => "attn_output_norm",
        "intermediate.dense" => "ffn_up",
        "output.dense" => "ffn_down",
        "output.LayerNorm" => "layer_output_norm",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{end}"))
}

/// `3.mlp.up_proj.weight` → (3, `mlp.up_proj`, `weight`).
fn split(name: &str) -> Option<(u32, &str, &str)> {
    let (layer, rest) = name.split_once('.')?;
    let (part, end) = rest.rsplit_once('.')?;
    Some((layer.parse().ok()?, part, end))
}
