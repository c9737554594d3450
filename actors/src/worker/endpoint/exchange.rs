//! One request at the far side: the HTTP exchange, from its first byte to its last. Dropping the answer's reader
//! drops the connection, which is what tells the far side to stop.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_engine::DEFAULT_READER_DEADLINE as READER_DEADLINE;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Accepted, Failed, FailureKind, Finished, Progress, RefusalKind, Token};
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE};
use reqwest::{Response, StatusCode};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Interval, MissedTickBehavior, interval_at, timeout};

use super::address::Secret;
use super::errors::{FarError, Trouble, of_status, of_transport, retry_after};
use super::gate::Gate;
use super::meter;
use super::sse::EventReader;
use super::stream::{AnswerStream, Behind};
use crate::worker::Workers;

/// How often a request that waits says so, and limits are looked at.
const TICK: Duration = Duration::from_millis(250);
/// The most text in one frame, in bytes.
const LONGEST_TEXT: usize = 32 << 10;
/// The most that is read of an answer that is an error, and how long that may take.
const ERROR_LIMIT: usize = 64 << 10;
const ERROR_DEADLINE: Duration = Duration::from_secs(2);
/// How often a request waits for its turn anew that came to be one too many.
const MOST_TURNS: u32 = 8;
/// How long the end of the body may come behind the end of the answer; later, the connection is not used again.
const TAIL_DEADLINE: Duration = Duration::from_secs(1);

/// How long the far side may be silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Until the first token: it may have others to answer first, and a long prompt to read.
    pub first_token: Duration,
    /// Between two pieces of the answer.
    pub silence: Duration,
}

/// One request on its way.
#[derive(Debug)]
pub struct Exchange {
    /// The request, ready to go.
    pub request: reqwest::RequestBuilder,
    /// `host:port`, for messages.
    pub endpoint: String,
    /// What must not be repeated.
    pub key: Option<Secret>,
    /// When the answer is worth nothing any more.
    pub deadline: Instant,
    /// See [`Patience`].
    pub patience: Patience,
    /// Its place among the others.
    pub place: meter::Exchange,
    /// Where it waits for its turn.
    pub gate: Arc<Gate>,
    /// Told where the far side has other room than before.
    pub workers: Arc<Workers>,
    /// 0 where it is not known.
    pub context_length: u32,
    /// Embeddings that are due; `None` for an answer in words.
    pub embeddings: Option<usize>,
    /// What was said before.
    pub behind: Behind,
    /// Told where the far side does not answer.
    pub trouble: Arc<Notify>,
}

/// How it came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The far side is not to blame.
    Well,
    /// It broke there.
    Broken,
}

/// Why an exchange is over early.
pub enum Over {
    /// The reader has left.
    Left,
    Trouble(Trouble),
}

impl From<Trouble> for Over {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// What must be watched all the time.
pub struct Watch {
    answers: mpsc::Sender<Answer>,
    ticks: Interval,
    began: Instant,
    deadline: Instant,
    patience: Patience,
    /// When the far side last said something.
    pub heard: Instant,
    any_token: bool,
    /// `host:port`, for messages.
    pub endpoint: String,
    /// For how long the far side asks to be left alone.
    pause: Option<Duration>,
}

impl Watch {
    /// Waits for `work` within all limits, and says every now and then that the request waits.
    pub async fn until<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Over> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                () = self.answers.closed() => return Err(Over::Left),
                _ = self.ticks.tick() => {}
            }
            self.check(Instant::now())?;
        }
    }

    fn check(&mut self, now: Instant) -> Result<(), Trouble> {
        let endpoint = &self.endpoint;
        let silent = |limit: Duration, since: Instant, what: &str| {
            (now.saturating_duration_since(since) >= limit).then(|| {
                let message = format!("the endpoint {endpoint} sent no {what} for {} s", limit.as_secs_f32());
                Trouble::Failed(FailureKind::WorkerSilent, message)
            })
        };
        if now >= self.deadline {
            let message = format!("the request's time was up before the endpoint {endpoint} had answered it");
            return Err(Trouble::Failed(FailureKind::DeadlineExceeded, message));
        }
        let trouble = if self.any_token {
            silent(self.patience.silence, self.heard, "line")
        } else {
            silent(self.patience.first_token, self.began, "token")
        };
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        if !self.any_token {
            // Nobody knows how many others the far side has. A reader with a full channel sees that it goes on.
            let _ = self.answers.try_send(Answer::Progress(Progress::Queued { ahead: 0 }));
        }
        Ok(())
    }

    /// Passes a frame on. A reader that does not keep up is waited for, for a while.
    pub async fn send(&mut self, answer: Answer) -> Result<(), Over> {
        let answer = match self.answers.try_send(answer) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(Over::Left),
            Err(mpsc::error::TrySendError::Full(answer)) => answer,
        };
        // Nothing is read from the far side meanwhile: TCP makes it wait as well.
        match timeout(READER_DEADLINE, self.answers.send(answer)).await {
            Ok(sent) => {
                // Who is not listened to is not silent.
                self.heard = Instant::now();
                sent.map_err(|_| Over::Left)
            }
            Err(_) => {
                let message = format!("nobody read the answer for {} s", READER_DEADLINE.as_secs());
                Err(Trouble::Failed(FailureKind::ReaderTooSlow, message).into())
            }
        }
    }

    async fn send_token(&mut self, token: Token) -> Result<(), Over> {
        if token.text.len() <= LONGEST_TEXT {
            return self.send(Answer::Token(token)).await;
        }
        let Token { position, id, text, logprobs, extra } = token;
        let text = String::from_utf8_lossy(&text);
        let (mut rest, mut extra, mut logprobs) = (&*text, Some(extra), logprobs);
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.floor_char_boundary(LONGEST_TEXT));
            let (text, extra) = (piece.as_bytes().to_vec(), extra.take().unwrap_or_default());
            self.send(Answer::Token(Token { position, id, text, logprobs: logprobs.take(), extra })).await?;
            rest = behind;
        }
        Ok(())
    }
}

