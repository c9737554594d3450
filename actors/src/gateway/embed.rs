//! Texts as numbers: by the same door, to the same workers, watched and tried again as answers are. Nothing is delivered
//! until all of it is there, so an attempt that breaks in the middle is one that never was.

use std::time::{Duration, Instant};

use ingle_protocol::RequestId;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Embed, Embedding, Failed, FailureKind, Finished, MOST_DIMENSIONS, Priority, Request, Sampling, TraceContext, Usage,
};
use tracing::Instrument;

use super::GatewayError;
use super::flight::{Flight, Step};
use super::journal::Record;
use super::router::Gateway;
use crate::monitor::{Outcome, request_span};

/// One request for embeddings as the dialects hand it over.
#[derive(Debug, Clone)]
pub struct EmbedRequest {
    /// Chosen at ingress.
    pub request_id: RequestId,
    /// The trace that it belongs to.
    pub trace: TraceContext,
    /// On whose behalf.
    pub principal: String,
    /// Its place among others.
    pub priority: Priority,
    /// How long an answer is still worth something.
    pub deadline: Duration,
    /// A model's name; empty or `default` for the default one where that embeds, else for the only one that does.
    pub model: String,
    /// What is to be embedded.
    pub embed: Embed,
    /// Members of the request's JSON that have no field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// Everything that was asked for.
#[derive(Debug)]
pub struct Embedded {
    /// Name of the node that answered.
    pub node: String,
    /// The model's full name.
    pub model: String,
    /// One for each input, in their order.
    pub embeddings: Vec<Vec<f32>>,
    /// What it cost.
    pub usage: Usage,
    /// What became of the request and why.
    pub record: Record,
}

/// The embeddings of one attempt, as they come.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// How many there will be; 0 for a conversation.
    due: usize,
    embeddings: Vec<Vec<f32>>,
}

impl Gathered {
    pub fn of(request: &Request) -> Self {
        Self { due: request.embed.as_ref().map_or(0, |embed| embed.inputs.len()), embeddings: Vec::new() }
    }

    /// Another attempt begins. Embeddings of two workers are not mixed: they may be of different arithmetic.
    pub fn begin_anew(&mut self) {
        self.embeddings.clear();
    }

    /// The next one, or why it is none that was asked for.
    pub fn take(&mut self, embedding: Embedding) -> Result<(), Failed> {
        let Embedding { index, values } = embedding;
        let known = self.embeddings.first().map_or(values.len(), Vec::len);
        if index as usize != self.embeddings.len() || self.embeddings.len() >= self.due {
            return Err(broken(format!("embedding {index} came where {} was due", self.embeddings.len())));
        }
        if values.is_empty() || values.len() > MOST_DIMENSIONS || values.len() != known {
            return Err(broken(format!("embedding {index} has {} numbers, the first one {known}", values.len())));
        }
        self.embeddings.push(values);
        Ok(())
    }

    /// None is missing.
    pub fn check_whole(&self) -> Result<(), Failed> {
        match self.due - self.embeddings.len() {
            0 => Ok(()),
            missing => Err(broken(format!("{missing} of {} embeddings are missing", self.due))),
        }
    }
}

/// What a worker of ours never says.
pub(super) fn broken(what: String) -> Failed {
    let message = format!("the worker's answer is not what was asked for: {what}");
    Failed { kind: FailureKind::Protocol, message, retryable: true, migratable: false }
}

/// A flight that is noted as over, however it ends.
struct Noted {
    flight: Flight,
    gateway: Gateway,
    is_over: bool,
}

impl Noted {
    fn over(&mut self, outcome: Outcome, how: &str) {
        self.is_over = true;
        self.flight.close(how);
        let (node, model) = (self.flight.node(), self.flight.model().to_owned());
        self.flight.timeline.clone().close(self.gateway.latencies(), &node, &model, outcome, Instant::now());
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if !self.is_over {
            // Nobody else drops what is under way. That also tells the worker.
            self.over(Outcome::Cancelled, "client left");
        }
    }
}

impl Gateway {
    /// Waits for its turn, asks the best worker, and another one where that breaks, and returns when all of it is there.
    /// Dropping this cancels the request, here and on the worker.
    pub async fn embed(&self, asked: EmbedRequest) -> Result<Embedded, GatewayError> {
        let began = Instant::now();
        let deadline = began + asked.deadline;
        let request = Request {
            request_id: asked.request_id,
            attempt: 0,
            trace: asked.trace,
            principal: asked.principal,
            priority: asked.priority,
            remaining_ms: 0,
            model: asked.model,
            digest: Default::default(),
            messages: Vec::new(),
            sampling: Sampling::default(),
            embed: Some(asked.embed),
            resume: Vec::new(),
            resume_text: Vec::new(),
            extra: asked.extra,
        };
        let span = request_span("route", &request);
        async {
            let flight = self.depart(request, (began, deadline)).await?;
            let _open = self.open();
            self.gather(Noted { flight, gateway: self.clone(), is_over: false }).await
        }
        .instrument(span)
        .await
    }

    async fn gather(&self, mut noted: Noted) -> Result<Embedded, GatewayError> {
        loop {
            let error = match noted.flight.step().await {
                Ok(Step::Alive) => continue,
                Ok(Step::Deliver(Answer::Finished(finished))) => {
                    noted.over(Outcome::Finished, "finished");
                    return Ok(embedded(&mut noted.flight, &finished));
                }
                Ok(Step::Deliver(Answer::Failed(failed))) => GatewayError::Failed(failed),
                Ok(Step::Deliver(_)) => continue,
                Err(error) => error,
            };
            noted.over(Outcome::Failed, &error.to_string());
            return Err(error);
        }
    }
}

fn embedded(flight: &mut Flight, finished: &Finished) -> Embedded {
    Embedded {
        node: flight.node(),
        model: flight.model().to_owned(),
        embeddings: std::mem::take(&mut flight.gathered.embeddings),
        usage: finished.usage,
        record: flight.record.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_are_taken_in_order_all_of_one_length_and_none_too_many() {
        let gathered = || Gathered { due: 2, embeddings: vec![] };
        let one = |index, count| Embedding { index, values: vec![0.5; count] };
        let mut good = gathered();
        assert!(good.check_whole().is_err());
        good.take(one(0, 3)).unwrap();
        good.take(one(1, 3)).unwrap();
        assert!(good.check_whole().is_ok() && good.take(one(2, 3)).is_err());
        good.begin_anew();
        assert!(good.take(one(0, 5)).is_ok(), "another attempt has its own");
        for bad in [one(1, 3), one(0, 0), one(0, MOST_DIMENSIONS + 1)] {
            let failed = gathered().take(bad).unwrap_err();
            assert!(failed.kind == FailureKind::Protocol && failed.retryable, "{failed:?}");
        }
        let mut other = gathered();
        other.take(one(0, 3)).unwrap();
        assert!(other.take(one(1, 4)).is_err() && other.check_whole().is_err());
        assert!(Gathered::default().take(one(0, 3)).is_err(), "a conversation has none");
        assert!(Gathered::default().check_whole().is_ok());
    }
}
