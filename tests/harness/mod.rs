//! Machines, as the tests see them: real processes of the real binary, each with a state directory of its own.
//!
//! Every wait has a deadline and says what it waited for. What a machine logged is shown where its test fails.
//! Processes are looked up in `/proc`, so these tests need Linux.

mod copies;
mod far_server;
mod http;
mod hub;
mod machine;
mod process;
mod quic;
mod registry;
mod status;

use std::time::Duration;

pub use copies::{DEFAULT_FILE, file_in, until_arrived, without_sources};
pub use far_server::{FAR_MODEL, FarServer, far};
pub use http::{Answer, Events, Streamed, client};
pub use hub::{Hub, tiny};
pub use machine::Machine;
pub use process::{Ran, finish, ingle, is_alive, kill, listening_ports, run};
pub use quic::{Certificate, QuicClient, tls};
pub use registry::to;
pub use status::Status;

pub use rustix::process::Signal;
pub use serde_json::{Value, json};

/// How long anything may take that should come by itself. Generous: the machine may be busy building.
pub const DEADLINE: Duration = Duration::from_secs(40);
/// How long a model file may take to arrive.
pub const FETCH_DEADLINE: Duration = Duration::from_secs(400);
const PAUSE: Duration = Duration::from_millis(100);

/// The usual two: `tower` with an echo engine, and `mini`, which has no model and knows tower's.
pub async fn tower_and_mini() -> (Machine, Machine) {
    // What is registered is these tests' business, and stays where they put it.
    let mut tower = Machine::new("tower").model("echo").settings("[placement]\nautomatic = false");
    let mut mini = Machine::new("mini");
    tower.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.until("tower's model is ready", |status| status.model("tower")["state"] == "ready").await;
    (tower, mini)
}

/// Some machines that answer with `model`, and `mini`, which has none and knows theirs.
pub async fn workers_and_mini(names: &[&str], model: &str) -> (Vec<Machine>, Machine) {
    let mut workers: Vec<Machine> = names.iter().map(|name| Machine::new(name).model(model)).collect();
    let (first, others) = workers.split_first_mut().unwrap();
    first.up().await;
    for other in others {
        other.join(first).await;
        other.up().await;
    }
    let mut mini = Machine::new("mini");
    mini.join(&workers[0]).await;
    mini.up().await;
    for worker in &workers {
        let ready = |status: &Status| status.model(&worker.name)["state"] == "ready";
        mini.until("all models are ready", ready).await;
    }
    (workers, mini)
}

/// An answer of several minutes from an echo engine.
pub const LONG: &str = "repeat 1300 every 50ms: hello ";

/// A request to the echo engine.
pub fn echo(text: &str) -> Value {
    json!({"model": "echo", "messages": [{"role": "user", "content": text}]})
}

/// Asks again and again until there is a value.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    until_or(DEADLINE, &mut ask).await.unwrap_or_else(|| panic!("waited {DEADLINE:?} in vain: {what}"))
}

/// `None` where there is no value in time.
async fn until_or<T>(limit: Duration, ask: &mut impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if let Some(value) = ask().await {
            return Some(value);
        }
        if tokio::time::Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
