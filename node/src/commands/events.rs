//! `ingle events`: what happened in the cluster, and what happens.

use std::time::{Duration, SystemTime};

use ingle_actors::monitor::events::{Event, EventKind};

use super::{explain_error, unexpected};
use crate::cli::Events;
use crate::config::Settings;
use crate::control::{Client, Reply, Request};
use crate::output;

/// The node says something at least every ten seconds: one that is silent for so long hangs.
const DEADLINE: Duration = Duration::from_secs(30);

/// Prints what the running node saw.
pub async fn run(settings: &Settings, options: Events) -> anyhow::Result<()> {
    let Events { follow, since, json } = options;
    let request = Request::Events { since, follow };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    loop {
        match client.next(DEADLINE).await? {
            Reply::Events(events) => {
                let mut text = String::new();
                for event in &events {
                    text += &if json { serde_json::to_string(event)? } else { line(event) };
                    text.push('\n');
                }
                if !text.is_empty() {
                    output::print(&text)?;
                }
            }
            Reply::NoMoreEvents => return Ok(()),
            _ => return Err(unexpected()),
        }
    }
}

fn line(event: &Event) -> String {
    let Event { at_ms, kind, node, model, from, to, why, .. } = event;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (node, model, why) = (text(node), text(model), text(why));
    let because = if why.is_empty() { String::new() } else { format!(": {why}") };
    let states = match (from, to) {
        (Some(from), Some(to)) => format!("{from} -> {to}"),
        (None, Some(to)) => to.clone(),
        (Some(from), None) => format!("{from} -> gone"),
        (None, None) => String::new(),
    };
    let said = match kind {
        EventKind::Node => format!("{node} is {states}{because}"),
        EventKind::Model => format!("{model} on {node} is {states}{because}"),
        EventKind::Registry => format!("{model} was {states} by {node}{because}"),
        EventKind::Default => match to {
            Some(to) => format!("{node} made {to} the default model"),
            None => format!("{node} took the choice of a default model back"),
        },
        EventKind::Moved => format!("{why} of {model} on {node} went on elsewhere"),
        EventKind::Gap => format!("({why})"),
    };
    // Names come from other machines: they must not steer the terminal.
    let said: String = said.chars().filter(|c| !c.is_control()).collect();
    format!("{}  {said}", time_of_day(*at_ms))
}

/// Hours, minutes and seconds of the time in UTC, and before them the days that it is ago, if any.
fn time_of_day(at_ms: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let at = at_ms / 1_000;
    let day = match (now / 86_400).saturating_sub(at / 86_400) {
        0 => String::new(),
        days => format!("-{days} d "),
    };
    format!("{day}{:02}:{:02}:{:02}Z", at / 3_600 % 24, at / 60 % 60, at % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_a_sentence() {
        let event = |kind, from: Option<&str>, to: Option<&str>, why: Option<&str>| {
            let own = |text: Option<&str>| text.map(str::to_owned);
            let (node, model) = (Some("attic".to_owned()), Some("qwen\u{1b}3".to_owned()));
            let text =
                line(&Event { number: 1, at_ms: 0, kind, node, model, from: own(from), to: own(to), why: own(why) });
            text.split_once("Z  ").unwrap().1.to_owned()
        };
        for (said, expected) in [
            (
                event(EventKind::Node, Some("alive"), Some("failed"), Some("timed out")),
                "attic is alive -> failed: timed out",
            ),
            (event(EventKind::Model, None, Some("loading"), None), "qwen3 on attic is loading"),
            (event(EventKind::Model, Some("ready"), None, None), "qwen3 on attic is ready -> gone"),
            (event(EventKind::Registry, None, Some("changed"), Some("pins")), "qwen3 was changed by attic: pins"),
            (event(EventKind::Default, None, Some("qwen3"), None), "attic made qwen3 the default model"),
            (event(EventKind::Moved, None, None, Some("2 answers")), "2 answers of qwen3 on attic went on elsewhere"),
        ] {
            assert_eq!(said, expected);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() / 86_400 * 86_400;
        assert_eq!(time_of_day((now + 3_723) * 1_000), "01:02:03Z");
        assert_eq!(time_of_day((now - 86_400) * 1_000), "-1 d 00:00:00Z");
    }
}
