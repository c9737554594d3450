//! `ingle up`: the node, from its sockets to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use ingle_actors::Node;
use ingle_actors::node::{DeviceKind, ModelChoice, NodeOptions};
use ingle_actors::platform::{EndSignals, graphics_cards, raise_open_files_limit};
use ingle_actors::protocol::liveness::Health;
use ingle_actors::protocol::wire::v2::ModelState;
use ingle_actors::worker::EndpointWorker;
use tokio::sync::Semaphore;

use super::progress::Progress;
use crate::config::{Listen, Settings, endpoints, is_loopback};
use crate::control::ControlServer;
use crate::exit::UsageError;
use crate::http::{self, App, Guard, Server, bind, routes};
use crate::output::{complain, say};

/// What is already written must still reach its client when the node has ended.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// How much longer than its limit a drain may take before we no longer wait for it.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

/// Runs a node until a signal comes.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut signals = EndSignals::listen().context("Signals cannot be received")?;
    let http = resolve("HTTP", &settings.http).await?;
    let quic = resolve("QUIC", &settings.quic).await?;
    refuse_beyond_loopback(http)?;
    refuse_missing_model(&settings)?;
    let endpoints = endpoints::options(&settings.endpoints, |name| std::env::var_os(name))?;
    let listener = bind(http).await?;
    let http = listener.local_addr().context("The HTTP socket has no address")?;

    let options = NodeOptions { endpoints, ..node_options(&settings, http, quic) };
    let start = Box::pin(Node::start(options));
    let node = tokio::select! {
        started = start => Arc::new(started?),
        () = signals.next() => return Ok(()),
    };
    let app = Arc::new(App {
        node: node.clone(),
        body_limit: settings.body_limit,
        body_memory: Arc::new(Semaphore::new(http::BODY_MEMORY_KIB)),
        request_timeout: settings.request_timeout,
        draining: AtomicBool::new(false),
    });
    let guard = Guard { allowed_hosts: settings.allowed_hosts.clone() };
    let server = Server::start(listener, routes(app.clone(), guard), affordable(settings.connections));
    let control = match ControlServer::start(&settings.state_dir, node.clone(), settings.request_timeout) {
        Ok(control) => control,
        Err(error) => {
            node.shutdown(Duration::ZERO).await;
            return Err(error);
        }
    };
    say(&format!("Ingle node `{}` at http://{http}", settings.name));
    let computes = matches!(settings.model, Some(ModelChoice::Default | ModelChoice::File(_)));
    if computes && let Some(line) = unused_cards(&graphics_cards(), settings.device, cfg!(feature = "gpu")) {
        complain(&line);
    }
    let mut telling = tokio::spawn(tell(node.clone(), http, settings.state_dir_flag()));

    let useless = tokio::select! {
        () = signals.next() => None,
        told = &mut telling => told.ok(),
    };
    telling.abort();
    if useless.is_none() {
        complain("Ending: running answers may finish. Once more ends at once.");
    }
    app.draining.store(true, Ordering::Relaxed);
    tokio::select! {
        () = end(&node, &server, &control, settings.drain_limit) => {}
        () = signals.next() => complain("Ended at once."),
    }
    match useless {
        Some(why) => Err(anyhow!("The model does not run, and there is no other machine to ask: {why}")),
        None => Ok(()),
    }
}

/// What to say of cards that this build leaves idle. Nothing where the CPU is wanted, or where the build can use them:
/// then the line that says `Ready` names what computes.
fn unused_cards(cards: &[String], device: DeviceKind, has_support: bool) -> Option<String> {
    if cards.is_empty() || has_support || device == DeviceKind::Cpu {
        return None;
    }
    Some(format!(
        "Found: {}. This build computes on the CPU; `cargo build --release --features gpu` makes one that can use it.",
        cards.join(", ")
    ))
}

/// A connection needs one file descriptor while it is idle or waits its turn. Only requests at the workers need more,
/// and those are bounded by their slots: a quarter of all, but no more than 4,096, is for them and the rest of the node.
fn affordable(connections: usize) -> usize {
    let files = raise_open_files_limit();
    let most = files - (files / 4).min(4_096);
    let most = usize::try_from(most).unwrap_or(usize::MAX).max(16);
    if connections > most {
        tracing::info!(
            connections,
            most,
            "fewer HTTP connections than configured: the system allows too few open files"
        );
    }
    connections.min(most)
}

