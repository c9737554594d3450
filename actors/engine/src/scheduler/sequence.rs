//! One request that has been taken: its tokens, its place, its way out.

use std::time::{Duration, Instant};

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Failed, FailureKind, FinishReason, Finished, LOGPROB_BYTES_LIMIT, Load, Logprob, Logprobs, Priority, Sampling,
    Token, Usage,
};

use super::blocks::Table;
use super::intake::Place;
use super::output::{Lingering, Output};
use crate::Draw;
use crate::sampler::{self, Chosen, Likelihood, Place as Choice, Sampler, TokenMask};
use crate::text::{Codec, Detokenizer, Piece};

/// A request from its admission to the queue to its end.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub output: Output,
    pub priority: Priority,
    pub sampling: Sampling,
    /// Decides which tokens may come, where the answer is constrained.
    pub mask: Option<Box<dyn TokenMask>>,
    pub deadline: Instant,
    /// Prompt, resumed tokens, generated tokens.
    pub tokens: Vec<u32>,
    /// How many of them the engine has seen.
    pub computed: usize,
    pub slot: u32,
    pub has_slot: bool,
    /// Its memory, while it has a slot.
    pub table: Table,
    /// Tokens of the prompt that others had computed.
    pub cached: u32,
    /// The step of its last chunk.
    pub last_chunk: u64,
    pub prompt: u32,
    pub resumed: u32,
    pub context_length: u32,
    pub detokenizer: Detokenizer,
    /// Held while it waits.
    pub place: Option<Place>,
    pub times: Times,
    pub span: tracing::Span,
}

/// When what happened.
#[derive(Debug)]
pub(crate) struct Times {
    pub submitted: Instant,
    pub admitted: Option<Instant>,
    pub first_token: Option<Instant>,
}

/// How a sequence ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Finished(FinishReason),
    Failed(FailureKind, String),
    /// This request cannot be answered, here or elsewhere.
    Impossible(String),
    /// Nobody listens any more.
    Cancelled,
}

/// The last frame of an answer that nobody took in time.
pub(super) fn too_slow(deadline: Duration) -> Answer {
    Answer::Failed(Failed {
        kind: FailureKind::ReaderTooSlow,
        message: format!("nobody read the answer for {} s", deadline.as_secs_f32()),
        retryable: false,
        migratable: false,
    })
}

impl Sequence {
    /// Tokens that the engine has not seen.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The next tokens for the engine, at most `limit`.
    pub fn next_tokens(&self, limit: usize) -> &[u32] {
        &self.tokens[self.computed..][..limit.min(self.left())]
    }

    /// It has a slot and somebody takes what it says.
    pub fn is_computable(&self) -> bool {
        self.has_slot && !self.output.is_stalled()
    }

    /// Tokens of the answer, resumed ones included.
    pub fn generated(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt
    }

    pub fn admit(&mut self, slot: u32, now: Instant) {
        (self.slot, self.has_slot, self.place) = (slot, true, None);
        // A sequence that had to wait for memory again finds its own blocks, which is no saving.
        if self.times.admitted.is_none() {
            self.times.admitted = Some(now);
            self.cached = (self.computed as u32).min(self.prompt);
        }
        self.tell_progress();
    }

    /// How much of the prompt has been read, until there is a token.
    pub fn tell_progress(&self) {
        if self.times.first_token.is_none() {
            let total = self.prompt + self.resumed;
            self.output.prefilled((self.computed as u32).min(total), total);
        }
    }

    /// Chooses the next token from its logits and sends it. `Some` where the answer is at its end.
    pub fn advance(&mut self, logits: &[f32], sampler: &mut Sampler, codec: &dyn Codec, now: Instant) -> Option<End> {
        let mask = self.mask.as_mut().map(|mask| &mut **mask as &mut dyn TokenMask);
        let (sampling, tokens, prompt) = (&self.sampling, &self.tokens[..], self.prompt as usize);
        match sampler.choose(Choice { logits, sampling, tokens, prompt, mask }) {
            Ok(chosen) => self.take(chosen, codec, now),
            // Its own trouble, and the same wherever it would be tried again.
            Err(why) => Some(End::Impossible(why.to_string())),
        }
    }

    /// How the next token is drawn, where its scores alone decide.
    pub fn draw(&self) -> Option<Draw> {
        sampler::draw_of(&self.sampling, self.generated(), self.mask.is_some())
    }

    /// Takes a token that the engine has chosen. `Some` where the answer is at its end.
    pub fn accept(&mut self, id: u32, codec: &dyn Codec, now: Instant) -> Option<End> {
        self.take(Chosen { id, likelihood: None }, codec, now)
    }

