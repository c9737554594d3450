//! `ingle ps`: what is loaded on which node.

use std::time::Duration;

use ingle_actors::worker::manager::{Promised, SeenModel};

use super::status::table;
use super::{explain_error, unexpected};
use crate::cli::Processes;
use crate::config::Settings;
use crate::control::{Client, LoadedOn, Reply, Request};
use crate::output;

/// The node answers from memory: one that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// Prints what the running node knows.
pub async fn run(settings: &Settings, options: Processes) -> anyhow::Result<()> {
    let mut client =
        Client::ask(&settings.state_dir, &Request::Loaded).await.map_err(|error| explain_error(settings, error))?;
    let Reply::Loaded(nodes) = client.next(DEADLINE).await? else { return Err(unexpected()) };
    if options.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&nodes)?));
    }
    output::print(&render(&nodes))?;
    let failed = nodes.iter().flat_map(|on| on.models.iter().map(move |model| (&on.node, model)));
    for (node, model) in failed.filter(|(_, model)| model.state.starts_with("failed")) {
        output::complain(&format!("notice: {} on {node} is {}", model.name, model.state));
    }
    Ok(())
}

fn render(nodes: &[LoadedOn]) -> String {
    let head = ["NODE", "MODEL", "IS", "KEEP", "MEMORY", "PROMISED", "SLOTS", "RUN", "WAIT", "SINCE", "IDLE"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for LoadedOn { node, models } in nodes {
        rows.extend(models.iter().map(|model| row(node, model)));
    }
    if rows.len() == 1 {
        return "No model is loaded or known here. `ingle models load <name|file>` loads one.\n".into();
    }
    table(&rows, 4)
}

fn row(node: &str, model: &SeenModel) -> Vec<String> {
    let dash = || "-".to_owned();
    let time = |ms: Option<u64>| ms.map_or_else(dash, in_words);
    let bytes = |bytes: Option<u64>| bytes.map_or_else(dash, |bytes| format!("{} MiB", bytes >> 20));
    let state = match (model.state.split_once(" ("), model.ready_in_ms) {
        (Some(("failed", _)), _) => "failed".to_owned(),
        (_, Some(ms)) => format!("{} (ready in about {})", model.state, in_words(ms)),
        _ => model.state.clone(),
    };
    let keep = match (model.pinned, model.keep_alive_s) {
        (true, _) => "pinned".to_owned(),
        (false, Some(seconds)) => in_words(seconds.saturating_mul(1_000)),
        (false, None) => "until needed".to_owned(),
    };
    let promised = model.promised.map(|Promised { weights, kv, other }| weights + kv + other);
    vec![
        node.to_owned(),
        model.name.clone(),
        state,
        keep,
        bytes(model.resident),
        bytes(promised),
        model.slots.to_string(),
        model.running.to_string(),
        model.waiting.to_string(),
        time(model.ready_for_ms),
        time(model.idle_ms),
    ]
}

fn in_words(ms: u64) -> String {
    match ms {
        0..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_is_loaded_and_what_it_takes() {
        let model = SeenModel {
            name: "tiny".into(),
            kind: None,
            state: "ready".into(),
            source: "/m/tiny.gguf".into(),
            digest: None,
            is_default: true,
            pinned: true,
            backend: "cpu".into(),
            context_length: 2_048,
            slots: 16,
            running: 1,
            waiting: 0,
            promised: Some(Promised { weights: 50 << 20, kv: 60 << 20, other: 100 << 20 }),
            resident: Some(90 << 20),
            pid: Some(5),
            ready_for_ms: Some(125_000),
            idle_ms: None,
            keep_alive_s: None,
            ready_in_ms: None,
        };
        let other = SeenModel {
            name: "big".into(),
            state: "loading".into(),
            pinned: false,
            promised: None,
            resident: None,
            running: 0,
            ready_for_ms: None,
            keep_alive_s: Some(300),
            ready_in_ms: Some(7_300),
            ..model.clone()
        };
        let nodes = [LoadedOn { node: "tower".into(), models: vec![model, other] }];
        let expected = "\
NODE   MODEL  IS                            KEEP    MEMORY  PROMISED  SLOTS  RUN  WAIT  SINCE  IDLE
tower  tiny   ready                         pinned  90 MiB   210 MiB     16    1     0  2 min     -
tower  big    loading (ready in about 7 s)  5 min        -         -     16    0     0      -     -
";
        assert_eq!(render(&nodes), expected);
        assert!(render(&[]).contains("ingle models load"));
    }
}