/// Drains and ends everything. HTTP goes last: while answers finish, new requests still get a clear 503.
async fn end(node: &Node, server: &Server, control: &ControlServer, limit: Duration) {
    if tokio::time::timeout(limit + DRAIN_MARGIN, node.shutdown(limit)).await.is_err() {
        tracing::warn!("the node did not end in time");
    }
    tokio::join!(server.close(FLUSH_LIMIT), control.close(FLUSH_LIMIT));
}

fn node_options(settings: &Settings, http: SocketAddr, quic: SocketAddr) -> NodeOptions {
    NodeOptions {
        state_dir: settings.state_dir.clone(),
        quic,
        http,
        name: settings.name.clone(),
        mdns: settings.mdns,
        peers: settings.peers.clone(),
        model: settings.model.clone(),
        device: settings.device,
        parameters: settings.parameters.clone(),
        placement: settings.placement,
        model_memory: settings.model_memory,
        admission: settings.admission,
        endpoints: Vec::new(),
        model_cache: settings.model_cache.clone(),
        model_cache_limit: settings.model_cache_limit,
        engine_environment: settings.log.environment(),
    }
}

async fn resolve(what: &str, listen: &Listen) -> Result<SocketAddr, UsageError> {
    listen.resolve().await.map_err(|error| UsageError(format!("The {what} address {listen} is not known: {error}.")))
}

/// Whoever reaches HTTP may use it: until there are accounts that must be this machine alone.
fn refuse_beyond_loopback(http: SocketAddr) -> Result<(), UsageError> {
    if is_loopback(http.ip()) {
        return Ok(());
    }
    Err(UsageError(format!(
        "HTTP at {http} would answer other machines, and everybody who reaches it could use it: authentication is \
         not built yet. Use a loopback address, as in `--http 127.0.0.1:{}`. Other machines get in as nodes: type \
         `ingle token`.",
        http.port()
    )))
}

