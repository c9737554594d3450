//! `ingle chat`: a question to the running node, its answer on standard output as it comes.

use std::io::Read;
use std::time::Duration;

use anyhow::Context;

use super::{explain_error, unexpected};
use crate::cli::Chat;
use crate::config::Settings;
use crate::control::{Client, ControlError, Reply, Request};
use crate::exit::UsageError;
use crate::output;

/// The node ends an answer that takes too long; this is for a node that hangs.
const MARGIN: Duration = Duration::from_secs(5);
/// The most bytes read from standard input.
const LONGEST_TEXT: u64 = 4 << 20;

/// Asks the node. Fails where the answer is not whole.
pub async fn run(settings: &Settings, chat: Chat) -> anyhow::Result<()> {
    let text = if chat.text == "-" { standard_input()? } else { chat.text };
    if text.trim().is_empty() {
        return Err(UsageError("There is nothing to say: the text is empty.".into()).into());
    }
    let request = Request::Chat { text, model: chat.model.unwrap_or_default(), system: chat.system };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    let mut line_is_open = false;
    let end = loop {
        match client.next(settings.request_timeout + MARGIN).await {
            Ok(Reply::Text(piece)) => {
                output::print(&printable(&piece))?;
                line_is_open = !piece.ends_with('\n');
            }
            Ok(Reply::Finished { node, model, reason }) => {
                tracing::info!(node, model, reason, "answered");
                break Ok(());
            }
            Ok(_) => break Err(unexpected()),
            Err(error @ ControlError::Node(_)) => break Err(error.into()),
            Err(error) => break Err(explain_error(settings, error)),
        }
    };
    // Also before an error: it belongs on a line of its own.
    if line_is_open {
        output::print("\n")?;
    }
    end
}

/// Without control characters: a model's text must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn standard_input() -> anyhow::Result<String> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(LONGEST_TEXT + 1).read_to_string(&mut text);
    if read.context("Standard input cannot be read")? as u64 > LONGEST_TEXT {
        return Err(UsageError(format!("The text is longer than {} MiB.", LONGEST_TEXT >> 20)).into());
    }
    Ok(text)
}
