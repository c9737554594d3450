//! Commands talk to the node of their state directory over a local socket, readable by its owner only.

mod client;
mod events;
mod loading;
mod messages;
mod models;
mod server;

pub use client::{Client, ControlError};
pub use messages::{LoadedOn, Reply, Request};
pub use models::{ModelsReply, ModelsRequest};
pub use server::ControlServer;
