//! Lines for people. `println!` panics where the reader has gone; these do not.

use std::io::{self, Write};

/// Standard output is closed.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output")]
pub struct OutputClosed;

/// Writes `text` to standard output as it is, at once. [`OutputClosed`] where nobody reads any more.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        other => Ok(other?),
    }
}

/// A line on standard output for whoever may be reading; a daemon does not care whether somebody does.
pub fn say(line: &str) {
    let _ = print(&format!("{line}\n"));
}

/// A line on standard error.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