impl Exchange {
    /// Runs it to its end.
    pub async fn run(self, answers: mpsc::Sender<Answer>) -> Ended {
        // For the last word to a reader that reads too slowly.
        let Ok(last_word) = answers.clone().try_reserve_owned() else { return Ended::Well };
        let now = Instant::now();
        let mut ticks = interval_at((now + TICK).into(), TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Self { mut request, endpoint, key, deadline, patience, mut place, .. } = self;
        let Self { gate, workers, context_length, embeddings, .. } = self;
        let prompt_tokens = place.prompt_tokens();
        let resumed = self.behind.position > 0;
        let mut stream = AnswerStream::new(&endpoint, prompt_tokens, self.behind);
        let (heard, any_token, pause) = (now, false, None);
        let mut watch = Watch { answers, ticks, began: now, deadline, patience, heard, any_token, endpoint, pause };
        let accepted = Accepted { prompt_tokens, cached_tokens: 0, context_length, load: place.load() };
        let mut inside = None;
        let told = async {
            if let Some(due) = embeddings {
                inside = Some(watch.until(gate.enter()).await?);
                let finished = super::embed::ask(&mut watch, request, due, accepted, &mut place).await?;
                let load = place.end();
                return watch.send(Answer::Finished(Finished { load, ..finished })).await;
            }
            let mut turns = 0..MOST_TURNS;
            let mut response = loop {
                let entered = watch.until(gate.enter()).await?;
                watch.began = Instant::now();
                let again = request.try_clone();
                let begun = begin(&mut watch, request).await;
                // Its room is taken by others of ours: when they end there is some.
                if let (Err(Over::Trouble(Trouble::Refused(refused))), Some(again)) = (&begun, again)
                    && refused.kind == RefusalKind::Busy
                    && watch.pause.is_none()
                    && gate.has_others()
                    && turns.next().is_some()
                {
                    if gate.refused(&entered, None, Instant::now()) {
                        workers.note_change();
                    }
                    request = again;
                    continue;
                }
                inside = Some(entered);
                break begun?;
            };
            watch.send(Answer::Accepted(accepted)).await?;
            pass_on(&mut watch, &mut response, &mut stream, &mut place).await?;
            let finished = stream.finish()?;
            if gate.went_well() {
                workers.note_change();
            }
            inside = None;
            let load = place.end();
            watch.send(Answer::Finished(Finished { load, ..finished })).await?;
            // A body that is read to its end leaves a connection that can be used again.
            let _ = timeout(TAIL_DEADLINE, response.chunk()).await;
            Ok(())
        };
        let found = match told.await {
            Ok(()) | Err(Over::Left) => return Ended::Well,
            Err(Over::Trouble(found)) => found,
        };
        let clean = |message: String| key.as_ref().map_or(message.clone(), |key| key.struck_from(&message));
        match found {
            Trouble::Refused(mut refused) => {
                let changed = match (refused.kind, &inside) {
                    (RefusalKind::Busy, Some(inside)) => gate.refused(inside, watch.pause, Instant::now()),
                    _ => false,
                };
                if changed {
                    workers.note_change();
                }
                if refused.kind == RefusalKind::Loading {
                    self.trouble.notify_one();
                }
                refused.message = clean(refused.message);
                last_word.send(Answer::Refused(refused));
                Ended::Well
            }
            Trouble::Failed(kind, message) => {
                tracing::info!(?kind, message = clean(message.clone()), "an endpoint's answer broke");
                if matches!(kind, FailureKind::ConnectionLost | FailureKind::WorkerSilent | FailureKind::EngineError) {
                    self.trouble.notify_one();
                }
                let final_word = matches!(kind, FailureKind::DeadlineExceeded | FailureKind::ReaderTooSlow);
                let any_token = watch.any_token;
                last_word.send(Answer::Failed(Failed {
                    kind,
                    message: clean(message),
                    retryable: !final_word && !any_token && !resumed,
                    migratable: !final_word && (any_token || resumed),
                }));
                if final_word { Ended::Well } else { Ended::Broken }
            }
        }
    }
}

/// Sends the request; returns when an answer begins that is no error.
pub async fn sent(watch: &mut Watch, request: reqwest::RequestBuilder) -> Result<Response, Over> {
    let endpoint = watch.endpoint.clone();
    // On the heap: it is large.
    let response = watch.until(Box::pin(request.send())).await?.map_err(|error| of_transport(&error, &endpoint))?;
    let status = response.status();
    if status != StatusCode::OK {
        let headers = response.headers().clone();
        watch.pause = retry_after(&headers);
        let error = FarError::read(&watch.until(error_body(response)).await?);
        return Err(of_status(status, &headers, error, &endpoint).into());
    }
    let coding = response.headers().get(CONTENT_ENCODING).map(|coding| String::from_utf8_lossy(coding.as_bytes()));
    if let Some(coding) = coding.filter(|coding| !coding.eq_ignore_ascii_case("identity")) {
        let coding: String = coding.chars().filter(|c| !c.is_control()).take(40).collect();
        let message = format!("the endpoint {endpoint} answers in the coding {coding}, which nobody asked for");
        return Err(Trouble::Failed(FailureKind::Protocol, message).into());
    }
    watch.heard = Instant::now();
    Ok(response)
}

/// Sends the request; returns when a stream of events begins.
async fn begin(watch: &mut Watch, request: reqwest::RequestBuilder) -> Result<Response, Over> {
    let response = sent(watch, request).await?;
    let endpoint = watch.endpoint.clone();
    let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.trim_start().get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case("text/event-stream")) {
        return Ok(response);
    }
    let kind: String = kind.chars().take(80).collect();
    let body = watch.until(error_body(response)).await?;
    let what = if kind.is_empty() { "something without a content type".to_owned() } else { kind };
    let said = FarError::read(&body).message;
    let said: String = said.chars().take(300).collect();
    let message = format!("the endpoint {endpoint} answers with {what} where a stream of events is due: {said}");
    Err(Trouble::Failed(FailureKind::Protocol, message).into())
}

