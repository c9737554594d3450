//! Latencies of requests that entered at this node, per (node that answered, model).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::Progress;

use super::LatencySummary;

/// Longest time that is told apart: an hour, in microseconds.
const LONGEST: u64 = 3_600_000_000;
/// The most (node, model) pairs that are kept; more are counted under `other`.
const MOST_PAIRS: usize = 64;

struct Record {
    queue: Histogram<u64>,
    prefill: Histogram<u64>,
    first_token: Histogram<u64>,
    gap: Histogram<u64>,
    total: Histogram<u64>,
    finished: u64,
    failed: u64,
    cancelled: u64,
}

impl Record {
    fn new() -> Result<Self, hdrhistogram::CreationError> {
        // Two significant digits: five histograms of a pair take about 100 KiB.
        let histogram = || Histogram::new_with_bounds(1, LONGEST, 2);
        Ok(Self {
            queue: histogram()?,
            prefill: histogram()?,
            first_token: histogram()?,
            gap: histogram()?,
            total: histogram()?,
            finished: 0,
            failed: 0,
            cancelled: 0,
        })
    }
}

fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(u64::try_from(time.as_micros()).unwrap_or(LONGEST).clamp(1, LONGEST));
}

fn percentiles(histogram: &Histogram<u64>) -> [f64; 2] {
    [0.5, 0.99].map(|quantile| histogram.value_at_quantile(quantile) as f64 / 1_000.0)
}

/// All histograms of this node.
#[derive(Default)]
pub struct Latencies {
    records: Mutex<BTreeMap<(String, String), Record>>,
}

impl std::fmt::Debug for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Latencies")
    }
}

impl Latencies {
    fn with(&self, node: &str, model: &str, change: impl FnOnce(&mut Record)) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (node.to_owned(), model.to_owned());
        if records.len() >= MOST_PAIRS && !records.contains_key(&key) {
            key = ("other".into(), "other".into());
        }
        let entry = match records.entry(key) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => match Record::new() {
                Ok(record) => entry.insert(record),
                Err(error) => return tracing::error!(?error, "no histogram"),
            },
        };
        change(entry);
    }

    /// For `status` and metrics.
    pub fn summaries(&self) -> Vec<LatencySummary> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records
            .iter()
            .map(|((node, model), record)| LatencySummary {
                node: node.clone(),
                model: model.clone(),
                finished: record.finished,
                failed: record.failed,
                cancelled: record.cancelled,
                queue_ms: percentiles(&record.queue),
                prefill_ms: percentiles(&record.prefill),
                first_token_ms: percentiles(&record.first_token),
                gap_ms: percentiles(&record.gap),
                total_ms: percentiles(&record.total),
            })
            .collect()
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Finished,
    /// Not well.
    Failed,
    /// Its client left.
    Cancelled,
}

/// When what happened to one answer. Times are arguments, so that it can be simulated.
#[derive(Debug, Clone)]
pub struct Timeline {
    began: Instant,
    computing: Option<Instant>,
    last_token: Option<Instant>,
    first_token: Option<Instant>,
    gaps: Vec<Duration>,
}

impl Timeline {
    /// The request enters.
    pub fn new(now: Instant) -> Self {
        Self { began: now, computing: None, last_token: None, first_token: None, gaps: Vec::new() }
    }

    /// A frame of the answer comes.
    pub fn observe(&mut self, answer: &Answer, now: Instant) {
        match answer {
            Answer::Progress(Progress::Prefilled { .. }) => {
                self.computing.get_or_insert(now);
            }
            Answer::Token(_) => {
                self.computing.get_or_insert(now);
                self.first_token.get_or_insert(now);
                if let Some(last) = self.last_token.replace(now) {
                    self.gaps.push(now.saturating_duration_since(last));
                }
            }
            _ => {}
        }
    }

    /// The answer ended.
    pub fn close(self, latencies: &Latencies, node: &str, model: &str, outcome: Outcome, now: Instant) {
        latencies.with(node, model, |entry| {
            match outcome {
                Outcome::Finished => {
                    entry.finished += 1;
                    record(&mut entry.total, now.saturating_duration_since(self.began));
                }
                Outcome::Failed => entry.failed += 1,
                Outcome::Cancelled => entry.cancelled += 1,
            }
            if let Some(computing) = self.computing {
                record(&mut entry.queue, computing.saturating_duration_since(self.began));
                if let Some(first) = self.first_token {
                    record(&mut entry.prefill, first.saturating_duration_since(computing));
                    record(&mut entry.first_token, first.saturating_duration_since(self.began));
                }
            }
            for gap in &self.gaps {
                record(&mut entry.gap, *gap);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::Token;

    use super::*;

    #[test]
    fn an_answer_is_measured_from_its_frames() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let token = || Answer::Token(Token { position: 0, id: 1, text: vec![], logprobs: None, extra: vec![] });
        let latencies = Latencies::default();
        let mut timeline = Timeline::new(at(0));
        timeline.observe(&Answer::Progress(Progress::Queued { ahead: 1 }), at(100));
        timeline.observe(&Answer::Progress(Progress::Prefilled { done: 0, total: 9 }), at(200));
        timeline.observe(&token(), at(500));
        timeline.observe(&token(), at(510));
        timeline.close(&latencies, "tower", "m", Outcome::Finished, at(600));
        Timeline::new(at(0)).close(&latencies, "tower", "m", Outcome::Failed, at(1));
        let [summary] = latencies.summaries().try_into().unwrap();
        let near = |[p50, _]: [f64; 2], ms: f64| (p50 / ms - 1.0).abs() < 0.02;
        assert_eq!((summary.finished, summary.failed), (1, 1));
        assert!(near(summary.queue_ms, 200.0) && near(summary.prefill_ms, 300.0), "{summary:?}");
        assert!(near(summary.first_token_ms, 500.0) && near(summary.gap_ms, 10.0), "{summary:?}");
        assert!(near(summary.total_ms, 600.0), "{summary:?}");
    }
}
