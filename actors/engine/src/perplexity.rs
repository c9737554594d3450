//! How well a model predicts a text: perplexity, and how fast it computes while that is measured.
//!
//! **Method.** The text is tokenized as a whole, without special tokens, and cut into windows of `context` tokens
//! that do not overlap (stride = context). Where the model's texts begin with a token of their own (BOS), each window
//! begins with it and has `context` − 1 tokens of the text. In each window every token but the first is predicted
//! from those before it in the window. With N predicted tokens, perplexity = exp(−1/N · Σ ln p(token)). A last
//! window with fewer than 2 tokens is left out. Numbers are comparable between files of one model with the same text
//! and context only: llama.cpp's tool, for one, counts the second half of each window alone.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::gguf::Gguf;
use crate::model::Model;
use crate::text::{Special, Tokenizer};
use crate::{DeviceChoice, EngineError, ModelOptions, StepEngine, StepEntry};

/// Tokens that are computed one by one, to see how fast answers come.
const DECODED: usize = 32;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The model does not load or compute.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The text cannot be tokenized.
    #[error("the text cannot be tokenized: {0}")]
    Text(String),
    /// Too little text.
    #[error("the text has {tokens} tokens, at least 2 are needed")]
    Short {
        /// Its tokens.
        tokens: usize,
    },
    /// A window that is none.
    #[error("a context of {context} tokens does not work: {why}")]
    Context {
        /// What was asked for.
        context: usize,
        /// Why it does not work.
        why: String,
    },
    /// The caller does not want it any more.
    #[error("cancelled")]
    Cancelled,
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// exp of the mean negative log-likelihood of a token.
    pub perplexity: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// How long the windows took.
    pub elapsed: Duration,
    /// Tokens a second when a text is read.
    pub prompt_rate: f64,
    /// Tokens a second when they come one after the other, as in an answer.
    pub decode_rate: f64,
}

/// A model that is loaded to be measured.
pub struct Subject {
    engine: Box<dyn StepEngine>,
    tokenizer: Tokenizer,
    /// What every text begins with.
    begin: Option<u32>,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject").field("capabilities", self.engine.capabilities()).finish_non_exhaustive()
    }
}

impl Subject {
    /// Loads a GGUF file onto the device.
    pub fn open(path: &Path, device: DeviceChoice) -> Result<Self, EngineError> {
        let gguf = Gguf::open(path)?;
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let model = gguf.text("tokenizer.ggml.model").map_err(damaged)?;
        // Where the file does not say, llama.cpp adds it for SentencePiece vocabularies only.
        let adds = gguf.boolean("tokenizer.ggml.add_bos_token").map_err(damaged)?.unwrap_or(model == Some("llama"));
        let begin = gguf.number("tokenizer.ggml.bos_token_id").map_err(damaged)?.filter(|_| adds);
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        Ok(Self { engine: open_engine(path, device)?, tokenizer, begin })
    }

    /// The ids of a text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, EvaluationError> {
        self.tokenizer.encode(text, Special::AsText).map_err(|why| EvaluationError::Text(why.0))
    }

    /// Measures over windows of `context` tokens. `go_on` is told tokens done and in all after each step, and ends
    /// it by saying false.
    pub fn evaluate(
        &mut self,
        tokens: &[u32],
        context: usize,
        go_on: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Evaluation, EvaluationError> {
        evaluate(self.engine.as_mut(), self.begin, tokens, context, go_on)
    }
}

/// The one place that knows which kind of engine is measured.
fn open_engine(path: &Path, device: DeviceChoice) -> Result<Box<dyn StepEngine>, EngineError> {
    Ok(Box::new(Model::open(path, device, &ModelOptions { slots: 1, ..ModelOptions::default() })?))
}

/// [`Subject::evaluate`] for any engine.
pub fn evaluate(
    engine: &mut dyn StepEngine,
    begin: Option<u32>,
    tokens: &[u32],
    context: usize,
    go_on: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Evaluation, EvaluationError> {
    let most = engine.capabilities().context_length as usize;
    let refuse = |why: String| Err(EvaluationError::Context { context, why });
    if context < 2 {
        return refuse("a token is predicted from at least one before it".into());
    }
    if context > most {
        return refuse(format!("the model has {most}"));
    }
    let own = context - usize::from(begin.is_some());
    let windows: Vec<Vec<u32>> = tokens
        .chunks(own)
        .map(|chunk| begin.into_iter().chain(chunk.iter().copied()).collect::<Vec<_>>())
        .filter(|window| window.len() > 1)
        .collect();
    if windows.is_empty() {
        return Err(EvaluationError::Short { tokens: tokens.len() });
    }
    let all: usize = windows.iter().map(Vec::len).sum();
    let (mut loss, mut predicted, mut done) = (0.0f64, 0usize, 0);
    let mut elapsed = Duration::ZERO;
    for window in &windows {
        engine.assign_share(0)?;
        let mut position = 0;
        for chunk in window.chunks(engine.capabilities().chunk.max(1) as usize) {
            // The last token of a window predicts none that is counted.
            let wanted: Vec<usize> = (0..chunk.len()).filter(|n| position + n + 1 < window.len()).collect();
            let started = Instant::now();
            let logits = engine.step(&entries(chunk, position), &wanted)?;
            elapsed += started.elapsed();
            for (row, n) in wanted.iter().enumerate() {
                loss -= log_probability(logits.row(row), window[position + n + 1]);
                predicted += 1;
            }
            position += chunk.len();
            done += chunk.len();
            if !go_on(done, all) {
                return Err(EvaluationError::Cancelled);
            }
        }
        engine.release(0);
    }
    Ok(Evaluation {
        perplexity: (loss / predicted as f64).exp(),
        tokens: predicted,
        windows: windows.len(),
        elapsed,
        prompt_rate: done as f64 / elapsed.as_secs_f64().max(f64::MIN_POSITIVE),
        decode_rate: decode_rate(engine, &windows[0])?,
    })
}

fn entries(tokens: &[u32], position: usize) -> Vec<StepEntry> {
    // Positions are below the context length, a u32.
    (position as u32..).zip(tokens).map(|(position, token)| StepEntry { token: *token, slot: 0, position }).collect()
}

/// ln p(`token`), summed in f64.
fn log_probability(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    f64::from(own - largest) - sum.ln()
}

fn decode_rate(engine: &mut dyn StepEngine, window: &[u32]) -> Result<f64, EvaluationError> {
    let count = window.len().min(DECODED);
    engine.assign_share(0)?;
    let started = Instant::now();
    for (position, token) in window[..count].iter().enumerate() {
        engine.step(&entries(&[*token], position), &[0])?;
    }
    let elapsed = started.elapsed().as_secs_f64();
    engine.release(0);
    Ok(count as f64 / elapsed.max(f64::MIN_POSITIVE))
}

#[cfg(test)]
mod tests;
