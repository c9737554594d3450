//! Encoders for embeddings: BERT (Devlin et al. 2019) with the pooling of Sentence-BERT (Reimers and Gurevych 2019).
//!
//! A text becomes tokens, a vector each, and layers in which every token sees all others; the vectors of the last
//! layer are pooled to one, which is made to have length 1. So the cosine of two texts is the product of their
//! embeddings. Several texts are computed in one pass.
//!
//! **A text's embedding does not depend on its company**, bit for bit, nor on the number of threads or the
//! instruction set, for the reasons that [`crate::model`] gives. Encoders compute on the CPU only.

use std::path::Path;
use std::sync::Arc;

use crate::dequantize::Format;
use crate::gguf::Gguf;
use crate::kernels::{AttentionJob, KV_BLOCK, Kernels, KvLayout, KvType, Norm, Row};
use crate::spec::ModelOptions;
use crate::text::{Codec, Tokenizer};
use crate::{DeviceChoice, EngineError, MemoryNeed};

mod shape;
mod weights;

#[cfg(test)]
mod tests;

pub use shape::Pooling;
use shape::Shape;
use weights::{Layer, LayerNorm, Weights};

/// Tokens of several texts that are computed in one pass, unless the options say otherwise. A longer text has a pass
/// of its own.
pub(crate) const PASS: usize = 512;
/// Texts of one pass at most: each takes at least one block of keys and values.
pub(crate) const MOST_TEXTS: usize = 64;

/// What tokens can be embedded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenLimits {
    /// Tokens of a text at most.
    pub context_length: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
}

impl TokenLimits {
    pub fn check(&self, tokens: &[u32]) -> Result<(), String> {
        if tokens.is_empty() {
            return Err("it has no tokens".into());
        }
        if tokens.len() > self.context_length {
            return Err(format!(
                "it has {} tokens and this model takes {} at most: shorten it, or embed it in parts",
                tokens.len(),
                self.context_length
            ));
        }
        match tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            Some(token) => Err(format!("it has the token {token}, where the model knows {}", self.vocabulary)),
            None => Ok(()),
        }
    }
}

/// A loaded embedding model.
#[derive(Debug)]
pub struct Encoder {
    gguf: Gguf,
    shape: Shape,
    tokenizer: Arc<Tokenizer>,
    weights: Weights,
    kernels: Kernels,
    /// Keys and values of one layer in one pass; each layer writes its own over those of the layer before.
    memory: Vec<u8>,
    context_length: usize,
    pass: usize,
}

