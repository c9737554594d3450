//! One request on its way: sent to a worker, sent to another where that breaks, until its answer is at its end.
//!
//! Before the first token a broken attempt is tried again elsewhere; after it the answer moves: another worker of the
//! same content reads prompt and delivered tokens again and goes on behind them. The client sees one answer.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_protocol::EngineId;
use ingle_protocol::recovery::{NextMove, Standing, is_fault_of_worker};
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Accepted, Failed, FailureKind, NO_TOKEN_ID, RefusalKind, Refused, Request};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout_at};

use super::GatewayError;
use super::admission::Permit;
use super::attempt::{Attempt, Event, LOOK_AGAIN};
use super::choice::{self, Begun, Choice, Wanted};
use super::embed::{Gathered, broken};
use super::engines::Place;
use super::journal::{Attempt as AttemptRecord, Considered, Record};
use super::router::Router;
use super::warming::is_cold;
use crate::cluster::submit_remote;
use crate::json::Members;
use crate::monitor::Timeline;
use crate::worker::Answers;

/// How long a request waits for a worker that may come back, where no other is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// The request's time is up.
pub(super) fn out_of_time() -> Failed {
    let message = "the request's time was up before its answer was complete".to_owned();
    Failed { kind: FailureKind::DeadlineExceeded, message, retryable: false, migratable: false }
}

/// An attempt that is to be made.
struct Pending {
    cause: String,
    /// Somebody may come back who can take it.
    hopeful: bool,
    /// What the client is told where nobody takes it; `None` for the first.
    end: Option<Answer>,
}

/// What comes out of a flight.
pub(super) enum Step {
    /// The worker has taken it, or is alive.
    Alive,
    /// For the client: a token, or the end.
    Deliver(Answer),
}

/// See the module.
pub(super) struct Flight {
    router: Arc<Router>,
    request: Request,
    wanted: Wanted,
    pub deadline: Instant,
    began: Instant,
    attempt: Option<Attempt>,
    /// What led to the attempt that is to be made; kept until it is made, so that a step can be given up and taken
    /// again.
    pending: Pending,
    /// Engines that were asked and broke.
    avoid: Vec<EngineId>,
    retries: u32,
    migrations: u32,
    deaths: u32,
    numerics: Option<String>,
    /// Embeddings of the attempt that runs.
    pub gathered: Gathered,
    /// A far server answers now.
    at_endpoint: bool,
    /// Some of the delivered tokens have no ids.
    without_ids: bool,
    /// More than text was delivered: reasoning, calls of tools. No worker can be told of that.
    beside_text: bool,
    /// Features of the worker that answers.
    pub features: Vec<String>,
    pub accepted: Option<Accepted>,
    pub timeline: Timeline,
    pub record: Record,
    /// Held until the answer is at its end.
    _permit: Permit,
}

impl Flight {
    pub fn new(
        router: Arc<Router>,
        request: Request,
        wanted: Wanted,
        (began, deadline): (Instant, Instant),
        record: Record,
        permit: Permit,
    ) -> Self {
        Self {
            router,
            gathered: Gathered::of(&request),
            request,
            wanted,
            deadline,
            began,
            attempt: None,
            pending: Pending { cause: "first".into(), hopeful: true, end: None },
            avoid: Vec::new(),
            retries: 0,
            migrations: 0,
            deaths: 0,
            numerics: None,
            at_endpoint: false,
            without_ids: false,
            beside_text: false,
            features: Vec::new(),
            accepted: None,
            timeline: Timeline::new(began),
            record,
            _permit: permit,
        }
    }

    /// Name of the node that answers now.
    pub fn node(&self) -> String {
        let record = self.record.lock();
        record.attempts.last().map(|attempt| attempt.node.clone()).unwrap_or_default()
    }

    pub fn model(&self) -> &str {
        &self.request.model
    }

    fn delivered(&self) -> u32 {
        u32::try_from(self.request.resume.len()).unwrap_or(u32::MAX)
    }

    fn standing(&self) -> Standing {
        let Self { retries, migrations, deaths, .. } = *self;
        Standing { delivered: self.delivered(), retries, migrations, deaths }
    }

    /// What the answer asks of who goes on with it; `None` before its first token.
    fn begun(&self) -> Option<Begun> {
        let Self { without_ids, at_endpoint, .. } = *self;
        let has_extra = !self.request.extra.is_empty();
        (self.delivered() > 0).then_some(Begun { without_ids, at_endpoint, has_extra })
    }

