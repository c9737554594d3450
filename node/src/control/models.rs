//! What commands ask of the registry of models over the control socket.

use std::sync::Arc;

use ingle_actors::Node;
use ingle_actors::node::{ModelDetails, Registered, Registration};
use ingle_actors::protocol::registry::KeepAlive;
use ingle_actors::registry::RegistryStatus;
use serde::{Deserialize, Serialize};

/// What a command asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum ModelsRequest {
    /// Register a model.
    Add(Registration),
    /// Remove one.
    Remove {
        /// Its name.
        model: String,
    },
    /// Choose what `default` means.
    SetDefault {
        /// The model; none takes the choice back.
        model: Option<String>,
        /// Also where it cannot answer now.
        force: bool,
    },
    /// Pin one to exactly these nodes.
    Pin {
        /// Its name.
        model: String,
        /// Names of nodes.
        nodes: Vec<String>,
    },
    /// Say how long one stays loaded when nobody asks it.
    KeepAlive {
        /// Its name, or `default`.
        model: String,
        /// Seconds; none for as long as its memory is not needed.
        keep_alive: Option<KeepAlive>,
    },
    /// Have the weights of one converted.
    Quantization {
        /// Its name, or `default`.
        model: String,
        /// The format; none for that of its file.
        to: Option<String>,
    },
    /// All models.
    Status,
    /// One model.
    Show {
        /// Its name, or `default`.
        model: String,
    },
}

/// What the node says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelsReply {
    /// To `Add`.
    Added(Registered),
    /// To `Remove`.
    Removed {
        /// It was the default model.
        was_default: bool,
    },
    /// To `SetDefault`, `Pin`, `KeepAlive` and `Quantization`.
    Changed,
    /// To `Status`.
    Status(RegistryStatus),
    /// To `Show`.
    Details(ModelDetails),
}

/// Does it, or says why not.
pub async fn answer(node: &Arc<Node>, request: ModelsRequest) -> Result<ModelsReply, String> {
    Ok(match request {
        ModelsRequest::Add(registration) => ModelsReply::Added(Box::pin(node.register(registration)).await?),
        ModelsRequest::Remove { model } => ModelsReply::Removed { was_default: node.unregister(&model).await? },
        ModelsRequest::SetDefault { model, force } => {
            node.set_default(model, force).await?;
            ModelsReply::Changed
        }
        ModelsRequest::Pin { model, nodes } => {
            node.pin(&model, nodes).await?;
            ModelsReply::Changed
        }
        ModelsRequest::KeepAlive { model, keep_alive } => {
            node.set_keep_alive(&model, keep_alive).await?;
            ModelsReply::Changed
        }
        ModelsRequest::Quantization { model, to } => {
            node.set_quantization(&model, to.as_deref()).await?;
            ModelsReply::Changed
        }
        ModelsRequest::Status => ModelsReply::Status(node.registry_status()?),
        ModelsRequest::Show { model } => ModelsReply::Details(node.model_details(&model)?),
    })
}
