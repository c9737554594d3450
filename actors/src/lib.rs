//! Actors, cluster, router, workers and monitor: everything of Ingle that knows that there are other machines.
//!
//! # The supervision tree
//!
//! ```text
//!  NodeSupervisor                     restarts a child that dies, at most 3 times in 60 s, then says so in `status`
//!  ├── ClusterActor                   owns the QUIC socket and everything that hangs on this node's identity;
//!  │   ├─ accept, dial, discovery     plain async tasks behind a cancellation token (a new identity restarts them)
//!  │   ├─ a link for each peer        membership · control · pulse · inference streams on one connection
//!  │   └── NodeServer (ractor_cluster)  sessions over our QUIC streams
//!  │       └── ControlActor           one per node, known to all peers: facts and commands
//!  ├── WorkerActor (one per model)    model file → engine process → restart budget of its own
//!  │   └─ engine process              `ingle engine`, its own process: dies alone
//!  └── MonitorActor                   pulses out, latencies in
//! ```
//!
//! Nothing that happens once per request is an actor message: requests are local tasks and QUIC streams of
//! their own. Actors own and supervise that plain async code.

pub mod cluster;
mod frames;
pub mod gateway;
pub mod identity;
pub mod models;
pub mod monitor;
pub mod node;
pub mod platform;
pub mod supervisor;
pub mod worker;

pub use ingle_protocol as protocol;
pub use node::{Node, NodeOptions};
