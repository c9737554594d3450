//! A command's side of the control socket.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use ingle_actors::node::control_socket_path;
use ingle_actors::platform::{LocalStream, connect};
use tokio::io::BufReader;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::messages::{LineError, Reply, Request, read, write};

/// A node that does not take a connection after so long hangs.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// Why a command cannot talk to its node.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens there.
    #[error("no node runs there")]
    NoNode,
    /// Somebody does, but it does not work.
    #[error("The node of this state directory cannot be reached: {0}.")]
    Unreachable(String),
    /// The node itself says no.
    #[error("{0}")]
    Node(String),
}

impl From<LineError> for ControlError {
    fn from(error: LineError) -> Self {
        Self::Unreachable(error.to_string())
    }
}

/// A connection to the node of a state directory.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<OwnedReadHalf>,
    /// Kept open: closing it tells the node that we have left.
    _writer: OwnedWriteHalf,
}

impl Client {
    /// Connects to the node of `state_dir` and asks it.
    pub async fn ask(state_dir: &Path, request: &Request) -> Result<Self, ControlError> {
        let stream = open(&control_socket_path(state_dir)).await?;
        let (reader, mut writer) = stream.into_split();
        let writing = tokio::time::timeout(CONNECT_DEADLINE, write(&mut writer, request)).await;
        writing.map_err(|_| ControlError::Unreachable("it does not read".into()))??;
        Ok(Self { reader: BufReader::new(reader), _writer: writer })
    }

    /// The next reply within `limit`; one that says no is an error.
    pub async fn next(&mut self, limit: Duration) -> Result<Reply, ControlError> {
        match tokio::time::timeout(limit, read(&mut self.reader)).await {
            Err(_) => Err(ControlError::Unreachable(format!("it said nothing for {} s", limit.as_secs()))),
            Ok(Ok(Some(Reply::Error(why)))) => Err(ControlError::Node(why)),
            Ok(Ok(Some(reply))) => Ok(reply),
            Ok(Ok(None)) => Err(ControlError::Unreachable("it closed the connection without an answer".into())),
            Ok(Err(error)) => Err(error.into()),
        }
    }
}

async fn open(path: &Path) -> Result<LocalStream, ControlError> {
    match tokio::time::timeout(CONNECT_DEADLINE, connect(path)).await {
        Err(_) => Err(ControlError::Unreachable("it does not take connections".into())),
        Ok(Ok(stream)) => Ok(stream),
        // No socket, or one that a killed node left behind.
        Ok(Err(error)) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            Err(ControlError::NoNode)
        }
        Ok(Err(error)) if error.kind() == ErrorKind::PermissionDenied => {
            Err(ControlError::Unreachable("it belongs to another user".into()))
        }
        Ok(Err(error)) => Err(ControlError::Unreachable(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use ingle_actors::platform::LocalListener;

    use super::*;

    #[tokio::test]
    async fn no_node_is_told_apart_from_one_that_does_not_answer() {
        let folder = tempfile::tempdir().unwrap();
        let ask = async || Client::ask(folder.path(), &Request::Status).await;
        assert!(matches!(ask().await, Err(ControlError::NoNode)), "no socket");
        assert!(matches!(Client::ask(Path::new("/nowhere"), &Request::Status).await, Err(ControlError::NoNode)));

        let path = control_socket_path(folder.path());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(ask().await, Err(ControlError::NoNode)), "a socket that nobody listens at");

        let listener = LocalListener::bind(&path).unwrap();
        let mut client = ask().await.unwrap();
        assert!(matches!(client.next(Duration::from_millis(50)).await, Err(ControlError::Unreachable(_))), "silent");
        let mut accepted = listener.accept().await.unwrap();
        write(&mut accepted, &Reply::Error("no".into())).await.unwrap();
        assert!(matches!(client.next(Duration::from_secs(5)).await, Err(ControlError::Node(why)) if why == "no"));
        drop(accepted);
        assert!(matches!(client.next(Duration::from_secs(5)).await, Err(ControlError::Unreachable(_))), "closed");
    }
}
