//! Actors, cluster, router, workers and monitor: everything of Ingle that knows that there are other machines.
//!
//! # The supervision tree
//!
//! ```text
//!  NodeSupervisor                     restarts a child that dies, at most 3 times in 60 s, then says so in `status`
//!  ├── ServiceActor "cluster"         owns a Mesh: everything that hangs on this node's identity
//!  │   ├─ accept, dial, renew …       plain async tasks behind a cancellation token; one that breaks breaks the mesh,
//!  │   │                              which is started anew (as it is when the node joins another cluster)
//!  │   ├─ a link for each peer        membership · control · pulse · inference streams on one connection
//!  │   └── NodeServer (ractor_cluster)  sessions over our QUIC streams
//!  │       └── ControlActor           one per node, known to all peers: commands and signs of life
//!  ├── ServiceActor "models"          a keeper for each model: loads it when it is wanted, lets it go when it is not
//!  │   └─ ModelWorker …               model file → engine process → restart budget of its own
//!  │      └─ engine process           `ingle engine`, its own process: dies alone
//!  ├── ServiceActor "endpoint" …      one for each server elsewhere that answers: asks it how it is
//!  ├── ServiceActor "registry"        writes down what peers say of the household's models
//!  ├── ServiceActor "endpoints"       the registered ones that are pinned to this node, come and go while it runs
//!  ├── ServiceActor "parameters"      lets this node's own model have what the registry says of it
//!  ├── ServiceActor "monitor"         what the workers are, told to the mesh
//!  └── ServiceActor "events"          watches all that, and tells what has changed
//! ```
//!
//! Nothing that happens once per request is an actor message: requests are local tasks and QUIC streams of
//! their own. Actors own and supervise that plain async code.

pub mod cluster;
mod frames;
pub mod gateway;
pub mod identity;
pub mod json;
pub mod models;
pub mod monitor;
pub mod node;
pub mod platform;
pub mod registry;
pub mod supervisor;
pub mod worker;

/// How models call tools: the engine's own, for those who write answers.
pub mod tools {
    pub use ingle_engine::text::{AnswerPart, ToolCall, ToolCallParser, ToolFormat};
}

pub use ingle_protocol as protocol;
pub use node::{Node, NodeOptions};