impl Encoder {
    /// Opens a model file for the CPU. Of the options, `context_length` (tokens of a text at most), `chunk` (tokens of a
    /// pass), `threads`, `packed_cache` and `instructions` count. Fails where the file is damaged, is no BERT, or
    /// does not fit into memory.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Self, EngineError> {
        Self::load(Gguf::open(path)?, options)
    }

    /// As [`Encoder::open`], where the device was chosen by somebody: a GPU is refused.
    pub fn open_on(path: &Path, device: DeviceChoice, options: &ModelOptions) -> Result<Self, EngineError> {
        if device == DeviceChoice::Gpu {
            let why = "embedding models compute on the CPU only: choose the device `cpu` or `auto` for them";
            return Err(EngineError::Device(why.into()));
        }
        Self::open(path, options)
    }

    fn load(gguf: Gguf, options: &ModelOptions) -> Result<Self, EngineError> {
        let shape = Shape::from_gguf(&gguf)?;
        let own = shape.context_length;
        let context_length = options.context_length.map_or(own, |tokens| tokens as usize).clamp(1, own);
        let pass = options.chunk.map_or(PASS, |tokens| tokens as usize).max(1);
        crate::memory::refuse_too_large(&gguf, working_set(&shape, context_length, pass))?;
        let weights = Weights::load(&gguf, &shape, options.packed_cache.as_ref())?;
        let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf)?);
        if tokenizer.vocabulary() as usize > shape.vocabulary {
            let why = format!("it has {} tokens, the model only {}", tokenizer.vocabulary(), shape.vocabulary);
            return Err(EngineError::Tokenizer { path: gguf.path().into(), why });
        }
        let kernels = Kernels::new(options.instruction_set(), options.threads());
        Ok(Self { gguf, shape, tokenizer, weights, kernels, memory: Vec::new(), context_length, pass })
    }

    /// Numbers of an embedding.
    pub fn dimensions(&self) -> usize {
        self.shape.embedding
    }

    /// Tokens of a text at most, those in front and behind included.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// How the tokens' vectors become one.
    pub fn pooling(&self) -> Pooling {
        self.shape.pooling
    }

    /// What computes, in words.
    pub fn backend(&self) -> String {
        format!("cpu ({}, {} threads)", self.kernels.instruction_set().name(), self.kernels.threads())
    }

    /// The token ids of a text, with those that the model wants in front and behind (`[CLS]` and `[SEP]`).
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, crate::text::PromptError> {
        self.tokenizer.passage(text)
    }

    /// An embedding of length 1 for each text, of [`Encoder::dimensions`] numbers. A text that is too long is refused,
    /// not cut; then none is embedded.
    pub fn embed(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EngineError> {
        let tokens = texts.iter().enumerate().map(|(number, text)| {
            let refused = |why| EngineError::Text { number: number + 1, count: texts.len(), why };
            self.tokenize(text).map_err(|why| refused(why.to_string()))
        });
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        self.embed_tokens(&tokens)
    }

    /// As [`Encoder::embed`], of tokens (with those in front and behind).
    pub fn embed_tokens(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, EngineError> {
        let limits = self.limits();
        for (number, tokens) in texts.iter().enumerate() {
            limits.check(tokens).map_err(|why| EngineError::Text { number: number + 1, count: texts.len(), why })?;
        }
        let mut embeddings = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |text: &&Vec<u32>| {
                tokens += text.len();
                tokens <= self.pass
            };
            let count = rest.iter().take(MOST_TEXTS).take_while(fits).count().max(1);
            let (these, others) = rest.split_at(count);
            self.pass(these, &mut embeddings)?;
            rest = others;
        }
        if let Some(number) = embeddings.iter().position(|numbers| numbers.iter().any(|x| !x.is_finite())) {
            let why = "the model's numbers overflow; its file may be damaged".into();
            return Err(EngineError::Text { number: number + 1, count: texts.len(), why });
        }
        Ok(embeddings)
    }

    /// What tokens can be embedded.
    pub(crate) fn limits(&self) -> TokenLimits {
        TokenLimits { context_length: self.context_length, vocabulary: self.shape.vocabulary }
    }

    /// Token ids are below this.
    pub(crate) fn vocabulary(&self) -> usize {
        self.shape.vocabulary
    }

    /// What cuts texts into tokens, for those who do so elsewhere.
    pub(crate) fn tokenizer(&self) -> Arc<Tokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// Computes on so many threads from now on.
    pub(crate) fn set_threads(&mut self, threads: usize) {
        self.kernels.set_threads(threads);
    }

    /// One pass of at most [`MOST_TEXTS`] texts that keep to [`Encoder::limits`]. Nobody has looked whether the numbers are
    /// finite.
    pub(crate) fn compute(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, EngineError> {
        let mut embeddings = Vec::with_capacity(texts.len());
        self.pass(texts, &mut embeddings)?;
        Ok(embeddings)
    }

    /// Some texts together, their tokens being the rows of all products.
    fn pass(&mut self, texts: &[Vec<u32>], embeddings: &mut Vec<Vec<f32>>) -> Result<(), EngineError> {
        let mut rows = Vec::with_capacity(texts.iter().map(Vec::len).sum());
        for (sequence, tokens) in texts.iter().enumerate() {
            let sees = tokens.len() - 1;
            rows.extend((0..tokens.len()).map(|position| Row { sequence, position, sees }));
        }
        let mut x = self.first(texts)?;
        let Self { shape, weights, kernels, memory, .. } = self;
        let blocks = blocks(layout(shape), texts, memory);
        norm(kernels, &weights.embedding_norm, shape, &mut x);
        for layer in &weights.layers {
            attend(kernels, layer, shape, &rows, &blocks, &mut x);
            let mut inner = vec![0.0; rows.len() * shape.feed_forward];
            kernels.linear(&layer.up.parts, Some(&layer.up.bias), &x, Norm::None, &mut inner);
            kernels.gelu(&mut inner);
            kernels.linear_add(&layer.down.parts[0], Some(&layer.down.bias), &inner, &mut x);
            norm(kernels, &layer.feed_forward_norm, shape, &mut x);
        }
        let mut rest = x.as_slice();
        for tokens in texts {
            let (states, others) = rest.split_at(tokens.len() * shape.embedding);
            embeddings.push(pool(states, shape));
            rest = others;
        }
        Ok(())
    }

    /// What goes into the first norm, `[rows, embedding]`: for each token the sum of its vector, that of the first
    /// token type, and that of its position.
    fn first(&self, texts: &[Vec<u32>]) -> Result<Vec<f32>, EngineError> {
        let damaged = |why| EngineError::Gguf { path: self.gguf.path().into(), why };
        let table = self.gguf.tensor("token_embd.weight").map_err(damaged)?;
        let format = Format::of(table).map_err(damaged)?;
        let bytes = self.gguf.tensor_bytes(table).map_err(damaged)?;
        let width = self.shape.embedding;
        let row_bytes = width / format.block_weights() * format.block_bytes();
        let mut x = vec![0.0; texts.iter().map(Vec::len).sum::<usize>() * width];
        let mut rows = x.chunks_exact_mut(width);
        for tokens in texts {
            for ((token, position), row) in tokens.iter().zip(self.weights.positions.chunks_exact(width)).zip(&mut rows)
            {
                format.dequantize(&bytes[*token as usize * row_bytes..][..row_bytes], row);
                for ((x, kind), position) in row.iter_mut().zip(&self.weights.token_type).zip(position) {
                    *x = (*x + kind) + position;
                }
            }
        }
        Ok(x)
    }
}

/// Bytes of memory that a pass takes beside the weights.
fn working_set(shape: &Shape, context_length: usize, pass: usize) -> u64 {
    let rows = pass.max(context_length);
    let blocks = (rows.div_ceil(KV_BLOCK) + MOST_TEXTS).saturating_mul(layout(shape).block_bytes());
    // The tokens' vectors, queries, keys and values, what attention gives, and the inside of the feed-forward part.
    let of_row = 5 * shape.embedding + shape.feed_forward;
    blocks.saturating_add(rows.saturating_mul(of_row).saturating_mul(size_of::<f32>())) as u64
}

/// Reads the head of a model file and says what an engine needs for it with these options.
pub(crate) fn memory_need(gguf: &Gguf, options: &ModelOptions) -> Result<MemoryNeed, EngineError> {
    let shape = Shape::from_gguf(gguf)?;
    let own = shape.context_length;
    let context_length = options.context_length.map_or(own, |tokens| tokens as usize).min(own).max(1);
    let work = working_set(&shape, context_length, options.chunk.map_or(PASS, |tokens| tokens as usize));
    let other = crate::memory::OVERHEAD.saturating_add(work);
    Ok(MemoryNeed { weights: gguf.file_bytes(), kv_least: 0, kv_most: 0, other })
}

/// Half precision always: keys and values live for one layer only, so their size is no matter.
fn layout(shape: &Shape) -> KvLayout {
    KvLayout { kind: KvType::F16, heads: shape.heads, size: shape.head_size() }
}

/// Blocks of keys and values for each text. What lies in them from before is never read.
fn blocks(layout: KvLayout, texts: &[Vec<u32>], memory: &mut Vec<u8>) -> Vec<Vec<*mut u8>> {
    let needed = |tokens: &Vec<u32>| tokens.len().div_ceil(KV_BLOCK);
    let bytes = texts.iter().map(needed).sum::<usize>() * layout.block_bytes();
    if memory.len() < bytes {
        memory.resize(bytes, 0);
    }
    let mut all = memory.chunks_exact_mut(layout.block_bytes()).map(<[u8]>::as_mut_ptr);
    texts.iter().map(|tokens| all.by_ref().take(needed(tokens)).collect()).collect()
}

fn norm(kernels: &mut Kernels, norm: &LayerNorm, shape: &Shape, x: &mut [f32]) {
    kernels.layer_norm(x, &norm.weight, &norm.bias, shape.norm_epsilon);
}

/// `x = norm(x + output(attention(x)))`, every token seeing all of its text: Vaswani et al. 2017 with the norm behind.
fn attend(kernels: &mut Kernels, layer: &Layer, shape: &Shape, rows: &[Row], blocks: &[Vec<*mut u8>], x: &mut [f32]) {
    let mut qkv = vec![0.0; 3 * x.len()];
    kernels.linear(&layer.query_key_value.parts, Some(&layer.query_key_value.bias), x, Norm::None, &mut qkv);
    let mut out = vec![0.0; x.len()];
    kernels.attention(AttentionJob {
        layout: layout(shape),
        heads: shape.heads,
        rows,
        blocks,
        qkv: &mut qkv,
        // Positions were added to the tokens' vectors: nothing is rotated.
        cosines: &[],
        sines: &[],
        norms: None,
        scale: 1.0 / (shape.head_size() as f32).sqrt(),
        window: usize::MAX,
        out: &mut out,
    });
    kernels.linear_add(&layer.attention_output.parts[0], Some(&layer.attention_output.bias), &out, x);
    norm(kernels, &layer.attention_norm, shape, x);
}

/// From the vectors `[tokens, embedding]` of a text to one of length 1.
fn pool(states: &[f32], shape: &Shape) -> Vec<f32> {
    let mut pooled = states[..shape.embedding].to_vec();
    if shape.pooling == Pooling::Mean {
        for state in states.chunks_exact(shape.embedding).skip(1) {
            pooled.iter_mut().zip(state).for_each(|(sum, x)| *sum += x);
        }
        let count = (states.len() / shape.embedding) as f32;
        pooled.iter_mut().for_each(|sum| *sum /= count);
    }
    let square: f64 = pooled.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    // As in torch's `normalize`: a vector of nothing stays what it is.
    let length = square.sqrt().max(1e-12) as f32;
    pooled.iter_mut().for_each(|x| *x /= length);
    pooled
}
