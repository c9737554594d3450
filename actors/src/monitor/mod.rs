//! What is measured and what is known, for people and for machines.

mod status;

pub use status::{ClusterStatus, LatencySummary, ModelStatus, NodeStatus};
