//! Requests between nodes: one bidirectional QUIC stream for each.

use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::wire::v2::{Failed, FailureKind, RefusalKind, Refused, Request};
use ingle_protocol::wire::{Answer, StreamKind, Version};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Mesh;
use super::link::{PeerLink, STREAM_DEADLINE, open_stream};
use crate::frames::{FrameError, read_body_in, read_frame_in, write_body_in, write_frame};
use crate::worker::{ANSWER_BUFFER, SILENCE_LIMIT};

/// How long a request waits for a free stream to the peer before it counts as busy.
const OPEN_DEADLINE: Duration = Duration::from_millis(250);
/// Why a stream was stopped: the client left.
const CLIENT_LEFT: VarInt = VarInt::from_u32(1);

/// Sends the request to a member. The frames of the answer arrive on the channel, which always ends with a last
/// frame; dropping it cancels the request there.
pub async fn submit_remote(link: &PeerLink, request: &Request) -> Result<mpsc::Receiver<Answer>, Refused> {
    let busy = |error: FrameError| Refused {
        kind: RefusalKind::Busy,
        message: format!("the worker node takes no more requests now ({error})"),
        param: None,
        retry_after_ms: Some(1_000),
    };
    let (on_link, version) = (link.requests.token(), link.version);
    let (mut send, receive) =
        open_stream(&link.connection, StreamKind::Inference, OPEN_DEADLINE).await.map_err(busy)?;
    match timeout(STREAM_DEADLINE, write_body_in(link.version, &mut send, request)).await {
        Ok(written) => written.map_err(busy)?,
        Err(_) => return Err(busy(FrameError::Ended)),
    }
    let (answers, reader) = mpsc::channel(ANSWER_BUFFER);
    tokio::spawn(async move {
        let _on_link = on_link;
        relay_answers(version, send, receive, answers).await;
    });
    Ok(reader)
}

/// Frames from the stream into the channel. Owned by the reply: it ends when the reply is dropped.
async fn relay_answers(version: Version, mut send: SendStream, mut receive: RecvStream, answers: mpsc::Sender<Answer>) {
    let mut any_token = false;
    loop {
        let read = tokio::select! {
            biased;
            () = answers.closed() => break,
            read = timeout(SILENCE_LIMIT, read_frame_in(version, &mut receive)) => read,
        };
        let answer = match read {
            Ok(Ok(Some(frame))) => Answer::decode_for(&frame, version).map_err(FrameError::from),
            Ok(Ok(None)) => Err(FrameError::Ended),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let message = "the worker node went silent in the middle of the answer".to_owned();
                let kind = FailureKind::WorkerSilent;
                Ok(Answer::Failed(Failed { kind, message, retryable: !any_token, migratable: true }))
            }
        };
        let answer = answer.unwrap_or_else(|error| {
            let kind =
                if matches!(error, FrameError::Wire(_)) { FailureKind::Protocol } else { FailureKind::ConnectionLost };
            let message = format!("the connection to the worker node broke in the middle of the answer ({error})");
            Answer::Failed(Failed { kind, message, retryable: !any_token, migratable: true })
        });
        any_token |= matches!(answer, Answer::Token(_));
        let last = answer.is_last();
        if answers.send(answer).await.is_err() || last {
            break;
        }
    }
    // Whatever the reason for the end: the other side must not go on.
    let _ = receive.stop(CLIENT_LEFT);
    let _ = send.reset(CLIENT_LEFT);
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
        loop {
            let answer = tokio::select! {
                biased;
                // The client left, or the node that asked.
                _ = send.stopped() => return,
                answer = answers.recv() => answer,
            };
            let Some(answer) = answer else { return };
            let answer = carried.check(version, answer);
            let last = answer.is_last();
            let Ok(frame) = answer.encode_for(version) else { return };
            // A peer that does not read holds this up, which fills the channel, which pauses the sequence.
            let written = tokio::select! {
                biased;
                written = write_frame(&mut send, &frame) => written,
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
