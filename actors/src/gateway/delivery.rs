//! A begun answer on its way to the client: passed on, measured, and ended when its time or its reader is gone.

use std::sync::Arc;
use std::time::Instant;

use ingle_engine::DEFAULT_READER_DEADLINE as READER_DEADLINE;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Failed, FailureKind};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::flight::{Flight, Step};
use super::router::Open;
use crate::monitor::{Latencies, Outcome};

fn too_slow() -> Answer {
    let message = format!("nobody read the answer for {} s", READER_DEADLINE.as_secs());
    Answer::Failed(Failed { kind: FailureKind::ReaderTooSlow, message, retryable: false, migratable: false })
}

/// A flight whose answer goes to a reader.
pub(super) struct Delivery {
    pub flight: Flight,
    pub latencies: Arc<Latencies>,
    /// Held for as long as the answer lives.
    pub _open: Open,
}

/// Passes the answer on and measures it. Ends when the answer or its reader does.
pub(super) async fn run(mut delivery: Delivery, first: Option<Answer>, answers: mpsc::Sender<Answer>) {
    let flight = &mut delivery.flight;
    // The channel is new, so there is room.
    let Ok(last_word) = answers.clone().try_reserve_owned() else { return };
    let mut next = first;
    // Until its end came through, an answer that ends here ends because its client left.
    let (outcome, how) = loop {
        let answer = match next.take() {
            Some(answer) => answer,
            None => tokio::select! {
                biased;
                // The client left: dropping the flight tells the worker.
                () = answers.closed() => break (Outcome::Cancelled, "client left".to_owned()),
                step = flight.step() => match step {
                    Ok(Step::Alive) => continue,
                    Ok(Step::Deliver(answer)) => answer,
                    // Before the first token, but after the client was told that it had begun.
                    Err(error) => Answer::Failed(error.into_failed()),
                },
            },
        };
        let end = match &answer {
            Answer::Finished(_) => Some((Outcome::Finished, "finished".to_owned())),
            Answer::Failed(failed) => Some((Outcome::Failed, format!("{}: {}", failed.kind.as_str(), failed.message))),
            _ => None,
        };
        match timeout(READER_DEADLINE, answers.send(answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => break (Outcome::Cancelled, "client left".to_owned()),
            // Whatever lies in buffers on the way: nobody holds a place for ever by not reading.
            Err(_) => {
                last_word.send(too_slow());
                break (Outcome::Failed, "the client did not read".to_owned());
            }
        }
        if let Some(end) = end {
            break end;
        }
    };
    flight.close(&how);
    let (node, model) = (flight.node(), flight.model().to_owned());
    flight.timeline.clone().close(&delivery.latencies, &node, &model, outcome, Instant::now());
}
