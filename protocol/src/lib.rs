//! The vocabulary of an Ingle cluster, its wire frames and its pure decisions.
//!
//! This crate is the lowest floor: it does no I/O, starts no task and reads no clock. Whatever needs the time
//! or a random number takes it as an argument, so that simulations can drive the same code.

pub mod admission;
pub mod ids;
pub mod liveness;
pub mod memory;
pub mod names;
pub mod placement;
pub mod prefix;
pub mod raw_json;
pub mod recovery;
pub mod registry;
pub mod routing;
pub mod wire;

pub use ids::{ClusterId, EngineId, ModelDigest, NodeId, RequestId, to_hex};