    /// Says at the end of what broke why the answer did not go on elsewhere.
    fn note_why_not(&self, end: Answer, why: &str) -> Answer {
        self.record.lock().notes.push(format!("the answer could not go on elsewhere: {why}"));
        match end {
            Answer::Failed(failed) => {
                let message = format!("{}; the answer could not go on elsewhere: {why}", failed.message);
                Answer::Failed(Failed { message, retryable: false, migratable: false, ..failed })
            }
            end => end,
        }
    }

    /// The next thing that happens to the request. An error is its end before anything was delivered; afterwards the
    /// end is a frame.
    pub async fn step(&mut self) -> Result<Step, GatewayError> {
        if self.attempt.is_none()
            && let Err(error) = self.send().await
        {
            // The first trouble says more than that nobody was there afterwards.
            return match self.pending.end.take() {
                Some(end) => {
                    let end = match self.begun() {
                        Some(begun) => {
                            let offers = self.router.offers();
                            let why = choice::nobody_goes_on(&offers, &self.wanted, begun, &self.avoid);
                            self.note_why_not(end, &why)
                        }
                        None => end,
                    };
                    self.give_up(end)
                }
                None => Err(error),
            };
        }
        let delivered = self.delivered();
        let Some(attempt) = &mut self.attempt else { return Ok(Step::Alive) };
        let event = attempt.next(self.deadline).await;
        match event {
            Event::OutOfTime => self.give_up(Answer::Failed(out_of_time())),
            Event::Suspected(why) => self.suspected(&why),
            Event::Frame(answer) => {
                self.timeline.observe(&answer, Instant::now());
                match answer {
                    Answer::Accepted(accepted) => {
                        self.record.lock().prompt_tokens = accepted.prompt_tokens;
                        self.accepted.get_or_insert(accepted);
                        Ok(Step::Alive)
                    }
                    Answer::Progress(_) => Ok(Step::Alive),
                    Answer::Token(_) if self.request.embed.is_some() => self.failed(broken("it is words".into())),
                    // Who goes on behind a text counts its tokens in another way.
                    Answer::Token(token)
                        if token.position < delivered && token.id != NO_TOKEN_ID && !self.without_ids =>
                    {
                        tracing::warn!(position = token.position, "a worker says a token again; it is left out");
                        Ok(Step::Alive)
                    }
                    Answer::Token(token) => {
                        attempt.place.is_read();
                        if !attempt.any_token {
                            attempt.any_token = true;
                            attempt.engine.succeeded(&self.wanted.beginnings);
                        }
                        // A long piece of an endpoint's text comes in several frames of one position.
                        if token.position >= delivered {
                            self.request.resume.push(token.id);
                        }
                        self.without_ids |= token.id == NO_TOKEN_ID;
                        self.beside_text |= says_more_than_text(&token.extra);
                        self.request.resume_text.extend_from_slice(&token.text);
                        if let Some(record) = self.record.lock().attempts.last_mut() {
                            record.tokens += 1;
                        }
                        Ok(Step::Deliver(Answer::Token(token)))
                    }
                    Answer::Embedding(embedding) => match self.gathered.take(embedding) {
                        Ok(()) => Ok(Step::Alive),
                        Err(failed) => self.failed(failed),
                    },
                    Answer::Finished(finished) => {
                        if let Err(failed) = self.gathered.check_whole() {
                            return self.failed(failed);
                        }
                        attempt.engine.succeeded(&self.wanted.beginnings);
                        self.note_end("finished");
                        self.attempt = None;
                        Ok(Step::Deliver(Answer::Finished(finished)))
                    }
                    Answer::Refused(refused) => self.refused(refused),
                    Answer::Failed(failed) => self.failed(failed),
                }
            }
        }
    }

    /// The request's end that is not well: an error before the first token, a frame after it.
    fn give_up(&mut self, end: Answer) -> Result<Step, GatewayError> {
        self.attempt = None;
        let begun = self.delivered() > 0;
        match end {
            Answer::Refused(refused) if !begun => Err(GatewayError::Refused(refused)),
            Answer::Failed(failed) if !begun => Err(GatewayError::Failed(failed)),
            Answer::Refused(refused) => {
                let message = format!("the answer could not go on elsewhere: {}", refused.message);
                let kind = FailureKind::ConnectionLost;
                Ok(Step::Deliver(Answer::Failed(Failed { kind, message, retryable: false, migratable: false })))
            }
            end => Ok(Step::Deliver(end)),
        }
    }

