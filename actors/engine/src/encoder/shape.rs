//! The numbers in a GGUF's metadata that make an encoder.

use crate::EngineError;
use crate::gguf::{Gguf, GgufError};
use crate::kernels::{LANES, WIDEST_HEAD};
use crate::model::architecture::{Keys, architecture, chats};

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all, those of `[CLS]` and `[SEP]` included.
    Mean,
    /// The first token's, `[CLS]`.
    Cls,
}

/// Sizes and constants of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    /// Layers.
    pub layers: usize,
    /// Rows of the position table: tokens of a text at most.
    pub context_length: usize,
    /// Width of a token's vector, and of an embedding.
    pub embedding: usize,
    /// Width inside the feed-forward part.
    pub feed_forward: usize,
    /// Heads of queries, and as many of keys and values.
    pub heads: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Rows of the table of token types.
    pub token_types: usize,
    /// Added to the variance before its root.
    pub norm_epsilon: f32,
    pub pooling: Pooling,
}

impl Shape {
    /// Width of a head.
    pub fn head_size(&self) -> usize {
        self.embedding / self.heads
    }

    /// From the metadata. What is no BERT, and what of BERT is not supported, is refused by name.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, EngineError> {
        let path = gguf.path();
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let unsupported =
            |what: String, hint: &str| EngineError::Unsupported { path: path.into(), what, hint: hint.into() };
        let architecture = architecture(gguf).map_err(damaged)?;
        if chats(architecture) {
            let is = format!("a chat model (architecture {architecture:?}), not an embedding model");
            let hint = "choose a model that was made for embeddings, such as all-MiniLM-L6-v2";
            return Err(EngineError::Purpose { path: path.into(), is, hint: hint.into() });
        }
        if architecture != "bert" {
            return Err(unsupported(format!("the architecture {architecture:?}"), "of embedding models, \"bert\" is"));
        }
        let keys = Keys { gguf, architecture };
        let tokenizer = gguf.text("tokenizer.ggml.model").map_err(damaged)?.unwrap_or("none");
        if tokenizer != "bert" {
            let what = format!("a BERT with a tokenizer of type {tokenizer:?}");
            return Err(unsupported(what, "\"bert\" (WordPiece) is"));
        }
        if gguf.boolean(&keys.key("attention.causal")).map_err(damaged)? == Some(true) {
            return Err(unsupported(
                "a BERT whose tokens see only what is before them".into(),
                "those that see all are",
            ));
        }
        let pooling = match gguf.number(&keys.key("pooling_type")).map_err(damaged)? {
            Some(1) => Pooling::Mean,
            Some(2) => Pooling::Cls,
            // To guess would give embeddings that look fine and are not what the model was trained for.
            None => {
                let hint = "convert its folder again, with modules.json and 1_Pooling/config.json in it";
                return Err(unsupported("a file that does not name its pooling (bert.pooling_type)".into(), hint));
            }
            Some(other) => {
                let name = ["none", "mean", "CLS", "last", "rank"].get(other as usize).unwrap_or(&"unknown");
                return Err(unsupported(format!("the pooling {other} ({name})"), "1 (mean) and 2 (CLS) are"));
            }
        };
        let shape = read(&keys, pooling).map_err(damaged)?;
        let invalid = |name: &str, why: String| damaged(GgufError::Invalid { what: keys.key(name), why });
        if !shape.embedding.is_multiple_of(shape.heads) {
            let why = format!("{} heads do not share a width of {}", shape.heads, shape.embedding);
            return Err(invalid("attention.head_count", why));
        }
        let size = shape.head_size();
        if !size.is_multiple_of(LANES) || size > WIDEST_HEAD {
            return Err(unsupported(format!("heads of width {size}"), "multiples of 16 up to 256 are"));
        }
        if !shape.norm_epsilon.is_finite() || shape.norm_epsilon < 0.0 {
            return Err(invalid("attention.layer_norm_epsilon", format!("it is {}", shape.norm_epsilon)));
        }
        Ok(shape)
    }
}

fn read(keys: &Keys<'_>, pooling: Pooling) -> Result<Shape, GgufError> {
    let rows = |name: &str| -> Result<usize, GgufError> {
        let sizes = &keys.gguf.tensor(name)?.dimensions;
        // A table of one row may be written as a list.
        Ok(sizes.get(1).and_then(|n| usize::try_from(*n).ok()).unwrap_or(1))
    };
    let epsilon = keys.key("attention.layer_norm_epsilon");
    Ok(Shape {
        layers: keys.required("block_count")?,
        context_length: keys.required("context_length")?,
        embedding: keys.required("embedding_length")?,
        feed_forward: keys.required("feed_forward_length")?,
        heads: keys.required("attention.head_count")?,
        vocabulary: rows("token_embd.weight")?,
        token_types: rows("token_types.weight")?,
        norm_epsilon: keys.gguf.float(&epsilon)?.ok_or(GgufError::Missing(epsilon))?,
        pooling,
    })
}
