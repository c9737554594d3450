//! `ingle join`: this machine becomes a member of another machine's cluster.

use std::time::Duration;

use ingle_actors::node::{JoinOptions, Joined, join_offline};

use super::unexpected;
use crate::cli::Join;
use crate::config::Settings;
use crate::control::{Client, ControlError, Reply, Request};
use crate::output;

/// The node has 60 s for it; this is for a node that hangs.
const DEADLINE: Duration = Duration::from_secs(65);

/// Joins, through the running node or, where none runs, on the state directory itself.
pub async fn run(settings: &Settings, join: Join) -> anyhow::Result<()> {
    let Join { address, token, guest, leave_current, name } = join;
    let options = JoinOptions { address, token, guest, leave_current };
    match Client::ask(&settings.state_dir, &Request::Join(options.clone())).await {
        Ok(mut client) => {
            if name.is_some() {
                output::complain("A node runs here: it keeps the name that it has (--name counts when none runs).");
            }
            let Reply::Joined(joined) = client.next(DEADLINE).await? else { return Err(unexpected()) };
            output::print(&report(&joined, "The node that runs here belongs to it now."))
        }
        Err(ControlError::NoNode) => {
            let joined = Box::pin(join_offline(&settings.state_dir, &settings.name, options)).await?;
            let flags = settings.state_dir_flag();
            let next = format!(
                "Start the node with `ingle up{flags}`, or `ingle up --no-model{flags}` to answer with the models of \
                 the others."
            );
            output::print(&report(&joined, &next))
        }
        Err(error) => Err(error.into()),
    }
}

fn report(joined: &Joined, next: &str) -> String {
    let members = match joined.members.as_slice() {
        [] => String::new(),
        names => format!(" with {}", names.join(", ")),
    };
    let cluster: String = joined.cluster.chars().take(8).collect();
    format!("Joined the cluster {cluster}{members}.\n{next}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_whom_it_joined_and_what_comes_next() {
        let joined = Joined {
            cluster: "0123456789abcdef".into(),
            node: "ff".into(),
            members: vec!["tower".into(), "mini".into()],
        };
        assert_eq!(report(&joined, "Next."), "Joined the cluster 01234567 with tower, mini.\nNext.\n");
    }
}
