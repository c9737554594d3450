//! One request for embeddings that has been taken: its inputs, its place, its way out.

use std::collections::VecDeque;
use std::time::Instant;

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Embedding, Failed, FailureKind, FinishReason, Finished, Load, Priority, Usage};

use crate::scheduler::intake::Place;
use crate::scheduler::output::{Flushed, Lingering, Output};

/// A request from its admission to the queue to its end.
#[derive(Debug)]
pub(super) struct Job {
    pub output: Output,
    pub priority: Priority,
    pub deadline: Instant,
    /// Tokens of those inputs that are not computed.
    pub inputs: VecDeque<Vec<u32>>,
    /// Embeddings that have not been sent: what one pass gave at most.
    ready: VecDeque<Vec<f32>>,
    sent: u32,
    /// Tokens of all inputs, and how many of them are computed.
    total: u32,
    computed: u32,
    /// The pass that it last took part in.
    pub last_pass: u64,
    /// Held while it waits.
    place: Option<Place>,
    submitted: Instant,
    begun: Option<Instant>,
    span: tracing::Span,
}

/// How a request ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    Finished,
    Failed(FailureKind, String),
    /// It cannot be answered, here or elsewhere.
    Impossible(String),
    /// Nobody listens any more.
    Cancelled,
}

impl Job {
    pub fn new(
        output: Output,
        (priority, deadline): (Priority, Instant),
        inputs: Vec<Vec<u32>>,
        (place, submitted): (Place, Instant),
        span: tracing::Span,
    ) -> Self {
        let total = tokens_of(&inputs);
        Self {
            output,
            priority,
            deadline,
            inputs: inputs.into(),
            ready: VecDeque::new(),
            sent: 0,
            total,
            computed: 0,
            last_pass: 0,
            place: Some(place),
            submitted,
            begun: None,
            span,
        }
    }

    /// Tokens that are not computed.
    pub fn left(&self) -> u32 {
        self.total.saturating_sub(self.computed)
    }

    /// It has inputs, and somebody takes what comes of them.
    pub fn is_computable(&self) -> bool {
        !self.inputs.is_empty() && self.ready.is_empty() && !self.output.is_stalled()
    }

    /// Everything is computed and sent, but for a frame that the reader has to make room for.
    pub fn is_complete(&self) -> bool {
        self.inputs.is_empty() && self.ready.is_empty()
    }

    /// It takes part in passes from now on.
    pub fn begin(&mut self, now: Instant) {
        self.place = None;
        self.begun = Some(now);
        self.tell_progress();
    }

    pub fn tell_progress(&self) {
        self.output.prefilled(self.computed, self.total);
    }

    /// Its next input, of so many tokens, is computed.
    pub fn take(&mut self, tokens: usize, values: Vec<f32>) {
        self.computed = self.computed.saturating_add(tokens as u32);
        self.ready.push_back(values);
    }

    /// Sends as much as there is room for.
    pub fn flush(&mut self) -> Flushed {
        loop {
            match self.output.flush() {
                Flushed::Clear => {}
                other => return other,
            }
            let Some(values) = self.ready.pop_front() else { return Flushed::Clear };
            self.output.send(Answer::Embedding(Embedding { index: self.sent, values }));
            self.sent += 1;
        }
    }

    /// Sends the last frame, with the engine's load, and writes down what the request took. `Some` while the reader has
    /// to catch up.
    pub fn end(self, end: End, load: Load) -> Option<Lingering> {
        self.log(&end);
        let usage = Usage { prompt_tokens: self.total, cached_tokens: 0, completion_tokens: 0 };
        let failed = |kind, message, retryable| Answer::Failed(Failed { kind, message, retryable, migratable: false });
        match end {
            End::Finished => {
                let reason = FinishReason::Stop;
                self.output.end(Answer::Finished(Finished { reason, usage, load, extra: Vec::new() }))
            }
            End::Failed(kind, message) => {
                // Whatever was sent: the same comes out elsewhere, from the beginning.
                let goes_on = matches!(kind, FailureKind::EngineError | FailureKind::ShuttingDown);
                self.output.end_now(failed(kind, message, goes_on));
                None
            }
            End::Impossible(message) => {
                self.output.end_now(failed(FailureKind::EngineError, message, false));
                None
            }
            End::Cancelled => None,
        }
    }

    fn log(&self, end: &End) {
        let now = Instant::now();
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        self.span.in_scope(|| {
            tracing::info!(
                end = ?end,
                prompt_tokens = self.total,
                embeddings = self.sent,
                queue_ms = ms(self.submitted, self.begun.unwrap_or(now)),
                total_ms = ms(self.submitted, now),
                "request ended"
            );
        });
    }
}

pub(super) fn tokens_of(inputs: &[Vec<u32>]) -> u32 {
    u32::try_from(inputs.iter().map(Vec::len).sum::<usize>()).unwrap_or(u32::MAX)
}
