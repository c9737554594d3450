//! The numbers in a GGUF's metadata that make a model, and what its family does differently from others.

use crate::EngineError;
use crate::gguf::{Gguf, GgufError};

/// Families of decoders that are one definition with small differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama, SmolLM, Mistral, and others of their shape.
    Llama,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: queries and keys are normed.
    Qwen3,
    /// Gemma 3: norms behind as well as before, windows in most layers.
    Gemma3,
    /// Phi-3: joined matrices, two sets of rotary factors.
    Phi3,
}

const FAMILIES: [(&str, Family); 5] = [
    ("llama", Family::Llama),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma3", Family::Gemma3),
    ("phi3", Family::Phi3),
];

/// Models that turn texts into numbers.
const EMBEDDING: [&str; 1] = ["bert"];

/// Every so many layers of Gemma 3 there is one that sees everything.
const GEMMA_PERIOD: usize = 6;
/// Base of the rotary frequencies in Gemma 3's windowed layers.
const GEMMA_LOCAL_BASE: f32 = 10_000.0;

/// Sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Hyperparameters {
    /// What it is called in the file; also the prefix of its metadata.
    pub architecture: String,
    /// What it does differently.
    pub family: Family,
    /// Layers.
    pub layers: usize,
    /// Tokens that the model was trained for.
    pub context_length: u32,
    /// Width of the residual stream.
    pub embedding: usize,
    /// Width inside the feed-forward part.
    pub feed_forward: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_size: usize,
    /// Elements of a head that are rotated.
    pub rotated: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Added to the mean square before its root.
    pub norm_epsilon: f32,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Positions are divided by this.
    pub rope_factor: f32,
    /// Tokens that the model was trained for before its positions were stretched.
    pub original_context: Option<u32>,
    /// Cosines and sines are multiplied by this.
    pub rope_magnitude: f32,
    /// Base of the rotary frequencies in windowed layers, where it is another; their positions are not divided.
    pub local_rope_base: Option<f32>,
    /// Positions that windowed layers see.
    pub window: Option<usize>,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
}

/// The most of anything; keeps products of two far from overflow. Real models stay below 2^18.
const MOST: u32 = 1 << 24;

/// Reads metadata under an architecture's prefix.
pub(crate) struct Keys<'a> {
    pub gguf: &'a Gguf,
    pub architecture: &'a str,
}

impl Keys<'_> {
    /// The whole name of a key.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A number from 1 to [`MOST`], if there is one.
    pub fn optional(&self, name: &str) -> Result<Option<usize>, GgufError> {
        let key = self.key(name);
        match self.gguf.number(&key)? {
            Some(number) if number == 0 || number > MOST => {
                Err(GgufError::Invalid { what: key, why: format!("it is {number}") })
            }
            number => Ok(number.map(|number| number as usize)),
        }
    }

    /// A number from 1 to [`MOST`].
    pub fn required(&self, name: &str) -> Result<usize, GgufError> {
        self.optional(name)?.ok_or_else(|| GgufError::Missing(self.key(name)))
    }

    /// A number above 0.
    pub fn positive(&self, name: &str) -> Result<Option<f32>, GgufError> {
        let key = self.key(name);
        match self.gguf.float(&key)? {
            Some(number) if !number.is_finite() || number <= 0.0 => {
                Err(GgufError::Invalid { what: key, why: format!("it is {number}") })
            }
            number => Ok(number),
        }
    }
}

/// Whether models of this architecture chat.
pub(crate) fn chats(architecture: &str) -> bool {
    FAMILIES.iter().any(|(name, _)| *name == architecture)
}

/// Whether it turns texts into numbers, by its architecture.
pub(crate) fn embeds(gguf: &Gguf) -> bool {
    architecture(gguf).is_ok_and(|name| EMBEDDING.contains(&name))
}

/// The name of the architecture.
pub(crate) fn architecture(gguf: &Gguf) -> Result<&str, GgufError> {
    Ok(gguf.text("general.architecture")?.unwrap_or("none"))
}

