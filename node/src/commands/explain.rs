//! `ingle explain`: who could have answered, who was asked, and why.

use std::time::Duration;

use ingle_actors::gateway::{Attempt, Considered, RequestRecord};
use ingle_actors::protocol::RequestId;

use super::status::table;
use super::{explain_error, unexpected};
use crate::cli::Explain;
use crate::config::Settings;
use crate::control::{Client, Reply, Request};
use crate::exit::UsageError;
use crate::output;

/// The node answers from memory: one that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// Prints what the node knows of a request.
pub async fn run(settings: &Settings, explain: Explain) -> anyhow::Result<()> {
    let request = Request::Explain { request: read_id(&explain.request)? };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    let Reply::Explained(record) = client.next(DEADLINE).await? else { return Err(unexpected()) };
    if explain.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&record)?));
    }
    output::print(&render(&record))
}

/// `last`, or an id with or without what headers and bodies put in front of it.
fn read_id(text: &str) -> Result<Option<RequestId>, UsageError> {
    if text == "last" {
        return Ok(None);
    }
    let id = text.trim_start_matches("req_").trim_start_matches("chatcmpl-");
    id.parse().map(Some).map_err(|_| {
        UsageError(format!(
            "`{text}` is no request id: it stands in the header x-request-id of an answer; or write `last`."
        ))
    })
}

fn render(record: &RequestRecord) -> String {
    let RequestRecord { request_id, model, principal, prompt_tokens, expected_tokens, .. } = record;
    let mut text = format!(
        "Request {request_id} for {model}, on behalf of {principal}: {prompt_tokens} tokens of prompt, about \
         {expected_tokens} of answer expected; waited {} ms for its turn.\n",
        record.admitted_after_ms
    );
    for attempt in &record.attempts {
        text += &attempt_text(attempt);
    }
    for note in &record.notes {
        text += &format!("\nNote: {note}.\n");
    }
    match (&record.outcome, record.total_ms) {
        (Some(outcome), Some(total)) => text += &format!("\nEnded after {total} ms: {outcome}.\n"),
        _ => text += "\nStill running.\n",
    }
    text
}

fn attempt_text(attempt: &Attempt) -> String {
    let Attempt { at_ms, cause, node, numerics, tokens, .. } = attempt;
    let mut text = format!("\nAfter {at_ms} ms, {cause}: sent to {node} ({numerics}).\n");
    let head = ["", "NODE", "PREDICTED", "QUEUE", "LOAD", "PROMPT", "ANSWER", "CACHED", "HERE", "RUN", "WAIT", "SLOTS"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(attempt.considered.iter().filter(|one| one.estimate.is_some()).map(|one| row(one, node)));
    if rows.len() > 1 {
        text += &table(&rows, 2);
    }
    for (one, why) in attempt.considered.iter().filter_map(|one| Some((one, one.left_out.as_ref()?))) {
        text += &format!("{} was left out: {why}.\n", one.node);
    }
    match &attempt.ended {
        Some(ended) => text += &format!("It delivered {tokens} tokens; {ended}.\n"),
        None => text += &format!("It has delivered {tokens} tokens.\n"),
    }
    text
}

fn row(one: &Considered, chosen: &str) -> Vec<String> {
    let estimate = one.estimate.unwrap_or_default();
    let seconds = |value: f64| format!("{value:.3}s");
    vec![
        if one.node == chosen { ">".into() } else { String::new() },
        one.node.clone(),
        seconds(estimate.total_s()),
        seconds(estimate.queue_s),
        seconds(estimate.load_s),
        seconds(estimate.prompt_s),
        seconds(estimate.output_s),
        one.cached_tokens.to_string(),
        one.in_flight.to_string(),
        one.running.to_string(),
        one.waiting.to_string(),
        one.slots.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_as_people_find_them() {
        let id = "00112233445566778899aabbccddeeff";
        let parsed = Some(id.parse().unwrap());
        assert_eq!(read_id("last").unwrap(), None);
        for text in [id.to_owned(), format!("req_{id}"), format!("chatcmpl-{id}")] {
            assert_eq!(read_id(&text).unwrap(), parsed);
        }
        assert!(read_id("yesterday").is_err());
    }
}
