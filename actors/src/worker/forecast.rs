//! When a model that is not ready will probably be.

use std::time::{Duration, Instant};

use ingle_protocol::wire::v2::ModelState;

/// Bytes of a model that are loaded and warmed up in a second where nothing was measured yet: a guess on the slow side.
const USUAL_RATE: u64 = 200 << 20;
/// What loading takes however small the model is.
const LEAST: Duration = Duration::from_secs(2);
/// Where nothing at all is known of a download.
const UNKNOWN_FETCH: Duration = Duration::from_secs(60);
/// A download's speed counts once it has been seen for so long.
const SEEN_FOR: Duration = Duration::from_millis(500);

/// What is known of how long a model takes to get ready.
#[derive(Debug, Clone, Default)]
pub(super) struct Forecast {
    /// How long loading took the last time.
    took: Option<Duration>,
    /// Bytes of the file, where known.
    pub bytes: u64,
    loading_since: Option<Instant>,
    fetching_since: Option<(Instant, u64)>,
}

impl Forecast {
    /// The model is in another state.
    pub fn note(&mut self, state: &ModelState, now: Instant) {
        match state {
            ModelState::Fetching { done, total } => {
                self.fetching_since.get_or_insert((now, *done));
                self.bytes = self.bytes.max(*total);
            }
            ModelState::Loading => {
                self.fetching_since = None;
                self.loading_since = Some(now);
            }
            ModelState::Ready => {
                if let Some(since) = self.loading_since.take() {
                    self.took = Some(now.saturating_duration_since(since));
                }
            }
            ModelState::Verifying | ModelState::Warming => {}
            ModelState::Absent | ModelState::Draining | ModelState::Unloaded | ModelState::Failed { .. } => {
                (self.loading_since, self.fetching_since) = (None, None);
            }
        }
    }

    fn loading(&self) -> Duration {
        self.took.unwrap_or_else(|| LEAST + Duration::from_secs(self.bytes / USUAL_RATE))
    }

    /// How long until it is ready, at least a second while it is not.
    pub fn ready_in(&self, state: &ModelState, now: Instant) -> Duration {
        let left = match state {
            ModelState::Ready => return Duration::ZERO,
            ModelState::Fetching { done, total } => {
                let measured = self.fetching_since.and_then(|(since, first)| {
                    let (time, came) = (now.saturating_duration_since(since), done.saturating_sub(first));
                    let known = time >= SEEN_FOR && came > 0 && total > done;
                    known.then(|| time.mul_f64((total - done) as f64 / came as f64))
                });
                measured.unwrap_or(UNKNOWN_FETCH) + self.loading()
            }
            _ => {
                let gone = self.loading_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
                self.loading().saturating_sub(gone)
            }
        };
        left.max(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_is_foreseen_by_its_speed_and_a_load_by_the_last_one() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut forecast = Forecast::default();
        let fetching = |done| ModelState::Fetching { done, total: 1 << 30 };
        forecast.note(&fetching(0), at(0));
        assert_eq!(forecast.ready_in(&fetching(0), at(0)), UNKNOWN_FETCH + LEAST + Duration::from_secs(5));
        assert_eq!(forecast.ready_in(&fetching(1 << 28), at(10)).as_secs(), 30 + 2 + 5);
        forecast.note(&ModelState::Loading, at(40));
        assert_eq!(forecast.ready_in(&ModelState::Loading, at(43)).as_secs(), 4);
        assert_eq!(forecast.ready_in(&ModelState::Warming, at(90)).as_secs(), 1, "it cannot be over");
        forecast.note(&ModelState::Ready, at(60));
        assert_eq!(forecast.ready_in(&ModelState::Ready, at(60)), Duration::ZERO);
        forecast.note(&ModelState::Unloaded, at(70));
        assert_eq!(forecast.ready_in(&ModelState::Unloaded, at(99)).as_secs(), 20, "as long as the last time");
    }
}
