//! Simulated clusters: the pure decisions of `ingle-protocol` driven by a made-up clock and a seeded random source.
//!
//! A scenario is a TOML file in `simulations/scenarios/` with its seeds; a seed that once failed is added to its file.
//! `cargo sim` runs all of them.

pub mod partition;
pub mod scenario;
pub mod world;
