//! What happens, passed on to a command.

use std::time::Duration;

use ingle_actors::Node;
use ingle_actors::monitor::events::{MOST_FOLLOWERS, Unfollowed};
use tokio::io::AsyncWrite;
use tokio::time::timeout;

use super::messages::{LineError, Reply, write};

/// So often something is said while nothing happens, so that silence means trouble.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// A command that does not read for so long is cut off.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// Passes events on until there are no more, or for as long as the command wants.
pub async fn pass_on(
    node: &Node,
    since: Option<u64>,
    follow: bool,
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<(), LineError> {
    let Some(mut follower) = node.events().follow(since) else {
        let why = format!("{MOST_FOLLOWERS} programs follow what happens here, and no more may");
        return write(writer, &Reply::Error(why)).await;
    };
    loop {
        let events = if follow {
            timeout(SAY_AGAIN, follower.next()).await.unwrap_or_else(|_| Ok(Vec::new()))
        } else {
            follower.ready()
        };
        let (reply, is_last) = match events {
            Ok(events) if events.is_empty() && !follow => (Reply::NoMoreEvents, true),
            Ok(events) => (Reply::Events(events), false),
            Err(Unfollowed::Ending) => (Reply::NoMoreEvents, true),
            Err(why @ Unfollowed::TooSlow(_)) => (Reply::Error(why.to_string()), true),
        };
        match timeout(WRITE_DEADLINE, write(writer, &reply)).await {
            Ok(written) => written?,
            Err(_) => return Ok(()),
        }
        if is_last {
            return Ok(());
        }
    }
}
