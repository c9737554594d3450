//! The choice of the next token, from one row of logits. In this order:
//!
//! 1. `logit_bias` is added;
//! 2. `repetition_penalty` over the last `repetition_window` tokens of prompt and answer: positive logits are divided
//!    by it, others multiplied; then `presence_penalty` and `frequency_penalty` over the answer's tokens;
//! 3. what must not come becomes impossible: tokens outside the [`TokenMask`], the model's end tokens under
//!    `ignore_eos`, end and stop tokens before `min_tokens`;
//! 4. `temperature`: logits are divided by it (0: the likeliest token, and nothing below applies);
//! 5. `top_k`, then `top_p` (probabilities among what `top_k` left), then `min_p` (relative to the likeliest);
//! 6. the draw.
//!
//! Temperature comes before the filters, as at OpenAI, vLLM, transformers and Ollama (llama.cpp alone has it last):
//! settings that clients bring along mean here what they mean there.
//!
//! Logarithmic probabilities are the model's own: of the logits before step 1, at temperature 1.
//!
//! The choice is a function of (logits, tokens so far, sampling, position) alone, randomness being a function of
//! (seed, position): nothing is carried from step to step, so an answer that goes on elsewhere draws what it would have
//! drawn here. It uses no function of the system's mathematics library (see `numbers`), so machines agree too. Nothing
//! is sorted but what is left in the end, and buffers are used again.

use ingle_protocol::wire::v2::Sampling;

use crate::Draw;
use crate::text::Codec;

mod filters;
mod logprobs;
mod mask;
mod numbers;
mod penalties;
mod scan;

#[cfg(test)]
mod tests;

pub(crate) use logprobs::Likelihood;
pub use mask::{BitMask, TokenMask};

/// Temperatures below this are 0: their inverse is no useful number any more.
const COLD: f32 = 1e-5;

/// How the token behind `generated` others is drawn, where that needs the scores alone: none of the steps 1 to 3, no
/// probabilities to be told.
pub(crate) fn draw_of(sampling: &Sampling, generated: u32, masked: bool) -> Option<Draw> {
    let others = masked || sampling.logprobs.is_some() || penalties::any(sampling);
    if others || sampling.ignore_eos || generated < sampling.min_tokens {
        return None;
    }
    let greedy = sampling.temperature < COLD || sampling.top_k == 1;
    Some(Draw {
        inverse_temperature: if greedy { 0.0 } else { 1.0 / sampling.temperature },
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        random: numbers::random(sampling.seed, generated),
    })
}

/// Where a token is to be chosen.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// One for each token of the vocabulary.
    pub logits: &'a [f32],
    pub sampling: &'a Sampling,
    /// Prompt and answer.
    pub tokens: &'a [u32],
    /// How many of them are the prompt's.
    pub prompt: usize,
    /// Decides what may come, where somebody does.
    pub mask: Option<&'a mut dyn TokenMask>,
}

/// A token, chosen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chosen {
    pub id: u32,
    /// Where the sampling asks for it.
    pub likelihood: Option<Likelihood>,
}

/// Why no token can be chosen. The same wherever it would be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoChoice {
    /// Every logit is −∞ or no number at all.
    #[error("the model computed no numbers for this prompt")]
    NoNumbers,
    /// There were some, but none of them may come.
    #[error(
        "no token may come next: what constrains the answer (a grammar, `logit_bias`, `ignore_eos` or `min_tokens`) \
         forbids every token that the model could say here; ask for less of it"
    )]
    AllForbidden,
}

/// Chooses for all sequences of an engine, one after the other.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// The model's end tokens.
    ends: Vec<u32>,
    /// Logits after steps 1 to 3, where these change any.
    adjusted: Vec<f32>,
    maxima: Vec<f32>,
    seen: Vec<u32>,
    mask: BitMask,
    buffers: filters::Buffers,
}

impl Sampler {
    /// For the vocabulary of `codec`.
    pub fn new(codec: &dyn Codec) -> Self {
        Self {
            ends: (0..codec.vocabulary()).filter(|id| codec.is_end(*id)).collect(),
            adjusted: Vec::new(),
            maxima: Vec::new(),
            seen: Vec::new(),
            mask: BitMask::default(),
            buffers: filters::Buffers::default(),
        }
    }

    /// Chooses the next token.
    pub fn choose(&mut self, mut place: Place<'_>) -> Result<Chosen, NoChoice> {
        let (logits, sampling) = (place.logits, place.sampling);
        let mut greatest = scan::maxima(logits, &mut self.maxima);
        if greatest == f32::NEG_INFINITY {
            return Err(NoChoice::NoNumbers);
        }
        let likelihoods = sampling.logprobs.map(|count| {
            let filters::Buffers { candidates, scratch, .. } = &mut self.buffers;
            let distribution = logprobs::Distribution::new(logits, greatest);
            (distribution, distribution.top(logits, &self.maxima, count, candidates, scratch))
        });
        let row = if self.adjust(&mut place) {
            greatest = scan::maxima(&self.adjusted, &mut self.maxima);
            if greatest == f32::NEG_INFINITY {
                return Err(NoChoice::AllForbidden);
            }
            &self.adjusted
        } else {
            logits
        };
        let drawn = if sampling.temperature < COLD || sampling.top_k == 1 || greatest == f32::INFINITY {
            None
        } else {
            let heat = scan::Heat::new(greatest, sampling.temperature);
            let position = (place.tokens.len() - place.prompt) as u32;
            filters::draw(row, &self.maxima, heat, sampling, position, &mut self.buffers)
        };
        let id = drawn.unwrap_or_else(|| scan::first(row, &self.maxima, greatest));
        let likelihood =
            likelihoods.map(|(distribution, top)| Likelihood { chosen: distribution.of(logits[id as usize]), top });
        Ok(Chosen { id, likelihood })
    }

    /// Steps 1 to 3. False where they change nothing; then `adjusted` is not filled.
    fn adjust(&mut self, place: &mut Place<'_>) -> bool {
        let Place { logits, sampling, tokens, prompt, mask } = place;
        let early = tokens.len() - *prompt < sampling.min_tokens as usize;
        let no_end = sampling.ignore_eos || early;
        let penalised = penalties::any(sampling);
        if !penalised && !no_end && mask.is_none() {
            return false;
        }
        let row = &mut self.adjusted;
        row.clear();
        row.extend_from_slice(logits);
        if penalised {
            penalties::adjust(row, sampling, tokens, *prompt, &mut self.seen);
        }
        if let Some(mask) = mask {
            self.mask.reset(row.len());
            mask.allowed(&tokens[*prompt..], &mut self.mask);
            self.mask.apply(row);
        }
        if no_end {
            penalties::forbid(row, &self.ends);
        }
        if early {
            penalties::forbid(row, &sampling.stop_token_ids);
        }
        true
    }
}