/// The beginning of a body that is an error, as far as it comes in time.
async fn error_body(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    let reading = async {
        while let Ok(Some(piece)) = response.chunk().await {
            body.extend_from_slice(&piece[..piece.len().min(ERROR_LIMIT - body.len())]);
            if body.len() >= ERROR_LIMIT {
                break;
            }
        }
    };
    // What has come says more than nothing.
    let _ = timeout(ERROR_DEADLINE, reading).await;
    body
}

/// Events in, frames out, until the stream or the answer ends.
async fn pass_on(
    watch: &mut Watch,
    response: &mut Response,
    stream: &mut AnswerStream,
    place: &mut meter::Exchange,
) -> Result<(), Over> {
    let mut reader = EventReader::default();
    let mut ended = false;
    while !ended && !stream.is_done() {
        let piece = watch.until(response.chunk()).await?.map_err(|error| of_transport(&error, &watch.endpoint))?;
        let now = Instant::now();
        if now >= watch.deadline {
            // Whoever always has something to say is never waited for.
            watch.check(now)?;
        }
        ended = piece.is_none();
        reader.push(piece.as_deref().unwrap_or_default());
        let lines = reader.lines();
        loop {
            let event = if ended { reader.end() } else { reader.event() };
            let Some(data) = event.map_err(|error| stream.lie(error))? else { break };
            let token = stream.take(data)?;
            // Counted before it is sent: whoever has read a token finds it in the counters.
            place.observe(token.is_some(), now);
            if let Some(token) = token {
                watch.any_token = true;
                watch.send_token(token).await?;
            }
        }
        // Bytes alone are no progress: a line that never ends could go on like that for days.
        if reader.lines() > lines {
            // Who did not read in time may have been waited for since.
            watch.heard = watch.heard.max(now);
        } else {
            watch.check(now)?;
        }
    }
    Ok(())
}
