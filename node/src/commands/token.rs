//! `ingle token`: what another machine needs to join.

use std::time::Duration;

use ingle_actors::node::{MintedToken, mint_token_offline};

use super::unexpected;
use crate::cli::Token;
use crate::config::Settings;
use crate::control::{Client, ControlError, Reply, Request};
use crate::exit::UsageError;
use crate::{duration, output};

/// The node has 60 s for it; this is for a node that hangs.
const DEADLINE: Duration = Duration::from_secs(65);
/// A token is for now: one that lies about for longer is a key under the mat.
const LONGEST: Duration = Duration::from_secs(7 * 86_400);

/// Prints a token, from the running node or, where none runs, from the state directory itself.
pub async fn run(settings: &Settings, token: Token) -> anyhow::Result<()> {
    if !(Duration::from_secs(1)..=LONGEST).contains(&token.expires) {
        return Err(UsageError("A token can be good for one second to seven days.".into()).into());
    }
    let request = Request::MintToken { lifetime_s: token.expires.as_secs() };
    let (minted, running) = match Client::ask(&settings.state_dir, &request).await {
        Ok(mut client) => match client.next(DEADLINE).await? {
            Reply::Token(minted) => (minted, true),
            _ => return Err(unexpected()),
        },
        Err(ControlError::NoNode) => {
            let quic = settings.quic.resolve().await?;
            let minted = mint_token_offline(&settings.state_dir, &settings.name, quic, token.expires).await?;
            (minted, false)
        }
        Err(error) => return Err(error.into()),
    };
    if !running {
        let flag = settings.state_dir_flag();
        output::complain(&format!("No node runs here now: start it with `ingle up{flag}` before the other one joins."));
    }
    if token.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&minted)?));
    }
    output::print(&report(&minted))
}

fn report(minted: &MintedToken) -> String {
    let expires = duration::words(Duration::from_secs(minted.expires_in_s));
    let token = &minted.token;
    let mut text = format!("{token}\n\nGood once, for {expires}. On the other machine type:\n\n");
    let address = minted.addresses.first().map_or("<this machine>", String::as_str);
    text += &format!("  ingle join {address} --token {token}\n");
    if let [_, others @ ..] = minted.addresses.as_slice()
        && !others.is_empty()
    {
        text += &format!("\nWhere that address is out of reach, try {}.\n", others.join(" or "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_the_token_and_the_line_to_type() {
        let addresses = vec!["192.168.1.20:11436".into(), "tower.local:11436".into()];
        let minted = MintedToken { token: "ingle1abc".into(), expires_in_s: 900, addresses };
        assert_eq!(
            report(&minted),
            "ingle1abc\n\nGood once, for 15 minutes. On the other machine type:\n\n  ingle join 192.168.1.20:11436 \
             --token ingle1abc\n\nWhere that address is out of reach, try tower.local:11436.\n"
        );
    }
}