    fn note_end(&self, how: &str) {
        if let Some(attempt) = self.record.lock().attempts.last_mut() {
            attempt.ended.get_or_insert_with(|| how.to_owned());
        }
    }

    fn refused(&mut self, refused: Refused) -> Result<Step, GatewayError> {
        self.note_end(&format!("refused: {}", refused.message));
        if refused.kind.is_retryable() {
            // It is there and says so.
            self.avoid.extend(self.attempt.take().map(|attempt| attempt.id));
        }
        let next = self.standing().after_refusal(&refused);
        let cause = format!("{:?}: {}", refused.kind, refused.message);
        // Waiting for a place is the business of the door, not of a request that is through it already.
        let hopeful = matches!(refused.kind, RefusalKind::Loading | RefusalKind::UnknownModel);
        // Where it broke first says more than that it could not go on there.
        let end = match self.pending.end.take() {
            Some(first) if self.delivered() > 0 => match next {
                NextMove::GiveUp => self.note_why_not(first, &refused.message),
                NextMove::Retry | NextMove::Migrate => first,
            },
            _ => Answer::Refused(refused),
        };
        self.go_on(next, &cause, end, hopeful)
    }

    fn failed(&mut self, failed: Failed) -> Result<Step, GatewayError> {
        self.note_end(&format!("{}: {}", failed.kind.as_str(), failed.message));
        if let Some(attempt) = self.attempt.take() {
            if is_fault_of_worker(failed.kind) {
                attempt.engine.failed(&failed.message, self.router.now());
            }
            self.avoid.push(attempt.id);
        }
        self.deaths += u32::from(matches!(failed.kind, FailureKind::EngineDied | FailureKind::EngineError));
        let next = self.standing().after_failure(&failed);
        let cause = format!("{}: {}", failed.kind.as_str(), failed.message);
        self.go_on(next, &cause, Answer::Failed(failed), true)
    }

    /// The worker is under suspicion: move, if somebody else can go on. It may heal otherwise.
    fn suspected(&mut self, why: &str) -> Result<Step, GatewayError> {
        let Some(attempt) = &self.attempt else { return Ok(Step::Alive) };
        let (id, node) = (attempt.id, attempt.node_name.clone());
        let offers = self.router.offers();
        let mut avoid = self.avoid.clone();
        avoid.push(id);
        let (engines, now) = (&self.router.engines, self.router.now());
        let other = choice::choose(&offers, engines, &self.wanted, self.begun(), &avoid, now);
        let elsewhere = other.is_some_and(|other| other.id.node != id.node);
        let message = format!("{node} is under suspicion: {why}");
        let failed = Failed { kind: FailureKind::WorkerSilent, message, retryable: true, migratable: true };
        match self.standing().after_failure(&failed) {
            NextMove::Migrate if self.beside_text => Ok(Step::Alive),
            NextMove::Retry | NextMove::Migrate if elsewhere => self.failed(failed),
            // Nobody else: it may go on by itself, and ends with its connection or its time otherwise.
            _ => Ok(Step::Alive),
        }
    }

    fn go_on(&mut self, next: NextMove, cause: &str, end: Answer, hopeful: bool) -> Result<Step, GatewayError> {
        let how = match next {
            NextMove::GiveUp => return self.give_up(end),
            NextMove::Retry if !self.router.try_retry() => {
                self.record.lock().notes.push("not tried again: too many requests are, just now".into());
                return self.give_up(end);
            }
            NextMove::Retry => {
                self.retries += 1;
                "retry"
            }
            NextMove::Migrate if self.beside_text => {
                let end = self.note_why_not(end, "it has said more than text (reasoning or calls of tools)");
                return self.give_up(end);
            }
            NextMove::Migrate => {
                self.migrations += 1;
                let from = self.record.lock().attempts.last().map(|attempt| attempt.node.clone());
                self.router.note_move(&from.unwrap_or_default(), &self.request.model);
                "migration"
            }
        };
        tracing::info!(how, cause, delivered = self.delivered(), "the request goes on elsewhere");
        self.request.attempt += 1;
        self.attempt = None;
        self.pending = Pending { cause: format!("{how} ({cause})"), hopeful, end: Some(end) };
        Ok(Step::Alive)
    }