    /// Takes a generated token and sends it. `Some` where it was the last.
    fn take(&mut self, chosen: Chosen, codec: &dyn Codec, now: Instant) -> Option<End> {
        let Chosen { id, likelihood } = chosen;
        if self.times.first_token.is_none() {
            self.times.first_token = Some(now);
            self.output.hush();
        }
        let position = self.generated();
        self.tokens.push(id);
        let ends = self.is_end(id, codec);
        let mut piece = if ends { Piece::default() } else { self.detokenizer.push(codec, id) };
        let mut end = if piece.stopped || ends { Some(FinishReason::Stop) } else { self.is_full() };
        if end.is_some() && !piece.stopped {
            let rest = self.detokenizer.finish();
            piece.text.extend_from_slice(&rest.text);
            if rest.stopped {
                end = Some(FinishReason::Stop);
            }
        }
        let logprobs = likelihood.filter(|_| !ends).map(|likelihood| in_words(id, likelihood, codec));
        self.output.send(Answer::Token(Token { position, id, text: piece.text, logprobs, extra: Vec::new() }));
        end.map(End::Finished)
    }

    /// This token ends the answer, and its text is not part of it.
    fn is_end(&self, id: u32, codec: &dyn Codec) -> bool {
        codec.is_end(id) || self.sampling.stop_token_ids.contains(&id)
    }

    /// There may be no further token.
    fn is_full(&self) -> Option<FinishReason> {
        let full = self.sampling.max_tokens.is_some_and(|most| self.generated() >= most);
        (full || self.tokens.len() >= self.context_length as usize).then_some(FinishReason::Length)
    }

    /// The answer may have no further token.
    pub fn end_if_full(&self) -> Option<End> {
        self.is_full().map(End::Finished)
    }

    /// Replays resumed tokens. `Some` where the answer was complete already.
    pub fn replay(&mut self, codec: &dyn Codec) -> Option<End> {
        for index in self.prompt as usize..self.tokens.len() {
            let id = self.tokens[index];
            if self.is_end(id, codec) || self.detokenizer.push(codec, id).stopped {
                return Some(End::Finished(FinishReason::Stop));
            }
        }
        self.end_if_full()
    }

    /// Sends the last frame, with the engine's load, and writes down what the request took. `Some` while the reader has to catch up.
    pub fn end(self, end: End, load: Load) -> Option<Lingering> {
        self.log(&end);
        let usage =
            Usage { prompt_tokens: self.prompt, cached_tokens: self.cached, completion_tokens: self.generated() };
        match end {
            End::Finished(reason) => {
                self.output.end(Answer::Finished(Finished { reason, usage, load, extra: Vec::new() }))
            }
            End::Failed(kind, message) => {
                let goes_on = matches!(kind, FailureKind::EngineError | FailureKind::ShuttingDown);
                let retryable = goes_on && self.generated() == 0;
                self.output.end_now(Answer::Failed(Failed { kind, message, retryable, migratable: goes_on }));
                None
            }
            End::Impossible(message) => {
                let kind = FailureKind::EngineError;
                self.output.end_now(Answer::Failed(Failed { kind, message, retryable: false, migratable: false }));
                None
            }
            End::Cancelled => None,
        }
    }

    fn log(&self, end: &End) {
        let now = Instant::now();
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        let Times { submitted, admitted, first_token } = self.times;
        let started = admitted.unwrap_or(now);
        self.span.in_scope(|| {
            tracing::info!(
                end = ?end,
                prompt_tokens = self.prompt,
                cached_tokens = self.cached,
                resumed_tokens = self.resumed,
                completion_tokens = self.generated(),
                queue_ms = ms(submitted, started),
                prefill_ms = first_token.map(|first| ms(started, first)),
                first_token_ms = first_token.map(|first| ms(submitted, first)),
                total_ms = ms(submitted, now),
                "request ended"
            );
        });
    }
}

/// A choice's probabilities as they travel, with the tokens' texts.
fn in_words(id: u32, likelihood: Likelihood, codec: &dyn Codec) -> Logprobs {
    let logprob = |id, logprob| {
        let bytes = codec.bytes(id);
        Logprob { id, logprob, bytes: bytes[..bytes.len().min(LOGPROB_BYTES_LIMIT)].to_vec() }
    };
    let top = likelihood.top.into_iter().map(|(id, value)| logprob(id, value)).collect();
    Logprobs { chosen: logprob(id, likelihood.chosen), top }
}
