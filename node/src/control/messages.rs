//! What goes over the control socket: one JSON object a line. A connection carries one request and its replies.

use ingle_actors::gateway::RequestRecord;
use ingle_actors::monitor::ClusterStatus;
use ingle_actors::monitor::events::Event;
use ingle_actors::node::{JoinOptions, Joined, MintedToken, Outcome, ParameterChanges, Verification};
use ingle_actors::protocol::RequestId;
use ingle_actors::worker::manager::{LoadRequest, SeenModel};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::models::{ModelsReply, ModelsRequest};

/// The longest line. A chat text from standard input and the status of a large cluster fit well.
pub const LINE_LIMIT: u64 = 8 << 20;

/// What a command asks of the node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// The cluster as the node sees it.
    Status,
    /// A join token.
    MintToken {
        /// Seconds that it is good for.
        lifetime_s: u64,
    },
    /// Join another cluster.
    Join(JoinOptions),
    /// What became of a request.
    Explain {
        /// Its id; the last one where there is none.
        request: Option<RequestId>,
    },
    /// Let a node take nothing new.
    Drain {
        /// The node's name.
        node: String,
        /// How long its answers may take to finish there, in milliseconds.
        limit_ms: u64,
        /// Let it take work again instead.
        undo: bool,
    },
    /// What happens in the cluster.
    Events {
        /// Only what came behind this one.
        since: Option<u64>,
        /// Also what is still to come.
        follow: bool,
    },
    /// What is loaded on which node.
    Loaded,
    /// Load a model here.
    Load(LoadRequest),
    /// Unload a model here.
    Unload {
        /// Its name, or `default`.
        model: String,
        /// How long its answers may take to finish, in milliseconds.
        limit_ms: u64,
    },
    /// Ask a model for one token.
    TestModel {
        /// Its name, or `default`.
        model: String,
    },
    /// Change parameters of the node's own model, or of a registered one.
    SetParameters {
        /// The model's name, or `default`.
        model: String,
        /// What to set; null takes a parameter back.
        changes: ParameterChanges,
        /// Let the engine finish and start it anew, also where a second one could take over.
        restart: bool,
    },
    /// Read model files anew.
    VerifyModels {
        /// Those of this model; all without one.
        name: Option<String>,
    },
    /// Something about the household's models.
    Models(ModelsRequest),
    /// Answer a text.
    Chat {
        /// What the person says.
        text: String,
        /// A model's name; empty for the default one.
        model: String,
        /// Instructions, if any.
        system: Option<String>,
    },
}

/// The models of one node.
#[derive(Debug, Serialize, Deserialize)]
pub struct LoadedOn {
    /// The node's name.
    pub node: String,
    /// What it has and knows; of another node what it tells everybody.
    pub models: Vec<SeenModel>,
}

/// What the node says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To `Status`.
    Status(Box<ClusterStatus>),
    /// To `MintToken`.
    Token(MintedToken),
    /// To `Join`.
    Joined(Joined),
    /// To `Explain`.
    Explained(Box<RequestRecord>),
    /// To `Drain`.
    Drained {
        /// Answers that were running.
        running: u32,
        /// How many of them moved.
        moved: u32,
    },
    /// To `Events`: some of them, or none for a while.
    Events(Vec<Event>),
    /// To `Events`: that was all.
    NoMoreEvents,
    /// To `Loaded`: this node first.
    Loaded(Vec<LoadedOn>),
    /// To `Load`: it is ready.
    ModelReady {
        /// Its name.
        name: String,
        /// The node's.
        node: String,
    },
    /// To `Unload`: its process has ended.
    Unloaded {
        /// Bytes of memory that the process had.
        freed: u64,
    },
    /// To `TestModel`: it answers.
    Tested {
        /// The node that answered.
        node: String,
        /// The model's full name.
        model: String,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Numbers of the embedding, where it is an embedding model.
        dimensions: Option<usize>,
        /// Milliseconds until the first token, or until the embedding.
        ms: u64,
    },
    /// To `SetParameters`, `Load` and `VerifyModels`: how far it is, in words. One comes every few seconds.
    Progress(String),
    /// To `SetParameters`: they hold, and how that came.
    ParametersSet(Outcome),
    /// To `Models`.
    Models(Box<ModelsReply>),
    /// To `VerifyModels`: what came of it.
    Verified(Verification),
    /// To `Chat`: a piece of the answer.
    Text(String),
    /// To `Chat`: the answer is complete.
    Finished {
        /// The node that answered.
        node: String,
        /// The model that answered.
        model: String,
        /// `stop` or `length`.
        reason: String,
    },
    /// To everything: it did not work, and why.
    Error(String),
}

/// Why a line cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The socket broke.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The other side sends more than we take.
    #[error("a line of more than {} MiB", LINE_LIMIT >> 20)]
    TooLong,
    /// The other side speaks something else; perhaps it is of another version.
    #[error("a line that cannot be understood ({0}); are both sides of one version?")]
    Unreadable(#[from] serde_json::Error),
}

/// The next message; `None` at the end.
pub async fn read<T: for<'de> Deserialize<'de>>(
    reader: &mut (impl AsyncBufRead + Unpin),
) -> Result<Option<T>, LineError> {
    let mut line = Vec::new();
    reader.take(LINE_LIMIT).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) if line.len() as u64 == LINE_LIMIT => Err(LineError::TooLong),
        Some(_) => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
    }
}

/// Writes a message.
pub async fn write(writer: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> Result<(), LineError> {
    let mut line = serde_json::to_vec(message)?;
    if line.len() as u64 >= LINE_LIMIT {
        return Err(LineError::TooLong);
    }
    line.push(b'\n');
    writer.write_all(&line).await?;
    Ok(writer.flush().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_go_round_and_bad_ones_are_told_apart() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Request::MintToken { lifetime_s: 5 }).await.unwrap();
        assert_eq!(bytes, b"{\"command\":\"mint_token\",\"lifetime_s\":5}\n");
        let mut reader = &bytes[..];
        assert!(matches!(read::<Request>(&mut reader).await, Ok(Some(Request::MintToken { lifetime_s: 5 }))));
        assert!(matches!(read::<Request>(&mut reader).await, Ok(None)));
        assert!(matches!(read::<Request>(&mut &b"{}\n"[..]).await, Err(LineError::Unreadable(_))));
        assert!(matches!(read::<Request>(&mut &b"{\"comm"[..]).await, Err(LineError::Io(_))));
        let long = vec![b'x'; LINE_LIMIT as usize + 10];
        assert!(matches!(read::<Request>(&mut &long[..]).await, Err(LineError::TooLong)));
    }
}
