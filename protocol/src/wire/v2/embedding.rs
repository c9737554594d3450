//! Texts as numbers: what is asked for, and what comes back.

use serde::{Deserialize, Serialize};

use super::ModelFacts;
use crate::registry::ModelType;

/// The most inputs of a request.
pub const MOST_INPUTS: usize = 2_048;
/// The most numbers of an embedding, so that its frame stays below its limit.
pub const MOST_DIMENSIONS: usize = 32_768;
/// The feature of a model that turns texts into numbers, and does nothing else.
pub const EMBEDDINGS: &str = "embeddings";

impl ModelFacts {
    /// It turns texts into numbers and does not chat.
    pub fn embeds(&self) -> bool {
        self.features.iter().any(|feature| feature == EMBEDDINGS)
    }

    /// What it does, as far as it is known: of a model that was not loaded yet nobody may have looked.
    pub fn kind(&self) -> Option<ModelType> {
        match self.embeds() {
            true => Some(ModelType::Embedding),
            // Said together with the features.
            false => (!self.numerics.is_empty()).then_some(ModelType::Llm),
        }
    }
}

/// Something that is to become an embedding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EmbedInput {
    /// A text, which the engine cuts into tokens and frames as the model was trained to see it.
    Text(String),
    /// Tokens, taken as they are.
    Tokens(Vec<u32>),
}

/// What is to be embedded. Each input gets one [`Embedding`]; all of them, in the order of the inputs, are the answer.
/// An answer that breaks is of no use in parts: the whole request is asked again elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Embed {
    /// At least one, at most [`MOST_INPUTS`].
    pub inputs: Vec<EmbedInput>,
    /// Numbers of an embedding, where the model leaves a choice; `None` for as many as it has.
    pub dimensions: Option<u32>,
}

impl Embed {
    /// Bytes of its texts, and tokens where it has tokens.
    pub fn lengths(&self) -> (usize, usize) {
        self.inputs.iter().fold((0, 0), |(bytes, tokens), input| match input {
            EmbedInput::Text(text) => (bytes + text.len(), tokens),
            EmbedInput::Tokens(ids) => (bytes, tokens + ids.len()),
        })
    }
}

/// One input as numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// Which input, from 0; they come in order.
    pub index: u32,
    /// As many for all inputs; at most [`MOST_DIMENSIONS`].
    pub values: Vec<f32>,
}
