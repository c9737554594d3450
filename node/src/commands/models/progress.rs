//! How far long work is, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Lines come this far apart: work that is done sooner needs none.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// Shows how much of something is done.
#[derive(Debug)]
pub enum WorkProgress {
    /// A terminal.
    Bar(ProgressBar),
    /// A file or a pipe: what is done, and when the last line came.
    Lines(String, Instant),
}

impl WorkProgress {
    /// What suits standard error. `what` as in "Quantizing model.gguf".
    pub fn new(what: &str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(what.into(), Instant::now());
        }
        let bar = ProgressBar::new(100);
        // The template is ours: one that is wrong shows the default bar.
        if let Ok(style) = ProgressStyle::with_template("{msg}  {wide_bar} {percent} %  {eta} left") {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Self::Bar(bar)
    }

    /// `done` of `all` is done.
    pub fn show(&mut self, done: u64, all: u64) {
        let all = all.max(1);
        match self {
            Self::Bar(bar) => {
                bar.set_length(all);
                bar.set_position(done);
            }
            Self::Lines(what, last) => {
                if last.elapsed() >= LINE_INTERVAL {
                    *last = Instant::now();
                    output::complain(&format!("{what}: {} %", done.saturating_mul(100) / all));
                }
            }
        }
    }

    /// Takes the bar away.
    pub fn end(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
