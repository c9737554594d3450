//! `ingle drain`: a node takes nothing new, its answers finish or move.

use std::time::Duration;

use super::{explain_error, unexpected};
use crate::cli::Drain;
use crate::config::Settings;
use crate::control::{Client, Reply, Request};
use crate::exit::UsageError;
use crate::output;

/// What comes on top of the drain's own limit.
const MARGIN: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(3_600);

/// Asks the running node, which asks the other one.
pub async fn run(settings: &Settings, drain: Drain) -> anyhow::Result<()> {
    let Drain { node, limit, undo, json } = drain;
    if limit > LONGEST {
        return Err(UsageError("A drain can be given an hour at most.".into()).into());
    }
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Drain { node: node.clone(), limit_ms, undo };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    if !undo {
        output::complain(&format!("{node} takes nothing new; waiting for its answers ..."));
    }
    let Reply::Drained { running, moved } = client.next(limit + MARGIN).await? else { return Err(unexpected()) };
    if json {
        let report = serde_json::json!({ "node": node, "draining": !undo, "running": running, "moved": moved });
        return output::print(&format!("{report}\n"));
    }
    let flag = settings.state_dir_flag();
    output::print(&if undo {
        format!("{node} takes work again.\n")
    } else {
        let finished = running.saturating_sub(moved);
        format!(
            "{node} is drained: {finished} answers finished there, {moved} had to move. \
             `ingle drain {node} --undo{flag}` lets it take work again; so does a restart.\n"
        )
    })
}
