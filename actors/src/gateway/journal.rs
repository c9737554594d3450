//! What became of the last requests and why: what `ingle explain` prints.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ingle_protocol::RequestId;
use ingle_protocol::routing::Estimate;
use serde::{Deserialize, Serialize};

/// Requests that are remembered.
const MOST: usize = 512;

/// One worker that could have been asked, or why not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Considered {
    /// Name of its node.
    pub node: String,
    /// Its predicted time in parts; `None` where it was left out.
    pub estimate: Option<Estimate>,
    /// Why it was left out.
    pub left_out: Option<String>,
    /// This router's requests there.
    pub in_flight: u32,
    /// Sequences that it decodes, by its last word.
    pub running: u32,
    /// Sequences that wait there.
    pub waiting: u32,
    /// Sequences that it decodes together.
    pub slots: u32,
    /// Tokens of the prompt that it has probably read before.
    pub cached_tokens: u32,
    /// Tokens of prompt a second.
    pub prefill_rate: f32,
    /// Tokens a second of one sequence.
    pub decode_rate: f32,
}

/// One worker that was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Milliseconds after the request came.
    pub at_ms: u64,
    /// What led to it: `first`, `retry (…)`, `migration (…)`.
    pub cause: String,
    /// Who was considered.
    pub considered: Vec<Considered>,
    /// The node that was asked.
    pub node: String,
    /// The numerics class of its engine.
    pub numerics: String,
    /// Tokens that it delivered.
    pub tokens: u32,
    /// How it ended; `None` while it runs.
    pub ended: Option<String>,
}

/// One request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// The request.
    pub request_id: RequestId,
    /// Milliseconds since 1970 at which it came.
    pub came_ms: u64,
    /// The model's full name.
    pub model: String,
    /// On whose behalf.
    pub principal: String,
    /// Tokens of its prompt: as estimated before, as counted once a worker has said so.
    pub prompt_tokens: u32,
    /// Tokens of answer that were expected.
    pub expected_tokens: u32,
    /// Milliseconds that it waited at the door.
    pub admitted_after_ms: u64,
    /// Whom it was sent to.
    pub attempts: Vec<Attempt>,
    /// What else a reader should know.
    pub notes: Vec<String>,
    /// How it ended; `None` while it runs.
    pub outcome: Option<String>,
    /// Milliseconds from its coming to its end.
    pub total_ms: Option<u64>,
}

impl RequestRecord {
    /// The last choice in one line, for a response header: `tower 0.41s, mini 2.30s, attic - (why)`.
    pub fn line(&self) -> String {
        let Some(attempt) = self.attempts.last() else { return String::new() };
        let mut considered: Vec<&Considered> = attempt.considered.iter().collect();
        considered.sort_by_key(|one| one.node != attempt.node);
        let words = considered.into_iter().map(|one| match (&one.estimate, &one.left_out) {
            (Some(estimate), _) => format!("{} {:.3}s", one.node, estimate.total_s()),
            (None, why) => format!("{} - ({})", one.node, why.as_deref().unwrap_or("left out")),
        });
        words.collect::<Vec<_>>().join(", ")
    }
}

/// A record that is still being written.
#[derive(Debug, Clone, Default)]
pub struct Record(Arc<Mutex<RequestRecord>>);

impl Record {
    /// To read or to write.
    pub fn lock(&self) -> MutexGuard<'_, RequestRecord> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last requests of this node.
#[derive(Debug, Default)]
pub(super) struct Journal(Mutex<VecDeque<Record>>);

impl Journal {
    /// A new request.
    pub fn open(&self, record: RequestRecord) -> Record {
        let record = Record(Arc::new(Mutex::new(record)));
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() >= MOST {
            records.pop_front();
        }
        records.push_back(record.clone());
        record
    }

    /// The request with this id, or the last one.
    pub fn find(&self, id: Option<RequestId>) -> Option<RequestRecord> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match id {
            None => records.back(),
            Some(id) => records.iter().rev().find(|record| record.lock().request_id == id),
        };
        found.map(|record| record.lock().clone())
    }
}