impl Hyperparameters {
    /// From the metadata. An architecture that is none of ours is refused by name.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, EngineError> {
        let path = gguf.path();
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let unsupported =
            |what: String, hint: &str| EngineError::Unsupported { path: path.into(), what, hint: hint.into() };
        let architecture = architecture(gguf).map_err(damaged)?;
        if EMBEDDING.contains(&architecture) {
            let is = format!("an embedding model (architecture {architecture:?}), not a chat model");
            let hint =
                "it turns texts into numbers and cannot answer: try `ingle models embed`, or choose a chat model";
            return Err(EngineError::Purpose { path: path.into(), is, hint: hint.into() });
        }
        let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == architecture) else {
            let what = format!("the architecture {architecture:?}");
            return Err(unsupported(what, "\"llama\", \"qwen2\", \"qwen3\", \"gemma3\" and \"phi3\" are"));
        };
        let keys = Keys { gguf, architecture };
        if gguf.number(&keys.key("expert_count")).map_err(damaged)?.unwrap_or(0) > 0 {
            return Err(unsupported("a mixture of experts".into(), "only dense models are"));
        }
        let model = read(&keys, *family).map_err(damaged)?;
        let invalid = |name: &str, why: String| damaged(GgufError::Invalid { what: keys.key(name), why });
        let Self { heads, kv_heads, head_size, rotated, .. } = model;
        // Each layer has several tensors. Whoever counts layers may rely on it: a small file has few.
        if model.layers > gguf.tensors().count() {
            let why = format!("it is {}, the file has {} tensors", model.layers, gguf.tensors().count());
            return Err(invalid("block_count", why));
        }
        if !heads.is_multiple_of(kv_heads) {
            let why = format!("{heads} heads do not share {kv_heads}");
            return Err(invalid("attention.head_count_kv", why));
        }
        if head_size == 0 || !head_size.is_multiple_of(2) {
            return Err(invalid("attention.key_length", format!("heads of width {head_size}")));
        }
        let value = keys.optional("attention.value_length").map_err(damaged)?.unwrap_or(head_size);
        if value != head_size || rotated > head_size || rotated % 2 != 0 {
            let what = format!("heads of width {head_size} with {rotated} rotated and values of width {value}");
            return Err(unsupported(what, "values must be as wide as keys, and no more rotated than there is"));
        }
        if *family == Family::Llama && rotated != head_size {
            let what = format!("heads of width {head_size} with {rotated} rotated");
            return Err(unsupported(what, "a Llama's heads are rotated as a whole"));
        }
        if !model.norm_epsilon.is_finite() || model.norm_epsilon < 0.0 {
            return Err(invalid("attention.layer_norm_rms_epsilon", format!("it is {}", model.norm_epsilon)));
        }
        match gguf.text(&keys.key("rope.scaling.type")).map_err(damaged)? {
            None | Some("none") => Ok(Self { rope_factor: 1.0, ..model }),
            Some("linear") => Ok(model),
            // Its factors stand in tensors.
            Some("longrope") if *family == Family::Phi3 => Ok(Self { rope_factor: 1.0, ..model }),
            Some(other) => Err(unsupported(format!("rope scaling {other:?}"), "\"none\" and \"linear\" are")),
        }
    }

    /// Positions that layer `number` sees; `usize::MAX` for all.
    pub fn window_of(&self, number: usize) -> usize {
        match self.window {
            Some(window) if !self.is_global(number) => window,
            _ => usize::MAX,
        }
    }

    /// Single heads of queries and keys are normed.
    pub fn norms_heads(&self) -> bool {
        matches!(self.family, Family::Qwen3 | Family::Gemma3)
    }

    /// The layer sees everything, and has the rotary frequencies of such layers.
    pub fn is_global(&self, number: usize) -> bool {
        match self.family {
            Family::Gemma3 => number % GEMMA_PERIOD == GEMMA_PERIOD - 1,
            _ => self.window.is_none(),
        }
    }
}

fn read(keys: &Keys<'_>, family: Family) -> Result<Hyperparameters, GgufError> {
    let embedding = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let table = keys.gguf.tensor("token_embd.weight")?;
    let epsilon = keys.key("attention.layer_norm_rms_epsilon");
    let head_size = keys.optional("attention.key_length")?.unwrap_or(embedding / heads);
    let layers = keys.required("block_count")?;
    // Gemma's largest model scales by the width that its heads would have if they shared the stream.
    let scaled = if family == Family::Gemma3 && layers == 62 { embedding / heads } else { head_size };
    Ok(Hyperparameters {
        architecture: keys.architecture.into(),
        family,
        layers,
        context_length: keys.required("context_length")? as u32,
        embedding,
        feed_forward: keys.required("feed_forward_length")?,
        heads,
        kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        head_size,
        rotated: keys.optional("rope.dimension_count")?.unwrap_or(head_size),
        vocabulary: table.dimensions.get(1).and_then(|n| usize::try_from(*n).ok()).unwrap_or(1),
        norm_epsilon: keys.gguf.float(&epsilon)?.ok_or(GgufError::Missing(epsilon))?,
        rope_base: keys.positive("rope.freq_base")?.unwrap_or(10_000.0),
        rope_factor: keys.positive("rope.scaling.factor")?.unwrap_or(1.0),
        original_context: keys.optional("rope.scaling.original_context_length")?.map(|n| n as u32),
        rope_magnitude: keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0),
        local_rope_base: match family {
            Family::Gemma3 => Some(keys.positive("rope.freq_base_swa")?.unwrap_or(GEMMA_LOCAL_BASE)),
            _ => None,
        },
        window: match family {
            // 0 is none.
            Family::Gemma3 | Family::Phi3 => {
                let window = keys.gguf.number(&keys.key("attention.sliding_window"))?;
                window.filter(|window| *window > 0).map(|window| window as usize)
            }
            // Other files name a window that the models were not trained with.
            _ => None,
        },
        attention_scale: 1.0 / (scaled as f32).sqrt(),
        embedding_scale: if family == Family::Gemma3 { (embedding as f32).sqrt() } else { 1.0 },
    })
}
