//! Requests on their way in: checked, rendered and tokenized on a thread of their own, so that a long prompt does
//! not hold up the batch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Accepted, Load, ModelState, NO_TOKEN_ID, RefusalKind, Refused, Request};
use tokio::sync::mpsc;

use super::Wake;
use super::blocks::Table;
use super::checks::{check_extra, check_sampling, invalid, refuse};
use super::heartbeat::Hearts;
use super::output::{LastWord, Output};
use super::sequence::{Sequence, Times};
use crate::sampler::TokenMask;
use crate::snapshot::Shared;
use crate::text::{Codec, Detokenizer};
use crate::{Capabilities, EngineSpec};

/// A deadline further away than this is none.
pub(super) const FAR: Duration = Duration::from_secs(30 * 24 * 3600);

/// One of the bounded places of those who wait; free again when dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Shared>);

impl Place {
    /// `None` where `limit` places are taken.
    pub fn take(shared: &Arc<Shared>, limit: u32) -> Option<Self> {
        let free = |waiting| (waiting < limit).then_some(waiting + 1);
        shared.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok().map(|_| Self(Arc::clone(shared)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request as it was handed in.
#[derive(Debug)]
pub(crate) struct Submission {
    pub request: Box<Request>,
    /// Constrains the answer.
    pub mask: Option<Box<dyn TokenMask>>,
    pub answers: mpsc::Sender<Answer>,
    pub last: LastWord,
    pub place: Place,
    pub at: Instant,
}

/// What is known about the model when requests are checked.
pub(super) struct Intake {
    digest: ModelDigest,
    context_length: u32,
    vocabulary: u32,
    codec: Arc<dyn Codec>,
    shared: Arc<Shared>,
    hearts: Arc<Hearts>,
}

impl Intake {
    pub fn new(spec: &EngineSpec, engine: &Capabilities, codec: Arc<dyn Codec>, shared: Arc<Shared>) -> Self {
        let hearts = Arc::default();
        let (context_length, vocabulary) = (engine.context_length, engine.vocabulary);
        Self { digest: spec.digest, context_length, vocabulary, codec, shared, hearts }
    }

    pub fn hearts(&self) -> Arc<Hearts> {
        Arc::clone(&self.hearts)
    }

    /// The body of the intake's thread; it ends when the engine is dropped.
    pub fn run(self, submitted: &Receiver<Submission>, wake: &Sender<Wake>) {
        while let Ok(submission) = submitted.recv() {
            if submission.answers.is_closed() {
                continue;
            }
            // Whatever text may make a library panic: that request gets its end by being dropped, and the next its turn.
            let Ok(prepared) = catch_unwind(AssertUnwindSafe(|| self.prepare(submission))) else {
                tracing::error!("a request could not be prepared: a library panicked");
                continue;
            };
            if let Some(sequence) = prepared
                && wake.send(Wake::Sequence(Box::new(sequence))).is_err()
            {
                break;
            }
        }
        self.hearts.close();
    }

    /// `None` where the answer has been given already.
    fn prepare(&self, submission: Submission) -> Option<Sequence> {
        let Submission { request, mask, answers, last, place, at } = submission;
        let span = tracing::info_span!(
            "request",
            request_id = %request.request_id,
            trace_id = %hex(&request.trace.trace_id),
            attempt = request.attempt,
            model = request.model,
        );
        let _entered = span.clone().entered();
        let deadline = at + Duration::from_millis(request.remaining_ms).min(FAR);
        let (prompt, resume) = match self.check(&request, deadline) {
            Ok(checked) => checked,
            Err(refused) => {
                tracing::info!(kind = ?refused.kind, message = refused.message, "request refused");
                last.say(Answer::Refused(refused));
                return None;
            }
        };
        let by_text = is_by_text(&request);
        let Request { mut sampling, priority, .. } = *request;
        // What the household has set goes before what a request asks for.
        sampling.max_tokens = sampling.max_tokens.into_iter().chain(self.shared.limits().max_tokens).min();
        let (prompt_tokens, resumed) = (prompt.len() as u32, resume.len() as u32);
        let mut sequence = Sequence {
            output: Output::new(answers, last),
            priority,
            deadline,
            tokens: [prompt, resume].concat(),
            computed: 0,
            slot: 0,
            has_slot: false,
            table: Table::default(),
            cached: 0,
            last_chunk: 0,
            prompt: prompt_tokens,
            resumed,
            context_length: self.context_length,
            detokenizer: match by_text {
                true => Detokenizer::behind_text(&sampling.stop),
                false => Detokenizer::new(&sampling.stop),
            },
            sampling,
            mask,
            place: Some(place),
            times: Times { submitted: at, admitted: None, first_token: None },
            span,
        };
        let (context_length, load) = (self.context_length, self.shared.load());
        sequence.output.send(Answer::Accepted(Accepted { prompt_tokens, cached_tokens: 0, context_length, load }));
        // Of a text all was delivered: there is nothing to be held back and found again.
        let end = if by_text { sequence.end_if_full() } else { sequence.replay(&*self.codec) };
        if let Some(end) = end {
            // The last token had been delivered, only the end had not. A stalled output cannot be here: the
            // channel has carried one frame at most.
            // It has its place in the queue still.
            let load = Load { waiting: load.waiting.saturating_sub(1), ..load };
            drop(sequence.end(end, load));
            return None;
        }
        sequence.output.queued(self.shared.waiting.load(Ordering::Relaxed).saturating_sub(1));
        self.hearts.add(sequence.output.heart());
        Some(sequence)
    }

    /// The tokens of what was said of the answer before.
    fn said(&self, request: &Request) -> Result<Vec<u32>, Refused> {
        if !is_by_text(request) {
            return match request.resume.iter().find(|id| **id >= self.vocabulary) {
                Some(id) => Err(invalid("resume", &format!("token {id} is none of the model's {}", self.vocabulary))),
                None => Ok(request.resume.clone()),
            };
        }
        if request.resume_text.is_empty() {
            return Err(invalid("resume", "neither its tokens nor its text are known"));
        }
        // No tokenizer makes fewer tokens of so many bytes, and tokenizing them would take long.
        if request.resume_text.len() / self.codec.longest().max(1) >= self.context_length as usize {
            return Err(invalid("resume", &format!("it does not fit into {} tokens", self.context_length)));
        }
        let text = String::from_utf8_lossy(&request.resume_text);
        self.codec.continuation(&text).map_err(|error| invalid("resume", &error.0))
    }

    /// The tokens of the prompt and of what was said before, or why not.
    fn check(&self, request: &Request, deadline: Instant) -> Result<(Vec<u32>, Vec<u32>), Refused> {
        match self.shared.state() {
            ModelState::Failed { why } => {
                return Err(refuse(RefusalKind::Draining, None, format!("the engine has failed: {why}")));
            }
            _ if self.shared.stopped() => {
                return Err(refuse(RefusalKind::Draining, None, "the engine is shutting down".into()));
            }
            _ => {}
        }
        if Instant::now() >= deadline {
            let message = "the time was up before the work began".into();
            return Err(refuse(RefusalKind::DeadlineExceeded, None, message));
        }
        if request.digest != self.digest {
            let message = format!("{} is not here: this engine runs {}", request.digest, self.digest);
            return Err(refuse(RefusalKind::UnknownModel, Some("model"), message));
        }
        if request.embed.is_some() {
            let message =
                format!("`{}` is a chat model (type llm): it writes texts and has no embeddings", request.model);
            return Err(refuse(RefusalKind::UnsupportedField, Some("model"), message));
        }
        check_extra(request, self.codec.tools())?;
        check_sampling(&request.sampling, self.vocabulary)?;
        if request.messages.is_empty() {
            return Err(invalid("messages", "there must be at least one message"));
        }
        let resume = self.said(request)?;
        let exceeded = |tokens: String| {
            let message = format!(
                "This model's maximum context length is {} tokens. However, your messages resulted in {tokens} tokens, \
                 and an answer needs at least one more. Please shorten the messages.",
                self.context_length
            );
            refuse(RefusalKind::ContextExceeded, Some("messages"), message)
        };
        // A message is at least one token, and rendering a crowd of them would take long.
        if request.messages.len() >= self.context_length as usize {
            return Err(exceeded(format!("more than {}", request.messages.len())));
        }
        // No tokenizer makes fewer tokens of so many bytes, and tokenizing them would take long.
        let bytes: usize = request.messages.iter().map(|message| message.content.len()).sum();
        let least = bytes / self.codec.longest().max(1);
        if least >= self.context_length as usize {
            return Err(exceeded(format!("more than {least}")));
        }
        let prompt =
            self.codec.prompt(&request.messages, &request.extra).map_err(|error| invalid("messages", &error.0))?;
        if prompt.len() >= self.context_length as usize {
            return Err(exceeded(prompt.len().to_string()));
        }
        if prompt.is_empty() {
            return Err(invalid("messages", "the prompt has no tokens"));
        }
        if prompt.len() + resume.len() > self.context_length as usize {
            let message = format!("prompt and resumed tokens do not fit into {} tokens", self.context_length);
            return Err(invalid("resume", &message));
        }
        Ok((prompt, resume))
    }
}

/// Not all tokens of what was said before are known: the answer goes on behind its text.
fn is_by_text(request: &Request) -> bool {
    request.resume.contains(&NO_TOKEN_ID)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
