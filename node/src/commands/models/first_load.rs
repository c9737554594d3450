//! A model that was registered with a file is loaded somewhere before that counts as done: what cannot be loaded is
//! not left behind half registered.

use std::time::Duration;

use anyhow::bail;
use ingle_actors::protocol::memory::is_no_room;
use ingle_actors::registry::{OnNode, ShownModel};
use tokio::time::{Instant, sleep};

use super::registry::{ask, status_of};
use crate::config::Settings;
use crate::control::ModelsRequest;
use crate::output::complain;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(300);
/// While nothing changes something is said so often.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// For so long nobody may have begun to load it: machines come one after the other where the first has no room.
const NOBODY: Duration = Duration::from_secs(25);

/// How far it is, over all nodes.
#[derive(Debug, PartialEq)]
enum Stand {
    /// It answers somewhere.
    Ready,
    /// It is on its way, in words.
    Coming(String),
    /// Nobody has begun, or those who did have no room; with what they said.
    Nobody(Vec<String>),
    /// It cannot be loaded, and other machines would fail alike.
    Failed(String),
}

fn stand(nodes: &[OnNode]) -> Stand {
    let why = |on: &OnNode| Some(on.state.strip_prefix("failed (")?.strip_suffix(')')?.to_owned());
    if nodes.iter().any(|on| on.state == "ready") {
        return Stand::Ready;
    }
    let idle = ["absent", "unloaded", "failed", "unknown"];
    let coming = nodes.iter().find(|on| !idle.iter().any(|word| on.state.starts_with(word)));
    if let Some(on) = coming {
        return Stand::Coming(format!("{} on {}", on.state, on.node));
    }
    let failed: Vec<(String, String)> = nodes.iter().filter_map(|on| Some((on.node.clone(), why(on)?))).collect();
    match failed.iter().find(|(_, why)| !is_no_room(why)) {
        Some((node, why)) => Stand::Failed(format!("{node} cannot load it: {why}")),
        None => Stand::Nobody(failed.into_iter().map(|(node, why)| format!("{node}: {why}")).collect()),
    }
}

/// Shows how far it is until it answers somewhere. Where it cannot be loaded it is taken out of the registry again.
pub async fn until_settled(settings: &Settings, registered: ShownModel) -> anyhow::Result<ShownModel> {
    let name = registered.name.clone();
    let (mut model, mut last, mut said_at) = (registered, String::new(), Instant::now());
    let mut nobody_since = Instant::now();
    loop {
        let stand = stand(&model.nodes);
        match &stand {
            Stand::Ready => return Ok(model),
            Stand::Coming(words) => {
                nobody_since = Instant::now();
                if *words != last || said_at.elapsed() >= SAY_AGAIN {
                    complain(&format!("{name} is {words}"));
                    (last, said_at) = (words.clone(), Instant::now());
                }
            }
            Stand::Nobody(refusals) if nobody_since.elapsed() >= NOBODY => {
                if !refusals.is_empty() {
                    let why = format!("no machine has room for it:\n  {}", refusals.join("\n  "));
                    return Err(take_back(settings, &name, &why).await);
                }
                let how = match model.pinned.as_slice() {
                    [] => format!(
                        "no machine loads it by itself: load it with `ingle models pin {name} NODE`, or let machines \
                         take models ([placement] in their configuration)"
                    ),
                    pinned => format!("{} has not begun to load it: is it there?", pinned.join(", ")),
                };
                complain(&format!("notice: `{name}` is registered, and {how}"));
                return Ok(model);
            }
            Stand::Nobody(_) => {}
            Stand::Failed(why) => return Err(take_back(settings, &name, why).await),
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => {
                complain(&format!("notice: `{name}` stays registered; `ingle models status` shows how far it is"));
                return Ok(model);
            }
        }
        let found = status_of(settings).await?.models.into_iter().find(|model| model.name == name);
        let Some(found) = found else { bail!("`{name}` was removed meanwhile") };
        model = found;
    }
}

async fn take_back(settings: &Settings, name: &str, why: &str) -> anyhow::Error {
    match ask(settings, ModelsRequest::Remove { model: name.to_owned() }).await {
        Ok(_) => anyhow::anyhow!("`{name}` is not registered: {why}"),
        Err(error) => anyhow::anyhow!("`{name}` cannot be loaded, and could not be taken back ({error}): {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_no_room_is_no_failure_and_whoever_is_at_it_counts() {
        let on = |node: &str, state: &str| OnNode {
            node: node.into(),
            state: state.into(),
            backend: String::new(),
            running: 0,
            waiting: 0,
            placement: None,
        };
        let no_room = "failed (`m` needs 9 MiB of memory (weights 5 MiB, keys and values 3 MiB, 1 MiB for …)";
        assert_eq!(stand(&[on("a", "absent"), on("b", "unloaded")]), Stand::Nobody(vec![]));
        assert!(matches!(stand(&[on("a", no_room)]), Stand::Nobody(said) if said[0].starts_with("a: `m` needs")));
        let coming = stand(&[on("a", no_room), on("b", "fetching 12 %")]);
        assert_eq!(coming, Stand::Coming("fetching 12 % on b".into()));
        let failed = stand(&[on("a", no_room), on("b", "failed (has no such file (404))")]);
        assert_eq!(failed, Stand::Failed("b cannot load it: has no such file (404)".into()));
        assert_eq!(stand(&[on("a", "failed (x)"), on("b", "ready")]), Stand::Ready);
    }
}