fn refuse_missing_model(settings: &Settings) -> Result<(), UsageError> {
    match &settings.model {
        Some(ModelChoice::File(path)) if !path.is_file() => Err(UsageError(format!(
            "There is no model file {}. --model takes the path of a GGUF file, `default` or `none`.",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Tells people how the models are until they are there, and whenever that changes. Ends where the node is of no use
/// to anybody, with the reason.
async fn tell(node: Arc<Node>, http: SocketAddr, state_dir_flag: String) -> String {
    let endpoints = node.endpoints().iter().enumerate().map(|(index, endpoint)| {
        // The lines to copy stand there once.
        let first = index == 0 && node.model_state().is_none();
        tell_of_endpoint(&node, endpoint, first.then_some((http, state_dir_flag.as_str())))
    });
    tokio::select! {
        why = tell_of_model(&node, http, &state_dir_flag) => why,
        _ = futures_util::future::join_all(endpoints), if !node.endpoints().is_empty() => std::future::pending().await,
    }
}

/// An endpoint that is not there may come: a node with nothing else waits for it.
async fn tell_of_endpoint(node: &Node, endpoint: &EndpointWorker, ready: Option<(SocketAddr, &str)>) {
    let mut states = endpoint.states();
    let mut was_ready = false;
    loop {
        let state = states.borrow_and_update().clone();
        let (name, backend) = (endpoint.name(), endpoint.backend());
        match (&state, ready) {
            (ModelState::Ready, Some((http, state_dir_flag))) if !was_ready => {
                let is_default = is_default(node, &name);
                say(&ready_lines(http, Some(OwnModel { name, backend, is_default }), state_dir_flag));
            }
            (ModelState::Ready, _) => say(&format!("Also ready: {name} on {backend}")),
            (ModelState::Failed { why }, _) => complain(&format!("{name} on {backend} does not answer: {why}")),
            _ => {}
        }
        was_ready |= state == ModelState::Ready;
        if states.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn tell_of_model(node: &Node, http: SocketAddr, state_dir_flag: &str) -> String {
    let Some(mut states) = node.model_state() else {
        if node.endpoints().is_empty() {
            say(&ready_lines(http, None, state_dir_flag));
        }
        return std::future::pending().await;
    };
    let mut progress = Progress::new();
    let mut was_ready = false;
    loop {
        let state = states.borrow_and_update().clone();
        progress.show(&state, &node.model_origin());
        match &state {
            ModelState::Ready if was_ready => complain("The model answers again."),
            ModelState::Ready => {
                was_ready = true;
                say(&ready_lines(http, own_model(node), state_dir_flag));
            }
            ModelState::Failed { why } => {
                if !was_ready && node.endpoints().is_empty() && !has_company(node).await {
                    return why.clone();
                }
                complain(&format!("The model does not run: {why}"));
            }
            _ => {}
        }
        if states.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Other machines can answer for this one: a node that lost its model is still a way in to them. Members that are
/// only remembered get a moment to show up.
async fn has_company(node: &Node) -> bool {
    for _ in 0..20 {
        let others = node.status().map(|status| status.nodes).unwrap_or_default();
        if others.iter().skip(1).any(|node| node.health == Health::Alive) {
            return true;
        }
        if others.len() <= 1 {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    false
}

/// This node's model, as people are told of it.
struct OwnModel {
    name: String,
    /// What it runs on; empty where that is not known.
    backend: String,
    /// Requests that name no model get this one.
    is_default: bool,
}

fn own_model(node: &Node) -> Option<OwnModel> {
    let (name, backend) = node.own_model()?;
    let is_default = is_default(node, &name);
    Some(OwnModel { name, backend, is_default })
}

fn is_default(node: &Node, name: &str) -> bool {
    node.models().iter().any(|model| model.name == name && model.is_default)
}

/// `model` is `None` for a node without one.
fn ready_lines(http: SocketAddr, model: Option<OwnModel>, state_dir_flag: &str) -> String {
    // The line to copy must work: a model that is no default one has to be named.
    let named = match &model {
        Some(model) if !model.is_default => format!("\"model\":{},", serde_json::Value::from(model.name.as_str())),
        _ => String::new(),
    };
    let with = match model {
        Some(OwnModel { name, backend, .. }) if backend.is_empty() => format!("with {name}"),
        Some(OwnModel { name, backend, .. }) => format!("with {name} on {backend}"),
        None => "without a model of its own: it asks the other nodes".into(),
    };
    let url = format!("http://{http}/v1/chat/completions");
    // Shells take brackets for patterns.
    let url = if url.contains('[') { format!("'{url}'") } else { url };
    format!(
        "Ready: http://{http}/v1 {with}\n\n  curl {url} -H 'Content-Type: application/json' -d \
         '{{{named}\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}'\n\nTo add a machine, type `ingle \
         token{state_dir_flag}` here in another terminal and follow what it says. Ctrl-C ends the node."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_beyond_loopback_is_refused_with_what_to_do() {
        for address in ["0.0.0.0:80", "192.168.1.5:80", "[::]:80"] {
            let error = refuse_beyond_loopback(address.parse().unwrap()).unwrap_err();
            assert!(error.0.contains("authentication is not built yet"), "{error}");
        }
        assert!(refuse_beyond_loopback("127.0.0.1:80".parse().unwrap()).is_ok());
        assert!(refuse_beyond_loopback("[::1]:80".parse().unwrap()).is_ok());
    }

    #[test]
    fn an_idle_card_is_told_once_it_matters() {
        let cards = ["NVIDIA GPU (2684)".to_owned()];
        let line = unused_cards(&cards, DeviceKind::Auto, false).unwrap();
        assert!(line.contains("NVIDIA GPU (2684)") && line.contains("--features gpu"), "{line}");
        assert_eq!(unused_cards(&cards, DeviceKind::Cpu, false), None);
        assert_eq!(unused_cards(&cards, DeviceKind::Auto, true), None);
        assert_eq!(unused_cards(&[], DeviceKind::Auto, false), None);
    }

    #[test]
    fn the_ready_lines_have_one_command_to_copy() {
        let model = Some(OwnModel { name: "smollm2".into(), backend: "cpu".into(), is_default: true });
        let lines = ready_lines("127.0.0.1:5".parse().unwrap(), model, " --state-dir /s");
        assert!(lines.starts_with("Ready: http://127.0.0.1:5/v1 with smollm2 on cpu\n"));
        let curl = lines.lines().find(|line| line.trim_start().starts_with("curl ")).unwrap();
        let body = curl.split_once("-d '").unwrap().1.strip_suffix('\'').unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["messages"][0]["content"], "hello");
        assert!(lines.contains("`ingle token --state-dir /s`"));
        let echo = Some(OwnModel { name: "echo".into(), backend: String::new(), is_default: false });
        let lines = ready_lines("127.0.0.1:5".parse().unwrap(), echo, "");
        assert!(lines.contains(r#"-d '{"model":"echo","messages":["#), "{lines}");
        assert!(ready_lines("[::1]:5".parse().unwrap(), None, "").contains("curl 'http://[::1]:5/"));
    }
}
