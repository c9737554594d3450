//! Requests between nodes: one bidirectional QUIC stream for each.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use ingle_protocol::wire::v2::{Failed, FailureKind, RefusalKind, Refused, Request};
use ingle_protocol::wire::{Answer, StreamKind, Version, Versioned};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Mesh;
use super::link::{PeerLink, STREAM_DEADLINE, open_unnamed};
use crate::frames::{FrameError, FrameReader, read_body_in};
use crate::worker::SILENCE_LIMIT;

/// How long a request waits for a free stream to the peer before it counts as busy.
const OPEN_DEADLINE: Duration = Duration::from_millis(250);
/// Frames of one answer go out together up to about so many bytes.
const BATCH: usize = 16 << 10;
/// Why a stream was stopped: the client left.
const CLIENT_LEFT: VarInt = VarInt::from_u32(1);

/// Sends the request to a member.
pub async fn submit_remote(link: &PeerLink, request: &Request) -> Result<RemoteAnswers, Refused> {
    let busy = |error: FrameError| Refused {
        kind: RefusalKind::Busy,
        message: format!("the worker node takes no more requests now ({error})"),
        param: None,
        retry_after_ms: Some(1_000),
    };
    let (on_link, version) = (link.requests.token(), link.version);
    let frame = request.encode_for(version).map_err(|error| busy(error.into()))?;
    let mut bytes = BytesMut::with_capacity(frame.body.len() + 16);
    bytes.put_u8(StreamKind::Inference as u8);
    frame.write(&mut bytes);
    let (mut send, receive) = open_unnamed(&link.connection, OPEN_DEADLINE).await.map_err(busy)?;
    match timeout(STREAM_DEADLINE, send.write_all(&bytes)).await {
        Ok(written) => written.map_err(|error| busy(FrameError::Io(error.into())))?,
        Err(_) => return Err(busy(FrameError::Ended)),
    }
    Ok(RemoteAnswers {
        version,
        send,
        receive,
        frames: FrameReader::new(version),
        waits: None,
        silence: Box::pin(sleep(SILENCE_LIMIT)),
        any_token: false,
        over: false,
        _on_link: on_link,
    })
}

/// The answer of a member: frames as they come, always with a last one. Dropping it cancels the request there.
#[derive(Debug)]
pub struct RemoteAnswers {
    version: Version,
    send: SendStream,
    receive: RecvStream,
    frames: FrameReader,
    /// Since when the next frame is waited for; `None` while nobody asks for it.
    waits: Option<Instant>,
    /// Looks at `waits` every now and then: cheaper than a timer for each frame.
    silence: Pin<Box<Sleep>>,
    any_token: bool,
    over: bool,
    /// The connection stays for as long as this lives.
    _on_link: TaskTrackerToken,
}

impl RemoteAnswers {
    /// The next frame; `None` behind the last one. Loses nothing where it is dropped before its end.
    pub async fn recv(&mut self) -> Option<Answer> {
        if self.over {
            return None;
        }
        let waits = *self.waits.get_or_insert_with(Instant::now);
        let read = loop {
            tokio::select! {
                biased;
                read = self.frames.next(&mut self.receive) => break Some(read),
                () = &mut self.silence => {}
            }
            let until = waits + SILENCE_LIMIT;
            if Instant::now() >= until {
                break None;
            }
            self.silence.as_mut().reset(until.into());
        };
        self.waits = None;
        let answer = match read {
            Some(Ok(Some(frame))) => Answer::decode_for(&frame, self.version).map_err(FrameError::from),
            Some(Ok(None)) => Err(FrameError::Ended),
            Some(Err(error)) => Err(error),
            None => {
                let message = "the worker node went silent in the middle of the answer".to_owned();
                let kind = FailureKind::WorkerSilent;
                Ok(Answer::Failed(Failed { kind, message, retryable: !self.any_token, migratable: true }))
            }
        };
        let answer = answer.unwrap_or_else(|error| {
            let kind =
                if matches!(error, FrameError::Wire(_)) { FailureKind::Protocol } else { FailureKind::ConnectionLost };
            let message = format!("the connection to the worker node broke in the middle of the answer ({error})");
            Answer::Failed(Failed { kind, message, retryable: !self.any_token, migratable: true })
        });
        self.any_token |= matches!(answer, Answer::Token(_));
        self.over = answer.is_last();
        Some(answer)
    }
}

impl Drop for RemoteAnswers {
    fn drop(&mut self) {
        // Whatever the reason for the end: the other side must not go on.
        let _ = self.receive.stop(CLIENT_LEFT);
        let _ = self.send.reset(CLIENT_LEFT);
    }
}

