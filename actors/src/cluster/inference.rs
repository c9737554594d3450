//! Requests between nodes: one bidirectional QUIC stream for each.

use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::wire::v1::{Failed, FailureKind, RefusalKind, Refused, Request};
use ingle_protocol::wire::{Answer, StreamKind};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Mesh;
use super::link::{PeerLink, STREAM_DEADLINE, open_stream};
use crate::frames::{FrameError, read_body, read_frame, write_body, write_frame};
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
    let on_link = link.requests.token();
    let (mut send, receive) =
        open_stream(&link.connection, StreamKind::Inference, OPEN_DEADLINE).await.map_err(busy)?;
    match timeout(STREAM_DEADLINE, write_body(&mut send, request)).await {
        Ok(written) => written.map_err(busy)?,
        Err(_) => return Err(busy(FrameError::Ended)),
    }
    let (answers, reader) = mpsc::channel(ANSWER_BUFFER);
    tokio::spawn(async move {
        let _on_link = on_link;
        relay_answers(send, receive, answers).await;
    });
    Ok(reader)
}

/// Frames from the stream into the channel. Owned by the reply: it ends when the reply is dropped.
async fn relay_answers(mut send: SendStream, mut receive: RecvStream, answers: mpsc::Sender<Answer>) {
    let mut any_token = false;
    loop {
        let read = tokio::select! {
            biased;
            () = answers.closed() => break,
            read = timeout(SILENCE_LIMIT, read_frame(&mut receive)) => read,
        };
        let answer = match read {
            Ok(Ok(Some(frame))) => Answer::from_frame(&frame).map_err(FrameError::from),
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

/// Answers a member's request with an engine of this node.
pub(super) async fn serve(mesh: Arc<Mesh>, mut send: SendStream, mut receive: RecvStream) {
    let request = match timeout(STREAM_DEADLINE, read_body::<Request, _>(&mut receive)).await {
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
        loop {
            let answer = tokio::select! {
                biased;
                // The client left, or the node that asked.
                _ = send.stopped() => return,
                answer = answers.recv() => answer,
            };
            let Some(answer) = answer else { return };
            let last = answer.is_last();
            let Ok(frame) = answer.to_frame() else { return };
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