    /// Sends the request to the best worker. Waits for one where somebody may come back.
    async fn send(&mut self) -> Result<(), GatewayError> {
        let since = Instant::now();
        let until = self.deadline.min(since + PATIENCE);
        loop {
            let offers = self.router.offers();
            let now = self.router.now();
            if self.delivered() == 0 {
                self.router.follow_name(&mut self.request, &mut self.wanted, &offers);
            }
            let begun = self.begun();
            if let Some(chosen) = choice::choose(&offers, &self.router.engines, &self.wanted, begun, &self.avoid, now) {
                self.send_to(chosen).await;
                return Ok(());
            }
            let waits = self.pending.hopeful
                && choice::is_hope(&offers, self.wanted.digest, begun, &self.avoid, since.elapsed());
            // A model that went while its request was under way is loaded again for it.
            let coming = (self.pending.hopeful && begun.is_none() && is_cold(&offers, &self.request.model))
                .then(|| self.router.coming(&offers, &self.request.model))
                .flatten();
            let is_late = Instant::now() >= if coming.is_some() { self.deadline } else { until };
            if !(waits || coming.is_some()) || is_late {
                return Err(choice::nobody(&offers, &self.router.engines, &self.request.model, now));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn send_to(&mut self, chosen: Choice<'_>) {
        let Choice { offer, id, engine, cached_tokens, considered } = chosen;
        self.request.remaining_ms =
            self.deadline.saturating_duration_since(Instant::now()).as_millis().try_into().unwrap_or(u64::MAX);
        self.gathered.begin_anew();
        let numerics = &offer.facts.numerics;
        self.features.clone_from(&offer.facts.features);
        self.at_endpoint = offer.facts.is_endpoint();
        if let Some(before) = self.numerics.replace(numerics.clone())
            && before != *numerics
            && self.delivered() > 0
        {
            let note = format!(
                "moved from {before} to {numerics}: the answer goes on without a gap, but may differ from an undisturbed one"
            );
            self.record.lock().notes.push(note);
        }
        self.note_attempt(self.pending.cause.clone(), considered, offer.node_name.clone(), numerics.clone());
        let unread = self.wanted.demand.prompt_tokens.saturating_sub(cached_tokens);
        let place = Place::take(&engine, unread, self.router.now());
        tracing::debug!(node = offer.node_name, attempt = self.request.attempt, "sent to a worker");
        let suspicion = engine.watch_suspicion();
        let submitting = async {
            match &offer.link {
                None => Ok(self.router.workers.submit_to(Some(id.index), self.request.clone()).await),
                Some(link) => submit_remote(link, &self.request).await.map(Answers::from),
            }
        };
        let answers = match at_most(self.deadline, submitting).await {
            Some(Ok(answers)) => answers,
            // As one that says so itself.
            Some(Err(refused)) => one(Answer::Refused(refused)),
            None => one(Answer::Failed(out_of_time())),
        };
        let node_name = offer.node_name.clone();
        self.attempt = Some(Attempt { id, node_name, engine, place, answers, suspicion, any_token: false });
    }

    fn note_attempt(&self, cause: String, considered: Vec<Considered>, node: String, numerics: String) {
        let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let attempt = AttemptRecord { at_ms, cause, considered, node, numerics, tokens: 0, ended: None };
        self.record.lock().attempts.push(attempt);
    }

    /// What is written down when it is over.
    pub fn close(&self, outcome: &str) {
        let answer_tokens = self.delivered();
        self.note_end(outcome);
        {
            let mut record = self.record.lock();
            record.outcome = Some(outcome.to_owned());
            record.total_ms = u64::try_from(self.began.elapsed().as_millis()).ok();
        }
        if outcome == "finished" {
            let bytes = self.wanted.beginnings.last().map_or(0, |(_, bytes)| *bytes);
            let prompt_tokens = self.accepted.map_or(0, |accepted| accepted.prompt_tokens);
            self.router.learn(&self.request.model, answer_tokens, bytes, prompt_tokens);
        }
    }
}

/// What an endpoint said with a token was more than its text.
fn says_more_than_text(extra: &[u8]) -> bool {
    !extra.is_empty() && Members::parse(extra).is_ok_and(|members| members.has("delta"))
}

/// An answer that is one frame.
fn one(answer: Answer) -> Answers {
    let (sender, answers) = mpsc::channel(1);
    // The channel is new and has room for one.
    let _ = sender.try_send(answer);
    answers.into()
}

async fn at_most<T>(deadline: Instant, doing: impl Future<Output = T>) -> Option<T> {
    timeout_at(deadline.into(), doing).await.ok()
}