/// What a peer of an older version has got of an answer.
#[derive(Debug, Default)]
struct Carried {
    text: bool,
    lost: bool,
}

impl Carried {
    /// The frame as it may go to a peer that speaks `version`. An answer that would end well there and have nothing in
    /// it, because all of it was said in what the version has no field for (an endpoint's tool call), ends in a failure:
    /// nothing is lost in silence.
    fn check(&mut self, version: Version, answer: Answer) -> Answer {
        match &answer {
            Answer::Token(token) => {
                self.text |= !token.text.is_empty();
                self.lost |= version < Version::V2 && !token.extra.is_empty();
            }
            Answer::Finished(_) if self.lost && !self.text => {
                let message = "the answer is not a text, and the node where the request came in is too old for what it \
                               is: update Ingle there, or ask another node";
                let (kind, message) = (FailureKind::Protocol, message.to_owned());
                return Answer::Failed(Failed { kind, message, retryable: false, migratable: false });
            }
            _ => {}
        }
        answer
    }
}

/// Answers a member's request with an engine of this node.
pub(super) async fn serve(mesh: Arc<Mesh>, version: Version, mut send: SendStream, mut receive: RecvStream) {
    let request = match timeout(STREAM_DEADLINE, read_body_in::<Request, _>(version, &mut receive)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return tracing::warn!(%error, "a request that does not decode"),
        Err(_) => return,
    };
    let span = crate::monitor::request_span("serve", &request);
    let _entered = span.enter();
    tracing::debug!(attempt = request.attempt, principal = request.principal, "request from a member");
    drop(_entered);
    // Held until the peer has it all: a node that ends waits for that.
    let _open = mesh.workers.hold();
    let serving = async {
        let mut answers = mesh.workers.submit(request).await;
        let mut carried = Carried::default();
        let mut stopped = std::pin::pin!(send.stopped());
        loop {
            let answer = tokio::select! {
                biased;
                // The client left, or the node that asked.
                _ = &mut stopped => return,
                answer = answers.recv() => answer,
            };
            let Some(mut answer) = answer else { return };
            // What is there already goes out together.
            let mut bytes = BytesMut::new();
            let last = loop {
                answer = carried.check(version, answer);
                let Ok(frame) = answer.encode_for(version) else { return };
                frame.write(&mut bytes);
                if answer.is_last() || bytes.len() >= BATCH {
                    break answer.is_last();
                }
                match answers.try_recv() {
                    Some(next) => answer = next,
                    None => break false,
                }
            };
            // A peer that does not read holds this up, which fills the channel, which pauses the sequence.
            let written = tokio::select! {
                biased;
                written = send.write_all(&bytes) => written,
                () = mesh.cancel.cancelled() => return,
            };
            if written.is_err() {
                return;
            }
            if last {
                let _ = send.finish();
                // Until the last frame is acknowledged: who closes the connection before loses it.
                let _ = timeout(STREAM_DEADLINE, send.stopped()).await;
                return;
            }
        }
    };
    use tracing::Instrument;
    serving.instrument(span).await;
}

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::{FinishReason, Finished, Load, NO_TOKEN_ID, Token, Usage};

    use super::*;

    #[test]
    fn an_answer_that_an_old_peer_would_see_nothing_of_ends_in_a_failure() {
        let token = |text: &str, extra: &str| {
            let (text, extra) = (text.as_bytes().to_vec(), extra.as_bytes().to_vec());
            Answer::Token(Token { position: 0, id: NO_TOKEN_ID, text, logprobs: None, extra })
        };
        let end = || {
            let (reason, usage, load) = (FinishReason::Stop, Usage::default(), Load::default());
            Answer::Finished(Finished { reason, usage, load, extra: vec![] })
        };
        let ends_well = |version: Version, tokens: &[Answer]| {
            let mut carried = Carried::default();
            for token in tokens {
                assert_eq!(carried.check(version, token.clone()), *token);
            }
            matches!(carried.check(version, end()), Answer::Finished(_))
        };
        let call = token("", r#"{"delta":{"tool_calls":[]}}"#);
        assert!(!ends_well(Version::V1, &[call.clone(), call.clone()]));
        assert!(ends_well(Version::V2, std::slice::from_ref(&call)));
        assert!(ends_well(Version::V1, &[call, token("Hello", "")]), "the text is an answer");
        assert!(ends_well(Version::V1, &[]), "an empty answer that lost nothing");
    }
}
