//! `ingle status`: who is there, and what they do.

use std::time::Duration;

use ingle_actors::monitor::{ClusterStatus, LatencySummary, ModelStatus, NodeStatus};

use super::{explain_error, unexpected};
use crate::cli::Status;
use crate::config::Settings;
use crate::control::{Client, Reply, Request};
use crate::output;

/// The node answers from memory: one that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// Prints the status that the running node gives.
pub async fn run(settings: &Settings, status: Status) -> anyhow::Result<()> {
    let mut client =
        Client::ask(&settings.state_dir, &Request::Status).await.map_err(|error| explain_error(settings, error))?;
    let Reply::Status(cluster) = client.next(DEADLINE).await? else { return Err(unexpected()) };
    if status.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&cluster)?));
    }
    output::print(&render(&cluster))?;
    for problem in &cluster.problems {
        output::complain(&format!("notice: {problem}"));
    }
    Ok(())
}

fn render(status: &ClusterStatus) -> String {
    let cluster: String = status.cluster.chars().take(8).collect();
    let count = status.nodes.len();
    let noun = if count == 1 { "node" } else { "nodes" };
    let http = &status.http;
    let mut text = format!("Cluster {cluster}, {count} {noun}; HTTP of this one at http://{http}/v1\n\n");
    let head = ["NODE", "ID", "ADDRESS", "STATE", "HEARD", "MODEL", "IS", "RUN", "WAIT", "TOK/S"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for node in &status.nodes {
        rows.extend(node_rows(node, node.id == status.this_node));
    }
    text += &table(&rows, 7);
    for node in status.nodes.iter().filter(|node| !node.health.why().is_empty()) {
        text += &format!("\n{} is {}: {}\n", node.name, node.health.word(), node.health.why());
    }
    for node in &status.nodes {
        for (model, why) in node.models.iter().filter_map(|model| Some((model, failure(model)?))) {
            text += &format!("\n{} on {} has failed: {why}\n", model.name, node.name);
        }
    }
    for node in &status.nodes {
        for (model, why) in node.models.iter().filter_map(|model| Some((model, model.trouble.as_ref()?))) {
            text += &format!("\n{} on {} gets no requests from here now: {why}\n", model.name, node.name);
        }
    }
    if status.waiting > 0 {
        text += &format!("\n{} requests that entered here wait for a worker.\n", status.waiting);
    }
    if !status.latencies.is_empty() {
        let head = ["ANSWERED BY", "MODEL", "DONE", "FAILED", "QUEUE", "PREFILL", "FIRST", "GAP", "TOTAL"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(status.latencies.iter().map(latency_row));
        text += "\nRequests that entered here, p50/p99 in ms:\n";
        text += &table(&rows, 2);
    }
    text
}

/// One row for each model of the node, at least one.
fn node_rows(node: &NodeStatus, is_this: bool) -> Vec<Vec<String>> {
    let name = if is_this { format!("{} (this)", node.name) } else { node.name.clone() };
    let id: String = node.id.to_string().chars().take(8).collect();
    let about = [name, id, node.address.clone(), node.health.word().to_owned(), heard(node.age_ms)];
    let dash = || "-".to_owned();
    if node.models.is_empty() {
        return vec![about.into_iter().chain([dash(), dash(), dash(), dash(), dash()]).collect()];
    }
    let row = |(index, model): (usize, &ModelStatus)| {
        let about = if index == 0 { about.to_vec() } else { vec![String::new(); about.len()] };
        // Adding zero makes -0.0 plain.
        let speed = format!("{:.1}", model.tokens_per_second + 0.0);
        let does = [model.name.clone(), in_short(model), model.running.to_string(), model.waiting.to_string(), speed];
        about.into_iter().chain(does).collect()
    };
    node.models.iter().enumerate().map(row).collect()
}

/// Why a model failed, in full: too long for a table.
fn failure(model: &ModelStatus) -> Option<&str> {
    model.state.strip_prefix("failed (")?.strip_suffix(')')
}

fn in_short(model: &ModelStatus) -> String {
    if failure(model).is_some() { "failed".into() } else { model.state.clone() }
}

fn heard(age_ms: Option<u64>) -> String {
    match age_ms {
        None => "never".into(),
        Some(0..1_000) => "now".into(),
        Some(ms @ 1_000..120_000) => format!("{} s ago", ms / 1_000),
        Some(ms @ 120_000..7_200_000) => format!("{} min ago", ms / 60_000),
        Some(ms) => format!("{} h ago", ms / 3_600_000),
    }
}

fn latency_row(latency: &LatencySummary) -> Vec<String> {
    // Below ten the first decimal counts.
    let short = |ms: f64| if ms < 9.95 { format!("{ms:.1}") } else { format!("{ms:.0}") };
    let pair = |[p50, p99]: [f64; 2]| format!("{}/{}", short(p50), short(p99));
    vec![
        latency.node.clone(),
        latency.model.clone(),
        latency.finished.to_string(),
        latency.failed.to_string(),
        pair(latency.queue_ms),
        pair(latency.prefill_ms),
        pair(latency.first_token_ms),
        pair(latency.gap_ms),
        pair(latency.total_ms),
    ]
}

/// Columns as wide as their widest cell; those from `numbers` on stand to the right.
pub(super) fn table(rows: &[Vec<String>], numbers: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        // Names come from other machines: they must not steer the terminal.
        let row: Vec<String> = row.iter().map(|cell| cell.chars().filter(|c| !c.is_control()).collect()).collect();
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column >= numbers { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use ingle_actors::protocol::NodeId;
    use ingle_actors::protocol::liveness::Health;

    use super::*;

    fn node(name: &str, id: u8, health: Health, age_ms: Option<u64>, models: Vec<ModelStatus>) -> NodeStatus {
        NodeStatus {
            name: name.into(),
            id: NodeId([id; 16]),
            address: format!("192.168.1.{id}:11436"),
            health,
            age_ms,
            control_round_trip_ms: None,
            protocol: Some(2),
            software: "0.1.0".into(),
            models,
        }
    }

    #[test]
    fn the_table_says_who_is_there_and_why_somebody_is_not() {
        let model = ModelStatus {
            name: "smollm2".into(),
            kind: None,
            state: "ready".into(),
            engine: None,
            trouble: None,
            digest: None,
            is_default: true,
            backend: "cpu".into(),
            context_length: 2048,
            slots: 16,
            running: 1,
            waiting: 0,
            tokens_per_second: 31.53,
            steps: 7,
            features: vec![],
        };
        let latency = LatencySummary {
            node: "tower".into(),
            model: "smollm2".into(),
            finished: 12,
            failed: 1,
            cancelled: 2,
            queue_ms: [0.2, 1.6],
            prefill_ms: [80.0, 120.0],
            first_token_ms: [95.0, 140.0],
            gap_ms: [30.0, 45.0],
            total_ms: [900.0, 2000.0],
        };
        let status = ClusterStatus {
            cluster: "0123456789abcdef".into(),
            this_node: NodeId([1; 16]),
            http: "127.0.0.1:11435".into(),
            nodes: vec![
                node("tower", 1, Health::Alive, Some(0), vec![model]),
                node("mini", 2, Health::Failed { why: "timed out".into() }, Some(12_400), vec![]),
            ],
            waiting: 0,
            latencies: vec![latency],
            problems: vec![],
        };
        let expected = "\
Cluster 01234567, 2 nodes; HTTP of this one at http://127.0.0.1:11435/v1

NODE          ID        ADDRESS            STATE   HEARD     MODEL    IS     RUN  WAIT  TOK/S
tower (this)  01010101  192.168.1.1:11436  alive   now       smollm2  ready    1     0   31.5
mini          02020202  192.168.1.2:11436  failed  12 s ago  -        -        -     -      -

mini is failed: timed out

Requests that entered here, p50/p99 in ms:
ANSWERED BY  MODEL    DONE  FAILED    QUEUE  PREFILL   FIRST    GAP     TOTAL
tower        smollm2    12       1  0.2/1.6   80/120  95/140  30/45  900/2000
";
        assert_eq!(render(&status), expected);
    }
}
