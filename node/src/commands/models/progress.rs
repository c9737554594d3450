//! How far long work is, on standard error: a bar on a terminal, a line for each tenth elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Shows how much of something is done.
#[derive(Debug)]
pub enum WorkProgress {
    /// A terminal.
    Bar(ProgressBar),
    /// A file or a pipe: what is done, and the tenth that was said last.
    Lines(String, Option<u64>),
}

impl WorkProgress {
    /// What suits standard error. `what` as in "Quantizing model.gguf".
    pub fn new(what: &str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(what.into(), None);
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
                let tenth = done.saturating_mul(10) / all;
                if *last != Some(tenth) {
                    *last = Some(tenth);
                    output::complain(&format!("{what}: {} %", tenth * 10));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_once_for_each_tenth() {
        let mut lines = WorkProgress::Lines("Working".into(), None);
        for done in 0..=100 {
            lines.show(done, 100);
        }
        assert!(matches!(&lines, WorkProgress::Lines(_, Some(10))));
        // Nothing to do is done.
        lines.show(0, 0);
        lines.end();
    }
}
