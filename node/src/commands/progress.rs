//! How far this node's model is, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ingle_actors::protocol::wire::v2::ModelState;
use tokio::time::Instant;

use crate::output;

/// Where the size is not known, a line comes this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Where it is known, a line comes for each step of so many percent.
const LINE_STEP: u64 = 10;

/// Shows one state after the other.
#[derive(Debug)]
pub enum Progress {
    /// A terminal.
    Bar(Option<ProgressBar>),
    /// A file or a pipe.
    Lines(Lines),
}

impl Progress {
    /// What suits standard error.
    pub fn new() -> Self {
        if std::io::stderr().is_terminal() { Self::Bar(None) } else { Self::Lines(Lines::default()) }
    }

    /// The model is in this state now; what is fetched comes from `origin`, where that is known.
    pub fn show(&mut self, state: &ModelState, origin: &str) {
        match self {
            Self::Lines(lines) => {
                if let Some(line) = lines.line(state, origin, Instant::now()) {
                    output::complain(&line);
                }
            }
            Self::Bar(bar) => match state {
                ModelState::Ready | ModelState::Failed { .. } | ModelState::Unloaded => {
                    if let Some(bar) = bar.take() {
                        bar.finish_and_clear();
                    }
                }
                state => show_bar(bar.get_or_insert_with(ProgressBar::no_length), state, origin),
            },
        }
    }
}

fn show_bar(bar: &ProgressBar, state: &ModelState, origin: &str) {
    let template = match state {
        ModelState::Fetching { total: 0, .. } => "{spinner} fetching the model{msg}  {bytes}  {bytes_per_sec}",
        ModelState::Fetching { .. } => "fetching the model{msg}  {wide_bar} {bytes}/{total_bytes}  {eta} left",
        _ => "{spinner} the model is {msg}",
    };
    match state {
        ModelState::Fetching { done, total } => {
            if *total > 0 {
                bar.set_length(*total);
            }
            bar.set_position(*done);
            bar.set_message(if origin.is_empty() { String::new() } else { format!(" from {origin}") });
        }
        other => bar.set_message(other.words()),
    }
    // The templates are ours: one that is wrong shows the default bar.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
}

/// Decides which states are worth a line.
#[derive(Debug, Default)]
pub struct Lines {
    last: Option<(ModelState, Instant)>,
}

impl Lines {
    /// The line for a state, if it is worth one at `now`.
    fn line(&mut self, state: &ModelState, origin: &str, now: Instant) -> Option<String> {
        let worth = match (&self.last, state) {
            (None, _) => true,
            (Some((ModelState::Fetching { done: before, total: t }, _)), ModelState::Fetching { done, total })
                if *total > 0 && t == total =>
            {
                let step = |done: u64| done.saturating_mul(100) / total / LINE_STEP;
                step(*done) != step(*before)
            }
            (Some((ModelState::Fetching { .. }, said)), ModelState::Fetching { .. }) => {
                now.duration_since(*said) >= LINE_INTERVAL
            }
            (Some((last, _)), state) => last != state,
        };
        if !worth {
            return None;
        }
        self.last = Some((state.clone(), now));
        // These two are said elsewhere, with all that belongs to them.
        match state {
            ModelState::Ready | ModelState::Failed { .. } => None,
            ModelState::Fetching { .. } if !origin.is_empty() => {
                Some(format!("The model is {} from {origin}.", state.words()))
            }
            state => Some(format!("The model is {}.", state.words())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_tenth_and_each_new_state() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let said: Vec<String> = (0..=1_000u64)
            .filter_map(|n| lines.line(&ModelState::Fetching { done: n * 1_000, total: 1_000_000 }, "", start))
            .collect();
        assert_eq!(said.len(), 11);
        assert_eq!(said[3], "The model is fetching 30 %.");
        assert_eq!(lines.line(&ModelState::Loading, "", start).unwrap(), "The model is loading.");
        assert_eq!(lines.line(&ModelState::Loading, "", start), None);
        assert_eq!(lines.line(&ModelState::Ready, "", start), None);
    }

    #[test]
    fn a_line_now_and_then_where_the_size_is_not_known() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let fetching = |done| ModelState::Fetching { done, total: 0 };
        assert_eq!(lines.line(&fetching(2_000_000), "", start).unwrap(), "The model is fetching 2 MB.");
        assert_eq!(lines.line(&fetching(3_000_000), "", start + Duration::from_secs(1)), None);
        let line = lines.line(&fetching(9_000_000), "tower and desk", start + Duration::from_secs(6)).unwrap();
        assert_eq!(line, "The model is fetching 9 MB from tower and desk.");
    }
}
