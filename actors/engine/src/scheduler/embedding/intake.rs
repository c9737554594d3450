//! Requests for embeddings on their way in: checked and cut into tokens on a thread of their own, so that a long list
//! does not hold up the passes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Accepted, Embed, EmbedInput, MOST_INPUTS, ModelState, RefusalKind, Refused, Request};

use super::job::{Job, tokens_of};
use super::{Submission, Wake};
use crate::EngineSpec;
use crate::encoder::{Encoder, TokenLimits};
use crate::scheduler::checks::{check_no_extra, invalid, refuse};
use crate::scheduler::heartbeat::Hearts;
use crate::scheduler::intake::{FAR, hex};
use crate::scheduler::output::Output;
use crate::snapshot::Shared;
use crate::text::{Codec, Tokenizer};

/// What is known about the model when requests are checked.
pub(super) struct Intake {
    digest: ModelDigest,
    dimensions: u32,
    limits: TokenLimits,
    tokenizer: Arc<Tokenizer>,
    shared: Arc<Shared>,
    hearts: Arc<Hearts>,
}

impl Intake {
    pub fn new(spec: &EngineSpec, encoder: &Encoder, shared: Arc<Shared>) -> Self {
        Self {
            digest: spec.digest,
            dimensions: u32::try_from(encoder.dimensions()).unwrap_or(u32::MAX),
            limits: encoder.limits(),
            tokenizer: encoder.tokenizer(),
            shared,
            hearts: Arc::default(),
        }
    }

    pub fn hearts(&self) -> Arc<Hearts> {
        Arc::clone(&self.hearts)
    }

    /// The body of the intake's thread; it ends when the engine is dropped.
    pub fn run(self, submitted: &Receiver<Submission>, jobs: &Sender<Box<Job>>, wake: &Sender<Wake>) {
        while let Ok(submission) = submitted.recv() {
            if submission.answers.is_closed() {
                continue;
            }
            // Whatever text may make a library panic: that request gets its end by being dropped, and the next its turn.
            let Ok(prepared) = catch_unwind(AssertUnwindSafe(|| self.prepare(submission))) else {
                tracing::error!("a request could not be prepared: a library panicked");
                continue;
            };
            if let Some(job) = prepared
                && (jobs.send(Box::new(job)).is_err() || wake.send(Wake::Look).is_err())
            {
                break;
            }
        }
        self.hearts.close();
    }

    /// `None` where the answer has been given already.
    fn prepare(&self, submission: Submission) -> Option<Job> {
        let Submission { request, answers, last, place, at, .. } = submission;
        let span = tracing::info_span!(
            "request",
            request_id = %request.request_id,
            trace_id = %hex(&request.trace.trace_id),
            attempt = request.attempt,
            model = request.model,
        );
        let _entered = span.clone().entered();
        let deadline = at + Duration::from_millis(request.remaining_ms).min(FAR);
        let inputs = match self.check(&request, deadline) {
            Ok(inputs) => inputs,
            Err(refused) => {
                tracing::info!(kind = ?refused.kind, message = refused.message, "request refused");
                last.say(Answer::Refused(refused));
                return None;
            }
        };
        let mut output = Output::new(answers, last);
        output.send(Answer::Accepted(Accepted {
            prompt_tokens: tokens_of(&inputs),
            cached_tokens: 0,
            context_length: u32::try_from(self.limits.context_length).unwrap_or(u32::MAX),
            load: self.shared.load(),
        }));
        output.queued(self.shared.waiting.load(Ordering::Relaxed).saturating_sub(1));
        self.hearts.add(output.heart());
        Some(Job::new(output, (request.priority, deadline), inputs, (place, at), span.clone()))
    }

    /// The tokens of all inputs, or why not.
    fn check(&self, request: &Request, deadline: Instant) -> Result<Vec<Vec<u32>>, Refused> {
        match self.shared.state() {
            ModelState::Failed { why } => {
                return Err(refuse(RefusalKind::Draining, None, format!("the engine has failed: {why}")));
            }
            _ if self.shared.stopped() => {
                return Err(refuse(RefusalKind::Draining, None, "the engine is shutting down".into()));
            }
            _ => {}
        }
        let late = || {
            let message = "the time was up before the work began".into();
            (Instant::now() >= deadline).then(|| refuse(RefusalKind::DeadlineExceeded, None, message))
        };
        if let Some(late) = late() {
            return Err(late);
        }
        if request.digest != self.digest {
            let message = format!("{} is not here: this engine runs {}", request.digest, self.digest);
            return Err(refuse(RefusalKind::UnknownModel, Some("model"), message));
        }
        let Some(Embed { inputs, dimensions }) = &request.embed else {
            let message =
                format!("`{}` is an embedding model: it turns texts into numbers and does not chat", request.model);
            return Err(refuse(RefusalKind::UnsupportedField, Some("model"), message));
        };
        check_no_extra(request)?;
        if let Some(asked) = dimensions.filter(|asked| *asked != self.dimensions) {
            // What is cut from a model that was not trained to be cut looks like an embedding and is a bad one.
            let message = format!(
                "'dimensions' is {asked}, and the embeddings of `{}` have {} numbers: it was not made to have them cut",
                request.model, self.dimensions
            );
            return Err(refuse(RefusalKind::UnsupportedField, Some("dimensions"), message));
        }
        if inputs.is_empty() || inputs.len() > MOST_INPUTS {
            return Err(invalid(
                "input",
                &format!("there are {} inputs, and there can be 1 to {MOST_INPUTS}", inputs.len()),
            ));
        }
        let mut tokens = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.iter().enumerate() {
            let param = if inputs.len() == 1 { "input".to_owned() } else { format!("input[{index}]") };
            let ids = match input {
                EmbedInput::Text(text) => self.tokenizer.passage(text).map_err(|error| invalid(&param, &error.0))?,
                EmbedInput::Tokens(ids) => ids.clone(),
            };
            if ids.len() > self.limits.context_length {
                let message = format!(
                    "'{param}' has {} tokens, and this model takes {} at most: shorten it, or embed it in parts",
                    ids.len(),
                    self.limits.context_length
                );
                return Err(refuse(RefusalKind::ContextExceeded, Some(&param), message));
            }
            self.limits.check(&ids).map_err(|why| invalid(&param, &why))?;
            tokens.push(ids);
        }
        // A long list takes a while.
        late().map_or(Ok(tokens), Err)
    }
}
